// SPDX-License-Identifier: GPL-2.0
//! Backups of a disk in memory: every point restored is what a model says, and no damage passes.

use super::chain::{arrange, read_through, walk};
use super::read::{complete, Reader};
use super::restore::restore;
use super::wire::{Head, Header, Kind, Totals, FEATURE_ZSTD, HEADER_BYTES, VERSION};
use super::write::Writer;
use super::{take, Pace, Source, Wanted};
use crate::error::{Code, Result};
use crate::image::create::Space;
use crate::image::{Access, Image};
use crate::offline::{Go, Progress, Target};
use ploop_pure::layout::ploop1::Version;
use proptest::prelude::*;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

const GRANULE: u64 = 64 << 10;
/// Ends inside a granule.
const SIZE: u64 = 12 * GRANULE + 512;

struct Silent(Go);

impl Progress for Silent {
    fn begin(&mut self, _: &str, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
    fn note(&mut self, _: &str) {}
    fn go(&mut self) -> Go {
        self.0
    }
}

/// A disk in memory that tells holes in pieces of `hole` bytes.
struct Fake<'a> {
    disk: &'a [u8],
    hole: u64,
}

impl Source for Fake<'_> {
    fn size_bytes(&self) -> u64 {
        self.disk.len() as u64
    }

    fn next_data(&mut self, from: u64) -> Result<u64> {
        let data = self.disk[from as usize..].iter().position(|b| *b != 0);
        let at = data.map_or(u64::MAX, |nr| from + nr as u64);
        Ok((at - at % self.hole).max(from))
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(&self.disk[at as usize..at as usize + bytes.len()]);
        Ok(())
    }
}

fn header(nr: u8, features: u64) -> Header {
    Header {
        features,
        disk_bytes: SIZE,
        cluster_bytes: 64 << 10,
        id: [nr + 1; 16],
        parent: (nr > 0).then_some([nr; 16]),
        base: [1; 16],
        checkpoint: Some([0x80 | nr; 16]),
        time: 1_700_000_000 + u64::from(nr),
    }
}

fn backup(disk: &[u8], dirty: Option<&[Range<u64>]>, header: &Header) -> (Vec<u8>, Totals) {
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file, Path::new("backup"), header).unwrap();
    let mut source = Fake { disk, hole: 4096 };
    let mut ranges = dirty.into_iter().flatten().cloned().map(Ok);
    let wanted = match dirty {
        None => Wanted::All,
        Some(_) => Wanted::These(&mut ranges),
    };
    let mut silent = Silent(Go::On);
    take(
        &mut source,
        wanted,
        &mut writer,
        &mut Pace::new(0),
        &mut silent,
    )
    .unwrap();
    let totals = writer.finish().unwrap();
    assert_eq!(totals.length, file.len() as u64);
    (file, totals)
}

fn reader(file: &[u8]) -> Result<Reader<&[u8]>> {
    Reader::new(file, Path::new("backup"))
}

fn verify(file: &[u8]) -> Result<Totals> {
    let mut reader = reader(file)?;
    read_through(&mut reader, &mut Silent(Go::On))?;
    Ok(reader.totals())
}

fn restored(files: &[Vec<u8>]) -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    let mut readers: Vec<_> = files.iter().map(|f| reader(f).unwrap()).collect();
    let mut last = 0;
    let mut sink = |at: u64, bytes: &[u8]| {
        assert!(at >= last && !bytes.is_empty());
        last = at + bytes.len() as u64;
        disk[at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    };
    walk(&mut readers, &mut Silent(Go::On), &mut sink).unwrap();
    disk
}

/// A disk with data, zeros, and data that does not compress.
fn sample() -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    disk[..5000].fill(7);
    let mut x = 1u32;
    for byte in &mut disk[70_000..78_000] {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (x >> 24) as u8;
    }
    disk[SIZE as usize - 1] = 1;
    disk
}

#[test]
fn what_is_written_is_read() {
    for features in [0, FEATURE_ZSTD] {
        let disk = sample();
        let (full, totals) = backup(&disk, None, &header(0, features));
        assert_eq!((totals.zeros, verify(&full).unwrap()), (0, totals));
        assert_eq!(restored(std::slice::from_ref(&full)), disk);
        let mut next = disk.clone();
        next[..4096].fill(0);
        next[300_000] = 9;
        let dirty = [0..GRANULE, 4 * GRANULE..5 * GRANULE];
        let (part, totals) = backup(&next, Some(&dirty), &header(1, features));
        assert_eq!(totals.data + totals.zeros, 2 * GRANULE);
        assert_eq!(verify(&part).unwrap(), totals);
        assert_eq!(restored(&[full, part]), next);
    }
}

#[test]
fn every_cut_and_every_changed_byte_is_refused() {
    for features in [0, FEATURE_ZSTD] {
        let mut disk = vec![0; SIZE as usize];
        disk[..1000].fill(7);
        disk[GRANULE as usize + 100] = 1;
        let dirty = [0..512, GRANULE..GRANULE + 512, SIZE - 512..SIZE];
        let (file, _) = backup(&disk, Some(&dirty), &header(1, features));
        verify(&file).unwrap();
        for len in 0..file.len() {
            let e = verify(&file[..len]).unwrap_err();
            let want = if len < 16 {
                Code::NotAnImage
            } else {
                Code::Damaged
            };
            assert_eq!(e.code(), want, "cut to {len}: {e}");
        }
        let mut longer = file.clone();
        longer.push(0);
        assert_eq!(verify(&longer).unwrap_err().code(), Code::Damaged);
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= [0x01, 0x80, 0xff][at % 3];
            assert!(verify(&bad).is_err(), "byte {at} changed");
        }
    }
}

/// With the sums of the heads made right again: lengths and places are not believed.
#[test]
fn lying_heads_are_refused() {
    let (file, _) = backup(&sample(), None, &header(0, FEATURE_ZSTD));
    for (field, len) in [(0, 4), (4, 4), (8, 8), (16, 8), (24, 4)] {
        for value in [0, 1, 511, 513, 1 << 20, (1 << 20) + 512, u64::MAX, 1 << 63] {
            let mut bad = file.clone();
            let at = HEADER_BYTES + field;
            bad[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            if bad == file {
                continue;
            }
            let head = &mut bad[HEADER_BYTES..HEADER_BYTES + 32];
            let sum = crc32c::crc32c(&head[..28]);
            head[28..].copy_from_slice(&sum.to_le_bytes());
            let e = verify(&bad).unwrap_err();
            assert_eq!(e.code(), Code::Damaged, "field {field} as {value:#x}: {e}");
        }
    }
}

#[test]
fn other_files_and_later_versions_are_named_as_such() {
    let say = |file: &[u8]| {
        let e = verify(file).unwrap_err();
        (e.code(), e.to_string())
    };
    let (code, text) = say(&[0; 4096]);
    assert_eq!(code, Code::NotAnImage);
    assert!(text.contains("not a backup"), "{text}");
    let mut later = header(0, 0).encode();
    later[16] = 2;
    let (code, text) = say(&later);
    assert_eq!(code, Code::NotAnImage);
    assert!(
        text.contains("version 2") && text.contains("newer"),
        "{text}"
    );
    let mut features = header(0, 1 << 40).encode();
    let (code, text) = say(&features);
    assert_eq!(code, Code::NotAnImage);
    assert!(text.contains("0x10000000000"), "{text}");
    // What is reserved is zero.
    features = header(0, 0).encode();
    features[130] = 1;
    let sum = crc32c::crc32c(&features[..HEADER_BYTES - 4]);
    features[HEADER_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
    assert_eq!(say(&features).0, Code::Damaged);
}

/// The rows of the table of the page behind the line `head`: offset, size and field.
fn table(head: &str) -> Vec<(usize, usize, String)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backup-format.md");
    let page = fs::read_to_string(page).unwrap();
    let after = page.split(head).nth(1).unwrap();
    let rows = after.lines().skip_while(|l| !l.starts_with("|---"));
    let rows = rows.skip(1).take_while(|l| l.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let number = |i: usize| cells[i].parse().unwrap();
        (number(1), number(2), cells[3].to_owned())
    })
    .collect()
}

#[test]
fn the_page_says_where_everything_is() {
    let header = Header {
        cluster_bytes: 1 << 20,
        ..header(3, FEATURE_ZSTD)
    };
    let head = Head {
        kind: Kind::Zstd,
        stored: 100,
        start: 1 << 20,
        len: 4096,
        sum: 0x1234_5678,
    };
    let totals = Totals {
        records: 1,
        data: 2,
        zeros: 3,
        length: 4,
    };
    let le = |n: u64| n.to_le_bytes().to_vec();
    let header_sum = crc32c::crc32c(&header.encode()[..252]);
    let head_sum = crc32c::crc32c(&head.encode()[..28]);
    let header_fields = [
        ("magic", b"ploop-backup\x0d\x0a\x1a\x0a".to_vec()),
        ("version", le(VERSION.into())),
        ("length", le(256)),
        ("features", le(1)),
        ("disk_bytes", le(SIZE)),
        ("cluster_bytes", le(1 << 20)),
        ("kind", le(1)),
        ("id", header.id.to_vec()),
        ("parent", header.parent.unwrap().to_vec()),
        ("base", header.base.to_vec()),
        ("checkpoint", header.checkpoint.unwrap().to_vec()),
        ("time", le(header.time)),
        ("", vec![0; 132]),
        ("sum", le(header_sum.into())),
    ];
    let head_fields = [
        ("kind", le(2)),
        ("stored", le(100)),
        ("start", le(1 << 20)),
        ("len", le(4096)),
        ("data_sum", le(0x1234_5678)),
        ("sum", le(head_sum.into())),
    ];
    let end_fields = [
        ("records", le(1)),
        ("data", le(2)),
        ("zeros", le(3)),
        ("length", le(4)),
        ("digest", vec![7; 32]),
    ];
    for (title, bytes, fields) in [
        ("## Header", &header.encode()[..], &header_fields[..]),
        ("## Records", &head.encode()[..], &head_fields[..]),
        ("## End", &totals.encode(&[7; 32])[..], &end_fields[..]),
    ] {
        let mut end = 0;
        let rows = table(title);
        assert_eq!(rows.len(), fields.len(), "{title}");
        for ((offset, size, said), (name, want)) in rows.iter().zip(fields) {
            assert_eq!((*offset, said.as_str()), (end, *name), "{title}");
            end += size;
            assert_eq!(bytes[*offset..end], want[..*size], "{title} {name}");
        }
        assert_eq!(end, bytes.len(), "{title}");
    }
}

#[test]
fn backups_are_put_in_order_or_refused() {
    let path = Path::new("b");
    let of = |nrs: &[u8]| -> Vec<_> { nrs.iter().map(|n| (path, header(*n, 0))).collect() };
    assert_eq!(arrange(&of(&[2, 0, 1])).unwrap(), [1, 2, 0]);
    assert_eq!(arrange(&of(&[3, 2])).unwrap(), [1, 0]);
    for bad in [&[0, 2][..], &[0, 0], &[0, 1, 1], &[1, 3, 0]] {
        assert_eq!(
            arrange(&of(bad)).unwrap_err().code(),
            Code::Param,
            "{bad:?}"
        );
    }
    let mut files = of(&[0, 1, 1]);
    files[2].1.id = [9; 16];
    assert!(arrange(&files)
        .unwrap_err()
        .to_string()
        .contains("both build on"));
    let mut files = of(&[0, 1]);
    files[1].1.disk_bytes += 512;
    assert!(arrange(&files)
        .unwrap_err()
        .to_string()
        .contains("another size"));
    files = of(&[0, 1]);
    files[1].1.base = [8; 16];
    assert!(arrange(&files).is_err());
    // A circle, alone and beside a chain.
    files = of(&[1, 2]);
    files[0].1.parent = Some(files[1].1.id);
    assert!(arrange(&files).is_err());
    files.insert(0, (path, header(4, 0)));
    assert!(arrange(&files).is_err());
}

#[test]
fn an_end_that_is_asked_for_comes() {
    let disk = sample();
    let header = header(0, 0);
    let mut writer = Writer::new(Vec::new(), Path::new("b"), &header).unwrap();
    let mut source = Fake {
        disk: &disk,
        hole: 4096,
    };
    let mut stop = Silent(Go::Stop);
    let e = take(
        &mut source,
        Wanted::All,
        &mut writer,
        &mut Pace::new(0),
        &mut stop,
    );
    assert_eq!(e.unwrap_err().code(), Code::Aborted);
    let (file, _) = backup(&disk, None, &header);
    let e = walk(&mut [reader(&file).unwrap()], &mut stop, &mut |_, _| Ok(()));
    assert_eq!(e.unwrap_err().code(), Code::Aborted);
}

#[test]
fn a_limit_takes_its_time() {
    let began = std::time::Instant::now();
    let mut pace = Pace::new(1 << 20);
    for _ in 0..4 {
        pace.note(64 << 10, &mut Silent(Go::On)).unwrap();
    }
    assert!(began.elapsed().as_millis() >= 250);
    assert!(pace.note(1 << 40, &mut Silent(Go::Stop)).is_err());
}

/// A scratch directory, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("ploopctl-backup-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const PLOOP1: Target = Target::Ploop1 {
    version: Version::V2,
    cluster: None,
    space: Space::Thin,
};

#[test]
fn an_image_is_made_whole_or_not_at_all() {
    let scratch = Scratch::new("restore");
    let disk = sample();
    let (full, _) = backup(&disk, None, &header(0, 0));
    let mut next = disk.clone();
    next[200_000] = 1;
    let dirty = [0..512, 3 * GRANULE..4 * GRANULE];
    let (part, _) = backup(&next, Some(&dirty), &header(1, 0));
    let files = [scratch.put("1", &part), scratch.put("0", &full)];
    let out = scratch.0.join("out");
    let mut silent = Silent(Go::On);
    for (point, want) in [(None, &next), (Some(2), &next), (Some(1), &disk)] {
        let raw = Target::Raw(Space::Thin);
        restore(&files, point, &out, raw, &mut silent).unwrap();
        assert!(fs::read(&out).unwrap() == *want);
        fs::remove_file(&out).unwrap();
        restore(&files, point, &out, PLOOP1, &mut silent).unwrap();
        let report = Image::open(&out, Access::Read).unwrap().check().unwrap();
        assert!(report.unwrap().problems.is_empty());
        fs::remove_file(&out).unwrap();
    }
    for point in [Some(0), Some(3)] {
        assert!(restore(&files, point, &out, PLOOP1, &mut silent).is_err());
    }
    // The full one is missing.
    let e = restore(&files[..1], None, &out, PLOOP1, &mut silent).unwrap_err();
    assert_eq!(e.code(), Code::Param);
    complete(&files[0]).unwrap();
    // Damage behind all that the image needs is found all the same.
    let mut cut = part.clone();
    cut.pop();
    let cut = [files[1].clone(), scratch.put("cut", &cut)];
    let e = restore(&cut, None, &out, PLOOP1, &mut silent).unwrap_err();
    assert_eq!(e.code(), Code::Damaged);
    assert_eq!(complete(&cut[1]).unwrap_err().code(), Code::Damaged);
    assert!(!out.exists());
    fs::write(&out, "mine").unwrap();
    assert!(restore(&files, None, &out, PLOOP1, &mut silent).is_err());
    assert_eq!(fs::read(&out).unwrap(), b"mine");
}

/// What a round writes: a place, a length, and what; zero is a discard.
fn writes() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
    prop::collection::vec((0..SIZE, 1..3 * GRANULE, 0..4u8), 0..6)
}

/// The granules that writes touch, and `more`, joined where they meet.
fn granules(touched: &[(u64, u64, u8)], more: u32) -> Vec<Range<u64>> {
    let nr = SIZE.div_ceil(GRANULE);
    let is_dirty = |g: &u64| {
        let (start, end) = (g * GRANULE, (g + 1) * GRANULE);
        (more >> g) & 1 == 1
            || touched
                .iter()
                .any(|(at, len, _)| *at < end && at + len > start)
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for g in (0..nr).filter(is_dirty) {
        match ranges.last_mut() {
            Some(last) if last.end == g * GRANULE => last.end += GRANULE,
            _ => ranges.push(g * GRANULE..(g + 1) * GRANULE),
        }
    }
    ranges
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A checkpoint may tell of more than was written, as it goes on noting after the snapshot.
    #[test]
    fn every_point_is_what_the_disk_was(
        rounds in prop::collection::vec((writes(), any::<u32>(), any::<bool>()), 1..7),
    ) {
        let mut disk = vec![0; SIZE as usize];
        let (mut files, mut points) = (Vec::new(), Vec::new());
        for (nr, (touched, more, is_compressed)) in rounds.iter().enumerate() {
            for (at, len, byte) in touched {
                let end = (at + len).min(SIZE);
                for (i, b) in (*at..end).zip(&mut disk[*at as usize..end as usize]) {
                    *b = byte * (i % 61) as u8;
                }
            }
            let dirty = (nr > 0).then(|| granules(touched, *more & (*more >> 7)));
            let features = if *is_compressed { FEATURE_ZSTD } else { 0 };
            let (file, totals) = backup(&disk, dirty.as_deref(), &header(nr as u8, features));
            prop_assert_eq!(verify(&file).unwrap(), totals);
            files.push(file);
            points.push(disk.clone());
        }
        for (nr, want) in points.iter().enumerate() {
            prop_assert!(restored(&files[..=nr]) == *want, "point {}", nr);
        }
    }
}

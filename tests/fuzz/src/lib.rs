// SPDX-License-Identifier: GPL-2.0
//! What must hold of any bytes whatever, for the fuzzers in `src/bin`. Each function takes bytes and
//! panics where a promise is broken. Where checksums would keep all but chance from getting anywhere
//! they are put right first.

mod sums;

use ploop_pure::check::{BatScan, Length};
use ploop_pure::layout::extension::{self, Item, Shape};
use ploop_pure::layout::ploop1::{Header, RawHeader, HEADER_BYTES};
use ploop_pure::problem::Problem;
use ploop_pure::repair::{Plan, Scope};
use ploop_pure::units::INDEX_PAGE_BYTES;
use ploopctl::copy::{receive, Silent};
use ploopctl::descriptor::{self, Descriptor};
use ploopctl::image::{repair, Access, Image};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

/// Largest cluster that is tried where files are made.
const CLUSTER_MAX: u64 = 256 << 10;
/// Longest file that is made, in clusters.
const CLUSTERS_MAX: u64 = 64;

/// A directory of this process, where temporary files go: best in memory.
fn place() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("ploop-fuzz-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory to work in");
        path
    })
}

/// The number that begins `data`; zeros behind its end.
fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes
        .iter_mut()
        .zip(data)
        .for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(bytes)
}

/// Header, table and extension, as the module judges them: the header, a length of 8 bytes, then
/// pages of the table, then the extension.
pub fn layout(data: &[u8]) {
    let Ok((raw, rest)) = RawHeader::ref_from_prefix(data) else {
        return;
    };
    let Ok(header) = Header::parse(raw) else {
        return;
    };
    assert_eq!(
        Header::parse(&header.encode()).ok(),
        Some(header),
        "written and read again"
    );
    let (len, rest) = (number(rest), rest.get(8..).unwrap_or_default());
    let Ok(length) = Length::judge(&header, len) else {
        return;
    };
    assert!(header.cluster.offset(header.first_data) <= len);
    if BatScan::memory_bytes(&header, length) > 1 << 20 {
        return;
    }
    let Ok(mut scan) = BatScan::new(header, length) else {
        return;
    };
    let (mut seen, mut end) = (HashSet::new(), 0);
    let pages = rest.chunks(INDEX_PAGE_BYTES as usize);
    for (nr, bytes) in (0..header.nr_pages()).zip(pages) {
        let mut page = vec![0; INDEX_PAGE_BYTES as usize];
        page[..bytes.len()].copy_from_slice(bytes);
        let slots = <[U32]>::ref_from_bytes(&page).expect("whole words");
        let scanned = scan.page::<()>(nr, slots, |cluster, entry| {
            assert!(cluster.0 < header.nr_entries);
            match entry {
                Ok(at) => {
                    assert!(at >= header.first_data, "an entry into the index");
                    assert!(header.cluster.offset(at) < len, "an entry behind the end");
                    assert!(seen.insert(at.0), "one slot twice");
                    end = end.max(at.0 + 1);
                }
                // Its slot is not whole, but there.
                Err(Problem::EntryTorn { at, .. }) => {
                    assert!(length.torn && at == length.clusters);
                    assert!(seen.insert(at), "one slot twice");
                }
                Err(problem) => assert!(!problem.to_string().is_empty()),
            }
            Ok(())
        });
        assert_eq!(scanned, Ok(()));
    }
    let usage = scan.usage();
    assert_eq!(u64::from(usage.nr_used), seen.len() as u64);
    assert!(seen.is_empty() || usage.end >= end);
    bitmaps(&header, rest);
}

/// An extension, whose checksum is right.
fn bitmaps(header: &Header, bytes: &[u8]) {
    let digest = bytes.get(8..24).and_then(|d| d.try_into().ok());
    let (mut shape, mut parts) = (None, 0);
    let found = extension::read(header, bytes, digest.unwrap_or_default(), |item| {
        if let Some(at) = item.slot() {
            assert!(at >= header.first_data);
        }
        match item {
            Item::Bitmap { granularity, .. } => {
                assert!(granularity.is_power_of_two());
                (shape, parts) = (Some(Shape::new(header, granularity)), 0);
            }
            Item::Part(_) => parts += 1,
            Item::Slot(_) | Item::Unknown { .. } => {}
        }
    });
    let (Ok(()), Some(shape)) = (found, shape) else {
        return;
    };
    assert!(parts <= bytes.len() as u64 / 8);
    assert_eq!(shape.words(0).start, 0);
    assert!(shape.words(shape.nr_parts()).is_empty());
    assert_eq!(shape.mask(shape.nr_words()), 0);
}

/// A whole image: checked, and mended if it can be; then nothing is wrong with it any more. The
/// last two bytes say how long it is.
pub fn image(data: &[u8]) {
    let Ok((raw, _)) = RawHeader::ref_from_prefix(data) else {
        return;
    };
    let Ok(header) = Header::parse(raw) else {
        return;
    };
    let cluster = header.cluster.bytes();
    if cluster > CLUSTER_MAX || data.len() < HEADER_BYTES + 2 {
        return;
    }
    let (body, tail) = data.split_at(data.len() - 2);
    let tail = number(tail);
    let len = (tail & 0x7fff) % (CLUSTERS_MAX * 2) * (cluster / 2) + (tail >> 15) * 77;
    let path = place().join("image");
    fs::write(&path, body).expect("written");
    let judged = Image::open(&path, Access::Write).and_then(|image| {
        image
            .file()
            .set_len(len.max(body.len() as u64))
            .expect("made longer");
        let report = match image.check()? {
            Ok(report) => report,
            Err(problem) => {
                assert!(!problem.to_string().is_empty());
                return Ok(());
            }
        };
        if let Some(plan) = Plan::new(&report.findings, Scope::All) {
            assert!(plan.steps().all(|step| !step.to_string().is_empty()));
            repair::apply(&image, &report.findings.header, &plan)?;
            let after = image.check()?.expect("an image after repair");
            assert!(
                Plan::new(&after.findings, Scope::All).is_none(),
                "not mended: {:?}",
                after.problems
            );
        }
        Ok(())
    });
    judged.expect("the file can be read and written");
}

/// A descriptor: read and written as it was, or refused with words.
pub fn descriptor(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let path = Path::new("/d/DiskDescriptor.xml");
    let problems = descriptor::problems(text);
    match Descriptor::parse(path, text) {
        Ok(parsed) => {
            assert!(problems.is_empty());
            assert_eq!(parsed.text(), text, "written as it was");
            let top = parsed.disk().top;
            assert!(!parsed.chain(top).is_empty());
            // A change that can always be made.
            let guid = descriptor::guid::Guid::from_bytes([7; 16]);
            if parsed.disk().shot(guid).is_none() && parsed.disk().image(guid).is_none() {
                let changed = parsed.changed(path, |edit| edit.rename(top, guid));
                let changed = changed.expect("renamed");
                assert_eq!(changed.disk().top, guid);
                let back = changed.changed(path, |edit| edit.rename(guid, top));
                assert_eq!(back.expect("renamed back").disk(), parsed.disk());
            }
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

/// A stream of a copy, ours or OpenVZ's: what is not complete leaves nothing. The first byte says
/// whether checksums are put right.
pub fn stream(data: &[u8]) {
    let Some((how, data)) = data.split_first() else {
        return;
    };
    let mut bytes = data.to_vec();
    if how & 1 != 0 {
        sums::of_stream(&mut bytes);
    }
    let path = place().join("copy");
    let mut back = Vec::new();
    let options = receive::Options { answers_v1: true };
    let done = receive::receive(
        &mut &bytes[..],
        Some(&mut back),
        &path,
        options,
        &mut Silent,
    );
    match done {
        Ok(()) if path.is_dir() => fs::remove_dir_all(&path).expect("the copy is there"),
        Ok(()) => fs::remove_file(&path).expect("the copy is there"),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
    let left: Vec<_> = fs::read_dir(place()).expect("readable").flatten().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// A backup: parts that are in order and on the disk, or an error. The first byte says whether
/// checksums are put right.
pub fn backup(data: &[u8]) {
    let Some((how, data)) = data.split_first() else {
        return;
    };
    let mut bytes = data.to_vec();
    if how & 1 != 0 {
        sums::of_backup(&mut bytes);
    }
    let path = Path::new("backup");
    let Ok(mut reader) = ploopctl::backup::read::Reader::new(&bytes[..], path) else {
        return;
    };
    let disk = reader.header().disk_bytes;
    let mut end = 0;
    while let Ok(Some(part)) = reader.read_part() {
        assert!(part.start >= end && part.start < part.end && part.end <= disk);
        assert!(part.is_zero || reader.data().len() as u64 == part.end - part.start);
        end = part.end;
    }
}

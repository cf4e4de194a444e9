// SPDX-License-Identifier: GPL-2.0
//! Merge, resize and compact of image files: ended after every step they leave what read as
//! before, and begun again they succeed.

#![allow(missing_docs)]

mod common;
use common::{
    disk, entry, get_u32, has_qemu, len, on, ploopctl, put, put_u32, qemu_check, set_len, small,
    small_disk, Scratch, IN_USE, MARK,
};
use ploopctl::error::{Code, Result};
use ploopctl::offline::{self, Format, Go, Progress, Zeros};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

const CLUSTER: usize = 1 << 16;

/// Goes on for some steps, and then ends in one way or another.
struct Script {
    left: u32,
    then: Go,
}

impl Progress for Script {
    fn begin(&mut self, _: &str, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
    fn note(&mut self, _: &str) {}
    fn go(&mut self) -> Go {
        if self.left == 0 {
            return self.then;
        }
        self.left -= 1;
        Go::On
    }
}

const ALWAYS: Script = Script {
    left: u32::MAX,
    then: Go::On,
};

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// The disk that version 2 images are, base first, whatever their marks say.
fn read(chain: &[&Path]) -> Vec<u8> {
    let mut disk = Vec::new();
    for image in chain {
        let bytes = fs::read(image).unwrap();
        let cluster = u32_at(&bytes, 28) * 512;
        disk.resize(u32_at(&bytes, 36) * 512, 0);
        for n in 0..u32_at(&bytes, 32) {
            let at = u32_at(&bytes, 64 + 4 * n) * cluster;
            let part = n * cluster..disk.len().min((n + 1) * cluster);
            if at != 0 {
                let len = part.len();
                disk[part].copy_from_slice(&bytes[at..at + len]);
            }
        }
    }
    disk
}

/// Size of the disk that an image is.
fn disk_bytes(image: &Path) -> u64 {
    u64::from(get_u32(image, 36)) * 512
}

/// The clusters that an image has, for disks too large to be compared whole.
fn mapped(image: &Path) -> BTreeMap<usize, Vec<u8>> {
    let bytes = fs::read(image).unwrap();
    let cluster = u32_at(&bytes, 28) * 512;
    let at = |n: usize| u32_at(&bytes, 64 + 4 * n) * cluster;
    let clusters = (0..u32_at(&bytes, 32)).filter(|n| at(*n) != 0);
    clusters
        .map(|n| (n, bytes[at(n)..at(n) + cluster].to_vec()))
        .collect()
}

/// `work` ended after every step, by death and by request, and then once more; `prepare` makes the
/// images anew, `judge` is told whether all is done.
fn ended_anywhere(
    prepare: impl Fn(),
    work: impl Fn(&mut dyn Progress) -> Result<()>,
    judge: impl Fn(bool),
) {
    for then in [Go::Die, Go::Stop] {
        for left in 0.. {
            assert!(left < 1000);
            prepare();
            let first = work(&mut Script { left, then });
            judge(first.is_ok());
            match &first {
                Ok(()) if then == Go::Die => break,
                Ok(()) => {}
                Err(e) => assert_eq!(e.code(), Code::Aborted, "{e}"),
            }
            work(&mut { ALWAYS }).unwrap();
            judge(true);
            // A stop after the last step changes nothing any more.
            if first.is_ok() && left > 60 {
                break;
            }
        }
    }
}

/// Nobody finds damage but what costs nothing, or none at all.
#[track_caller]
fn sound(image: &Path, is_closed: bool) {
    let run = on(image, &["check", "--json"]);
    assert!([0, 41].contains(&run.code), "{run:?}");
    for problem in run.json()["problems"].as_array().unwrap() {
        assert_eq!(problem["cure"], "lossless", "{run:?}");
    }
    if is_closed {
        assert_eq!((run.code, get_u32(image, MARK)), (0, 0), "{run:?}");
    }
}

/// A lower image, an upper one that is larger and has zeros over data, and the disk they are.
fn pair(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf, Vec<u8>) {
    for name in ["lower", "upper"] {
        let _ = fs::remove_file(scratch.path(name));
    }
    let lower = small(scratch, "lower");
    let upper = scratch.create("upper", &["-s", "2M", "-b", "64K"]);
    set_len(&upper, 6 * CLUSTER as u64);
    put_u32(&upper, 52, 0);
    let mut want = small_disk();
    want.resize(2 << 20, 0);
    for (n, cluster, byte) in [
        (0, 1, 0),
        (1, 3, 0x33),
        (2, 7, 0x77),
        (3, 20, 0xaa),
        (4, 9, 0),
    ] {
        put_u32(&upper, entry(cluster), n + 1);
        let at = (n as u64 + 1) << 16;
        put(&upper, at, &vec![byte; CLUSTER]);
        want[cluster as usize * CLUSTER..][..CLUSTER].fill(byte);
    }
    // A cluster of which most is zeros.
    put(&upper, (4 << 16) + 512, &vec![0; CLUSTER - 512]);
    want[20 * CLUSTER + 512..21 * CLUSTER].fill(0);
    (lower, upper, want)
}

#[test]
fn a_merge_ended_anywhere_loses_nothing() {
    let scratch = Scratch::new("merge");
    let (lower, upper, want) = pair(&scratch);
    let before = fs::read(&upper).unwrap();
    ended_anywhere(
        || drop(pair(&scratch)),
        |progress| offline::merge(&lower, Format::Ploop1, &upper, progress).map(drop),
        |is_done| {
            assert!(fs::read(&upper).unwrap() == before);
            assert!(read(&[&lower, &upper]) == want);
            sound(&lower, is_done);
            if is_done {
                assert!(read(&[&lower]) == want);
                // Zeros that hide something below stay mapped, and take no space.
                assert_ne!(get_u32(&lower, entry(9)), 0);
            }
        },
    );
    if has_qemu() {
        qemu_check(&lower);
        assert!(disk(&lower) == want);
    }
}

#[test]
fn a_merge_says_what_to_do_next() {
    let scratch = Scratch::new("merge-cli");
    let (lower, upper, want) = pair(&scratch);
    let (l, u) = (lower.to_str().unwrap(), upper.to_str().unwrap());
    let run = ploopctl(&["merge", l, u]).expect(0);
    assert!(run.out.contains("not needed any more"), "{run:?}");
    assert!(read(&[&lower]) == want);
}

#[test]
fn a_merge_into_a_raw_image_ended_anywhere_loses_nothing() {
    let scratch = Scratch::new("merge-raw");
    let lower = scratch.path("raw");
    let (_, upper, mut want) = pair(&scratch);
    for (n, cluster) in want.chunks_mut(CLUSTER).enumerate() {
        if get_u32(&upper, entry(n as u64)) == 0 {
            cluster.fill(if n < 16 { 0x11 } else { 0 });
        }
    }
    let is_hidden = |n: usize| get_u32(&upper, entry(n as u64)) != 0;
    ended_anywhere(
        || fs::write(&lower, vec![0x11; 16 * CLUSTER]).unwrap(),
        |progress| offline::merge(&lower, Format::Raw, &upper, progress).map(drop),
        |is_done| {
            let mut have = fs::read(&lower).unwrap();
            have.resize(want.len(), 0);
            for n in 0..32 {
                let part = n * CLUSTER..(n + 1) * CLUSTER;
                let must = is_done || !is_hidden(n);
                assert!(!must || have[part.clone()] == want[part], "cluster {n}");
            }
        },
    );
    assert_eq!(len(&lower), 2 << 20);
}

/// More clusters and index pages than a batch has.
#[test]
fn a_merge_of_many_batches() {
    let scratch = Scratch::new("merge-many");
    let (lower, upper) = (scratch.path("lower"), scratch.path("upper"));
    let options = ["-s", "3G", "-b", "32K"];
    scratch.create("lower", &options);
    scratch.create("upper", &options);
    let nr = 98_304u64;
    let clusters: Vec<u64> = (0..1500).map(|i| i * (nr - 1) / 1499).collect();
    let first = u64::from(get_u32(&upper, 48)) / 64;
    put_u32(&upper, 52, 0);
    set_len(&upper, (first + 1500) << 15);
    for (i, c) in clusters.iter().enumerate() {
        put_u32(&upper, entry(*c), (first + i as u64) as u32);
        put(&upper, (first + i as u64) << 15, &c.to_le_bytes());
    }
    for (left, then) in [(3500, Go::Die), (1000, Go::Stop), (u32::MAX, Go::Stop)] {
        let mut script = Script { left, then };
        let done = offline::merge(&lower, Format::Ploop1, &upper, &mut script);
        assert_eq!(done.is_ok(), left == u32::MAX);
        sound(&lower, then == Go::Stop);
    }
    let answer = on(&lower, &["check", "--json"]).expect(0).json();
    assert_eq!(answer["used_clusters"], 1500);
    let bytes = fs::read(&lower).unwrap();
    for c in clusters {
        let at = (get_u32(&lower, entry(c)) as usize) << 15;
        assert_eq!(bytes[at..at + 8], c.to_le_bytes(), "cluster {c}");
    }
}

#[test]
fn ctrl_c_leaves_a_closed_image() {
    let scratch = Scratch::new("merge-interrupted");
    let mut nr_interrupted = 0;
    for delay in [1u64, 3, 5, 8, 12, 20, 40] {
        let _ = fs::remove_file(scratch.path("lower"));
        let _ = fs::remove_file(scratch.path("upper"));
        let lower = scratch.create("lower", &["-s", "256M", "-b", "64K"]);
        let upper = scratch.create("upper", &["-s", "256M", "-b", "64K", "--preallocate"]);
        let mut child = Command::new(env!("CARGO_BIN_EXE_ploopctl"))
            .arg("merge")
            .args([&lower, &upper])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let code = child.wait().unwrap().code();
        // None: it came before the tool had begun.
        assert!([None, Some(0), Some(29)].contains(&code), "{code:?}");
        nr_interrupted += u32::from(code == Some(29));
        sound(&lower, true);
        let (l, u) = (lower.to_str().unwrap(), upper.to_str().unwrap());
        ploopctl(&["merge", l, u]).expect(0);
        sound(&lower, true);
    }
    println!("{nr_interrupted} merges interrupted");
}

/// An image of the largest table that one cluster holds, with data right behind it.
fn growing(scratch: &Scratch) -> std::path::PathBuf {
    let _ = fs::remove_file(scratch.path("image"));
    // The last cluster of the disk is there in part.
    let size = (8176u64 << 15) - 512;
    let image = scratch.create("image", &["-s", &size.to_string(), "-b", "32K"]);
    put_u32(&image, 52, 0);
    set_len(&image, 6 << 15);
    for (slot, cluster) in [(1, 8175), (2, 5), (3, 0), (4, 4000), (5, 1)] {
        put_u32(&image, entry(cluster), slot);
        put(&image, u64::from(slot) << 15, &vec![slot as u8; 1 << 15]);
    }
    image
}

#[test]
fn growing_ended_anywhere_loses_nothing() {
    let scratch = Scratch::new("grow");
    let image = growing(&scratch);
    let before = mapped(&image);
    let old = disk_bytes(&image);
    let size = 600u64 << 20;
    ended_anywhere(
        || drop(growing(&scratch)),
        |progress| offline::grow(&image, size / 512, progress).map(drop),
        |is_done| {
            let mut now = mapped(&image);
            let grown = disk_bytes(&image);
            assert!(grown == size || (grown == old && !is_done), "{grown}");
            // Behind the end there may be anything, until the disk is larger.
            let behind = now.get_mut(&8175).unwrap().split_off(CLUSTER / 2 - 512);
            assert!(grown == old || behind == [0; 512]);
            now.get_mut(&8175).unwrap().extend([1; 512]);
            assert!(now == before);
            sound(&image, is_done);
        },
    );
    assert_eq!(get_u32(&image, 48), 3 * 64);
    if has_qemu() {
        qemu_check(&image);
    }
}

#[test]
fn growing_without_a_larger_table_moves_nothing() {
    let scratch = Scratch::new("grow-small");
    let image = small(&scratch, "image");
    let run = on(&image, &["resize", "-s", "10M"]).expect(0);
    assert!(run.out.contains("10 MiB now"), "{run:?}");
    let mut want = small_disk();
    want.resize(10 << 20, 0);
    assert!(read(&[&image]) == want);
    let before = fs::read(&image).unwrap();
    on(&image, &["resize", "-s", "10M"]).expect(0);
    assert_eq!(fs::read(&image).unwrap(), before);
    let raw = scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    on(&raw, &["resize", "-f", "raw", "-s", "3M"]).expect(0);
    on(&raw, &["resize", "-f", "raw", "--preallocate", "-s", "4M"]).expect(0);
    assert_eq!(len(&raw), 4 << 20);
}

/// Free slots between the clusters, one that is full of zeros, and a tail.
fn loose(scratch: &Scratch) -> std::path::PathBuf {
    let _ = fs::remove_file(scratch.path("image"));
    let image = small(scratch, "image");
    set_len(&image, 12 * CLUSTER as u64 + 100);
    for (cluster, slot, byte) in [(2u64, 9u64, 9), (8, 7, 0), (15, 10, 10)] {
        put_u32(&image, entry(cluster), slot as u32);
        put(&image, slot << 16, &vec![byte; CLUSTER]);
    }
    put_u32(&image, entry(0), 0);
    image
}

fn compacted(zeros: Zeros, nr_clusters: u64) {
    let scratch = Scratch::new(&format!("compact-{zeros:?}"));
    let image = loose(&scratch);
    let want = read(&[&image]);
    ended_anywhere(
        || drop(loose(&scratch)),
        |progress| offline::compact(&image, zeros, progress).map(drop),
        |is_done| {
            assert!(read(&[&image]) == want);
            sound(&image, is_done);
        },
    );
    assert_eq!(len(&image), (1 + nr_clusters) << 16);
    assert_eq!(get_u32(&image, entry(8)) == 0, zeros == Zeros::Drop);
    if has_qemu() {
        qemu_check(&image);
        assert!(disk(&image) == want);
    }
}

#[test]
fn compacting_ended_anywhere_loses_nothing() {
    compacted(Zeros::Keep, 5);
}

#[test]
fn dropping_zeros_ended_anywhere_loses_nothing() {
    compacted(Zeros::Drop, 4);
}

#[test]
fn a_tight_image_is_left_alone() {
    let scratch = Scratch::new("compact-tight");
    let image = small(&scratch, "image");
    let before = fs::read(&image).unwrap();
    let answer = on(&image, &["compact", "--json"]).expect(0).json();
    assert_eq!(answer["length"], answer["length_before"]);
    assert_eq!(fs::read(&image).unwrap(), before);
}

/// What is refused is named, and nothing is changed.
#[test]
fn bad_pairs_are_refused() {
    let scratch = Scratch::new("merge-refused");
    let (lower, upper, _) = pair(&scratch);
    scratch.create("other", &["-s", "4M", "-b", "128K"]);
    scratch.create("old", &["-s", "4M", "-b", "64K", "--format-version", "1"]);
    scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    scratch.create("odd", &["-s", "2000K", "-b", "64K"]);
    fs::copy(&upper, scratch.path("marked")).unwrap();
    put_u32(&scratch.path("marked"), MARK, IN_USE);
    fs::copy(&lower, scratch.path("broken")).unwrap();
    put_u32(&scratch.path("broken"), entry(8), 2);
    let files = scratch.names();
    let all = || -> Vec<Vec<u8>> {
        let read = |n: &String| fs::read(scratch.path(n)).unwrap();
        files.iter().map(read).collect()
    };
    let before = all();
    type Case = (
        &'static str,
        &'static str,
        &'static [&'static str],
        i32,
        &'static [&'static str],
    );
    let cases: [Case; 11] = [
        (
            "upper",
            "lower",
            &[],
            38,
            &["lower cannot be merged into", "comes first"],
        ),
        ("lower", "lower", &[], 38, &["the same image"]),
        (
            "lower",
            "other",
            &[],
            38,
            &["other", "cluster size is 256 sectors"],
        ),
        ("lower", "old", &[], 38, &["old", "format version is 1"]),
        (
            "lower",
            "raw",
            &[],
            11,
            &["raw", "can only be the lower one"],
        ),
        ("raw", "upper", &[], 11, &["raw", "-f raw"]),
        (
            "raw",
            "odd",
            &["-f", "raw"],
            38,
            &["odd", "not a multiple of the cluster size"],
        ),
        (
            "lower",
            "marked",
            &[],
            41,
            &["marked", "m_DiskInUse", "check --repair"],
        ),
        (
            "broken",
            "upper",
            &[],
            41,
            &["broken", "BAT[8]", "check --repair"],
        ),
        ("lower", "none", &[], 4, &["none"]),
        ("none", "upper", &[], 4, &["none"]),
    ];
    for (a, b, options, code, words) in cases {
        let (a, b) = (scratch.path(a), scratch.path(b));
        let mut args = vec!["merge"];
        args.extend(options);
        args.extend([a.to_str().unwrap(), b.to_str().unwrap()]);
        ploopctl(&args).expect(code).says(words);
        assert!(all() == before, "{args:?} changed something");
    }
    // Open elsewhere.
    let (l, u) = (lower.to_str().unwrap(), upper.to_str().unwrap());
    for (path, usage) in [
        (&lower, ploopctl::locks::Use::Read),
        (&upper, ploopctl::locks::Use::Write),
    ] {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let _lock = ploopctl::locks::ImageLock::take(&file, path, usage).unwrap();
        ploopctl(&["merge", l, u])
            .expect(37)
            .says(&[path.to_str().unwrap()]);
    }
    assert!(all() == before);
}

#[test]
fn bad_sizes_are_refused() {
    let scratch = Scratch::new("resize-refused");
    let image = small(&scratch, "image");
    let old = scratch.create("old", &["-s", "1T", "--format-version", "1"]);
    let raw = scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    let before = fs::read(&image).unwrap();
    let cases: [(&Path, &[&str], i32, &[&str]); 7] = [
        (
            &image,
            &["-s", "512K"],
            38,
            &["image", "cannot become smaller", "compact"],
        ),
        (&image, &["-s", "0"], 38, &["0 bytes"]),
        (&image, &["-s", "1000001"], 38, &["1000001 bytes"]),
        (&image, &["-s", "4E"], 38, &[]),
        (&old, &["-s", "2T"], 38, &["old", "-v 2"]),
        (&raw, &["-s", "2M"], 11, &["raw", "magic"]),
        (&raw, &["-f", "raw", "-s", "512K"], 38, &["raw", "smaller"]),
    ];
    for (path, options, code, words) in cases {
        let mut args = vec!["resize"];
        args.extend(options);
        on(path, &args).expect(code).says(words);
        assert_eq!(fs::read(&image).unwrap(), before);
        assert_eq!(len(&raw), 1 << 20);
    }
    on(&raw, &["compact"]).expect(11).says(&["raw", "m_Sig"]);
    on(Path::new("/"), &["compact"])
        .expect(4)
        .says(&["a directory"]);
}

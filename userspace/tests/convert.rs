// SPDX-License-Identifier: GPL-2.0
//! `convert`: every format from every format, chains, and new images complete or not there.

#![allow(missing_docs)]

mod common;
use common::{
    disk, entry, get_u32, has_qemu, len, on, ploopctl, put, put_u32, qemu_check, set_len, small,
    small_disk, Scratch,
};
use ploopctl::image::create::Space;
use ploopctl::offline::{self, Format, Go, Progress, Target};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

#[track_caller]
fn convert(args: &[&str], paths: &[&Path]) {
    let mut all = vec!["convert"];
    all.extend(args);
    all.extend(paths.iter().map(|p| p.to_str().unwrap()));
    ploopctl(&all).expect(0);
}

/// Makes it raw, which is judged elsewhere, and compares.
#[track_caller]
fn reads(image: &Path, want: &[u8]) {
    on(image, &["check"]).expect(0);
    let raw = image.with_extension("as-raw");
    convert(&["-f", "raw"], &[image, &raw]);
    assert!(fs::read(&raw).unwrap() == want, "{image:?}");
    fs::remove_file(raw).unwrap();
    if has_qemu() {
        qemu_check(image);
        assert!(disk(image) == want, "{image:?} in QEMU");
    }
}

#[test]
fn from_everything_to_everything() {
    let scratch = Scratch::new("convert");
    let image = small(&scratch, "image");
    let mut want = small_disk();
    // Parts of clusters, and the very end.
    put(&image, (3 << 16) + 100, &[0; 60000]);
    want[(2 << 16) + 100..(2 << 16) + 60100].fill(0);
    put_u32(&image, entry(15), 5);
    set_len(&image, 6 << 16);
    put(&image, (6 << 16) - 1, b"!");
    want[(1 << 20) - 1] = b'!';
    let raw = scratch.path("raw");
    convert(&["-f", "raw"], &[&image, &raw]);
    assert!(fs::read(&raw).unwrap() == want);
    assert!(fs::metadata(&raw).unwrap().blocks() * 512 < 1 << 20);
    let options: [&[&str]; 6] = [
        &["-f", "ploop1"],
        &["-f", "ploop1", "-v", "1"],
        &["-f", "ploop1", "-b", "32K"],
        &["-f", "ploop1", "-b", "4M", "-v", "1"],
        &["-f", "preallocated"],
        &["-f", "preallocated", "-v", "1", "-b", "128K"],
    ];
    for options in options {
        for (from, source) in [("ploop1", &image), ("raw", &raw)] {
            let out = scratch.path("out");
            let mut args = options.to_vec();
            args.extend(["--from", from]);
            convert(&args, &[source, &out]);
            reads(&out, &want);
            let is_v1 = options.contains(&"1");
            let magic = fs::read(&out).unwrap()[..16].to_vec();
            assert_eq!(magic == b"WithoutFreeSpace", is_v1);
            // Back again.
            let back = scratch.path("back");
            convert(&["-f", "ploop1", "-b", "64K"], &[&out, &back]);
            reads(&back, &want);
            assert_eq!(len(&back), 6 << 16);
            fs::remove_file(out).unwrap();
            fs::remove_file(back).unwrap();
        }
    }
    assert_eq!(scratch.names(), ["image", "raw"]);
}

#[test]
fn a_chain_becomes_one_image() {
    let scratch = Scratch::new("convert-chain");
    let raw = scratch.path("raw");
    fs::write(&raw, vec![0x11; 1 << 20]).unwrap();
    let mut want = vec![0x11; 1 << 20];
    let mid = small(&scratch, "mid");
    want[..4 << 16].copy_from_slice(&small_disk()[..4 << 16]);
    let top = scratch.create("top", &["-s", "3M", "-b", "64K"]);
    want.resize(3 << 20, 0);
    set_len(&top, 3 << 16);
    put_u32(&top, 52, 0);
    for (slot, cluster, byte) in [(1u64, 0u64, 0), (2, 40, 0x40)] {
        put_u32(&top, entry(cluster), slot as u32);
        put(&top, slot << 16, &vec![byte; 1 << 16]);
        want[(cluster as usize) << 16..][..1 << 16].fill(byte);
    }
    let one = scratch.path("one");
    convert(
        &["-f", "ploop1", "--from", "raw"],
        &[&raw, &mid, &top, &one],
    );
    reads(&one, &want);
    let flat = scratch.path("flat");
    convert(&["-f", "raw", "--from", "raw"], &[&raw, &mid, &top, &flat]);
    assert!(fs::read(flat).unwrap() == want);
    let (m, t, o) = (
        mid.to_str().unwrap(),
        top.to_str().unwrap(),
        scratch.path("x"),
    );
    let out = o.to_str().unwrap();
    ploopctl(&["convert", "-f", "raw", t, m, out])
        .expect(38)
        .says(&["mid does not fit on", "base first"]);
    ploopctl(&["convert", "-f", "raw", m, raw.to_str().unwrap(), out])
        .expect(11)
        .says(&["raw", "base"]);
    assert!(!o.exists());
}

#[test]
fn an_image_is_converted_in_its_place() {
    let scratch = Scratch::new("convert-in-place");
    let image = small(&scratch, "image");
    let inode = fs::metadata(&image).unwrap().ino();
    // What a killed one left is in nobody's way.
    fs::write(scratch.path(".image.converted"), b"x").unwrap();
    on(
        &image,
        &["convert", "-f", "ploop1", "-v", "1", "--in-place"],
    )
    .expect(0);
    assert_ne!(fs::metadata(&image).unwrap().ino(), inode);
    assert_eq!(get_u32(&image, entry(1)), 2 * 128);
    reads(&image, &small_disk());
    on(&image, &["convert", "-f", "preallocated", "--in-place"]).expect(0);
    assert_eq!(len(&image), 17 << 16);
    reads(&image, &small_disk());
    on(&image, &["convert", "-f", "raw", "--in-place"]).expect(0);
    assert!(fs::read(&image).unwrap() == small_disk());
    assert_eq!(scratch.names(), ["image"]);
}

/// Asked to end after some steps.
struct Ends(u32);

impl Progress for Ends {
    fn begin(&mut self, _: &str, _: u64) {}
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
    fn note(&mut self, _: &str) {}
    fn go(&mut self) -> Go {
        self.0 = self.0.saturating_sub(1);
        if self.0 == 0 {
            Go::Stop
        } else {
            Go::On
        }
    }
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let scratch = Scratch::new("convert-interrupted");
    let image = scratch.create("image", &["-s", "8M", "-b", "64K", "--preallocate"]);
    let before = fs::read(&image).unwrap();
    for steps in 1..8 {
        let target = Target::Raw(Space::Thin);
        let images = [image.clone()];
        let out = scratch.path("out");
        let mut ends = Ends(steps);
        offline::convert(&images, Format::Ploop1, &out, target, &mut ends).unwrap_err();
        offline::replace(&image, Format::Ploop1, target, &mut Ends(steps)).unwrap_err();
        assert_eq!(scratch.names(), ["image"]);
        assert!(fs::read(&image).unwrap() == before);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let scratch = Scratch::new("convert-refused");
    let image = small(&scratch, "image");
    let large = scratch.create("large", &["-s", "3T"]);
    let before = fs::read(&image).unwrap();
    let (i, l) = (image.to_str().unwrap(), large.to_str().unwrap());
    let out = scratch.path("out");
    let o = out.to_str().unwrap();
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["-f", "raw", i, i], 1, &["image exists already"]),
        (&["-f", "raw", i], 38, &["the new image is missing"]),
        (&["-f", "raw", "--in-place", i, o], 38, &["--in-place"]),
        (&["-f", "raw", "-b", "64K", i, o], 38, &["-b"]),
        (&["-f", "ploop1", "-b", "63K", i, o], 38, &["cluster size"]),
        (
            &["-f", "ploop1", "-v", "1", l, o],
            38,
            &["out", "version 1"],
        ),
        (&["-f", "ploop1", "-v", "3", i, o], 38, &[]),
        (
            &["-f", "raw", "/dev/null", o],
            4,
            &["/dev/null is a character device"],
        ),
    ];
    for (args, code, words) in cases {
        let mut all = vec!["convert"];
        all.extend(args);
        ploopctl(&all).expect(code).says(words);
        assert!(!out.exists());
        assert_eq!(fs::read(&image).unwrap(), before);
    }
    put_u32(&image, entry(8), 2);
    ploopctl(&["convert", "-f", "raw", i, o])
        .expect(41)
        .says(&["BAT[8]"]);
    assert!(!out.exists());
}

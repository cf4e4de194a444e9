// SPDX-License-Identifier: GPL-2.0
//! Images of a disk that are given by themselves, by the built tool: they are no disk where they are not
//! all of it, or while it is being changed. Nothing here needs the kernel module.

#![allow(missing_docs)]

mod common;

use common::*;
use std::fs;
use std::path::Path;

const A: &str = "{11111111-1111-4111-8111-111111111111}";

/// What reads `image` as a disk, or changes it, ends with `code` and leaves nothing.
fn refused(scratch: &Scratch, image: &Path, code: i32, words: &str) {
    let before = scratch.names();
    let (from, to) = (image.to_str().unwrap(), scratch.path("never"));
    let to = to.to_str().unwrap();
    for args in [
        &["clone", from, to][..],
        &["clone", "--descriptor", from, to],
        &["convert", "-f", "raw", from, to],
        &["backup", "full", from, to],
        &["copy", "send", "--to", to, from],
        &["attach", from],
    ] {
        // It is a copy of a file, whatever that is built on.
        if args[0] == "copy" && words == "is not given" || args[0] == "attach" && code == 17 {
            continue;
        }
        let words = if args[0] == "attach" && words == "is not given" {
            "not those of its top"
        } else {
            words
        };
        ploopctl(args).expect(code).says(&[words]);
        assert_eq!(scratch.names(), before, "{args:?}");
    }
}

#[test]
fn a_delta_is_no_disk_without_what_it_builds_on() {
    let scratch = Scratch::new("named-delta");
    let disk = scratch.path("disk");
    on(&disk, &["create", "--descriptor", "-s", "4M", "-b", "64K"]).expect(0);
    on(&disk, &["snapshot", "create", "--uuid", A]).expect(0);
    let info = on(&disk, &["info", "--json"]).expect(0).json();
    let top = info["images"][1]["image"].as_str().unwrap();
    refused(&scratch, Path::new(top), 38, "is not given");
    // The snapshot is all there.
    let base = info["images"][0]["image"].as_str().unwrap();
    let (raw, to) = (scratch.path("raw"), scratch.path("to"));
    ploopctl(&["convert", "-f", "raw", base, raw.to_str().unwrap()]).expect(0);
    ploopctl(&["clone", base, to.to_str().unwrap()]).expect(0);
}

/// After a crash in a backup the image alone lacks what was written since: it was cloned, sent and
/// converted all the same.
#[test]
fn an_image_is_no_disk_without_what_a_backup_left_above_it() {
    let scratch = Scratch::new("named-interim");
    let image = scratch.create("a.img", &["-s", "4M", "-b", "64K"]);
    let above = scratch.create(&format!("a.img.backup-{A}"), &["-s", "4M", "-b", "64K"]);
    put_u32(&above, entry(0), 1);
    set_len(&above, 2 << 16);
    refused(&scratch, &image, 38, "is not all of its disk");
    // Nor is a chain that ends in it, or another image on it.
    let base = scratch.create("base.img", &["-s", "4M", "-b", "64K"]);
    let other = scratch.create("b.img", &["-s", "4M", "-b", "64K"]);
    for (lower, upper) in [(&base, &image), (&image, &other)] {
        let args = ["merge", lower.to_str().unwrap(), upper.to_str().unwrap()];
        ploopctl(&args).expect(38).says(&["is not all of its disk"]);
    }
    let before = fs::read(&image).unwrap();
    on(
        &image,
        &["convert", "--in-place", "-f", "ploop1", "-b", "128K"],
    )
    .expect(38)
    .says(&["is not all of its disk"]);
    assert_eq!(fs::read(&image).unwrap(), before);
}

/// A snapshot that a crash cut short has moved what is written to another image: by its name the old
/// one was converted as if it were the disk.
#[test]
fn what_its_images_are_is_not_known_while_a_disk_is_changed() {
    let scratch = Scratch::new("named-intent");
    let disk = scratch.path("disk");
    on(&disk, &["create", "--descriptor", "-s", "4M", "-b", "64K"]).expect(0);
    fs::write(disk.join("DiskDescriptor.xml.intent"), "{}").unwrap();
    refused(&scratch, &disk.join("root.hds"), 17, "was interrupted");
    // Attached for writing it is the disk, which recovers; this one says nothing that can be.
    on(&disk.join("root.hds"), &["attach"])
        .expect(39)
        .says(&["cannot be understood"]);
}

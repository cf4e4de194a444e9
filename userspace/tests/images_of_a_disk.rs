// SPDX-License-Identifier: GPL-2.0
//! Images of a disk with a descriptor, named by themselves: what is refused, what is done, and what
//! was done to one behind the descriptor's back. Nothing here needs the kernel module.

#![allow(missing_docs)]

mod common;

use common::*;
use std::fs::{self, File};
use std::path::Path;

const A: &str = "{aaaaaaaa-0000-4000-8000-00000000000a}";

#[test]
fn an_image_of_a_disk_is_not_changed_alone() {
    let scratch = Scratch::new("desc-alone");
    let disk = new_disk(&scratch, "d", &[]);
    let image = disk.join("root.hds");
    for args in [
        &["resize", "-s", "2M"][..],
        &["compact", "--drop-zeros"],
        &["convert", "-f", "preallocated", "--in-place"],
    ] {
        let before = fs::read(&image).unwrap();
        on(&image, args)
            .expect(38)
            .says(&["is an image of the disk", "--force"]);
        assert_eq!(fs::read(&image).unwrap(), before);
        let forced = [args, &["--force"]].concat();
        on(&image, &forced).expect(0);
    }
}

#[test]
fn images_of_a_disk_are_not_merged_alone() {
    let scratch = Scratch::new("desc-merge");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let images = files(&disk);
    let (base, top) = (Path::new(&images[0]), Path::new(&images[1]));
    let outside = scratch.create("outside.img", &["-s", "1M", "-b", "32K"]);
    let before = (fs::read(base).unwrap(), fs::read(top).unwrap());
    for (lower, upper) in [(base, top), (base, &outside), (&outside, top)] {
        on(upper, &["merge", lower.to_str().unwrap()])
            .expect(38)
            .says(&["is an image of the disk", "--force"]);
    }
    assert_eq!((fs::read(base).unwrap(), fs::read(top).unwrap()), before);
    on(top, &["merge", "--force", images[0].as_str()]).expect(0);
}

#[test]
fn an_image_of_a_disk_is_not_taken_for_the_disk() {
    let scratch = Scratch::new("desc-part");
    let disk = new_disk(&scratch, "d", &[]);
    let (out, base) = (scratch.path("out"), disk.join("root.hds"));
    let out = out.to_str().unwrap();
    let made = || fs::remove_file(out).unwrap();
    // Where it is all of it, it is.
    ploopctl(&["backup", "full", base.to_str().unwrap(), out]).expect(0);
    made();
    snapshot(&disk, A);
    let images = files(&disk);
    let [base, top] = [images[0].as_str(), images[1].as_str()];
    // The base is a snapshot.
    ploopctl(&["convert", "-f", "raw", base, out]).expect(0);
    made();
    for args in [
        &["convert", "-f", "raw", top, out][..],
        &["convert", "-f", "raw", top, base, out],
        &["backup", "full", top, out],
        &["attach", base],
        &["attach", top],
    ] {
        let run = ploopctl(args).expect(38);
        run.says(&["is an image of the disk", "give the disk"]);
    }
    ploopctl(&["convert", "-f", "raw", base, top, out]).expect(0);
}

#[test]
fn an_image_takes_the_place_of_another() {
    let scratch = Scratch::new("desc-replace");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let new = disk.join("copy.hds");
    fs::copy(disk.join("root.hds"), &new).unwrap();
    let replace = |args: &[&str]| {
        let mut all = vec!["replace"];
        all.extend(args);
        on(&disk, &all)
    };
    let name = new.to_str().unwrap();
    replace(&["--level", "7", name])
        .expect(38)
        .says(&["no level 7"]);
    replace(&["--level", "0", disk.join("root.hds").to_str().unwrap()])
        .expect(38)
        .says(&["already"]);
    let outside = scratch.create("outside", &["-s", "1M", "-b", "32K"]);
    replace(&["--uuid", A, outside.to_str().unwrap()])
        .expect(38)
        .says(&["not in the directory"]);
    scratch.create("d/larger", &["-s", "2M", "-b", "32K"]);
    replace(&["--uuid", A, disk.join("larger").to_str().unwrap()])
        .expect(38)
        .says(&["disk size"]);
    replace(&["--level", "0", name]).expect(0);
    assert!(files(&disk)[0].ends_with("copy.hds"));
    assert!(disk.join("root.hds").exists());
}

#[test]
fn a_lower_image_that_was_changed_is_noticed() {
    let scratch = Scratch::new("desc-changed");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let base = File::options()
        .write(true)
        .open(disk.join("root.hds"))
        .unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    base.set_modified(later).unwrap();
    on(&disk, &["attach"]).expect(39).says(&[
        "root.hds was written to",
        "after it was closed",
        "--force",
    ]);
    on(&disk, &["descriptor", "validate"]).expect(39);
    base.set_len(1 << 20).unwrap();
    on(&disk, &["attach"])
        .expect(39)
        .says(&["root.hds has 1048576 bytes, it had"]);
}

/// A repair of a lower image by its own name left the disk with the record of before, and it was refused
/// as changed by somebody else; so did compacting it.
#[test]
fn an_image_of_a_disk_is_mended_as_such() {
    let scratch = Scratch::new("desc-image");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let base = disk.join("root.hds");
    on(&base, &["compact"])
        .expect(38)
        .says(&["is an image of the disk", "--force"]);
    on(&disk, &["compact"]).expect(0);
    // Damage that leaves the file's time alone.
    let time = fs::metadata(&base).unwrap().modified().unwrap();
    put_u32(&base, MARK, IN_USE);
    let file = File::options().write(true).open(&base).unwrap();
    file.set_modified(time).unwrap();
    on(&base, &["check", "--repair"]).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
    on(&base, &["check"]).expect(0);
}

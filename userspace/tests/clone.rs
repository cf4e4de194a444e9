// SPDX-License-Identifier: GPL-2.0
//! Clones, by the built tool: what is made, and what is refused so that nobody's base is pulled away.
//! Nothing here needs the kernel module; `tests/guest/many_devices.sh` attaches them.

#![allow(missing_docs)]

mod common;

use common::*;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn clone(options: &[&str], base: &Path, new: &Path) -> Run {
    let mut args = vec!["clone"];
    args.extend(options);
    args.extend([base.to_str().unwrap(), new.to_str().unwrap()]);
    ploopctl(&args)
}

#[test]
fn an_image_is_made_that_fits_on_its_base() {
    let scratch = Scratch::new("clone-image");
    for (name, options) in [
        ("v2", ["-s", "3M", "-b", "64K", "--format-version", "2"]),
        ("v1", ["-s", "3M", "-b", "64K", "--format-version", "1"]),
    ] {
        let base = scratch.create(name, &options);
        let before = fs::read(&base).unwrap();
        let new = scratch.path(&format!("{name}.clone"));
        clone(&[], &base, &new).expect(0);
        assert_eq!(fs::read(&base).unwrap(), before);
        let (old, info) = (
            on(&base, &["info", "--json"]).expect(0).json(),
            on(&new, &["info", "--json"]).expect(0).json(),
        );
        for key in ["size", "cluster_size", "format_version"] {
            assert_eq!(info[key], old[key], "{key}");
        }
        assert_eq!(info["used_clusters"], 0);
        // Never over what is there.
        clone(&[], &base, &new).expect(1).says(&["exists"]);
        // A clone of a clone: the whole chain is given.
        let paths = [&base, &new, &scratch.path(&format!("{name}.2"))];
        let mut args = vec!["clone"];
        args.extend(paths.map(|p| p.to_str().unwrap()));
        ploopctl(&args).expect(0);
    }
    // In the wrong order, or of images that are nothing to each other.
    let large = scratch.create("large", &["-s", "9M", "-b", "64K"]);
    let (small, out) = (scratch.path("v2"), scratch.path("never"));
    let paths = [&large, &small, &out].map(|p| p.to_str().unwrap());
    ploopctl(&[&["clone"], &paths[..]].concat())
        .expect(38)
        .says(&["does not fit"]);
    assert!(!out.exists());
}

#[test]
fn a_raw_base_is_named_as_such_and_ends_with_a_cluster() {
    let scratch = Scratch::new("clone-raw");
    let (base, new) = (scratch.path("raw"), scratch.path("new"));
    fs::write(&base, vec![7; 3 << 16]).unwrap();
    clone(&[], &base, &new).expect(11);
    clone(&["-b", "64K"], &base, &new).expect(38);
    clone(&["-f", "raw", "-b", "128K"], &base, &new)
        .expect(38)
        .says(&["fit"]);
    assert!(!new.exists());
    clone(&["-f", "raw", "-b", "64K"], &base, &new).expect(0);
    let disk = scratch.path("disk");
    clone(&["-f", "raw", "-b", "64K", "--descriptor"], &base, &disk).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

#[test]
fn what_was_not_closed_is_no_base() {
    let scratch = Scratch::new("clone-marked");
    let base = scratch.create("base", &["-s", "1M", "-b", "64K"]);
    put_u32(&base, MARK, IN_USE);
    let new = scratch.path("new");
    clone(&[], &base, &new).expect(41).says(&["check --repair"]);
    clone(&["--descriptor"], &base, &new).expect(41);
    assert!(!new.exists());
    on(&base, &["check", "--repair"]).expect(0);
    clone(&[], &base, &new).expect(0);
}

#[test]
fn a_disk_notices_that_its_base_changed() {
    let scratch = Scratch::new("clone-disk");
    let base = scratch.create("base", &["-s", "1M", "-b", "64K"]);
    let (one, two) = (scratch.path("one"), scratch.path("two"));
    clone(&["--descriptor"], &base, &one).expect(0);
    clone(&["--descriptor"], &base, &two).expect(0);
    // The directory has to be new.
    clone(&["--descriptor"], &base, &two).expect(1);
    on(&one, &["descriptor", "validate"]).expect(0);
    assert_eq!(fs::metadata(&base).unwrap().nlink(), 3);
    let raw = scratch.path("raw");
    let convert = || {
        ploopctl(&[
            "convert",
            "-f",
            "raw",
            one.to_str().unwrap(),
            raw.to_str().unwrap(),
        ])
    };
    convert().expect(0);
    fs::remove_file(&raw).unwrap();
    // Nor is it changed by its own name.
    let other = scratch.create("other", &["-s", "1M", "-b", "64K"]);
    let before = fs::read(&base).unwrap();
    on(&base, &["resize", "-s", "2M"])
        .expect(37)
        .says(&["3 names"]);
    on(&base, &["compact", "--drop-zeros"]).expect(37);
    on(&other, &["merge", base.to_str().unwrap()]).expect(37);
    assert_eq!(fs::read(&base).unwrap(), before);
    // Somebody writes to the base.
    let file = fs::OpenOptions::new().write(true).open(&base).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(9))
        .unwrap();
    convert().expect(39).says(&["a lower image changed"]);
    clone(&[], &one, &scratch.path("three")).expect(39);
    assert!(!scratch.path("three").exists());
}

/// OpenVZ's name of the top.
const TOP: &str = "5fbaabe3-6958-40ff-92a7-860e329aab41";

#[test]
fn nothing_is_merged_into_what_others_build_on() {
    let scratch = Scratch::new("clone-merge");
    let disk = scratch.path("disk");
    on(&disk, &["create", "--descriptor", "-s", "1M", "-b", "64K"]).expect(0);
    let uuid = on(&disk, &["snapshot", "create"]).expect(0).out;
    let uuid = uuid.trim();
    let new = scratch.path("new");
    clone(&["--snapshot", uuid], &disk, &new).expect(0);
    let sum = |p: &Path| fs::read(p.join("root.hds")).unwrap();
    let before = sum(&disk);
    for at in [&disk, &new] {
        on(at, &["snapshot", "delete", "--uuid", uuid])
            .expect(37)
            .says(&["2 names"]);
        on(at, &["snapshot", "merge", "--all"]).expect(37);
        // Nor does it become the top.
        on(at, &["snapshot", "delete", "--uuid", TOP])
            .expect(37)
            .says(&["2 names"]);
        on(at, &["compact"]).expect(0).says(&["2 names"]);
        on(at, &["descriptor", "validate"]).expect(0);
    }
    assert_eq!(sum(&disk), before);
    // A snapshot of its own is nobody else's.
    let own = on(&new, &["snapshot", "create"]).expect(0).out;
    on(&new, &["snapshot", "delete", "--uuid", own.trim()]).expect(0);
    // Back to the base.
    on(&new, &["snapshot", "switch", "--uuid", uuid]).expect(0);
    // The other is gone, and so is the reason.
    fs::remove_dir_all(&new).unwrap();
    on(&disk, &["snapshot", "delete", "--uuid", uuid]).expect(0);
    // Of the disk itself, by any of its names; its top is not the top of the clone.
    clone(&[], &disk.join("DiskDescriptor.xml"), &new).expect(0);
    on(&new, &["descriptor", "validate"]).expect(0);
    clone(&["-f", "raw"], &disk, &scratch.path("x")).expect(38);
    clone(&["--snapshot", uuid], &disk, &scratch.path("x")).expect(43);
}

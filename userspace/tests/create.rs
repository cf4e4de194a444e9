// SPDX-License-Identifier: GPL-2.0
//! `create`: qemu-img accepts what we make, and a failure leaves nothing.

#![allow(missing_docs)]

mod common;
use common::{has_qemu, len, on, ploopctl, qemu, qemu_check, Scratch};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

#[test]
fn images_pass_our_check_and_qemus() {
    let scratch = Scratch::new("create");
    let sizes = ["512", "20M", "1G", "3G"];
    for version in ["1", "2"] {
        for cluster in ["32K", "256K", "1M", "64M"] {
            for size in sizes {
                for full in [false, true] {
                    // Enough is copied for the judge without these.
                    if full && (size.ends_with('G') || cluster == "64M") {
                        continue;
                    }
                    let mut options = vec!["--format-version", version, "-b", cluster, "-s", size];
                    options.extend(full.then_some("--preallocate"));
                    let image = scratch.create("image", &options);
                    judge(&image, &options, full);
                    std::fs::remove_file(image).unwrap();
                }
            }
        }
    }
}

fn judge(image: &std::path::Path, options: &[&str], full: bool) {
    on(image, &["check"]).expect(0);
    let info = on(image, &["info", "--json"]).expect(0).json();
    let bytes = |text: &str| ploopctl::size::parse(text).unwrap();
    assert_eq!(info["size"], bytes(options[5]), "{options:?}");
    assert_eq!(info["cluster_size"], bytes(options[3]), "{options:?}");
    assert_eq!(info["tail_bytes"], 0);
    let used = if full { &info["clusters"] } else { &0.into() };
    assert_eq!(&info["used_clusters"], used);
    assert_eq!(info["empty_flag"], !full);
    if full {
        let blocks = std::fs::metadata(image).unwrap().blocks();
        assert!(blocks * 512 >= len(image), "{options:?}");
    }
    if has_qemu() {
        qemu_check(image);
        let path = image.to_str().unwrap();
        let args = ["info", "--output=json", "-f", "parallels", path];
        let theirs: serde_json::Value =
            serde_json::from_slice(&qemu("qemu-img", &args).stdout).unwrap();
        assert_eq!(theirs["virtual-size"], info["size"], "{options:?}");
    }
}

#[test]
fn a_raw_image_is_the_disk() {
    let scratch = Scratch::new("create-raw");
    let thin = scratch.create("thin", &["-f", "raw", "-s", "10M"]);
    let full = scratch.create("full", &["-f", "raw", "-s", "10M", "--preallocate"]);
    assert_eq!((len(&thin), len(&full)), (10 << 20, 10 << 20));
    assert_eq!(std::fs::metadata(&thin).unwrap().blocks(), 0);
    assert!(std::fs::metadata(&full).unwrap().blocks() * 512 >= 10 << 20);
    ploopctl(&["create", "-f", "raw", "-b", "1M", "-s", "1M", "/nowhere"]).expect(38);
}

#[test]
fn an_existing_file_is_left_alone() {
    let scratch = Scratch::new("create-exists");
    let path = scratch.path("image");
    std::fs::write(&path, "precious").unwrap();
    on(&path, &["create", "-s", "1M"])
        .expect(1)
        .says(&["exists"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let link = scratch.path("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    on(&link, &["create", "-s", "1M"])
        .expect(1)
        .says(&["exists"]);
    assert_eq!(scratch.names(), ["image", "link"]);
}

#[test]
fn a_failure_leaves_nothing() {
    let scratch = Scratch::new("create-fails");
    let path = scratch.path("image");
    // No file system here has a PiB to give.
    let run = on(&path, &["create", "-s", "1P", "-b", "64M", "--preallocate"]);
    assert!([19, 20].contains(&run.code), "{run:?}");
    assert!(scratch.names().is_empty());
    on(&scratch.path("no/image"), &["create", "-s", "1M"])
        .expect(1)
        .says(&["directory does not exist"]);
}

/// Killed at any moment, the tool leaves a complete image or none.
#[test]
fn a_killed_create_leaves_nothing_half_made() {
    let scratch = Scratch::new("create-killed");
    let path = scratch.path("image");
    for ms in [0, 2, 5, 10, 20, 40] {
        let options = ["create", "-s", "64T", "-b", "1M"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_ploopctl"))
            .args(options)
            .arg(&path)
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(ms));
        child.kill().unwrap();
        child.wait().unwrap();
        if path.exists() {
            let info = on(&path, &["info", "--json"]).expect(0).json();
            assert_eq!(info["size"], 64u64 << 40);
            std::fs::remove_file(&path).unwrap();
        }
        assert!(scratch.names().is_empty());
    }
}

#[test]
fn bad_arguments_are_told() {
    let scratch = Scratch::new("create-args");
    let path = scratch.path("image");
    for (options, word) in [
        (&["-s", "0"][..], "multiple of 512"),
        (&["-s", "1000"], "multiple of 512"),
        (&["-s", "many"], "whole number"),
        (&["-s", "1M", "-b", "3M"], "power of two"),
        (&["-s", "1M", "-b", "16K"], "power of two"),
        (&["-s", "1M", "-b", "128M"], "power of two"),
        (&["-s", "4T", "--format-version", "1"], "version 2"),
        (
            &["-s", "2199023255040", "--format-version", "1"],
            "could never be filled",
        ),
        (
            &["-s", "140737487765504", "-b", "32K"],
            "could never be filled",
        ),
        (&["-s", "8191P", "-b", "32K"], "larger clusters"),
        (&["-s", "9000P"], "too large"),
        (&["-s", "1M", "--format-version", "3"], "3"),
        (&[], "--size"),
    ] {
        let mut args = vec!["create"];
        args.extend(options);
        on(&path, &args).expect(38).says(&[word]);
    }
    assert!(scratch.names().is_empty());
    ploopctl(&[]).expect(38);
    ploopctl(&["frobnicate"]).expect(38);
    assert!(ploopctl(&["--help"]).expect(0).out.contains("Exit codes"));
    assert!(ploopctl(&["--version"])
        .expect(0)
        .out
        .starts_with("ploopctl "));
}

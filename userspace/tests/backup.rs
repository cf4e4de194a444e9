// SPDX-License-Identifier: GPL-2.0
//! `backup` of what is not attached, `verify` and `restore`, by the built tool.

#![allow(missing_docs)]

mod common;
use common::{disk, has_qemu, on, ploopctl, qemu_check, small, small_disk, Scratch};
use ploopctl::backup::{wire, write};
use std::fs;
use std::path::Path;
use std::process::Command;

fn run(args: &[&str], paths: &[&Path]) -> common::Run {
    let mut all = args.to_vec();
    all.extend(paths.iter().map(|p| p.to_str().unwrap()));
    ploopctl(&all)
}

#[test]
fn an_image_comes_back() {
    let scratch = Scratch::new("backup");
    let image = small(&scratch, "image");
    for (name, options) in [("plain", &[][..]), ("packed", &["-z"])] {
        let file = scratch.path(name);
        let mut args = vec!["backup", "full", "--json"];
        args.extend(options);
        let told = run(&args, &[&image, &file]).expect(0).json();
        assert_eq!(told["kind"], "full");
        assert_eq!(told["disk_size"], small_disk().len());
        assert_eq!(told["length"], fs::metadata(&file).unwrap().len());
        assert!(told["checkpoint"].is_null());
        let verified = run(&["backup", "verify", "--json"], &[&file])
            .expect(0)
            .json();
        assert_eq!(verified["complete"], true);
        assert_eq!(verified["backups"][0]["uuid"], told["uuid"]);
        let out = scratch.path("out");
        let to = format!("--to={}", out.display());
        run(&["backup", "restore", &to], &[&file]).expect(0);
        on(&out, &["check"]).expect(0);
        if has_qemu() {
            qemu_check(&out);
            assert!(disk(&out) == small_disk());
        }
        run(&["backup", "restore", &to], &[&file]).expect(1);
        fs::remove_file(&out).unwrap();
        run(&["backup", "restore", "-f", "raw", &to], &[&file]).expect(0);
        assert!(fs::read(&out).unwrap() == small_disk());
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_disk_with_snapshots_comes_back() {
    let scratch = Scratch::new("backup-disk");
    let dir = scratch.path("disk");
    run(
        &["create", "--descriptor", "-s", "8M", "-b", "64K"],
        &[&dir],
    )
    .expect(0);
    run(&["snapshot", "create"], &[&dir]).expect(0);
    let (file, out) = (scratch.path("file"), scratch.path("out"));
    run(&["backup", "full"], &[&dir, &file]).expect(0);
    let to = format!("--to={}", out.display());
    run(&["backup", "restore", "-f", "raw", &to], &[&file]).expect(0);
    assert!(fs::read(&out).unwrap() == vec![0; 8 << 20]);
}

#[test]
fn what_cannot_be_is_refused() {
    let scratch = Scratch::new("backup-refused");
    let image = small(&scratch, "image");
    let file = scratch.path("file");
    run(&["backup", "full"], &[&image, &file]).expect(0);
    let names = scratch.names();
    // The name is taken.
    run(&["backup", "full"], &[&image, &file])
        .expect(1)
        .says(&["exists"]);
    // Nobody noted what was written.
    let parent = format!("--parent={}", file.display());
    let next = scratch.path("next");
    run(&["backup", "incremental", &parent], &[&image, &next])
        .expect(40)
        .says(&["not attached", "backup full"]);
    run(&["backup", "verify"], &[&image])
        .expect(11)
        .says(&["not a backup"]);
    run(&["backup", "full"], &[&scratch.path("none"), &next]).expect(4);
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&file, &bytes).unwrap();
    run(&["backup", "verify"], &[&file])
        .expect(41)
        .says(&["damaged", "checksum"]);
    let out = scratch.path("out");
    let to = format!("--to={}", out.display());
    run(&["backup", "restore", &to], &[&file]).expect(41);
    bytes.truncate(at);
    fs::write(&file, &bytes).unwrap();
    run(&["backup", "verify"], &[&file])
        .expect(41)
        .says(&["too early"]);
    run(&["backup", "incremental", &parent], &[&image, &next]).expect(41);
    assert_eq!(scratch.names(), names);
}

/// An empty backup number `nr` of the chain that begins with one that has this header.
fn incremental(full: &wire::Header, nr: u8) -> Vec<u8> {
    let header = wire::Header {
        id: [nr; 16],
        parent: Some(if nr == 1 { full.id } else { [nr - 1; 16] }),
        ..*full
    };
    let mut file = Vec::new();
    let writer = write::Writer::new(&mut file, Path::new("incremental"), &header).unwrap();
    writer.finish().unwrap();
    file
}

/// All of a chain are open at once: with the usual limit of open files 1000 could not be restored.
#[test]
fn a_chain_is_longer_than_the_limit_of_open_files() {
    let scratch = Scratch::new("backup-long");
    let image = small(&scratch, "image");
    let full = scratch.path("0");
    run(&["backup", "full"], &[&image, &full]).expect(0);
    let bytes = fs::read(&full).unwrap();
    let header = wire::Header::parse(bytes.first_chunk().unwrap()).unwrap();
    let mut files = vec![full];
    for nr in 1..100 {
        let file = scratch.path(&nr.to_string());
        fs::write(&file, incremental(&header, nr)).unwrap();
        files.push(file);
    }
    let out = scratch.path("out");
    let output = Command::new("bash")
        .args(["-c", "ulimit -S -n 50; exec \"$@\"", "bash"])
        .arg(env!("CARGO_BIN_EXE_ploopctl"))
        .args(["backup", "restore", "-f", "raw", "--to"])
        .arg(&out)
        .args(&files)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(&out).unwrap() == small_disk());
}

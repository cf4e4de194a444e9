// SPDX-License-Identifier: GPL-2.0
//! `backup` of what is not attached, `verify` and `restore`, by the built tool.

#![allow(missing_docs)]

mod common;
use common::{disk, has_qemu, on, ploopctl, qemu_check, small, small_disk, Scratch};
use sha2::{Digest, Sha256};
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

/// An empty backup number `nr` of the chain that begins with `full`.
fn incremental(full: &[u8], nr: u8) -> Vec<u8> {
    let sum = |bytes: &[u8]| crc32c::crc32c(bytes).to_le_bytes();
    let mut file = full[..256].to_vec();
    let parent = file[80..96].to_vec();
    file[44] = 1;
    file[48..64].fill(nr);
    file[64..80].fill(nr - 1);
    if nr == 1 {
        file[64..80].copy_from_slice(&parent);
    }
    let of_header = sum(&file[..252]);
    file[252..].copy_from_slice(&of_header);
    let mut end = [0; 64];
    end[24..32].copy_from_slice(&256u64.to_le_bytes());
    end[32..].copy_from_slice(&Sha256::digest(&file));
    let mut head = [0; 32];
    (head[0], head[4]) = (4, 64);
    head[24..28].copy_from_slice(&sum(&end));
    let of_head = sum(&head[..28]);
    head[28..].copy_from_slice(&of_head);
    file.extend(head);
    file.extend(end);
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
    let mut files = vec![full];
    for nr in 1..100 {
        files.push(scratch.path(&nr.to_string()));
        fs::write(files.last().unwrap(), incremental(&bytes, nr)).unwrap();
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

// SPDX-License-Identifier: GPL-2.0
//! What the tests of the built tool share: scratch directories, running it, changing images by
//! hand, and qemu-img as the outside judge.

#![allow(dead_code, missing_docs)]

use serde_json::Value;
use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const IN_USE: u32 = 0x746F_6E59;
pub const CLOSED_V21: u32 = 0x312E_3276;
/// Offset of DiskInUse.
pub const MARK: u64 = 44;

/// A scratch directory, removed at the end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ploopctl-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Makes an image with the given options.
    pub fn create(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["create"];
        args.extend(options);
        args.push(path.to_str().unwrap());
        ploopctl(&args).expect(0);
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How a run of the tool ended.
#[derive(Debug)]
pub struct Run {
    pub args: String,
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    /// The error says all of this.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {self:?}");
        }
        self
    }

    /// The answer as JSON of our schema.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.out).expect(&self.out);
        assert_eq!(value["schema"], 1);
        value
    }
}

pub fn ploopctl(args: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_ploopctl"))
        .args(args)
        .output()
        .unwrap();
    Run {
        args: args.join(" "),
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs one of ours on a path.
pub fn on(path: &Path, args: &[&str]) -> Run {
    let mut args = args.to_vec();
    args.push(path.to_str().unwrap());
    ploopctl(&args)
}

/// Whether the outside judge is here; says so if not, past what catches the output of a test that
/// passes. The build root has it.
pub fn has_qemu() -> bool {
    let is_there = Command::new("qemu-img").arg("--version").output().is_ok()
        && Command::new("qemu-io").arg("--version").output().is_ok();
    if !is_there {
        let missing = "left out: qemu-img or qemu-io is not installed";
        assert!(env::var_os("PLOOP_INSIDE").is_none(), "{missing}");
        let mut log = io::stderr();
        writeln!(log, "{missing}").unwrap();
    }
    is_there
}

#[track_caller]
pub fn qemu(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

/// `qemu-img check` on a copy: it repairs what it opens.
#[track_caller]
pub fn qemu_check(path: &Path) {
    let copy = path.with_extension("judged");
    fs::copy(path, &copy).unwrap();
    qemu(
        "qemu-img",
        &["check", "-f", "parallels", copy.to_str().unwrap()],
    );
    fs::remove_file(copy).unwrap();
}

#[track_caller]
pub fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "parallels"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let output = qemu("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("failed"), "{text}");
}

/// The disk as QEMU reads it.
pub fn disk(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("disk");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    qemu(
        "qemu-img",
        &["convert", "-f", "parallels", "-O", "raw", from, to],
    );
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

pub fn put(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

pub fn put_u32(path: &Path, offset: u64, value: u32) {
    put(path, offset, &value.to_le_bytes());
}

pub fn get_u32(path: &Path, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    let file = fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    u32::from_le_bytes(bytes)
}

pub fn entry(cluster: u64) -> u64 {
    64 + 4 * cluster
}

pub fn set_len(path: &Path, len: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

pub fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// An image of 16 clusters of 64 KiB, of which 0 to 3 hold data at image clusters 1 to 4, each
/// filled with its number plus one.
pub fn small(scratch: &Scratch, name: &str) -> PathBuf {
    let path = scratch.create(name, &["-s", "1M", "-b", "64K"]);
    set_len(&path, 5 << 16);
    put_u32(&path, 52, 0);
    for n in 0..4 {
        put_u32(&path, entry(n), n as u32 + 1);
        put(&path, (n + 1) << 16, &vec![n as u8 + 1; 1 << 16]);
    }
    path
}

/// What [`small`] holds.
pub fn small_disk() -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    for (n, cluster) in disk.chunks_mut(1 << 16).take(4).enumerate() {
        cluster.fill(n as u8 + 1);
    }
    disk
}

/// With a descriptor, 1 MiB in clusters of 32 KiB.
pub fn new_disk(scratch: &Scratch, name: &str, options: &[&str]) -> PathBuf {
    let dir = scratch.path(name);
    let mut args = vec!["create", "--descriptor", "-s", "1M", "-b", "32K"];
    args.extend(options);
    on(&dir, &args).expect(0);
    dir
}

pub fn snapshot(disk: &Path, uuid: &str) {
    let run = on(disk, &["snapshot", "create", "--uuid", uuid]).expect(0);
    assert_eq!(run.out, format!("{uuid}\n"));
}

pub fn xml(disk: &Path) -> PathBuf {
    disk.join("DiskDescriptor.xml")
}

/// The names of its images, the base first.
pub fn files(disk: &Path) -> Vec<String> {
    let json = on(disk, &["info", "--json"]).expect(0).json();
    let images = json["images"].as_array().unwrap().iter();
    images
        .map(|i| i["image"].as_str().unwrap().to_owned())
        .collect()
}

// SPDX-License-Identifier: GPL-2.0
//! Everything wrong that an image can be, before a kernel is asked: what `check` lists, what
//! `attach` refuses, and that a refusal changes nothing.

#![allow(missing_docs)]

mod common;
use common::{entry, has_qemu, on, ploopctl, put, put_u32, set_len, small, Scratch, IN_USE, MARK};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

type Damage = fn(&Path);

/// Damage, exit code of `check`, kinds of problems in order.
const CORPUS: [(&str, Damage, i32, &[&str]); 22] = [
    ("magic", |p| put(p, 0, b"x"), 11, &["magic"]),
    ("type", |p| put_u32(p, 16, 3), 11, &["disk-type"]),
    ("cluster 0", |p| put_u32(p, 28, 0), 11, &["cluster-size"]),
    ("cluster 63", |p| put_u32(p, 28, 63), 11, &["cluster-size"]),
    (
        "cluster 2G",
        |p| put_u32(p, 28, 1 << 22),
        11,
        &["cluster-size"],
    ),
    ("size 0", |p| put(p, 36, &[0; 8]), 11, &["size-zero"]),
    ("size max", |p| put(p, 36, &[0xff; 8]), 11, &["size-limit"]),
    ("entries", |p| put_u32(p, 32, 15), 11, &["size-over-bat"]),
    (
        "entries max",
        |p| put_u32(p, 32, u32::MAX),
        11,
        &["size-limit"],
    ),
    ("first 0", |p| put_u32(p, 48, 0), 11, &["first-block"]),
    ("first odd", |p| put_u32(p, 48, 129), 11, &["first-block"]),
    ("mark", |p| put_u32(p, MARK, 7), 11, &["in-use-value"]),
    ("flags", |p| put_u32(p, 52, 2), 11, &["flags"]),
    (
        "flags in use",
        |p| {
            put_u32(p, 52, 2);
            put_u32(p, MARK, IN_USE);
        },
        17,
        &["flags"],
    ),
    ("short", |p| set_len(p, 40), 11, &["truncated"]),
    ("cut BAT", |p| set_len(p, 4096), 11, &["truncated"]),
    ("in use", |p| put_u32(p, MARK, IN_USE), 41, &["in-use"]),
    (
        "past end",
        |p| put_u32(p, entry(7), 5),
        41,
        &["entry-past-end"],
    ),
    (
        "past end max",
        |p| put_u32(p, entry(2), u32::MAX),
        41,
        &["entry-past-end"],
    ),
    (
        "duplicate",
        |p| put_u32(p, entry(8), 2),
        41,
        &["entry-duplicate"],
    ),
    (
        "torn",
        |p| set_len(p, (5 << 16) - 512),
        41,
        &["torn-tail", "entry-torn"],
    ),
    ("tail", |p| set_len(p, (5 << 16) + 512), 41, &["torn-tail"]),
];

#[test]
fn every_damage_is_named_and_nothing_is_changed() {
    let scratch = Scratch::new("corpus");
    for (name, damage, code, kinds) in CORPUS {
        let image = small(&scratch, "image");
        damage(&image);
        let before = fs::read(&image).unwrap();
        let run = on(&image, &["check", "--json"]).expect(code);
        let answer = run.json();
        let got: Vec<&str> = answer["problems"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["kind"].as_str().unwrap())
            .collect();
        assert_eq!(got, kinds, "{name}");
        on(&image, &["check"]).expect(code).says(&["image"]);
        // Refused before any kernel is asked, unless it can be mended without loss, or the image was
        // closed and only entries are wrong: those are the kernel's to find, if it is here at all.
        let is_lossless = ["in use", "torn", "tail"].contains(&name);
        let is_for_kernel = !is_lossless && kinds.iter().all(|kind| kind.starts_with("entry-"));
        let run = on(&image, &["attach", "--no-repair"]);
        if is_for_kernel {
            assert!([2, code].contains(&run.code), "{name}: {run:?}");
        } else if is_lossless {
            run.expect(code).says(&["leave out --no-repair"]);
        } else {
            run.expect(code);
            let run = on(&image, &["attach"]).expect(code);
            if code == 41 {
                run.says(&["ploopctl check --repair"]);
            }
        }
        if [11, 17].contains(&code) {
            on(&image, &["check", "--repair"]).expect(code);
        }
        assert_eq!(fs::read(&image).unwrap(), before, "{name}");
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn entries_into_the_header_are_named_and_zeroed() {
    let scratch = Scratch::new("corpus-header");
    let image = scratch.create("image", &["-s", "1G", "-b", "32K"]);
    put_u32(&image, entry(20_000), 4);
    let answer = on(&image, &["check", "--json"]).expect(41).json();
    assert_eq!(answer["problems"][0]["kind"], "entry-in-header");
    assert_eq!(answer["problems"][0]["cluster"], 20_000);
    on(&image, &["check", "--repair"]).expect(0);
    assert_eq!(common::get_u32(&image, entry(20_000)), 0);
}

#[test]
fn version_1_entries_may_be_misaligned() {
    let scratch = Scratch::new("corpus-v1");
    let image = scratch.create("image", &["--format-version", "1", "-s", "1M", "-b", "64K"]);
    set_len(&image, 3 << 16);
    put_u32(&image, 52, 0);
    put_u32(&image, entry(0), 128);
    put_u32(&image, entry(1), 129);
    put_u32(&image, entry(2), 64);
    let answer = on(&image, &["check", "--json"]).expect(41).json();
    let kinds = ["entry-misaligned", "entry-misaligned"];
    for (problem, kind) in answer["problems"].as_array().unwrap().iter().zip(kinds) {
        assert_eq!(problem["kind"], kind);
    }
    on(&image, &["check", "--repair"]).expect(0);
    on(&image, &["check"]).expect(0);
    assert_eq!(common::get_u32(&image, entry(0)), 128);
    assert_eq!(common::get_u32(&image, entry(1)), 0);
}

#[test]
fn what_is_no_image_is_refused() {
    let scratch = Scratch::new("kinds");
    let fifo = scratch.path("fifo");
    assert!(Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap()
        .success());
    let circle = scratch.path("circle");
    std::os::unix::fs::symlink("circle", &circle).unwrap();
    let empty = scratch.path("empty");
    fs::write(&empty, "").unwrap();
    for (path, code, word) in [
        (Path::new("/tmp"), 4, "is a directory"),
        (&fifo, 4, "is a FIFO"),
        (Path::new("/dev/null"), 4, "is a character device"),
        (&circle, 4, "circle"),
        (&scratch.path("nowhere"), 4, "No such file"),
        (&empty, 11, "ploop1"),
    ] {
        for command in [
            &["attach"][..],
            &["attach", "-r"],
            &["check"],
            &["info"],
            &["map"],
        ] {
            on(path, command).expect(code).says(&[word]);
        }
    }
    let run = on(&empty, &["attach", "-f", "raw"]);
    run.expect(11).says(&["smaller than a sector"]);
    let raw = scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    on(&raw, &["attach"])
        .expect(11)
        .says(&["-f raw", "never guessed"]);
    on(&raw, &["attach", "-f", "ploop1"]).expect(11);
}

#[test]
fn a_name_may_be_any_bytes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let scratch = Scratch::new("bytes");
    let image = small(&scratch, "image");
    let odd = image.with_file_name(OsStr::from_bytes(b"odd\xff"));
    fs::rename(&image, &odd).unwrap();
    for command in ["check", "info", "map"] {
        let output = Command::new(env!("CARGO_BIN_EXE_ploopctl"))
            .args([command, "--json"])
            .arg(&odd)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(answer["image"].as_str().unwrap().ends_with("odd\u{fffd}"));
    }
    // It steers no terminal.
    on(&scratch.path("\u{1b}[2J"), &["info"])
        .expect(4)
        .says(&["\\u{1b}[2J"]);
}

#[test]
fn bad_arguments_are_told() {
    let scratch = Scratch::new("attach-args");
    let image = small(&scratch, "image");
    let long = "x".repeat(64);
    for (options, word) in [
        (&["-b", "1M"][..], "-f raw"),
        (&["--cookie", &long], "63 bytes"),
        (&["--cookie", "a\nb"], "one line"),
        (&["-n", "65536"], "65535"),
        (&["-f", "raw", "-b", "1000"], "power of two"),
        (&["-f", "qcow2"], "qcow2"),
    ] {
        let mut args = vec!["attach"];
        args.extend(options);
        on(&image, &args).expect(38).says(&[word]);
    }
    on(&image, &["detach"])
        .expect(40)
        .says(&["not attached", "list"]);
    ploopctl(&["detach", "/dev/ploop65000"])
        .expect(40)
        .says(&["no device ploop65000"]);
    ploopctl(&["info", "ploop65000"]).expect(40);
    ploopctl(&["list", "--json"]).expect(0).json();
}

/// What attach does before it asks the kernel; only where there is none to ask.
#[test]
fn attach_repairs_what_loses_nothing() {
    if Path::new("/dev/ploop-control").exists() {
        eprintln!("skipped: the ploop module is loaded");
        return;
    }
    let scratch = Scratch::new("attach-repair");
    let image = small(&scratch, "image");
    set_len(&image, (5 << 16) - 512);
    put_u32(&image, MARK, IN_USE);
    on(&image, &["attach", "-r"])
        .expect(41)
        .says(&["without -r"]);
    let words = [
        "repaired: extend",
        "repaired: clear",
        "cannot open /dev/ploop-control",
    ];
    let run = on(&image, &["attach", "--json"]).expect(2).says(&words);
    assert!(run.out.is_empty());
    assert_eq!(common::len(&image), 5 << 16);
    on(&image, &["check"]).expect(0);
    // Read-only, a mark or a tail that nothing names is no obstacle, and stays.
    put_u32(&image, MARK, IN_USE);
    set_len(&image, (5 << 16) + 512);
    let before = fs::read(&image).unwrap();
    on(&image, &["attach", "-r"])
        .expect(2)
        .says(&["cannot open /dev/ploop-control"]);
    assert_eq!(fs::read(&image).unwrap(), before);
}

/// Images that are no chain are refused before the kernel is asked, and nothing is mended.
#[test]
fn what_does_not_fit_is_no_chain() {
    let scratch = Scratch::new("chain");
    let base = small(&scratch, "base");
    let top = small(&scratch, "top");
    put_u32(&top, MARK, IN_USE);
    let before = fs::read(&top).unwrap();
    let other = |name: &str, options: &[&str]| scratch.create(name, options);
    let fine = other("fine", &["-s", "1M", "-b", "32K"]);
    let old = other("old", &["-s", "1M", "-b", "64K", "--format-version", "1"]);
    let large = other("large", &["-s", "2M", "-b", "64K"]);
    let raw = other("raw", &["-f", "raw", "-s", "1M"]);
    let uneven = other("uneven", &["-f", "raw", "-s", "1000K"]);
    let marked = small(&scratch, "marked");
    put_u32(&marked, entry(7), 2);
    for (below, options, code, words) in [
        (&fine, &[][..], 38, ["does not fit on", "cluster size"]),
        (&old, &[], 38, ["does not fit on", "format version"]),
        (&large, &[], 38, ["does not fit on", "less than"]),
        (&top, &[], 38, ["top", "given twice"]),
        (&raw, &[], 11, ["raw", "-f raw"]),
        (&uneven, &["-f", "raw"], 38, ["uneven", "multiple"]),
        (&raw, &["-f", "raw", "-b", "1M"], 38, ["fit on", "size"]),
        (&marked, &[], 41, ["marked is damaged", "--repair"]),
        (&scratch.path("no"), &[], 4, ["no", "No such file"]),
    ] {
        let mut args = vec!["attach"];
        args.extend(options);
        args.push(below.to_str().unwrap());
        on(&top, &args).expect(code).says(&words);
        assert_eq!(fs::read(&top).unwrap(), before, "{}", below.display());
    }
    let base = base.to_str().unwrap();
    let above = on(&raw, &["attach", base]).expect(11);
    above.says(&["raw is not a ploop1 image", "the base, can be raw"]);
    on(&large, &["attach", "-r", base, base])
        .expect(38)
        .says(&["given twice"]);
    let mut many = vec!["attach".to_string(), "-r".into()];
    many.extend((0..256).map(|n| format!("/nowhere/{n}")));
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    ploopctl(&many).expect(38).says(&["at most 255"]);
    ploopctl(&["attach"]).expect(38).says(&["IMAGE"]);
}

/// The images below the top are mended too, unless that is not wanted; only where there is no kernel
/// to ask.
#[test]
fn all_of_a_chain_is_repaired() {
    if Path::new("/dev/ploop-control").exists() {
        eprintln!("skipped: the ploop module is loaded");
        return;
    }
    let scratch = Scratch::new("chain-repair");
    let (base, top) = (small(&scratch, "base"), small(&scratch, "top"));
    put_u32(&base, MARK, IN_USE);
    put_u32(&top, MARK, IN_USE);
    let before = fs::read(&base).unwrap();
    let base_at = base.to_str().unwrap();
    on(&top, &["attach", "-r", base_at]).expect(2);
    assert!(fs::read(&base).unwrap() == before);
    let args = ["attach", base_at];
    on(&top, &args)
        .expect(2)
        .says(&["repaired: clear", "cannot open /dev/ploop-control"]);
    on(&top, &["check"]).expect(0);
    on(&base, &["check"]).expect(0);
    set_len(&base, (5 << 16) - 512);
    let torn = ["base", "check --repair"];
    on(&top, &["attach", "-r", base_at]).expect(41).says(&torn);
    on(&top, &["attach", "--no-repair", base_at])
        .expect(41)
        .says(&torn);
    on(&top, &args).expect(2).says(&["repaired: "]);
    on(&base, &["check"]).expect(0);
    // A raw base has the cluster size of what lies on it.
    let raw = scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    let args = ["attach", "-f", "raw", raw.to_str().unwrap()];
    on(&top, &args)
        .expect(2)
        .says(&["cannot open /dev/ploop-control"]);
}

#[test]
fn a_read_only_file_asks_for_r() {
    // Root may write anything but what is immutable or on a read-only file system.
    if nix::unistd::geteuid().is_root() {
        eprintln!("skipped: root may write to a file without permissions");
        return;
    }
    let scratch = Scratch::new("read-only");
    let image = small(&scratch, "image");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o400)).unwrap();
    on(&image, &["attach"]).expect(4).says(&["-r"]);
    on(&image, &["check"]).expect(0);
}

/// QEMU holds its locks while an image is open there; we see them, and it sees ours.
#[test]
fn an_image_open_in_qemu_is_in_use() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new("locks");
    let image = small(&scratch, "image");
    let path = image.to_str().unwrap();
    let mut child = Command::new("qemu-io")
        .args(["-f", "parallels", path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin.write_all(b"length\n").unwrap();
    stdin.flush().unwrap();
    stdout.read_line(&mut String::new()).unwrap();
    let holder = format!("process {} (qemu-io)", child.id());
    for command in [
        &["check"][..],
        &["check", "--repair"],
        &["attach"],
        &["attach", "-r"],
    ] {
        on(&image, command).expect(37).says(&["QEMU lock", &holder]);
    }
    drop(stdin);
    child.wait().unwrap();
    on(&image, &["check"]).expect(0);
}

#[test]
fn our_locks_keep_qemu_out() {
    use ploopctl::image::{Access, Image};
    use ploopctl::locks::{ImageLock, Use};
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new("our-locks");
    let path = small(&scratch, "image");
    let io = |read_only: bool| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "parallels", "-c", "read 0 4k"]);
        command.args(read_only.then_some("-r")).arg(&path);
        command.output().unwrap().status.success()
    };
    let image = Image::open(&path, Access::Write).unwrap();
    for (usage, may_read) in [(Use::Read, true), (Use::Write, false)] {
        let lock = ImageLock::take(image.file(), &path, usage).unwrap();
        assert_eq!((io(true), io(false)), (may_read, false), "{usage:?}");
        let other = Image::open(&path, Access::Read).unwrap();
        let both = ImageLock::take(other.file(), &path, Use::Read);
        assert_eq!(both.is_ok(), may_read, "{usage:?}");
        drop(lock);
    }
    assert!(io(true) && io(false));
}

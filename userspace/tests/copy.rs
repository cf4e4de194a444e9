// SPDX-License-Identifier: GPL-2.0
//! `ploopctl copy` of what no device has: images and disks with a descriptor, over pipes and to
//! files, and how it fails.

mod common;
use common::*;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn shell(script: &str) -> Output {
    Command::new("/bin/bash")
        .args(["-o", "pipefail", "-c", script])
        .env("P", env!("CARGO_BIN_EXE_ploopctl"))
        .output()
        .unwrap()
}

#[track_caller]
fn works(script: &str) {
    let output = shell(script);
    assert!(output.status.success(), "{script}: {output:?}");
}

/// Fails with this status, and says this.
#[track_caller]
fn fails(script: &str, status: i32, words: &str) {
    let output = shell(script);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{script}: {said}");
    assert!(said.contains(words), "{script}: {said}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn an_image_is_copied_every_way() {
    let scratch = Scratch::new("copy-image");
    let from = small(&scratch, "from");
    let want = fs::read(&from).unwrap();
    let f = text(&from);
    for (nr, how) in [
        "$P copy send FROM | $P copy receive TO",
        "$P copy send --to TO FROM",
        "$P copy send --through '$P copy receive TO' FROM",
        "$P copy send --compress zstd --through '$P copy receive TO' FROM",
        "$P copy send --v1 FROM | $P copy receive TO",
        "$P copy send FROM > TO.stream && $P copy receive --json TO < TO.stream; rm TO.stream",
        "coproc $P copy receive TO; $P copy send --answers FROM <&${COPROC[0]} >&${COPROC[1]}",
        "$P copy send --bwlimit 1M --to TO --json FROM 2>&1 | grep -q '\"event\":\"end\"'",
    ]
    .iter()
    .enumerate()
    {
        let to = scratch.path(&format!("to{nr}"));
        works(&how.replace("FROM", f).replace("TO", text(&to)));
        assert!(fs::read(&to).unwrap() == want, "{how}");
        assert_eq!(scratch.names().len(), nr + 2, "{:?}", scratch.names());
    }
}

#[test]
fn a_disk_is_copied_with_its_snapshots() {
    let scratch = Scratch::new("copy-disk");
    let disk = scratch.path("disk");
    let d = text(&disk);
    works(&format!("$P create --descriptor -s 4M -b 32K {d}"));
    for _ in 0..2 {
        works(&format!("$P snapshot create {d}"));
    }
    let (to, top) = (scratch.path("to"), scratch.path("top"));
    works(&format!("$P copy send --to {} {d}", text(&to)));
    works(&format!(
        "$P copy send --top-only {d} | $P copy receive {}",
        text(&top)
    ));
    works(&format!("$P descriptor validate {}", text(&to)));
    let mut nr = 0;
    for entry in fs::read_dir(&disk).unwrap() {
        let name = entry.unwrap().file_name();
        if name.to_str().unwrap().ends_with(".lck") {
            continue;
        }
        nr += 1;
        assert_eq!(
            fs::read(disk.join(&name)).unwrap(),
            fs::read(to.join(&name)).unwrap()
        );
    }
    assert_eq!(nr, 4);
    // The record of a lower image holds for the copy.
    works(&format!("$P snapshot create {}", text(&to)));
    fails(
        &format!("$P copy send --v1 {d} >/dev/null"),
        38,
        "holds one image",
    );
    fails(
        &format!("$P copy send --to {0} {d}", text(&to)),
        1,
        "exists already",
    );
    fails(
        &format!("$P copy send --to {d}/none/x {d}"),
        1,
        "does not exist",
    );
}

#[test]
fn what_fails_leaves_nothing() {
    let scratch = Scratch::new("copy-fails");
    let from = small(&scratch, "from");
    let (f, to) = (text(&from), scratch.path("to"));
    let t = text(&to);
    let receive = format!("$P copy receive {t}");
    fails(
        &format!("$P copy send {f} | head -c 9000 | {receive}"),
        13,
        "ends before",
    );
    fails(&format!("{receive} </dev/null"), 13, "ends before");
    fails(
        &format!("head -c 500 /dev/zero | {receive}"),
        13,
        "no stream",
    );
    fails(&format!("yes | {receive}"), 13, "no stream");
    fails(&format!("$P copy send --through true {f}"), 13, "went away");
    fails(&format!("$P copy send --through 'head -c 64 /dev/zero; cat >&2' {f} 2>&1 | grep -a -o 'is no answer' >&2; exit 13"), 13, "no answer");
    fails(
        &format!("$P copy send --timeout 1 --through 'sleep 20' {f}"),
        13,
        "silent",
    );
    fails(
        &format!(
            "$P copy send --through '$P copy receive {f}' {f} 2>&1 | grep 'gave up' >&2; exit 13"
        ),
        13,
        "exists already",
    );
    fails(
        &format!("(trap '' XFSZ; ulimit -f 100; $P copy send --to {t} {f})"),
        19,
        "File too large",
    );
    // What is run can be ended as usual.
    works(&format!(
        "timeout 15 $P copy send --through 'kill -TERM $$; sleep 20' {f} 2>/dev/null; test $? = 13"
    ));
    put_u32(&from, MARK, IN_USE);
    fails(
        &format!("$P copy send {f} >/dev/null"),
        41,
        "not closed cleanly",
    );
    assert_eq!(scratch.names(), ["from"]);
}

/// It was killed as if it were silent, though nobody waited for it.
#[test]
fn a_command_may_do_more_than_to_receive() {
    let scratch = Scratch::new("copy-command");
    let from = small(&scratch, "from");
    let to = scratch.path("to");
    let (f, t) = (text(&from), text(&to));
    works(&format!(
        "$P copy send --timeout 3 --through '$P copy receive {t}; sleep 4; touch {t}.done' {f}"
    ));
    assert_eq!(scratch.names(), ["from", "to", "to.done"]);
}

/// A sender and a receiver with a socket between them.
fn over_a_socket(send: &[&str], receive: &[&str]) -> (Child, Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd = |stream: UnixStream| OwnedFd::from(stream);
    let start = |args: &[&str], stdin: Stdio, stdout: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ploopctl"));
        let command = command.arg("copy").args(args).stdin(stdin).stdout(stdout);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let sender = start(send, Stdio::null(), fd(ours).into());
    let receiver = start(receive, fd(theirs).into(), Stdio::null());
    (sender, receiver)
}

#[track_caller]
fn ends(child: Child, status: i32, words: &str) {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains(words), "{said}");
}

#[test]
fn a_socket_is_a_way_back() {
    let scratch = Scratch::new("copy-socket");
    let from = small(&scratch, "from");
    let to = scratch.path("to");
    let (f, t) = (text(&from), text(&to));
    let (sender, receiver) = over_a_socket(&["send", f], &["receive", t]);
    ends(sender, 0, "complete");
    ends(receiver, 0, "complete");
    assert!(fs::read(&to).unwrap() == fs::read(&from).unwrap());
    let (sender, receiver) = over_a_socket(&["send", f], &["receive", t]);
    ends(sender, 13, "exists already");
    ends(receiver, 1, "exists already");
}

/// A signal ends either side, soon, and nothing is left.
#[test]
fn a_signal_ends_both_sides() {
    let scratch = Scratch::new("copy-signal");
    let from = small(&scratch, "from");
    let to = scratch.path("to");
    let partial = scratch.path("to.ploopctl-partial");
    let (f, t) = (text(&from), text(&to));
    for signal in ["INT", "TERM", "KILL"] {
        for is_sender in [true, false] {
            let send = ["send", "--bwlimit", "20K", f];
            let (sender, receiver) = over_a_socket(&send, &["receive", t]);
            let begun = Instant::now();
            while !partial.exists() && begun.elapsed() < Duration::from_secs(10) {
                sleep(Duration::from_millis(10));
            }
            let victim = if is_sender { &sender } else { &receiver };
            works(&format!("kill -{signal} {}", victim.id()));
            let (victim, other, words) = match is_sender {
                true => (sender, receiver, "e"),
                false => (receiver, sender, "the receiver"),
            };
            let output = victim.wait_with_output().unwrap();
            assert_eq!(output.status.code(), (signal != "KILL").then_some(29));
            ends(other, 13, words);
            assert!(begun.elapsed() < Duration::from_secs(15));
            assert!(!to.exists());
            let is_left = partial.exists();
            assert_eq!(is_left, signal == "KILL" && !is_sender);
        }
    }
}

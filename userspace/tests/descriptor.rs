// SPDX-License-Identifier: GPL-2.0
//! Disks with a descriptor, by the built tool: what an administrator types, sees, and does wrong.
//! Nothing here needs the kernel module.

#![allow(missing_docs)]

mod common;

use common::*;
use nix::fcntl::{Flock, FlockArg};
use ploopctl::descriptor::lock::{BaseLock, Patience};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const A: &str = "{aaaaaaaa-0000-4000-8000-00000000000a}";
const B: &str = "{bbbbbbbb-0000-4000-8000-00000000000b}";

fn edit(disk: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(xml(disk)).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(xml(disk), text.replacen(from, to, 1)).unwrap();
}

#[test]
fn a_disk_lives_its_life() {
    let scratch = Scratch::new("desc-life");
    let disk = new_disk(&scratch, "d", &[]);
    on(&disk, &["descriptor", "validate"]).expect(0);
    on(&disk, &["create", "--descriptor", "-s", "1M"])
        .expect(1)
        .says(&["exists already"]);
    snapshot(&disk, A);
    // By either name, with or without braces, in any case.
    on(
        &xml(&disk),
        &[
            "snapshot",
            "create",
            "--uuid",
            B[1..37].to_uppercase().as_str(),
        ],
    )
    .expect(0);
    let list = on(&disk, &["snapshot", "list", "--json"]).expect(0).json();
    let rows = list["snapshots"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|r| r["uuid"].as_str().unwrap()).collect();
    assert_eq!(names, [A, B, TOP]);
    assert_eq!(rows[2]["parent"], B);
    assert_eq!(rows[2]["current"], true);
    assert_eq!(list["size"], 1 << 20);
    assert_eq!(files(&disk).len(), 3);
    on(&disk, &["snapshot", "switch", "--uuid", A]).expect(0);
    assert_eq!(files(&disk).len(), 2);
    let tree = on(&disk, &["snapshot", "tree"]).expect(0).out;
    let want = format!("  {A} snapshot\n    {B} snapshot\n*   {TOP} current state\n");
    let names = tree
        .lines()
        .map(|l| l.split(',').next().unwrap().to_owned() + "\n");
    assert_eq!(names.collect::<String>(), want);
    // Two build on A: it is only marked.
    on(&disk, &["snapshot", "delete", "--uuid", A])
        .expect(0)
        .says(&["marked"]);
    on(&disk, &["snapshot", "switch", "--uuid", A])
        .expect(38)
        .says(&["being removed"]);
    on(&disk, &["snapshot", "switch", "--uuid", A])
        .expect(38)
        .says(&["when one of them is left"]);
    // Nor is it handed out: a part of what came later may be in it.
    on(&disk, &["attach", "-r", "--snapshot", A])
        .expect(38)
        .says(&["being removed"]);
    let out = scratch.path("out");
    ploopctl(&[
        "convert",
        "-f",
        "raw",
        "--snapshot",
        A,
        disk.to_str().unwrap(),
        out.to_str().unwrap(),
    ])
    .expect(38)
    .says(&["being removed"]);
    assert!(!out.exists());
    on(&disk, &["snapshot", "delete", "--uuid", B]).expect(0);
    on(&disk, &["snapshot", "delete", "--uuid", B])
        .expect(43)
        .says(&["no snapshot"]);
    on(&disk, &["check"]).expect(0);
    // It has gone with the one that was in its way: an image, the descriptor, the lock.
    assert_eq!(files(&disk).len(), 1);
    let names = fs::read_dir(&disk).unwrap().count();
    assert_eq!(names, 3);
}

#[test]
fn a_raw_disk_gets_snapshots() {
    let scratch = Scratch::new("desc-raw");
    let disk = new_disk(&scratch, "d", &["-f", "raw"]);
    assert_eq!(fs::metadata(disk.join("root.hds")).unwrap().len(), 1 << 20);
    snapshot(&disk, A);
    let text = fs::read_to_string(xml(&disk)).unwrap();
    assert_eq!(text.matches("<Type>Plain</Type>").count(), 2);
    on(&disk, &["descriptor", "validate"]).expect(0);
    on(&disk, &["snapshot", "delete", "--uuid", TOP]).expect(0);
    assert_eq!(files(&disk).len(), 1);
}

#[test]
fn what_does_not_fit_is_named() {
    let scratch = Scratch::new("desc-wrong");
    let fresh = |name: &str| {
        let disk = new_disk(&scratch, name, &[]);
        snapshot(&disk, A);
        disk
    };
    let refused = |disk: &Path, words: &[&str]| {
        let before = fs::read_to_string(xml(disk)).unwrap();
        on(disk, &["attach"]).expect(39).says(words);
        on(disk, &["snapshot", "create"]).expect(39).says(words);
        let said = on(disk, &["descriptor", "validate"]).expect(39).out;
        assert!(words.iter().all(|w| said.contains(w)), "{said}");
        assert_eq!(fs::read_to_string(xml(disk)).unwrap(), before);
    };
    let disk = fresh("missing");
    fs::remove_file(disk.join("root.hds")).unwrap();
    refused(&disk, &["root.hds", "cannot be found"]);
    let disk = fresh("foreign");
    edit(&disk, "<File>root.hds<", "<File>../foreign.hds<");
    fs::rename(disk.join("root.hds"), scratch.path("foreign.hds")).unwrap();
    refused(&disk, &["foreign.hds", "not in the directory"]);
    let disk = fresh("size");
    edit(&disk, "<Disk_size>2048<", "<Disk_size>4096<");
    edit(&disk, "<End>2048<", "<End>4096<");
    refused(&disk, &["2048 sectors", "4096"]);
    on(&disk, &["recover"])
        .expect(0)
        .says(&["the disk has 2048 sectors, not 4096"]);
    on(&disk, &["descriptor", "validate"]).expect(0);
    let disk = fresh("cluster");
    edit(&disk, "<Blocksize>64<", "<Blocksize>128<");
    refused(&disk, &["clusters of 64 sectors", "128"]);
    let disk = fresh("same");
    let names = files(&disk);
    fs::remove_file(&names[1]).unwrap();
    fs::hard_link(&names[0], &names[1]).unwrap();
    refused(&disk, &["one and the same file"]);
    let disk = fresh("order");
    let names = files(&disk);
    scratch.create("small", &["-s", "512K", "-b", "32K"]);
    fs::rename(scratch.path("small"), &names[1]).unwrap();
    edit(&disk, "<Disk_size>2048<", "<Disk_size>1024<");
    edit(&disk, "<End>2048<", "<End>1024<");
    refused(&disk, &["does not fit on root.hds", "disk size"]);
    let disk = fresh("nothing");
    fs::write(xml(&disk), "").unwrap();
    refused(&disk, &["no element"]);
    on(&scratch.path("none.xml"), &["attach"])
        .expect(4)
        .says(&["none.xml", "restore"]);
    let all = files(&fresh("twice"));
    ploopctl(&["attach", scratch.path("twice").to_str().unwrap(), &all[0]])
        .expect(38)
        .says(&["give it alone"]);
}

#[test]
fn a_missing_image_of_another_branch_is_in_nobodys_way() {
    let scratch = Scratch::new("desc-branch");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    snapshot(&disk, B);
    let lost = files(&disk).remove(1);
    on(&disk, &["snapshot", "switch", "--uuid", A]).expect(0);
    fs::remove_file(lost).unwrap();
    on(&disk, &["descriptor", "validate"]).expect(39);
    on(&disk, &["snapshot", "create"]).expect(0);
    let hint = format!("snapshot delete --uuid {B}");
    on(&disk, &["recover"]).expect(0).says(&[&hint]);
    on(&disk, &["compact"]).expect(0).says(&[&hint]);
    on(&disk, &["check", "--repair"]).expect(4).says(&[&hint]);
    let all = on(&disk, &["check", "--json"]).expect(4).json();
    let all = all["images"].as_array().unwrap().iter();
    let results: Vec<_> = all.map(|i| i["result"].as_str().unwrap()).collect();
    assert_eq!(results, ["clean", "missing", "clean", "clean"]);
    assert_eq!(on(&disk, &["check"]).out.matches("No damage").count(), 3);
    let copy = disk.join("copy.hds");
    fs::copy(disk.join("root.hds"), &copy).unwrap();
    on(&disk, &["replace", "--level", "0", copy.to_str().unwrap()]).expect(0);
    on(&disk, &["snapshot", "delete", "--uuid", B]).expect(0);
    on(&disk, &["check"]).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

/// One alone became a whole disk, with holes where the image below it had data.
#[test]
fn a_lone_delta_makes_no_disk() {
    let scratch = Scratch::new("desc-lone");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let [base, top] = files(&disk).try_into().unwrap();
    fs::remove_file(xml(&disk)).unwrap();
    fs::rename(&base, scratch.path("base")).unwrap();
    on(&disk, &["descriptor", "restore"])
        .expect(38)
        .says(&["named like a delta", &top]);
    assert!(!xml(&disk).exists());
    let dir = disk.to_str().unwrap();
    ploopctl(&["descriptor", "restore", dir, &top]).expect(0);
    assert_eq!(files(&disk), [top]);
}

#[test]
fn a_disk_is_of_whole_clusters_and_made_whole_or_not_at_all() {
    let scratch = Scratch::new("desc-make");
    let make = |name: &str, args: &[&str]| {
        let mut all = vec!["create", "--descriptor"];
        all.extend(args);
        on(&scratch.path(name), &all)
    };
    for kind in ["ploop1", "raw"] {
        make(kind, &["-f", kind, "-s", "1000000000"])
            .expect(0)
            .says(&["multiple of its clusters"]);
        let disk = scratch.path(kind);
        snapshot(&disk, A);
        on(&disk, &["resize", "-s", "2G"]).expect(0);
        on(&disk, &["descriptor", "validate"]).expect(0);
    }
    make("bad", &["-f", "raw", "-s", "1M", "-b", "5000"]).expect(38);
    assert!(!scratch.path("bad").exists());
    fs::create_dir(scratch.path("there")).unwrap();
    make("there", &["-f", "raw", "-s", "1M", "-b", "5000"]).expect(38);
    assert_eq!(fs::read_dir(scratch.path("there")).unwrap().count(), 0);
}

/// An image that others made may end inside a cluster.
#[test]
fn what_could_not_be_attached_any_more_is_not_grown() {
    let scratch = Scratch::new("desc-uneven");
    let disk = scratch.path("d");
    fs::create_dir(&disk).unwrap();
    scratch.create("d/o", &["-s", "1000000000"]);
    on(&disk, &["descriptor", "restore"]).expect(0);
    snapshot(&disk, A);
    let before = fs::read_to_string(xml(&disk)).unwrap();
    on(&disk, &["resize", "-s", "2G"])
        .expect(38)
        .says(&["multiple of the cluster size", "snapshot merge --all"]);
    assert_eq!(fs::read_to_string(xml(&disk)).unwrap(), before);
    on(&disk, &["descriptor", "validate"]).expect(0);
    on(&disk, &["snapshot", "merge", "--all"]).expect(0);
    on(&disk, &["resize", "-s", "2G"]).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

#[test]
fn a_disk_is_found_by_any_name() {
    let scratch = Scratch::new("desc-names");
    let disk = new_disk(&scratch, "d.xml", &[]);
    on(&disk, &["descriptor", "validate"]).expect(0);
    let link = scratch.path("link.xml");
    std::os::unix::fs::symlink(xml(&disk), &link).unwrap();
    for command in [
        "snapshot create",
        "info",
        "descriptor validate",
        "snapshot list",
    ] {
        let args: Vec<_> = command.split(' ').collect();
        on(&link, &args).expect(0);
    }
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(files(&link), files(&disk));
    for args in [&["detach", "--force"][..], &["op", "status"], &["trim"]] {
        on(&link, args)
            .expect(40)
            .says(&[&format!("{}/root.hds.", disk.display())]);
    }
}

#[test]
fn descriptors_are_made_anew() {
    let scratch = Scratch::new("desc-restore");
    let disk = new_disk(&scratch, "d", &[]);
    snapshot(&disk, A);
    let want = files(&disk);
    on(&disk, &["descriptor", "restore"])
        .expect(1)
        .says(&["exists already", "--force"]);
    fs::remove_file(xml(&disk)).unwrap();
    on(&disk, &["snapshot", "list"])
        .expect(38)
        .says(&["neither a descriptor", "restore"]);
    on(&disk, &["descriptor", "restore"]).expect(0);
    assert_eq!(files(&disk), want);
    snapshot(&disk, B);
    // Three may be a chain or a fork.
    let run = on(&disk, &["descriptor", "restore", "--force"]).expect(38);
    let run = run.says(&[
        "3 images",
        "nothing in them tells",
        "name those of one chain",
    ]);
    let proposal = run.err.split("restore ").nth(1).unwrap().trim().to_owned();
    let want = files(&disk);
    let given: Vec<_> = proposal.split(' ').collect();
    let order: Vec<_> = given[1..]
        .iter()
        .map(|p| Path::new(p).file_name())
        .collect();
    assert_eq!(
        order,
        want.iter()
            .map(|p| Path::new(p).file_name())
            .collect::<Vec<_>>()
    );
    let mut args = vec!["descriptor", "restore", "--force"];
    args.extend(&given);
    ploopctl(&args).expect(0);
    assert_eq!(files(&disk), want);
    assert!(disk.join("DiskDescriptor.xml.old").exists());
    // In a wrong order nothing is done.
    args[4..].reverse();
    let before = fs::read_to_string(xml(&disk)).unwrap();
    ploopctl(&args);
    let after = fs::read_to_string(xml(&disk)).unwrap();
    assert!(after == before || files(&disk).len() == 3);
    let empty = scratch.path("empty");
    fs::create_dir(&empty).unwrap();
    on(&empty, &["descriptor", "restore"])
        .expect(38)
        .says(&["no ploop1 image"]);
}

#[test]
fn the_second_is_told_who_is_in_the_way() {
    let scratch = Scratch::new("desc-lock");
    let disk = new_disk(&scratch, "d", &[]);
    let lock = File::open(disk.join("DiskDescriptor.xml.lck")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    let own = format!("process {}", std::process::id());
    on(&disk, &["snapshot", "create", "--wait", "1"])
        .expect(23)
        .says(&[&own, "waited for 1 second"]);
    // Looking is possible.
    on(&disk, &["snapshot", "list"]).expect(0);
    drop(lock);
    let tool = env!("CARGO_BIN_EXE_ploopctl");
    let start = || {
        Command::new(tool)
            .args(["snapshot", "create"])
            .arg(&disk)
            .spawn()
            .unwrap()
    };
    let all: Vec<_> = (0..8).map(|_| start()).collect();
    for mut child in all {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(files(&disk).len(), 9);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

/// It was used, and written over, as it had been before the wait.
#[test]
fn a_descriptor_may_change_while_its_base_is_waited_for() {
    let scratch = Scratch::new("desc-waits");
    let disk = new_disk(&scratch, "d", &[]);
    let before = fs::read(xml(&disk)).unwrap();
    snapshot(&disk, A);
    let after = fs::read(xml(&disk)).unwrap();
    fs::write(xml(&disk), before).unwrap();
    // As who locks the base alone.
    let patience = Patience(Duration::ZERO);
    let base = BaseLock::take(&xml(&disk), &disk.join("root.hds"), false, patience).unwrap();
    let mut waiting = Command::new(env!("CARGO_BIN_EXE_ploopctl"))
        .args(["snapshot", "create", "--wait", "60", "--uuid", B])
        .arg(&disk)
        .spawn()
        .unwrap();
    let is_read = || {
        let lock = File::open(disk.join("DiskDescriptor.xml.lck")).unwrap();
        Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err()
    };
    let begun = Instant::now();
    while !is_read() && begun.elapsed() < Duration::from_secs(30) {
        sleep(Duration::from_millis(10));
    }
    sleep(Duration::from_millis(200));
    fs::write(xml(&disk), after).unwrap();
    drop(base);
    assert!(waiting.wait().unwrap().success());
    assert_eq!(files(&disk).len(), 3);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

/// A descriptor as OpenVZ's tools write it, unknown elements and all.
#[test]
fn what_others_wrote_stays() {
    let scratch = Scratch::new("desc-others");
    let disk = new_disk(&scratch, "d", &[]);
    let text = format!(
        "<?xml version=\"1.0\"?>\n<Virtuozzo_disk_image>\n\
         \t<Disk_Parameters><Disk_size>2048</Disk_size><Cylinders>1</Cylinders>\n\
         \t\t<Future a=\"b\">c</Future></Disk_Parameters>\n\
         \t<StorageData><Storage><Start>0</Start><End>2048</End><Blocksize>64</Blocksize>\n\
         \t\t<Image><GUID>{A}</GUID><Type>Compressed</Type><File>root.hds</File><!-- x --></Image>\n\
         \t</Storage></StorageData>\n\
         \t<Snapshots><TopGUID>{A}</TopGUID><Shot><GUID>{A}</GUID>\
         <ParentGUID>{{00000000-0000-0000-0000-000000000000}}</ParentGUID></Shot></Snapshots>\n\
         </Virtuozzo_disk_image>\n"
    );
    fs::write(xml(&disk), &text).unwrap();
    snapshot(&disk, B);
    let now = fs::read_to_string(xml(&disk)).unwrap();
    for kept in [
        "<Future a=\"b\">c</Future>",
        "<!-- x -->",
        "</Virtuozzo_disk_image>\n",
    ] {
        assert!(now.contains(kept), "{now}");
    }
    assert!(now.contains(&format!("<TopGUID>{TOP}</TopGUID>")));
    on(&disk, &["snapshot", "delete", "--uuid", TOP]).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
}

/// The old descriptor was read as text before it was kept, so what needed `restore` most was refused.
#[test]
fn a_descriptor_that_is_no_text_is_replaced() {
    let scratch = Scratch::new("desc-torn");
    let disk = new_disk(&scratch, "d", &[]);
    let torn = [0xff, 0xfe, 0];
    fs::write(xml(&disk), torn).unwrap();
    on(&disk, &["descriptor", "restore", "--force"]).expect(0);
    on(&disk, &["descriptor", "validate"]).expect(0);
    let old = disk.join("DiskDescriptor.xml.old");
    assert_eq!(fs::read(&old).unwrap(), torn);
    // Again, over what was kept; a link is kept as one.
    fs::remove_file(xml(&disk)).unwrap();
    std::os::unix::fs::symlink("nowhere", xml(&disk)).unwrap();
    on(&disk, &["descriptor", "restore", "--force"]).expect(0);
    assert_eq!(fs::read_link(&old).unwrap(), Path::new("nowhere"));
    assert!(!xml(&disk).is_symlink());
}

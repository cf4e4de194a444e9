// SPDX-License-Identifier: GPL-2.0
//! `ploopctl fscheck`: the file systems of a disk on a read-only device, of a snapshot if the disk
//! is in use.

use super::mount::{file_systems, program, FileSystem};
use super::{attach, detach, disk};
use crate::cli::{AttachArgs, FscheckArgs};
use crate::descriptor::guid::Guid;
use crate::disk::outside::Freeze;
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::output;
use crate::signals::{for_child, Requests};
use crate::sysfs::Sysfs;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

/// How often it is looked whether a checker has ended, or the user wants an end.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs the command. What ends it early leaves neither the device nor the snapshot.
pub fn run(args: &FscheckArgs) -> Result<()> {
    let mut requests = Requests::begin();
    let live = Live::default();
    let mut disk = disk::open(&args.disk.disk, &live, Work::Long, &args.disk.wait)?;
    if disk.users(&live)?.writers.is_empty() {
        return look(&disk, None, &mut requests);
    }
    let uuid = disk.snapshot(&live, None, Freeze::Yes)?;
    let looked = disk
        .mark_temporary(uuid)
        .and_then(|()| look(&disk, Some(uuid), &mut requests));
    let removed = disk.delete(&live, uuid);
    match (looked, removed) {
        (looked, Ok(_)) => looked,
        (Ok(()), Err(e)) => Err(e),
        (Err(e), Err(left)) => Err(e.hint(format!(
            "and the snapshot {uuid} that was made for it is left: {}; 'ploopctl recover' removes it",
            left.without_hint()
        ))),
    }
}

fn look(disk: &Opened, snapshot: Option<Guid>, requests: &mut Requests) -> Result<()> {
    let asked = AttachArgs {
        read_only: true,
        force: true,
        ..AttachArgs::default()
    };
    let guid = snapshot.unwrap_or(disk.descriptor().disk().top);
    let attached = attach::images(&attach::args_of_delta(disk, guid, &asked)?)?;
    let verdict = check_all(disk, attached.index, requests);
    let sysfs = Sysfs::default();
    if let Some(device) = sysfs.device(attached.index)? {
        detach::device_cleanly(&sysfs, &device)?;
    }
    verdict
}

fn check_all(disk: &Opened, index: u32, requests: &mut Requests) -> Result<()> {
    let found = file_systems(index);
    if found.is_empty() {
        let what = format!("there is no file system on {}", disk.path().display());
        return Err(Error::new(Code::NotAnImage, what));
    }
    let mut nr_bad = 0;
    for fs in &found {
        let is_sound = check(fs, requests)?;
        let verdict = if is_sound { "sound" } else { "damaged" };
        output::text(&format!("{} ({}): {verdict}\n", part_name(fs), fs.kind))?;
        nr_bad += u64::from(!is_sound);
    }
    if nr_bad == 0 {
        return Ok(());
    }
    let what = format!(
        "{} of {} on {} {} damaged",
        nr_bad,
        output::count(found.len() as u64, "file system"),
        disk.path().display(),
        if nr_bad == 1 { "is" } else { "are" }
    );
    Err(Error::new(Code::Damaged, what)
        .hint("unmount it, and let fsck of that file system mend it"))
}

fn ended_early() -> Error {
    Error::new(Code::Aborted, "the check was ended early, as asked")
}

/// `disk` or `partition 1`.
fn part_name(fs: &FileSystem) -> String {
    let node = fs.node.to_string_lossy();
    match node.rsplit_once('p') {
        Some((before, nr)) if before.ends_with(|c: char| c.is_ascii_digit()) => {
            format!("partition {nr}")
        }
        Some(_) | None => "disk".to_owned(),
    }
}

/// Whether a checker that changes nothing finds it sound. What the checker says goes to standard
/// error.
fn check(fs: &FileSystem, requests: &mut Requests) -> Result<bool> {
    let (name, options): (String, &[&str]) = match fs.kind.as_str() {
        "ext2" | "ext3" | "ext4" => ("e2fsck".into(), &["-f", "-n"]),
        "xfs" => ("xfs_repair".into(), &["-n"]),
        "btrfs" => ("btrfs".into(), &["check", "--readonly", "--force"]),
        kind => (format!("fsck.{kind}"), &["-n"]),
    };
    let failed = |e| {
        let what = format!(
            "cannot run {name} to check a file system of kind {}",
            fs.kind
        );
        Error::io(Code::System, what, e)
    };
    let own = std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map_err(failed)?;
    let mut checker = program(&name);
    let checker = checker.args(options).arg(&fs.node).stdout(Stdio::from(own));
    if requests.is_end_asked() {
        return Err(ended_early());
    }
    let mut child = for_child(|| checker.spawn()).map_err(failed)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if requests.is_end_asked() {
            // It changes nothing. One that has ended by itself is none to be killed.
            let _ = child.kill();
            child.wait().map_err(failed)?;
            return Err(ended_early());
        }
        sleep(PAUSE);
    };
    if requests.is_end_asked() {
        return Err(ended_early());
    }
    match status.code() {
        Some(0) => Ok(true),
        // fsck: from 8 up it could not do its work.
        Some(code) if code & !7 == 0 => Ok(false),
        _ => {
            let what = format!("{name} could not check {}: {status}", fs.node.display());
            Err(Error::new(Code::System, what))
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl fscheck`: the file systems of a disk on a device of its own, of a snapshot if the disk is in
//! use.
//!
//! Also one that is frozen has files that were removed while they were open, or a log that is not empty,
//! which its checker takes for damage. So above the disk there is an empty image that goes with the
//! device, and journals are replayed there first: the disk itself is only read.

use super::mount::{file_systems, program, FileSystem};
use super::{attach, detach, disk};
use crate::cli::{AttachArgs, FscheckArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::store;
use crate::disk::outside::Freeze;
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::output;
use crate::signals::{for_child, Requests};
use crate::sysfs::Sysfs;
use ploop_pure::chain::DELTAS_MAX;
use ploop_pure::layout::ploop1::Header;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
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
    let guid = snapshot.unwrap_or(disk.descriptor().disk().top);
    let sysfs = Sysfs::default();
    let spare = Spare::attach(disk, guid)?;
    let verdict = check_all(disk, &spare, &sysfs, requests);
    if let Some(device) = sysfs.device(spare.index)? {
        detach::device_cleanly(&sysfs, &device)?;
    }
    verdict
}

/// The device.
struct Spare {
    index: u32,
    /// Nothing can be above the disk.
    read_only: bool,
}

impl Spare {
    fn attach(disk: &Opened, guid: Guid) -> Result<Self> {
        let asked = AttachArgs {
            force: true,
            no_repair: true,
            ..AttachArgs::default()
        };
        let mut args = attach::args_of_delta(disk, guid, &asked)?;
        let path = match make_spare(disk, guid, args.images.len()) {
            Ok(path) => path,
            Err(e) => {
                output::note(&format!("note: journals are not replayed before: {e}"));
                args.read_only = true;
                let index = attach::images(&args)?.index;
                return Ok(Self {
                    index,
                    read_only: true,
                });
            }
        };
        args.images.push(path.clone());
        let attached = attach::images(&args);
        // The device has it open, and nobody else needs it.
        fs::remove_file(&path).map_err(|e| {
            let what = format!("cannot remove {}", path.display());
            Error::io(Code::Unlink, what, e)
        })?;
        Ok(Self {
            index: attached?.index,
            read_only: false,
        })
    }
}

/// Makes an empty image, beside the descriptor, that fits on `guid`, which has so many levels.
fn make_spare(disk: &Opened, guid: Guid, nr_levels: usize) -> Result<PathBuf> {
    let below = disk.member(guid)?;
    let cluster = disk.descriptor().disk().cluster;
    let unfit = |why: String| Error::new(Code::Create, format!("nothing can be above it: {why}"));
    if nr_levels >= DELTAS_MAX {
        return Err(unfit(format!("it has {DELTAS_MAX} levels already")));
    }
    let header = Header::new(below.version(), cluster, below.size_sectors)
        .map_err(|p| unfit(p.to_string()))?;
    below
        .must_be_built_on(header, cluster)
        .map_err(|m| unfit(m.to_string()))?;
    let name =
        Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?;
    let path = store::dir_of(disk.path()).join(format!("fscheck-{name}"));
    create::ploop1(&path, header, Space::Thin)?;
    Ok(path)
}

fn check_all(disk: &Opened, spare: &Spare, sysfs: &Sysfs, requests: &mut Requests) -> Result<()> {
    let index = spare.index;
    if !spare.read_only {
        // On a full host it would wait, and nobody look at it.
        sysfs.set_on_full(index, detach::FAIL).map_err(|e| {
            let what = format!("cannot let writes of ploop{index} fail");
            Error::io(Code::Sysfs, what, e)
        })?;
    }
    let found = file_systems(index);
    if found.is_empty() {
        let what = format!("there is no file system on {}", disk.path().display());
        return Err(Error::new(Code::NotAnImage, what));
    }
    let mut nr_bad = 0;
    for fs in &found {
        if !spare.read_only {
            replay(fs, requests)?;
        }
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

/// Replays its journal and does what its next mount would do first; whether that went well shows when it
/// is checked.
fn replay(fs: &FileSystem, requests: &mut Requests) -> Result<()> {
    let node = fs.node.as_os_str();
    let mut ran = |name: &str, arguments: &[&str]| {
        let mut command = program(name);
        command.args(arguments).arg(node);
        run_program(name, &mut command, fs, requests)
    };
    match fs.kind.as_str() {
        "ext2" | "ext3" | "ext4" => {
            ran("e2fsck", &["-p", "-E", "journal_only"])?;
            if !has_noted_errors(&fs.node)? {
                // Nothing but what was removed while it was open: no check is due.
                ran("tune2fs", &["-c", "0", "-i", "0"])?;
                ran("e2fsck", &["-p"])?;
            }
        }
        // Only the kernel can; nobody else sees the mount, which ends with the shell.
        "xfs" => {
            let script = "mount -t xfs -o nouuid,nosuid,nodev,noexec \"$1\" /sys && umount /sys";
            ran("unshare", &["--mount", "sh", "-c", script, "sh"])?;
        }
        _ => {}
    }
    Ok(())
}

/// Whether an ext4 that the kernel found an error in says so.
fn has_noted_errors(node: &Path) -> Result<bool> {
    /// `s_state` in the superblock, and its bit for that.
    const STATE: (u64, u16) = (1024 + 0x3a, 2);
    let mut state = [0; 2];
    let read = File::open(node).and_then(|f| f.read_exact_at(&mut state, STATE.0));
    read.map_err(|e| Error::io(Code::Read, format!("cannot read {}", node.display()), e))?;
    Ok(u16::from_le_bytes(state) & STATE.1 != 0)
}

/// Whether a checker that changes nothing finds it sound.
fn check(fs: &FileSystem, requests: &mut Requests) -> Result<bool> {
    let (name, options): (String, &[&str]) = match fs.kind.as_str() {
        "ext2" | "ext3" | "ext4" => ("e2fsck".into(), &["-f", "-n"]),
        "xfs" => ("xfs_repair".into(), &["-n"]),
        "btrfs" => ("btrfs".into(), &["check", "--readonly", "--force"]),
        kind => (format!("fsck.{kind}"), &["-n"]),
    };
    let mut checker = program(&name);
    checker.args(options).arg(&fs.node);
    let status = run_program(&name, &mut checker, fs, requests)?;
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

/// Runs the program `name` on a file system until it ends. What it says goes to standard error.
fn run_program(
    name: &str,
    command: &mut Command,
    fs: &FileSystem,
    requests: &mut Requests,
) -> Result<ExitStatus> {
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
    command.stdout(Stdio::from(own));
    if requests.is_end_asked() {
        return Err(ended_early());
    }
    let mut child = for_child(|| command.spawn()).map_err(failed)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        if requests.is_end_asked() {
            // It changes nothing that stays. One that has ended by itself is none to be killed.
            let _ = child.kill();
            child.wait().map_err(failed)?;
            return Err(ended_early());
        }
        sleep(PAUSE);
    };
    if requests.is_end_asked() {
        return Err(ended_early());
    }
    Ok(status)
}

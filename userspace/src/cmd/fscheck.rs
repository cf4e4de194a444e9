// SPDX-License-Identifier: GPL-2.0
//! `ploopctl fscheck`: the file systems of a disk on a device of its own, of a snapshot if the disk is in
//! use.
//!
//! Also one that is frozen has files that were removed while they were open, or a log that is not empty,
//! which its checker takes for damage. So above the disk there is an empty image that goes with the
//! device: what its checker complains of, or has a log to replay, is looked at once more after its next
//! mount's first steps, done there. The disk itself is only read.

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
use crate::signals::Requests;
use crate::sysfs::Sysfs;
use ploop_pure::chain::DELTAS_MAX;
use ploop_pure::layout::ploop1::Header;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// How often it is looked whether a checker has ended, or the user wants an end.
const PAUSE: Duration = Duration::from_millis(50);
/// How long others may have the device open after that.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the command. What ends it early leaves neither the device nor the snapshot.
pub fn run(args: &FscheckArgs) -> Result<()> {
    let mut requests = Requests::begin();
    let live = Live::default();
    let mut disk = disk::open(&args.disk.disk, &live, Work::Long, &args.disk.wait)?;
    let is_mounting = !args.no_mount;
    if disk.users(&live)?.writers.is_empty() {
        return look(&disk, None, is_mounting, &mut requests);
    }
    let uuid = disk.snapshot(&live, None, Freeze::Yes)?;
    let looked = disk
        .mark_temporary(uuid)
        .and_then(|()| look(&disk, Some(uuid), is_mounting, &mut requests));
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

fn look(
    disk: &Opened,
    snapshot: Option<Guid>,
    is_mounting: bool,
    requests: &mut Requests,
) -> Result<()> {
    let guid = snapshot.unwrap_or(disk.descriptor().disk().top);
    let sysfs = Sysfs::default();
    let spare = Spare::attach(disk, guid)?;
    let looking = Looking {
        spare: &spare,
        sysfs: &sysfs,
        is_mounting,
        requests,
    };
    let verdict = looking.all(disk);
    let index = spare.index;
    match (verdict, give_back(&sysfs, index)) {
        (verdict, Ok(())) => verdict,
        (Ok(()), Err(e)) => Err(e),
        (Err(e), Err(left)) => Err(e.hint(format!(
            "and ploop{index}, which it was looked at by, is left: {}; 'ploopctl detach ploop{index}' removes it",
            left.without_hint()
        ))),
    }
}

/// Detaches the device, which udev may look at once more after something was written to it.
fn give_back(sysfs: &Sysfs, index: u32) -> Result<()> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let Some(device) = sysfs.device(index)? else {
            return Ok(());
        };
        match detach::device_cleanly(sysfs, &device) {
            Err(e) if e.code() == Code::Busy && Instant::now() < give_up => sleep(PAUSE),
            detached => return detached,
        }
    }
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
        if let Err(e) = fs::remove_file(&path) {
            let left = path.display();
            output::note(&format!("note: {left} is left, and not needed: {e}"));
        }
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

/// What came of doing what the next mount would do first.
enum Replayed {
    /// It is done.
    Yes,
    /// It is not done: what was found before stands.
    No,
    /// More than that would have to be done.
    Damaged,
}

/// The file systems of the device being looked at.
struct Looking<'a> {
    spare: &'a Spare,
    sysfs: &'a Sysfs,
    /// Whether the kernel may mount what only it can replay.
    is_mounting: bool,
    requests: &'a mut Requests,
}

impl Looking<'_> {
    fn all(mut self, disk: &Opened) -> Result<()> {
        let index = self.spare.index;
        if !self.spare.read_only {
            // Here it is seen that one waits; a program to which a write failed has damaged it.
            self.sysfs.set_on_full(index, detach::WAIT).map_err(|e| {
                let what = format!("cannot let writes of ploop{index} wait for space");
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
            let is_sound = self.one(fs)?;
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

    fn one(&mut self, fs: &FileSystem) -> Result<bool> {
        let found = match self.check(fs) {
            // A journal may hold what it lacks.
            Err(e) if e.code() != Code::System => return Err(e),
            found => found,
        };
        let is_ext = matches!(fs.kind.as_str(), "ext3" | "ext4");
        let is_whole = is_ext && !has_journal_to_replay(&fs.node)?;
        if self.spare.read_only || is_whole && matches!(found, Ok(true)) {
            return found;
        }
        match self.replay(fs)? {
            Replayed::Yes => {
                output::note("note: this is looked at as its next mount would make it");
                self.check(fs)
            }
            Replayed::Damaged => Ok(false),
            Replayed::No => found,
        }
    }

    /// Does what its next mount would do first, and nothing else.
    fn replay(&mut self, fs: &FileSystem) -> Result<Replayed> {
        match fs.kind.as_str() {
            "ext3" | "ext4" => {
                // It replays the journal. A check that is due is none that is needed.
                let mut tune = program("tune2fs");
                tune.args(["-c", "0", "-i", "0"]).arg(&fs.node);
                if !self.ran("tune2fs", &mut tune, fs)?.success() {
                    return Ok(Replayed::Damaged);
                }
                let mut preen = program("e2fsck");
                preen.env("LC_ALL", "C").arg("-p").arg(&fs.node);
                let (status, said) = self.told("e2fsck", &mut preen, fs)?;
                let is_sound = matches!(status.code(), Some(0 | 1));
                Ok(if is_sound && said.lines().all(is_of_a_mount) {
                    Replayed::Yes
                } else {
                    Replayed::Damaged
                })
            }
            "xfs" if !self.is_mounting => {
                output::note("note: its log is not replayed, which may be all that is wrong");
                Ok(Replayed::No)
            }
            // Only the kernel can; nobody else sees the mount, which ends with the program.
            "xfs" => {
                let mut mount = program("unshare");
                mount.args(["--mount", "mount", "-t", "xfs", "-o"]);
                mount.arg("nouuid,nosuid,nodev,noexec").arg(&fs.node);
                let status = self.ran("unshare", mount.arg("/sys"), fs)?;
                if status.success() {
                    return Ok(Replayed::Yes);
                }
                output::note("note: its log cannot be replayed, which may be all that is wrong");
                Ok(Replayed::No)
            }
            _ => Ok(Replayed::No),
        }
    }

    /// Whether a checker that changes nothing finds it sound.
    fn check(&mut self, fs: &FileSystem) -> Result<bool> {
        let (name, options): (String, &[&str]) = match fs.kind.as_str() {
            "ext2" | "ext3" | "ext4" => ("e2fsck".into(), &["-f", "-n"]),
            "xfs" => ("xfs_repair".into(), &["-n"]),
            "btrfs" => ("btrfs".into(), &["check", "--readonly", "--force"]),
            kind => (format!("fsck.{kind}"), &["-n"]),
        };
        let mut checker = program(&name);
        checker.args(options).arg(&fs.node);
        let status = self.ran(&name, &mut checker, fs)?;
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
    fn ran(&mut self, name: &str, command: &mut Command, fs: &FileSystem) -> Result<ExitStatus> {
        let own = std::io::stderr().as_fd().try_clone_to_owned();
        command.stdout(Stdio::from(own.map_err(|e| cannot_run(name, fs, e))?));
        let mut child = self.begin(name, command, fs)?;
        self.await_end(name, &mut child, fs)
    }

    /// The same, and what it said on standard output.
    fn told(
        &mut self,
        name: &str,
        command: &mut Command,
        fs: &FileSystem,
    ) -> Result<(ExitStatus, String)> {
        let mut child = self.begin(name, command.stdout(Stdio::piped()), fs)?;
        let pipe = child.stdout.take();
        let reader = spawn(move || {
            let mut said = Vec::new();
            let read = pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut said));
            read.map(|_| String::from_utf8_lossy(&said).into_owned())
        });
        let status = self.await_end(name, &mut child, fs);
        let said = reader
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the reader ended")))
            .map_err(|e| cannot_run(name, fs, e))?;
        output::note(said.trim_end());
        Ok((status?, said))
    }

    /// It inherits that the signals wait for which we look.
    fn begin(&mut self, name: &str, command: &mut Command, fs: &FileSystem) -> Result<Child> {
        if self.requests.is_end_asked() {
            return Err(ended_early());
        }
        command.spawn().map_err(|e| cannot_run(name, fs, e))
    }

    fn await_end(&mut self, name: &str, child: &mut Child, fs: &FileSystem) -> Result<ExitStatus> {
        let why = loop {
            if let Some(status) = child.try_wait().map_err(|e| cannot_run(name, fs, e))? {
                if self.requests.is_end_asked() {
                    return Err(ended_early());
                }
                return Ok(status);
            }
            if self.requests.is_end_asked() {
                break ended_early();
            }
            if self.sysfs.waits_for_space(self.spare.index) {
                let what = format!("there is no space to look at {}", part_name(fs));
                break Error::new(Code::Allocate, what)
                    .hint("what its next mount would write first goes beside the descriptor");
            }
            sleep(PAUSE);
        };
        // Nothing that it changes stays. One that waits for space could not be ended, and one that has
        // ended by itself is none to be killed.
        let _ = self.sysfs.set_on_full(self.spare.index, detach::FAIL);
        let _ = child.kill();
        child.wait().map_err(|e| cannot_run(name, fs, e))?;
        Err(why)
    }
}

/// Whether an ext4 says that its journal has to be replayed.
fn has_journal_to_replay(node: &Path) -> Result<bool> {
    /// `s_feature_incompat` in the superblock, and its bit for that.
    const RECOVER: (u64, u32) = (1024 + 0x60, 4);
    let mut features = [0; 4];
    let read = File::open(node).and_then(|f| f.read_exact_at(&mut features, RECOVER.0));
    read.map_err(|e| Error::io(Code::Read, format!("cannot read {}", node.display()), e))?;
    Ok(u32::from_le_bytes(features) & RECOVER.1 != 0)
}

fn cannot_run(name: &str, fs: &FileSystem, e: std::io::Error) -> Error {
    let kind = &fs.kind;
    let what = format!("cannot run {name} to check a file system of kind {kind}");
    Error::io(Code::System, what, e)
}

/// Whether `e2fsck -p` says in `line` what the kernel does, too, when it mounts: it replays the journal
/// and removes what was removed while it was open. All else is a repair, or a check that makes them.
fn is_of_a_mount(line: &str) -> bool {
    const DONE: [&str; 6] = [
        ": recovering journal",
        ": clean, ",
        "Clearing orphaned inode ",
        "Truncating orphaned inode ",
        "Setting free blocks count to ",
        "Setting free inodes count to ",
    ];
    line.trim().is_empty() || DONE.iter().any(|done| line.contains(done))
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

#[cfg(test)]
mod tests {
    use super::is_of_a_mount;

    /// What e2fsck 1.47 says of a journal and an inode that were left, and of damage that it mends.
    #[test]
    fn a_repair_is_none_of_a_mount() {
        for line in [
            "/dev/ploop0: recovering journal",
            "/dev/ploop0: Clearing orphaned inode 12 (uid=0, gid=0, mode=0100644, size=300000)",
            "/dev/ploop0: Truncating orphaned inode 12 (uid=0, gid=0, mode=0100644, size=300000)",
            "Setting free blocks count to 55730 (was 55437)",
            "/dev/ploop0: clean, 11/16384 files, 9513/65536 blocks",
            "",
        ] {
            assert!(is_of_a_mount(line), "{line}");
        }
        for line in [
            "/dev/ploop0: One or more block group descriptor checksums are invalid.  FIXED.",
            "/dev/ploop0 was not cleanly unmounted, check forced.",
            "/dev/ploop0 contains a file system with errors, check forced.",
            "/dev/ploop0: Inode 12 ref count is 5, should be 1.  FIXED.",
            "/dev/ploop0: 12/16384 files (0.0% non-contiguous), 9806/65536 blocks",
        ] {
            assert!(!is_of_a_mount(line), "{line}");
        }
    }
}

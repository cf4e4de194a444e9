// SPDX-License-Identifier: GPL-2.0
//! `ploopctl snapshot mount` and `umount`: a device of its own for a snapshot, read-only.

use super::{attach, control, detach, disk};
use crate::cli::{AttachArgs, SnapshotMountArgs, SnapshotUmountArgs};
use crate::dev;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::output;
use crate::signals::{for_child, Requests};
use crate::sysfs::{Device, Sysfs};
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// With what the cookie of such a device begins.
const COOKIE: &str = "snapshot ";
/// How long the nodes of partitions may take to appear.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// A file system on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// The disk, or the partition.
    pub node: PathBuf,
    /// Its kind, as blkid names it.
    pub kind: String,
}

/// Runs `snapshot mount`.
pub fn mount(args: &SnapshotMountArgs) -> Result<()> {
    if !args.at.is_dir() {
        let what = format!("{} is not a directory", args.at.display());
        return Err(Error::new(Code::Param, what));
    }
    // What ends it early leaves no device.
    let mut requests = Requests::begin();
    let live = Live::default();
    let disk = disk::open(&args.disk, &live, Work::Short, &args.wait)?;
    let asked = AttachArgs {
        read_only: true,
        snapshot: Some(args.uuid),
        force: args.force,
        cookie: Some(format!("{COOKIE}{}", args.uuid)),
        ..AttachArgs::default()
    };
    let attached = attach::images(&attach::args_of(&disk, &asked)?)?;
    let mounted = mount_device(args, attached.index, &mut requests);
    if mounted.is_err() {
        let sysfs = Sysfs::default();
        if let Some(device) = sysfs.device(attached.index)? {
            detach::device_cleanly(&sysfs, &device)?;
        }
    }
    output::text(&format!("{}\n", mounted?.display()))
}

fn mount_device(args: &SnapshotMountArgs, index: u32, requests: &mut Requests) -> Result<PathBuf> {
    let mut found = file_systems(index);
    if let Some(nr) = args.partition {
        let wanted = PathBuf::from(format!("/dev/ploop{index}p{nr}"));
        found.retain(|f| f.node == wanted);
    }
    let Some(chosen) = found.into_iter().next() else {
        let what = format!(
            "there is no file system to be mounted in the snapshot {}",
            args.uuid
        );
        return Err(Error::new(Code::Mount, what).hint(format!(
            "'ploopctl attach -r --snapshot {}' attaches it to look at it",
            args.uuid
        )));
    };
    // The file system of the disk itself may be mounted, and has the same UUID.
    let (needed, without_journal) = match chosen.kind.as_str() {
        "xfs" => ("ro,nouuid", ",norecovery"),
        "ext3" | "ext4" => ("ro", ",noload"),
        _ => ("ro", ""),
    };
    let options = |more: &str| {
        let own = args
            .options
            .as_ref()
            .map_or(String::new(), |o| format!(",{o}"));
        format!("{needed}{more}{own}")
    };
    let failed = |e| Error::io(Code::Mount, "cannot run mount", e);
    let mut try_with = |options: &str| {
        if requests.is_end_asked() {
            return Err(Error::new(
                Code::Aborted,
                "ended early, as asked; nothing is mounted",
            ));
        }
        let arguments = [
            OsStr::new("-t"),
            OsStr::new(&chosen.kind),
            OsStr::new("-o"),
            OsStr::new(options),
            chosen.node.as_os_str(),
            args.at.as_os_str(),
        ];
        let mut mount = program("mount");
        let mount = mount
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = for_child(|| mount.spawn()).map_err(failed)?;
        child.wait_with_output().map_err(failed)
    };
    let first = try_with(&options(""))?;
    if first.status.success() {
        return Ok(chosen.node);
    }
    if !without_journal.is_empty() && try_with(&options(without_journal))?.status.success() {
        output::note(if chosen.kind == "xfs" {
            // Its log is not empty even when it is frozen.
            "note: the log is not replayed: if the snapshot was made without freezing its file system, \
             what the log holds is missing"
        } else {
            "note: the snapshot was made without freezing its file system: what its journal holds is missing"
        });
        return Ok(chosen.node);
    }
    let said = String::from_utf8_lossy(&first.stderr).trim().to_owned();
    let what = format!(
        "cannot mount {} at {}",
        chosen.node.display(),
        args.at.display()
    );
    Err(Error::new(Code::Mount, what).hint(said))
}

/// Runs `snapshot umount`.
pub fn umount(args: &SnapshotUmountArgs) -> Result<()> {
    let at = args.at.display();
    let sysfs = Sysfs::default();
    let meta = std::fs::metadata(&args.at)
        .map_err(|e| Error::io(Code::Stat, format!("cannot stat {at}"), e))?;
    let index = dev::disk_of(meta.dev()).or_else(|| control::mounted_at(&args.at));
    let device = match index {
        Some(index) => sysfs.device(index)?,
        None => None,
    };
    let Some(device) = device.filter(is_of_snapshot) else {
        let what = format!("no snapshot is mounted at {at}");
        return Err(Error::new(Code::NotAttached, what));
    };
    let done = program("umount")
        .arg(&args.at)
        .output()
        .map_err(|e| Error::io(Code::Umount, "cannot run umount", e))?;
    if !done.status.success() {
        let what = format!("cannot unmount {at}");
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(Error::new(Code::Umount, what).hint(said));
    }
    detach::device_cleanly(&sysfs, &device)
}

fn is_of_snapshot(device: &Device) -> bool {
    device.read_only && device.cookie.starts_with(COOKIE)
}

/// The file systems on the partitions of device `index` or, if it has none, on the disk.
pub fn file_systems(index: u32) -> Vec<FileSystem> {
    let disk = dev::Device::path(index);
    let dir = PathBuf::from(format!("/sys/block/ploop{index}"));
    let prefix = format!("ploop{index}p");
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut parts: Vec<u32> = names
        .filter_map(|e| e.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok())
        .collect();
    parts.sort_unstable();
    let nodes: Vec<_> = if parts.is_empty() {
        vec![disk]
    } else {
        parts
            .iter()
            .map(|n| PathBuf::from(format!("/dev/ploop{index}p{n}")))
            .collect()
    };
    nodes
        .into_iter()
        .filter_map(|node| {
            Some(FileSystem {
                kind: kind(&node)?,
                node,
            })
        })
        .collect()
}

/// The kind of file system on `node`, if there is one.
fn kind(node: &Path) -> Option<String> {
    let give_up = Instant::now() + NODE_PATIENCE;
    while !node.exists() && Instant::now() < give_up {
        sleep(Duration::from_millis(20));
    }
    let done = program("blkid")
        .args(["-p", "-o", "export", "-s", "TYPE", "-s", "USAGE"])
        .arg(node)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let value = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name).map(str::to_owned))
    };
    let kind = value("TYPE=")?;
    value("USAGE=")
        .is_none_or(|usage| usage == "filesystem")
        .then_some(kind)
}

/// A program of the system, wherever it is.
pub fn program(name: &str) -> Command {
    let dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let path = dirs
        .iter()
        .map(|d| Path::new(d).join(name))
        .find(|p| p.exists());
    let mut command = Command::new(path.unwrap_or_else(|| name.into()));
    command.stdin(Stdio::null());
    command
}

// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about disks with a descriptor.

use super::{AttachFormat, RateArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::lock::Patience;
use crate::size;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// How long to wait for others.
#[derive(Debug, Clone, Args)]
pub struct WaitArgs {
    /// Seconds to wait for another command that works on the same disk
    #[arg(long, value_name = "SECONDS", default_value_t = WAIT)]
    wait: u32,
}

/// Seconds, where nobody says how many.
const WAIT: u32 = 60;

impl Default for WaitArgs {
    fn default() -> Self {
        Self { wait: WAIT }
    }
}

impl WaitArgs {
    /// Not at all.
    pub fn none() -> Self {
        Self { wait: 0 }
    }

    /// The same for the locks.
    pub fn patience(&self) -> Patience {
        Patience(Duration::from_secs(self.wait.into()))
    }
}

/// Make an image, or a disk, on a base that others share.
///
/// NEW is empty and reads as BASE; what is written goes to NEW, and BASE is only read. So any number
/// of clones can be attached at once, each taking the space of what is written to it.
///
/// If BASE is a disk with a descriptor, or with --descriptor, NEW is a new directory: a disk that has
/// the images of BASE as hard links, on the same file system. Its descriptor notes what they are: if
/// one is changed later, the disk is not attached any more. Nothing is merged into an image that has
/// other names. If BASE is images, one or a chain, NEW is an image, to be attached with them:
/// 'ploopctl attach BASE... NEW'. Nothing tells then that BASE was changed.
///
/// BASE must not be attached for writing, and must have been closed cleanly. Of a disk in use, a
/// snapshot can be cloned.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl clone golden.img web1.img && ploopctl attach golden.img web1.img
  ploopctl clone --descriptor golden.img /vz/web1 && ploopctl attach /vz/web1
  ploopctl clone --snapshot 0c5d8f5a-9fc1-4bd2-9e2c-6f5a1d7a6b01 /vz/101 /vz/102")]
pub struct CloneArgs {
    /// Format of the first image, the base
    #[arg(short, long, value_enum, default_value = "auto")]
    pub format: AttachFormat,
    /// Cluster size with -f raw: a power of two from 32K to 64M [default: 1M, or that of the other
    /// images]
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster: Option<u64>,
    /// The snapshot of the disk that is cloned [default: the disk as it is, detached]
    #[arg(long, value_name = "UUID")]
    pub snapshot: Option<Guid>,
    /// Make a disk with a descriptor also of images
    #[arg(long)]
    pub descriptor: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// A disk, or images of a chain, base first, most often one; then the new image or directory
    #[arg(required = true, num_args = 2.., value_names = ["BASE", "NEW"])]
    pub paths: Vec<PathBuf>,
}

/// A disk.
#[derive(Debug, Args)]
pub struct DiskArgs {
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// A DiskDescriptor.xml, or its directory
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
}

/// Make, list, mount, remove snapshots of a disk, and go back to them.
///
/// A snapshot is what was on the disk at a moment. It has a UUID for a name. Whether the disk is in
/// use is found out, and most can be done while it is.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    Create(SnapshotCreateArgs),
    /// List the snapshots
    List(SnapshotListArgs),
    /// Show how the snapshots build on each other
    Tree(SnapshotListArgs),
    Switch(SnapshotSwitchArgs),
    Delete(SnapshotArgs),
    Merge(SnapshotMergeArgs),
    Mount(SnapshotMountArgs),
    /// Unmount it again
    Umount(SnapshotUmountArgs),
}

/// Freeze what is written so far, and print the name of the snapshot.
///
/// What is written from then on goes to a new image file. If the disk is attached, the file systems
/// on it are frozen for the moment, so that the snapshot is clean: those on the disk and its
/// partitions, and on dm-crypt or LVM devices on top of it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  uuid=$(ploopctl snapshot create /vz/101)
  ploopctl snapshot create --uuid 0c5d8f5a-9fc1-4bd2-9e2c-6f5a1d7a6b01 /vz/101/DiskDescriptor.xml")]
pub struct SnapshotCreateArgs {
    /// Name of the snapshot [default: a new one]
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<Guid>,
    /// Do not freeze file systems: the snapshot is as after a power cut
    #[arg(long)]
    pub no_freeze: bool,
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// A list of snapshots.
#[derive(Debug, Args)]
pub struct SnapshotListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// A DiskDescriptor.xml, or its directory
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
}

/// Go back to a snapshot.
///
/// What was written since the last snapshot is lost. The snapshots all stay, and the disk can go
/// forth again to any of them. The disk must not be attached. To keep what was written, make a
/// snapshot first.
#[derive(Debug, Args)]
pub struct SnapshotSwitchArgs {
    /// The snapshot
    #[arg(long, value_name = "UUID")]
    pub uuid: Guid,
    /// Go on although a lower image changed since it was closed
    #[arg(long)]
    pub force: bool,
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Remove a snapshot.
///
/// If one delta builds on it, that is merged into it, which can take long; Ctrl-C ends that cleanly,
/// and the command can be given again. If several do, the snapshot is marked and goes when one is
/// left. To remove the top throws away what was written since the last snapshot.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The snapshot
    #[arg(long, value_name = "UUID")]
    pub uuid: Guid,
    /// How fast the kernel may copy
    #[command(flatten)]
    pub rate: RateArgs,
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Merge a delta into the one below it.
///
/// The snapshot below ceases to be one by itself. The contents of the disk do not change.
#[derive(Debug, Args)]
pub struct SnapshotMergeArgs {
    /// The upper one of the two [default: the top]
    #[arg(long, value_name = "UUID", conflicts_with = "all")]
    pub uuid: Option<Guid>,
    /// Merge all below the top, so that one image is left
    #[arg(long)]
    pub all: bool,
    /// How fast the kernel may copy
    #[command(flatten)]
    pub rate: RateArgs,
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Mount the file system of a snapshot, read-only.
///
/// The disk may be in use meanwhile: this is for a backup. The snapshot is attached as a device of
/// its own.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  uuid=$(ploopctl snapshot create /vz/101)
  ploopctl snapshot mount --uuid $uuid /vz/101 /mnt
  tar -C /mnt -cf backup.tar .
  ploopctl snapshot umount /mnt
  ploopctl snapshot delete --uuid $uuid /vz/101")]
pub struct SnapshotMountArgs {
    /// The snapshot
    #[arg(long, value_name = "UUID")]
    pub uuid: Guid,
    /// Partition to be mounted [default: the first with a file system, or the whole disk]
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
    /// Options for mount, besides those that are needed
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Option<String>,
    /// Mount although a lower image changed since it was closed
    #[arg(long)]
    pub force: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// A DiskDescriptor.xml, or its directory
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
    /// Where to mount it
    #[arg(value_name = "DIR")]
    pub at: PathBuf,
}

/// Unmount a snapshot, and detach its device.
#[derive(Debug, Args)]
pub struct SnapshotUmountArgs {
    /// Where it is mounted
    #[arg(value_name = "DIR")]
    pub at: PathBuf,
}

/// Put another file in the place of an image of a disk: a copy on a faster disk, say.
///
/// The new file must be in the directory of the descriptor, and hold the same: that cannot be
/// checked while the disk is in use, and is your word. The old file stays where it is.
#[derive(Debug, Args)]
pub struct ReplaceArgs {
    /// The delta, by its name
    #[arg(
        long,
        value_name = "UUID",
        required_unless_present = "level",
        conflicts_with = "level"
    )]
    pub uuid: Option<Guid>,
    /// The delta, by its level in the chain of the top; 0 is the base
    #[arg(long, value_name = "N")]
    pub level: Option<usize>,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The new file
    #[arg(value_name = "NEWFILE")]
    pub new: PathBuf,
    /// A DiskDescriptor.xml, or its directory
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
}

/// Check the file systems of a disk, also while it is in use.
///
/// A disk that is attached gets a snapshot for the time, which is merged away afterwards. The file
/// systems are looked at with 'fsck -n', and not changed. What it complains of may be no more than what
/// the next mount sets right: then an empty image above the disk, in its directory, takes what that mount
/// would write first, and it is looked at again. For an XFS the kernel has to mount it, where nobody else
/// sees it.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
   0  all file systems are sound
  41  one is damaged
  11  there is none
  20  there is no space for what the next mount would write first")]
pub struct FscheckArgs {
    /// Have no XFS mounted, as that of a guest which is not trusted: one with a log that is not empty may
    /// count as damaged
    #[arg(long)]
    pub no_mount: bool,
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Judge a descriptor, or make one for images that have lost it.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum DescriptorCommand {
    /// List all that is wrong with a descriptor and its images; changes nothing
    Validate(SnapshotListArgs),
    Restore(RestoreArgs),
}

/// Make a descriptor for the images of a directory.
///
/// Images do not say what they build on. One image, or a base and one image on it, is found by
/// itself. Of more, name those of one chain in their order, the base first.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl descriptor restore /vz/101
  ploopctl descriptor restore /vz/101 /vz/101/root.hds /vz/101/root.hds.{...} ...")]
pub struct RestoreArgs {
    /// Take the place of a DiskDescriptor.xml that is there, which is kept as
    /// DiskDescriptor.xml.old
    #[arg(long)]
    pub force: bool,
    /// Format of the base; raw is never guessed
    #[arg(short, long, value_enum, default_value = "auto")]
    pub format: AttachFormat,
    /// Cluster size of a raw image that is alone [default: 1M]
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster: Option<u64>,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The directory
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// The images, base first
    #[arg(value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
}

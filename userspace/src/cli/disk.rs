// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about disks with a descriptor.

use super::{AttachFormat, RateArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::lock::Patience;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// How long to wait for others.
#[derive(Debug, Clone, Default, Args)]
pub struct WaitArgs {
    /// Seconds to wait for another command that works on the same disk
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u32,
}

impl WaitArgs {
    /// The same for the locks.
    pub fn patience(&self) -> Patience {
        Patience(Duration::from_secs(self.wait.into()))
    }
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
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Freeze what is written so far, and print the name of the snapshot
    Create(SnapshotCreateArgs),
    /// List the snapshots
    List(SnapshotListArgs),
    /// Show how the snapshots build on each other
    Tree(SnapshotListArgs),
    /// Go back to a snapshot: what was written since the last one is thrown away
    Switch(SnapshotSwitchArgs),
    /// Remove a snapshot; the disk and all other snapshots stay as they are
    Delete(SnapshotArgs),
    /// Merge a delta into the one below it
    Merge(SnapshotMergeArgs),
    /// Mount the file system of a snapshot, read-only
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
/// systems are looked at with 'fsck -n', and not changed.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
   0  all file systems are sound
  41  one is damaged
  11  there is none")]
pub struct FscheckArgs {
    /// The disk
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Judge a descriptor, or make one for images that have lost it.
#[derive(Debug, Subcommand)]
pub enum DescriptorCommand {
    /// List all that is wrong with a descriptor and its images; changes nothing
    Validate(SnapshotListArgs),
    /// Make a descriptor for the images of a directory
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
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = crate::size::parse)]
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

// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about backups and checkpoints.

use super::{GivenFormat, WaitArgs};
use crate::descriptor::guid::Guid;
use crate::size;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Back up a disk to files, also while it is in use, and make images of them again.
///
/// A full backup has all of the disk. An incremental one has what was written since another backup,
/// and builds on it: together they are a chain, of which every point can be restored.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    Full(BackupFullArgs),
    Incremental(BackupIncrementalArgs),
    Verify(BackupVerifyArgs),
    Restore(BackupRestoreArgs),
}

/// What every backup is made of and how.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// Do not freeze file systems: the backup is as after a power cut
    #[arg(long)]
    pub no_freeze: bool,
    /// Compress with zstd
    #[arg(short = 'z', long)]
    pub compress: bool,
    /// Most bytes a second that are read, and copied when the snapshot is merged away
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "0", hide_default_value = true)]
    pub bwlimit: u64,
    /// Of a device without a descriptor, the directory of the image that is written to meanwhile
    /// [default: that of its top]
    #[arg(long, value_name = "DIR")]
    pub temporary: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Back up all of a disk.
///
/// A disk that is attached gets a snapshot for the time, which is merged away afterwards; the file
/// systems on it are frozen for the moment. A checkpoint stays in the device, by which the next
/// backup can be incremental. FILE appears complete and durable, or not at all.
///
/// A disk that is not attached is backed up as it is, without a checkpoint.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl backup full /vz/101 /backup/101.0
  ploopctl backup full -z --bwlimit 50M /dev/ploop0 /backup/disk.0")]
pub struct BackupFullArgs {
    /// How
    #[command(flatten)]
    pub how: BackupArgs,
    /// Format of an image that is not attached
    #[arg(short, long, value_enum, default_value = "ploop1")]
    pub format: GivenFormat,
    /// A disk with a descriptor, a device, or an image
    #[arg(value_name = "DISK|DEVICE|IMAGE")]
    pub target: PathBuf,
    /// The new backup
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Back up what was written since another backup.
///
/// The device has to know what that is: it does from a backup that was made while it was attached,
/// through detaching and attaching, until a crash. If it does not, the status is 45 and the next
/// backup has to be full. The checkpoint of the parent is dropped when the backup is complete.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  45  what was written since the parent is not known: make a full backup

Examples:
  ploopctl backup incremental --parent /backup/101.0 /vz/101 /backup/101.1
  ploopctl backup incremental --parent /backup/101.1 --full-if-needed /vz/101 /backup/101.2")]
pub struct BackupIncrementalArgs {
    /// The backup that it builds on
    #[arg(long, value_name = "FILE")]
    pub parent: PathBuf,
    /// Keep the checkpoint of the parent, so that others can build on it, too
    #[arg(long)]
    pub keep: bool,
    /// Make a full backup if the device does not know what was written
    #[arg(long)]
    pub full_if_needed: bool,
    /// How
    #[command(flatten)]
    pub how: BackupArgs,
    /// A disk with a descriptor, or a device
    #[arg(value_name = "DISK|DEVICE")]
    pub target: PathBuf,
    /// The new backup
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Check backups from end to end, and that they belong together.
///
/// Each is read and every checksum compared. They may be given in any order.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
   0  all are sound, and one chain
  11  not a backup, or of a newer version
  38  not one chain
  41  one is damaged

Examples:
  ploopctl backup verify /backup/101.*")]
pub struct BackupVerifyArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The backups
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// Format of a restored image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RestoredFormat {
    /// Thin image with a table of clusters
    Ploop1,
    /// The disk byte for byte
    Raw,
}

/// Make an image of a chain of backups.
///
/// The backups are a chain from a full one on, in any order. All that is read is checked; the image
/// appears complete and durable, or not at all.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl backup restore /backup/101.* --to disk.img
  ploopctl backup restore /backup/101.* --point 2 -f raw --to disk.raw")]
pub struct BackupRestoreArgs {
    /// The new image
    #[arg(long, value_name = "IMAGE")]
    pub to: PathBuf,
    /// The disk as of the backup number N of the chain; 1 is the full one [default: the last]
    #[arg(long, value_name = "N")]
    pub point: Option<usize>,
    /// Format of the image
    #[arg(short, long, value_enum, default_value = "ploop1")]
    pub format: RestoredFormat,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The backups
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// Look at the checkpoints of a device, and drop them.
///
/// A checkpoint notes what is written since a backup, so that the next one can be incremental. It
/// costs little, but there are at most 16 of them.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List the checkpoints
    List(CheckpointListArgs),
    /// Drop a checkpoint: no incremental backup can be made from it on any more
    Drop(CheckpointDropArgs),
}

/// A list of checkpoints.
#[derive(Debug, Args)]
pub struct CheckpointListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Device (/dev/ploopN or ploopN), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

/// Drop a checkpoint.
#[derive(Debug, Args)]
pub struct CheckpointDropArgs {
    /// The checkpoint
    #[arg(
        long,
        value_name = "UUID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub uuid: Option<Guid>,
    /// All of them
    #[arg(long)]
    pub all: bool,
    /// Device (/dev/ploopN or ploopN), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

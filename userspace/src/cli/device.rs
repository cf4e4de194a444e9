// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about what devices do for long, and trimming.

use crate::size;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Look at what a device does for long, wait for it, end it, slow it down.
///
/// Merging, growing and compacting what is attached is done by the kernel, one at a time on a
/// device, and goes on when the command that began it is killed.
#[derive(Debug, Subcommand)]
pub enum OpCommand {
    /// Show how far it is, or how the last one ended
    Status(OpArgs),
    /// Wait until it is over; the status is that of the operation
    Wait(OpTargetArgs),
    /// End it early. What was done is sound, and it can be begun again
    Cancel(OpTargetArgs),
    /// Limit how much it copies, so that the disk stays fast
    Rate(OpRateArgs),
}

/// How fast the kernel may copy.
#[derive(Debug, Clone, Default, Args)]
pub struct RateArgs {
    /// Most bytes a second that are copied, if it is attached; 'ploopctl op rate' changes it
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "0", hide_default_value = true)]
    pub rate: u64,
}

/// A device that may do something.
#[derive(Debug, Args)]
pub struct OpTargetArgs {
    /// Device (/dev/ploopN or ploopN), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

/// The same, looked at.
#[derive(Debug, Args)]
pub struct OpArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The device
    #[command(flatten)]
    pub target: OpTargetArgs,
}

/// Limit how much an operation copies.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl op rate 20M /vz/101
  ploopctl op rate 0 /dev/ploop0         no limit any more")]
pub struct OpRateArgs {
    /// Bytes a second; 0 is no limit
    #[arg(value_parser = size::parse)]
    pub rate: u64,
    /// The device
    #[command(flatten)]
    pub target: OpTargetArgs,
}

/// Give back what file systems on an attached disk do not use.
///
/// Trims the mounted file systems on the disk and its partitions, and on what is stacked on them,
/// dm-crypt and LVM, as far as those pass it on. What is not mounted here is left alone. Images of
/// format ploop1 become holes there; 'ploopctl compact' makes the file shorter.
#[derive(Debug, Args)]
pub struct TrimArgs {
    /// Device (/dev/ploopN or ploopN), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about what devices do for long, and trimming.

use crate::size;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Show what devices do, in numbers.
///
/// Without options, what was done since the device was added: reads, writes, discards, flushes, failed
/// requests; MAP is the memory of its map, IMAGE what the image that is written to takes on the host.
/// With --watch, what was done a second since the line before: r_ms and w_ms are how long a read and
/// a write took on average, busy is the part of the time in which there was something to do, queue
/// the requests in the device, alloc/s clusters that the image got.
///
/// With --prometheus, the same and the state of the devices as metrics in Prometheus' text format.
/// With --output, a file of the directory that the textfile collector of node_exporter reads, for
/// instance, is replaced by them at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl stat
  ploopctl stat --watch 5 /dev/ploop0
  ploopctl stat --prometheus --output /var/lib/prometheus/node-exporter/ploop.prom")]
pub struct StatArgs {
    /// Every so many seconds, what was done since, until Ctrl-C
    #[arg(short, long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub watch: Option<u32>,
    /// Print JSON
    #[arg(long, conflicts_with = "watch")]
    pub json: bool,
    /// Print metrics for Prometheus
    #[arg(long, conflicts_with_all = ["watch", "json"])]
    pub prometheus: bool,
    /// Replace this file instead of printing
    #[arg(long, value_name = "FILE", requires = "prometheus")]
    pub output: Option<PathBuf>,
    /// Devices (/dev/ploopN or ploopN), attached disks, or paths of attached images [default: all
    /// devices]
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub targets: Vec<PathBuf>,
}

/// Look at what a device does for long, wait for it, end it, slow it down.
///
/// Merging, growing and compacting what is attached is done by the kernel, one at a time on a
/// device, and goes on when the command that began it is killed.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum OpCommand {
    /// Show how far it is, or how the last one ended
    Status(OpArgs),
    /// Wait until it is over; the status is that of the operation
    Wait(OpTargetArgs),
    /// End it early. What was done is sound, and it can be begun again
    Cancel(OpTargetArgs),
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

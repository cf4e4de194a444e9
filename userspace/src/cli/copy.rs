// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is about copies.

use super::WaitArgs;
use crate::size;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Copy a disk to another machine or place, also while it is in use.
///
/// 'send' writes a stream, 'receive' makes a disk of it. What is written meanwhile is sent again, in
/// rounds; then the disk is frozen for the moment that the rest takes. The receiver gives the copy
/// its name when all of it is there and durable.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum CopyCommand {
    Send(CopySendArgs),
    Receive(CopyReceiveArgs),
    /// Let a disk go on that was left frozen or tracked
    Thaw(CopyThawArgs),
}

/// How pieces are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Fast, level 1
    Zstd,
}

/// Send a disk, an image, or what is attached.
///
/// A disk is sent with its descriptor and all its images, snapshots included. A device without a
/// descriptor that has several images needs --chain or --top-only. What no device writes to is sent
/// in one pass.
///
/// If the disk is in use, rounds follow until they do not get smaller, or --rounds of them. Then
/// --stop-command is run, the file systems are frozen, the rest is sent, and the kernel confirms that
/// nothing is left. When the receiver has confirmed the copy, if it can, the file systems are thawed:
/// what the disk gets from then on is not in the copy. Whatever goes wrong, they are thawed and
/// the disk goes on as before.
///
/// The stream goes to standard output, which must not be a terminal. With a socket there, --through
/// or --to, the receiver's answers are read: only then does success mean that the copy is complete.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl copy send --through 'ssh host ploopctl copy receive /vz/101' /vz/101
  ploopctl copy send --to /mnt/backup/101 /vz/101
  ploopctl copy send --stop-command 'systemctl stop ct101' --keep-frozen \\
      --through 'ssh host ploopctl copy receive /vz/101' /dev/ploop0
  ploopctl copy send disk.img | ssh host ploopctl copy receive /srv/disk.img")]
pub struct CopySendArgs {
    /// Make the copy PATH on this machine
    #[arg(long, value_name = "PATH", conflicts_with_all = ["through", "v1"])]
    pub to: Option<PathBuf>,
    /// Run this by /bin/sh, with the stream as its standard input and its standard output read for
    /// answers
    #[arg(long, value_name = "COMMAND", conflicts_with = "v1")]
    pub through: Option<String>,
    /// Read answers from standard input, which the output of the receiver is connected to
    #[arg(long, conflicts_with_all = ["to", "through", "v1"])]
    pub answers: bool,
    /// Send all images of a device that has no descriptor; they become a directory
    #[arg(long, conflicts_with = "top_only")]
    pub chain: bool,
    /// Send the image that is written to alone, which becomes a file: the other images and the
    /// descriptor are there already, or nobody needs them
    #[arg(long)]
    pub top_only: bool,
    /// Send OpenVZ's stream of 'ploop copy' before version 7: one image, without checksums, zeros
    /// included
    #[arg(long)]
    pub v1: bool,
    /// Most rounds while the disk is in use
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Run this by /bin/sh to end what writes to the disk, before it is frozen; if it fails, so does
    /// the copy
    #[arg(long, value_name = "COMMAND")]
    pub stop_command: Option<String>,
    /// Leave the file systems frozen after success; 'ploopctl copy thaw' ends that
    #[arg(long)]
    pub keep_frozen: bool,
    /// Most bytes a second until the disk is frozen
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "0", hide_default_value = true)]
    pub bwlimit: u64,
    /// Compress what is sent
    #[arg(long, value_enum, conflicts_with = "v1")]
    pub compress: Option<Compression>,
    /// Give up if the other side is silent for so long, or with --keep-frozen its command does not end;
    /// 0 waits for ever, also while frozen
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub timeout: u32,
    /// Tell what happens as JSON on standard error, one object a line
    #[arg(long)]
    pub json: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Disk, path of an image, or device (/dev/ploopN or ploopN)
    #[arg(value_name = "DISK|IMAGE|DEVICE")]
    pub target: PathBuf,
}

/// Make a disk or an image of what comes on standard input.
///
/// The stream says what it is: of 'ploopctl copy send', or of OpenVZ's 'ploop copy', version 1 or 2,
/// which hold one image. PATH must not exist. Until all is there and durable the copy is called
/// PATH.ploopctl-partial; if anything goes wrong it is removed.
///
/// Answers go to where the stream comes from if that is a socket, else to standard output, if the
/// sender reads them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl copy receive /srv/disk.img < stream
  ssh host ploopctl copy send /vz/101 | ploopctl copy receive /vz/101")]
pub struct CopyReceiveArgs {
    /// Answer when OpenVZ's sender of version 1 asks for it
    #[arg(long)]
    pub answer_v1: bool,
    /// Tell what happens as JSON on standard error, one object a line
    #[arg(long)]
    pub json: bool,
    /// Give up if the sender is silent for so long; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub timeout: u32,
    /// Path of the copy: a file for one image, a directory for a disk
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

/// Let a disk go on that was left frozen, or with its writes tracked.
///
/// By --keep-frozen, or by a 'copy send' that was killed. One that still runs fails.
#[derive(Debug, Args)]
pub struct CopyThawArgs {
    /// Device (/dev/ploopN or ploopN), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

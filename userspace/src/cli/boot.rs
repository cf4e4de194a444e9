// SPDX-License-Identifier: GPL-2.0
//! The part of the command line that is for a host's start and end.

use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What systemd's units call when the host starts and goes down.
///
/// /etc/ploop.conf names the disks that the host attaches: see ploop.conf(5). 'systemctl start
/// ploop@NAME' and 'systemctl stop ploop@NAME' are the way to do it by hand.
#[derive(Debug, Subcommand)]
pub enum BootCommand {
    /// Attach a disk of /etc/ploop.conf
    Attach(BootArgs),
    /// Detach it. One that is in use is left alone, unless the host goes down
    Detach(BootArgs),
    /// Let nothing hold the devices up, as the host goes down
    Shutdown(BootShutdownArgs),
    /// Make the units of /etc/ploop.conf: a generator of systemd
    Units(BootUnitsArgs),
}

/// A disk of `/etc/ploop.conf`.
#[derive(Debug, Args)]
pub struct BootArgs {
    /// Name of the disk
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Let nothing hold the devices up.
///
/// On all devices, writes that wait for space fail, and merging, growing and compacting ends early.
/// Nothing is done if systemd does not say that the host goes down, and with --last, for the very end,
/// if it says anything else.
#[derive(Debug, Args)]
pub struct BootShutdownArgs {
    /// Also detach all devices: nothing else runs any more
    #[arg(long)]
    pub last: bool,
}

/// Make the units of /etc/ploop.conf.
#[derive(Debug, Args)]
pub struct BootUnitsArgs {
    /// Directory for the units
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

// SPDX-License-Identifier: GPL-2.0
//! The commands, one file each, and how they understand what they are pointed at.

mod attach;
mod attached;
mod backup;
mod boot;
mod check;
mod checkpoint;
mod clone;
mod compact;
mod control;
mod convert;
mod copy;
mod create;
mod descriptor;
mod detach;
mod disk;
mod fscheck;
mod info;
mod list;
mod map;
mod merge;
mod mount;
mod op;
mod recover;
mod replace;
mod resize;
mod snapshot;
mod stat;
mod trim;

pub use control::module_version;

use crate::cli::Command;
use crate::dev;
use crate::error::{Code, Error, Result};
use crate::sysfs::{Device, Sysfs};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Runs a command.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create::run(&args),
        Command::Clone(args) => clone::run(&args),
        Command::Attach(args) => attach::run(&args),
        Command::Detach(args) => detach::run(&args),
        Command::List(args) => list::run(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Snapshot(command) => snapshot::run(&command),
        Command::Replace(args) => replace::run(&args),
        Command::Fscheck(args) => fscheck::run(&args),
        Command::Recover(args) => recover::run(&args),
        Command::Descriptor(command) => descriptor::run(&command),
        Command::Merge(args) => merge::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Compact(args) => compact::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Copy(command) => copy::run(&command),
        Command::Trim(args) => trim::run(&args),
        Command::Op(command) => op::run(&command),
        Command::Backup(command) => backup::run(&command),
        Command::Boot(command) => boot::run(&command),
        Command::Checkpoint(command) => checkpoint::run(&command),
    }
}

/// What a command is pointed at.
enum Target {
    /// A device that exists.
    Device(Box<Device>),
    /// A path, taken as that of an image.
    Image(PathBuf),
    /// The descriptor of a disk.
    Disk(PathBuf),
}

impl Target {
    /// A descriptor, a ploop device node, a partition of one, `ploopN`, or else an image.
    fn resolve(path: &Path, sysfs: &Sysfs) -> Result<Self> {
        if let Some(descriptor) = crate::descriptor::named_by(path) {
            return Ok(Self::Disk(descriptor));
        }
        let index = match fs::metadata(path) {
            Ok(m) if m.file_type().is_block_device() => dev::disk_of(m.rdev()),
            Ok(_) => None,
            Err(_) => index_by_name(path),
        };
        let Some(index) = index else {
            return Ok(Self::Image(path.to_owned()));
        };
        match sysfs.device(index)? {
            Some(device) => Ok(Self::Device(Box::new(device))),
            None => Err(Error::new(
                Code::NotAttached,
                format!("there is no device ploop{index}"),
            )
            .hint("'ploopctl list' shows the devices")),
        }
    }
}

/// N of `ploopN`, `ploopNpM` or the same below /dev.
fn index_by_name(path: &Path) -> Option<u32> {
    let name = path.strip_prefix("/dev").unwrap_or(path).to_str()?;
    let number = name.strip_prefix("ploop")?;
    match number.split_once('p') {
        Some((disk, part)) => part.parse::<u32>().ok().and(disk.parse().ok()),
        None => number.parse().ok(),
    }
}

/// What the image of a device is missing.
const LAGS: &str =
    "the device is running: what it has not written to the image yet is missing here";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_in_many_ways() {
        for (name, want) in [
            ("/dev/ploop3", Some(3)),
            ("ploop12", Some(12)),
            ("/dev/ploop3p1", Some(3)),
            ("ploop", None),
            ("ploop3p", None),
            ("./ploop3", None),
            ("/tmp/ploop3", None),
        ] {
            assert_eq!(index_by_name(Path::new(name)), want, "{name}");
        }
    }
}

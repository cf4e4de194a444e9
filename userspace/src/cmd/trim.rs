// SPDX-License-Identifier: GPL-2.0
//! `ploopctl trim`: only by file systems that are mounted, which alone know what they do not use.

use super::attached;
use crate::cli::TrimArgs;
use crate::dev;
use crate::disk::freeze::mounted;
use crate::error::{Code, Error, Result};
use crate::output;
use crate::size::human;
use crate::sysfs::Sysfs;
use nix::errno::Errno;
use std::fs::File;
use std::path::Path;

/// Runs the command.
pub fn run(args: &TrimArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    let at = device.device.display();
    if device.read_only {
        let what = format!("{at} is read-only");
        return Err(Error::new(Code::Param, what));
    }
    let sysfs = Sysfs::default();
    let mut devices = sysfs.parts(device.index);
    devices.extend(sysfs.stacked(device.index));
    let points = mounted(&devices)?;
    if points.is_empty() {
        output::note(&format!(
            "note: no file system on {at} is mounted here: nothing is trimmed"
        ));
    }
    let mut failed: Option<Error> = None;
    for (point, file) in points {
        match trim(&point, &file) {
            Ok(bytes) => {
                let line = format!("{}: {} trimmed\n", point.display(), human(bytes));
                output::text(&line)?;
            }
            Err(e) => {
                // The last one is told at the end.
                if let Some(before) = failed.replace(e) {
                    output::note(&format!("ploopctl: {before}"));
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

fn trim(point: &Path, file: &File) -> Result<u64> {
    let at = point.display();
    dev::trim(file).map_err(|e| {
        let what = format!("cannot trim the file system at {at}");
        let error = Error::io(Code::DeviceIoctl, what, e);
        match e {
            Errno::EOPNOTSUPP | Errno::ENOTTY => error.hint(
                "the file system does not do it, or something below it does not pass discards on",
            ),
            Errno::EROFS => error.hint("it is mounted read-only"),
            _ => error,
        }
    })
}

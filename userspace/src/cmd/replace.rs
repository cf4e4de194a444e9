// SPDX-License-Identifier: GPL-2.0
//! `ploopctl replace`.

use super::disk;
use crate::cli::ReplaceArgs;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};

/// Runs the command.
pub fn run(args: &ReplaceArgs) -> Result<()> {
    let live = Live::default();
    let mut disk = disk::open(&args.disk, &live, Work::Short, &args.wait)?;
    let guid = match (args.uuid, args.level) {
        (Some(uuid), _) => uuid,
        (None, Some(level)) => disk.at_level(level)?,
        (None, None) => {
            return Err(Error::new(
                Code::Param,
                "neither --uuid nor --level is given",
            ))
        }
    };
    disk.replace(&live, guid, &args.new)
}

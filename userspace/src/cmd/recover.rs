// SPDX-License-Identifier: GPL-2.0
//! `ploopctl recover`: everything that an interrupted command or a crash left, put in order.

use super::disk;
use crate::cli::DiskArgs;
use crate::disk::{Live, Work};
use crate::error::Result;
use crate::output;

/// Runs the command.
pub fn run(args: &DiskArgs) -> Result<()> {
    let live = Live::default();
    let mut disk = disk::open(&args.disk, &live, Work::Long, &args.wait)?;
    let mut mended = disk.mended().len();
    for line in disk.mend(&live)? {
        output::note(&line);
        mended += 1;
    }
    for uuid in disk.remove_temporary(&live)? {
        output::note(&format!(
            "the snapshot {uuid} was marked as being removed: removed"
        ));
        mended += 1;
    }
    if mended == 0 {
        output::note("there is nothing to mend");
    }
    Ok(())
}

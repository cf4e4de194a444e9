// SPDX-License-Identifier: GPL-2.0
//! `ploopctl merge`.

use crate::cli::MergeArgs;
use crate::error::Result;
use crate::offline;
use crate::output;
use crate::progress::Shown;

/// Runs the command.
pub fn run(args: &MergeArgs) -> Result<()> {
    let (lower, upper) = (&args.lower, &args.upper);
    let merged = offline::merge(lower, args.format.into(), upper, &mut Shown::new())?;
    output::text(&merged.describe(lower, upper))
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl merge`: of files by us, of levels of a device by the kernel.

use super::attached;
use super::backup::interim;
use crate::cli::MergeArgs;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::offline;
use crate::operate::{self, Operation};
use crate::output;
use crate::progress::Shown;
use crate::sysfs::{Device, Sysfs};
use std::path::Path;

/// Runs the command.
pub fn run(args: &MergeArgs) -> Result<()> {
    let Some(upper) = &args.upper else {
        let device = attached::device(&args.lower)?;
        let top = device.top().map_or(0, |t| t.level);
        return level(args, &device, args.level.unwrap_or(top));
    };
    if let Some((device, upper)) = pair(&args.lower, upper)? {
        return level(args, &device, upper);
    }
    let lower = &args.lower;
    interim::must_be_uppermost(lower, upper)?;
    attached::must_be_alone(upper, args.force)?;
    attached::must_be_ours(lower, args.force)?;
    let merged = offline::merge(lower, args.format.into(), upper, &mut Shown::new())?;
    output::text(&merged.describe(lower, upper))
}

/// The device that writes and has both, and the level of `upper`, if that is right above `lower`.
fn pair(lower: &Path, upper: &Path) -> Result<Option<(Device, u32)>> {
    let devices = Sysfs::default().find_image(upper)?;
    Ok(devices.into_iter().find_map(|device| {
        let at = |path| Some(device.delta_of(path)?.level);
        let (below, above) = (at(lower)?, at(upper)?);
        (below + 1 == above && !device.read_only).then_some((device, above))
    }))
}

/// Merges a level of a device into the one below; that of a disk with a descriptor by its name.
fn level(args: &MergeArgs, device: &Device, level: u32) -> Result<()> {
    let at = device.device.display();
    let delta = |n: u32| device.deltas.iter().find(|d| d.level == n);
    let (Some(upper), Some(lower)) = (delta(level), level.checked_sub(1).and_then(delta)) else {
        let what = format!("{at} has no level {level} with another below it");
        return Err(Error::new(Code::Param, what).hint("'ploopctl info' shows the levels"));
    };
    if let Some(path) = attached::descriptor_of(device)? {
        let live = Live::limited(args.rate.rate);
        let mut disk = super::disk::open(&path, &live, Work::Long, &args.wait)?;
        let images = &disk.descriptor().disk().images;
        let is_upper = |i: &&crate::descriptor::model::ImageEntry| {
            let file = super::disk::file(&path, i);
            device.delta_of(&file).is_some_and(|d| d.level == level)
        };
        let guid = images.iter().find(is_upper).map(|i| i.guid);
        let Some(guid) = guid else {
            let what = format!("{} does not name level {level} of {at}", path.display());
            return Err(Error::new(Code::Descriptor, what));
        };
        return disk.merge(&live, Some(guid));
    }
    // One that cannot be reached from here has no name here either.
    if let Ok(lower) = lower.reachable() {
        attached::must_be_ours(lower, args.force)?;
    }
    operate::run(device, Operation::Merge { level }, args.rate.rate)?;
    output::text(&format!(
        "Merged {} into {}. {at} does not need the former any more: it can be removed.\n",
        upper.image.display(),
        lower.image.display()
    ))
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl resize`.

use super::attached::{self, Subject};
use super::backup::interim;
use crate::cli::{GivenFormat, ResizeArgs};
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::Space;
use crate::offline;
use crate::operate::{self, Operation};
use crate::output;
use crate::progress::Shown;
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use ploop_pure::units::SECTOR_BYTES;
use std::path::Path;

/// Runs the command.
pub fn run(args: &ResizeArgs) -> Result<()> {
    if args.size == 0 || args.size % SECTOR_BYTES != 0 || i64::try_from(args.size).is_err() {
        let what = format!("a disk of {} bytes is not possible", args.size);
        return Err(Error::new(Code::Param, what)
            .hint("the size is a multiple of 512 bytes; 10G, say, is 10 GiB"));
    }
    match attached::subject(&args.image)? {
        Subject::Disk(descriptor) => return disk(args, &descriptor),
        Subject::Device(found) => return device(args, &found),
        Subject::Image => {
            attached::must_be_ours(&args.image, args.force)?;
            interim::must_be_given(std::slice::from_ref(&args.image))?;
        }
    }
    let has_grown = match (args.format, args.preallocate) {
        (GivenFormat::Raw, true) => offline::grow_raw(&args.image, args.size, Space::Full)?,
        (GivenFormat::Raw, false) => offline::grow_raw(&args.image, args.size, Space::Thin)?,
        (GivenFormat::Ploop1, true) => {
            let what = "--preallocate is for -f raw";
            let hint = "'ploopctl convert -f preallocated' allocates all of an image";
            return Err(Error::new(Code::Param, what).hint(hint));
        }
        (GivenFormat::Ploop1, false) => {
            let sectors = args.size / SECTOR_BYTES;
            offline::grow(&args.image, sectors, &mut Shown::new())?
        }
    };
    tell(args, has_grown)
}

/// An attached image: the kernel grows it.
fn device(args: &ResizeArgs, device: &Device) -> Result<()> {
    if args.preallocate {
        let what = "--preallocate is for an image that is not attached";
        return Err(Error::new(Code::Param, what));
    }
    if args.size < device.size {
        let what = format!(
            "{} has a size of {} and cannot become smaller",
            device.device.display(),
            human(device.size)
        );
        return Err(Error::new(Code::Param, what)
            .hint("'ploopctl trim' and 'ploopctl compact' make the image file smaller"));
    }
    let has_grown = args.size > device.size;
    if has_grown {
        grow(device, args.size)?;
    }
    tell(args, has_grown)
}

/// Has the kernel grow the disk. What it waits for may have been another growth, to another size.
fn grow(device: &Device, size: u64) -> Result<()> {
    let sectors = size / SECTOR_BYTES;
    for _ in 0..2 {
        operate::run(device, Operation::Grow { sectors }, 0)?;
        let now = Sysfs::default().device(device.index)?.map_or(0, |d| d.size);
        if now == size {
            return Ok(());
        }
        if now > size {
            break;
        }
    }
    let what = format!(
        "{} was grown to another size meanwhile",
        device.device.display()
    );
    Err(Error::new(Code::Busy, what).hint("'ploopctl info' shows its size"))
}

/// A disk with a descriptor, attached or not.
fn disk(args: &ResizeArgs, path: &Path) -> Result<()> {
    if args.format != GivenFormat::Ploop1 || args.preallocate {
        let what = "-f and --preallocate are not for a disk: its descriptor says what it is";
        return Err(Error::new(Code::Param, what));
    }
    let live = Live::default();
    let mut disk = super::disk::open(path, &live, Work::Long, &args.wait)?;
    let has_grown = disk.grow(&live, args.size / SECTOR_BYTES)?;
    tell(args, has_grown)
}

fn tell(args: &ResizeArgs, has_grown: bool) -> Result<()> {
    let at = args.image.display();
    let size = human(args.size);
    output::text(&if has_grown {
        format!("{at} has a size of {size} now.\n")
    } else {
        format!("{at} has a size of {size} already.\n")
    })
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl compact`.

use super::attached::{self, Subject};
use crate::cli::CompactArgs;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::offline::{self, Zeros};
use crate::operate::{self, Operation};
use crate::output;
use crate::progress::Shown;
use crate::size::human;
use crate::sysfs::Device;
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(serialize_with = "output::path")]
    image: &'a Path,
    length_before: u64,
    length: u64,
    space_before: u64,
    space: u64,
}

/// Runs the command.
pub fn run(args: &CompactArgs) -> Result<()> {
    match attached::subject(&args.image)? {
        Subject::Disk(descriptor) => return disk(args, &descriptor),
        Subject::Device(found) => return device(args, &found),
        Subject::Image => attached::must_be_ours(&args.image, args.force)?,
    }
    let zeros = if args.drop_zeros {
        Zeros::Drop
    } else {
        Zeros::Keep
    };
    let done = offline::compact(&args.image, zeros, &mut Shown::new())?;
    if args.json {
        return output::json(&Answer {
            image: &args.image,
            length_before: done.len_before,
            length: done.len,
            space_before: done.space_before,
            space: done.space,
        });
    }
    output::text(&format!(
        "{}: {} long, was {}; {} of space, was {}\n",
        args.image.display(),
        human(done.len),
        human(done.len_before),
        human(done.space),
        human(done.space_before),
    ))
}

/// An attached image: the kernel compacts it.
fn device(args: &CompactArgs, device: &Device) -> Result<()> {
    if args.drop_zeros || args.json {
        let what = "--drop-zeros and --json are for an image that is not attached";
        return Err(Error::new(Code::Param, what)
            .hint("'ploopctl trim' drops what the file systems do not use"));
    }
    let freed = operate::run(device, Operation::Compact, args.rate.rate)?.freed;
    let at = args.image.display();
    output::text(&format!("{at}: {} shorter\n", human(freed)))
}

/// A disk with a descriptor: its top if it is attached, else all its images.
fn disk(args: &CompactArgs, path: &Path) -> Result<()> {
    if args.drop_zeros || args.json {
        let what = "--drop-zeros and --json are for one image";
        return Err(Error::new(Code::Param, what));
    }
    let live = Live::limited(args.rate.rate);
    let mut disk = super::disk::open(path, &live, Work::Long, &args.wait)?;
    for (file, freed) in disk.compact(&live)? {
        output::text(&format!("{}: {} shorter\n", file.display(), human(freed)))?;
    }
    Ok(())
}

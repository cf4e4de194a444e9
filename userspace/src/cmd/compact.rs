// SPDX-License-Identifier: GPL-2.0
//! `ploopctl compact`.

use crate::cli::CompactArgs;
use crate::descriptor::named_by;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::offline::{self, Zeros};
use crate::output;
use crate::progress::Shown;
use crate::size::human;
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
    if let Some(descriptor) = named_by(&args.image) {
        return disk(args, &descriptor);
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

/// A disk with a descriptor: its top if it is attached, else all its images.
fn disk(args: &CompactArgs, path: &Path) -> Result<()> {
    if args.drop_zeros || args.json {
        let what = "--drop-zeros and --json are for one image";
        return Err(Error::new(Code::Param, what));
    }
    let live = Live::default();
    let mut disk = super::disk::open(path, &live, Work::Long, &args.wait)?;
    for (file, freed) in disk.compact(&live)? {
        output::text(&format!("{}: {} shorter\n", file.display(), human(freed)))?;
    }
    Ok(())
}

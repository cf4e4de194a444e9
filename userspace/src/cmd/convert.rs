// SPDX-License-Identifier: GPL-2.0
//! `ploopctl convert`.

use crate::cli::{ConvertArgs, NewKind};
use crate::error::{Code, Error, Result};
use crate::image::create::{cluster_size, Space};
use crate::offline::{self, Target};
use crate::progress::Shown;
use ploop_pure::layout::ploop1::Version;

/// Runs the command.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let target = target(args)?;
    let from = args.from.into();
    let param = |what: &str| Err(Error::new(Code::Param, what));
    match (args.in_place, args.paths.as_slice()) {
        (true, [image]) => offline::replace(image, from, target, &mut Shown::new()),
        (true, _) => param("--in-place is for one image, and makes no other"),
        (false, [images @ .., out]) if !images.is_empty() => {
            offline::convert(images, from, out, target, &mut Shown::new())
        }
        (false, _) => param("the path of the new image is missing"),
    }
}

fn target(args: &ConvertArgs) -> Result<Target> {
    let is_ploop1 = args.format != NewKind::Raw;
    if !is_ploop1 && (args.cluster.is_some() || args.format_version.is_some()) {
        let what = "-b and -v are not for -f raw: a raw image has neither clusters nor a version";
        return Err(Error::new(Code::Param, what));
    }
    let ploop1 = |space| -> Result<Target> {
        Ok(Target::Ploop1 {
            version: match args.format_version {
                Some(1) => Version::V1,
                Some(_) | None => Version::V2,
            },
            cluster: args.cluster.map(cluster_size).transpose()?,
            space,
        })
    };
    match args.format {
        NewKind::Raw => Ok(Target::Raw(Space::Thin)),
        NewKind::Ploop1 => ploop1(Space::Thin),
        NewKind::Preallocated => ploop1(Space::Full),
    }
}

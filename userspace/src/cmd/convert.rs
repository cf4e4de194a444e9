// SPDX-License-Identifier: GPL-2.0
//! `ploopctl convert`.

use super::attached;
use super::backup::interim;
use crate::cli::{ConvertArgs, GivenFormat, NewKind};
use crate::descriptor::named_by;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::{cluster_size, Space};
use crate::offline::{self, Format, Target};
use crate::progress::Shown;
use ploop_pure::layout::ploop1::Version;
use std::path::Path;

/// Runs the command.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let target = target(args)?;
    let from = args.from.into();
    let param = |what: &str| Err(Error::new(Code::Param, what));
    if let Some(descriptor) = args.paths.first().and_then(|p| named_by(p)) {
        return disk(args, &descriptor, target);
    }
    if args.snapshot.is_some() {
        return param("--snapshot is for a disk with a descriptor");
    }
    if let (true, Some(image)) = (args.in_place, args.paths.first()) {
        interim::must_be_given(std::slice::from_ref(image))?;
        attached::must_be_ours(image, args.force)?;
    }
    match (args.in_place, args.paths.as_slice()) {
        (true, [image]) => offline::replace(image, from, target, &mut Shown::new()),
        (true, _) => param("--in-place is for one image, and makes no other"),
        (false, [images @ .., out]) if !images.is_empty() => {
            attached::must_be_whole(images)?;
            offline::convert(images, from, out, target, &mut Shown::new())
        }
        (false, _) => param("the path of the new image is missing"),
    }
}

/// The chain of a disk becomes one image.
fn disk(args: &ConvertArgs, path: &Path, target: Target) -> Result<()> {
    let [_, out] = args.paths.as_slice() else {
        let what = "a disk is converted into one new image: give the disk and the path of that";
        return Err(Error::new(Code::Param, what).hint(
            "'ploopctl create --descriptor' and 'ploopctl descriptor restore' make a disk of it",
        ));
    };
    if args.in_place || args.from != GivenFormat::Ploop1 {
        let what = "--in-place and --from are not for a disk with a descriptor";
        return Err(Error::new(Code::Param, what));
    }
    let live = Live::default();
    let disk = super::disk::open(path, &live, Work::Long, &args.wait)?;
    let guid = args.snapshot.unwrap_or(disk.descriptor().disk().top);
    disk.must_be_whole(guid)?;
    let members = disk.members(guid, false)?;
    let from = match members.first() {
        Some(base) if base.header.is_none() => Format::Raw,
        Some(_) | None => Format::Ploop1,
    };
    let images: Vec<_> = members.into_iter().map(|m| m.path).collect();
    offline::convert(&images, from, out, target, &mut Shown::new())
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

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl create`.

use crate::cli::{CreateArgs, NewFormat};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::size::human;
use ploop_pure::layout::ploop1::{Header, Version};
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};

/// Runs the command.
pub fn run(args: &CreateArgs) -> Result<()> {
    if args.size == 0 || args.size % SECTOR_BYTES != 0 {
        let what = format!("a disk of {} bytes is not possible", args.size);
        return Err(Error::new(Code::Param, what)
            .hint("the size is a multiple of 512 bytes; 10G, say, is 10 GiB"));
    }
    if i64::try_from(args.size).is_err() {
        let what = format!("a disk of {} is too large for any file", human(args.size));
        return Err(Error::new(Code::Param, what));
    }
    let space = if args.preallocate {
        Space::Full
    } else {
        Space::Thin
    };
    match args.format {
        NewFormat::Raw => {
            if args.cluster.is_some() {
                let what = "a raw image has no clusters: -b is not possible with -f raw";
                return Err(Error::new(Code::Param, what));
            }
            create::raw(&args.image, args.size, space)
        }
        NewFormat::Ploop1 => create::ploop1(&args.image, header(args)?, space),
    }
}

fn header(args: &CreateArgs) -> Result<Header> {
    let cluster = match args.cluster {
        Some(bytes) => create::cluster_size(bytes)?,
        None => ClusterSize::DEFAULT,
    };
    let version = match args.format_version {
        1 => Version::V1,
        _ => Version::V2,
    };
    Header::new(version, cluster, args.size / SECTOR_BYTES).map_err(|p| {
        let what = format!(
            "a ploop1 version {} image of {} with {} clusters is not possible: {p}",
            args.format_version,
            human(args.size),
            human(cluster.bytes())
        );
        let hint = match version {
            Version::V1 => "version 1 ends at 2 TiB: use version 2",
            Version::V2 => "use larger clusters (-b) or a smaller size",
        };
        Error::new(Code::Param, what).hint(hint)
    })
}

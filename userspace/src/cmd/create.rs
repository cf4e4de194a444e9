// SPDX-License-Identifier: GPL-2.0
//! `ploopctl create`: an image, or a disk of one image.

use crate::cli::{CreateArgs, NewFormat};
use crate::descriptor::lock::{FileLock, Patience};
use crate::descriptor::{self, edit, store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::output;
use crate::size::human;
use ploop_pure::layout::ploop1::{Header, Version};
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};
use std::fs;
use std::path::Path;
use std::time::Duration;

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
    if args.descriptor {
        return disk(args, space);
    }
    image(args, &args.image, space)
}

/// A directory with an image and a descriptor. The descriptor is last: without it there is no disk.
fn disk(args: &CreateArgs, space: Space) -> Result<()> {
    let dir = &args.image;
    let failed =
        |what: &str, e| Error::io(Code::Create, format!("cannot {what} {}", dir.display()), e);
    // Before there is anything that would be left.
    let cluster = match args.cluster {
        Some(bytes) => create::cluster_size(bytes)?,
        None => ClusterSize::DEFAULT,
    };
    let args = &whole_clusters(args, cluster)?;
    let path = dir.join(descriptor::NAME);
    if path.symlink_metadata().is_ok() {
        let what = format!("{} exists already and is left as it is", path.display());
        return Err(Error::new(Code::Create, what).hint("choose another directory"));
    }
    let is_new = match fs::create_dir(dir) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(e) => return Err(failed("make the directory", e)),
    };
    let whole = fs::canonicalize(dir).map_err(|e| failed("open", e))?;
    let path = whole.join(descriptor::NAME);
    let _lock = FileLock::take(&path, Patience(Duration::ZERO))?;
    let file = "root.hds";
    let made = image(args, &whole.join(file), space);
    let stored = made.and_then(|()| {
        let is_raw = args.format == NewFormat::Raw;
        let size = args.size / SECTOR_BYTES;
        let text = edit::new_text(size, cluster.sectors(), is_raw, args.preallocate, file);
        let text = Descriptor::parse(&path, &text)?.text();
        store::write(&path, &text).inspect_err(|_| {
            // It may have failed when the descriptor was in its place.
            if path.symlink_metadata().is_err() {
                let _ = fs::remove_file(whole.join(file));
            }
        })
    });
    if stored.is_err() && is_new {
        let _ = fs::remove_file(store::beside(&path, ".lck"));
        let _ = fs::remove_dir(&whole);
    }
    stored?;
    // The name of the directory, too.
    store::sync_dir(&whole)
}

/// What ends inside a cluster could not grow once there is a snapshot of it, or, raw, have one.
fn whole_clusters(args: &CreateArgs, cluster: ClusterSize) -> Result<CreateArgs> {
    let size = args.size.checked_next_multiple_of(cluster.bytes());
    let Some(size) = size.filter(|s| i64::try_from(*s).is_ok()) else {
        let what = format!("a disk of {} is too large for any file", human(args.size));
        return Err(Error::new(Code::Param, what));
    };
    if size != args.size {
        output::note(&format!(
            "note: the size of the disk is {size} bytes: a multiple of its clusters of {}",
            human(cluster.bytes())
        ));
    }
    Ok(CreateArgs {
        size,
        ..args.clone()
    })
}

fn image(args: &CreateArgs, path: &Path, space: Space) -> Result<()> {
    match args.format {
        NewFormat::Raw => {
            if args.cluster.is_some() && !args.descriptor {
                let what = "a raw image has no clusters: -b is not possible with -f raw";
                return Err(Error::new(Code::Param, what));
            }
            create::raw(path, args.size, space)
        }
        NewFormat::Ploop1 => create::ploop1(path, header(args)?, space),
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

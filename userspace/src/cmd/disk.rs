// SPDX-License-Identifier: GPL-2.0
//! What the commands for disks with a descriptor share.

use crate::cli::WaitArgs;
use crate::descriptor::model::ImageEntry;
use crate::descriptor::{self, store, Descriptor};
use crate::disk::intent::Intent;
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::output;
use std::path::{Path, PathBuf};

/// The descriptor that `path` is, or whose directory it is.
pub fn path(path: &Path) -> Result<PathBuf> {
    descriptor::named_by(path).ok_or_else(|| {
        let what = format!("{} is neither a descriptor nor a directory with one", path.display());
        Error::new(Code::Param, what).hint(format!(
            "a descriptor ends in .xml and is mostly called {}; 'ploopctl descriptor restore DIR' makes one",
            descriptor::NAME
        ))
    })
}

/// Opens a disk to work on it, and tells what was found unfinished.
pub fn open(given: &Path, live: &Live, work: Work, wait: &WaitArgs) -> Result<Opened> {
    let opened = Opened::open(&path(given)?, live, work, wait.patience())?;
    for line in opened.mended() {
        output::note(line);
    }
    Ok(opened)
}

/// Reads a descriptor to look at it only, without locks. What is unfinished is told.
pub fn look(given: &Path) -> Result<(PathBuf, Descriptor)> {
    let path = path(given)?;
    let descriptor = Descriptor::parse(&path, &store::read(&path)?)?;
    if Intent::is_there(&path) {
        output::note(&format!(
            "note: an operation on {0} is going on, or was interrupted: 'ploopctl recover {0}' completes or undoes it",
            path.display()
        ));
    }
    Ok((path, descriptor))
}

/// Where an image of the descriptor `path` is.
pub fn file(path: &Path, image: &ImageEntry) -> PathBuf {
    store::dir_of(path).join(&image.file)
}

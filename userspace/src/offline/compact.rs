// SPDX-License-Identifier: GPL-2.0
//! Making an image file as small as its clusters allow.

use super::exec::{Ending, Exec};
use super::index::Index;
use super::{mended, open, tidy, Progress};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use ploop_pure::offline::compact::{Compact, Zeros};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Length and space of an image file before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// Length before.
    pub len_before: u64,
    /// Length now.
    pub len: u64,
    /// Space on the file system before, in bytes.
    pub space_before: u64,
    /// Space now.
    pub space: u64,
}

/// Moves the clusters at the end of the ploop1 image `path` into unused places and cuts the file.
/// With [`Zeros::Drop`], clusters that read as zeros are dropped before: only right for a base,
/// as those of another delta hide what lies below.
pub fn compact(path: &Path, zeros: Zeros, progress: &mut dyn Progress) -> Result<Compacted> {
    let image = open(path, Access::Write)?;
    let _lock = ImageLock::take(image.file(), path, Use::Write)?;
    let (len_before, space_before) = size(&image)?;
    let report = mended(&image, progress)?;
    let (header, len_bytes) = (report.findings.header, image.len_bytes()?);
    let used = image.scan(&header, report.findings.length, &mut |_, _| Ok(()))?;
    let bytes = match zeros {
        Zeros::Drop => u64::from(used.usage().nr_used),
        Zeros::Keep => 0,
    } << header.cluster.log_bytes();
    let done = |image: &Image| {
        let (len, space) = size(image)?;
        Ok(Compacted {
            len_before,
            len,
            space_before,
            space,
        })
    };
    let Some(mut machine) = Compact::new(&header, used, len_bytes, zeros) else {
        return done(&image);
    };
    let mut exec = Exec {
        image: &image,
        index: Some(Index::new(&image, header)),
        upper: None,
        cluster: header.cluster,
    };
    let moved = u64::from(machine.nr_moves()) << header.cluster.log_bytes();
    progress.begin("compacting", bytes + moved);
    let ending = exec.run(&mut machine, progress);
    progress.end();
    match ending {
        Ok(Ending::Done) => done(&image),
        Ok(Ending::Stopped) => {
            tidy(&image)?;
            let what = format!("interrupted: a part of {} is compacted", path.display());
            Err(Error::new(Code::Aborted, what).hint("the same command again does the rest"))
        }
        Err(e) => {
            // Best effort: what is left behind only takes space.
            let _ = tidy(&image);
            Err(e.or_hint("nothing is lost: the same command again does the rest"))
        }
    }
}

/// Length and space of a file.
fn size(image: &Image) -> Result<(u64, u64)> {
    let meta = image.file().metadata();
    let meta = meta.map_err(|e| image.error(Code::Stat, "stat", e))?;
    Ok((meta.len(), meta.blocks() * 512))
}

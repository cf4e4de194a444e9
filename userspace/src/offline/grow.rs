// SPDX-License-Identifier: GPL-2.0
//! Giving an image a larger disk.

use super::exec::{Ending, Exec};
use super::index::Index;
use super::{mended, open, tidy, Progress};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::image::{Access, Image, Report};
use crate::locks::{ImageLock, Use};
use crate::size::human;
use ploop_pure::layout::ploop1::Version;
use ploop_pure::offline::grow::{Census, Grow, Plan, Refusal};
use ploop_pure::units::{Cluster, SECTOR_BYTES};
use std::path::Path;

/// Gives the ploop1 image `path` a disk of `size_sectors`; whether it was another one before.
///
/// Of a chain, only the top may be grown: no delta may be smaller than the one below it.
pub fn grow(path: &Path, size_sectors: u64, progress: &mut dyn Progress) -> Result<bool> {
    let image = open(path, Access::Write)?;
    let _lock = ImageLock::take(image.file(), path, Use::Write)?;
    // Judged before anything is mended: a refusal changes nothing.
    let (header, ..) = image.good_header()?;
    let plan = Plan::new(&header, size_sectors);
    plan.map_err(|r| refused(&image, header.version, size_sectors, r))?;
    let report = mended(&image, progress)?;
    grow_held(&image, &report, size_sectors, progress)
}

/// The same for an image that is locked and was found good.
pub(super) fn grow_held(
    image: &Image,
    report: &Report,
    size_sectors: u64,
    progress: &mut dyn Progress,
) -> Result<bool> {
    let header = report.findings.header;
    let refused = |r| refused(image, header.version, size_sectors, r);
    let Some(plan) = Plan::new(&header, size_sectors).map_err(refused)? else {
        return Ok(false);
    };
    let census = census(image, report, &plan)?;
    let mut machine = Grow::new(plan, census).map_err(refused)?;
    let mut exec = Exec {
        image,
        index: Some(Index::new(image, header)),
        upper: None,
        cluster: header.cluster,
    };
    let bytes = u64::from(census.nr_in_the_way) << header.cluster.log_bytes();
    progress.begin("moving clusters for a larger table", bytes);
    let ending = exec.run(&mut machine, progress);
    progress.end();
    let again = "nothing is lost: the same command again does the rest";
    let result = ending
        .map_err(|e| e.or_hint(again))
        .and_then(|ending| match ending {
            Ending::Done => Ok(true),
            Ending::Stopped => {
                let what = format!("interrupted: {} has its old size", image.path().display());
                Err(Error::new(Code::Aborted, what).hint("the same command again does the rest"))
            }
        });
    if result.is_err() {
        // Best effort: what is left behind only takes space.
        let _ = tidy(image);
    }
    result
}

fn census(image: &Image, report: &Report, plan: &Plan) -> Result<Census> {
    let header = report.findings.header;
    let mut index = Index::new(image, header);
    let (mut nr_in_the_way, mut from) = (0, Cluster(0));
    while let Some((cluster, at)) = index.next(from)? {
        nr_in_the_way += u32::from(plan.is_in_the_way(at));
        from = Cluster(cluster.0 + 1);
    }
    let last = header.disk_clusters().checked_sub(1);
    Ok(Census {
        usage: report.findings.usage,
        nr_in_the_way,
        last: last.map_or(Ok(None), |last| index.get(Cluster(last)))?,
    })
}

fn refused(image: &Image, version: Version, size_sectors: u64, refusal: Refusal) -> Error {
    let at = image.path().display();
    let size = size_sectors
        .checked_mul(SECTOR_BYTES)
        .map_or_else(|| format!("{size_sectors} sectors"), human);
    let what = format!("{at} cannot get a size of {size}: {refusal}");
    let error = Error::new(Code::Param, what);
    match (refusal, version) {
        (Refusal::Shrinks { .. }, _) => error.hint(
            "only growing is possible; to give space back, trim the file system and 'ploopctl compact'",
        ),
        (Refusal::Limit(_) | Refusal::Slots { .. }, Version::V1) => {
            error.hint("version 1 ends at 2 TiB: 'ploopctl convert -v 2' makes a version 2 image")
        }
        (Refusal::Limit(_) | Refusal::Slots { .. }, Version::V2) => {
            error.hint("'ploopctl convert -b' makes an image of larger clusters")
        }
    }
}

/// Gives the raw image `path` a length of `size_bytes`; whether it had another one before.
pub fn grow_raw(path: &Path, size_bytes: u64, space: Space) -> Result<bool> {
    let image = open(path, Access::Write)?;
    let _lock = ImageLock::take(image.file(), path, Use::Write)?;
    let old = image.len_bytes()?;
    if size_bytes < old {
        let what = format!(
            "{} cannot get a size of {}: it has {old} bytes and cannot become smaller",
            path.display(),
            human(size_bytes)
        );
        return Err(Error::new(Code::Param, what));
    }
    if size_bytes == old {
        return Ok(false);
    }
    match space {
        Space::Thin => image.set_len(size_bytes)?,
        Space::Full => {
            let done = create::allocate_from(image.file(), old, size_bytes);
            if let Err(e) = done {
                let _ = image.set_len(old);
                return Err(image.error(Code::Allocate, "allocate the space of", e));
            }
        }
    }
    image.sync()?;
    Ok(true)
}

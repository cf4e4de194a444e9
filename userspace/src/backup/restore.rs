// SPDX-License-Identifier: GPL-2.0
//! Making an image of a chain of backups.

use super::chain::{arrange, must_be_full, walk};
use super::read::Reader;
use super::wire::Header;
use crate::error::{Code, Error, Result};
use crate::image::create::cluster_size;
use crate::offline::{self, Progress, Target};
use crate::output::count;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use std::path::{Path, PathBuf};

/// Makes the image `out`, which must not exist, of the disk as it was at the backup number `point`
/// of the chain, counted from 1, or the last. It is there when all that was read was found good, or
/// not at all. The number of that backup and its header are returned.
pub fn restore(
    files: &[PathBuf],
    point: Option<usize>,
    out: &Path,
    target: Target,
    progress: &mut dyn Progress,
) -> Result<(usize, Header)> {
    let headers = files
        .iter()
        .map(|path| Ok((path.as_path(), *Reader::open(path)?.header())));
    let headers: Vec<_> = headers.collect::<Result<_>>()?;
    let order = arrange(&headers)?;
    let nr = point.unwrap_or(order.len());
    if nr == 0 || nr > order.len() {
        let what = format!(
            "there is no backup {nr} in a chain of {}",
            count(order.len() as u64, "backup")
        );
        return Err(Error::new(Code::Param, what));
    }
    let chosen: Vec<_> = order.iter().take(nr).map(|i| headers[*i]).collect();
    let Some((first, header)) = chosen.first() else {
        return Err(Error::new(Code::Param, "no backup was given"));
    };
    must_be_full(first, header)?;
    open_many();
    let mut chain = Vec::with_capacity(nr);
    for (path, header) in &chosen {
        let reader = Reader::open(path)?;
        if reader.header() != header {
            let what = format!("{} has just become another file", path.display());
            return Err(Error::new(Code::Busy, what));
        }
        chain.push(reader);
    }
    let header = chosen.last().map_or(*header, |(_, last)| *last);
    let cluster = cluster_size(header.cluster_bytes.into())?;
    progress.begin("restoring", header.disk_bytes);
    let done = offline::fill(out, target, cluster, header.disk_bytes, |sink| {
        walk(&mut chain, progress, sink)
    });
    progress.end();
    done.map(|()| (nr, header))
}

/// All backups of a chain are open at once: as many as this process may be allowed.
fn open_many() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Without it the usual number may do.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

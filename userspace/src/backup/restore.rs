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
    open_many();
    let readers = files.iter().map(|path| Reader::open(path));
    let readers: Vec<_> = readers.collect::<Result<_>>()?;
    let headers: Vec<_> = readers.iter().map(|r| (r.path(), *r.header())).collect();
    let order = arrange(&headers)?;
    let mut readers: Vec<_> = readers.into_iter().map(Some).collect();
    let mut chain: Vec<_> = order.iter().filter_map(|i| readers[*i].take()).collect();
    let nr = point.unwrap_or(chain.len());
    if nr == 0 || nr > chain.len() {
        let what = format!(
            "there is no backup {nr} in a chain of {}",
            count(chain.len() as u64, "backup")
        );
        return Err(Error::new(Code::Param, what));
    }
    chain.truncate(nr);
    let Some(first) = chain.first() else {
        return Err(Error::new(Code::Param, "no backup was given"));
    };
    must_be_full(first.path(), first.header())?;
    let header = chain.last().map_or(*first.header(), |r| *r.header());
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

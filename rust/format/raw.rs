// SPDX-License-Identifier: GPL-2.0
//! Raw images: cluster N is slot N, always mapped; no header, no index, no mark.

use crate::sys::prelude::*;
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};

/// A raw image.
pub(crate) struct Raw {
    cluster: ClusterSize,
    size_sectors: u64,
    nr_clusters: u32,
}

impl Raw {
    /// For a file of `len` bytes; EINVAL if that is less than a sector, EFBIG if its clusters do
    /// not fit 32 bits.
    pub(crate) fn new(len: u64, cluster_log: u32) -> Result<Self> {
        let cluster = ClusterSize::from_log(cluster_log).ok_or(EINVAL)?;
        let size_sectors = len / SECTOR_BYTES;
        if size_sectors == 0 {
            return Err(EINVAL);
        }
        let nr_clusters = u32::try_from(cluster.ceil(len)).map_err(|_| EFBIG)?;
        Ok(Self {
            cluster,
            size_sectors,
            nr_clusters,
        })
    }

    /// Size of the disk in sectors: all whole sectors of the file.
    pub(crate) fn size_sectors(&self) -> u64 {
        self.size_sectors
    }

    /// Clusters of the disk, the last of which may be a part.
    pub(crate) fn nr_clusters(&self) -> u32 {
        self.nr_clusters
    }

    /// Cluster size, as the caller of ADD_DELTA said it.
    pub(crate) fn cluster(&self) -> ClusterSize {
        self.cluster
    }
}

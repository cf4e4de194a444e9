// SPDX-License-Identifier: GPL-2.0
//! How a delta maps clusters to slots of its image file. Knows nothing of I/O, chains and devices:
//! it is given bytes and gives bytes back.

pub(crate) mod ploop1;
pub(crate) mod raw;

use ploop_pure::units::{ClusterSize, SECTOR_BYTES};

/// The format of a delta.
pub(crate) enum Format {
    /// The file is the disk.
    Raw(raw::Raw),
    /// ploop1, version 1 or 2.
    Ploop1(ploop1::Ploop1),
}

impl Format {
    /// Size of the disk in sectors.
    pub(crate) fn size_sectors(&self) -> u64 {
        match self {
            Self::Raw(f) => f.size_sectors(),
            Self::Ploop1(f) => f.header().size_sectors,
        }
    }

    /// Clusters of the disk, the last of which may be a part.
    pub(crate) fn nr_clusters_of_disk(&self) -> u64 {
        self.cluster()
            .ceil(self.size_sectors().saturating_mul(SECTOR_BYTES))
    }

    /// Cluster size.
    pub(crate) fn cluster(&self) -> ClusterSize {
        match self {
            Self::Raw(f) => f.cluster(),
            Self::Ploop1(f) => f.header().cluster,
        }
    }

    /// Name in sysfs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Ploop1(_) => "ploop1",
        }
    }

    /// Version of the format, 0 where it has none.
    pub(crate) fn version(&self) -> u32 {
        match self {
            Self::Raw(_) => 0,
            Self::Ploop1(f) => f.header().version.number(),
        }
    }
}

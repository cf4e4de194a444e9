// SPDX-License-Identifier: GPL-2.0
//! Units and the conversions between them: the only shifts of the project.
//!
//! A *sector* is always 512 bytes. A *cluster* is the guest's unit of allocation, a power of two
//! of sectors. An *image cluster* is a slot of the same size in the image file.

/// log2 of the bytes of a sector.
pub const SECTOR_SHIFT: u32 = 9;
/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 1 << SECTOR_SHIFT;
/// Bytes of an index page: the unit in which the index is written.
pub const INDEX_PAGE_BYTES: u64 = 4096;

/// Number of a cluster of the disk, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cluster(pub u32);

/// Number of a cluster slot in an image file; 0 is the header's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageCluster(pub u32);

/// Position of a delta in the chain; 0 is the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub u8);

/// Size of a cluster: a power of two from 32 KiB to 64 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterSize {
    /// log2 of the sectors of a cluster, 6 to 17.
    log_sectors: u8,
}

impl ClusterSize {
    /// The smallest log2 of sectors: 32 KiB.
    pub const LOG_MIN: u32 = 6;
    /// The largest log2 of sectors: 64 MiB.
    pub const LOG_MAX: u32 = 17;
    /// The default of 1 MiB.
    pub const DEFAULT: Self = Self { log_sectors: 11 };

    /// From the log2 of the sectors of a cluster; `None` outside 6 to 17.
    pub fn from_log(log_sectors: u32) -> Option<Self> {
        if !(Self::LOG_MIN..=Self::LOG_MAX).contains(&log_sectors) {
            return None;
        }
        let log_sectors = u8::try_from(log_sectors).ok()?;
        Some(Self { log_sectors })
    }

    /// From the sectors of a cluster; `None` if not a power of two in range.
    pub fn from_sectors(sectors: u32) -> Option<Self> {
        if !sectors.is_power_of_two() {
            return None;
        }
        Self::from_log(sectors.trailing_zeros())
    }

    /// log2 of the sectors of a cluster.
    #[inline]
    pub const fn log_sectors(self) -> u32 {
        self.log_sectors as u32
    }

    /// log2 of the bytes of a cluster.
    #[inline]
    pub const fn log_bytes(self) -> u32 {
        self.log_sectors as u32 + SECTOR_SHIFT
    }

    /// Sectors of a cluster.
    #[inline]
    pub const fn sectors(self) -> u32 {
        1 << self.log_sectors
    }

    /// Bytes of a cluster.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.log_bytes()
    }

    /// The cluster that holds byte `pos` of the disk and the byte inside it; `None` if the
    /// number does not fit.
    #[inline]
    pub fn split(self, pos: u64) -> Option<(Cluster, u32)> {
        let cluster = u32::try_from(pos >> self.log_bytes()).ok()?;
        let within = u32::try_from(pos & (self.bytes() - 1)).ok()?;
        Some((Cluster(cluster), within))
    }

    /// First byte of a slot in the image file. Never overflows: 2^32 slots of 2^26 bytes.
    #[inline]
    pub const fn offset(self, at: ImageCluster) -> u64 {
        (at.0 as u64) << self.log_bytes()
    }

    /// First byte of a cluster on the disk. Never overflows.
    pub const fn guest_offset(self, cluster: Cluster) -> u64 {
        (cluster.0 as u64) << self.log_bytes()
    }

    /// Whole clusters in `bytes`.
    pub const fn floor(self, bytes: u64) -> u64 {
        bytes >> self.log_bytes()
    }

    /// Clusters needed to hold `bytes`.
    pub const fn ceil(self, bytes: u64) -> u64 {
        (bytes >> self.log_bytes()) + (bytes & (self.bytes() - 1) != 0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_sizes_are_limited() {
        assert!(ClusterSize::from_sectors(63).is_none());
        assert!(ClusterSize::from_sectors(32).is_none());
        assert!(ClusterSize::from_sectors(0).is_none());
        assert!(ClusterSize::from_sectors(1 << 18).is_none());
        assert_eq!(ClusterSize::from_sectors(2048), Some(ClusterSize::DEFAULT));
        assert_eq!(
            ClusterSize::from_log(17).map(ClusterSize::bytes),
            Some(64 << 20)
        );
    }

    #[test]
    fn split_and_offset_agree() {
        let c = ClusterSize::DEFAULT;
        assert_eq!(c.split((5 << 20) + 7), Some((Cluster(5), 7)));
        assert_eq!(c.split(u64::MAX), None);
        assert_eq!(c.offset(ImageCluster(u32::MAX)), 0xffff_ffff_u64 << 20);
        assert_eq!((c.ceil(0), c.ceil(1), c.ceil(1 << 20)), (0, 1, 1));
        assert_eq!(c.ceil(u64::MAX), 1 << 44);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! THE LAYOUT of ploop1 images, versions 1 and 2 (QEMU's `parallels`): header and BAT entries.
//!
//! ```text
//! cluster 0 .. F-1   64-byte header, then u32 BAT entries, contiguous, zero padded
//! cluster F ..       data clusters, in any order
//! ```
//!
//! All integers are little endian. `docs/format-ploop1.md` has the byte table; a test compares it
//! with the offsets asserted here.

pub mod raw;

pub use self::raw::*;
use crate::problem::Problem;
use crate::units::{Cluster, ClusterSize, ImageCluster, INDEX_PAGE_BYTES, SECTOR_BYTES};

/// A header whose fields agree with each other. What it says about the file's length is checked
/// by [`Header::check_length`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: Version,
    /// Cluster size.
    pub cluster: ClusterSize,
    /// BAT entries, at least one.
    pub nr_entries: u32,
    /// Disk size in sectors, at least one and covered by the entries.
    pub size_sectors: u64,
    /// First data cluster.
    pub first_data: ImageCluster,
    /// How the image was left.
    pub mark: Mark,
    /// `FLAG_*`.
    pub flags: u32,
    /// Format extension in sectors, 0 for none.
    pub ext_offset: u64,
    /// Heads and cylinders, carried along unchanged.
    geometry: (u32, u32),
}

impl Header {
    /// The header of a new image: closed and empty.
    ///
    /// `size_sectors` is rounded up to the cluster for the number of entries only.
    pub fn new(version: Version, cluster: ClusterSize, size_sectors: u64) -> Result<Self, Problem> {
        if size_sectors == 0 {
            return Err(Problem::SizeZero);
        }
        // `parse` takes only half of the field for version 1.
        if version == Version::V1 && size_sectors > u64::from(u32::MAX) {
            return Err(Problem::SizeLimit { size_sectors });
        }
        let nr_entries = size_sectors.div_ceil(u64::from(cluster.sectors()));
        let nr_entries = u32::try_from(nr_entries)
            .ok()
            .filter(|n| *n <= ENTRIES_MAX)
            .ok_or(Problem::SizeLimit { size_sectors })?;
        // Before the size is encoded: version 1 has 32 bits for it.
        Self::check_size(version, cluster, nr_entries, size_sectors)?;
        let first_data = bat_clusters(cluster, nr_entries);
        let raw = RawHeader {
            magic: version.magic(),
            disk_type: DISK_TYPE.into(),
            heads: 16.into(),
            cylinders: u32::try_from(size_sectors / (16 * 32))
                .unwrap_or(u32::MAX)
                .into(),
            cluster_sectors: cluster.sectors().into(),
            nr_entries: nr_entries.into(),
            size_sectors: size_sectors.into(),
            in_use: 0.into(),
            first_block: first_data
                .checked_mul(cluster.sectors())
                .ok_or(Problem::SizeLimit { size_sectors })?
                .into(),
            flags: FLAG_EMPTY.into(),
            ext_offset: 0.into(),
        };
        Self::parse(&raw)
    }

    /// Checks every field of a header by itself and against the others.
    pub fn parse(raw: &RawHeader) -> Result<Self, Problem> {
        let version = match raw.magic {
            MAGIC_V1 => Version::V1,
            MAGIC_V2 => Version::V2,
            _ => return Err(Problem::Magic),
        };
        let disk_type = raw.disk_type.get();
        if disk_type != DISK_TYPE {
            return Err(Problem::DiskType { disk_type });
        }
        let sectors = raw.cluster_sectors.get();
        let cluster = ClusterSize::from_sectors(sectors).ok_or(Problem::ClusterSize { sectors })?;
        let size_sectors = match version {
            Version::V1 => raw.size_sectors.get() & u64::from(u32::MAX),
            Version::V2 => raw.size_sectors.get(),
        };
        let nr_entries = raw.nr_entries.get();
        Self::check_size(version, cluster, nr_entries, size_sectors)?;
        let first_block = raw.first_block.get();
        let first_data = first_block >> cluster.log_sectors();
        let need = bat_clusters(cluster, nr_entries);
        if first_block & (cluster.sectors() - 1) != 0 || first_data < need {
            return Err(Problem::FirstBlock {
                sectors: first_block,
                need: u64::from(need) << cluster.log_sectors(),
            });
        }
        let mark = match raw.in_use.get() {
            0 => Mark::Closed,
            CLOSED_V21 => Mark::ClosedV21,
            IN_USE => Mark::InUse,
            value => return Err(Problem::InUseValue { value }),
        };
        let flags = raw.flags.get();
        if flags & !FLAG_EMPTY != 0 {
            return Err(Problem::Flags { flags, mark });
        }
        Ok(Self {
            version,
            cluster,
            nr_entries,
            size_sectors,
            first_data: ImageCluster(first_data),
            mark,
            flags,
            ext_offset: raw.ext_offset.get(),
            geometry: (raw.heads.get(), raw.cylinders.get()),
        })
    }

    fn check_size(
        version: Version,
        cluster: ClusterSize,
        nr_entries: u32,
        size_sectors: u64,
    ) -> Result<(), Problem> {
        if size_sectors == 0 {
            return Err(Problem::SizeZero);
        }
        let covered = u64::from(nr_entries) << cluster.log_sectors();
        let limit = match version {
            Version::V1 => u64::from(u32::MAX),
            // The disk's size in bytes must fit a signed 64-bit file position.
            Version::V2 => (i64::MAX.unsigned_abs() / SECTOR_BYTES).min(1 << 52),
        };
        if size_sectors > limit || nr_entries > ENTRIES_MAX {
            return Err(Problem::SizeLimit { size_sectors });
        }
        if size_sectors > covered {
            return Err(Problem::SizeOverBat {
                size_sectors,
                nr_entries,
            });
        }
        Ok(())
    }

    /// The header as bytes.
    pub fn encode(&self) -> RawHeader {
        RawHeader {
            magic: self.version.magic(),
            disk_type: DISK_TYPE.into(),
            heads: self.geometry.0.into(),
            cylinders: self.geometry.1.into(),
            cluster_sectors: self.cluster.sectors().into(),
            nr_entries: self.nr_entries.into(),
            size_sectors: self.size_sectors.into(),
            in_use: match self.mark {
                Mark::Closed => 0,
                Mark::ClosedV21 => CLOSED_V21,
                Mark::InUse => IN_USE,
            }
            .into(),
            first_block: (self.first_data.0 << self.cluster.log_sectors()).into(),
            flags: self.flags.into(),
            ext_offset: self.ext_offset.into(),
        }
    }

    /// The same header for an image opened for writing: marked, not called empty any more, and
    /// without the format extension, which would not be valid any more.
    pub fn opened(mut self) -> Self {
        self.mark = Mark::InUse;
        self.flags &= !FLAG_EMPTY;
        self.ext_offset = 0;
        self
    }

    /// The same header for an image closed cleanly; `is_empty` says that no entry is used.
    pub fn closed(mut self, is_empty: bool) -> Self {
        self.mark = Mark::Closed;
        if is_empty {
            self.flags |= FLAG_EMPTY;
        } else {
            self.flags &= !FLAG_EMPTY;
        }
        self
    }

    /// The same header of a closed image, with a format extension at `at` that is valid.
    pub fn with_extension(mut self, at: ImageCluster) -> Self {
        self.mark = Mark::ClosedV21;
        self.ext_offset = u64::from(at.0) * u64::from(self.cluster.sectors());
        self
    }

    /// The slot at `sector`, if a data cluster begins there.
    pub fn slot_at(&self, sector: u64) -> Option<ImageCluster> {
        let cluster = u64::from(self.cluster.sectors());
        if sector % cluster != 0 {
            return None;
        }
        let at = ImageCluster(u32::try_from(sector / cluster).ok()?);
        (at >= self.first_data).then_some(at)
    }

    /// Where the format extension is that [`Mark::ClosedV21`] says is valid.
    pub fn valid_extension(&self) -> Option<ImageCluster> {
        self.slot_at(self.ext_offset)
            .filter(|_| self.mark == Mark::ClosedV21)
    }

    /// The same header for an image that holds data.
    pub fn not_empty(mut self) -> Self {
        self.flags &= !FLAG_EMPTY;
        self
    }

    /// The same header with no more entries than the disk has clusters.
    pub fn without_surplus(mut self) -> Self {
        self.nr_entries = self.disk_clusters();
        self
    }

    /// The same header with a larger disk: BAT and first data cluster grow as needed.
    pub fn grown(self, size_sectors: u64) -> Result<Self, Problem> {
        let fresh = Self::new(self.version, self.cluster, size_sectors)?;
        Ok(Self {
            nr_entries: fresh.nr_entries.max(self.nr_entries),
            first_data: fresh.first_data.max(self.first_data),
            size_sectors,
            geometry: (self.geometry.0, fresh.geometry.1),
            ..self
        })
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        // Below 2^63, checked by `parse`.
        self.size_sectors * SECTOR_BYTES
    }

    /// Clusters of the disk, the last of which may be a part only; at most `nr_entries`.
    pub fn disk_clusters(&self) -> u32 {
        let clusters = self
            .size_sectors
            .div_ceil(u64::from(self.cluster.sectors()));
        u32::try_from(clusters).map_or(self.nr_entries, |n| n.min(self.nr_entries))
    }

    /// Number of index pages, at least one.
    pub fn nr_pages(&self) -> u32 {
        // At most `ENTRIES_MAX` entries.
        self.nr_entries
            .saturating_add(HEADER_SLOTS)
            .div_ceil(PAGE_SLOTS)
    }

    /// Bytes of header and BAT, padded to whole index pages: what has to be read. Index pages
    /// never reach past `first_data`, as a cluster holds whole pages.
    pub fn index_bytes(&self) -> u64 {
        u64::from(self.nr_pages()) * INDEX_PAGE_BYTES
    }

    /// Up to where the file of `old`, of which this is the header [grown](Self::grown), has to be made
    /// zero, in bytes. All in front of the first cluster if that has moved, as others take what is
    /// there for entries as their disk grows; else only as far as entries reach, as the first cluster
    /// of an image may be anywhere.
    pub fn zero_end(&self, old: &Self) -> u64 {
        match old.first_data < self.first_data {
            true => self.cluster.offset(self.first_data),
            false => self.index_bytes(),
        }
    }

    /// Most image clusters that entries of this version can name, plus one.
    pub fn slots_max(&self) -> u32 {
        match self.version {
            Version::V1 => u32::MAX >> self.cluster.log_sectors(),
            Version::V2 => u32::MAX,
        }
    }

    /// By how much the entry of a slot is larger than that of the slot before it.
    pub fn entry_of_next_slot(&self) -> u32 {
        match self.version {
            Version::V1 => self.cluster.sectors(),
            Version::V2 => 1,
        }
    }

    /// What an entry says: `None` for a hole, else the slot, or the value if it is not aligned.
    #[inline]
    pub fn decode_entry(&self, entry: u32) -> Result<Option<ImageCluster>, u32> {
        if entry == 0 {
            return Ok(None);
        }
        match self.version {
            Version::V1 if entry & (self.cluster.sectors() - 1) != 0 => Err(entry),
            Version::V1 => Ok(Some(ImageCluster(entry >> self.cluster.log_sectors()))),
            Version::V2 => Ok(Some(ImageCluster(entry))),
        }
    }

    /// The entry that names a slot below [`Self::slots_max`].
    pub fn encode_entry(&self, at: ImageCluster) -> u32 {
        match self.version {
            Version::V1 => at.0 << self.cluster.log_sectors(),
            Version::V2 => at.0,
        }
    }
}

/// Clusters that header and `nr_entries` BAT entries take.
pub fn bat_clusters(cluster: ClusterSize, nr_entries: u32) -> u32 {
    let bytes = HEADER_BYTES as u64 + u64::from(nr_entries) * ENTRY_BYTES;
    // At most 2^34 bytes in clusters of at least 2^15.
    cluster.ceil(bytes) as u32
}

/// Where an entry is: index page and u32 slot inside it.
pub const fn locate(cluster: Cluster) -> (u32, usize) {
    let slot = cluster.0 as u64 + HEADER_SLOTS as u64;
    (
        (slot / PAGE_SLOTS as u64) as u32,
        (slot % PAGE_SLOTS as u64) as usize,
    )
}

/// The guest clusters whose entries are in index page `page`, as a half-open range that may reach
/// past the last entry.
pub const fn page_range(page: u32) -> (u64, u64) {
    let first = page as u64 * PAGE_SLOTS as u64;
    let end = first + PAGE_SLOTS as u64 - HEADER_SLOTS as u64;
    (first.saturating_sub(HEADER_SLOTS as u64), end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    fn header() -> Header {
        Header::new(Version::V2, ClusterSize::DEFAULT, 2048 * 10).unwrap()
    }

    #[test]
    fn round_trip() {
        for version in [Version::V1, Version::V2] {
            for log in ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX {
                let c = ClusterSize::from_log(log).unwrap();
                for size in [1, u64::from(c.sectors()), u64::from(u32::MAX)] {
                    let h = Header::new(version, c, size).unwrap();
                    assert_eq!(Header::parse(&h.encode()), Ok(h));
                    assert!(h.index_bytes() <= c.offset(h.first_data));
                }
            }
        }
    }

    #[test]
    fn a_resized_header_is_a_header() {
        for log in ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX {
            let c = ClusterSize::from_log(log).unwrap();
            let h = Header::new(Version::V2, c, u64::from(c.sectors())).unwrap();
            for clusters in [1u64, 100, 1 << 20, 1 << 24] {
                let size = clusters * u64::from(c.sectors());
                let grown = h.grown(size).unwrap();
                assert_eq!(Header::parse(&grown.encode()), Ok(grown));
                let new = Header::new(Version::V2, c, size).unwrap();
                assert_eq!(
                    (grown.nr_entries, grown.first_data, grown.size_sectors),
                    (new.nr_entries, new.first_data, size)
                );
            }
        }
        let v1 = Header::new(Version::V1, ClusterSize::DEFAULT, 2048).unwrap();
        assert!(v1.grown(1 << 32).is_err());
        // Not a disk of one sector, which the low 32 bits say.
        assert!(Header::new(Version::V1, ClusterSize::DEFAULT, (1 << 32) + 1).is_err());
        assert!(header().grown(u64::MAX).is_err());
    }

    /// The largest BAT there can be, with the header's slots before it.
    #[test]
    fn the_largest_bat_is_counted_right() {
        let c = ClusterSize::DEFAULT;
        let size = u64::from(ENTRIES_MAX) * u64::from(c.sectors());
        let h = Header::new(Version::V2, c, size).unwrap();
        assert_eq!(h.nr_pages(), 1 << 22);
        assert!(h.index_bytes() <= c.offset(h.first_data));
        assert!(Header::new(Version::V2, c, size + 1).is_err());
        let mut raw = h.encode();
        raw.nr_entries = (ENTRIES_MAX + 1).into();
        assert!(Header::parse(&raw).is_err());
    }

    /// The bytes that `qemu-img create -f parallels x 1G` writes.
    #[test]
    fn qemu_header_parses() {
        let mut b = [0u8; 64];
        b[..16].copy_from_slice(&MAGIC_V2);
        for (off, v) in [
            (16, 2u32),
            (20, 16),
            (24, 4096),
            (28, 2048),
            (32, 1024),
            (36, 2097152),
            (48, 2048),
        ] {
            b[off..off + 4].copy_from_slice(&v.to_le_bytes());
        }
        let h = Header::parse(RawHeader::ref_from_bytes(&b[..]).unwrap()).unwrap();
        assert_eq!(
            (h.nr_entries, h.size_sectors, h.first_data),
            (1024, 2097152, ImageCluster(1))
        );
        assert_eq!(h.mark, Mark::Closed);
    }

    #[test]
    fn bad_fields_are_named() {
        let good = header().encode();
        let bad = |f: fn(&mut RawHeader)| {
            let mut raw = good;
            f(&mut raw);
            Header::parse(&raw).unwrap_err()
        };
        assert_eq!(bad(|r| r.magic[0] = 0), Problem::Magic);
        assert_eq!(
            bad(|r| r.disk_type = 3.into()),
            Problem::DiskType { disk_type: 3 }
        );
        assert_eq!(
            bad(|r| r.cluster_sectors = 63.into()),
            Problem::ClusterSize { sectors: 63 }
        );
        assert_eq!(bad(|r| r.size_sectors = 0.into()), Problem::SizeZero);
        assert!(matches!(
            bad(|r| r.size_sectors = u64::MAX.into()),
            Problem::SizeLimit { .. }
        ));
        assert!(matches!(
            bad(|r| r.nr_entries = 9.into()),
            Problem::SizeOverBat { .. }
        ));
        assert!(matches!(
            bad(|r| r.nr_entries = u32::MAX.into()),
            Problem::SizeLimit { .. }
        ));
        assert!(matches!(
            bad(|r| r.first_block = 0.into()),
            Problem::FirstBlock { .. }
        ));
        assert!(matches!(
            bad(|r| r.first_block = 2049.into()),
            Problem::FirstBlock { .. }
        ));
        assert_eq!(
            bad(|r| r.in_use = 7.into()),
            Problem::InUseValue { value: 7 }
        );
        let flags = |mark| Problem::Flags { flags: 2, mark };
        assert_eq!(bad(|r| r.flags = 2.into()), flags(Mark::Closed));
        let marked = bad(|r| {
            r.flags = 2.into();
            r.in_use = IN_USE.into();
        });
        assert_eq!(marked, flags(Mark::InUse));
    }

    #[test]
    fn entries_round_trip() {
        let v1 = Header::new(Version::V1, ClusterSize::DEFAULT, 2048).unwrap();
        let v2 = header();
        for h in [v1, v2] {
            for at in [1, 2, h.slots_max() - 1] {
                let at = ImageCluster(at);
                assert_eq!(h.decode_entry(h.encode_entry(at)), Ok(Some(at)));
            }
        }
        assert_eq!(v1.decode_entry(2049), Err(2049));
    }

    #[test]
    fn pages_partition_the_clusters() {
        for c in [0, 1, 1007, 1008, 1009, 2031, 2032, u32::MAX - 16] {
            let (page, slot) = locate(Cluster(c));
            let (first, end) = page_range(page);
            assert!((first..end).contains(&u64::from(c)));
            let lead = if page == 0 { HEADER_SLOTS as u64 } else { 0 };
            assert_eq!(slot as u64, u64::from(c) - first + lead);
        }
    }
}

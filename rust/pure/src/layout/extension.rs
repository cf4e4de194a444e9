// SPDX-License-Identifier: GPL-2.0
//! The format extension of a ploop1 image: one cluster that lists features, of which the dirty
//! bitmap is the only one known.
//!
//! ```text
//! 0    u64 magic, 16 bytes MD5 of the rest of the cluster
//! 24   features: u64 magic, u64 flags, u32 bytes of data, u32 0, data, padded to 8;
//!      ended by one whose magic is 0
//! ```
//!
//! A bitmap's data is its size in sectors, a 16-byte id, the granularity, the number of L1
//! entries, and these: 0 for all clear, 1 for all set, else the sector of a cluster of bitmap.
//! The extension holds only while [`Mark::ClosedV21`](super::ploop1::Mark) says so. The driver keeps
//! a device's checkpoints there while the image is closed; to everybody else what matters is which
//! clusters it takes, so that they are not given away.

use super::ploop1::Header;
use crate::units::{ClusterSize, ImageCluster};
use core::mem::size_of;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// [`RawExtension::magic`].
pub const MAGIC: u64 = 0xAB23_4CEF_23DC_EA87;
/// [`RawFeature::magic`] of a dirty bitmap.
pub const BITMAP: u64 = 0x2038_5FAE_252C_B34A;
/// Where the part covered by [`RawExtension::md5`] begins.
pub const DIGEST_FROM: usize = 24;

/// Head of the extension cluster.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawExtension {
    /// [`MAGIC`].
    pub magic: U64,
    /// MD5 of the cluster from [`DIGEST_FROM`] on.
    pub md5: [u8; 16],
}

/// Head of a feature.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawFeature {
    /// Which feature; 0 ends the list.
    pub magic: U64,
    /// Bit 0: must be understood before the image is changed. Bit 1: keep if unknown.
    pub flags: U64,
    /// Bytes of data that follow, without padding.
    pub data_bytes: U32,
    /// Unused.
    pub unused: U32,
}

/// Head of a dirty bitmap's data; the L1 entries follow.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawBitmap {
    /// Size of the disk in sectors.
    pub size_sectors: U64,
    /// UUID.
    pub id: [u8; 16],
    /// Sectors a bit stands for, a power of two.
    pub granularity: U32,
    /// Number of L1 entries.
    pub nr_l1: U32,
}

const _: () = {
    assert!(size_of::<RawExtension>() == DIGEST_FROM);
    assert!(size_of::<RawFeature>() == 24);
    assert!(size_of::<RawBitmap>() == 32);
};

/// The extension is damaged, or names a place that cannot be its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid;

/// What an extension is found to take or to contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// The cluster of the extension itself.
    Slot(ImageCluster),
    /// A dirty bitmap; its parts follow, in order.
    Bitmap {
        /// UUID.
        id: [u8; 16],
        /// Sectors a bit stands for.
        granularity: u32,
    },
    /// What a cluster of bitmap would hold.
    Part(Part),
    /// A feature that is not known, and may take clusters that are not known either.
    Unknown {
        /// Its magic.
        magic: u64,
    },
}

impl Item {
    /// The cluster of the image file that this takes.
    pub fn slot(self) -> Option<ImageCluster> {
        match self {
            Self::Slot(at) | Self::Part(Part::At(at)) => Some(at),
            Self::Part(Part::Clear | Part::Set) | Self::Bitmap { .. } | Self::Unknown { .. } => {
                None
            }
        }
    }
}

/// An L1 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// No bit is set.
    Clear,
    /// All bits are set.
    Set,
    /// The bits are there.
    At(ImageCluster),
}

impl Part {
    fn encode(self, cluster: ClusterSize) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => 1,
            Self::At(at) => u64::from(at.0) * u64::from(cluster.sectors()),
        }
    }
}

/// Reads the extension in `bytes`, its cluster, whose part from [`DIGEST_FROM`] on has the MD5
/// `digest`. `sink` gets what it holds; when the answer is `Invalid`, what it got is void.
pub fn read(
    header: &Header,
    bytes: &[u8],
    digest: [u8; 16],
    mut sink: impl FnMut(Item),
) -> Result<(), Invalid> {
    let (head, mut rest) = RawExtension::ref_from_prefix(bytes).map_err(|_| Invalid)?;
    if head.magic.get() != MAGIC || head.md5 != digest {
        return Err(Invalid);
    }
    sink(Item::Slot(
        header.slot_at(header.ext_offset).ok_or(Invalid)?,
    ));
    loop {
        let (feature, tail) = RawFeature::ref_from_prefix(rest).map_err(|_| Invalid)?;
        let magic = feature.magic.get();
        if magic == 0 {
            return Ok(());
        }
        let len = usize::try_from(feature.data_bytes.get()).map_err(|_| Invalid)?;
        let data = tail.get(..len).ok_or(Invalid)?;
        if magic == BITMAP {
            bitmap(header, data, &mut sink)?;
        } else {
            sink(Item::Unknown { magic });
        }
        // At most a cluster: no overflow.
        rest = tail.get(len.next_multiple_of(8)..).ok_or(Invalid)?;
    }
}

fn bitmap(header: &Header, data: &[u8], sink: &mut impl FnMut(Item)) -> Result<(), Invalid> {
    let (head, l1) = RawBitmap::ref_from_prefix(data).map_err(|_| Invalid)?;
    let granularity = head.granularity.get();
    let nr = usize::try_from(head.nr_l1.get()).map_err(|_| Invalid)?;
    if head.size_sectors.get() != header.size_sectors || !granularity.is_power_of_two() {
        return Err(Invalid);
    }
    let (l1, _) = <[U64]>::ref_from_prefix_with_elems(l1, nr).map_err(|_| Invalid)?;
    sink(Item::Bitmap {
        id: head.id,
        granularity,
    });
    for entry in l1 {
        sink(Item::Part(match entry.get() {
            0 => Part::Clear,
            1 => Part::Set,
            sector => Part::At(header.slot_at(sector).ok_or(Invalid)?),
        }));
    }
    Ok(())
}

/// How the bits of a bitmap lie in clusters.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    size_sectors: u64,
    granularity: u32,
    cluster: ClusterSize,
}

impl Shape {
    /// Of a bitmap with a bit for each `granularity` sectors of the disk of `header`, a power of two.
    pub fn new(header: &Header, granularity: u32) -> Self {
        Self {
            size_sectors: header.size_sectors,
            granularity,
            cluster: header.cluster,
        }
    }

    /// Bits there are.
    pub fn nr_bits(self) -> u64 {
        self.size_sectors.div_ceil(u64::from(self.granularity))
    }

    /// Words of 64 bits that hold them.
    pub fn nr_words(self) -> u64 {
        self.nr_bits().div_ceil(64)
    }

    /// Words that a cluster holds.
    pub fn part_words(self) -> u64 {
        self.cluster.bytes() / 8
    }

    /// L1 entries.
    pub fn nr_parts(self) -> u64 {
        self.nr_words().div_ceil(self.part_words())
    }

    /// Bytes of the extension's cluster that the bitmap takes.
    pub fn feature_bytes(self) -> u64 {
        (size_of::<RawFeature>() + size_of::<RawBitmap>()) as u64 + 8 * self.nr_parts()
    }

    /// Those bits of word `idx` that are of the disk.
    pub fn mask(self, idx: u64) -> u64 {
        match self.nr_bits().saturating_sub(idx.saturating_mul(64)) {
            0 => 0,
            nr @ 1..64 => (1 << nr) - 1,
            64.. => u64::MAX,
        }
    }

    /// The words of a part.
    pub fn words(self, part: u64) -> core::ops::Range<u64> {
        let first = part.saturating_mul(self.part_words());
        first..first.saturating_add(self.part_words()).min(self.nr_words())
    }

    /// What is to be said of a part whose bits `word` gives; `place` is where it would be written.
    pub fn part(self, part: u64, place: ImageCluster, word: impl Fn(u64) -> u64) -> Part {
        let (mut is_clear, mut is_set) = (true, true);
        for idx in self.words(part) {
            let (mask, bits) = (self.mask(idx), word(idx));
            is_clear &= bits & mask == 0;
            is_set &= bits & mask == mask;
            if !is_clear && !is_set {
                return Part::At(place);
            }
        }
        match is_clear {
            true => Part::Clear,
            false => Part::Set,
        }
    }

    /// Gives `sink` the feature, its head first and then entry by entry, as `part` says.
    pub fn write<E>(
        self,
        id: [u8; 16],
        mut part: impl FnMut(u64) -> Result<Part, E>,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let nr = self.nr_parts();
        let feature = RawFeature {
            magic: BITMAP.into(),
            flags: 0.into(),
            // At most a cluster, says who calls.
            data_bytes: (self.feature_bytes() as u32 - size_of::<RawFeature>() as u32).into(),
            unused: 0.into(),
        };
        let bitmap = RawBitmap {
            size_sectors: self.size_sectors.into(),
            id,
            granularity: self.granularity.into(),
            nr_l1: (nr as u32).into(),
        };
        sink(feature.as_bytes())?;
        sink(bitmap.as_bytes())?;
        for nr in 0..nr {
            sink(&part(nr)?.encode(self.cluster).to_le_bytes())?;
        }
        Ok(())
    }
}

/// The head of an extension with that digest.
pub fn head(md5: [u8; 16]) -> [u8; DIGEST_FROM] {
    let magic = MAGIC.into();
    zerocopy::transmute!(RawExtension { magic, md5 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ploop1::Version;
    use crate::units::ClusterSize;
    use std::vec::Vec;
    use zerocopy::IntoBytes;

    fn header() -> Header {
        let cluster = ClusterSize::from_log(6).unwrap();
        let mut h = Header::new(Version::V2, cluster, 64 * 100).unwrap();
        h.ext_offset = 64 * 5;
        h
    }

    fn bytes(magic: u64, l1: &[u64], nr_l1: u32) -> Vec<u8> {
        let bitmap = RawBitmap {
            size_sectors: (64 * 100).into(),
            id: [7; 16],
            granularity: 128.into(),
            nr_l1: nr_l1.into(),
        };
        let feature = RawFeature {
            magic: magic.into(),
            flags: 0.into(),
            data_bytes: (32 + 8 * l1.len() as u32).into(),
            unused: 0.into(),
        };
        let head = RawExtension {
            magic: MAGIC.into(),
            md5: [1; 16],
        };
        let mut v = head.as_bytes().to_vec();
        v.extend(feature.as_bytes());
        v.extend(bitmap.as_bytes());
        for e in l1 {
            v.extend(e.to_le_bytes());
        }
        v.resize(32768, 0);
        v
    }

    fn items(b: &[u8], digest: u8) -> Result<Vec<Item>, Invalid> {
        let mut v = Vec::new();
        read(&header(), b, [digest; 16], |i| v.push(i))?;
        Ok(v)
    }

    #[test]
    fn a_bitmap_takes_its_clusters() {
        let id = [7; 16];
        let bitmap = Item::Bitmap {
            id,
            granularity: 128,
        };
        let at = |n| Item::Part(Part::At(ImageCluster(n)));
        let own = Item::Slot(ImageCluster(5));
        let (clear, set) = (Item::Part(Part::Clear), Item::Part(Part::Set));
        let all = items(&bytes(BITMAP, &[0, 1, 64 * 6, 64 * 4], 4), 1).unwrap();
        assert_eq!(all, [own, bitmap, clear, set, at(6), at(4)]);
        let slots: Vec<_> = all.into_iter().filter_map(Item::slot).collect();
        assert_eq!(slots, [5, 6, 4].map(ImageCluster));
        assert_eq!(
            items(&bytes(9, &[0], 1), 1),
            Ok(std::vec![own, Item::Unknown { magic: 9 }])
        );
    }

    #[test]
    fn what_is_written_is_read() {
        // Clusters of 32 KiB hold 2^18 bits: of 512 bytes each, 128 MiB of disk.
        let cluster = ClusterSize::from_log(6).unwrap();
        let mut header = Header::new(Version::V2, cluster, 5 * (1 << 18) + 70).unwrap();
        let shape = Shape::new(&header, 1);
        assert_eq!((shape.nr_parts(), shape.part_words()), (6, 1 << 12));
        assert_eq!(shape.nr_words(), 5 * (1 << 12) + 2);
        // All bits, also those that are not there; none; one, at either end; all; all but one.
        let word = |idx: u64| match (idx >> 12, idx & 0xfff) {
            (0 | 4, _) => u64::MAX,
            (2, 0) => 1,
            (3, 0xfff) => 1 << 63,
            (5, 0) => u64::MAX,
            (5, 1) => 0x3f,
            _ => 0,
        };
        let mut next = 99;
        let part = |nr| {
            let part = shape.part(nr, ImageCluster(next), word);
            if part == Part::At(ImageCluster(next)) {
                next += 1;
            }
            Ok::<_, ()>(part)
        };
        let mut v = head([1; 16]).to_vec();
        let sink = |b: &[u8]| {
            v.extend(b);
            Ok::<_, ()>(())
        };
        shape.write([7; 16], part, sink).unwrap();
        assert_eq!(v.len() as u64, DIGEST_FROM as u64 + shape.feature_bytes());
        v.resize(cluster.bytes() as usize, 0);
        header = header.closed(false).with_extension(ImageCluster(98));
        let mut seen = Vec::new();
        read(&header, &v, [1; 16], |i| seen.push(i)).unwrap();
        let at = |n| Item::Part(Part::At(ImageCluster(n)));
        let (clear, set) = (Item::Part(Part::Clear), Item::Part(Part::Set));
        let bitmap = Item::Bitmap {
            id: [7; 16],
            granularity: 1,
        };
        let own = Item::Slot(ImageCluster(98));
        let all = [own, bitmap, set, clear, at(99), at(100), set, set];
        assert_eq!(seen, all);
        assert_eq!(shape.mask(5 * (1 << 12) + 1), 0x3f);
        assert_eq!(shape.mask(5 * (1 << 12) + 2), 0);
    }

    #[test]
    fn damage_is_noticed() {
        let good = bytes(BITMAP, &[64 * 6], 1);
        assert!(items(&good, 1).is_ok());
        assert_eq!(items(&good, 2), Err(Invalid));
        assert_eq!(items(&good[..100], 1), Err(Invalid));
        assert_eq!(items(&bytes(BITMAP, &[64 * 6], u32::MAX), 1), Err(Invalid));
        assert_eq!(items(&bytes(BITMAP, &[65], 1), 1), Err(Invalid));
        assert_eq!(items(&bytes(BITMAP, &[u64::MAX], 1), 1), Err(Invalid));
        let mut endless = good.clone();
        for b in &mut endless[24..] {
            *b = 0xff;
        }
        assert_eq!(items(&endless, 1), Err(Invalid));
    }
}

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
//! The extension holds only while [`Mark::ClosedV21`](super::ploop1::Mark) says so. Nobody here
//! uses a bitmap; what matters is which clusters it takes, so that they are not given away.

use super::ploop1::Header;
use crate::units::ImageCluster;
use zerocopy::little_endian::{U32, U64};
use zerocopy::FromBytes;
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
    use core::mem::size_of;
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
    /// A cluster of the image file.
    Slot(ImageCluster),
    /// A dirty bitmap.
    Bitmap {
        /// UUID.
        id: [u8; 16],
        /// Sectors a bit stands for.
        granularity: u32,
    },
    /// A feature that is not known, and may take clusters that are not known either.
    Unknown {
        /// Its magic.
        magic: u64,
    },
}

/// The slot at `sector`, if a data cluster begins there.
pub fn slot(header: &Header, sector: u64) -> Option<ImageCluster> {
    let cluster = u64::from(header.cluster.sectors());
    if sector % cluster != 0 {
        return None;
    }
    let at = ImageCluster(u32::try_from(sector / cluster).ok()?);
    (at >= header.first_data).then_some(at)
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
    sink(Item::Slot(slot(header, header.ext_offset).ok_or(Invalid)?));
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
    for sector in l1.iter().map(|e| e.get()).filter(|s| *s > 1) {
        sink(Item::Slot(slot(header, sector).ok_or(Invalid)?));
    }
    Ok(())
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
        let at = |n| Item::Slot(ImageCluster(n));
        assert_eq!(
            items(&bytes(BITMAP, &[0, 1, 64 * 6, 64 * 4], 4), 1),
            Ok(std::vec![at(5), bitmap, at(6), at(4)])
        );
        assert_eq!(
            items(&bytes(9, &[0], 1), 1),
            Ok(std::vec![at(5), Item::Unknown { magic: 9 }])
        );
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

// SPDX-License-Identifier: GPL-2.0
//! The bytes of a ploop1 header, and what its numbers mean; nothing is checked here.

use zerocopy::little_endian::{U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header; the first BAT entry follows.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a BAT entry.
pub const ENTRY_BYTES: u64 = 4;
/// BAT entries that the header takes the place of.
pub const HEADER_SLOTS: u32 = 16;
/// BAT entries of an index page; page 0 holds [`HEADER_SLOTS`] fewer.
pub const PAGE_SLOTS: u32 = 1024;

/// Magic of version 1, whose BAT counts sectors.
pub const MAGIC_V1: [u8; 16] = *b"WithoutFreeSpace";
/// Magic of version 2, whose BAT counts clusters.
pub const MAGIC_V2: [u8; 16] = *b"WithouFreSpacExt";
/// The only value of [`RawHeader::disk_type`].
pub const DISK_TYPE: u32 = 2;
/// [`RawHeader::in_use`]: open for writing, or not closed cleanly.
pub const IN_USE: u32 = 0x746F_6E59;
/// [`RawHeader::in_use`]: closed by software that keeps the format extension valid.
pub const CLOSED_V21: u32 = 0x312E_3276;
/// [`RawHeader::flags`]: no data was ever written.
pub const FLAG_EMPTY: u32 = 1;
/// [`RawHeader::flags`]: a conversion from version 1 to 2 was interrupted.
pub const FLAG_CONVERTING: u32 = 2;

/// Most BAT entries of an image: with the slots of the header they still count in 32 bits.
pub const ENTRIES_MAX: u32 = u32::MAX - HEADER_SLOTS;

/// The header as it is on disk, nothing checked.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct RawHeader {
    /// [`MAGIC_V1`] or [`MAGIC_V2`].
    pub magic: [u8; 16],
    /// [`DISK_TYPE`].
    pub disk_type: U32,
    /// Geometry, for information only.
    pub heads: U32,
    /// Geometry, for information only.
    pub cylinders: U32,
    /// Cluster size in sectors.
    pub cluster_sectors: U32,
    /// Number of BAT entries: disk size in clusters, rounded up.
    pub nr_entries: U32,
    /// Disk size in sectors. Version 1 uses the low 32 bits only.
    pub size_sectors: U64,
    /// [`IN_USE`], [`CLOSED_V21`], or 0: closed, extension not valid.
    pub in_use: U32,
    /// First data cluster, in sectors, a multiple of the cluster size.
    pub first_block: U32,
    /// `FLAG_*`.
    pub flags: U32,
    /// Format extension in sectors, 0 for none.
    pub ext_offset: U64,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(offset_of!(RawHeader, disk_type) == 16);
    assert!(offset_of!(RawHeader, heads) == 20);
    assert!(offset_of!(RawHeader, cylinders) == 24);
    assert!(offset_of!(RawHeader, cluster_sectors) == 28);
    assert!(offset_of!(RawHeader, nr_entries) == 32);
    assert!(offset_of!(RawHeader, size_sectors) == 36);
    assert!(offset_of!(RawHeader, in_use) == 44);
    assert!(offset_of!(RawHeader, first_block) == 48);
    assert!(offset_of!(RawHeader, flags) == 52);
    assert!(offset_of!(RawHeader, ext_offset) == 56);
};

/// Version of the format; decides the unit of BAT entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Entries count sectors; at most 2^32 - 1 sectors.
    V1,
    /// Entries count clusters.
    V2,
}

impl Version {
    /// 1 or 2.
    pub const fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }

    pub(super) const fn magic(self) -> [u8; 16] {
        match self {
            Self::V1 => MAGIC_V1,
            Self::V2 => MAGIC_V2,
        }
    }
}

/// How the image was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Closed; the format extension, if any, is not valid.
    Closed,
    /// Closed; the format extension is valid.
    ClosedV21,
    /// Open for writing somewhere, or left so by a crash.
    InUse,
}

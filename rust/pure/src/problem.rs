// SPDX-License-Identifier: GPL-2.0
//! What can be wrong with an image, in words, and what mending it costs.

use crate::layout::ploop1::raw::{Mark, FLAG_CONVERTING};
use core::fmt;

/// One thing wrong with an image. Displayed, it names the field, its value and what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// The file ends inside the header or the BAT.
    Truncated {
        /// Bytes there should be at least.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// The magic is neither version's.
    Magic,
    /// The disk type is not 2.
    DiskType {
        /// The value.
        disk_type: u32,
    },
    /// The cluster size is not a power of two from 64 to 131072 sectors.
    ClusterSize {
        /// The value in sectors.
        sectors: u32,
    },
    /// The disk has no sectors.
    SizeZero,
    /// The disk is larger than the format version allows.
    SizeLimit {
        /// The value in sectors.
        size_sectors: u64,
    },
    /// The disk is larger than its BAT entries cover.
    SizeOverBat {
        /// The size in sectors.
        size_sectors: u64,
        /// BAT entries.
        nr_entries: u32,
    },
    /// FirstBlockOffset is not aligned or lies inside the BAT.
    FirstBlock {
        /// The value in sectors.
        sectors: u32,
        /// The least it must be, in sectors.
        need: u64,
    },
    /// DiskInUse has a value that no software writes.
    InUseValue {
        /// The value.
        value: u32,
    },
    /// A flag is set that says the image is being converted, or that is not known.
    Flags {
        /// The value.
        flags: u32,
        /// How the image was left.
        mark: Mark,
    },
    /// The image is marked in use.
    InUse,
    /// The flag that no data was ever written is set, but entries name slots. Only the tool looks
    /// at it; the kernel clears it on opening for writing.
    EmptyFlag,
    /// The file's length is not a multiple of the cluster size.
    TornTail {
        /// Length in bytes.
        len: u64,
    },
    /// A version 1 entry is not a multiple of the cluster size.
    EntryMisaligned {
        /// The guest cluster.
        cluster: u32,
        /// The entry as stored, in sectors.
        entry: u32,
    },
    /// An entry points into header or BAT.
    EntryInHeader {
        /// The guest cluster.
        cluster: u32,
        /// The image cluster.
        at: u32,
    },
    /// An entry points past the end of the file.
    EntryPastEnd {
        /// The guest cluster.
        cluster: u32,
        /// The image cluster.
        at: u32,
        /// Whole clusters in the file.
        end: u32,
    },
    /// An entry points to the last cluster, which the file holds only in part.
    EntryTorn {
        /// The guest cluster.
        cluster: u32,
        /// The image cluster.
        at: u32,
    },
    /// Two entries point to one image cluster.
    EntryDuplicate {
        /// The guest cluster found second.
        cluster: u32,
        /// The image cluster.
        at: u32,
    },
    /// An entry in order names a slot for a cluster wholly past the end of the disk. Only the tool
    /// looks for these; the kernel takes them as they are.
    EntryPastDisk {
        /// The guest cluster.
        cluster: u32,
        /// Clusters of the disk.
        end: u32,
    },
    /// The format extension is not valid. Only the tool looks there; the kernel drops it anyway.
    Extension {
        /// Its place in sectors.
        sector: u64,
    },
}

/// What mending a problem costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cure {
    /// Nothing is lost: done at attach without asking.
    Lossless,
    /// Some data is lost or may be wrong: only on request.
    Lossy,
    /// Cannot be mended.
    None,
}

impl Problem {
    /// What mending it costs.
    pub fn cure(self) -> Cure {
        match self {
            Self::InUse
            | Self::EmptyFlag
            | Self::TornTail { .. }
            | Self::EntryTorn { .. }
            | Self::EntryPastDisk { .. }
            | Self::Extension { .. } => Cure::Lossless,
            Self::EntryMisaligned { .. }
            | Self::EntryInHeader { .. }
            | Self::EntryPastEnd { .. }
            | Self::EntryDuplicate { .. } => Cure::Lossy,
            Self::Truncated { .. }
            | Self::Magic
            | Self::DiskType { .. }
            | Self::ClusterSize { .. }
            | Self::SizeZero
            | Self::SizeLimit { .. }
            | Self::SizeOverBat { .. }
            | Self::FirstBlock { .. }
            | Self::InUseValue { .. }
            | Self::Flags { .. } => Cure::None,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Truncated { need, have } => {
                write!(f, "file has {have} bytes, header and BAT need {need}")
            }
            Self::Magic => write!(f, "m_Sig (magic) is not that of a ploop1 image"),
            Self::DiskType { disk_type } => write!(f, "m_Type is {disk_type}, not 2"),
            Self::ClusterSize { sectors } => write!(
                f,
                "m_Sectors (cluster size) is {sectors} sectors, not a power of two from 64 to 131072"
            ),
            Self::SizeZero => write!(f, "m_SizeInSectors (disk size) is 0"),
            Self::SizeLimit { size_sectors } => write!(
                f,
                "m_SizeInSectors (disk size) is {size_sectors}, over the limit of the format"
            ),
            Self::SizeOverBat {
                size_sectors,
                nr_entries,
            } => write!(
                f,
                "m_SizeInSectors (disk size) is {size_sectors}, more than m_Size of {nr_entries} clusters"
            ),
            Self::FirstBlock { sectors, need } => write!(
                f,
                "m_FirstBlockOffset is {sectors} sectors, not a cluster multiple of at least {need}"
            ),
            Self::InUseValue { value } => write!(f, "m_DiskInUse has the unknown value {value:#x}"),
            Self::Flags { flags, .. } if flags & FLAG_CONVERTING != 0 => {
                write!(f, "m_Flags is {flags:#x}: a version conversion was interrupted")
            }
            Self::Flags { flags, .. } => write!(f, "m_Flags has unknown bits: {flags:#x}"),
            Self::InUse => write!(f, "m_DiskInUse is set: the image was not closed cleanly"),
            Self::EmptyFlag => write!(
                f,
                "m_Flags says that no data was ever written, but there are BAT entries in use"
            ),
            Self::TornTail { len } => {
                write!(f, "file length {len} is not a multiple of the cluster size")
            }
            Self::EntryMisaligned { cluster, entry } => write!(
                f,
                "BAT[{cluster}] is sector {entry}, not a multiple of the cluster size"
            ),
            Self::EntryInHeader { cluster, at } => {
                write!(f, "BAT[{cluster}] is image cluster {at}, inside header or BAT")
            }
            Self::EntryPastEnd { cluster, at, end } => write!(
                f,
                "BAT[{cluster}] is image cluster {at}, but the file ends at {end}"
            ),
            Self::EntryTorn { cluster, at } => write!(
                f,
                "BAT[{cluster}] is image cluster {at}, of which the file holds only a part"
            ),
            Self::EntryDuplicate { cluster, at } => write!(
                f,
                "BAT[{cluster}] is image cluster {at}, which another entry names too"
            ),
            Self::EntryPastDisk { cluster, end } => write!(
                f,
                "BAT[{cluster}] is in use, but the disk ends at cluster {end}"
            ),
            Self::Extension { sector } => write!(
                f,
                "m_FormatExtensionOffset is sector {sector}, where there is no valid extension"
            ),
        }
    }
}

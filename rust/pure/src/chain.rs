// SPDX-License-Identifier: GPL-2.0
//! Which delta may be put on top of which.

use crate::layout::ploop1::Version;
use crate::units::ClusterSize;
use core::fmt;

/// Most deltas of a device: levels are numbered 0 to 254.
pub const DELTAS_MAX: usize = 255;

/// The format of a delta, as far as its neighbours care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Raw.
    Raw,
    /// ploop1 of a version.
    Ploop1(Version),
}

/// What matters of a delta to the one above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Format.
    pub kind: Kind,
    /// Cluster size.
    pub cluster: ClusterSize,
    /// Size of the disk in sectors.
    pub size_sectors: u64,
    /// It may be written.
    pub is_writable: bool,
}

/// Why a delta cannot be put on top of a chain. Displayed, it names both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit {
    /// There are [`DELTAS_MAX`] already.
    TooMany,
    /// Only the base can be raw.
    RawAbove,
    /// What is to become a lower delta is open for writing.
    BelowWritable,
    /// The cluster sizes differ, in sectors.
    Cluster {
        /// Of the delta below.
        below: u32,
        /// Of the new one.
        new: u32,
    },
    /// The format versions differ.
    Version {
        /// Of the delta below.
        below: u32,
        /// Of the new one.
        new: u32,
    },
    /// The new delta is smaller, in sectors.
    Smaller {
        /// Size of the delta below.
        below: u64,
        /// Size of the new one.
        new: u64,
    },
    /// The size is not that of the delta it follows or replaces, in sectors.
    SizeDiffers {
        /// Size of that delta.
        below: u64,
        /// Size of the new one.
        new: u64,
    },
    /// The new top of a running device holds clusters.
    NotEmpty,
    /// The format is not that of the delta it is to replace.
    Format,
    /// The new top of a running device is not open for writing.
    ReadOnly,
    /// The delta below ends inside a cluster where the new one, or its own file, does not.
    Uneven {
        /// Its size in sectors.
        below: u64,
    },
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooMany => write!(f, "there are {DELTAS_MAX} deltas already"),
            Self::RawAbove => write!(f, "a raw image can only be the base"),
            Self::BelowWritable => write!(f, "the delta below is open for writing"),
            Self::Cluster { below, new } => {
                write!(f, "cluster size is {new} sectors, that of the delta below is {below}")
            }
            Self::Version { below, new } => {
                write!(f, "format version is {new}, that of the delta below is {below}")
            }
            Self::Smaller { below, new } => {
                write!(f, "disk size is {new} sectors, less than {below} of the delta below")
            }
            Self::SizeDiffers { below, new } => {
                write!(f, "disk size is {new} sectors, not {below}")
            }
            Self::NotEmpty => write!(f, "it holds data"),
            Self::Format => write!(f, "its format is not that of the image it is to replace"),
            Self::ReadOnly => write!(f, "it is open for reading only"),
            Self::Uneven { below } => write!(
                f,
                "disk size of the delta below is {below} sectors, not a multiple of the cluster size"
            ),
        }
    }
}

/// Whether `new` may be put on top of a chain of `nr` deltas whose top is `below`.
pub fn admit(nr: usize, below: &Member, new: &Member) -> Result<(), Misfit> {
    if nr >= DELTAS_MAX {
        return Err(Misfit::TooMany);
    }
    if new.kind == Kind::Raw {
        return Err(Misfit::RawAbove);
    }
    if below.is_writable {
        return Err(Misfit::BelowWritable);
    }
    if below.cluster != new.cluster {
        return Err(Misfit::Cluster {
            below: below.cluster.sectors(),
            new: new.cluster.sectors(),
        });
    }
    match (below.kind, new.kind) {
        (Kind::Ploop1(b), Kind::Ploop1(n)) if b != n => {
            return Err(Misfit::Version {
                below: b.number(),
                new: n.number(),
            });
        }
        (Kind::Raw | Kind::Ploop1(_), Kind::Raw | Kind::Ploop1(_)) => {}
    }
    let (b, n) = (below.size_sectors, new.size_sectors);
    if n < b {
        return Err(Misfit::Smaller { below: b, new: n });
    }
    // A raw file's last cluster would be shorter than a slot; and what lies behind the end of a
    // smaller disk must not show in a larger one.
    let is_uneven = b & u64::from(below.cluster.sectors() - 1) != 0;
    if is_uneven && (below.kind == Kind::Raw || n != b) {
        return Err(Misfit::Uneven { below: b });
    }
    Ok(())
}

/// Whether `new`, which may hold no cluster, may become the top of a running device with `nr`
/// deltas whose top is `below`, which is then only read.
pub fn admit_snapshot(
    nr: usize,
    below: &Member,
    new: &Member,
    is_empty: bool,
) -> Result<(), Misfit> {
    let sealed = Member {
        is_writable: false,
        ..*below
    };
    admit(nr, &sealed, new)?;
    if !new.is_writable {
        return Err(Misfit::ReadOnly);
    }
    let (b, n) = (below.size_sectors, new.size_sectors);
    if n != b {
        return Err(Misfit::SizeDiffers { below: b, new: n });
    }
    if !is_empty {
        return Err(Misfit::NotEmpty);
    }
    Ok(())
}

/// Whether `new` may take the place of `old`, which is said to hold the same.
pub fn admit_replacement(old: &Member, new: &Member) -> Result<(), Misfit> {
    let same_kind = match (old.kind, new.kind) {
        (Kind::Raw, Kind::Raw) => true,
        (Kind::Ploop1(o), Kind::Ploop1(n)) if o != n => {
            return Err(Misfit::Version {
                below: o.number(),
                new: n.number(),
            });
        }
        (Kind::Ploop1(_), Kind::Ploop1(_)) => true,
        (Kind::Raw, Kind::Ploop1(_)) | (Kind::Ploop1(_), Kind::Raw) => false,
    };
    if !same_kind {
        return Err(Misfit::Format);
    }
    if old.cluster != new.cluster {
        return Err(Misfit::Cluster {
            below: old.cluster.sectors(),
            new: new.cluster.sectors(),
        });
    }
    if old.size_sectors != new.size_sectors {
        return Err(Misfit::SizeDiffers {
            below: old.size_sectors,
            new: new.size_sectors,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Member = Member {
        kind: Kind::Ploop1(Version::V2),
        cluster: ClusterSize::DEFAULT,
        size_sectors: 4096,
        is_writable: false,
    };

    #[test]
    fn what_fits_is_admitted() {
        let larger = Member {
            size_sectors: 4097,
            is_writable: true,
            ..BASE
        };
        let raw = Member {
            kind: Kind::Raw,
            ..BASE
        };
        let odd = Member {
            size_sectors: 4097,
            ..BASE
        };
        assert_eq!(admit(1, &BASE, &larger), Ok(()));
        assert_eq!(admit(1, &raw, &larger), Ok(()));
        assert_eq!(admit(254, &odd, &odd), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let with = |f: fn(&mut Member)| {
            let mut m = BASE;
            f(&mut m);
            m
        };
        let refused = |below: &Member, new: &Member| admit(1, below, new).unwrap_err();
        assert_eq!(admit(255, &BASE, &BASE), Err(Misfit::TooMany));
        assert_eq!(
            refused(&BASE, &with(|m| m.kind = Kind::Raw)),
            Misfit::RawAbove
        );
        assert_eq!(
            refused(&with(|m| m.is_writable = true), &BASE),
            Misfit::BelowWritable
        );
        let small = with(|m| m.cluster = ClusterSize::from_log(6).unwrap());
        assert!(matches!(refused(&BASE, &small), Misfit::Cluster { .. }));
        let v1 = with(|m| m.kind = Kind::Ploop1(Version::V1));
        assert!(matches!(refused(&v1, &BASE), Misfit::Version { .. }));
        assert!(matches!(
            refused(&BASE, &with(|m| m.size_sectors = 1)),
            Misfit::Smaller { .. }
        ));
        let odd = with(|m| m.size_sectors = 4095);
        assert!(matches!(refused(&odd, &BASE), Misfit::Uneven { .. }));
        let raw = with(|m| {
            m.kind = Kind::Raw;
            m.size_sectors = 4095;
        });
        assert!(matches!(refused(&raw, &odd), Misfit::Uneven { .. }));
        let top = with(|m| m.is_writable = true);
        let larger = with(|m| {
            m.is_writable = true;
            m.size_sectors *= 2;
        });
        assert_eq!(admit_snapshot(1, &top, &top, true), Ok(()));
        assert_eq!(admit_snapshot(1, &top, &top, false), Err(Misfit::NotEmpty));
        assert_eq!(admit_snapshot(1, &top, &BASE, true), Err(Misfit::ReadOnly));
        let differs = admit_snapshot(1, &top, &larger, true);
        assert!(matches!(differs, Err(Misfit::SizeDiffers { .. })));
    }
}

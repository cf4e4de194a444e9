// SPDX-License-Identifier: GPL-2.0
//! The word that the cluster map keeps for each guest cluster.
//!
//! Slot, level and state are one 64-bit word, loaded and stored at once. So a lookup needs no lock
//! and can never see the slot of one delta with the level of another; this is the whole argument
//! for the map's lock-free readers.
//!
//! ```text
//! bit 0..31   image cluster      bit 40   mapped
//! bit 32..39  level              bit 41   locked: a slow operation owns the cluster
//!                                bit 42   closed: its place may not be used without the lock
//! ```
//!
//! A cluster that is locked only may be read and written in place all the while: its place is good
//! until the next one is published. One that is closed is about to lose its place.

use crate::units::{ImageCluster, Level};

const LEVEL_SHIFT: u32 = 32;
const MAPPED: u64 = 1 << 40;
const LOCKED: u64 = 1 << 41;
const CLOSED: u64 = 1 << 42;

/// Where the bytes of a guest cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it reads as zeros.
    Hole,
    /// In a slot of a delta.
    Slot {
        /// The delta.
        level: Level,
        /// The slot.
        at: ImageCluster,
    },
}

/// One word of the map. A cluster never touched has the word 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Word(u64);

impl Word {
    /// From the bits of [`Self::bits`].
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word as it is stored.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Where the cluster is.
    pub const fn place(self) -> Place {
        if self.0 & MAPPED == 0 {
            return Place::Hole;
        }
        Place::Slot {
            level: Level((self.0 >> LEVEL_SHIFT) as u8),
            at: ImageCluster(self.0 as u32),
        }
    }

    /// The same word with another place; the lock stays as it is.
    pub const fn with_place(self, place: Place) -> Self {
        let lock = self.0 & (LOCKED | CLOSED);
        match place {
            Place::Hole => Self(lock),
            Place::Slot { level, at } => {
                Self(lock | MAPPED | ((level.0 as u64) << LEVEL_SHIFT) | at.0 as u64)
            }
        }
    }

    /// Whether a slow operation owns the cluster.
    pub const fn is_locked(self) -> bool {
        self.0 & LOCKED != 0
    }

    /// The same word, locked.
    pub const fn locked(self) -> Self {
        Self(self.0 | LOCKED)
    }

    /// The same word, locked and closed.
    pub const fn closed(self) -> Self {
        Self(self.0 | LOCKED | CLOSED)
    }

    /// Whether the place may be used by the cluster's owner only.
    pub const fn is_closed(self) -> bool {
        self.0 & CLOSED != 0
    }

    /// The same word, neither locked nor closed.
    pub const fn unlocked(self) -> Self {
        Self(self.0 & !(LOCKED | CLOSED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for level in [0, 1, 255] {
            for at in [1, u32::MAX] {
                let place = Place::Slot {
                    level: Level(level),
                    at: ImageCluster(at),
                };
                let w = Word::default().locked().with_place(place);
                assert!(w.is_locked());
                assert_eq!(Word::from_bits(w.bits()).unlocked().place(), place);
                assert_eq!(w.with_place(Place::Hole), Word::default().locked());
                let c = Word::default().with_place(place).closed();
                assert!(c.is_locked() && c.is_closed() && c.place() == place);
                assert!(!c.unlocked().is_closed() && !w.is_closed());
            }
        }
        assert_eq!(Word::default().place(), Place::Hole);
    }
}

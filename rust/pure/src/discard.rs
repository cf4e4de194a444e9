// SPDX-License-Identifier: GPL-2.0
//! What a discard or a write of zeros does with a cluster.
//!
//! A whole cluster of a base is unmapped, and its slot goes back to the file system. Over a lower
//! delta nothing is ever unmapped, as what lies below would show again (ordering rule 11): the
//! cluster is given a slot that reads as zeros, as a write of zeros is.

use crate::flow::Coverage;
use crate::map::Place;
use crate::units::{ImageCluster, Level};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It reads as zeros already.
    Nothing,
    /// Take the entry away and release the slot.
    Unmap {
        /// The slot.
        at: ImageCluster,
    },
    /// Do as a write of zeros to the range would, without writing them: a slot that was just
    /// taken reads as zeros, in one that has data a hole is made.
    Zero,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// How much of the cluster.
    pub coverage: Coverage,
    /// The space that the zeros take is to be kept.
    pub keeps_space: bool,
}

/// What is to be done with a cluster at `place` in a chain whose top is `top`; `is_base` says that
/// nothing lies below it.
pub fn decide(place: Place, wish: Wish, top: Level, is_base: bool) -> Action {
    let may_unmap = is_base || mutant!("unmap_over_lower");
    match (place, wish.coverage) {
        (Place::Hole, _) => Action::Nothing,
        (Place::Slot { level, at }, Coverage::Whole)
            if level == top && may_unmap && !wish.keeps_space =>
        {
            Action::Unmap { at }
        }
        (Place::Slot { .. }, Coverage::Whole | Coverage::Part) => Action::Zero,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: ImageCluster = ImageCluster(9);

    fn slot(level: u8) -> Place {
        let level = Level(level);
        Place::Slot { level, at: AT }
    }

    #[test]
    fn only_whole_clusters_of_a_base_are_unmapped() {
        let wish = |coverage, keeps_space| Wish {
            coverage,
            keeps_space,
        };
        let whole = wish(Coverage::Whole, false);
        let part = wish(Coverage::Part, false);
        let kept = wish(Coverage::Whole, true);
        let (base, top) = (Level(0), Level(1));
        assert_eq!(decide(Place::Hole, whole, base, true), Action::Nothing);
        assert_eq!(decide(slot(0), whole, base, true), Action::Unmap { at: AT });
        assert_eq!(decide(slot(0), part, base, true), Action::Zero);
        assert_eq!(decide(slot(0), kept, base, true), Action::Zero);
        assert_eq!(decide(slot(1), whole, top, false), Action::Zero);
        assert_eq!(decide(slot(0), whole, top, false), Action::Zero);
    }
}

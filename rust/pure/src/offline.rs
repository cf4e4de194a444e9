// SPDX-License-Identifier: GPL-2.0
//! Work on image files that nobody reads or writes meanwhile: merge, grow, compact.
//!
//! Each is a [`Machine`]: it says what to do next, the executor does it and tells what happened,
//! and beginning and end are `Event::Ok` and [`Action::Done`]. All that is written goes to one
//! image, the *destination*. The order within a machine makes a power cut between any two actions
//! harmless (ordering rules 4, 6, 8 and 10): the mark is durable before anything else changes, a
//! copy before the entry that names it, entries before the slots that they released are used for
//! anything, and the mark is cleared last. An image left marked is repaired by its check without
//! loss; then the same operation, begun again, does what is left.

pub mod compact;
pub mod grow;
pub mod merge;
mod pass;

use crate::layout::ploop1::Header;
use crate::units::{Cluster, ImageCluster};

/// What the executor has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Write this header to the destination and no entry with it. From then on entries are those
    /// of this header.
    WriteHeader(Header),
    /// Make everything done to the destination so far durable.
    Sync,
    /// Set the length of the destination; what is added reads as zeros.
    SetLen {
        /// New length.
        len_bytes: u64,
    },
    /// Find the next cluster that the source has, which is the upper delta in a merge and the
    /// destination else.
    Find {
        /// The first cluster to look at.
        from: Cluster,
    },
    /// Find out whether a slot of the destination reads as zeros.
    Test {
        /// The slot.
        at: ImageCluster,
    },
    /// Make a slot of the destination hold what a slot of the source holds, zeros included.
    Copy {
        /// Slot of the source.
        from: ImageCluster,
        /// Slot of the destination. In a raw one the slot of cluster N is N.
        to: ImageCluster,
    },
    /// Make bytes `start` to `end` of the destination zeros.
    Zero {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// Change an entry of the destination in memory.
    Publish {
        /// Whose entry.
        cluster: Cluster,
        /// The slot it names from now on, `None` for a hole.
        at: Option<ImageCluster>,
    },
    /// Write the index pages of the destination whose entries were changed.
    WriteIndex,
    /// All is done, durably.
    Done,
    /// What was done until [`Machine::stop`], or until a failure that does no harm, is complete and
    /// durable, and the destination is closed.
    Stopped,
    /// The destination is as the failed action left it: marked.
    Fail,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The last action succeeded; also the first event of all.
    Ok,
    /// `Find` found this.
    Found(Found),
    /// `Find` found nothing.
    End,
    /// `Test` found only zeros.
    Zeros,
    /// `Test` found something else.
    Data,
    /// The last action failed.
    Failed,
}

/// A cluster that the source has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The cluster.
    pub cluster: Cluster,
    /// Its slot in the source.
    pub at: ImageCluster,
    /// In a merge, its slot in the destination.
    pub below: Option<ImageCluster>,
}

/// An operation.
pub trait Machine {
    /// The action that follows `event`. After `Done`, `Stopped` or `Fail` there is only `Fail`.
    fn next(&mut self, event: Event) -> Action;
    /// Asks for a clean end before all is done.
    fn stop(&mut self);
}

// SPDX-License-Identifier: GPL-2.0
//! The steps of one guest write: which [`Action`] follows which [`Event`].
//!
//! A write to a mapped cluster goes in place. A write to a hole locks the cluster, looks again,
//! takes a slot, writes its data there, and only then publishes the slot in the map. So a reader
//! sees zeros or the whole write's data, a failed write leaves the hole, and no index page can be
//! copied with an entry whose data is not written (ordering rules 1 and 2). The guest's
//! completion follows the publication; with FUA, the commit that makes both durable (rule 3).
//!
//! A write to a cluster that a lower delta holds does the same, but copies what it does not cover
//! into the slot before its own data. The copy is written before the publication like the data
//! is, so the same data sync covers it before the entry is written (rule 5); when it fails, the
//! lower delta still holds the cluster.

use crate::index::DirtyPages;
use crate::map::Place;
use crate::units::{ImageCluster, Level};

/// What the engine has to do next for a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Lock the cluster, waiting if need be, then look it up again: [`Event::Found`].
    Lock,
    /// Take a slot of the top delta: [`Event::Slot`] or [`Event::Failed`].
    TakeSlot,
    /// Copy what the write does not cover of a cluster of a lower delta to a slot of the top:
    /// [`Event::Ok`] or [`Event::Failed`].
    CopyBelow {
        /// The lower delta.
        level: Level,
        /// Its slot.
        from: ImageCluster,
        /// The slot of the top, which reads as zeros.
        to: ImageCluster,
    },
    /// Write the data to a slot of the top delta: [`Event::Ok`] or [`Event::Failed`].
    WriteData {
        /// The slot.
        at: ImageCluster,
        /// The data has to be durable when the write is done.
        durable: bool,
    },
    /// Put the slot into the map, mark its index page dirty and unlock: [`Event::Ok`].
    Publish {
        /// The slot.
        at: ImageCluster,
    },
    /// Give the slot back and unlock, then end with the error.
    Abandon {
        /// The slot.
        at: ImageCluster,
    },
    /// Unlock and end with the error.
    Unlock,
    /// Unlock, the cluster having been mapped meanwhile, and go on with this write in place.
    UnlockAndWrite {
        /// The slot.
        at: ImageCluster,
        /// The data has to be durable when the write is done.
        durable: bool,
    },
    /// Commit data and index: [`Event::Ok`] or [`Event::Failed`].
    Commit,
    /// End with success.
    Done,
    /// End with the error.
    Fail,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Where the cluster is, and whether the index entry is durable.
    Found {
        /// The place.
        place: Place,
        /// The entry on disk is the one in memory, durably.
        entry_durable: bool,
    },
    /// The slot taken.
    Slot(ImageCluster),
    /// The last action succeeded.
    Ok,
    /// The last action failed.
    Failed,
}

/// Whether the guest wants a write durable before it completes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A later FLUSH makes it durable.
    Volatile,
    /// FUA.
    Fua,
}

/// What a guest FLUSH needs: a commit (ordering rule 3), but for what [`Settled`] says.
pub fn flush() -> Action {
    if mutant!("skip_flush") {
        return Action::Done;
    }
    Action::Commit
}

/// What the last commit has made durable, for a FLUSH that can do without one.
///
/// *Changes* are counted: all that was done to the image file through its file system, each when it has
/// ended and before the guest hears of it. What was written past the file system, to blocks that the file
/// has, is none: a flush of the device makes that durable.
///
/// Now and then the file system is asked all the same: one that has given itself up says so when it is
/// asked to sync, and nowhere else.
#[derive(Debug, Default)]
pub struct Settled {
    changes: Option<u64>,
    /// When the commit began.
    since_ms: u64,
}

/// Milliseconds after which a commit is needed for a FLUSH in any case.
const SETTLED_MS: u64 = 20_000;

impl Settled {
    /// A commit has succeeded that began at `since_ms`, when so many changes had been made.
    pub fn committed(&mut self, changes: u64, since_ms: u64) {
        self.changes = Some(changes);
        self.since_ms = since_ms;
    }

    /// Whether a FLUSH at `now_ms` needs no more than a flush of the device, `changes` having been made and
    /// `dirty` being the pages of the index (ordering rule 3).
    pub fn is_flush_enough(&self, changes: u64, dirty: &DirtyPages, now_ms: u64) -> bool {
        if mutant!("flush_device_only") {
            return true;
        }
        let is_recent = now_ms.saturating_sub(self.since_ms) < SETTLED_MS;
        is_recent && self.changes == Some(changes) && dirty.is_clean()
    }
}

/// How much of its cluster a write covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// A part: the rest keeps what a lower delta has.
    Part,
    /// All of it: nothing needs to be copied.
    Whole,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    LookingUp,
    Locking,
    /// With the place in a lower delta that has to be copied from.
    TakingSlot {
        below: Option<(Level, ImageCluster)>,
    },
    Copying {
        at: ImageCluster,
    },
    WritingInPlace {
        commit: bool,
    },
    WritingFresh {
        at: ImageCluster,
    },
    Publishing,
    Committing,
    Ended,
}

/// One guest write.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    state: State,
    durability: Durability,
    coverage: Coverage,
    top: Level,
}

impl Write {
    /// A write to a chain whose top is `top`. Its first event is [`Event::Found`].
    #[inline]
    pub const fn new(durability: Durability, coverage: Coverage, top: Level) -> Self {
        Self {
            state: State::LookingUp,
            durability,
            coverage,
            top,
        }
    }

    /// The action that follows `event`. After the end there is only [`Action::Fail`].
    #[inline]
    pub fn next(&mut self, event: Event) -> Action {
        let (state, action) = match (self.state, event) {
            (
                State::LookingUp,
                Event::Found {
                    place,
                    entry_durable,
                },
            ) => match self.in_place(place, entry_durable) {
                Some((at, durable, state)) => (state, Action::WriteData { at, durable }),
                None => (State::Locking, Action::Lock),
            },
            (State::WritingInPlace { commit: false }, Event::Ok) => (State::Ended, Action::Done),
            // Not inlined where most writes go through.
            (state, event) => self.next_of_fresh(state, event),
        };
        self.state = state;
        action
    }

    /// The next state and action of a write that is not just one in place.
    fn next_of_fresh(&self, state: State, event: Event) -> (State, Action) {
        match (state, event) {
            (
                State::Locking,
                Event::Found {
                    place,
                    entry_durable,
                },
            ) => match self.in_place(place, entry_durable) {
                Some((at, durable, state)) => (state, Action::UnlockAndWrite { at, durable }),
                None => {
                    let below = self.below(place);
                    (State::TakingSlot { below }, Action::TakeSlot)
                }
            },
            (State::TakingSlot { .. }, Event::Slot(at)) if mutant!("publish_before_data") => {
                (State::Publishing, Action::Publish { at })
            }
            (
                State::TakingSlot {
                    below: Some((level, from)),
                },
                Event::Slot(at),
            ) => (
                State::Copying { at },
                Action::CopyBelow {
                    level,
                    from,
                    to: at,
                },
            ),
            (State::TakingSlot { below: None }, Event::Slot(at))
            | (State::Copying { at }, Event::Ok) => {
                let durable = false;
                (
                    State::WritingFresh { at },
                    Action::WriteData { at, durable },
                )
            }
            (State::TakingSlot { .. }, Event::Failed) => (State::Ended, Action::Unlock),
            (State::Copying { at }, Event::Failed) if mutant!("publish_failed_copy") => {
                let durable = false;
                (
                    State::WritingFresh { at },
                    Action::WriteData { at, durable },
                )
            }
            (State::Copying { at }, Event::Failed) => (State::Ended, Action::Abandon { at }),
            (State::WritingFresh { at }, Event::Ok) => (State::Publishing, Action::Publish { at }),
            (State::WritingFresh { at }, Event::Failed) => (State::Ended, Action::Abandon { at }),
            (State::Publishing | State::WritingInPlace { commit: true }, Event::Ok) => {
                match self.durability {
                    Durability::Volatile => (State::Ended, Action::Done),
                    Durability::Fua if mutant!("ignore_fua") => (State::Ended, Action::Done),
                    Durability::Fua => (State::Committing, Action::Commit),
                }
            }
            (State::Committing, Event::Ok) => (State::Ended, Action::Done),
            (
                State::LookingUp
                | State::Locking
                | State::TakingSlot { .. }
                | State::Copying { .. }
                | State::WritingInPlace { .. }
                | State::WritingFresh { .. }
                | State::Publishing
                | State::Committing
                | State::Ended,
                Event::Found { .. } | Event::Slot(_) | Event::Ok | Event::Failed,
            ) => (State::Ended, Action::Fail),
        }
    }

    /// Whether it has the cluster's lock.
    #[inline]
    pub const fn holds_lock(&self) -> bool {
        matches!(
            self.state,
            State::TakingSlot { .. } | State::Copying { .. } | State::WritingFresh { .. }
        )
    }

    /// For a cluster mapped in the top: the slot, whether the data write itself is to be durable
    /// and the state to wait in. FUA to an entry that is not durable yet needs a commit instead.
    #[inline]
    fn in_place(&self, place: Place, entry_durable: bool) -> Option<(ImageCluster, bool, State)> {
        match place {
            Place::Slot { level, at } if level == self.top => {
                let fua = self.durability == Durability::Fua;
                let commit = fua && !entry_durable && !mutant!("fua_of_dirty_entry");
                let durable = fua && entry_durable && !mutant!("ignore_fua");
                Some((at, durable, State::WritingInPlace { commit }))
            }
            Place::Slot { .. } | Place::Hole => None,
        }
    }

    /// The place in a lower delta that a slot in the top has to be completed from.
    fn below(&self, place: Place) -> Option<(Level, ImageCluster)> {
        match (place, self.coverage) {
            (Place::Slot { level, at }, Coverage::Part) if !mutant!("skip_copy") => {
                Some((level, at))
            }
            (Place::Slot { .. } | Place::Hole, Coverage::Part | Coverage::Whole) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: ImageCluster = ImageCluster(7);
    const TOP: Level = Level(0);

    fn found(place: Place, entry_durable: bool) -> Event {
        Event::Found {
            place,
            entry_durable,
        }
    }

    #[test]
    fn the_file_system_is_asked_now_and_then() {
        let dirty = DirtyPages::new(1).unwrap();
        let mut settled = Settled::default();
        assert!(!settled.is_flush_enough(0, &dirty, 0));
        settled.committed(3, 1000);
        assert!(settled.is_flush_enough(3, &dirty, 20_999));
        assert!(!settled.is_flush_enough(3, &dirty, 21_000));
        assert!(!settled.is_flush_enough(4, &dirty, 1000));
    }

    fn slot() -> Place {
        Place::Slot { level: TOP, at: AT }
    }

    #[test]
    fn overwrite_is_one_write() {
        let mut w = Write::new(Durability::Volatile, Coverage::Part, TOP);
        assert_eq!(
            w.next(found(slot(), false)),
            Action::WriteData {
                at: AT,
                durable: false
            }
        );
        assert_eq!(w.next(Event::Ok), Action::Done);
        assert_eq!(w.next(Event::Ok), Action::Fail);
    }

    #[test]
    fn fua_overwrite_of_a_dirty_entry_commits() {
        let mut w = Write::new(Durability::Fua, Coverage::Part, TOP);
        assert_eq!(
            w.next(found(slot(), false)),
            Action::WriteData {
                at: AT,
                durable: false
            }
        );
        assert_eq!(w.next(Event::Ok), Action::Commit);
        assert_eq!(w.next(Event::Ok), Action::Done);
        let mut w = Write::new(Durability::Fua, Coverage::Part, TOP);
        assert_eq!(
            w.next(found(slot(), true)),
            Action::WriteData {
                at: AT,
                durable: true
            }
        );
        assert_eq!(w.next(Event::Ok), Action::Done);
    }

    #[test]
    fn data_is_written_before_the_slot_is_published() {
        let mut w = Write::new(Durability::Fua, Coverage::Part, TOP);
        assert_eq!(w.next(found(Place::Hole, true)), Action::Lock);
        assert_eq!(w.next(found(Place::Hole, true)), Action::TakeSlot);
        assert_eq!(
            w.next(Event::Slot(AT)),
            Action::WriteData {
                at: AT,
                durable: false
            }
        );
        assert_eq!(w.next(Event::Ok), Action::Publish { at: AT });
        assert_eq!(w.next(Event::Ok), Action::Commit);
        assert_eq!(w.next(Event::Ok), Action::Done);
    }

    #[test]
    fn a_failed_write_leaves_the_hole() {
        let mut w = Write::new(Durability::Volatile, Coverage::Part, TOP);
        w.next(found(Place::Hole, true));
        w.next(found(Place::Hole, true));
        w.next(Event::Slot(AT));
        assert_eq!(w.next(Event::Failed), Action::Abandon { at: AT });
    }

    #[test]
    fn a_cluster_mapped_while_waiting_is_written_in_place() {
        let mut w = Write::new(Durability::Volatile, Coverage::Part, TOP);
        w.next(found(Place::Hole, true));
        let a = w.next(found(slot(), false));
        assert_eq!(
            a,
            Action::UnlockAndWrite {
                at: AT,
                durable: false
            }
        );
        assert_eq!(w.next(Event::Ok), Action::Done);
    }

    fn below() -> Place {
        Place::Slot {
            level: Level(0),
            at: ImageCluster(3),
        }
    }

    #[test]
    fn the_rest_is_copied_before_the_data_is_written() {
        let top = Level(1);
        let mut w = Write::new(Durability::Volatile, Coverage::Part, top);
        assert_eq!(w.next(found(below(), true)), Action::Lock);
        assert_eq!(w.next(found(below(), true)), Action::TakeSlot);
        let copy = Action::CopyBelow {
            level: Level(0),
            from: ImageCluster(3),
            to: AT,
        };
        assert_eq!(w.next(Event::Slot(AT)), copy);
        let write = Action::WriteData {
            at: AT,
            durable: false,
        };
        assert_eq!(w.next(Event::Ok), write);
        assert_eq!(w.next(Event::Ok), Action::Publish { at: AT });
        assert_eq!(w.next(Event::Ok), Action::Done);
    }

    #[test]
    fn a_failed_copy_leaves_the_lower_mapping() {
        let mut w = Write::new(Durability::Fua, Coverage::Part, Level(1));
        w.next(found(below(), true));
        w.next(found(below(), true));
        w.next(Event::Slot(AT));
        assert_eq!(w.next(Event::Failed), Action::Abandon { at: AT });
    }

    #[test]
    fn a_write_of_the_whole_cluster_copies_nothing() {
        let mut w = Write::new(Durability::Volatile, Coverage::Whole, Level(1));
        w.next(found(below(), true));
        w.next(found(below(), true));
        let write = Action::WriteData {
            at: AT,
            durable: false,
        };
        assert_eq!(w.next(Event::Slot(AT)), write);
    }
}

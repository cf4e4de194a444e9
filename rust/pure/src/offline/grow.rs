// SPDX-License-Identifier: GPL-2.0
//! Grow: a ploop1 image gets a larger disk.
//!
//! The BAT grows with it, and clusters that stand in its way move to the end of the file. The
//! order is ordering rule 10: a copy is durable, then the index, and only then is the place it left
//! overwritten with zeros; when those are durable, the header that claims them follows, last.

use super::pass::{Choice, Lacks, Pass, Step};
use super::{Action, Event, Found, Machine};
use crate::check::Usage;
use crate::layout::ploop1::{Header, ENTRY_BYTES, HEADER_BYTES};
use crate::problem::Problem;
use crate::units::{ImageCluster, SECTOR_BYTES};
use core::fmt;

/// Why an image cannot be grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The disk would become smaller.
    Shrinks {
        /// Its size in sectors.
        sectors: u64,
    },
    /// The disk would be too large for the format.
    Limit(Problem),
    /// Entries could not name a slot for each cluster.
    Slots {
        /// Slots there would be.
        need: u64,
        /// Slots that can be named.
        max: u32,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Shrinks { sectors } => {
                write!(
                    f,
                    "the disk has {sectors} sectors and cannot become smaller"
                )
            }
            Self::Limit(problem) => problem.fmt(f),
            Self::Slots { need, max } => write!(
                f,
                "{need} image clusters would be needed, and entries can name {max}"
            ),
        }
    }
}

/// An image to be grown, and how.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    old: Header,
    new: Header,
}

impl Plan {
    /// For a disk of `size_sectors` in an image with this header; `None` if it has that size.
    pub fn new(old: &Header, size_sectors: u64) -> Result<Option<Self>, Refusal> {
        if size_sectors < old.size_sectors {
            return Err(Refusal::Shrinks {
                sectors: old.size_sectors,
            });
        }
        if size_sectors == old.size_sectors {
            return Ok(None);
        }
        let new = old.grown(size_sectors).map_err(Refusal::Limit)?;
        let need = u64::from(new.first_data.0) + u64::from(new.nr_entries);
        let max = new.slots_max();
        if need > u64::from(max) {
            return Err(Refusal::Slots { need, max });
        }
        Ok(Some(Self { old: *old, new }))
    }

    /// Whether the BAT needs this slot: its cluster has to move.
    pub fn is_in_the_way(&self, at: ImageCluster) -> bool {
        at < self.new.first_data
    }

    /// The header of the image when it is grown.
    pub fn header(&self) -> Header {
        self.new
    }
}

/// What a scan of the image found.
#[derive(Debug, Clone, Copy)]
pub struct Census {
    /// Of its entries, none of which is past the end of the disk.
    pub usage: Usage,
    /// Clusters that are in the way.
    pub nr_in_the_way: u32,
    /// Slot of the last cluster of the disk as it is.
    pub last: Option<ImageCluster>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Begin,
    Marking,
    SyncingMark,
    Lengthening,
    Trimming,
    Moving,
    Zeroing,
    SyncingZeros,
    Cutting,
    SyncingAll,
    Closing(Action),
    SyncingClose(Action),
    Ended,
}

/// One growth.
#[derive(Debug)]
pub struct Grow {
    plan: Plan,
    census: Census,
    /// Next slot for a cluster that is in the way.
    head: u32,
    /// Slots of the file when all have moved.
    limit: u32,
    state: State,
    pass: Pass,
}

impl Grow {
    /// Carries out `plan` on the image counted in `census`.
    pub fn new(plan: Plan, census: Census) -> Result<Self, Refusal> {
        let head = census.usage.end.max(plan.new.first_data.0);
        let max = plan.new.slots_max();
        let limit = head.checked_add(census.nr_in_the_way);
        let limit = limit.filter(|l| *l <= max).ok_or(Refusal::Slots {
            need: u64::from(head) + u64::from(census.nr_in_the_way),
            max,
        })?;
        let lacks = if mutant!("relocate_index_first") {
            Lacks::SyncOfData
        } else {
            Lacks::Nothing
        };
        Ok(Self {
            plan,
            census,
            head,
            limit,
            state: State::Begin,
            pass: Pass::new(lacks),
        })
    }

    fn go(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }

    fn set_len(&mut self, state: State, slots: u32) -> Action {
        let len_bytes = self.plan.old.cluster.offset(ImageCluster(slots));
        self.go(state, Action::SetLen { len_bytes })
    }

    /// What the last cluster holds behind the end of the disk would show in the grown one.
    fn trim(&mut self) -> Action {
        let old = &self.plan.old;
        let within = old.size_sectors & u64::from(old.cluster.sectors() - 1);
        match self.census.last {
            Some(at) if within != 0 => {
                let start = old.cluster.offset(at);
                let zero = Action::Zero {
                    start: start + within * SECTOR_BYTES,
                    end: start + old.cluster.bytes(),
                };
                self.go(State::Trimming, zero)
            }
            Some(_) | None => self.begin_moving(),
        }
    }

    fn begin_moving(&mut self) -> Action {
        if self.census.nr_in_the_way == 0 {
            return self.zero();
        }
        let step = self.pass.begin();
        self.step(step)
    }

    fn step(&mut self, step: Step) -> Action {
        match step {
            Step::Act(action) => self.go(State::Moving, action),
            Step::Failed => self.go(State::Ended, Action::Fail),
            Step::Over { is_all: true } => self.zero(),
            Step::Over { is_all: false } => self.give_up(),
        }
    }

    /// Keeps the old size: under the old header what was made zero is nobody's.
    fn give_up(&mut self) -> Action {
        let end = self.census.usage.end;
        let has_moved = self.head > end.max(self.plan.new.first_data.0);
        self.set_len(State::Cutting, if has_moved { self.head } else { end })
    }

    /// Zeros all of the new BAT that is not the old one, and what follows it.
    fn zero(&mut self) -> Action {
        let (old, new) = (self.plan.old, self.plan.new);
        let start = HEADER_BYTES as u64 + u64::from(old.nr_entries) * ENTRY_BYTES;
        let end = new.zero_end(&old);
        self.go(State::Zeroing, Action::Zero { start, end })
    }

    fn close(&mut self, header: Header, last: Action) -> Action {
        let closed = header.opened().closed(self.census.usage.nr_used == 0);
        self.go(State::Closing(last), Action::WriteHeader(closed))
    }
}

impl Machine for Grow {
    fn next(&mut self, event: Event) -> Action {
        match (self.state, event) {
            (State::Begin, Event::Ok) => {
                let marked = self.plan.old.opened();
                self.go(State::Marking, Action::WriteHeader(marked))
            }
            (State::Marking, Event::Ok) => self.go(State::SyncingMark, Action::Sync),
            // What is behind the end goes, too: new slots are fresh.
            (State::SyncingMark, Event::Ok) => self.set_len(State::Lengthening, self.limit),
            (State::Lengthening | State::Trimming | State::Zeroing, Event::Failed) => {
                self.give_up()
            }
            (State::Lengthening, Event::Ok) => self.trim(),
            (State::Trimming, Event::Ok) => self.begin_moving(),
            (State::Moving, event) => {
                let (plan, head, limit) = (self.plan, &mut self.head, self.limit);
                let step = self.pass.next(event, |found: Found| {
                    if !plan.is_in_the_way(found.at) {
                        Choice::Skip
                    } else if *head < limit {
                        *head += 1;
                        Choice::Place(ImageCluster(*head - 1))
                    } else {
                        // More than were counted.
                        Choice::Give
                    }
                });
                self.step(step)
            }
            (State::Zeroing, Event::Ok) if mutant!("grow_header_first") => {
                self.close(self.plan.new, Action::Done)
            }
            (State::Zeroing, Event::Ok) => self.go(State::SyncingZeros, Action::Sync),
            (State::SyncingZeros, Event::Ok) => self.close(self.plan.new, Action::Done),
            (State::Cutting, Event::Ok) => self.go(State::SyncingAll, Action::Sync),
            (State::SyncingAll, Event::Ok) => self.close(self.plan.old, Action::Stopped),
            (State::Closing(last), Event::Ok) => self.go(State::SyncingClose(last), Action::Sync),
            (State::SyncingClose(last), Event::Ok) => self.go(State::Ended, last),
            (
                State::Begin
                | State::Marking
                | State::SyncingMark
                | State::Lengthening
                | State::Trimming
                | State::Zeroing
                | State::SyncingZeros
                | State::Cutting
                | State::SyncingAll
                | State::Closing(_)
                | State::SyncingClose(_)
                | State::Ended,
                Event::Ok
                | Event::Found(_)
                | Event::End
                | Event::Zeros
                | Event::Data
                | Event::Failed,
            ) => self.go(State::Ended, Action::Fail),
        }
    }

    fn stop(&mut self) {
        self.pass.stop();
    }
}

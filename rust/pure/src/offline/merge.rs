// SPDX-License-Identifier: GPL-2.0
//! Merge: the clusters of an upper delta are copied into the next lower one.
//!
//! The upper delta is not changed and hides the lower one all the time, so what the chain reads
//! never changes, and it does no harm to begin again after a crash. Only when the machine is done
//! may the caller drop the upper delta: then everything is durable (ordering rule 8). A cluster
//! that the upper delta has is always copied, also one full of zeros: it hides what lies below.

use super::pass::{Choice, Lacks, Pass, Step};
use super::{Action, Event, Found, Machine};
use crate::chain::{admit, Kind, Member, Misfit};
use crate::check::Usage;
use crate::layout::ploop1::Header;
use crate::units::ImageCluster;
use core::fmt;

/// Why two deltas cannot be merged. Displayed, it says so of the upper one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The upper delta does not fit on the lower one.
    Misfit(Misfit),
    /// The lower delta is raw, where disks end with a cluster, and the upper one does not.
    Uneven {
        /// Its size in sectors.
        sectors: u64,
    },
    /// Entries of the lower delta cannot name so many slots.
    Slots {
        /// Slots it would have.
        need: u64,
        /// Slots it can have.
        max: u32,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Misfit(misfit) => misfit.fmt(f),
            Self::Uneven { sectors } => write!(
                f,
                "disk size is {sectors} sectors, not a multiple of the cluster size, which a raw \
                 lower delta needs"
            ),
            Self::Slots { need, max } => write!(
                f,
                "merged, the lower delta would have {need} image clusters, and its entries can name {max}"
            ),
        }
    }
}

/// Whether `upper` can be merged into `lower`, which may be smaller and is grown first then.
pub fn judge(lower: &Member, upper: &Member) -> Result<(), Refusal> {
    admit(1, lower, upper).map_err(Refusal::Misfit)?;
    let sectors = upper.size_sectors;
    if lower.kind == Kind::Raw && sectors & u64::from(upper.cluster.sectors() - 1) != 0 {
        return Err(Refusal::Uneven { sectors });
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum State {
    Begin,
    Marking,
    SyncingMark,
    Lengthening,
    Copying,
    Cutting,
    SyncingAll,
    Closing,
    SyncingClose,
    Ended,
}

/// What the destination is.
#[derive(Debug, Clone, Copy)]
enum Lower {
    Ploop1 {
        header: Header,
        /// First slot not in use.
        head: u32,
        /// Slots of the file while clusters are copied.
        limit: u32,
        is_empty: bool,
    },
    Raw {
        size_bytes: u64,
    },
}

/// One merge.
#[derive(Debug)]
pub struct Merge {
    lower: Lower,
    state: State,
    pass: Pass,
    is_all: bool,
}

impl Merge {
    /// Into a ploop1 delta of this header and usage, not smaller than the upper one, which has
    /// `nr_new` clusters that it has not.
    pub fn into_ploop1(header: &Header, usage: Usage, nr_new: u32) -> Result<Self, Refusal> {
        let max = header.slots_max();
        let limit = usage.end.checked_add(nr_new).filter(|l| *l <= max);
        let limit = limit.ok_or(Refusal::Slots {
            need: u64::from(usage.end) + u64::from(nr_new),
            max,
        })?;
        Ok(Self::new(Lower::Ploop1 {
            header: *header,
            head: usage.end,
            limit,
            is_empty: usage.nr_used == 0,
        }))
    }

    /// Into a raw delta, which is given the size of the upper one.
    pub fn into_raw(upper: &Header) -> Self {
        Self::new(Lower::Raw {
            size_bytes: upper.size_bytes(),
        })
    }

    fn new(lower: Lower) -> Self {
        let lacks = if mutant!("merge_index_first") {
            Lacks::SyncOfData
        } else {
            Lacks::Nothing
        };
        Self {
            lower,
            state: State::Begin,
            pass: Pass::new(lacks),
            is_all: false,
        }
    }

    fn go(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }

    fn lengthen(&mut self) -> Action {
        let len_bytes = match self.lower {
            // Cuts what is behind the end, too: new slots are fresh.
            Lower::Ploop1 { header, limit, .. } => header.cluster.offset(ImageCluster(limit)),
            Lower::Raw { size_bytes, .. } => size_bytes,
        };
        self.go(State::Lengthening, Action::SetLen { len_bytes })
    }

    fn step(&mut self, step: Step) -> Action {
        match (step, self.lower) {
            (Step::Act(action), _) => self.go(State::Copying, action),
            (Step::Failed, _) => self.go(State::Ended, Action::Fail),
            (Step::Over { is_all }, Lower::Ploop1 { header, head, .. }) => {
                self.is_all = is_all;
                let len_bytes = header.cluster.offset(ImageCluster(head));
                self.go(State::Cutting, Action::SetLen { len_bytes })
            }
            (Step::Over { is_all }, Lower::Raw { .. }) => {
                self.is_all = is_all;
                self.go(State::SyncingAll, Action::Sync)
            }
        }
    }

    fn copied(&mut self, event: Event) -> Action {
        let lower = &mut self.lower;
        let step = self.pass.next(event, |found: Found| match lower {
            Lower::Raw { .. } => Choice::Overwrite(ImageCluster(found.cluster.0)),
            Lower::Ploop1 {
                head,
                limit,
                is_empty,
                ..
            } => match found.below {
                Some(at) => Choice::Overwrite(at),
                None if head < limit => {
                    *head += 1;
                    *is_empty = false;
                    Choice::Place(ImageCluster(*head - 1))
                }
                // More than were counted.
                None => Choice::Give,
            },
        });
        self.step(step)
    }

    fn close(&mut self) -> Action {
        match self.lower {
            Lower::Ploop1 {
                header, is_empty, ..
            } => self.go(
                State::Closing,
                Action::WriteHeader(header.opened().closed(is_empty)),
            ),
            Lower::Raw { .. } => self.end(),
        }
    }

    fn end(&mut self) -> Action {
        let action = if self.is_all {
            Action::Done
        } else {
            Action::Stopped
        };
        self.go(State::Ended, action)
    }
}

impl Machine for Merge {
    fn next(&mut self, event: Event) -> Action {
        match (self.state, event) {
            (State::Begin, Event::Ok) => match self.lower {
                Lower::Ploop1 { header, .. } => {
                    self.go(State::Marking, Action::WriteHeader(header.opened()))
                }
                Lower::Raw { .. } => self.lengthen(),
            },
            (State::Marking, Event::Ok) => self.go(State::SyncingMark, Action::Sync),
            (State::SyncingMark, Event::Ok) => self.lengthen(),
            (State::Lengthening, Event::Failed) => self.step(Step::Over { is_all: false }),
            (State::Lengthening, Event::Ok) => {
                let step = self.pass.begin();
                self.step(step)
            }
            (State::Copying, event) => self.copied(event),
            (State::Cutting, Event::Ok) => self.go(State::SyncingAll, Action::Sync),
            (State::SyncingAll, Event::Ok) => self.close(),
            (State::Closing, Event::Ok) => self.go(State::SyncingClose, Action::Sync),
            (State::SyncingClose, Event::Ok) => self.end(),
            (
                State::Begin
                | State::Marking
                | State::SyncingMark
                | State::Lengthening
                | State::Cutting
                | State::SyncingAll
                | State::Closing
                | State::SyncingClose
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

// SPDX-License-Identifier: GPL-2.0
//! Compact: a ploop1 image becomes as short as its clusters allow.
//!
//! Clusters at the end of the file move into free slots before it, each at most once, and then the
//! file is cut. A slot that a cluster left is never used again, only cut off, and only when the
//! index that no longer names it is durable (ordering rule 4). Of a base, clusters that read as
//! zeros can become holes before; of any other delta they cannot, as they hide what lies below.

use super::pass::{Choice, Lacks, Pass, Step};
use super::{Action, Event, Found, Machine};
use crate::check::BatScan;
use crate::layout::ploop1::Header;
use crate::units::ImageCluster;

/// What is done about clusters that read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// Nothing: they are not looked for.
    Keep,
    /// They become holes. Only of a base.
    Drop,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Begin,
    Marking,
    SyncingMark,
    Dropping,
    Moving,
    Cutting,
    SyncingAll(Action),
    Closing(Action),
    SyncingClose(Action),
    Ended,
}

/// One compaction.
pub struct Compact {
    header: Header,
    zeros: Zeros,
    used: BatScan,
    /// One past the last slot in the end, once that is known.
    target: u32,
    /// No slot below is free.
    free: u32,
    /// The slot that is being tested.
    testing: Option<ImageCluster>,
    state: State,
    pass: Pass,
}

impl Compact {
    /// For an image of this header and entries, all of which are good and of its disk, in a file
    /// of `len_bytes`; `None` if there is nothing to do.
    pub fn new(header: &Header, used: BatScan, len_bytes: u64, zeros: Zeros) -> Option<Self> {
        let target = Self::end_of(header, &used);
        let is_tight = len_bytes <= header.cluster.offset(ImageCluster(target));
        if is_tight && (zeros == Zeros::Keep || used.usage().nr_used == 0) {
            return None;
        }
        Some(Self {
            header: *header,
            zeros,
            used,
            target,
            free: header.first_data.0,
            testing: None,
            state: State::Begin,
            pass: Self::pass(),
        })
    }

    /// Clusters that have to move if none is dropped.
    pub fn nr_moves(&self) -> u32 {
        let slots = (self.target..self.used.usage().end).map(ImageCluster);
        // At most one for each slot.
        slots.filter(|at| self.used.is_used(*at)).count() as u32
    }

    fn end_of(header: &Header, used: &BatScan) -> u32 {
        // Never more than the end of what is used.
        let end = header.first_data.0.saturating_add(used.usage().nr_used);
        end.min(used.usage().end)
    }

    fn pass() -> Pass {
        let without_data = mutant!("relocate_index_first");
        let without_index = mutant!("cut_before_index");
        Pass::new(match (without_data, without_index) {
            (true, _) => Lacks::SyncOfData,
            (false, true) => Lacks::SyncOfIndex,
            (false, false) => Lacks::Nothing,
        })
    }

    fn go(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        action
    }

    fn begin(&mut self) -> Action {
        let step = self.pass.begin();
        match self.zeros {
            Zeros::Drop => self.step(step, State::Dropping),
            Zeros::Keep => self.step(step, State::Moving),
        }
    }

    fn step(&mut self, step: Step, state: State) -> Action {
        match (step, state) {
            (Step::Act(action), _) => self.go(state, action),
            (Step::Over { is_all: true }, State::Dropping) => {
                self.zeros = Zeros::Keep;
                self.target = Self::end_of(&self.header, &self.used);
                let is_stopping = self.pass.is_stopping();
                self.pass = Self::pass();
                if is_stopping {
                    self.pass.stop();
                }
                self.begin()
            }
            (Step::Over { is_all: true }, State::Moving) => {
                let len_bytes = self.header.cluster.offset(ImageCluster(self.target));
                self.go(State::Cutting, Action::SetLen { len_bytes })
            }
            (Step::Over { is_all: false }, _) => {
                self.go(State::SyncingAll(Action::Stopped), Action::Sync)
            }
            (Step::Over { .. } | Step::Failed, _) => self.go(State::Ended, Action::Fail),
        }
    }

    fn dropped(&mut self, event: Event) -> Action {
        let tested = self.testing.take();
        if let (Event::Zeros, Some(at)) = (event, tested) {
            self.used.release(at);
        }
        let testing = &mut self.testing;
        let step = self.pass.next(event, |found: Found| {
            *testing = Some(found.at);
            Choice::Test
        });
        self.step(step, State::Dropping)
    }

    fn moved(&mut self, event: Event) -> Action {
        let (target, free, used) = (self.target, &mut self.free, &self.used);
        let step = self.pass.next(event, |found: Found| {
            if found.at.0 < target {
                return Choice::Skip;
            }
            match (*free..target).find(|s| !used.is_used(ImageCluster(*s))) {
                Some(slot) => {
                    *free = slot + 1;
                    Choice::Place(ImageCluster(slot))
                }
                None => Choice::Give,
            }
        });
        self.step(step, State::Moving)
    }

    fn close(&mut self, last: Action) -> Action {
        let closed = self.header.opened().closed(self.used.usage().nr_used == 0);
        self.go(State::Closing(last), Action::WriteHeader(closed))
    }
}

impl Machine for Compact {
    fn next(&mut self, event: Event) -> Action {
        match (self.state, event) {
            (State::Begin, Event::Ok) => {
                let marked = self.header.opened();
                self.go(State::Marking, Action::WriteHeader(marked))
            }
            (State::Marking, Event::Ok) => self.go(State::SyncingMark, Action::Sync),
            (State::SyncingMark, Event::Ok) => self.begin(),
            (State::Dropping, event) => self.dropped(event),
            (State::Moving, event) => self.moved(event),
            (State::Cutting, Event::Ok) => self.go(State::SyncingAll(Action::Done), Action::Sync),
            (State::SyncingAll(last), Event::Ok) => self.close(last),
            (State::Closing(last), Event::Ok) => self.go(State::SyncingClose(last), Action::Sync),
            (State::SyncingClose(last), Event::Ok) => self.go(State::Ended, last),
            (
                State::Begin
                | State::Marking
                | State::SyncingMark
                | State::Cutting
                | State::SyncingAll(_)
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

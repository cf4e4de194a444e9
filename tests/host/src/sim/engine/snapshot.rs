// SPDX-License-Identifier: GPL-2.0
//! A snapshot: what `ploop_pure::snapshot` says, step by step.

use super::ops::{Kind, Next, OpWait, Progress, Retired, Where};
use super::{Engine, File};
use crate::sim::disk::Stamp;
use crate::sim::Fault;
use ploop_pure::index::DirtyPages;
use ploop_pure::snapshot::{Action, Event, Snapshot};
use std::fmt;

/// A snapshot that runs.
pub(super) struct Snapshotting {
    machine: Snapshot,
    action: Action,
    /// Steps of the action that were made.
    step: u32,
    /// What is left of the old top, after the switch.
    retired: Option<Retired>,
    is_cut: bool,
    /// What the disk held at the switch.
    content: Vec<Stamp>,
}

impl fmt::Debug for Snapshotting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot {:?} step {}", self.action, self.step)
    }
}

impl Snapshotting {
    pub(super) fn start() -> Self {
        let (machine, action) = Snapshot::start();
        Self {
            machine,
            action,
            step: 0,
            retired: None,
            is_cut: false,
            content: Vec::new(),
        }
    }

    /// The action is done, or has failed.
    fn advance(mut self, ok: bool) -> Next {
        self.action = self.machine.next(match ok {
            true => Event::Ok,
            false => Event::Failed,
        });
        self.step = 0;
        Some((Kind::Snapshot(self), OpWait::Ready))
    }
}

impl Engine<'_> {
    /// The next step; `ok` is what came of the last one.
    pub(super) fn snapshot(&mut self, mut s: Snapshotting, ok: bool) -> Next {
        let step = s.step;
        s.step += 1;
        let wait = match (s.action, step) {
            (Action::MarkNew, 0) => {
                self.outside = Some(self.new_file());
                self.write_header(Where::Outside)
            }
            (Action::MarkNew, 1) if self.cfg.fault != Fault::ChainMarkUnsynced => {
                self.sync_of(Where::Outside)
            }
            (Action::CommitOld, 0) => OpWait::NextCommit,
            (Action::Switch, 0) => {
                self.is_frozen = true;
                OpWait::Quiet
            }
            (Action::Switch, 1) => {
                self.switch_to_new(&mut s);
                return s.advance(true);
            }
            (Action::FinishOld, _) => return self.finish_old(s, (step > 0).then_some(ok)),
            (Action::UnmarkOld, 0) => self.write_closed(Where::Chain(self.top - 1)),
            (Action::UnmarkOld, 1) => self.sync_of(Where::Chain(self.top - 1)),
            (Action::MarkNew | Action::CommitOld | Action::Switch | Action::UnmarkOld, _) => {
                return s.advance(ok);
            }
            (Action::Done, _) => {
                self.open_gate();
                self.old_is_enough = false;
                self.sealed = Some(s.content);
                return None;
            }
            (Action::Undo, _) => {
                self.outside = None;
                return None;
            }
            (Action::Poison, _) => {
                self.is_poisoned = true;
                return None;
            }
        };
        Some((Kind::Snapshot(s), wait))
    }

    /// An empty file, which nobody has opened yet.
    fn new_file(&mut self) -> File {
        let id = self.next_id;
        self.next_id += 1;
        let nr_entries = self.files[self.top].header.nr_entries;
        self.cfg.created(id, nr_entries, &mut self.blocks)
    }

    fn switch_to_new(&mut self, s: &mut Snapshotting) {
        let Some(mut new) = self.outside.take() else {
            return;
        };
        s.content = self.read_all();
        self.files[self.top].places = self.slots_in(self.top);
        let places = new.places.clone();
        let alloc = Self::alloc_of(self.cfg, &mut new, &places);
        s.retired = Some(self.retire(alloc));
        self.dirty = DirtyPages::new(new.header.nr_pages()).expect("memory");
        self.files.push(new);
        self.top += 1;
        self.gate = true;
        self.old_is_enough = true;
        self.is_frozen = false;
    }

    fn finish_old(&mut self, mut s: Snapshotting, ok: Option<bool>) -> Next {
        let Some(retired) = &mut s.retired else {
            return s.advance(false);
        };
        if s.is_cut {
            return s.advance(ok != Some(false));
        }
        match self.finish_retired(retired, ok) {
            Progress::Wait(wait) => Some((Kind::Snapshot(s), wait)),
            Progress::Done(false) => s.advance(false),
            Progress::Done(true) => {
                self.cut_retired(retired);
                let wait = self.sync_of(Where::Chain(retired.file));
                s.is_cut = true;
                Some((Kind::Snapshot(s), wait))
            }
        }
    }
}

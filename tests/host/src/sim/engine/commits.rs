// SPDX-License-Identifier: GPL-2.0
//! Commits of the executor: what `ploop_pure::commit` says, step by step, and who waits for it.

use super::{Committing, Engine, Job, Wait};
use crate::rng::Rng;
use crate::sim::blocks::PAGE_SECTORS;
use crate::sim::disk::OpId;
use crate::sim::Fault;
use ploop_pure::commit::{self, Commit};
use ploop_pure::flow;

impl Engine<'_> {
    /// One step of the commit; starts one if none runs. True when it has ended.
    pub fn commit(&mut self, rng: &mut Rng) -> Result<bool, String> {
        let Some((mut machine, doing)) = self.commit.take() else {
            let (machine, action) = Commit::start(false);
            self.alloc.commit_begins();
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::NextCommit) {
                    t.wait = Wait::ThisCommit;
                }
            }
            self.commit = Some((machine, Committing::Ready(action)));
            return Ok(false);
        };
        let doing = match doing {
            Committing::Ready(commit::Action::Copy { cursor }) => {
                let next = self.dirty.take_batch(cursor);
                self.copies.clear();
                let pages = Vec::from(self.dirty.batch());
                for page in pages {
                    let copy = self.page(page);
                    self.copies.push((page, copy));
                }
                let nr = self.copies.len();
                Committing::Ready(machine.next(commit::Event::Copied { nr, next }))
            }
            Committing::Ready(commit::Action::SyncData) => {
                Committing::Syncing(self.disk.sync_start(), false)
            }
            Committing::Ready(commit::Action::SyncIndex) => {
                Committing::Syncing(self.disk.sync_start(), true)
            }
            Committing::Syncing(covered, is_index) => {
                let event = if rng.chance(self.cfg.sync_fail_percent) {
                    self.disk.sync_fail(covered, rng);
                    commit::Event::Failed
                } else {
                    self.disk.sync_end(covered);
                    commit::Event::Ok
                };
                if is_index && event == commit::Event::Ok {
                    self.dirty.settle(true);
                }
                Committing::Ready(machine.next(event))
            }
            Committing::Ready(commit::Action::WriteDrops | commit::Action::SyncDrops) => {
                return Err("a commit without a merge drops entries".into());
            }
            Committing::Ready(commit::Action::WriteIndex) => {
                Committing::Writing(self.write_index())
            }
            Committing::Writing(op) => {
                self.disk.complete(op);
                Committing::Ready(machine.next(commit::Event::Ok))
            }
            Committing::Ready(commit::Action::Done) => {
                self.commit_ended(true);
                return Ok(true);
            }
            Committing::Ready(commit::Action::Fail) => {
                self.dirty.settle(false);
                self.is_poisoned = true;
                self.commit_ended(false);
                return Ok(true);
            }
        };
        self.commit = Some((machine, doing));
        Ok(false)
    }

    fn commit_ended(&mut self, ok: bool) {
        self.alloc.commit_ended(ok);
        let mut i = 0;
        while i < self.tasks.len() {
            if !matches!(self.tasks[i].wait, Wait::ThisCommit) {
                i += 1;
                continue;
            }
            match &self.tasks[i].job {
                Job::Flush { promise } => {
                    if ok {
                        self.guest.flush_done(promise);
                    }
                    self.tasks.remove(i);
                }
                Job::Write { .. } => {
                    let event = if ok {
                        flow::Event::Ok
                    } else {
                        flow::Event::Failed
                    };
                    self.event(i, event);
                    i += 1;
                }
            }
        }
    }

    /// Writes the copies. All pages of a batch are one operation, torn anywhere.
    fn write_index(&mut self) -> OpId {
        if self.cfg.fault == Fault::CopyLate {
            for (page, _) in std::mem::take(&mut self.copies) {
                let copy = self.page(page);
                self.copies.push((page, copy));
            }
        }
        let mut op = None;
        for (page, copy) in &self.copies {
            let first = *page as usize * PAGE_SECTORS;
            op = Some(match op {
                None => self.disk.write(first, copy),
                Some(op) => self.disk.write_more(op, first, copy),
            });
        }
        op.unwrap_or_else(|| self.disk.write(0, &[]))
    }
}

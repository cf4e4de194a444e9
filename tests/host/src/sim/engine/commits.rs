// SPDX-License-Identifier: GPL-2.0
//! Commits of the executor: what `ploop_pure::commit` says, step by step, and who waits for it.

use super::{Engine, Job, Wait};
use crate::rng::Rng;
use crate::sim::blocks::PAGE_SECTORS;
use crate::sim::disk::{Covered, Disk, OpId, Stamp};
use crate::sim::Fault;
use ploop_pure::commit::{self, Commit};
use ploop_pure::flow::{self, Settled};

/// Copies of index pages, with their numbers.
pub(super) type Copies = Vec<(u32, [Stamp; PAGE_SECTORS])>;

/// What the committer is doing.
#[derive(Debug)]
pub(super) enum Committing {
    Ready(commit::Action),
    /// The source's pages are copied, the top's follow; or the other way round, by a fault.
    Half {
        next: Option<u32>,
    },
    Syncing(Covered, commit::Action),
    Writing(OpId, commit::Action),
}

/// One commit.
#[derive(Debug)]
pub(super) struct Running {
    machine: Commit,
    doing: Committing,
    /// Of the top.
    copies: Copies,
    /// Of the source of a merge.
    drops: Copies,
    /// What had been done to the top's file when it began.
    changes: u64,
}

impl Engine<'_> {
    /// One step of the commit; starts one if none runs.
    pub fn commit(&mut self, rng: &mut Rng) -> Result<(), String> {
        let Some(mut commit) = self.commit.take() else {
            let (machine, action) = Commit::start(self.is_merging());
            self.alloc.commit_begins();
            self.wants_commit = false;
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::NextCommit) {
                    t.wait = Wait::ThisCommit;
                }
            }
            self.op_commit_begins();
            self.tell(|| "commit: begins".into());
            self.commit = Some(Running {
                machine,
                doing: Committing::Ready(action),
                copies: Vec::new(),
                drops: Vec::new(),
                changes: self.disk().changes,
            });
            return Ok(());
        };
        self.tell(|| format!("commit: {:?}", commit.doing));
        let action = match commit.doing {
            Committing::Ready(action) => action,
            Committing::Half { next } => {
                self.copy(&mut commit, self.cfg.fault == Fault::DestinationCopiedFirst);
                let nr = self.dirty.batch().len();
                commit.machine.next(commit::Event::Copied { nr, next })
            }
            Committing::Syncing(covered, action) => {
                let is_drops = action == commit::Action::SyncDrops;
                let failed = rng.chance(self.cfg.sync_fail_percent);
                let disk = self.disk_of(is_drops);
                let event = if failed {
                    disk.sync_fail(covered, rng);
                    commit::Event::Failed
                } else {
                    disk.sync_end(covered);
                    commit::Event::Ok
                };
                let last = match self.cfg.fault {
                    Fault::SettledBeforeDrops => commit::Action::SyncIndex,
                    _ if self.is_merging() => commit::Action::SyncDrops,
                    _ => commit::Action::SyncIndex,
                };
                if action == last && event == commit::Event::Ok {
                    self.dirty.settle(true);
                }
                commit.machine.next(event)
            }
            Committing::Writing(op, action) => {
                let disk = self.disk_of(action == commit::Action::WriteDrops);
                disk.complete(op);
                if self.cfg.fault == Fault::PageWrittenTwice {
                    // The page's last write, on its way all the time, ends after this one.
                    let last = std::mem::replace(&mut self.written, commit.copies.clone());
                    let op = write_pages(self.disk_of(false), &last);
                    self.disk_of(false).complete(op);
                }
                commit.machine.next(commit::Event::Ok)
            }
        };
        // What is ready takes a step of its own, so that the power can be cut before it.
        if !matches!(commit.doing, Committing::Ready(_)) {
            commit.doing = Committing::Ready(action);
            self.commit = Some(commit);
            return Ok(());
        }
        let action = match self.is_poisoned && self.cfg.fault != Fault::PoisonSettles {
            true => commit.machine.next(commit::Event::Failed),
            false => action,
        };
        commit.doing = match action {
            commit::Action::Copy { cursor } => {
                let next = self.dirty.take_batch(cursor);
                if self.is_merging() {
                    self.copy(&mut commit, self.cfg.fault != Fault::DestinationCopiedFirst);
                    Committing::Half { next }
                } else {
                    self.copy(&mut commit, false);
                    let nr = self.dirty.batch().len();
                    let event = commit::Event::Copied { nr, next };
                    Committing::Ready(commit.machine.next(event))
                }
            }
            commit::Action::SyncData | commit::Action::SyncIndex | commit::Action::SyncDrops => {
                let disk = self.disk_of(action == commit::Action::SyncDrops);
                Committing::Syncing(disk.sync_start(), action)
            }
            commit::Action::WriteIndex => {
                if self.cfg.fault == Fault::CopyLate {
                    self.copy(&mut commit, false);
                }
                let op = write_pages(self.disk_of(false), &commit.copies);
                Committing::Writing(op, action)
            }
            commit::Action::WriteDrops => {
                Committing::Writing(write_pages(self.disk_of(true), &commit.drops), action)
            }
            commit::Action::Done => {
                let mut settled = Settled::default();
                settled.committed(commit.changes, 0);
                self.settled = (self.files[self.top].id, settled);
                self.commit_ended(true);
                return Ok(());
            }
            commit::Action::Fail => {
                self.dirty.settle(false);
                self.is_poisoned = true;
                self.commit_ended(false);
                return Ok(());
            }
        };
        self.commit = Some(commit);
        Ok(())
    }

    /// Somebody else than the commit finds that a sync has failed.
    pub(super) fn poison(&mut self) {
        self.is_poisoned = true;
        if self.cfg.fault == Fault::PoisonSettles {
            self.dirty.settle(false);
            if let Some(commit) = &mut self.commit {
                // What is not in the batch is not written.
                commit.copies.clear();
                commit.drops.clear();
            }
        }
    }

    /// Whether a commit runs.
    pub fn is_committing(&self) -> bool {
        self.commit.is_some()
    }

    /// Copies the batch's pages of the top, or those of the source of a merge.
    fn copy(&mut self, commit: &mut Running, of_source: bool) {
        let level = usize::from(of_source) + self.top;
        let copies = self.copies_of(level);
        match of_source {
            true => commit.drops = copies,
            false => commit.copies = copies,
        }
    }

    /// Copies of the batch's pages of a file.
    pub(super) fn copies_of(&mut self, file: usize) -> Copies {
        let pages = Vec::from(self.dirty.batch());
        self.pages_of(file, pages)
    }

    /// Copies of index pages of a file; a raw one has none.
    pub(super) fn pages_of(&mut self, file: usize, pages: impl IntoIterator<Item = u32>) -> Copies {
        if self.files[file].is_raw {
            return Copies::new();
        }
        let header = self.files[file].header;
        let copy = |page| match self.cfg.fault {
            Fault::StaleHeader => {
                let places = self.slots_in(file);
                (page, self.compose(header.closed(false), &places, page))
            }
            _ => (page, self.page(file, page)),
        };
        pages.into_iter().map(copy).collect()
    }

    /// The disk of the top, or that of the source of a merge.
    fn disk_of(&mut self, source: bool) -> &mut Disk {
        &mut self.files[self.top + usize::from(source)].disk
    }

    fn commit_ended(&mut self, ok: bool) {
        self.may_clean |= self.alloc.commit_ended(ok);
        self.op_commit_ended(ok);
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
                Job::Write { machine: None, .. } => {
                    if ok {
                        self.zeroed(i);
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
                Job::Read { .. } => i += 1,
            }
        }
    }
}

/// Writes copies. All pages of a batch are one operation, torn anywhere.
pub(super) fn write_pages(disk: &mut Disk, copies: &Copies) -> OpId {
    let op = disk.write(0, &[]);
    for (page, copy) in copies {
        disk.write_more(op, *page as usize * PAGE_SECTORS, copy);
    }
    op
}

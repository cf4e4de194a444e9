// SPDX-License-Identifier: GPL-2.0
//! What changes a chain in use, one operation at a time: which begins, what it waits for, and the
//! steps that several of them have.

use super::commits::{write_pages, Copies};
use super::lower::Lower;
use super::merge::Merge;
use super::relocate::Relocate;
use super::snapshot::Snapshotting;
use super::{level_of, Engine, File};
use crate::rng::Rng;
use crate::sim::blocks::PAGE_SECTORS;
use crate::sim::disk::{Covered, Disk, OpId, Stamp};
use crate::sim::{Fault, Op};
use ploop_pure::alloc::Alloc;
use ploop_pure::commit::{self, Commit};
use ploop_pure::map::Place;
use ploop_pure::units::ImageCluster;
use std::fmt;

/// A file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// Of the chain.
    Chain(usize),
    /// `Engine::outside`.
    Outside,
}

/// What an operation waits for.
#[derive(Debug)]
pub(super) enum OpWait {
    Ready,
    Io(Where, OpId),
    Sync(Where, Covered),
    /// A commit that starts after it began to wait.
    NextCommit,
    ThisCommit,
    /// That nobody is at work; no request starts.
    Quiet,
    /// All who use the place of a cluster that it has closed.
    Epoch(usize),
    /// Space in the top's file.
    Space,
    /// All slots that came back.
    Clean,
}

/// What it is.
#[derive(Debug)]
pub(super) enum Kind {
    Snapshot(Snapshotting),
    Merge(Merge),
    Lower(Lower),
    Relocate(Relocate),
}

/// The operation that runs.
#[derive(Debug)]
pub(super) struct Running {
    kind: Kind,
    wait: OpWait,
}

/// What follows a step; nothing after the last one.
pub(super) type Next = Option<(Kind, OpWait)>;

/// The last commit of an engine whose place another one has taken, or of one that requests do not
/// know.
pub(super) struct Retired {
    /// Its top.
    pub(super) file: usize,
    pub(super) alloc: Alloc,
    machine: Commit,
    action: commit::Action,
    copies: Copies,
    drops: Copies,
}

impl Retired {
    /// An engine of its own for `file`, which is not the top.
    pub(super) fn of(file: usize, alloc: Alloc) -> Self {
        let (copies, drops) = (Copies::new(), Copies::new());
        let (machine, action) = Commit::of_copies(0, false);
        Self {
            file,
            alloc,
            machine,
            action,
            copies,
            drops,
        }
    }

    /// Another commit, of these copies.
    pub(super) fn restart(&mut self, copies: Copies) {
        self.alloc.commit_begins();
        (self.machine, self.action) = Commit::of_copies(copies.len(), false);
        self.copies = copies;
    }
}

impl fmt::Debug for Retired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {} {:?}", self.file, self.action)
    }
}

/// How far that is.
pub(super) enum Progress {
    Wait(OpWait),
    Done(bool),
}

impl Engine<'_> {
    pub(super) fn new_op(&mut self, rng: &mut Rng) {
        self.ops_left -= 1;
        let op = match self.cfg.op {
            Op::Mixed if rng.chance(40) => Op::Compact,
            Op::Mixed if self.files.len() == 1 && rng.chance(40) => Op::Grow,
            Op::Mixed => Op::Chain,
            op => op,
        };
        let nr = self.files.len();
        let kind = match op {
            Op::Lower if nr > 2 && rng.chance(60) => {
                Kind::Lower(Lower::start(1 + rng.pick(nr - 2), rng))
            }
            Op::Lower if nr < 4 && (nr < 3 || rng.chance(70)) => {
                Kind::Snapshot(Snapshotting::start())
            }
            Op::Lower => Kind::Merge(Merge::start(rng)),
            Op::Chain if self.files.len() == 1 => Kind::Snapshot(Snapshotting::start()),
            Op::Chain => Kind::Merge(Merge::start(rng)),
            Op::Compact => Kind::Relocate(Relocate::compact()),
            Op::Grow => Kind::Relocate(Relocate::grow()),
            Op::None | Op::Mixed => return,
        };
        let wait = OpWait::Ready;
        self.op = Some(Running { kind, wait });
    }

    pub(super) fn op_may_step(&self) -> bool {
        match self.op.as_ref().map(|op| &op.wait) {
            Some(OpWait::Ready | OpWait::Io(..) | OpWait::Sync(..)) => true,
            Some(OpWait::Quiet) => self.is_quiet(),
            Some(OpWait::Epoch(cluster)) => self.is_left(*cluster),
            Some(OpWait::Clean) => !self.may_clean && self.is_no_space_made(),
            Some(OpWait::NextCommit | OpWait::ThisCommit | OpWait::Space) | None => false,
        }
    }

    pub(super) fn step_op(&mut self, rng: &mut Rng) -> Result<(), String> {
        let Some(Running { kind, wait }) = self.op.take() else {
            return Ok(());
        };
        self.tell(|| format!("{kind:?}, after {wait:?}"));
        let ok = match wait {
            OpWait::Io(at, op) => {
                self.disk_at(at).complete(op);
                true
            }
            OpWait::Sync(at, covered) => {
                let failed = rng.chance(self.cfg.sync_fail_percent);
                match failed {
                    true => self.disk_at(at).sync_fail(covered, rng),
                    false => self.disk_at(at).sync_end(covered),
                }
                !failed
            }
            OpWait::Ready
            | OpWait::NextCommit
            | OpWait::ThisCommit
            | OpWait::Quiet
            | OpWait::Epoch(_)
            | OpWait::Space
            | OpWait::Clean => true,
        };
        let next = match kind {
            Kind::Snapshot(s) => self.snapshot(s, ok),
            Kind::Merge(_) | Kind::Lower(_) | Kind::Relocate(_) if !ok => {
                self.is_poisoned = true;
                None
            }
            Kind::Lower(m) => self.lower(m, rng),
            Kind::Merge(m) => self.merge(m, rng)?,
            Kind::Relocate(r) => self.relocate(r, rng)?,
        };
        self.ops_done += u32::from(next.is_none());
        self.op = next.map(|(kind, wait)| Running { kind, wait });
        Ok(())
    }

    fn set_wait(&mut self, is_old: impl Fn(&OpWait) -> bool, new: OpWait) {
        if let Some(op) = self.op.as_mut().filter(|op| is_old(&op.wait)) {
            op.wait = new;
        }
    }

    pub(super) fn op_wants_commit(&self) -> bool {
        matches!(&self.op, Some(op) if matches!(op.wait, OpWait::NextCommit))
    }

    pub(super) fn op_commit_begins(&mut self) {
        self.set_wait(|w| matches!(w, OpWait::NextCommit), OpWait::ThisCommit);
    }

    /// After a failure everything ends anyway.
    pub(super) fn op_commit_ended(&mut self, ok: bool) {
        if ok {
            self.set_wait(|w| matches!(w, OpWait::ThisCommit), OpWait::Ready);
        }
    }

    pub(super) fn op_wants_space(&self) -> bool {
        matches!(&self.op, Some(op) if matches!(op.wait, OpWait::Space))
    }

    pub(super) fn op_wants_clean(&self) -> bool {
        matches!(&self.op, Some(op) if matches!(op.wait, OpWait::Clean))
    }

    pub(super) fn op_has_space(&mut self) {
        self.set_wait(|w| matches!(w, OpWait::Space), OpWait::Ready);
    }

    pub(super) fn disk_at(&mut self, at: Where) -> &mut Disk {
        match at {
            Where::Chain(file) => &mut self.files[file].disk,
            Where::Outside => &mut self.outside.as_mut().expect("a file outside").disk,
        }
    }

    pub(super) fn sync_of(&mut self, at: Where) -> OpWait {
        let covered = self.disk_at(at).sync_start();
        OpWait::Sync(at, covered)
    }

    /// Starts to write the top's header with its mark.
    pub fn write_mark(&mut self) -> OpId {
        match self.files[self.top].is_raw {
            true => self.disk().write(0, &[]),
            false => {
                let page = self.page(self.top, 0);
                self.disk().write(0, &page)
            }
        }
    }

    /// Starts to write the top's header after a clean close.
    pub fn write_unmark(&mut self) -> OpId {
        self.close_header(Where::Chain(self.top))
    }

    /// Marks an image in use; a raw one has no mark.
    pub(super) fn write_opened(&mut self, at: Where) -> OpWait {
        let file = self.file_at(at);
        if file.is_raw {
            return OpWait::Io(at, file.disk.write(0, &[]));
        }
        file.header = file.header.opened();
        self.write_header(at)
    }

    /// Writes page 0 with the header as it is now.
    pub(super) fn write_header(&mut self, at: Where) -> OpWait {
        let page = self.page_0(at);
        let op = self.disk_at(at).write(0, &page);
        OpWait::Io(at, op)
    }

    /// The same after a clean close; from here on the file may be found closed.
    pub(super) fn write_closed(&mut self, at: Where) -> OpWait {
        OpWait::Io(at, self.close_header(at))
    }

    fn close_header(&mut self, at: Where) -> OpId {
        let is_empty = match at {
            Where::Chain(file) => self.slots_in(file).iter().flatten().next().is_none(),
            Where::Outside => true,
        };
        let file = self.file_at(at);
        if file.is_raw {
            return file.disk.write(0, &[]);
        }
        file.header = file.header.closed(is_empty);
        let page = self.page_0(at);
        let file = self.file_at(at);
        let mut last = file.disk.live().clone();
        last.sectors[..PAGE_SECTORS].copy_from_slice(&page);
        file.closed.push(last);
        file.disk.write(0, &page)
    }

    pub(super) fn file_at(&mut self, at: Where) -> &mut File {
        match at {
            Where::Chain(file) => &mut self.files[file],
            Where::Outside => self.outside.as_mut().expect("a file outside"),
        }
    }

    fn page_0(&mut self, at: Where) -> [Stamp; PAGE_SECTORS] {
        match at {
            Where::Chain(file) if self.cfg.fault == Fault::StaleEntries => {
                // Of the top, these are from the attach or the switch to it.
                let (header, places) = (self.files[file].header, self.files[file].places.clone());
                self.compose(header, &places, 0)
            }
            Where::Chain(file) => self.page(file, 0),
            // It has no entries.
            Where::Outside => {
                let (header, nr) = (self.file_at(at).header, self.map.len());
                self.compose(header, &vec![None; nr], 0)
            }
        }
    }

    /// Ends the part of the top in requests, while the queue is held: copies its last dirty pages,
    /// and takes `alloc` for the next top.
    pub(super) fn retire(&mut self, alloc: Alloc) -> Retired {
        self.alloc.commit_begins();
        // The engine copies as many batches as there are; of disks as small as these that is one.
        assert_eq!(self.dirty.take_batch(0), None);
        let copies = self.copies_of(self.top);
        let drops = match self.is_merging() {
            true => self.copies_of(self.top + 1),
            false => Vec::new(),
        };
        let nr = self.dirty.batch().len();
        self.dirty.settle(true);
        let (machine, action) = Commit::of_copies(nr, self.is_merging());
        Retired {
            file: self.top,
            alloc: std::mem::replace(&mut self.alloc, alloc),
            machine,
            action,
            copies,
            drops,
        }
    }

    /// Goes on with that; `ok` is what came of the last step, if there was one.
    pub(super) fn finish_retired(&mut self, r: &mut Retired, ok: Option<bool>) -> Progress {
        if let Some(ok) = ok {
            let event = match ok {
                true => commit::Event::Ok,
                false => commit::Event::Failed,
            };
            r.action = r.machine.next(event);
        }
        let (index, drops) = (Where::Chain(r.file), Where::Chain(r.file + 1));
        Progress::Wait(match r.action {
            commit::Action::SyncData | commit::Action::SyncIndex => self.sync_of(index),
            commit::Action::SyncDrops => self.sync_of(drops),
            commit::Action::WriteIndex => {
                OpWait::Io(index, write_pages(self.disk_at(index), &r.copies))
            }
            commit::Action::WriteDrops => {
                OpWait::Io(drops, write_pages(self.disk_at(drops), &r.drops))
            }
            commit::Action::Done => {
                r.alloc.commit_ended(true);
                return Progress::Done(true);
            }
            commit::Action::Copy { .. } | commit::Action::Fail => return Progress::Done(false),
        })
    }

    /// Makes what came back to a retired file's slots zero, and cuts it, for one sync to cover.
    pub(super) fn cut_retired(&mut self, r: &mut Retired) {
        let nr = self.cfg.cluster_sectors();
        let disk = &mut self.files[r.file].disk;
        while let Some(run) = r.alloc.next_freed(u32::MAX) {
            let op = disk.write(run.start as usize * nr, &vec![0; nr * run.len()]);
            disk.complete(op);
            r.alloc.cleaned(run);
        }
        let op = disk.set_len(r.alloc.cut() as usize * nr);
        disk.complete(op);
    }

    /// Starts to make a slot of the top zero.
    pub(super) fn zero_slot(&mut self, at: ImageCluster) -> OpId {
        let nr = self.cfg.cluster_sectors();
        self.disk().write(at.0 as usize * nr, &vec![0; nr])
    }

    /// Starts to copy a whole cluster to a slot of the top.
    pub(super) fn copy_cluster(&mut self, from: Place, to: ImageCluster) -> OpWait {
        self.copy_cluster_to(self.top, from, to)
    }

    /// The same to a slot of `file`.
    pub(super) fn copy_cluster_to(&mut self, file: usize, from: Place, to: ImageCluster) -> OpWait {
        let nr = self.cfg.cluster_sectors();
        let data: Vec<_> = (0..nr).map(|s| self.read(from, s)).collect();
        let first = to.0 as usize * nr;
        let disk = &mut self.files[file].disk;
        let op = disk.write(first, &[]);
        copy_to(disk, op, first, &data);
        OpWait::Io(Where::Chain(file), op)
    }

    /// A cluster that was copied has this slot of the top now.
    pub(super) fn publish_copy(&mut self, cluster: usize, at: ImageCluster) {
        let level = level_of(self.top);
        let place = Place::Slot { level, at };
        if let Some(slot) = self.slot(place) {
            self.guest.mapped(cluster, slot, None);
        }
        self.unlock(cluster, Some(place));
    }
}

/// Adds copied sectors to the write `op`; zeros are left out, as the slot reads as zeros.
pub(super) fn copy_to(disk: &mut Disk, op: OpId, first: usize, data: &[Stamp]) {
    for (s, stamp) in data.iter().enumerate().filter(|(_, stamp)| **stamp != 0) {
        disk.write_more(op, first + s, &[*stamp]);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Writes: the steps that [`ploop_pure::flow`] decides, done.

use super::{cow::Copy, lockout::Change, Disk, Engine, Extent, Phase};
use crate::{
    error::is_no_space,
    format::ploop1::Ploop1,
    sys::{
        mq::{Op, Request, Sync},
        prelude::*,
    },
};
use ploop_pure::{
    flow::{Action, Coverage, Durability, Event, Write},
    map::{Place, Word},
    units::{Cluster, ImageCluster, Level},
};

impl<D: Disk> Engine<D> {
    pub(super) fn write(self: &Arc<Self>, rq: Request<D>) {
        if !self.may_write() {
            return rq.end(Err(EIO));
        }
        let extent = match self.extent_of(&rq) {
            Ok(extent) => extent,
            Err(e) => return rq.end(Err(e)),
        };
        let coverage = self.coverage(extent);
        let durability = if rq.is_fua() {
            Durability::Fua
        } else {
            Durability::Volatile
        };
        self.begin_write(rq, extent, coverage, durability);
    }

    /// How much of its cluster an extent is.
    pub(super) fn coverage(&self, extent: Extent) -> Coverage {
        if extent.within == 0 && u64::from(extent.len) == self.chain.cluster().bytes() {
            Coverage::Whole
        } else {
            Coverage::Part
        }
    }

    /// Begins to write to `extent`, or waits for who has its cluster closed and starts again.
    pub(super) fn begin_write(
        self: &Arc<Self>,
        mut rq: Request<D>,
        extent: Extent,
        coverage: Coverage,
        durability: Durability,
    ) {
        rq.pdu().extent = extent;
        // Before the lookup: who takes the place away waits until we are done.
        rq.enter();
        let word = self.chain.word(extent.cluster);
        if word.is_closed() {
            return self.wait_for_cluster(rq);
        }
        let is_hole = word.place() == Place::Hole;
        if is_hole && !word.is_locked() && rq.op() == Op::Write && rq.is_zero() {
            // It reads as zeros already. That may be because of a discard that is not durable yet.
            return match durability {
                Durability::Volatile => rq.end(Ok(())),
                Durability::Fua => self.join_commit(rq),
            };
        }
        let mut write = Write::new(durability, coverage, self.chain.top_level());
        let found = self.found(&mut rq, word, durability);
        let action = write.next(found);
        rq.pdu().write = Some(write);
        self.act(rq, action);
    }

    /// Where the cluster of `rq` is. Whether a durable write is enough matters for FUA only, which
    /// else is a write and a commit: its entry has to be durable; all of it has to go there, and
    /// not a part to a place that it had before; and the file must not be in the page cache, where
    /// an error of the sync cannot be told from one of the write, and would be kept from the commit
    /// that it matters to.
    pub(super) fn found(&self, rq: &mut Request<D>, word: Word, durability: Durability) -> Event {
        let entry_durable = match durability {
            Durability::Volatile => true,
            Durability::Fua => {
                let page = Ploop1::page_of(rq.pdu().extent.cluster);
                rq.pdu().moved == 0
                    && self.chain.top().is_some_and(|top| top.io().is_direct())
                    && (self.chain.is_identity() || self.slow.lock().dirty.is_durable(page))
            }
        };
        Event::Found {
            place: word.place(),
            entry_durable,
        }
    }

    /// Does `action` and what follows from it, until the request waits for something or ends.
    pub(super) fn act(self: &Arc<Self>, mut rq: Request<D>, mut action: Action) {
        let cluster = rq.pdu().extent.cluster;
        loop {
            let event = match action {
                // It was poisoned while the request waited.
                Action::Lock | Action::TakeSlot if self.is_poisoned() => Event::Failed,
                Action::Lock => match self.lock_cluster(rq) {
                    Some((r, event)) => {
                        rq = r;
                        event
                    }
                    None => return,
                },
                Action::TakeSlot => match self.take_slot(rq) {
                    Some((r, event)) => {
                        rq = r;
                        event
                    }
                    None => return,
                },
                Action::CopyBelow { level, from, to } => {
                    match self.copy_below(rq, Copy { level, from, to }) {
                        Some((r, event)) => {
                            rq = r;
                            event
                        }
                        None => return,
                    }
                }
                Action::WriteData { at, durable } => match self.write_data(rq, at, durable) {
                    Some((r, event)) => {
                        rq = r;
                        event
                    }
                    None => return,
                },
                Action::UnlockAndWrite { at, durable } => {
                    // From here on the place is kept by this, not by the lock.
                    rq.enter();
                    self.unlock_cluster(cluster, Change::Keep);
                    match self.write_data(rq, at, durable) {
                        Some((r, event)) => {
                            rq = r;
                            event
                        }
                        None => return,
                    }
                }
                Action::Publish { at } => {
                    self.unlock_cluster(cluster, Change::Map(at));
                    if rq.op() == Op::Write {
                        // Noted when its data was there, but the disk has it from here on: who has begun to
                        // note since then, and read the disk already, has to know.
                        let (pos, len) = (rq.pos(), rq.len() as u64);
                        self.shared.tracks.disk_written(&(pos..pos + len));
                    }
                    Event::Ok
                }
                Action::Commit => return self.join_commit(rq),
                Action::Done if rq.op() == Op::Write => return rq.end(Ok(())),
                Action::Done => return self.discarded(rq),
                Action::Abandon { at } => {
                    match self.chain.hidden(cluster) == Some(at) {
                        true => self.abandon_hidden(cluster, at),
                        false => self.slow.lock().alloc.give_back(at),
                    }
                    self.unlock_cluster(cluster, Change::Keep);
                    return self.fail(rq);
                }
                Action::Unlock => {
                    self.unlock_cluster(cluster, Change::Keep);
                    return self.fail(rq);
                }
                Action::Fail => return self.fail(rq),
            };
            action = match &mut rq.pdu().write {
                Some(write) => write.next(event),
                None => Action::Fail,
            };
        }
    }

    /// A write to the slot `at` of a merge's destination has failed. Where nothing lies above, as behind
    /// the end that a raw one had, the cluster is what is there when the merge is over: zeros, as now.
    fn abandon_hidden(&self, cluster: Cluster, at: ImageCluster) {
        if self.chain.lookup(cluster) != Place::Hole || self.is_poisoned() {
            return;
        }
        if let Err(e) = self.clean_slot(at) {
            self.poison(e);
        }
    }

    pub(super) fn fail(&self, mut rq: Request<D>) {
        let cmd = rq.pdu();
        let error = cmd.error;
        // A sync reports what was lost once, so this may have been about earlier writes too. No
        // space for a direct write is about that write alone.
        if cmd.is_sync_failed {
            let top = self.chain.top();
            let is_alone = is_no_space(error)
                && rq.op() != Op::Flush
                && top.is_some_and(|t| t.io().is_direct());
            if !is_alone {
                self.poison(error);
            }
        }
        self.shared.stats.errors.add(1, Relaxed);
        if !self.is_poisoned() {
            self.shared.events.failed(rq.op(), error);
        }
        rq.end(Err(error));
    }

    /// Writes the request's data to a slot of the top. `None` if the request is on its way.
    fn write_data(
        self: &Arc<Self>,
        mut rq: Request<D>,
        at: ImageCluster,
        durable: bool,
    ) -> Option<(Request<D>, Event)> {
        let extent = rq.pdu().extent;
        let pos = self.chain.cluster().offset(at) + u64::from(extent.within);
        if rq.op() != Op::Write {
            return self.zero_data(rq, pos);
        }
        let sync = if durable { Sync::Data } else { Sync::No };
        self.submit(rq, self.chain.top_level(), pos, sync);
        None
    }

    /// A write found no space for its data: it waits for it and goes on, or fails if it must not
    /// wait.
    pub(super) fn data_lacks_space(
        self: &Arc<Self>,
        mut rq: Request<D>,
        level: Level,
        pos: u64,
        sync: Sync,
    ) {
        let cmd = rq.pdu();
        let holds_lock = cmd.write.is_some_and(|w| w.holds_lock());
        cmd.phase = if holds_lock {
            Phase::Moving { level, pos, sync }
        } else {
            Phase::Again
        };
        // What was looked up without the lock is looked up again.
        rq.leave();
        if let Some(mut rq) = self.park(rq) {
            let cmd = rq.pdu();
            cmd.is_sync_failed = sync == Sync::Data;
            match &mut cmd.write {
                Some(write) => {
                    let action = write.next(Event::Failed);
                    self.act(rq, action);
                }
                None => self.fail(rq),
            }
        }
    }
}

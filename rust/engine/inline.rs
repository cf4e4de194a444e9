// SPDX-License-Identifier: GPL-2.0
//! The fast path: a read or an overwrite of what is mapped goes out from `queue_rq`, without lock,
//! allocation or worker.

use super::{Disk, Engine, Extent, Phase};
use crate::{
    io::{bdev::DiskShape, Io},
    sys::{
        self,
        mq::{Op, Request, Sync},
        prelude::*,
    },
};
use core::ops::Range;
use ploop_pure::{
    flow::{Action, Durability, Event, Write},
    map::Place,
    units::{Level, SECTOR_BYTES},
};

impl<D: Disk> Engine<D> {
    /// Carries out a request that has just arrived, or gives it back as it was, for a worker.
    pub(crate) fn try_inline(&self, mut rq: Request<D>) -> Option<Request<D>> {
        if !self.may_inline {
            return Some(rq);
        }
        let is_write = match rq.op() {
            Op::Read => false,
            Op::Write if !rq.is_fua() && self.may_write() => true,
            Op::Flush if self.may_write() => return self.flush_inline(rq),
            Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Other => return Some(rq),
        };
        let Ok(extent) = self.extent_of(&rq) else {
            return Some(rq);
        };
        // Before the lookup: who takes the place away waits until we are done.
        rq.enter();
        let found = self.place_of(extent, is_write);
        let found = found.and_then(|found| Some((found, self.chain.delta(found.1)?.io())));
        let Some(((write, level, pos), io)) = found else {
            rq.leave();
            return Some(rq);
        };
        let cmd = rq.pdu();
        cmd.extent = extent;
        cmd.write = write;
        let sync = Sync::No;
        cmd.phase = Phase::Moving { level, pos, sync };
        let Some(mut rq) = self.submit_straight(rq, io, pos) else {
            self.shared.stats.requests.add(1, Relaxed);
            return None;
        };
        // A worker may be waiting until nobody is inside, and we wait for a worker.
        rq.leave();
        rq.pdu().arrive();
        Some(rq)
    }

    /// Finds out where a range of an image is on the device, for a request that a worker is to move
    /// there and for those that follow, and carries it out past the file system if that can be done
    /// now: a worker has all of its stack, and no plug. Else gives it back as it was.
    #[inline]
    pub(super) fn try_straight(
        &self,
        mut rq: Request<D>,
        io: &Io,
        range: Range<u64>,
    ) -> Option<Request<D>> {
        if !self.may_inline {
            return Some(rq);
        }
        let Phase::Moving { level, sync, .. } = rq.pdu().phase else {
            return Some(rq);
        };
        if level != self.chain.top_level() && sys::proc::is_wanted() {
            return Some(rq);
        }
        io.learn(&range, self.disk_shape());
        let cmd = rq.pdu();
        let (moved, holds_lock) = (cmd.moved, cmd.write.is_some_and(|w| w.holds_lock()));
        // Only what ends with its I/O drops what the page cache has read in meanwhile.
        let has_more = sync == Sync::Data || holds_lock || rq.is_fua();
        // Who must not wait would come back again and again.
        if moved != 0 || has_more || rq.has_nowait() {
            return Some(rq);
        }
        self.submit_straight(rq, io, range.start)
    }

    fn disk_shape(&self) -> DiskShape {
        DiskShape {
            cluster_log: self.chain.cluster().log_bytes(),
            bytes: self.chain.size_sectors().saturating_mul(SECTOR_BYTES),
        }
    }

    fn submit_straight(&self, mut rq: Request<D>, io: &Io, pos: u64) -> Option<Request<D>> {
        rq.pdu().is_straight = true;
        let Some(mut rq) = io.submit_inline(rq, pos) else {
            self.shared.stats.inline.add(1, Relaxed);
            return None;
        };
        rq.pdu().is_straight = false;
        Some(rq)
    }

    /// A FLUSH for which a flush of the device is enough (ordering rule 3).
    fn flush_inline(&self, rq: Request<D>) -> Option<Request<D>> {
        let Some(top) = self.chain.top().filter(|_| self.chain.source().is_none()) else {
            return Some(rq);
        };
        // Until the top before is finished, flushes wait for that, too.
        if !self.gate.is_open() || !self.shared.tracks.fua.are_all_done() {
            return Some(rq);
        }
        let changes = self.nr_changes();
        let now = sys::uptime_ms();
        let is_enough = {
            let slow = self.slow.lock();
            slow.settled.is_flush_enough(changes, &slow.dirty, now)
        };
        if !is_enough {
            return Some(rq);
        }
        let left = top.io().flush_inline(rq);
        if left.is_none() {
            self.shared.stats.requests.add(1, Relaxed);
            self.shared.stats.inline.add(1, Relaxed);
        }
        left
    }

    /// What was done to the top's file through its file system; see [`Settled`](ploop_pure::flow::Settled).
    pub(super) fn nr_changes(&self) -> u64 {
        let of_file = self.chain.top().map_or(0, |top| top.io().nr_changes());
        of_file.wrapping_add(self.shared.tracks.nr_by_file())
    }

    /// Takes a FLUSH back from the device.
    pub(super) fn flushed(mut rq: Request<D>, result: Result) {
        // A write that syncs too may be told of what was lost, instead of us.
        let is_alone = rq.driver().tracks().fua.are_all_done();
        let cmd = rq.pdu();
        match result {
            Ok(()) if is_alone => return rq.complete(Ok(())),
            // Others sync the file: by the next commit.
            Ok(()) => cmd.phase = Phase::Again,
            Err(e) if e == EAGAIN => cmd.phase = Phase::Again,
            Err(e) => {
                cmd.error = e;
                cmd.is_sync_failed = true;
                cmd.phase = Phase::Failed;
            }
        }
        rq.enqueue();
    }

    /// Where data is that can be moved as it is: the byte in the image of a level; and for a write, its
    /// steps. `None` for all that takes more.
    fn place_of(&self, extent: Extent, is_write: bool) -> Option<(Option<Write>, Level, u64)> {
        let word = self.chain.word(extent.cluster);
        if word.is_closed() {
            return None;
        }
        let Place::Slot { level, at } = word.place() else {
            return None;
        };
        let pos = self.chain.cluster().offset(at) + u64::from(extent.within);
        if !is_write {
            return Some((None, level, pos));
        }
        let (durability, coverage) = (Durability::Volatile, self.coverage(extent));
        let mut write = Write::new(durability, coverage, self.chain.top_level());
        let found = Event::Found {
            place: word.place(),
            entry_durable: true,
        };
        match write.next(found) {
            Action::WriteData { durable: false, .. } => Some((Some(write), level, pos)),
            _ => None,
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The fast path: a read or an overwrite of what is mapped goes out from `queue_rq`, without lock,
//! allocation or worker.

use super::{Disk, Engine, Extent, Phase};
use crate::sys::{
    mq::{Op, Request, Sync},
    prelude::*,
};
use ploop_pure::{
    flow::{Action, Durability, Event, Write},
    map::Place,
    units::Level,
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
        let Some(mut rq) = io.submit_inline(rq, pos) else {
            self.shared.stats.requests.add(1, Relaxed);
            self.shared.stats.inline.add(1, Relaxed);
            return None;
        };
        // A worker may be waiting until nobody is inside, and we wait for a worker.
        rq.leave();
        rq.pdu().arrive();
        Some(rq)
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

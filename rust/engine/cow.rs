// SPDX-License-Identifier: GPL-2.0
//! Copy on write: a slot of the top is completed from the lower delta that holds the cluster.
//!
//! Where both files are on one file system that can share blocks between files, the slot shares
//! those of the lower delta's: nothing is copied until one of them is written.
//!
//! Elsewhere the copy goes through a few buffers that the engine has from the start; who finds none waits
//! for one. What reads as zeros is not written: a slot that was just taken reads as zeros too.

use super::{lockout::wake, Disk, Engine, Phase};
use crate::{
    error::is_no_space,
    sys::{
        mq::{Op, Request, RequestList},
        pages::{PageBuf, PAGE_BYTES},
        prelude::*,
        trace,
    },
};
use core::ops::Range;
use ploop_pure::{
    flow::{Action, Event},
    units::{ImageCluster, Level},
};

/// Copies made at the same time.
pub(super) const COPIES_MAX: usize = 4;
/// Pages of a buffer.
const BUF_PAGES: usize = 64;
/// What a write covers in the middle of its cluster is copied, too, if it is not more than this: one I/O
/// takes less than two.
const MIDDLE_MAX: u64 = 16 << 10;

/// The buffers of a chain that has lower deltas.
pub(super) fn buffers() -> Result<KVec<PageBuf>> {
    let mut bufs = KVec::with_capacity(COPIES_MAX, GFP_KERNEL)?;
    for _ in 0..COPIES_MAX {
        bufs.push(PageBuf::new(BUF_PAGES)?, GFP_KERNEL)?;
    }
    Ok(bufs)
}

/// A copy to be made.
#[derive(Clone, Copy)]
pub(super) struct Copy {
    /// The lower delta.
    pub(super) level: Level,
    /// Its slot.
    pub(super) from: ImageCluster,
    /// The slot of the top.
    pub(super) to: ImageCluster,
}

impl<D: Disk> Engine<D> {
    /// Copies what `rq` does not cover of its cluster. `None` if `rq` now waits for a buffer, or for
    /// space: its handler is called again when there is.
    pub(super) fn copy_below(
        self: &Arc<Self>,
        mut rq: Request<D>,
        copy: Copy,
    ) -> Option<(Request<D>, Event)> {
        let again = {
            let Copy { level, from, to } = copy;
            Phase::Act(Action::CopyBelow { level, from, to })
        };
        let mut buf = {
            let mut slow = self.slow.lock();
            match slow.copy_bufs.pop() {
                Some(buf) => buf,
                None => {
                    rq.pdu().phase = again;
                    slow.copy_waiters.push_back(rq);
                    return None;
                }
            }
        };
        let size = self.chain.cluster().bytes();
        let extent = rq.pdu().extent;
        let start = u64::from(extent.within);
        let end = start + u64::from(extent.len);
        // Whole pages: the write's own part is written after this.
        let page = PAGE_BYTES as u64;
        let head = 0..start.next_multiple_of(page);
        let tail = (end - end % page)..size;
        let copied = match self.clone_slot(copy) {
            true => Ok(()),
            false => self.copy_around(copy, head, tail, rq.op(), &mut buf),
        };
        self.give_buffer_back(buf);
        self.slot_written(copy.to);
        trace::copy(self.device, copy.level.0, copy.from.0, copy.to.0, copied);
        let event = match copied {
            Ok(()) => Event::Ok,
            Err(e) => {
                rq.pdu().error = e;
                if is_no_space(e) {
                    rq.pdu().phase = again;
                    rq = self.park(rq)?;
                }
                Event::Failed
            }
        };
        Some((rq, event))
    }

    /// Copies `head` and `tail` of the cluster, which are its begin and its end; perhaps with what is
    /// between them, which `op` changes after this.
    fn copy_around(
        &self,
        copy: Copy,
        head: Range<u64>,
        tail: Range<u64>,
        op: Op,
        buf: &mut PageBuf,
    ) -> Result {
        let is_small = tail.start.saturating_sub(head.end) <= MIDDLE_MAX;
        // Zeros would make a hole there again.
        let joins = op == Op::Write && is_small && !head.is_empty() && !tail.is_empty();
        if joins && self.copy_range(copy, head.start..tail.end, buf).is_ok() {
            return Ok(());
        }
        // Perhaps only what need not be copied could not be read.
        self.copy_range(copy, head, buf)?;
        self.copy_range(copy, tail, buf)
    }

    fn give_buffer_back(&self, buf: PageBuf) {
        let mut woken = RequestList::new();
        {
            let mut slow = self.slow.lock();
            // It was taken from there, so there is room.
            let _ = slow.copy_bufs.push_within_capacity(buf);
            if let Some(rq) = slow.copy_waiters.pop_front() {
                woken.push_back(rq);
            }
        }
        wake(woken);
    }

    /// Lets the slot share what the other one has. False if that cannot be done; it is not tried
    /// again then.
    fn clone_slot(&self, copy: Copy) -> bool {
        if !self.clones.load(Relaxed) {
            return false;
        }
        let cloned = self.chain.delta(copy.level).ok_or(EIO).and_then(|lower| {
            let top = self.chain.top().ok_or(EIO)?;
            let size = self.chain.cluster();
            let (from, to) = (size.offset(copy.from), size.offset(copy.to));
            top.io().clone_range(to, lower.io(), from, size.bytes())
        });
        match cloned {
            Ok(()) => self.shared.stats.cloned.add(1, Relaxed),
            // No space for what describes the blocks; there may be some for a copy.
            Err(e) if is_no_space(e) => {}
            Err(_) => self.clones.store(false, Relaxed),
        }
        cloned.is_ok()
    }

    /// Copies a whole cluster to a slot that reads as zeros.
    pub(super) fn copy_slot(&self, copy: Copy, buf: &mut PageBuf) -> Result {
        let copied = match self.clone_slot(copy) {
            true => Ok(()),
            false => self.copy_range(copy, 0..self.chain.cluster().bytes(), buf),
        };
        self.slot_written(copy.to);
        trace::copy(self.device, copy.level.0, copy.from.0, copy.to.0, copied);
        copied
    }

    /// Notes what a copy has changed, perhaps, also if it failed.
    pub(super) fn slot_written(&self, at: ImageCluster) {
        let size = self.chain.cluster();
        let start = size.offset(at);
        self.shared
            .tracks
            .image_written(&(start..start.saturating_add(size.bytes())));
    }

    /// Copies `range` of the cluster, in bytes, whole pages, to a slot that reads as zeros.
    fn copy_range(&self, copy: Copy, range: Range<u64>, buf: &mut PageBuf) -> Result {
        let lower = self.chain.delta(copy.level).ok_or(EIO)?;
        let top = self.chain.top().ok_or(EIO)?;
        let size = self.chain.cluster();
        let (from, to) = (size.offset(copy.from), size.offset(copy.to));
        let mut at = range.start;
        while at < range.end {
            let left = (range.end - at) as usize / PAGE_BYTES;
            let nr = left.min(buf.len());
            if lower.io().read(from + at, buf, 0..nr)? != nr * PAGE_BYTES {
                return Err(EIO);
            }
            let mut idx = 0;
            while idx < nr {
                let is_zero = |i: &usize| buf.page(*i).is_none_or(|p| p.iter().all(|b| *b == 0));
                let first = (idx..nr).find(|i| !is_zero(i)).unwrap_or(nr);
                let end = (first..nr).find(is_zero).unwrap_or(nr);
                if first < end {
                    let pos = to + at + (first * PAGE_BYTES) as u64;
                    top.io().write(pos, buf, first..end)?;
                }
                idx = end;
            }
            at += (nr * PAGE_BYTES) as u64;
        }
        Ok(())
    }
}

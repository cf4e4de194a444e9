// SPDX-License-Identifier: GPL-2.0
//! Slots for new clusters, and the growth of the image file ahead of them.
//!
//! The file grows on a work item of its own, one step at a time, before the slots run out; who
//! finds none left waits for it. The new length is made durable by the next commit's data sync,
//! which is before any entry that names a slot in it (ordering rules 1 and 4).

use super::{
    is_no_space,
    lockout::{wake, wake_failed},
    Disk, Engine, Phase,
};
use crate::sys::{
    mq::{noio, Request},
    prelude::*,
    work::Work,
};
use ploop_pure::{
    alloc::Take,
    flow::{Action, Event},
    units::ImageCluster,
};

impl<D: Disk> Engine<D> {
    /// Takes a slot for `rq`. `None` if `rq` now waits for the file to grow: its handler is called
    /// again when it has, or when it cannot.
    pub(super) fn take_slot(self: &Arc<Self>, mut rq: Request<D>) -> Option<(Request<D>, Event)> {
        let (taken, is_low) = {
            let mut slow = self.slow.lock();
            let taken = slow.alloc.take();
            let is_low = slow.alloc.is_low();
            if taken == Take::NeedSpace {
                rq.pdu().phase = Phase::Act(Action::TakeSlot);
                slow.space_waiters.push_back(rq);
                drop(slow);
                self.make_space_soon();
                return None;
            }
            (taken, is_low)
        };
        if is_low {
            self.make_space_soon();
        }
        let event = match taken {
            Take::Slot(at) => {
                self.stats.allocated.add(1, Relaxed);
                Event::Slot(at)
            }
            Take::Full | Take::NeedSpace => {
                rq.pdu().error = ENOSPC;
                Event::Failed
            }
        };
        Some((rq, event))
    }

    fn make_space_soon(self: &Arc<Self>) {
        Work::queue(self.clone(), |e| &e.make_space, &self.workers, 0);
    }

    /// The work item: cleans what came back, grows the file, and lets those who wait try again.
    pub(super) fn run_make_space(self: Arc<Self>) {
        let grown = noio(|| self.clean_returned().and_then(|()| self.grow()));
        let waiters = self.slow.lock().space_waiters.take();
        match grown {
            Ok(()) => wake(waiters),
            Err(e) => wake_failed(waiters, e),
        }
    }

    /// Makes slots of failed writes read as zeros, durably, so that they can be used again
    /// (ordering rule 4). What cannot be cleaned is left to the check after detach.
    fn clean_returned(&self) -> Result {
        let top = self.chain.top().ok_or(EIO)?;
        let size = self.chain.cluster();
        loop {
            let Some(at) = self.slow.lock().alloc.next_returned() else {
                return Ok(());
            };
            let start = size.offset(at);
            let punched = top.io().punch(start..start + size.bytes());
            let synced = punched.and_then(|()| {
                // What a sync reports may be about other writes, and it reports it once.
                top.io().sync().inspect_err(|e| self.poison(*e))
            });
            let mut slow = self.slow.lock();
            match synced {
                Ok(()) => slow.alloc.cleaned(at),
                Err(_) => slow.alloc.lost(),
            }
        }
    }

    /// Grows the file by a step if slots are low, or by one cluster if there is no space for more.
    fn grow(&self) -> Result {
        let (is_low, limit, targets) = {
            let slow = self.slow.lock();
            let alloc = &slow.alloc;
            (
                alloc.is_low(),
                alloc.limit(),
                [alloc.target(), alloc.target_min()],
            )
        };
        if !is_low {
            return Ok(());
        }
        self.check_length(limit)?;
        let top = self.chain.top().ok_or(EIO)?;
        let offset = |clusters| self.chain.cluster().offset(ImageCluster(clusters));
        let mut result = Err(ENOSPC);
        for target in targets.into_iter().flatten() {
            result = top.io().grow(offset(limit)..offset(target));
            match result {
                Ok(()) => {
                    self.slow.lock().alloc.grown(target);
                    return Ok(());
                }
                Err(e) if is_no_space(e) => {}
                Err(e) => return Err(e),
            }
        }
        result
    }
}

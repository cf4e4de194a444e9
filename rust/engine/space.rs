// SPDX-License-Identifier: GPL-2.0
//! Slots for new clusters, and the growth of the image file ahead of them.
//!
//! The file grows on a work item of its own, one step at a time, before the slots run out; who
//! finds none left waits for it. The new length is made durable by the next commit's data sync,
//! which is before any entry that names a slot in it (ordering rules 1 and 4).

use super::{
    lockout::{wake, wake_failed},
    Disk, Engine, Phase,
};
use crate::{
    error::is_no_space,
    sys::{
        mq::{noio, Request, RequestList},
        prelude::*,
        trace,
        work::Work,
    },
};
use core::ops::Range;
use ploop_pure::{
    alloc::{Room, Take},
    flow::{Action, Event},
    units::ImageCluster,
};

/// Milliseconds until space is looked for again when there was none.
const RETRY_MS: u32 = 1000;
/// Runs of slots made zero before one sync.
const RUNS_MAX: usize = 64;
/// Slots of such a run.
const RUN_SLOTS_MAX: u32 = 1 << 18;

/// What came of cleaning.
struct Cleaned {
    /// Slots that were looked at.
    nr: u32,
    /// Some could not be cleaned for want of space or memory, and will be later: the error.
    stuck: Option<Error>,
}

impl<D: Disk> Engine<D> {
    /// Takes a slot for `rq`. `None` if `rq` now waits for the file to grow: its handler is called
    /// again when it has, or when it cannot.
    pub(super) fn take_slot(self: &Arc<Self>, mut rq: Request<D>) -> Option<(Request<D>, Event)> {
        rq.pdu().phase = Phase::Act(Action::TakeSlot);
        if let Some(at) = self.chain.hidden(rq.pdu().extent.cluster) {
            return self.reuse_hidden(rq, at);
        }
        let (taken, is_low) = {
            let mut slow = self.slow.lock();
            let taken = slow.alloc.take();
            let is_low = slow.alloc.is_low();
            if taken == Take::NeedSpace {
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
                self.shared.stats.allocated.add(1, Relaxed);
                Event::Slot(at)
            }
            Take::Full | Take::NeedSpace => {
                rq.pdu().error = ENOSPC;
                Event::Failed
            }
        };
        Some((rq, event))
    }

    /// Takes the slot that the destination of a merge has had all the time. Nobody can read it
    /// while the source hides it, so it may be made zero first, as fresh slots are; but not before
    /// what hides it is durable.
    fn reuse_hidden(
        self: &Arc<Self>,
        mut rq: Request<D>,
        at: ImageCluster,
    ) -> Option<(Request<D>, Event)> {
        self.gate.pass();
        let zeroed = match self.is_poisoned() {
            // It is not, and may never be.
            true => Err(EIO),
            false => self.zero_slot(at),
        };
        match zeroed {
            Ok(()) => Some((rq, Event::Slot(at))),
            Err(e) => {
                rq.pdu().error = e;
                if is_no_space(e) {
                    rq = self.park(rq)?;
                }
                Some((rq, Event::Failed))
            }
        }
    }

    /// Makes a slot of the top read as zeros, by giving its space back where that can be done: it may be
    /// space that there was none of.
    pub(super) fn clean_slot(&self, at: ImageCluster) -> Result {
        let size = self.chain.cluster();
        let start = size.offset(at);
        let top = self.chain.top().ok_or(EIO)?;
        let end = (start + size.bytes()).min(top.io().len()?);
        match top.io().punch(start..end) {
            Err(e) if Errno::OpNotSupp.is(e) => self.zero_slot(at),
            other => other,
        }
    }

    /// Makes a slot of the top read as zeros.
    pub(super) fn zero_slot(&self, at: ImageCluster) -> Result {
        let size = self.chain.cluster();
        let start = size.offset(at);
        let top = self.chain.top().ok_or(EIO)?;
        // The last cluster of a raw file may be a part.
        let end = (start + size.bytes()).min(top.io().len()?);
        if start >= end {
            return Ok(());
        }
        match top.io().zero(start..end) {
            Err(e) if Errno::OpNotSupp.is(e) => {}
            other => return other,
        }
        match top.io().punch(start..end) {
            Err(e) if Errno::OpNotSupp.is(e) => {}
            other => return other,
        }
        top.zero_range(start..end)?;
        match end < start + size.bytes() {
            // Whole pages were written. The file is raw, so nobody makes it longer meanwhile.
            true => top.io().cut(end),
            false => Ok(()),
        }
    }

    /// Lets a request, whose phase says how it goes on, wait until there may be space. It comes
    /// back at once if it must not wait.
    pub(super) fn park(self: &Arc<Self>, rq: Request<D>) -> Option<Request<D>> {
        if self.shared.fails_when_full() {
            return Some(rq);
        }
        self.shared.events.set_full(true);
        self.slow.lock().parked.push_back(rq);
        self.make_space_later();
        None
    }

    pub(super) fn make_space_soon(self: &Arc<Self>) {
        Work::queue(self.clone(), |e| &e.make_space, &self.workers, 0);
    }

    pub(super) fn make_space_later(self: &Arc<Self>) {
        Work::queue(
            self.clone(),
            |e| &e.make_space_later,
            &self.workers,
            RETRY_MS,
        );
    }

    /// The work item for when there was no space: says so if there is some again, which it is when
    /// nobody has had to wait since all who did were woken.
    pub(super) fn run_look_again(self: Arc<Self>) {
        self.work(Self::has_space_waiters, |this| {
            if this.slow.lock().parked.is_empty() {
                this.shared.events.set_full(false);
            }
            this.make_space();
        });
    }

    /// Whether requests wait for space.
    fn has_space_waiters(&self) -> bool {
        let slow = self.slow.lock();
        !slow.space_waiters.is_empty() || !slow.parked.is_empty()
    }

    /// The work item: cleans some of what came back, grows the file, and lets those who wait try
    /// again. Without space they go on waiting, and it is tried again before long.
    pub(super) fn run_make_space(self: Arc<Self>) {
        self.work(Self::has_space_waiters, Self::make_space);
    }

    fn make_space(self: &Arc<Self>) {
        let (is_stuck, made) = match self.is_poisoned() {
            true => (false, Err(EIO)),
            false => noio(|| self.look_for_space()),
        };
        let may_wait = !self.shared.fails_when_full();
        let has_freed = self.slow.lock().alloc.has_freed() && !self.is_poisoned();
        match made {
            // Woken now they would ask at once again. The end of the commit wakes them, or this.
            Ok(()) if self.slow.lock().alloc.is_waiting() => {
                if self.has_space_waiters() {
                    self.make_space_later();
                }
            }
            Ok(()) => {
                let (waiters, parked) = self.take_waiters();
                if !parked.is_empty() {
                    // Perhaps there is none still.
                    self.make_space_later();
                }
                wake(waiters);
                wake(parked);
            }
            // What came back may be enough.
            Err(e) if is_no_space(e) && may_wait && has_freed && !is_stuck => {}
            Err(e) if is_no_space(e) && may_wait => {
                let has_parked = {
                    let mut slow = self.slow.lock();
                    while let Some(rq) = slow.space_waiters.pop_front() {
                        slow.parked.push_back(rq);
                    }
                    !slow.parked.is_empty()
                };
                if has_parked {
                    self.shared.events.set_full(true);
                    self.make_space_later();
                }
            }
            // There is some before long.
            Err(e) if e == ENOMEM && may_wait => {
                if self.has_space_waiters() {
                    self.make_space_later();
                }
            }
            Err(e) => {
                let (waiters, parked) = self.take_waiters();
                wake_failed(waiters, e);
                wake_failed(parked, e);
            }
        }
        match (has_freed, is_stuck) {
            (true, false) => self.make_space_soon(),
            (true, true) => self.make_space_later(),
            (false, _) => {}
        }
        // Last: it may wait for memory, and nobody has to wait for that.
        noio(|| self.chain.refill());
    }

    fn take_waiters(&self) -> (RequestList<D>, RequestList<D>) {
        let mut slow = self.slow.lock();
        (slow.space_waiters.take(), slow.parked.take())
    }

    /// Makes space, as far as there is need: not all that came back is cleaned.
    pub(super) fn make_space_now(&self) -> Result {
        self.look_for_space().1
    }

    /// The same, and whether some of what came back could not be cleaned now.
    fn look_for_space(&self) -> (bool, Result) {
        let cleaned = self.commit_releases().and_then(|()| self.clean_some());
        match cleaned {
            Ok(Cleaned { stuck, .. }) => {
                let grown = self.grow().and_then(|()| match stuck {
                    // Woken now they would ask for those slots again, at once.
                    Some(e) if !self.slow.lock().alloc.has_slot() => Err(e),
                    Some(_) | None => Ok(()),
                });
                (stuck.is_some(), grown)
            }
            Err(e) => (false, Err(e)),
        }
    }

    /// Ends the waiting for space of all who do: they fail, unless there is space now.
    pub(crate) fn retry_parked(self: &Arc<Self>) {
        self.make_space_soon();
    }

    /// Makes releases of slots durable where only they can give space.
    fn commit_releases(&self) -> Result {
        let is_wanted = {
            let slow = self.slow.lock();
            let alloc = &slow.alloc;
            !alloc.has_slot()
                && alloc.target().is_none()
                && alloc.has_pending()
                && !alloc.has_freed()
        };
        if is_wanted {
            self.commit()
        } else {
            Ok(())
        }
    }

    /// Makes free slots clean.
    pub(crate) fn clean(&self) -> Result {
        noio(|| self.clean_freed())
    }

    /// Makes all slots that have come back read as zeros, durably, so that they can be used again
    /// (ordering rule 4), and gives their space back to the file system. What cannot be cleaned is
    /// left, for good until the image is opened anew.
    pub(super) fn clean_freed(&self) -> Result {
        // Others may come back all the time.
        let mut left = self.slow.lock().alloc.nr_freed();
        while left > 0 && self.slow.lock().alloc.has_freed() {
            let cleaned = self.clean_some()?;
            if cleaned.stuck.is_some() {
                break;
            }
            left = left.saturating_sub(cleaned.nr);
        }
        Ok(())
    }

    /// The same for some of them.
    fn clean_some(&self) -> Result<Cleaned> {
        if self.is_poisoned() {
            return Err(EIO);
        }
        let top = self.chain.top().ok_or(EIO)?;
        let size = self.chain.cluster();
        let mut runs: [Option<Range<u32>>; RUNS_MAX] = [const { None }; RUNS_MAX];
        let mut cleaned = Cleaned { nr: 0, stuck: None };
        for place in &mut runs {
            let Some(run) = self.slow.lock().alloc.next_freed(RUN_SLOTS_MAX) else {
                break;
            };
            let bytes = |at| size.offset(ImageCluster(at));
            let range = bytes(run.start)..bytes(run.end);
            let punched = top.io().punch(range.clone());
            self.shared.tracks.image_written(&range);
            cleaned.nr += run.end - run.start;
            match punched {
                Ok(()) => *place = Some(run),
                // It may have space or memory before long.
                Err(e) if is_no_space(e) || e == ENOMEM => {
                    self.slow.lock().alloc.not_cleaned(run);
                    cleaned.stuck = Some(e);
                    break;
                }
                Err(_) => self.slow.lock().alloc.lost(run),
            }
        }
        if runs.iter().all(Option::is_none) {
            return Ok(cleaned);
        }
        // What a sync reports may be about other writes, and it reports it once.
        let synced = top.io().sync().inspect_err(|e| self.poison(*e));
        let mut slow = self.slow.lock();
        for run in runs.into_iter().flatten() {
            match synced {
                Ok(()) => slow.alloc.cleaned(run),
                Err(_) => slow.alloc.lost(run),
            }
        }
        synced.map(|()| cleaned)
    }

    /// Grows the file by a step if slots are low, or by one cluster if there is no space for more.
    /// It is no failure if there are slots all the same.
    fn grow(&self) -> Result {
        let (is_low, targets) = {
            let slow = self.slow.lock();
            let alloc = &slow.alloc;
            (alloc.is_low(), [alloc.target(), alloc.target_min()])
        };
        if !is_low {
            return Ok(());
        }
        let mut result = Err(ENOSPC);
        for target in targets.into_iter().flatten() {
            result = self.grow_to(target);
            match result {
                Err(e) if is_no_space(e) => {}
                other => return other,
            }
        }
        match self.slow.lock().alloc.has_slot() {
            true => Ok(()),
            false => result,
        }
    }

    /// [`Self::check_len`] of so many whole clusters.
    pub(crate) fn check_length(&self, clusters: u32) -> Result {
        self.check_len(self.chain.cluster().offset(ImageCluster(clusters)))
    }

    /// EIO, and the image is poisoned, if the top's file has less than `need` bytes: somebody has made
    /// it shorter. To make it longer again would hide that data is gone.
    pub(crate) fn check_len(&self, need: u64) -> Result {
        let top = self.chain.top().ok_or(EIO)?;
        if top.io().len()? >= need {
            return Ok(());
        }
        pr_err!(
            "ploop{}: the image file has been made shorter\n",
            self.device
        );
        self.poison(EIO);
        Err(EIO)
    }

    /// Grows the file to `target` clusters.
    pub(super) fn grow_to(&self, target: u32) -> Result {
        // What lies behind the limit is nobody's, and stays so until this is done: it is made zero.
        let _growth = self.growth.lock();
        let (limit, bound, wanted) = {
            let slow = self.slow.lock();
            let alloc = &slow.alloc;
            (alloc.limit(), alloc.bound(), alloc.room_wanted(target))
        };
        if target <= limit {
            return Ok(());
        }
        if self.is_poisoned() {
            return Err(EIO);
        }
        self.check_length(limit)?;
        let top = self.chain.top().ok_or(EIO)?;
        let offset = |clusters| self.chain.cluster().offset(ImageCluster(clusters));
        let (mut room, target) = match wanted.map(Room::new).transpose() {
            Ok(room) => (room, target),
            // As far as the memory goes that is there.
            Err(_) if bound > limit => (None, bound),
            Err(e) => return Err(crate::error::errno(e)),
        };
        let grown = top.io().grow(offset(limit)..offset(target));
        trace::space(self.device, target, grown);
        grown?;
        let mut slow = self.slow.lock();
        if let Some(room) = &mut room {
            slow.alloc.expand(room);
        }
        slow.alloc.grown(target);
        drop(slow);
        self.shared.events.space_left(top.io().space_left());
        Ok(())
    }
}

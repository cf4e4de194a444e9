// SPDX-License-Identifier: GPL-2.0
//! What one engine hands to the next. An engine's chain never changes; when the deltas of a running
//! device do, a new engine takes its place while the queue is frozen.

use super::{events::Events, tracks::Tracks, Closed, Disk, Engine, Parts};
use crate::{
    format::Format,
    sys::{epoch::Epoch, prelude::*},
};
use ploop_pure::units::ImageCluster;

/// Counters of a running device.
pub(crate) struct Stats {
    /// Requests taken.
    pub(crate) requests: Atomic<u64>,
    /// Of these, those carried out without a worker.
    pub(crate) inline: Atomic<u64>,
    /// Slots taken by writes to holes.
    pub(crate) allocated: Atomic<u64>,
    /// Clusters copied by sharing blocks.
    pub(crate) cloned: Atomic<u64>,
    /// Clusters unmapped by discards.
    pub(crate) discarded: Atomic<u64>,
    /// Commits done.
    pub(crate) commits: Atomic<u64>,
    /// Index pages written.
    pub(crate) index_pages: Atomic<u64>,
    /// Requests that failed.
    pub(crate) errors: Atomic<u64>,
}

/// What all engines of a running device have in common.
pub(crate) struct Shared {
    pub(crate) stats: Stats,
    /// The disk's.
    pub(super) epoch: Arc<Epoch>,
    /// Writes that find no space fail instead of waiting.
    fails_when_full: Atomic<bool>,
    /// They do for the moment: so many wait for all that is written, to stop the device perhaps.
    nr_impatient: Atomic<u32>,
    pub(crate) events: Arc<Events>,
    pub(crate) tracks: Arc<Tracks>,
}

impl Shared {
    /// For a disk that requests enter `epoch` of.
    pub(crate) fn new(epoch: Arc<Epoch>, events: Arc<Events>, tracks: Arc<Tracks>) -> Self {
        Self {
            stats: Stats {
                requests: Atomic::new(0),
                inline: Atomic::new(0),
                allocated: Atomic::new(0),
                cloned: Atomic::new(0),
                discarded: Atomic::new(0),
                commits: Atomic::new(0),
                index_pages: Atomic::new(0),
                errors: Atomic::new(0),
            },
            epoch,
            fails_when_full: Atomic::new(false),
            nr_impatient: Atomic::new(0),
            events,
            tracks,
        }
    }

    /// Whether writes that find no space fail instead of waiting.
    pub(crate) fn fails_when_full(&self) -> bool {
        self.fails_when_full.load(Relaxed) || self.nr_impatient.load(Relaxed) > 0
    }

    /// One more waits for all that is written, or does not any more.
    pub(crate) fn set_impatient(&self, is_impatient: bool) {
        match is_impatient {
            true => self.nr_impatient.fetch_add(1, Relaxed),
            false => self.nr_impatient.fetch_sub(1, Relaxed),
        };
    }

    /// Sets that; [`Engine::retry_parked`] ends those who wait already.
    pub(crate) fn set_fails_when_full(&self, fails: bool) {
        self.fails_when_full.store(fails, Relaxed);
    }
}

/// The old top of a snapshot, after the switch: what is left to be done. So many pages of its index
/// are copied.
#[must_use]
pub(crate) struct Unfinished(pub(super) usize);

/// Slots at the end of a file that nobody gets any more.
#[must_use]
pub(crate) struct FreeEnd {
    head: u32,
    limit: u32,
    end: u32,
}

/// Looks for a longer file before that is given up.
const REACH_MAX: u32 = 100;

impl<D: Disk> Engine<D> {
    /// Takes what is known of the top's file, for the next engine. With the queue frozen.
    fn take_parts(&self) -> Result<Parts> {
        let mut none = Parts::none(&self.chain)?;
        self.exchange_parts(&mut none);
        Ok(none)
    }

    /// Exchanges what is known of the top's file.
    pub(crate) fn exchange_parts(&self, parts: &mut Parts) {
        let mut slow = self.slow.lock();
        core::mem::swap(&mut slow.alloc, &mut parts.alloc);
        core::mem::swap(&mut slow.dirty, &mut parts.dirty);
    }

    /// Ends this engine's part in requests: nothing is published any more. With the queue frozen, at
    /// rest.
    pub(crate) fn retire(&self) -> Result<Unfinished> {
        if self.is_poisoned() {
            return Err(EIO);
        }
        self.copy_last()
    }

    /// Makes what a retired engine has copied durable, for a file that stays open.
    pub(crate) fn commit_retired(&self, unfinished: Unfinished) -> Result {
        self.commit_copied(unfinished)
    }

    /// Gives what is known of the top's file, which stays the same, to `new`; on failure this
    /// engine keeps it. EIO if the file takes no more writes: `new` would not know. With the queue
    /// frozen, at rest.
    pub(crate) fn hand_over(&self, new: &Self) -> Result {
        if self.is_poisoned() {
            return Err(EIO);
        }
        let mut parts = self.take_parts()?;
        let nr_pages = new.chain.top().map_or(0, |top| top.nr_index_pages());
        if let Err(e) = parts.dirty.extend(nr_pages) {
            self.exchange_parts(&mut parts);
            return Err(crate::error::errno(e));
        }
        new.exchange_parts(&mut parts);
        Ok(())
    }

    /// Goes on after [`Self::retire`], when no other engine took its place.
    pub(crate) fn resume(self: &Arc<Self>) {
        {
            let mut slow = self.slow.lock();
            slow.dirty.settle(false);
            slow.alloc.commit_ended(false);
        }
        self.begin();
    }

    /// Makes data and index of a retired engine's top durable and cuts its file.
    pub(crate) fn finish(&self, unfinished: Unfinished) -> Result<Closed> {
        self.commit_copied(unfinished)?;
        self.cut_top()
    }

    /// Keeps slots below `floor`, which are going to be a part of the index, from being handed out
    /// or cleaned: at rest, as nobody may be cleaning some of them now. Fewer than before at any time.
    pub(crate) fn reserve_slots(&self, floor: ImageCluster) {
        self.slow.lock().alloc.set_floor(floor);
    }

    /// Makes the file reach up to `floor` at least. ENOSPC if it must not.
    pub(crate) fn reach(&self, floor: ImageCluster) -> Result {
        for _ in 0..REACH_MAX {
            let (limit, max) = {
                let slow = self.slow.lock();
                (slow.alloc.limit(), slow.alloc.max())
            };
            if limit >= floor.0 {
                return Ok(());
            }
            if max < floor.0 {
                return Err(ENOSPC);
            }
            self.grow_to(floor.0)?;
        }
        Err(EAGAIN)
    }

    /// Lets the next commit write an index page.
    pub(crate) fn touch_page(&self, page: u32) {
        self.slow.lock().dirty.mark(page);
    }

    /// Makes the header of the chain's top, which has changed, durable, with the index.
    pub(crate) fn commit_header(&self) -> Result {
        self.slow.lock().dirty.mark(0);
        self.commit_here()
    }

    /// Gives free slots at the end of the top's file back. With the queue frozen, at rest; all releases
    /// are durable.
    pub(crate) fn give_end_back(&self) -> Result<FreeEnd> {
        if self.is_poisoned() {
            return Err(EIO);
        }
        let mut slow = self.slow.lock();
        let alloc = &mut slow.alloc;
        let (head, limit) = (alloc.head(), alloc.limit());
        let end = alloc.cut();
        Ok(FreeEnd { head, limit, end })
    }

    /// Cuts the file by that; returns its length before and after, in bytes. At rest: who wants more
    /// slots waits.
    pub(crate) fn cut_end(&self, free: FreeEnd) -> Result<(u64, u64)> {
        let after = self.chain.cluster().offset(ImageCluster(free.end));
        let cut = self.check_length(free.head).and_then(|()| {
            let top = self.chain.top().ok_or(EIO)?;
            let before = top.io().len()?;
            top.io().cut(after)?;
            Ok((before, after))
        });
        if cut.is_err() {
            self.slow.lock().alloc.uncut(free.head, free.limit);
        }
        cut
    }

    /// What a write with FUA lost was of an image that is being replaced. With the queue frozen.
    pub(crate) fn forget_losses(&self) {
        self.shared.tracks.fua.begin_anew();
    }

    /// The image that took no more writes has been replaced.
    pub(crate) fn mended(&self) {
        self.shared.events.mended();
    }

    /// Lets the top's file have no more than `sectors`, but what it has.
    pub(crate) fn limit_top(&self, sectors: u64) {
        let chain = &self.chain;
        let Some(Format::Ploop1(format)) = chain.top().map(|top| top.format()) else {
            return;
        };
        let clusters = sectors >> chain.cluster().log_sectors();
        let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        let max = clusters.min(format.header().slots_max());
        self.slow.lock().alloc.set_max(max);
    }

    /// One past the slot up to which the top's file would reach if all that it holds were at its
    /// beginning.
    pub(crate) fn dense_end(&self) -> u32 {
        self.slow.lock().alloc.used()
    }

    /// One past the last slot that was handed out.
    pub(crate) fn head(&self) -> u32 {
        self.slow.lock().alloc.head()
    }

    /// An error of another engine's file makes this one refuse writes.
    pub(crate) fn poison_for(&self, error: Error) {
        self.poison(error);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Commits: data and index made durable, for all who wait for it at once.
//!
//! The order is [`ploop_pure::commit`]'s. One commit runs at a time, under the mutex `commit`,
//! which also owns the copies of index pages: so never are two writes of one page in flight.
//! Flushes that arrive while a commit runs wait for the next: it must see all that was
//! published before they came.

use super::{
    lockout::{wake, wake_failed},
    Disk, Engine, Phase, Unfinished,
};
use crate::{
    chain::{delta::Delta, Chain},
    error::is_no_space,
    sys::{
        self,
        mq::{noio, Request},
        pages::PageBuf,
        prelude::*,
        trace,
        work::Work,
    },
};
use core::ops::Range;
use ploop_pure::{
    commit::{Action, Commit, Event},
    index::BATCH_MAX,
    units::INDEX_PAGE_BYTES,
};

/// Milliseconds after which an entry is written even if nobody asks.
pub(crate) const COMMIT_DELAY_MS: u32 = 5000;

/// Most pages that room is made for at first: as many as 64 processors can make dirty at once. What is
/// dirty longer than that is committed away; where more becomes dirty meanwhile, the room doubles.
const ROOM_FIRST: usize = 8192;

/// Copies of index pages: of a batch, or of all that are dirty when an engine ends.
pub(super) struct Copies {
    /// Of the top.
    index: PageBuf,
    /// Of the source of a merge.
    drops: Option<PageBuf>,
}

impl Copies {
    /// For so many pages; a batch at least.
    pub(super) fn new(chain: &Chain, nr: usize) -> Result<Self> {
        let nr = nr.max(BATCH_MAX);
        Ok(Self {
            index: PageBuf::new(nr)?,
            drops: match chain.source() {
                Some(_) => Some(PageBuf::new(nr)?),
                None => None,
            },
        })
    }

    /// For how many pages.
    pub(super) fn room(&self) -> usize {
        self.index.len()
    }
}

/// Where the copies of a commit come from.
enum From {
    /// They are made batch by batch.
    Map,
    /// The first so many in the buffer are those of all dirty pages, in their order.
    Buffer(usize),
}

impl<D: Disk> Engine<D> {
    /// Puts a flush, or a write with FUA that has written its data, among those who wait for the
    /// next commit.
    pub(super) fn join_commit(self: &Arc<Self>, mut rq: Request<D>) {
        rq.pdu().phase = Phase::Done;
        // Its data is written: it does not use the place any more.
        rq.leave();
        self.slow.lock().commit_waiters.push_back(rq);
        self.commit_at_once();
    }

    /// Whether requests wait for a commit.
    pub(super) fn has_commit_waiters(&self) -> bool {
        !self.slow.lock().commit_waiters.is_empty()
    }

    /// Sees to it that a commit begins.
    pub(super) fn commit_at_once(self: &Arc<Self>) {
        Work::queue(self.clone(), |e| &e.commit_now, &self.workers, 0);
    }

    /// Sees to it that a dirty page is written before long.
    pub(super) fn commit_soon(self: &Arc<Self>) {
        Work::queue(
            self.clone(),
            |e| &e.commit_later,
            &self.workers,
            COMMIT_DELAY_MS,
        );
    }

    /// The work item: a commit for all who wait now.
    pub(super) fn run_commit(self: Arc<Self>) {
        self.work(Self::has_commit_waiters, Self::commit_for_all);
    }

    fn commit_for_all(self: &Arc<Self>) {
        let waiters = {
            let mut slow = self.slow.lock();
            if slow.commit_waiters.is_empty() && slow.dirty.is_clean() {
                return;
            }
            slow.commit_waiters.take()
        };
        match self.commit() {
            Ok(()) => {
                wake(waiters);
                self.make_space_soon();
            }
            Err(e) => {
                wake_failed(waiters, e);
                match self.is_poisoned() {
                    // Who waits for space waits in vain.
                    true => self.make_space_soon(),
                    false => self.commit_soon(),
                }
            }
        }
    }

    /// Makes all data written and all entries published before this call durable. On failure the
    /// image is poisoned: what is on disk is not known any more, so nothing is written to it until
    /// it has been closed and checked; its mark stays. Only a lack of space for the index itself is
    /// not fatal: its pages stay dirty.
    ///
    /// Waits for the end of a snapshot that made this top (ordering rule 7).
    pub(crate) fn commit(&self) -> Result {
        self.gate.pass();
        self.commit_here()
    }

    /// Whether commits drop entries of a merge's source: a lower delta is left as it is.
    fn drops(&self) -> bool {
        self.chain.source().is_some_and(|(_, s)| s.is_writable())
    }

    /// The same without waiting.
    pub(super) fn commit_here(&self) -> Result {
        let mut copies = self.commit.lock();
        let (changes, since) = (self.nr_changes(), sys::uptime_ms());
        self.slow.lock().alloc.commit_begins();
        let result = self.drive(&mut copies, From::Map);
        if result.is_ok() {
            self.slow.lock().settled.committed(changes, since);
        }
        trace::commit(self.device, result);
        result
    }

    /// For how many pages there has to be room, of which there is `room`, with those that may become
    /// dirty meanwhile; `None` if [`Self::copy_last`] can take all there are.
    pub(super) fn lacks_room(&self, room: usize) -> Option<usize> {
        let slow = self.slow.lock();
        let nr = slow.dirty.nr_dirty();
        let most = ROOM_FIRST
            .max(room.saturating_mul(2))
            .min(slow.dirty.nr_pages() as usize);
        (nr > room).then_some((nr * 2).min(most))
    }

    /// Makes room for the copies of so many pages.
    pub(super) fn make_room(&self, nr: usize) -> Result {
        let mut new = Copies::new(&self.chain, nr)?;
        core::mem::swap(&mut *self.commit.lock(), &mut new);
        Ok(())
    }

    /// Copies the last dirty index pages, for [`Self::commit_copied`]. Nothing is published from
    /// here on, and [`Self::try_rest`] has seen to it that there is room for them.
    pub(super) fn copy_last(&self) -> Result<Unfinished> {
        // No commit runs; it must not be waited for.
        let mut copies = self.commit.try_lock().ok_or(EBUSY)?;
        self.slow.lock().alloc.commit_begins();
        let (mut nr, mut from) = (0, 0);
        loop {
            let next = self.slow.lock().dirty.next_dirty(from);
            let Some(page_no) = next else {
                return Ok(Unfinished(nr));
            };
            self.copy_page(page_no, &mut copies, nr)?;
            (nr, from) = (nr + 1, page_no + 1);
        }
    }

    /// Commits the pages of [`Self::copy_last`].
    pub(super) fn commit_copied(&self, unfinished: Unfinished) -> Result {
        let mut copies = self.commit.lock();
        self.drive(&mut copies, From::Buffer(unfinished.0))
    }

    fn drive(&self, copies: &mut Copies, from: From) -> Result {
        // Memory must not be got by writing to this very disk.
        noio(|| {
            let top = self.chain.top().ok_or(EIO)?;
            let source = self.chain.source();
            let (mut error, mut is_index_full) = (EIO, false);
            let (mut commit, mut action) = Commit::start(self.drops());
            // Where the batch is in the buffers.
            let mut batch = 0..0;
            loop {
                // Others poison the image too, and what they were told no sync reports again.
                if self.is_poisoned() {
                    action = commit.next(Event::Failed);
                }
                let result = match action {
                    Action::Copy { cursor } => {
                        let next = self.slow.lock().dirty.take_batch(cursor);
                        let nr = self.slow.lock().dirty.batch().len();
                        let copied = match from {
                            From::Map => self.copy_batch(copies).map(|()| 0),
                            From::Buffer(all) if batch.end + nr > all => Err(EIO),
                            From::Buffer(_) => Ok(batch.end),
                        };
                        match copied {
                            Ok(start) => {
                                batch = start..start + nr;
                                action = commit.next(Event::Copied { nr, next });
                                continue;
                            }
                            Err(e) => Err(e),
                        }
                    }
                    Action::SyncData => self.sync(top),
                    Action::WriteIndex => self
                        .write_batch(top, &copies.index, batch.start)
                        .inspect_err(|e| is_index_full = is_no_space(*e)),
                    Action::SyncIndex => self.sync(top).inspect(|()| {
                        if !self.drops() {
                            self.slow.lock().dirty.settle(true);
                        }
                    }),
                    Action::WriteDrops => match (source, &copies.drops) {
                        (Some((_, source)), Some(drops)) => self
                            .write_batch(source, drops, batch.start)
                            .inspect_err(|e| is_index_full = is_no_space(*e)),
                        (None, _) | (_, None) => Err(EIO),
                    },
                    Action::SyncDrops => source
                        .ok_or(EIO)
                        .and_then(|(_, source)| self.sync(source))
                        .inspect(|()| self.slow.lock().dirty.settle(true)),
                    Action::Done => {
                        self.slow.lock().alloc.commit_ended(true);
                        self.shared.stats.commits.add(1, Relaxed);
                        return Ok(());
                    }
                    Action::Fail => {
                        {
                            let mut slow = self.slow.lock();
                            slow.alloc.commit_ended(false);
                            slow.dirty.settle(false);
                        }
                        // If that was all: the pages on disk are whole, the copies can be written
                        // again.
                        if !is_index_full {
                            self.poison(error);
                        }
                        return Err(error);
                    }
                };
                let event = result.map_or_else(
                    |e| {
                        error = e;
                        Event::Failed
                    },
                    |()| Event::Ok,
                );
                action = commit.next(event);
            }
        })
    }

    /// Makes the file of a delta durable. A write with FUA that is on its way to the top, which may be on
    /// the same device, may be told of what this sync is for, and this sync not.
    fn sync(&self, delta: &Delta) -> Result {
        delta.io().sync()?;
        let fua = &self.shared.tracks.fua;
        if fua.are_all_done() {
            return Ok(());
        }
        self.shared.epoch.wait();
        match fua.is_lost() {
            true => Err(EIO),
            false => Ok(()),
        }
    }

    /// Copies the batch in flight from the map, which may change meanwhile: what is published later
    /// makes its page dirty again.
    fn copy_batch(&self, copies: &mut Copies) -> Result {
        for idx in 0..BATCH_MAX {
            let Some(page_no) = self.page_in_flight(idx) else {
                break;
            };
            self.copy_page(page_no, copies, idx)?;
        }
        Ok(())
    }

    /// The batch changes only under the mutex that our callers hold.
    fn page_in_flight(&self, idx: usize) -> Option<u32> {
        self.slow.lock().dirty.batch().get(idx).copied()
    }

    /// Copies one page, to page `idx` of the buffers.
    fn copy_page(&self, page_no: u32, copies: &mut Copies, idx: usize) -> Result {
        let top = self.chain.top().ok_or(EIO)?;
        // The source first: what moves to the destination in between is in both, never in neither.
        if let (Some((level, source)), Some(drops)) = (self.chain.source(), &mut copies.drops) {
            source.encode_index(page_no, drops, idx, |c| self.chain.slot_of(level, c))?;
        }
        top.encode_index(page_no, &mut copies.index, idx, |c| {
            self.chain.slot_in_top(c)
        })
    }

    /// Writes the copies of the batch in flight, from page `start` of `buf` on, to the delta; neighbouring
    /// pages at once.
    fn write_batch(&self, delta: &Delta, buf: &PageBuf, start: usize) -> Result {
        let end = delta.nr_index_pages();
        let mut run: Option<(u32, Range<usize>)> = None;
        for nr in 0..BATCH_MAX {
            let Some(page_no) = self.page_in_flight(nr).filter(|p| *p < end) else {
                break;
            };
            let idx = start + nr;
            self.shared.stats.index_pages.add(1, Relaxed);
            match &mut run {
                Some((first, range)) if *first + range.len() as u32 == page_no => range.end += 1,
                other => {
                    if let Some((first, range)) = other.replace((page_no, idx..idx + 1)) {
                        self.write_run(delta, first, buf, range)?;
                    }
                }
            }
        }
        match run {
            Some((first, range)) => self.write_run(delta, first, buf, range),
            None => Ok(()),
        }
    }

    fn write_run(&self, delta: &Delta, first: u32, buf: &PageBuf, range: Range<usize>) -> Result {
        let start = u64::from(first) * INDEX_PAGE_BYTES;
        let end = start + range.len() as u64 * INDEX_PAGE_BYTES;
        let written = delta.write_index(first, buf, range);
        // While writes are tracked no other delta than the top is written.
        self.shared.tracks.image_written(&(start..end));
        written
    }

    /// Said before it is used: no request is going to use it.
    pub(crate) fn set_private(&self) {
        self.is_private.store(true, Relaxed);
    }

    /// From here on writes are refused, and a commit that runs fails; its batch is its own.
    pub(super) fn poison(&self, error: Error) {
        if self.is_poisoned.xchg(true, Full) {
            return;
        }
        let (device, errno) = (self.device, error.to_errno());
        if self.is_private.load(Relaxed) {
            pr_err!("ploop{device}: writing or syncing the image that is merged into failed (errno {errno}): it stays marked in use\n");
        } else {
            pr_err!("ploop{device}: writing or syncing the image failed (errno {errno}): writes are refused until it is detached and checked\n");
            self.shared.events.poisoned();
        }
    }
}

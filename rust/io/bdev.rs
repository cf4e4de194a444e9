// SPDX-License-Identifier: GPL-2.0
//! The `bdev` engine: bios straight to the device that has the file's blocks, as far as they are known.
//!
//! Nobody but us can change where the blocks are, see [`Blocks`]. What we do that changes it goes
//! through [`Bdev::change`], which first forgets what is known and then waits for the I/O that may
//! know it still; so no bio reaches a block that the file has given up. What is written for the
//! first time, and may have to be allocated, is written through the file.
//!
//! Locks: `changes`, a leaf.

use crate::sys::{
    blocks::{Blocks, Syncs},
    file::File,
    mq::{Driver, Request},
    prelude::*,
    sparse::SparseWords,
};
use core::ops::Range;
use ploop_pure::blocks::{Group, Layout, Place, BLOCK_LOG};

/// Pages of memory for what is known of one file, 64 MiB: blocks of some 1.6 TiB with clusters of 1 MiB, or 256 GiB
/// with 64 KiB. What is not known goes through the file.
const PAGES_MAX: i64 = 16384;

/// Groups of blocks that are forgotten at a time, under a spin lock.
const FORGET_MAX: usize = 1024;

/// The disk may become so much larger before what is behind is not learned any more.
const GROWTH: u64 = 2;

/// What matters of the disk in an image.
#[derive(Clone, Copy)]
pub(crate) struct DiskShape {
    /// log2 of the bytes of clusters, which are mostly in one piece.
    pub(crate) cluster_log: u32,
    /// Size of the disk in bytes.
    pub(crate) bytes: u64,
}

/// The blocks of a file that may be reached past its file system, once that is wanted.
#[pin_data]
pub(crate) struct Bdev {
    known: SetOnce<Known>,
    syncs: Arc<Syncs>,
    #[pin]
    changes: SpinLock<Changes>,
}

/// What is known of a file's blocks.
struct Known {
    blocks: Blocks,
    layout: Layout,
    words: SparseWords,
}

/// Changes of where blocks are, also from before anything was known.
#[derive(Default)]
struct Changes {
    /// Under way.
    running: u32,
    /// Begun or ended so far: what was looked up in between does not count.
    nr: u64,
    /// See [`Bdev::release`].
    is_released: bool,
}

impl Bdev {
    /// Nothing known yet.
    pub(super) fn new() -> Result<Pin<KBox<Self>>> {
        let syncs = Arc::new(Syncs::new(), GFP_KERNEL)?;
        KBox::pin_init(
            pin_init!(Self {
                known: SetOnce::new(),
                syncs,
                changes <- new_spinlock!(Changes::default()),
            }),
            GFP_KERNEL,
        )
    }

    /// Moves a request's data from or to byte `pos` of the file, if all of its blocks are known and
    /// follow each other; else gives it back. It comes back through [`Driver::io_done`].
    pub(super) fn submit<D: Driver>(&self, rq: Request<D>, pos: u64) -> Option<Request<D>> {
        let Some(known) = self.known.as_ref() else {
            return Some(rq);
        };
        let Some(inside) = known.blocks.enter() else {
            return Some(rq);
        };
        let range = pos..pos.saturating_add(rq.len() as u64);
        match known.layout.find(&range, |idx| known.word(idx)) {
            Some(sector) => inside.submit(rq, pos, sector),
            None => Some(rq),
        }
    }

    /// Makes durable, at the device, what was written to it by [`Self::submit`], or gives the request back.
    /// It comes back through [`Driver::io_done`], with EAGAIN if it has to be done otherwise.
    pub(super) fn flush<D: Driver>(&self, rq: Request<D>) -> Option<Request<D>> {
        if !self.syncs.are_all_done() {
            return Some(rq);
        }
        match self.known.as_ref().and_then(|known| known.blocks.enter()) {
            Some(inside) => inside.flush(rq),
            None => Some(rq),
        }
    }

    /// Calls `f`, which syncs the file. EIO also if the device has told somebody else that it lost
    /// something. The caller must not be inside.
    pub(super) fn sync(&self, f: impl FnOnce() -> Result) -> Result {
        self.syncs.begins();
        f()?;
        self.syncs.succeeds();
        if self.syncs.are_all_done() {
            return Ok(());
        }
        // Flushes that are on their way end; other syncs answer for themselves.
        if let Some(known) = self.known.as_ref() {
            known.blocks.wait();
        }
        match self.syncs.is_lost() {
            true => Err(EIO),
            false => Ok(()),
        }
    }

    /// Looks up where the blocks of a range are that are not known, and for a new group of blocks of
    /// all of it; the first time takes hold of the file's blocks, if nobody else may write it. May
    /// sleep.
    pub(super) fn learn(&self, file: &File, range: &Range<u64>, disk: DiskShape) {
        let Some(known) = self.known.as_ref().or_else(|| self.hold(file, disk)) else {
            return;
        };
        for group in known.layout.groups(range) {
            let scan = group.to_scan(known.word(group.place), known.word(group.bits));
            if scan != 0 && self.learn_group(known, &group, scan).is_err() {
                return;
            }
        }
    }

    fn hold(&self, file: &File, disk: DiskShape) -> Option<&Known> {
        if self.changes.lock().is_released {
            return None;
        }
        // Of two at a time, one finds that the other one denies writers.
        self.known
            .populate(Known::new(file, disk, self.syncs.clone()).ok()?);
        let known = self.known.as_ref()?;
        // Who released meanwhile may not have seen it.
        if self.changes.lock().is_released {
            known.blocks.release();
        }
        Some(known)
    }

    fn learn_group(&self, known: &Known, group: &Group, scan: u64) -> Result {
        // Memory first: it is not had under the lock.
        let place_word = known.word_to_learn(group.place)?;
        let bits_word = known.word_to_learn(group.bits)?;
        let before = {
            let changes = self.changes.lock();
            if changes.running > 0 {
                return Err(EBUSY);
            }
            changes.nr
        };
        let mut place = Place::from_bits(place_word.load(Relaxed));
        let mut found = 0;
        for block in (0..u64::BITS).filter(|block| scan & (1 << block) != 0) {
            let pos = (group.first + u64::from(block)) << BLOCK_LOG;
            let here = known
                .blocks
                .find(pos)
                .and_then(|s| group.place_of(block, s));
            if let Some(here) = here {
                if place.get_or_insert(here).is_at(here) {
                    found |= 1 << block;
                }
            }
        }
        let changes = self.changes.lock();
        if changes.nr != before {
            return Err(EBUSY);
        }
        let Some(place) = place else { return Ok(()) };
        if let Some(word) = group.scanned(place_word.load(Relaxed), place) {
            place_word.store(word, Relaxed);
            bits_word.store(bits_word.load(Relaxed) | found, Release);
        }
        Ok(())
    }

    /// Calls `f`, which may change where the blocks of `range` are, or what counts of them, while
    /// nobody knows them. May sleep; the caller must have no I/O of its own under way.
    pub(super) fn change<R>(&self, range: &Range<u64>, f: impl FnOnce() -> R) -> R {
        // From here on nothing is learned.
        let is_alone = {
            let mut changes = self.changes.lock();
            changes.running += 1;
            changes.nr += 1;
            changes.running == 1
        };
        if let Some(known) = self.known.as_ref() {
            // Another change may have forgotten the same and wait still.
            if known.forget(range, &self.changes) || !is_alone {
                known.blocks.wait();
            }
        }
        let result = f();
        let mut changes = self.changes.lock();
        changes.running -= 1;
        changes.nr += 1;
        result
    }

    /// Whether requests may go to the device.
    pub(super) fn is_held(&self) -> bool {
        self.known
            .as_ref()
            .is_some_and(|known| known.blocks.is_held())
    }

    /// Nothing goes to the device any more, and others may write the file; for good.
    pub(super) fn release(&self) {
        self.changes.lock().is_released = true;
        if let Some(known) = self.known.as_ref() {
            known.blocks.release();
        }
    }
}

impl Known {
    fn new(file: &File, disk: DiskShape, syncs: Arc<Syncs>) -> Result<Self> {
        let blocks = file.hold_blocks(syncs)?;
        let layout = Layout::new(disk.cluster_log);
        let len = file.len()?.max(disk.bytes).saturating_mul(GROWTH);
        let words = SparseWords::new(layout.nr_words(len).min(u64::from(u32::MAX)))?;
        Ok(Self {
            blocks,
            layout,
            words,
        })
    }

    fn word(&self, idx: u32) -> u64 {
        self.words.get(idx).map_or(0, |w| w.load(Acquire))
    }

    /// The word itself, if there may be memory for it.
    fn word_to_learn(&self, idx: u32) -> Result<&Atomic<u64>> {
        match self.words.get(idx) {
            Some(word) => Ok(word),
            None if self.words.nr_pages() >= PAGES_MAX => Err(ENOMEM),
            None => self.words.get_or_alloc(idx),
        }
    }

    /// Forgets the blocks of a range. Returns whether anything was known. One at a time by `changes`, while
    /// nothing is learned.
    fn forget(&self, range: &Range<u64>, changes: &SpinLock<Changes>) -> bool {
        let (mut groups, mut was_known) = (self.layout.groups(range).peekable(), false);
        while groups.peek().is_some() {
            let _one = changes.lock();
            for group in groups.by_ref().take(FORGET_MAX) {
                was_known |= self.forget_group(&group);
            }
        }
        was_known
    }

    /// Forgets a group's blocks, and their chunk's place if that is all that was known of it.
    fn forget_group(&self, group: &Group) -> bool {
        let Some(bits) = self.words.get(group.bits) else {
            return false;
        };
        let known = bits.load(Relaxed);
        bits.store(known & !group.wanted, Relaxed);
        let mut others = self.layout.bits_of_chunk(group);
        if others.all(|idx| self.word(idx) == 0) {
            if let Some(place) = self.words.get(group.place) {
                place.store(0, Relaxed);
            }
        }
        known & group.wanted != 0
    }
}

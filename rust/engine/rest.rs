// SPDX-License-Identifier: GPL-2.0
//! When the work items of an engine run, and how they are brought to rest.
//!
//! Work items do file I/O, and wait for what others do with the file system that holds the image.
//! Some of these may be waiting for memory that is got by writing to this very disk. So nobody waits
//! for a work item while the queue is frozen: [`Engine::try_rest`] says no, requests run again for a
//! moment, and the queue is frozen anew.

use super::{Disk, Engine};
use crate::{
    engine::events::Space,
    sys::{self, prelude::*},
};

/// Of [`Rest::running`]: none may run.
const STOPPED: i32 = -1;
/// Milliseconds between two tries to bring the work items to rest.
const TRY_MS: u64 = 1;

/// Whether work items may run.
pub(super) struct Rest {
    /// How many are running, or [`STOPPED`].
    running: Atomic<i32>,
    /// Those that nobody waits for do not begin.
    is_settling: Atomic<bool>,
    /// Index pages for whose copies there was no room; 0 if there was.
    lacking: Atomic<usize>,
}

impl Rest {
    /// Not before [`Engine::begin`].
    pub(super) fn stopped() -> Self {
        Self {
            running: Atomic::new(STOPPED),
            is_settling: Atomic::new(false),
            lacking: Atomic::new(0),
        }
    }

    fn enter(&self) -> bool {
        let mut running = self.running.load(Relaxed);
        loop {
            if running == STOPPED {
                return false;
            }
            match self.running.cmpxchg(running, running + 1, Full) {
                Ok(_) => return true,
                Err(now) => running = now,
            }
        }
    }

    fn leave(&self) {
        self.running.fetch_sub(1, Full);
    }
}

impl<D: Disk> Engine<D> {
    /// Runs a work item, unless it has to rest: then [`Self::begin`] queues it again. `is_wanted` says
    /// whether a request waits for it.
    pub(super) fn work(self: Arc<Self>, is_wanted: fn(&Self) -> bool, run: fn(&Arc<Self>)) {
        if self.rest.is_settling.load(Relaxed) && !is_wanted(&self) {
            return;
        }
        if self.rest.enter() {
            run(&self);
            self.rest.leave();
        }
    }

    /// Begins what an engine does on its own account, or goes on with it.
    pub(crate) fn begin(self: &Arc<Self>) {
        self.rest.is_settling.store(false, Relaxed);
        let _ = self.rest.running.cmpxchg(STOPPED, 0, Full);
        if !self.chain.top().is_some_and(|t| t.is_writable()) {
            return;
        }
        // Of a poisoned image too: who waits has to be told.
        self.make_space_soon();
        if self.shared.events.space() == Space::Full {
            self.make_space_later();
        }
        if self.has_commit_waiters() {
            self.commit_at_once();
        } else if !self.is_poisoned() {
            self.commit_soon();
        }
    }

    /// From here on only work items begin that a request waits for, until [`Self::begin`].
    pub(crate) fn settle(&self) {
        self.rest.is_settling.store(true, Relaxed);
    }

    /// Brings the work items to rest, until [`Self::begin`]. Whether that could be done at once: with
    /// none of them running, no commit under way, and room for what is left for the last one. With the
    /// queue frozen.
    pub(crate) fn try_rest(&self) -> bool {
        self.rest.lacking.store(0, Relaxed);
        // Nobody waits for it now, and none begins until this is decided.
        let Some(copies) = self.commit.try_lock() else {
            return false;
        };
        let lacking = self.lacks_room(copies.room());
        // A poisoned image has no last commit.
        if let Some(nr) = lacking.filter(|_| !self.is_poisoned()) {
            self.rest.lacking.store(nr, Relaxed);
            return false;
        }
        let stopped = self.rest.running.cmpxchg(0, STOPPED, Full);
        matches!(stopped, Ok(_) | Err(STOPPED))
    }

    /// What [`Self::try_rest`] could not wait for, or had no memory for. With requests running. An error
    /// if it cannot be done.
    pub(crate) fn help_to_rest(&self) -> Result {
        let lacking = self.rest.lacking.load(Relaxed);
        if lacking > 0 && !self.is_poisoned() {
            // Requests go on: many of them at once may leave as much again.
            self.make_room(lacking)?;
            self.commit()?;
        }
        sys::sleep_ms(TRY_MS);
        Ok(())
    }

    /// Ends all that runs on the engine's own account. No request may be in flight or come.
    pub(crate) fn quiet(&self) {
        // What makes space may ask for a commit, and a commit for space.
        for _ in 0..2 {
            self.commit_now.cancel_sync();
            self.commit_later.cancel_sync();
            self.make_space_later.cancel_sync();
            self.make_space.cancel_sync();
        }
    }
}

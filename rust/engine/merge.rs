// SPDX-License-Identifier: GPL-2.0
//! Moving clusters on the engine's own account: from the source of a merge to the top, and within
//! the top's file. Callers are not requests and may sleep.

use super::{cow::Copy, lockout::Change, Disk, Engine};
use crate::sys::{
    self,
    mq::noio,
    pages::{PageBuf, PAGE_BYTES},
    prelude::*,
};
use ploop_pure::{
    alloc::Take,
    map::Place,
    units::{Cluster, ImageCluster, Level, INDEX_PAGE_BYTES},
};

/// What became of a cluster that was to be moved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    /// It is where it was to go.
    Done,
    /// Somebody has it locked: to be tried again.
    Busy,
    /// It was not there any more.
    Gone,
}

impl<D: Disk> Engine<D> {
    /// Moves a cluster of the source of a merge to the top, unless a write does it.
    pub(crate) fn merge_cluster(
        self: &Arc<Self>,
        cluster: Cluster,
        buf: &mut PageBuf,
    ) -> Result<Moved> {
        if self.is_poisoned() {
            return Err(EIO);
        }
        let (source, _) = self.chain.source().ok_or(EINVAL)?;
        // Reads of the source may go on: nobody writes to it.
        let from = match self.try_lock(cluster, source) {
            None => return Ok(Moved::Busy),
            Some(None) => return Ok(Moved::Gone),
            Some(Some(from)) => from,
        };
        let hidden = self.chain.hidden(cluster);
        let slot = noio(|| match hidden {
            Some(at) => self.zero_slot(at).map(|()| at),
            None => self.take_slot_now(),
        });
        let copied = slot.and_then(|to| {
            let copy = Copy {
                level: source,
                from,
                to,
            };
            match noio(|| self.copy_slot(copy, buf)) {
                Ok(()) => Ok(to),
                Err(e) => {
                    if hidden.is_none() {
                        self.slow.lock().alloc.give_back(to);
                    }
                    Err(e)
                }
            }
        });
        match copied {
            Ok(to) => {
                self.unlock_cluster(cluster, Change::Map(to));
                Ok(Moved::Done)
            }
            Err(e) => {
                self.unlock_cluster(cluster, Change::Keep);
                Err(e)
            }
        }
    }

    /// Moves a cluster of the top to another slot, which is not below `floor` and, if that is
    /// asked for, below the one it has. No slot for it: ENOSPC.
    pub(crate) fn relocate_cluster(
        self: &Arc<Self>,
        cluster: Cluster,
        down: bool,
        buf: &mut PageBuf,
    ) -> Result<Moved> {
        if let Some(why) = self.close_in_top(cluster)? {
            return Ok(why);
        }
        let from = self.chain.slot_in_top(cluster).ok_or(EIO)?;
        let slot = match down {
            true => self.slow.lock().alloc.take_below(from).ok_or(ENOSPC),
            false => noio(|| self.take_slot_now()),
        };
        let copied = slot.and_then(|to| {
            let level = self.chain.top_level();
            match noio(|| self.copy_slot(Copy { level, from, to }, buf)) {
                Ok(()) => Ok(to),
                Err(e) => {
                    self.slow.lock().alloc.give_back(to);
                    Err(e)
                }
            }
        });
        match copied {
            Ok(to) => {
                self.unlock_cluster(cluster, Change::Move { from, to });
                Ok(Moved::Done)
            }
            Err(e) => {
                self.unlock_cluster(cluster, Change::Keep);
                Err(e)
            }
        }
    }

    /// Makes zero what the slot of a cluster of the top has behind its first `len` bytes, up to which
    /// the disk reaches.
    pub(crate) fn trim_cluster(
        self: &Arc<Self>,
        cluster: Cluster,
        len: u64,
        buf: &mut PageBuf,
    ) -> Result<Moved> {
        if let Some(why) = self.close_in_top(cluster)? {
            return Ok(why);
        }
        let at = self.chain.slot_in_top(cluster).ok_or(EIO);
        let trimmed = at.and_then(|at| {
            let trimmed = noio(|| self.trim_slot(at, len, buf));
            self.slot_written(at);
            trimmed
        });
        self.unlock_cluster(cluster, Change::Keep);
        trimmed.map(|()| Moved::Done)
    }

    fn trim_slot(&self, at: ImageCluster, len: u64, buf: &mut PageBuf) -> Result {
        let size = self.chain.cluster();
        let (start, end) = (size.offset(at), size.bytes());
        let within = len as usize % PAGE_BYTES;
        let page = start + len - within as u64;
        let top = self.chain.top().ok_or(EIO)?;
        if within > 0 {
            if top.io().read(page, buf, 0..1)? != PAGE_BYTES {
                return Err(EIO);
            }
            let tail = buf.page_mut(0).and_then(|page| page.get_mut(within..));
            tail.ok_or(EIO)?.fill(0);
            top.io().write(page, buf, 0..1)?;
        }
        top.zero_range(start + len.next_multiple_of(INDEX_PAGE_BYTES)..start + end)
    }

    /// Closes a cluster of the top, or tells why not. EIO if the image takes no writes.
    fn close_in_top(&self, cluster: Cluster) -> Result<Option<Moved>> {
        if self.is_poisoned() {
            return Err(EIO);
        }
        let top = self.chain.top_level();
        let in_top = |place| matches!(place, Place::Slot { level, .. } if level == top);
        match self.try_close(cluster, in_top) {
            None => Ok(Some(Moved::Busy)),
            Some(false) => Ok(Some(Moved::Gone)),
            Some(true) => {
                // Writes in place that began before may still be on their way.
                self.shared.epoch.wait();
                Ok(None)
            }
        }
    }

    /// Takes a slot for who may wait until the file has grown.
    fn take_slot_now(&self) -> Result<ImageCluster> {
        for _ in 0..TRIES_MAX {
            let taken = self.slow.lock().alloc.take();
            match taken {
                Take::Slot(at) => {
                    self.shared.stats.allocated.add(1, Relaxed);
                    return Ok(at);
                }
                Take::Full => return Err(ENOSPC),
                Take::NeedSpace => self.make_space_now()?,
            }
            if self.slow.lock().alloc.is_waiting() {
                sys::sleep_ms(WAIT_MS);
            }
        }
        // Others were faster each time.
        Err(EAGAIN)
    }

    /// How many clusters the delta of a level has, in bytes, as the map knows.
    pub(crate) fn bytes_in(&self, level: Level) -> u64 {
        let mut nr = 0;
        let mut from = 0;
        while let Some(cluster) = self.chain.next_in(level, from) {
            nr += 1;
            let Some(next) = cluster.0.checked_add(1) else {
                break;
            };
            from = next;
        }
        nr << self.chain.cluster().log_bytes()
    }
}

/// Looks for a slot before it is given up.
const TRIES_MAX: u32 = 100;
/// Milliseconds until a slot is looked for again that somebody else is making free.
const WAIT_MS: u64 = 10;

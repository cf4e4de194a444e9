// SPDX-License-Identifier: GPL-2.0
//! Moving clusters on the engine's own account: from the source of a merge to the top, and within
//! the top's file. Callers are not requests and may sleep.

use super::{cow::Copy, lockout::Change, Disk, Engine};
use crate::sys::{mq::noio, pages::PageBuf, prelude::*};
use ploop_pure::{
    alloc::Take,
    map::Place,
    units::{Cluster, ImageCluster, Level},
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
        if self.is_poisoned() {
            return Err(EIO);
        }
        let top = self.chain.top_level();
        let in_top = |place| match place {
            Place::Slot { level, at } if level == top => Some(at),
            Place::Slot { .. } | Place::Hole => None,
        };
        match self.try_close(cluster, |place| in_top(place).is_some()) {
            None => return Ok(Moved::Busy),
            Some(false) => return Ok(Moved::Gone),
            Some(true) => {}
        }
        // Writes in place that began before may still be on their way.
        self.shared.epoch.wait();
        let from = in_top(self.chain.lookup(cluster)).ok_or(EIO)?;
        let slot = match down {
            true => self.slow.lock().alloc.take_below(from).ok_or(ENOSPC),
            false => noio(|| self.take_slot_now()),
        };
        let copied = slot.and_then(|to| {
            let level = top;
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

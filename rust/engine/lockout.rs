// SPDX-License-Identifier: GPL-2.0
//! Exclusive ownership of a cluster by one slow operation.
//!
//! The lock is a bit of the cluster's map word; who finds it set waits in a list. Words are
//! written only here and only under `slow`, so that bit and place never overwrite each other.
//!
//! An owner who is going to take the cluster's place away *closes* it too: from then on nobody uses
//! the place without the lock, and after [`Epoch::wait`](crate::sys::epoch::Epoch::wait) nobody who
//! looked it up before does.

use super::{Cmd, Disk, Engine, Phase};
use crate::{
    format::ploop1::Ploop1,
    sys::{
        mq::{Request, RequestList},
        prelude::*,
        trace,
    },
};
use ploop_pure::{
    flow::{Action, Durability, Event},
    map::{Place, Word},
    units::{Cluster, ImageCluster, Level},
};

/// Lists of waiters: few clusters are locked at a time, and few share a list.
const LISTS: usize = 64;

/// Requests that wait for a locked cluster, by cluster.
pub(super) struct Waiters<D: Disk>([RequestList<D>; LISTS]);

impl<D: Disk> Waiters<D> {
    /// None.
    pub(super) fn new() -> Self {
        Self([const { RequestList::new() }; LISTS])
    }

    fn list(&mut self, cluster: Cluster) -> Option<&mut RequestList<D>> {
        self.0.get_mut(cluster.0 as usize % LISTS)
    }

    fn push(&mut self, mut rq: Request<D>) {
        let cluster = rq.pdu().extent.cluster;
        if let Some(list) = self.list(cluster) {
            list.push_back(rq);
        }
    }

    /// Takes those who wait for `cluster`.
    fn take(&mut self, cluster: Cluster) -> RequestList<D> {
        let (mut woken, mut others) = (RequestList::new(), RequestList::new());
        if let Some(list) = self.list(cluster) {
            while let Some(mut rq) = list.pop_front() {
                if rq.pdu().extent.cluster == cluster {
                    woken.push_back(rq);
                } else {
                    others.push_back(rq);
                }
            }
            *list = others;
        }
        woken
    }
}

/// What becomes of a cluster when it is unlocked.
#[derive(Clone, Copy)]
pub(super) enum Change {
    /// Nothing.
    Keep,
    /// It has this slot of the top now.
    Map(ImageCluster),
    /// It has a slot of the top instead of another of the top.
    Move {
        /// The slot it had.
        from: ImageCluster,
        /// The slot it has now.
        to: ImageCluster,
    },
    /// It is a hole instead of having this slot of the top.
    Unmap(ImageCluster),
}

impl<D: Disk> Engine<D> {
    /// Locks the cluster of `rq` and looks it up again. `None` if `rq` now waits for the lock: its
    /// handler is called again when the cluster is unlocked.
    pub(super) fn lock_cluster(&self, mut rq: Request<D>) -> Option<(Request<D>, Event)> {
        // Whoever has the lock may be waiting for us to leave.
        rq.leave();
        let extent = rq.pdu().extent;
        // Before the spin lock: this may allocate.
        let word = match self.chain.word_mut(extent.cluster) {
            Ok(word) => word,
            Err(e) => {
                rq.pdu().error = e;
                return Some((rq, Event::Failed));
            }
        };
        let now = {
            let mut slow = self.slow.lock();
            let now = Word::from_bits(word.load(Relaxed));
            if now.is_locked() {
                rq.pdu().phase = Phase::Act(Action::Lock);
                slow.lock_waiters.push(rq);
                return None;
            }
            word.store(now.locked().bits(), Relaxed);
            now
        };
        let durability = match rq.is_fua() {
            true => Durability::Fua,
            false => Durability::Volatile,
        };
        let found = self.found(&mut rq, now, durability);
        Some((rq, found))
    }

    /// Lets `rq` start again when its cluster is not locked.
    pub(super) fn wait_for_cluster(&self, mut rq: Request<D>) {
        rq.leave();
        rq.pdu().phase = Phase::Again;
        let cluster = rq.pdu().extent.cluster;
        let mut slow = self.slow.lock();
        if self.chain.word(cluster).is_locked() {
            slow.lock_waiters.push(rq);
        } else {
            drop(slow);
            rq.enqueue();
        }
    }

    /// Locks and closes a cluster for who is not a request, if `is_wanted` says so of its place.
    /// `None` if it is locked.
    pub(super) fn try_close(
        &self,
        cluster: Cluster,
        is_wanted: impl Fn(Place) -> bool,
    ) -> Option<bool> {
        if !is_wanted(self.chain.lookup(cluster)) {
            return Some(false);
        }
        let Ok(word) = self.chain.word_mut(cluster) else {
            return Some(false);
        };
        let _slow = self.slow.lock();
        let now = Word::from_bits(word.load(Relaxed));
        if now.is_locked() {
            return None;
        }
        if !is_wanted(now.place()) {
            return Some(false);
        }
        word.store(now.closed().bits(), Relaxed);
        Some(true)
    }

    /// Locks a cluster for who is not a request, if it is in the delta of `level`, and returns its
    /// slot there. `None` if it is locked.
    pub(super) fn try_lock(&self, cluster: Cluster, level: Level) -> Option<Option<ImageCluster>> {
        let Ok(word) = self.chain.word_mut(cluster) else {
            return Some(None);
        };
        let _slow = self.slow.lock();
        let now = Word::from_bits(word.load(Relaxed));
        if now.is_locked() {
            return None;
        }
        let slot = match now.place() {
            Place::Slot { level: l, at } if l == level => at,
            Place::Slot { .. } | Place::Hole => return Some(None),
        };
        word.store(now.locked().bits(), Relaxed);
        Some(Some(slot))
    }

    /// Tells requests that a cluster of a lower delta is in another slot of it. False if somebody
    /// has it locked and may be copying from there.
    pub(crate) fn repoint_cluster(&self, cluster: Cluster, level: Level, to: ImageCluster) -> bool {
        match self.try_lock(cluster, level) {
            None => false,
            Some(None) => true,
            Some(Some(_)) => {
                let woken = {
                    let mut slow = self.slow.lock();
                    self.chain.repoint(level, cluster, to);
                    if let Ok(word) = self.chain.word_mut(cluster) {
                        let now = Word::from_bits(word.load(Relaxed)).unlocked();
                        word.store(now.bits(), Release);
                    }
                    slow.lock_waiters.take(cluster)
                };
                wake(woken);
                true
            }
        }
    }

    /// Unlocks a cluster, changing its place if that is wanted, and lets all who wait for it try
    /// again. After a change the cluster's index page is dirty; it will be written within
    /// [`COMMIT_DELAY_MS`](super::index_wb::COMMIT_DELAY_MS) if no flush comes.
    pub(super) fn unlock_cluster(self: &Arc<Self>, cluster: Cluster, change: Change) {
        let woken = {
            let mut slow = self.slow.lock();
            let slow = &mut *slow;
            if let Ok(word) = self.chain.word_mut(cluster) {
                let now = Word::from_bits(word.load(Relaxed)).unlocked();
                let level = self.chain.top_level();
                let (place, released) = match change {
                    Change::Keep => (now.place(), None),
                    Change::Map(at) => (Place::Slot { level, at }, None),
                    Change::Move { from, to } => (Place::Slot { level, at: to }, Some(from)),
                    Change::Unmap(at) => (Place::Hole, Some(at)),
                };
                if !matches!(change, Change::Keep) {
                    slow.dirty.mark(Ploop1::page_of(cluster));
                }
                if let Some(at) = released {
                    slow.alloc.release(at);
                    trace::unmap(self.device, cluster.0, at.0);
                }
                if let Change::Map(at) | Change::Move { to: at, .. } = change {
                    trace::map(self.device, cluster.0, at.0);
                }
                // Release: who finds the slot finds the data written before.
                word.store(now.with_place(place).bits(), Release);
            }
            slow.lock_waiters.take(cluster)
        };
        if !matches!(change, Change::Keep) {
            self.commit_soon();
        }
        wake(woken);
    }
}

/// Lets the handlers of requests that waited run again.
pub(super) fn wake<D: Disk>(mut list: RequestList<D>) {
    while let Some(rq) = list.pop_front() {
        rq.enqueue();
    }
}

/// The same, but they fail with `error`: what they waited for went wrong.
pub(super) fn wake_failed<D: Disk>(mut list: RequestList<D>, error: Error) {
    while let Some(mut rq) = list.pop_front() {
        let cmd: &mut Cmd = rq.pdu();
        cmd.error = error;
        cmd.phase = match (&mut cmd.write, cmd.phase) {
            // It has begun nothing that has to be ended.
            (_, Phase::Again) | (None, _) => Phase::Failed,
            (Some(write), _) => Phase::Act(write.next(Event::Failed)),
        };
        rq.enqueue();
    }
}

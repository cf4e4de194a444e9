// SPDX-License-Identifier: GPL-2.0
//! Exclusive ownership of a cluster by one slow operation.
//!
//! The lock is a bit of the cluster's map word; who finds it set waits in a list. Words are
//! written only here and only under `slow`, so that bit and place never overwrite each other.

use super::{Cmd, Disk, Durability, Engine, Phase};
use crate::sys::{
    mq::{Request, RequestList},
    prelude::*,
};
use ploop_pure::{
    flow::{Action, Event},
    map::{Place, Word},
    units::{Cluster, ImageCluster},
};

impl<D: Disk> Engine<D> {
    /// Locks a cluster for `rq` and looks it up again. `None` if `rq` now waits for the lock: its
    /// handler is called again when the cluster is unlocked.
    pub(super) fn lock_cluster(
        &self,
        mut rq: Request<D>,
        cluster: Cluster,
    ) -> Option<(Request<D>, Event)> {
        // Before the spin lock: this may allocate.
        let word = match self.chain.word(cluster) {
            Ok(word) => word,
            Err(e) => {
                rq.pdu().error = e;
                return Some((rq, Event::Failed));
            }
        };
        {
            let mut slow = self.slow.lock();
            let now = Word::from_bits(word.load(Relaxed));
            if now.is_locked() {
                rq.pdu().phase = Phase::Act(Action::Lock);
                slow.lock_waiters.push_back(rq);
                return None;
            }
            word.store(now.locked().bits(), Relaxed);
        }
        let durability = match rq.is_fua() {
            true => Durability::Fua,
            false => Durability::Volatile,
        };
        Some((rq, self.found(cluster, durability)))
    }

    /// Unlocks a cluster, publishing its new slot in the top if there is one, and lets all who
    /// wait for it try again. After a publication the cluster's index page is dirty; it will be
    /// written within [`COMMIT_DELAY_MS`](super::index_wb::COMMIT_DELAY_MS) if no flush comes.
    pub(super) fn unlock_cluster(
        self: &Arc<Self>,
        cluster: Cluster,
        published: Option<ImageCluster>,
    ) {
        let mut woken = RequestList::new();
        {
            let mut slow = self.slow.lock();
            let slow = &mut *slow;
            if let Ok(word) = self.chain.word(cluster) {
                let mut now = Word::from_bits(word.load(Relaxed)).unlocked();
                if let Some(at) = published {
                    let level = self.chain.top_level();
                    now = now.with_place(Place::Slot { level, at });
                    slow.dirty
                        .mark(crate::format::ploop1::Ploop1::page_of(cluster));
                }
                // Release: who finds the slot finds the data written before.
                word.store(now.bits(), Release);
            }
            let mut others = RequestList::new();
            while let Some(rq) = slow.lock_waiters.pop_front() {
                match self.cluster_of(&rq) {
                    Ok((c, _)) if c != cluster => others.push_back(rq),
                    Ok(_) | Err(_) => woken.push_back(rq),
                }
            }
            slow.lock_waiters = others;
        }
        if published.is_some() {
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
        cmd.phase = match &mut cmd.write {
            Some(write) => Phase::Act(write.next(Event::Failed)),
            None => Phase::Failed,
        };
        rq.enqueue();
    }
}

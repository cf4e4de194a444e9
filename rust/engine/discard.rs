// SPDX-License-Identifier: GPL-2.0
//! Discards and writes of zeros: what [`ploop_pure::discard`] decides, cluster by cluster.

use super::{lockout::Change, Disk, Engine, Extent, Phase};
use crate::sys::{
    mq::{Op, Request},
    prelude::*,
};
use ploop_pure::{
    discard::{decide, Action, Wish},
    flow::{Coverage, Durability, Event},
    map::Place,
    units::{Cluster, ImageCluster, SECTOR_BYTES},
};

/// Clusters unmapped after one wait for those who use them.
const RUN_MAX: usize = 128;

impl<D: Disk> Engine<D> {
    /// Goes on with a discard or a write of zeros: `Cmd::moved` says how far it is.
    pub(super) fn discard(self: &Arc<Self>, mut rq: Request<D>) {
        if !self.may_write() {
            return rq.end(Err(EIO));
        }
        loop {
            rq.leave();
            let extent = match self.next_extent(&mut rq) {
                Ok(Some(extent)) => extent,
                Ok(None) if rq.is_fua() => return self.join_commit(rq),
                Ok(None) => return rq.end(Ok(())),
                Err(e) => return rq.end(Err(e)),
            };
            rq.pdu().extent = extent;
            let wish = Wish {
                coverage: self.coverage_of_zeros(extent),
                keeps_space: rq.keeps_space() && rq.op() == Op::WriteZeroes,
            };
            let place = self.chain.lookup(extent.cluster);
            let (top, is_base) = (self.chain.top_level(), self.chain.is_base());
            match decide(place, wish, top, is_base && !self.chain.is_identity()) {
                Action::Nothing => rq.pdu().moved += extent.len as usize,
                Action::Unmap { .. } => {
                    let (start, left) = (extent.cluster, rq.len() - rq.pdu().moved);
                    let nr = self.chain.cluster().floor(left as u64).max(1);
                    let nr = usize::try_from(nr).unwrap_or(RUN_MAX).min(RUN_MAX);
                    match self.unmap_run(start, nr) {
                        0 => return self.wait_for_cluster(rq),
                        done => {
                            let len = self.chain.cluster().bytes() * done as u64;
                            let (from, end) = (rq.pos(), rq.len());
                            let cmd = rq.pdu();
                            let start = from.saturating_add(cmd.moved as u64);
                            cmd.moved = cmd.moved.saturating_add(len as usize).min(end);
                            let tracks = &self.shared.tracks;
                            tracks.disk_written(&(start..start.saturating_add(len)));
                        }
                    }
                }
                Action::Zero => {
                    let durability = Durability::Volatile;
                    return self.begin_write(rq, extent, wish.coverage, durability);
                }
            }
        }
    }

    /// The part of the request that is in the next cluster.
    fn next_extent(&self, rq: &mut Request<D>) -> Result<Option<Extent>> {
        let left = rq.len().saturating_sub(rq.pdu().moved);
        if left == 0 {
            return Ok(None);
        }
        let pos = rq.pos().saturating_add(rq.pdu().moved as u64);
        let size = self.chain.cluster();
        let (cluster, within) = size.split(pos).ok_or(EIO)?;
        // Clusters are at most 64 MiB.
        let len = (size.bytes() - u64::from(within)).min(left as u64) as u32;
        Ok(Some(Extent {
            cluster,
            within,
            len,
        }))
    }

    /// The last cluster is whole where the disk ends.
    fn coverage_of_zeros(&self, extent: Extent) -> Coverage {
        let start = self.chain.cluster().guest_offset(extent.cluster);
        let end = start.saturating_add(u64::from(extent.len));
        if extent.within == 0 && end >= self.chain.size_sectors().saturating_mul(SECTOR_BYTES) {
            return Coverage::Whole;
        }
        self.coverage(extent)
    }

    /// Unmaps up to `nr` clusters from `start` on, those of the top and as far as none is locked.
    /// Returns how many were looked at; 0 if the first is locked.
    fn unmap_run(self: &Arc<Self>, start: Cluster, nr: usize) -> usize {
        let top = self.chain.top_level();
        let in_top = |place| match place {
            Place::Slot { level, at } if level == top => Some(at),
            Place::Slot { .. } | Place::Hole => None,
        };
        let mut slots: [Option<ImageCluster>; RUN_MAX] = [None; RUN_MAX];
        let clusters = || (start.0..=u32::MAX).map(Cluster);
        let mut done = 0;
        for (cluster, slot) in clusters().zip(slots.iter_mut().take(nr)) {
            match self.try_close(cluster, |place| in_top(place).is_some()) {
                None => break,
                Some(true) => *slot = in_top(self.chain.lookup(cluster)),
                Some(false) => {}
            }
            done += 1;
        }
        if slots.iter().any(Option::is_some) {
            self.shared.epoch.wait();
        }
        for (cluster, at) in clusters().zip(slots) {
            if let Some(at) = at {
                self.unlock_cluster(cluster, Change::Unmap(at));
                self.shared.stats.discarded.add(1, Relaxed);
            }
        }
        done
    }

    /// Makes the extent of `rq`, from byte `pos` of the top's image on, read as zeros.
    pub(super) fn zero_data(&self, mut rq: Request<D>, pos: u64) -> Option<(Request<D>, Event)> {
        let range = pos..pos.saturating_add(u64::from(rq.pdu().extent.len));
        let keeps_space = rq.keeps_space() && rq.op() == Op::WriteZeroes;
        let zeroed = self
            .chain
            .top()
            .ok_or(EIO)
            .and_then(|top| match keeps_space {
                true => top.io().zero(range.clone()),
                false => top.io().punch(range.clone()),
            });
        self.shared.tracks.image_written(&range);
        let event = match zeroed {
            Ok(()) => Event::Ok,
            Err(e) => {
                // A part of it, perhaps.
                self.zeros_written(&mut rq);
                rq.pdu().error = e;
                Event::Failed
            }
        };
        Some((rq, event))
    }

    /// Notes what the extent of `rq` has changed on the disk.
    fn zeros_written(&self, rq: &mut Request<D>) {
        let start = rq.pos().saturating_add(rq.pdu().moved as u64);
        let end = start.saturating_add(u64::from(rq.pdu().extent.len));
        self.shared.tracks.disk_written(&(start..end));
    }

    /// The extent of `rq` is done.
    pub(super) fn discarded(&self, mut rq: Request<D>) {
        self.zeros_written(&mut rq);
        let cmd = rq.pdu();
        cmd.moved = cmd.moved.saturating_add(cmd.extent.len as usize);
        cmd.write = None;
        cmd.phase = Phase::Again;
        rq.leave();
        rq.enqueue();
    }
}

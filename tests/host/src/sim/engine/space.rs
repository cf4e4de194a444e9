// SPDX-License-Identifier: GPL-2.0
//! Slots and space of the top's file: growth, and what `ploop_pure::alloc` wants made clean.

use super::{Engine, File, Wait};
use crate::rng::Rng;
use crate::sim::disk::{Covered, OpId};
use crate::sim::Fault;
use ploop_pure::alloc::{Alloc, Room};
use ploop_pure::flow;
use ploop_pure::units::ImageCluster;
use std::ops::Range;

/// Who makes space: for those who wait for it, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Maker {
    /// The work item that requests wait for.
    Requests,
    /// The operation that runs.
    Op,
}

impl Maker {
    fn other(self) -> Self {
        match self {
            Self::Requests => Self::Op,
            Self::Op => Self::Requests,
        }
    }
}

/// How the file gets more space.
#[derive(Debug, Clone)]
pub(super) enum Making {
    Longer { op: OpId, to: u32 },
    Zeroing { op: OpId, run: Range<u32> },
    SyncingZeros { covered: Covered, run: Range<u32> },
}

/// Slots made zero at once.
const RUN_MAX: u32 = 2;

impl Engine<'_> {
    /// The free slots of a file whose entries name `places`; cuts what lies behind them.
    pub(super) fn alloc_of(
        cfg: &super::Config,
        file: &mut File,
        places: &[Option<ImageCluster>],
    ) -> Alloc {
        if file.is_raw {
            let len = (file.disk.live().len / cfg.cluster_sectors()) as u32;
            return Alloc::new(file.header.cluster, len, len, len).expect("memory");
        }
        let first = file.header.first_data.0;
        let used = |at: u32| places.contains(&Some(ImageCluster(at)));
        let end = places.iter().flatten().map(|at| at.0 + 1).max();
        let end = end.unwrap_or(first).max(first);
        let len = end as usize * cfg.cluster_sectors();
        if file.disk.live().len != len {
            let op = file.disk.set_len(len);
            file.disk.complete(op);
        }
        let max = file.header.slots_max().min(end.max(cfg.slots_max));
        let mut alloc = Alloc::new(file.header.cluster, end, end, max).expect("memory");
        for at in (first..end).filter(|at| !used(*at)) {
            alloc.give_back(ImageCluster(at));
        }
        alloc
    }

    /// Whether somebody makes the file longer, which only one may do at a time.
    fn is_growing(&self, maker: Maker) -> bool {
        matches!(self.making[maker as usize], Some(Making::Longer { .. }))
    }

    fn may_grow(&self, maker: Maker) -> bool {
        self.cfg.fault == Fault::GrowthUnlocked || !self.is_growing(maker.other())
    }

    /// Whether `maker` is at work or has reason to be.
    pub(super) fn may_make_space(&self, maker: Maker) -> bool {
        let may_begin = self.may_clean || (!self.wants_commit && self.may_grow(maker));
        self.making[maker as usize].is_some() || (may_begin && self.is_space_wanted(maker))
    }

    pub(super) fn is_no_space_made(&self) -> bool {
        self.making.iter().all(Option::is_none)
    }

    /// One step of `maker` towards more space for those who wait for it.
    pub(super) fn space(&mut self, maker: Maker, rng: &mut Rng) {
        let making = self.making[maker as usize].take();
        self.tell(|| match &making {
            None => format!("space is made by {maker:?}"),
            Some(m) => format!("space, by {maker:?}: {m:?}"),
        });
        let making = match making {
            None => self.make_space(maker, rng),
            Some(Making::Longer { op, to }) => {
                self.disk().complete(op);
                self.alloc.expand(&mut Room::new(to).expect("memory"));
                self.alloc.grown(to);
                None
            }
            Some(Making::Zeroing { op, run }) => {
                self.disk().complete(op);
                let covered = self.disk().sync_start();
                Some(Making::SyncingZeros { covered, run })
            }
            Some(Making::SyncingZeros { covered, run }) => {
                self.disk().sync_end(covered);
                self.alloc.cleaned(run);
                None
            }
        };
        if making.is_none() {
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::Space) {
                    t.wait = Wait::Ready(flow::Action::TakeSlot);
                }
            }
            self.op_has_space();
        }
        self.making[maker as usize] = making;
    }

    fn make_space(&mut self, maker: Maker, rng: &mut Rng) -> Option<Making> {
        if let Some(run) = self.alloc.next_freed(RUN_MAX) {
            if self.cfg.fault == Fault::ReuseUnclean {
                self.alloc.cleaned(run);
                return None;
            }
            let nr = self.cfg.cluster_sectors();
            let zeros = vec![0; nr * run.len()];
            let op = self.disk().write(run.start as usize * nr, &zeros);
            return Some(Making::Zeroing { op, run });
        }
        self.may_clean = false;
        if !self.is_space_wanted(maker) || !self.may_grow(maker) {
            return None;
        }
        // Now and then there is space for one cluster only.
        let target = match rng.chance(50) {
            true => self.alloc.target_min(),
            false => self.alloc.target(),
        };
        let Some(to) = target else {
            // Only a commit can give space.
            self.wants_commit |= self.alloc.has_pending();
            return None;
        };
        let nr = self.cfg.cluster_sectors();
        let (old, from) = (self.disk().live().len, self.alloc.limit() as usize);
        if old < to as usize * nr {
            let op = self.disk().set_len(to as usize * nr);
            self.disk().complete(op);
        }
        // What lies there is nobody's, and may be anything.
        let op = self
            .disk()
            .write(from * nr, &vec![0; (to as usize - from) * nr]);
        Some(Making::Longer { op, to })
    }

    /// Whether somebody waits for space that `maker` makes.
    fn is_space_wanted(&self, maker: Maker) -> bool {
        match maker {
            Maker::Requests => self.tasks.iter().any(|t| matches!(t.wait, Wait::Space)),
            Maker::Op => self.op_wants_space(),
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Slots and space of the top's file: growth, and what `ploop_pure::alloc` wants made clean.

use super::{Engine, File, Wait};
use crate::sim::disk::{Covered, OpId};
use crate::sim::Fault;
use ploop_pure::alloc::{Alloc, Room};
use ploop_pure::flow;
use ploop_pure::units::ImageCluster;
use std::ops::Range;

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

    /// One step towards more space for those who wait for it.
    pub(super) fn space(&mut self) {
        let making = self.making.clone();
        self.tell(|| making.map_or("space is made".into(), |m| format!("space: {m:?}")));
        self.making = match self.making.take() {
            None => self.make_space(),
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
        if self.making.is_none() {
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::Space) {
                    t.wait = Wait::Ready(flow::Action::TakeSlot);
                }
            }
            self.op_has_space();
        }
    }

    fn make_space(&mut self) -> Option<Making> {
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
        if !self.is_space_wanted() {
            return None;
        }
        let Some(to) = self.alloc.target() else {
            // Only a commit can give space.
            self.wants_commit |= self.alloc.has_pending();
            return None;
        };
        let len = to as usize * self.cfg.cluster_sectors();
        let op = self.disk().set_len(len);
        Some(Making::Longer { op, to })
    }

    /// Whether somebody waits for space.
    pub(super) fn is_space_wanted(&self) -> bool {
        self.op_wants_space() || self.tasks.iter().any(|t| matches!(t.wait, Wait::Space))
    }
}

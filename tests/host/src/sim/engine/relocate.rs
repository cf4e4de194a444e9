// SPDX-License-Identifier: GPL-2.0
//! Clusters that move within the top's file: compaction, which cuts the file then, and growth,
//! which makes the place where they stood a part of the index.

use super::ops::{Kind, Next, OpWait, Where};
use super::{level_of, Engine};
use crate::rng::Rng;
use crate::sim::blocks::PAGE_SECTORS;
use crate::sim::Fault;
use ploop_pure::alloc::{Room, Take};
use ploop_pure::layout::ploop1::{Header, HEADER_SLOTS, PAGE_SLOTS};
use ploop_pure::map::Place;
use ploop_pure::units::ImageCluster;
use std::ops::Range;

/// What is done next.
#[derive(Debug)]
enum Stage {
    Begin,
    Clean,
    Measure,
    /// No slot of the future index is handed out any more.
    Reserve,
    Choose,
    /// A cluster is locked and closed.
    TakeSlot {
        cluster: usize,
        from: ImageCluster,
    },
    Publish {
        cluster: usize,
        to: ImageCluster,
    },
    Commit,
    CleanLast,
    FreezeLast,
    Cut,
    Zero,
    SyncZeros,
    End,
}

/// A relocation that runs.
#[derive(Debug)]
pub(super) struct Relocate {
    stage: Stage,
    /// The slots to be left.
    slots: Range<u32>,
    /// The header of a growth.
    grown: Option<Header>,
    is_growth: bool,
}

impl Relocate {
    fn new(is_growth: bool) -> Self {
        Self {
            stage: Stage::Begin,
            slots: 0..0,
            grown: None,
            is_growth,
        }
    }

    pub(super) fn compact() -> Self {
        Self::new(false)
    }

    pub(super) fn grow() -> Self {
        Self::new(true)
    }
}

impl Engine<'_> {
    /// The next step, after the last one succeeded.
    pub(super) fn relocate(&mut self, mut r: Relocate, rng: &mut Rng) -> Result<Next, String> {
        let top = Where::Chain(self.top);
        let fault = self.cfg.fault;
        let next = match r.stage {
            // It lacks space, or is cancelled: the disk stays as large as it is.
            Stage::Choose | Stage::Zero if r.is_growth && rng.chance(8) => {
                self.alloc.set_floor(ImageCluster(r.slots.start));
                None
            }
            Stage::Begin if r.is_growth => {
                let header = self.files[self.top].header;
                // One cluster more of index.
                let entries = (header.first_data.0 + 1) * self.slots_of_cluster() - HEADER_SLOTS;
                let sectors = u64::from(entries) * self.cfg.cluster_sectors() as u64;
                let grown = header.grown(sectors).map_err(|p| p.to_string())?;
                r.slots = header.first_data.0..grown.first_data.0;
                r.grown = Some(grown);
                self.is_frozen = fault != Fault::ReservedUnfrozen;
                let wait = match self.is_frozen {
                    true => OpWait::Quiet,
                    false => OpWait::Ready,
                };
                Some((Stage::Reserve, wait))
            }
            Stage::Begin => Some((Stage::Clean, OpWait::NextCommit)),
            Stage::Clean => Some((Stage::Measure, OpWait::Clean)),
            Stage::Measure => {
                r.slots = self.alloc.used()..self.alloc.head();
                Some((Stage::Choose, OpWait::Ready))
            }
            Stage::Reserve => {
                self.reserve(r.slots.end);
                self.is_frozen = false;
                Some((Stage::Choose, OpWait::Ready))
            }
            Stage::Choose => Some(self.choose_in_slots(&r, rng)),
            Stage::TakeSlot { cluster, from } => Some(self.relocate_slot(&r, cluster, from)),
            Stage::Publish { cluster, to } => {
                self.publish_copy(cluster, to);
                Some((Stage::Choose, OpWait::Ready))
            }
            Stage::Commit => {
                if r.is_growth && fault != Fault::SurplusLeft {
                    // Written anew, it has nothing behind its last entry.
                    self.dirty.mark(self.files[self.top].header.nr_pages() - 1);
                }
                let skips = matches!(fault, Fault::CutEarly | Fault::VacatedUncommitted);
                let wait = if skips {
                    OpWait::Ready
                } else {
                    OpWait::NextCommit
                };
                match r.is_growth {
                    true => Some((Stage::Zero, wait)),
                    false => Some((Stage::CleanLast, wait)),
                }
            }
            Stage::CleanLast => Some((Stage::FreezeLast, OpWait::Clean)),
            Stage::Zero => {
                let header = self.files[self.top].header;
                let first = header.nr_pages() as usize * PAGE_SECTORS;
                let end = r.slots.end as usize * self.cfg.cluster_sectors();
                let nr = match fault {
                    Fault::BatNotZeroed => 0,
                    _ => end - first,
                };
                let op = self.disk().write(first, &vec![0; nr]);
                Some((Stage::SyncZeros, OpWait::Io(top, op)))
            }
            Stage::SyncZeros => Some((Stage::FreezeLast, self.sync_of(top))),
            Stage::FreezeLast => {
                self.is_frozen = true;
                Some((Stage::Cut, OpWait::Quiet))
            }
            Stage::Cut => {
                match r.grown {
                    Some(header) => {
                        self.files[self.top].header = header;
                        self.dirty
                            .extend(header.nr_pages())
                            .map_err(|e| format!("{e:?}"))?;
                        self.dirty.mark(0);
                    }
                    None => self.cut(),
                }
                self.is_frozen = false;
                Some((Stage::End, OpWait::NextCommit))
            }
            Stage::End => None,
        };
        Ok(next.map(|(stage, wait)| (Kind::Relocate(Relocate { stage, ..r }), wait)))
    }

    /// Index slots that a cluster has room for.
    fn slots_of_cluster(&self) -> u32 {
        (self.cfg.cluster_sectors() / PAGE_SECTORS) as u32 * PAGE_SLOTS
    }

    /// Keeps slots below `floor` from being handed out, and makes the file reach up to there.
    fn reserve(&mut self, floor: u32) {
        self.alloc.set_floor(ImageCluster(floor));
        if self.alloc.limit() < floor {
            let len = floor as usize * self.cfg.cluster_sectors();
            let op = self.disk().set_len(len);
            self.disk().complete(op);
            self.alloc.expand(&mut Room::new(floor).expect("memory"));
            self.alloc.grown(floor);
        }
    }

    /// Closes a cluster in one of the slots to be left.
    fn choose_in_slots(&mut self, r: &Relocate, rng: &mut Rng) -> (Stage, OpWait) {
        let top = self.top_level();
        let is_there = |c: &usize| match self.map[*c].place() {
            Place::Slot { level, at } => level == top && r.slots.contains(&at.0),
            Place::Hole => false,
        };
        let left: Vec<_> = (0..self.map.len()).filter(is_there).collect();
        if left.is_empty() {
            return (Stage::Commit, OpWait::Ready);
        }
        let cluster = left[rng.pick(left.len())];
        match self.close(cluster) {
            Some(from) => (Stage::TakeSlot { cluster, from }, OpWait::Epoch(cluster)),
            None => (Stage::Choose, OpWait::Ready),
        }
    }

    fn relocate_slot(
        &mut self,
        r: &Relocate,
        cluster: usize,
        from: ImageCluster,
    ) -> (Stage, OpWait) {
        let taken = match r.is_growth {
            true => self.alloc.take(),
            false => self.alloc.take_below(from).map_or(Take::Full, Take::Slot),
        };
        match taken {
            Take::Slot(to) => {
                let level = level_of(self.top);
                let wait = self.copy_cluster(Place::Slot { level, at: from }, to);
                (Stage::Publish { cluster, to }, wait)
            }
            Take::NeedSpace => (Stage::TakeSlot { cluster, from }, OpWait::Space),
            // Others have taken the free slots.
            Take::Full => {
                self.unlock(cluster, None);
                (Stage::Commit, OpWait::Ready)
            }
        }
    }

    /// Cuts the file behind the last slot in use.
    fn cut(&mut self) {
        let end = match self.cfg.fault {
            // What the map says, durable or not.
            Fault::CutEarly => {
                let last = self.slots_in(self.top).into_iter().flatten().max();
                last.map_or(self.files[self.top].header.first_data.0, |at| at.0 + 1)
            }
            _ => self.alloc.cut(),
        };
        let op = {
            let nr = self.cfg.cluster_sectors();
            self.disk().set_len(end as usize * nr)
        };
        self.disk().complete(op);
        if self.cfg.fault == Fault::CutEarly {
            self.alloc.cut();
        }
    }
}

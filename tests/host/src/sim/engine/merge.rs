// SPDX-License-Identifier: GPL-2.0
//! A merge of the top, the source, into the file below it, the destination: from its start to its
//! end, or until it is given up.

use super::ops::{Kind, Next, OpWait, Progress, Retired, Where};
use super::{level_of, Engine};
use crate::rng::Rng;
use crate::sim::Fault;
use ploop_pure::alloc::Take;
use ploop_pure::index::DirtyPages;
use ploop_pure::map::Place;
use ploop_pure::units::ImageCluster;

/// What is done next.
#[derive(Debug)]
enum Stage {
    Mark,
    SyncMark,
    Commit,
    Freeze,
    Switch,
    /// The source's last pages are being committed.
    Finish {
        retired: Retired,
        ok: Option<bool>,
    },
    /// The next cluster that the source has.
    Choose,
    /// A cluster is locked and needs a slot.
    TakeSlot {
        cluster: usize,
        from: Place,
    },
    Copy {
        cluster: usize,
        from: Place,
        to: ImageCluster,
    },
    Publish {
        cluster: usize,
        to: ImageCluster,
    },
    FreezeLast,
    TakeOut,
    SyncOut,
    Gone,
    /// It is given up: what was dropped from the source is made durable.
    UndoFreeze,
    UndoCommit,
    UndoSwitch,
    UndoFinish {
        retired: Retired,
        ok: Option<bool>,
    },
    UndoUnmark,
    UndoSync,
    Undone,
}

/// A merge that runs.
#[derive(Debug)]
pub(super) struct Merge {
    stage: Stage,
    /// It is given up before some cluster.
    gives_up_percent: u64,
}

impl Merge {
    pub(super) fn start(rng: &mut Rng) -> Self {
        Self {
            stage: Stage::Mark,
            gives_up_percent: if rng.chance(25) { 15 } else { 0 },
        }
    }
}

impl Engine<'_> {
    /// The next step, after the last one succeeded.
    pub(super) fn merge(&mut self, m: Merge, rng: &mut Rng) -> Result<Next, String> {
        let below = Where::Chain(self.top.saturating_sub(1));
        let next = match m.stage {
            Stage::Mark => {
                self.sealed = None;
                Some((Stage::SyncMark, self.write_opened(below)))
            }
            Stage::SyncMark if self.cfg.fault == Fault::ChainMarkUnsynced => {
                Some((Stage::Commit, OpWait::Ready))
            }
            Stage::SyncMark => Some((Stage::Commit, self.sync_of(below))),
            Stage::Commit => Some((Stage::Freeze, OpWait::NextCommit)),
            Stage::Freeze => {
                self.is_frozen = true;
                Some((Stage::Switch, OpWait::Quiet))
            }
            Stage::Switch => {
                let retired = self.switch_to_destination();
                let ok = None;
                Some((Stage::Finish { retired, ok }, OpWait::Ready))
            }
            Stage::Finish { mut retired, ok } => match self.finish_retired(&mut retired, ok) {
                Progress::Wait(wait) => {
                    let ok = Some(true);
                    Some((Stage::Finish { retired, ok }, wait))
                }
                Progress::Done(_) => {
                    self.open_gate();
                    Some((Stage::Choose, OpWait::Ready))
                }
            },
            Stage::Choose if rng.chance(m.gives_up_percent) => {
                Some((Stage::UndoFreeze, OpWait::NextCommit))
            }
            Stage::Choose => Some(self.choose_in_source(rng)),
            Stage::TakeSlot { cluster, from } => Some(self.merge_slot(cluster, from)),
            Stage::Copy { cluster, from, to } => {
                let wait = self.copy_cluster(from, to);
                Some((Stage::Publish { cluster, to }, wait))
            }
            Stage::Publish { cluster, to } => {
                self.publish_copy(cluster, to);
                Some((Stage::Choose, OpWait::Ready))
            }
            Stage::FreezeLast => {
                self.is_frozen = true;
                Some((Stage::TakeOut, OpWait::Quiet))
            }
            Stage::TakeOut => {
                self.outside = self.files.pop();
                self.is_frozen = false;
                Some((Stage::SyncOut, self.write_closed(Where::Outside)))
            }
            Stage::SyncOut => Some((Stage::Gone, self.sync_of(Where::Outside))),
            Stage::Gone => {
                self.outside = None;
                None
            }
            Stage::UndoFreeze => {
                self.is_frozen = true;
                Some((Stage::UndoCommit, OpWait::Quiet))
            }
            Stage::UndoCommit if self.cfg.fault == Fault::UndoneEarly => {
                Some((Stage::UndoSwitch, OpWait::Ready))
            }
            // Slots of the source are free when their drops are durable, not before.
            Stage::UndoCommit => Some((Stage::UndoSwitch, OpWait::NextCommit)),
            Stage::UndoSwitch if !self.is_quiet() => Some((Stage::UndoSwitch, OpWait::Quiet)),
            Stage::UndoSwitch => {
                let retired = self.switch_to_source();
                let ok = None;
                Some((Stage::UndoFinish { retired, ok }, OpWait::Ready))
            }
            Stage::UndoFinish { mut retired, ok } => match self.finish_retired(&mut retired, ok) {
                Progress::Wait(wait) => {
                    let ok = Some(true);
                    Some((Stage::UndoFinish { retired, ok }, wait))
                }
                Progress::Done(_) => {
                    self.cut_retired(&mut retired);
                    Some((Stage::UndoUnmark, self.sync_of(below)))
                }
            },
            Stage::UndoUnmark => Some((Stage::UndoSync, self.write_closed(below))),
            Stage::UndoSync => Some((Stage::Undone, self.sync_of(below))),
            Stage::Undone => {
                self.open_gate();
                None
            }
        };
        Ok(next.map(|(stage, wait)| (Kind::Merge(Merge { stage, ..m }), wait)))
    }

    /// Makes the destination the top.
    fn switch_to_destination(&mut self) -> Retired {
        let dest = &mut self.files[self.top - 1];
        let places = dest.places.clone();
        let alloc = Self::alloc_of(self.cfg, dest, &places);
        let retired = self.retire(alloc);
        let nr_pages = self.files[self.top - 1].header.nr_pages();
        self.dirty = DirtyPages::new(nr_pages).expect("memory");
        self.top -= 1;
        self.may_clean = true;
        self.gate = true;
        self.is_frozen = false;
        retired
    }

    /// Makes the source the top again.
    fn switch_to_source(&mut self) -> Retired {
        self.files[self.top].places = self.slots_in(self.top);
        let places = self.slots_in(self.top + 1);
        let source = &mut self.files[self.top + 1];
        let alloc = Self::alloc_of(self.cfg, source, &places);
        let retired = self.retire(alloc);
        self.top += 1;
        self.may_clean = true;
        self.gate = true;
        self.is_frozen = false;
        retired
    }

    /// Locks a cluster that the source still has, unless it is locked.
    fn choose_in_source(&mut self, rng: &mut Rng) -> (Stage, OpWait) {
        let source = level_of(self.top + 1);
        let is_there = |c: &usize| match self.map[*c].place() {
            Place::Slot { level, .. } => level == source,
            Place::Hole => false,
        };
        let left: Vec<_> = (0..self.map.len()).filter(is_there).collect();
        if left.is_empty() {
            let wait = match self.cfg.fault {
                Fault::MergeEndUncommitted => OpWait::Ready,
                _ => OpWait::NextCommit,
            };
            return (Stage::FreezeLast, wait);
        }
        let cluster = left[rng.pick(left.len())];
        let word = self.map[cluster];
        if word.is_locked() {
            return (Stage::Choose, OpWait::Ready);
        }
        self.map[cluster] = word.locked();
        let from = word.place();
        (Stage::TakeSlot { cluster, from }, OpWait::Ready)
    }

    fn merge_slot(&mut self, cluster: usize, from: Place) -> (Stage, OpWait) {
        if let Some(to) = self.hidden(cluster) {
            let op = self.zero_slot(to);
            let wait = OpWait::Io(Where::Chain(self.top), op);
            return (Stage::Copy { cluster, from, to }, wait);
        }
        match self.alloc.take() {
            Take::Slot(to) => (Stage::Copy { cluster, from, to }, OpWait::Ready),
            Take::NeedSpace | Take::Full => (Stage::TakeSlot { cluster, from }, OpWait::Space),
        }
    }
}

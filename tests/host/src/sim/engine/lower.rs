// SPDX-License-Identifier: GPL-2.0
//! A merge of two lower deltas, of which requests learn when it is done: the source keeps its
//! entries and hides the destination until it is taken out of the map.

use super::ops::{Kind, Next, OpWait, Progress, Retired, Where};
use super::{level_of, Engine};
use crate::rng::Rng;
use crate::sim::Fault;
use ploop_pure::alloc::{Room, Take};
use ploop_pure::map::Place;
use ploop_pure::units::ImageCluster;

/// What is done next.
#[derive(Debug)]
enum Stage {
    Mark,
    SyncMark,
    Begin,
    Choose,
    TakeSlot {
        cluster: usize,
    },
    /// The file is longer now.
    Grown {
        cluster: usize,
        to: u32,
    },
    Copy {
        cluster: usize,
        to: ImageCluster,
    },
    Publish {
        cluster: usize,
        to: ImageCluster,
    },
    /// The destination's index is being committed; then that is done.
    Commit {
        ok: Option<bool>,
        then: Box<Stage>,
    },
    Cut,
    Unmark,
    SyncUnmark,
    Freeze,
    TakeOut,
    Gone,
    GivenUp,
}

/// A merge that runs.
#[derive(Debug)]
pub(super) struct Lower {
    stage: Stage,
    /// The delta below the source.
    dest: usize,
    /// What the destination has, committed or not.
    own: Option<Retired>,
    /// Clusters that were copied.
    done: Vec<bool>,
    /// It is given up before some cluster.
    gives_up_percent: u64,
}

impl Lower {
    /// Of the delta `source`, which has one below and is not the top.
    pub(super) fn start(source: usize, rng: &mut Rng) -> Self {
        Self {
            stage: Stage::Mark,
            dest: source - 1,
            own: None,
            done: Vec::new(),
            gives_up_percent: if rng.chance(25) { 15 } else { 0 },
        }
    }
}

impl Engine<'_> {
    /// The next step, after the last one succeeded.
    pub(super) fn lower(&mut self, mut m: Lower, rng: &mut Rng) -> Next {
        let dest = Where::Chain(m.dest);
        let stage = std::mem::replace(&mut m.stage, Stage::Mark);
        let (stage, wait) = match stage {
            Stage::Mark => (Stage::SyncMark, self.write_opened(dest)),
            Stage::SyncMark if self.cfg.fault == Fault::ChainMarkUnsynced => {
                (Stage::Begin, OpWait::Ready)
            }
            Stage::SyncMark => (Stage::Begin, self.sync_of(dest)),
            Stage::Begin => {
                let file = &mut self.files[m.dest];
                let places = file.places.clone();
                m.done = vec![false; places.len()];
                m.own = Some(Retired::of(m.dest, Self::alloc_of(self.cfg, file, &places)));
                (Stage::Choose, OpWait::Ready)
            }
            Stage::Choose if rng.chance(m.gives_up_percent) => {
                (self.lower_commit(&mut m, Stage::GivenUp), OpWait::Ready)
            }
            Stage::Choose if rng.chance(10) => {
                (self.lower_commit(&mut m, Stage::Choose), OpWait::Ready)
            }
            Stage::Choose => {
                let source = &self.files[m.dest + 1].places;
                let left = (0..source.len()).find(|c| source[*c].is_some() && !m.done[*c]);
                match left {
                    Some(cluster) => (Stage::TakeSlot { cluster }, OpWait::Ready),
                    None if self.cfg.fault == Fault::LowerUncommitted => {
                        (Stage::Freeze, OpWait::Ready)
                    }
                    None => (self.lower_commit(&mut m, Stage::Cut), OpWait::Ready),
                }
            }
            Stage::TakeSlot { cluster } => self.lower_slot(&mut m, cluster),
            Stage::Grown { cluster, to } => {
                if let Some(own) = &mut m.own {
                    own.alloc.expand(&mut Room::new(to).expect("memory"));
                    own.alloc.grown(to);
                }
                (Stage::TakeSlot { cluster }, OpWait::Ready)
            }
            Stage::Copy { cluster, to } => {
                let level = level_of(m.dest + 1);
                let at = self.files[m.dest + 1].places[cluster];
                let from = at.map_or(Place::Hole, |at| Place::Slot { level, at });
                let wait = self.copy_cluster_to(m.dest, from, to);
                (Stage::Publish { cluster, to }, wait)
            }
            Stage::Publish { cluster, to } => {
                m.done[cluster] = true;
                self.files[m.dest].places[cluster] = Some(to);
                (Stage::Choose, OpWait::Ready)
            }
            Stage::Commit { ok, then } => match m.own.as_mut() {
                Some(own) => match self.finish_retired(own, ok) {
                    Progress::Wait(wait) => (
                        Stage::Commit {
                            ok: Some(true),
                            then,
                        },
                        wait,
                    ),
                    Progress::Done(_) => (*then, OpWait::Ready),
                },
                None => (*then, OpWait::Ready),
            },
            Stage::Cut | Stage::GivenUp => {
                let gives_up = matches!(stage, Stage::GivenUp);
                if let Some(own) = &mut m.own {
                    self.cut_retired(own);
                }
                // Afterwards nothing is left to be done if it is given up.
                m.gives_up_percent = if gives_up { 100 } else { 0 };
                (Stage::Unmark, self.sync_of(dest))
            }
            Stage::Unmark => (Stage::SyncUnmark, self.write_closed(dest)),
            Stage::SyncUnmark => (Stage::Freeze, self.sync_of(dest)),
            Stage::Freeze if m.gives_up_percent == 100 => return None,
            Stage::Freeze => {
                self.is_frozen = true;
                (Stage::TakeOut, OpWait::Quiet)
            }
            Stage::TakeOut => {
                self.take_level_out(m.dest + 1);
                self.is_frozen = false;
                (Stage::Gone, OpWait::Ready)
            }
            Stage::Gone => {
                self.taken_out = None;
                return None;
            }
        };
        Some((Kind::Lower(Lower { stage, ..m }), wait))
    }

    /// Begins to make what the destination has durable.
    fn lower_commit(&mut self, m: &mut Lower, then: Stage) -> Stage {
        let pages = 0..self.files[m.dest].header.nr_pages();
        let copies = self.pages_of(m.dest, pages);
        if let Some(own) = &mut m.own {
            own.restart(copies);
        }
        let then = Box::new(then);
        Stage::Commit { ok: None, then }
    }

    /// A slot of the destination that reads as zeros: the one that the source hides, or a new one.
    fn lower_slot(&mut self, m: &mut Lower, cluster: usize) -> (Stage, OpWait) {
        let (nr, dest) = (self.cfg.cluster_sectors(), Where::Chain(m.dest));
        if let Some(to) = self.files[m.dest].places[cluster] {
            let zeros = vec![0; nr];
            let op = self.disk_at(dest).write(to.0 as usize * nr, &zeros);
            return (Stage::Copy { cluster, to }, OpWait::Io(dest, op));
        }
        let Some(own) = &mut m.own else {
            return (Stage::GivenUp, OpWait::Ready);
        };
        match own.alloc.take() {
            Take::Slot(to) => (Stage::Copy { cluster, to }, OpWait::Ready),
            Take::NeedSpace | Take::Full => match own.alloc.target_min() {
                Some(to) => {
                    let op = self.disk_at(dest).set_len(to as usize * nr);
                    (Stage::Grown { cluster, to }, OpWait::Io(dest, op))
                }
                None => (self.lower_commit(m, Stage::GivenUp), OpWait::Ready),
            },
        }
    }

    /// Takes the file `n` out of the chain; what it had is in the one below.
    fn take_level_out(&mut self, n: usize) {
        let level = level_of(n);
        for (cluster, word) in self.map.iter_mut().enumerate() {
            let Place::Slot { level: l, at } = word.place() else {
                continue;
            };
            let below = level_of(n - 1);
            let place = match l.cmp(&level) {
                std::cmp::Ordering::Less => continue,
                std::cmp::Ordering::Equal => match self.files[n - 1].places[cluster] {
                    Some(at) => Place::Slot { level: below, at },
                    None => Place::Hole,
                },
                std::cmp::Ordering::Greater => {
                    let level = ploop_pure::units::Level(l.0 - 1);
                    Place::Slot { level, at }
                }
            };
            *word = word.with_place(place);
        }
        self.taken_out = Some((n, self.files.remove(n)));
        self.top -= 1;
    }
}

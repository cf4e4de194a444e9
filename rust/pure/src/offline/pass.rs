// SPDX-License-Identifier: GPL-2.0
//! A walk over the clusters of the source that copies some of them, in batches: copies, sync,
//! index pages, sync. So no entry is durable before its data is (ordering rule 1), and none of the
//! slots that a batch released is free before its entries are durable (rule 4).

use super::{Action, Event, Found};
use crate::index::BATCH_MAX;
use crate::layout::ploop1::locate;
use crate::units::{Cluster, ImageCluster};

/// Most clusters copied before their entries are written. A crash costs their copying again.
const CLUSTERS_MAX: u32 = 1024;

/// What is to be done with a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// Nothing.
    Skip,
    /// Its entry becomes a hole if its slot reads as zeros.
    Test,
    /// It is copied over what the destination has of it.
    Overwrite(ImageCluster),
    /// It is copied to a slot that no entry names, and its entry then names that.
    Place(ImageCluster),
    /// There is no way on.
    Give,
}

/// How a pass goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// By this action.
    Act(Action),
    /// It has ended, and all it did is durable.
    Over {
        /// It has seen every cluster.
        is_all: bool,
    },
    /// An action failed after which nothing more may be done.
    Failed,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Finding,
    Testing(Found),
    Copying {
        cluster: Cluster,
        to: Option<ImageCluster>,
    },
    Publishing {
        cluster: Cluster,
    },
    SyncingData,
    WritingIndex,
    SyncingIndex,
}

/// Which of its syncs a mutant leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lacks {
    Nothing,
    SyncOfData,
    SyncOfIndex,
}

/// The walk.
#[derive(Debug)]
pub(super) struct Pass {
    state: State,
    lacks: Lacks,
    /// The next cluster to look at, `None` after the last one.
    cursor: Option<Cluster>,
    /// Clusters copied or made holes since the last commit.
    nr: u32,
    /// Index pages changed since then, and the last of them: clusters come in ascending order.
    nr_pages: usize,
    page: Option<u32>,
    is_stopping: bool,
}

impl Pass {
    pub(super) fn new(lacks: Lacks) -> Self {
        Self {
            state: State::Finding,
            lacks,
            cursor: Some(Cluster(0)),
            nr: 0,
            nr_pages: 0,
            page: None,
            is_stopping: false,
        }
    }

    pub(super) fn stop(&mut self) {
        self.is_stopping = true;
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    /// The first step.
    pub(super) fn begin(&mut self) -> Step {
        self.find()
    }

    /// The step that follows `event`.
    pub(super) fn next(&mut self, event: Event, choose: impl FnOnce(Found) -> Choice) -> Step {
        match (self.state, event) {
            (State::Finding, Event::Found(found)) => self.chosen(found, choose(found)),
            (State::Finding, Event::End) => {
                self.cursor = None;
                self.commit()
            }
            (State::Testing(found), Event::Zeros) => self.publish(found.cluster, None),
            (State::Testing(found), Event::Data) => self.skip(found.cluster),
            (
                State::Copying {
                    cluster,
                    to: Some(at),
                },
                Event::Ok,
            ) => self.publish(cluster, Some(at)),
            (State::Copying { cluster, to: None }, Event::Ok) => {
                self.nr += 1;
                self.skip(cluster)
            }
            // Nothing names the copy, or what names it is hidden by the source: end as if asked.
            (State::Copying { .. }, Event::Failed) => {
                self.is_stopping = true;
                self.commit()
            }
            (State::Publishing { cluster }, Event::Ok) => {
                self.note(cluster);
                self.skip(cluster)
            }
            (State::SyncingData, Event::Ok) if self.nr_pages > 0 => self.write_index(),
            (State::SyncingData, Event::Ok) => self.committed(),
            (State::WritingIndex, Event::Ok) if self.lacks == Lacks::SyncOfIndex => {
                self.committed()
            }
            (State::WritingIndex, Event::Ok) => {
                self.state = State::SyncingIndex;
                Step::Act(Action::Sync)
            }
            (State::SyncingIndex, Event::Ok) => self.committed(),
            (
                State::Finding
                | State::Testing(_)
                | State::Copying { .. }
                | State::Publishing { .. }
                | State::SyncingData
                | State::WritingIndex
                | State::SyncingIndex,
                Event::Ok
                | Event::Found(_)
                | Event::End
                | Event::Zeros
                | Event::Data
                | Event::Failed,
            ) => Step::Failed,
        }
    }

    fn chosen(&mut self, found: Found, choice: Choice) -> Step {
        let (cluster, from) = (found.cluster, found.at);
        let (state, action) = match choice {
            Choice::Skip => return self.skip(cluster),
            Choice::Give => return Step::Failed,
            Choice::Test => (State::Testing(found), Action::Test { at: from }),
            Choice::Overwrite(to) => (
                State::Copying { cluster, to: None },
                Action::Copy { from, to },
            ),
            Choice::Place(to) => (
                State::Copying {
                    cluster,
                    to: Some(to),
                },
                Action::Copy { from, to },
            ),
        };
        self.state = state;
        Step::Act(action)
    }

    fn publish(&mut self, cluster: Cluster, at: Option<ImageCluster>) -> Step {
        self.state = State::Publishing { cluster };
        Step::Act(Action::Publish { cluster, at })
    }

    fn note(&mut self, cluster: Cluster) {
        self.nr += 1;
        let (page, _) = locate(cluster);
        if self.page.replace(page) != Some(page) {
            self.nr_pages += 1;
        }
    }

    /// Goes on behind `cluster`.
    fn skip(&mut self, cluster: Cluster) -> Step {
        self.cursor = cluster.0.checked_add(1).map(Cluster);
        if self.is_stopping || self.nr >= CLUSTERS_MAX || self.nr_pages >= BATCH_MAX {
            self.commit()
        } else {
            self.find()
        }
    }

    fn find(&mut self) -> Step {
        match self.cursor {
            Some(from) => {
                self.state = State::Finding;
                Step::Act(Action::Find { from })
            }
            None => self.commit(),
        }
    }

    fn commit(&mut self) -> Step {
        if self.nr == 0 {
            return self.committed();
        }
        if self.lacks == Lacks::SyncOfData && self.nr_pages > 0 {
            return self.write_index();
        }
        self.state = State::SyncingData;
        Step::Act(Action::Sync)
    }

    fn write_index(&mut self) -> Step {
        self.state = State::WritingIndex;
        Step::Act(Action::WriteIndex)
    }

    fn committed(&mut self) -> Step {
        (self.nr, self.nr_pages, self.page) = (0, 0, None);
        if self.is_stopping || self.cursor.is_none() {
            Step::Over {
                is_all: self.cursor.is_none(),
            }
        } else {
            self.find()
        }
    }
}

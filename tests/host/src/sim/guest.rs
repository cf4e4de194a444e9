// SPDX-License-Identifier: GPL-2.0
//! What the guest knows: the versions of each sector and which of them it was promised to keep.

use super::disk::Stamp;
use std::collections::BTreeMap;

/// A slot: number of the image file, slot in it.
pub type Slot = (u32, u32);

/// A range of sectors of one cluster. Clusters are numbered as the workload does, from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The cluster.
    pub cluster: usize,
    /// First sector in it.
    pub first: usize,
    /// Number of sectors.
    pub nr: usize,
}

impl Range {
    /// Whether the two have a sector in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.cluster == other.cluster
            && self.first < other.first + other.nr
            && other.first < self.first + self.nr
    }

    /// The sectors, in the cluster.
    pub fn sectors(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.nr
    }
}

#[derive(Debug, Clone)]
struct History {
    /// In the order of issue.
    versions: Vec<Stamp>,
    /// Those in flight.
    in_flight: Vec<usize>,
    /// The oldest of those in flight, or of what was in flight together with any of them: each may
    /// be what is left in the end.
    racing: usize,
    /// Last one that completed with success.
    completed: usize,
    /// Oldest one that a power cut may leave.
    floor: usize,
}

/// Versions that a FLUSH makes durable.
#[derive(Debug, Clone)]
pub struct Promise(Vec<usize>);

/// All sectors the workload may touch.
#[derive(Debug, Clone)]
pub struct Guest {
    cluster_sectors: usize,
    sectors: Vec<History>,
    /// For each slot that was ever given to a cluster: the oldest version of each sector that an
    /// entry which names it may lead to.
    mapped: BTreeMap<(usize, Slot), Vec<usize>>,
}

impl Guest {
    /// Clusters of `cluster_sectors` that read as `read` says.
    pub fn new(cluster_sectors: usize, read: &[Stamp]) -> Self {
        let sectors = read.iter().map(|stamp| History {
            versions: vec![*stamp],
            in_flight: Vec::new(),
            racing: 0,
            completed: 0,
            floor: 0,
        });
        Self {
            cluster_sectors,
            sectors: sectors.collect(),
            mapped: BTreeMap::new(),
        }
    }

    fn of(&mut self, range: Range) -> &mut [History] {
        let first = range.cluster * self.cluster_sectors + range.first;
        &mut self.sectors[first..first + range.nr]
    }

    /// A write begins, of a stamp that no write in flight there has.
    pub fn issue(&mut self, range: Range, stamp: Stamp) {
        for h in self.of(range) {
            let at = h.versions.len();
            if h.in_flight.is_empty() {
                h.racing = at;
            }
            h.in_flight.push(at);
            h.versions.push(stamp);
        }
    }

    /// The guest is told that a write has succeeded, with FUA or without.
    pub fn complete(&mut self, range: Range, stamp: Stamp, fua: bool) {
        self.end(range, stamp);
        for h in self.of(range) {
            h.completed = h.completed.max(h.racing);
            if fua {
                h.floor = h.floor.max(h.racing);
            }
        }
    }

    /// A write has ended, with success or without.
    pub fn end(&mut self, range: Range, stamp: Stamp) {
        for h in self.of(range) {
            let History {
                in_flight,
                versions,
                ..
            } = h;
            in_flight.retain(|at| versions[*at] != stamp);
        }
    }

    /// What a read of `range` that begins now has to find, or anything newer.
    pub fn read_begins(&mut self, range: Range) -> Vec<usize> {
        self.of(range).iter().map(|h| h.completed).collect()
    }

    /// Judges what that read has found.
    pub fn read_done(
        &mut self,
        range: Range,
        oldest: &[usize],
        read: &[Stamp],
    ) -> Result<(), String> {
        for ((h, oldest), have) in self.of(range).iter().zip(oldest).zip(read) {
            if h.versions.iter().rposition(|v| v == have) < Some(*oldest) {
                return Err(format!(
                    "a read of {range:?} finds {have}, which is not there"
                ));
            }
        }
        Ok(())
    }

    /// A cluster has this slot now: what completed is in it, and the write of `own`.
    pub fn mapped(&mut self, cluster: usize, slot: Slot, own: Option<Range>) {
        let first = cluster * self.cluster_sectors;
        let oldest = self.sectors[first..first + self.cluster_sectors].iter();
        let mut oldest: Vec<usize> = oldest.map(|h| h.completed).collect();
        if let Some(range) = own {
            for s in range.sectors() {
                oldest[s] = self.sectors[first + s].racing;
            }
        }
        self.mapped.insert((cluster, slot), oldest);
    }

    /// What a FLUSH that begins now has to make durable.
    pub fn flush_begins(&self) -> Promise {
        Promise(self.sectors.iter().map(|h| h.completed).collect())
    }

    /// That FLUSH has succeeded.
    pub fn flush_done(&mut self, promise: &Promise) {
        for (h, version) in self.sectors.iter_mut().zip(&promise.0) {
            h.floor = h.floor.max(*version);
        }
    }

    /// Everything that completed is promised, as after a clean close.
    pub fn promise_all(&mut self) {
        let all = self.flush_begins();
        self.flush_done(&all);
    }

    /// Judges what is read of `cluster` after a power cut: each sector one of its versions, none
    /// older than promised; and if the cluster is mapped, none older than it was when it was given
    /// this slot (ordering rules 1, 5, 8 and 10).
    pub fn judge(
        &self,
        cluster: usize,
        slot: Option<Slot>,
        read: impl Fn(usize) -> Stamp,
    ) -> Result<(), String> {
        let base = cluster * self.cluster_sectors;
        let oldest = slot.and_then(|slot| self.mapped.get(&(cluster, slot)));
        for s in 0..self.cluster_sectors {
            let (h, have) = (&self.sectors[base + s], read(s));
            let Some(at) = h.versions.iter().rposition(|v| *v == have) else {
                return Err(format!(
                    "cluster {cluster} sector {s} reads {have}, which was never written there"
                ));
            };
            if at < h.floor {
                return Err(format!(
                    "cluster {cluster} sector {s} reads version {at}, version {} was acknowledged as durable",
                    h.floor
                ));
            }
            if oldest.is_some_and(|oldest| at < oldest[s]) {
                return Err(format!(
                    "cluster {cluster} is mapped durably, but not the data written before that (sector {s})"
                ));
            }
        }
        Ok(())
    }
}

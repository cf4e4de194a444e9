// SPDX-License-Identifier: GPL-2.0
//! What the guest knows: the versions of each sector and which of them it was promised to keep.

use super::disk::Stamp;

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
    /// In the order of issue. Two writes of one sector are never in flight together.
    versions: Vec<Stamp>,
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
    /// For each cluster the write that allocated it, and its version.
    allocated_by: Vec<Option<(Range, Stamp)>>,
}

impl Guest {
    /// `nr_clusters` clusters that read as `read` says.
    pub fn new(nr_clusters: usize, cluster_sectors: usize, read: &[Stamp]) -> Self {
        let sectors = read.iter().map(|stamp| History {
            versions: vec![*stamp],
            completed: 0,
            floor: 0,
        });
        Self {
            cluster_sectors,
            sectors: sectors.collect(),
            allocated_by: vec![None; nr_clusters],
        }
    }

    fn of(&mut self, range: Range) -> &mut [History] {
        let first = range.cluster * self.cluster_sectors + range.first;
        &mut self.sectors[first..first + range.nr]
    }

    /// A write begins.
    pub fn issue(&mut self, range: Range, stamp: Stamp) {
        for h in self.of(range) {
            h.versions.push(stamp);
        }
    }

    /// The guest is told that a write has succeeded, with FUA or without.
    pub fn complete(&mut self, range: Range, stamp: Stamp, fua: bool) {
        for h in self.of(range) {
            if let Some(at) = h.versions.iter().position(|v| *v == stamp) {
                h.completed = at;
                if fua {
                    h.floor = at;
                }
            }
        }
    }

    /// A write has put its cluster into the map.
    pub fn allocated(&mut self, range: Range, stamp: Stamp) {
        self.allocated_by[range.cluster] = Some((range, stamp));
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
    /// older than promised; and if the cluster is mapped, at least the write that allocated it
    /// (ordering rule 1).
    pub fn judge(
        &self,
        cluster: usize,
        is_mapped: bool,
        read: impl Fn(usize) -> Stamp,
    ) -> Result<(), String> {
        let base = cluster * self.cluster_sectors;
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
        }
        let Some((range, stamp)) = self.allocated_by[cluster].filter(|_| is_mapped) else {
            return Ok(());
        };
        for s in range.sectors() {
            let (h, have) = (&self.sectors[base + s], read(s));
            let at = h.versions.iter().rposition(|v| *v == have);
            let first = h.versions.iter().position(|v| *v == stamp);
            if at < first {
                return Err(format!(
                    "cluster {cluster} is mapped durably, but not the data written before that (sector {s})"
                ));
            }
        }
        Ok(())
    }
}

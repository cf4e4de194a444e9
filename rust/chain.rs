// SPDX-License-Identifier: GPL-2.0
//! The deltas of a device by level, and the map from guest clusters to their slots.
//!
//! [`Delta`] joins a format with the io of its image file. [`Chain`] is what requests look up; it is
//! built when the device starts and never changes while requests run, but for the words of its
//! map. Knows nothing of requests and their order.
//!
//! Locks: none. Words of the map are written under the engine's lock and read without.

pub(crate) mod delta;

use crate::{
    format::Format,
    sys::{prelude::*, sparse::SparseWords},
};
use delta::Delta;
use ploop_pure::{
    map::{Place, Word},
    units::{Cluster, ClusterSize, ImageCluster, Level},
};

/// Where the requests of a running device go.
pub(crate) struct Chain {
    deltas: KVec<Arc<Delta>>,
    top: Level,
    cluster: ClusterSize,
    size_sectors: u64,
    /// `None` where the one delta is raw and maps every cluster to itself.
    map: Option<SparseWords>,
    /// One past the highest slot that an entry of the top names.
    end: u32,
}

impl Chain {
    /// Reads the indexes of the deltas, base first, into one map: higher levels hide lower ones.
    pub(crate) fn load(deltas: KVec<Arc<Delta>>, device: u32) -> Result<Self> {
        let last = deltas.last().ok_or(ENOENT)?;
        let top = Level(u8::try_from(deltas.len() - 1).map_err(|_| EINVAL)?);
        let (cluster, size_sectors) = (last.format().cluster(), last.format().size_sectors());
        let (map, end) = match last.format() {
            // Only the base can be raw, so it is alone.
            Format::Raw(_) => (None, 0),
            Format::Ploop1(format) => {
                let (map, end) = Self::read_maps(&deltas, format.header().nr_entries, device)?;
                (Some(map), end)
            }
        };
        Ok(Self {
            top,
            cluster,
            size_sectors,
            map,
            end,
            deltas,
        })
    }

    fn read_maps(
        deltas: &KVec<Arc<Delta>>,
        nr_clusters: u32,
        device: u32,
    ) -> Result<(SparseWords, u32)> {
        let len = u64::from(nr_clusters);
        // All of it, though only what is mapped takes memory: a write must not be what finds out.
        let need = SparseWords::directory_bytes(len) + len * WORD_BYTES;
        check_memory(need, device)?;
        let map = SparseWords::new(len)?;
        let mut end = 0;
        for (delta, level) in deltas.iter().zip(0u8..) {
            let level = Level(level);
            // A lower delta may have entries behind the end of its disk: of a disk that was larger
            // once, and not of this one. The top keeps its own, as its index is made from the map.
            let held = match usize::from(level.0) + 1 == deltas.len() {
                true => len,
                false => delta.format().nr_clusters_of_disk().min(len),
            };
            end = delta.scan(device, |cluster, at| {
                if u64::from(cluster.0) >= held {
                    return Ok(());
                }
                let place = Place::Slot { level, at };
                let word = map.get_or_alloc(cluster.0)?;
                word.store(Word::default().with_place(place).bits(), Relaxed);
                Ok(())
            })?;
        }
        Ok((map, end))
    }

    /// The top delta.
    pub(crate) fn top(&self) -> Option<&Delta> {
        self.deltas.last().map(|d| &**d)
    }

    /// The delta of a level.
    pub(crate) fn delta(&self, level: Level) -> Option<&Delta> {
        self.deltas.get(usize::from(level.0)).map(|d| &**d)
    }

    /// All deltas, base first.
    pub(crate) fn deltas(&self) -> impl Iterator<Item = &Delta> {
        self.deltas.iter().map(|d| &**d)
    }

    /// Level of the top delta.
    pub(crate) fn top_level(&self) -> Level {
        self.top
    }

    /// Cluster size of the device.
    pub(crate) fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// Size of the disk in sectors: the top's.
    pub(crate) fn size_sectors(&self) -> u64 {
        self.size_sectors
    }

    /// One past the highest slot in use when the chain was loaded.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Whether every cluster is mapped to itself, so that there is nothing to look up.
    pub(crate) fn is_identity(&self) -> bool {
        self.map.is_none()
    }

    /// Pages of the map that exist.
    pub(crate) fn nr_map_pages(&self) -> i64 {
        self.map.as_ref().map_or(0, SparseWords::nr_pages)
    }

    /// Where a cluster is. Takes no lock: the word is read at once.
    pub(crate) fn lookup(&self, cluster: Cluster) -> Place {
        match &self.map {
            // Acquire: what was published is read by way of the slot found here.
            Some(map) => map
                .get(cluster.0)
                .map_or(Place::Hole, |w| Word::from_bits(w.load(Acquire)).place()),
            None => Place::Slot {
                level: self.top,
                at: ImageCluster(cluster.0),
            },
        }
    }

    /// The word of a cluster, made if needed. Memory for it may be had by sleeping.
    pub(crate) fn word(&self, cluster: Cluster) -> Result<&Atomic<u64>> {
        self.map.as_ref().ok_or(EINVAL)?.get_or_alloc(cluster.0)
    }

    /// The slot of a cluster that the top's index has to name.
    pub(crate) fn slot_in_top(&self, cluster: Cluster) -> Option<ImageCluster> {
        match self.lookup(cluster) {
            Place::Slot { level, at } if level == self.top => Some(at),
            Place::Slot { .. } | Place::Hole => None,
        }
    }
}

/// Bytes of the map for each cluster.
const WORD_BYTES: u64 = size_of::<u64>() as u64;

/// ENOMEM if a device's tables of `need` bytes are over the limit, saying by how much.
fn check_memory(need: u64, device: u32) -> Result {
    let limit = match crate::sys::map_limit_mb() {
        0 => crate::sys::ram_bytes() / 16,
        mb => u64::from(mb) << 20,
    };
    if need <= limit {
        return Ok(());
    }
    pr_err!(
        "ploop{device}: the cluster map needs {} MiB, over the limit of {} MiB (parameter map_limit_mb)\n",
        need.div_ceil(1 << 20),
        limit >> 20
    );
    Err(ENOMEM)
}

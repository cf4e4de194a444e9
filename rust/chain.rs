// SPDX-License-Identifier: GPL-2.0
//! The deltas of a device by level, and the map from guest clusters to their slots.
//!
//! [`Delta`] joins a format with the io of its image file. [`Chain`] is what requests look up; it
//! never changes while requests run, but for the words of its map: what changes the deltas of a
//! running device makes a new chain, which may share the map. Knows nothing of requests and their order.
//!
//! Locks: none. Words of the map are written under the engine's lock and read without.

pub(crate) mod checkpoints;
pub(crate) mod delta;
mod next;

use crate::{
    format::Format,
    sys::{prelude::*, sparse::SparseWords},
};
use core::ops::Range;
use delta::Delta;
use ploop_pure::{
    map::{Place, Word},
    slots::SlotSet,
    units::{Cluster, ClusterSize, ImageCluster, Level},
};

/// Where the requests of a running device go.
///
/// The *top* is the delta that is written. While it is being merged into the one below, that one
/// is the top already, and the old top, the *source*, above it is only read.
pub(crate) struct Chain {
    deltas: KVec<Arc<Delta>>,
    top: Level,
    /// What the source of a merge hides of the top.
    merge: Option<Hidden>,
    cluster: ClusterSize,
    size_sectors: u64,
    /// `None` where the one delta is raw and maps every cluster to itself.
    map: Option<Arc<SparseWords>>,
}

/// The slots of a merge's destination that its source hides: a cluster's word, if the source or a
/// delta above it has it, does not tell them.
pub(crate) enum Hidden {
    /// Of a raw destination: every cluster below this one has its own slot.
    Raw(u32),
    /// Of a ploop1 destination: the words of its clusters when the merge began.
    Slots(SparseWords),
}

impl Hidden {
    fn get(&self, cluster: Cluster) -> Option<ImageCluster> {
        match self {
            Self::Raw(nr) => (cluster.0 < *nr).then_some(ImageCluster(cluster.0)),
            Self::Slots(words) => {
                let word = Word::from_bits(words.get(cluster.0)?.load(Relaxed));
                match word.place() {
                    Place::Slot { at, .. } => Some(at),
                    Place::Hole => None,
                }
            }
        }
    }
}

/// The slots of the top that entries name.
pub(crate) struct Used {
    /// The slots.
    pub(crate) slots: SlotSet,
    /// One past the highest.
    pub(crate) end: u32,
}

impl Used {
    /// None, in a raw delta.
    fn none() -> Self {
        Self {
            slots: SlotSet::default(),
            end: 0,
        }
    }

    /// What a delta's entries name; `sink` gets the clusters too, as that of [`Delta::scan`].
    pub(crate) fn scan(
        delta: &Delta,
        device: u32,
        mut sink: impl FnMut(Cluster, Range<u32>) -> Result,
    ) -> Result<Self> {
        let clusters = delta.format().cluster().ceil(delta.io().len()?);
        let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        let mut slots = SlotSet::new(clusters).map_err(crate::error::errno)?;
        let end = delta.scan(device, |cluster, run| {
            slots.insert_all(run.clone());
            sink(cluster, run)
        })?;
        Ok(Self { slots, end })
    }
}

impl Chain {
    /// Reads the indexes of the deltas, base first, into one map: higher levels hide lower ones.
    pub(crate) fn load(deltas: KVec<Arc<Delta>>, device: u32) -> Result<(Self, Used)> {
        let last = deltas.last().ok_or(ENOENT)?;
        let top = Level(u8::try_from(deltas.len() - 1).map_err(|_| EINVAL)?);
        let (cluster, size_sectors) = (last.format().cluster(), last.format().size_sectors());
        let (map, used) = match last.format() {
            // Only the base can be raw, so it is alone.
            Format::Raw(_) => (None, Used::none()),
            Format::Ploop1(format) => {
                let nr = format.header().nr_entries;
                let map = Self::new_map(nr, device)?;
                let mut used = Used::none();
                for (delta, level) in deltas.iter().zip(0u8..) {
                    let is_top = Level(level) == top;
                    used = Self::read_index(&map, delta, Level(level), is_top, device)?;
                }
                (Some(Arc::new(map, GFP_KERNEL)?), used)
            }
        };
        let chain = Self {
            top,
            merge: None,
            cluster,
            size_sectors,
            map,
            deltas,
        };
        Ok((chain, used))
    }

    /// An empty map for `nr` clusters; ENOMEM over the limit.
    pub(crate) fn new_map(nr: u32, device: u32) -> Result<SparseWords> {
        let len = u64::from(nr);
        // All of it, though only what is mapped takes memory: a write must not be what finds out.
        let need = SparseWords::directory_bytes(len) + len * WORD_BYTES;
        check_memory(need, device)?;
        SparseWords::new(len)
    }

    /// Puts what a delta holds into `map`, over what is there.
    fn read_index(
        map: &SparseWords,
        delta: &Delta,
        level: Level,
        is_top: bool,
        device: u32,
    ) -> Result<Used> {
        let sink = |cluster: Cluster, run: Range<u32>| {
            let words = run.map(|at| {
                let at = ImageCluster(at);
                Word::default().with_place(Place::Slot { level, at }).bits()
            });
            map.fill(cluster.0, words)
        };
        if is_top {
            Used::scan(delta, device, sink)
        } else {
            delta.scan(device, sink)?;
            Ok(Used::none())
        }
    }

    /// The first cluster from `from` on whose slot in the top is in `slots`.
    pub(crate) fn next_in_slots(&self, from: u32, slots: &Range<u32>) -> Option<Cluster> {
        let map = self.map.as_ref()?;
        let is_there = |bits: u64| match Word::from_bits(bits).place() {
            Place::Slot { level, at } => level == self.top && slots.contains(&at.0),
            Place::Hole => false,
        };
        map.find(from, is_there).map(Cluster)
    }

    /// Slots that the file of `level` has room for.
    pub(crate) fn slots_of(&self, level: Level) -> Result<u32> {
        let delta = self.delta(level).ok_or(ENOENT)?;
        let clusters = self.cluster.ceil(delta.io().len()?);
        Ok(u32::try_from(clusters).unwrap_or(u32::MAX))
    }

    /// The slots that the delta of `level` uses as far as the map knows: all, if none hides it. `nr` is
    /// [`Self::slots_of`] it.
    pub(crate) fn used_of(&self, level: Level, nr: u32) -> Result<Used> {
        let delta = self.delta(level).ok_or(ENOENT)?;
        let slots = SlotSet::new(nr).map_err(crate::error::errno)?;
        let first = match delta.format() {
            Format::Ploop1(f) => f.header().first_data.0,
            Format::Raw(_) => 0,
        };
        let mut used = Used { slots, end: first };
        if let Some(map) = &self.map {
            map.for_each(|_, bits| {
                if let Place::Slot { level: l, at } = Word::from_bits(bits.load(Relaxed)).place() {
                    if l == level {
                        used.slots.insert(at);
                        used.end = used.end.max(at.0.saturating_add(1));
                    }
                }
            });
        }
        Ok(used)
    }

    /// The first cluster from `from` on that is in the delta of `level`.
    pub(crate) fn next_in(&self, level: Level, from: u32) -> Option<Cluster> {
        let map = self.map.as_ref()?;
        let is_there = |bits: u64| match Word::from_bits(bits).place() {
            Place::Slot { level: l, .. } => l == level,
            Place::Hole => false,
        };
        map.find(from, is_there).map(Cluster)
    }

    fn copy_of_deltas(&self, room: usize) -> Result<KVec<Arc<Delta>>> {
        let mut deltas = KVec::with_capacity(self.deltas.len() + room, GFP_KERNEL)?;
        for delta in &self.deltas {
            deltas.push(delta.clone(), GFP_KERNEL)?;
        }
        Ok(deltas)
    }

    /// The top delta.
    pub(crate) fn top(&self) -> Option<&Delta> {
        self.delta(self.top)
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

    /// Whether nothing lies below or above the top.
    pub(crate) fn is_base(&self) -> bool {
        self.deltas.len() == 1
    }

    /// Cluster size of the device.
    pub(crate) fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// Size of the disk in sectors.
    pub(crate) fn size_sectors(&self) -> u64 {
        self.size_sectors
    }

    /// Whether every cluster is mapped to itself, so that there is nothing to look up.
    pub(crate) fn is_identity(&self) -> bool {
        self.map.is_none()
    }

    /// Pages of the map that exist.
    pub(crate) fn nr_map_pages(&self) -> i64 {
        self.map.as_ref().map_or(0, |map| map.nr_pages())
    }

    /// The word of a cluster as it is now. Takes no lock.
    pub(crate) fn word(&self, cluster: Cluster) -> Word {
        match &self.map {
            // Acquire: what was published is read by way of the slot found here.
            Some(map) => map
                .get(cluster.0)
                .map_or(Word::default(), |w| Word::from_bits(w.load(Acquire))),
            None => Word::default().with_place(Place::Slot {
                level: self.top,
                at: ImageCluster(cluster.0),
            }),
        }
    }

    /// Where a cluster is. Takes no lock: the word is read at once.
    pub(crate) fn lookup(&self, cluster: Cluster) -> Place {
        self.word(cluster).place()
    }

    /// Gets memory for new words ready. May wait for it.
    pub(crate) fn refill(&self) {
        if let Some(map) = &self.map {
            map.refill();
        }
    }

    /// The word of a cluster, to be changed, made if needed. Memory for it may be had by sleeping.
    pub(crate) fn word_mut(&self, cluster: Cluster) -> Result<&Atomic<u64>> {
        self.map.as_ref().ok_or(EINVAL)?.get_or_alloc(cluster.0)
    }

    /// The slot of a cluster that the top's index has to name.
    pub(crate) fn slot_in_top(&self, cluster: Cluster) -> Option<ImageCluster> {
        match self.lookup(cluster) {
            Place::Slot { level, at } if level == self.top => Some(at),
            Place::Slot { .. } | Place::Hole => self.hidden(cluster),
        }
    }

    /// The slot of the destination that the source of a merge hides.
    pub(crate) fn hidden(&self, cluster: Cluster) -> Option<ImageCluster> {
        self.merge.as_ref()?.get(cluster)
    }

    /// The source of a merge, and its level.
    pub(crate) fn source(&self) -> Option<(Level, &Delta)> {
        self.merge.as_ref()?;
        let level = Level(self.top.0.checked_add(1)?);
        Some((level, self.delta(level)?))
    }

    /// The slot of a cluster that the index of the delta of `level` has to name, if that delta
    /// hides all others.
    pub(crate) fn slot_of(&self, level: Level, cluster: Cluster) -> Option<ImageCluster> {
        match self.lookup(cluster) {
            Place::Slot { level: l, at } if l == level => Some(at),
            Place::Slot { .. } | Place::Hole => None,
        }
    }
}

/// Bytes of the map for each cluster.
const WORD_BYTES: u64 = size_of::<u64>() as u64;

/// ENOMEM if a device's tables of `need` bytes are over the limit, saying by how much.
pub(crate) fn check_memory(need: u64, device: u32) -> Result {
    let limit = match crate::sys::map_limit_mb() {
        0 => crate::sys::ram_bytes() / 16,
        mb => u64::from(mb) << 20,
    };
    if need <= limit {
        return Ok(());
    }
    pr_err!(
        "ploop{device}: the cluster map, the free slots or what notes writes need {} MiB, over the limit of {} MiB (parameter map_limit_mb)\n",
        need.div_ceil(1 << 20),
        limit >> 20
    );
    Err(ENOMEM)
}

/// ENOMEM for more bytes than the kernel gives at once; it warns of who asks.
pub(crate) fn check_at_once(bytes: u64) -> Result {
    match bytes <= i32::MAX as u64 {
        true => Ok(()),
        false => Err(ENOMEM),
    }
}

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

use crate::{
    format::Format,
    sys::{prelude::*, sparse::SparseWords},
};
use core::{cmp::Ordering, ops::Range};
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

    /// EBUSY while the top is being merged: what the source hides is known to this chain only.
    fn admit_change(&self) -> Result {
        match self.merge {
            Some(_) => Err(EBUSY),
            None => Ok(()),
        }
    }

    /// The same deltas with `new`, which holds no cluster, as the top of them.
    pub(crate) fn with_top(&self, new: Arc<Delta>, device: u32) -> Result<Self> {
        self.admit_change()?;
        let map = match &self.map {
            Some(map) => map.clone(),
            None => {
                let base = self.deltas.first().ok_or(ENOENT)?;
                let nr = u32::try_from(new.format().nr_clusters_of_disk()).map_err(|_| EFBIG)?;
                let map = Self::new_map(nr, device)?;
                Self::read_index(&map, base, Level(0), false, device)?;
                Arc::new(map, GFP_KERNEL)?
            }
        };
        let top = self.top.0.checked_add(1).map(Level).ok_or(EINVAL)?;
        let mut deltas = self.copy_of_deltas(1)?;
        deltas.push(new, GFP_KERNEL)?;
        Ok(Self {
            deltas,
            top,
            merge: None,
            map: Some(map),
            ..*self
        })
    }

    /// While the top is being merged into the delta below, of which `dest` is open for writing and
    /// `hidden` are the slots: that is the top, and the old top its source.
    pub(crate) fn merging(&self, dest: Arc<Delta>, hidden: Hidden) -> Result<Self> {
        self.admit_change()?;
        let top = self.top.0.checked_sub(1).map(Level).ok_or(ENOENT)?;
        let mut deltas = self.copy_of_deltas(0)?;
        *deltas.get_mut(usize::from(top.0)).ok_or(ENOENT)? = dest;
        Ok(Self {
            deltas,
            top,
            merge: Some(hidden),
            map: self.map.clone(),
            ..*self
        })
    }

    /// After the merge: without the source.
    pub(crate) fn merged(&self) -> Result<Self> {
        let mut deltas = self.copy_of_deltas(0)?;
        deltas.truncate(usize::from(self.top.0) + 1);
        let is_raw = matches!(self.top().ok_or(ENOENT)?.format(), Format::Raw(_));
        Ok(Self {
            deltas,
            merge: None,
            map: if is_raw { None } else { self.map.clone() },
            ..*self
        })
    }

    /// After a merge that was given up: the source is the top again.
    pub(crate) fn unmerged(&self) -> Result<Self> {
        let top = self.top.0.checked_add(1).map(Level).ok_or(EINVAL)?;
        Ok(Self {
            deltas: self.copy_of_deltas(0)?,
            top,
            merge: None,
            map: self.map.clone(),
            ..*self
        })
    }

    /// A chain of its own for a merge of two lower deltas, which no request uses: `source`, which
    /// is not written, is to go into `dest`. What `dest` uses is returned too.
    pub(crate) fn pair(dest: Arc<Delta>, source: Arc<Delta>, device: u32) -> Result<(Self, Used)> {
        let nr = |d: &Delta| u32::try_from(d.format().nr_clusters_of_disk()).map_err(|_| EFBIG);
        let map = Self::new_map(nr(&dest)?.max(nr(&source)?), device)?;
        let (hidden, used) = Self::hidden_by(&dest, device)?;
        Self::read_index(&map, &source, Level(1), false, device)?;
        let (cluster, size_sectors) = (dest.format().cluster(), dest.format().size_sectors());
        let mut deltas = KVec::with_capacity(2, GFP_KERNEL)?;
        deltas.push(dest, GFP_KERNEL)?;
        deltas.push(source, GFP_KERNEL)?;
        let chain = Self {
            deltas,
            top: Level(0),
            merge: Some(hidden),
            cluster,
            size_sectors,
            map: Some(Arc::new(map, GFP_KERNEL)?),
        };
        Ok((chain, used))
    }

    /// The slots of a merge's destination, and those that are in use.
    pub(crate) fn hidden_by(dest: &Delta, device: u32) -> Result<(Hidden, Used)> {
        match dest.format() {
            Format::Raw(raw) => Ok((Hidden::Raw(raw.nr_clusters()), Used::none())),
            Format::Ploop1(format) => {
                let words = Self::new_map(format.header().nr_entries, device)?;
                let used = Self::read_index(&words, dest, Level(0), true, device)?;
                Ok((Hidden::Slots(words), used))
            }
        }
    }

    /// After the merge of `level` into the one below, of which `dest` is the delta now: without
    /// `level`. The words still are those of this chain: see [`Self::take_level_out`].
    pub(crate) fn without(&self, level: Level, dest: Arc<Delta>) -> Result<Self> {
        self.admit_change()?;
        let below = level.0.checked_sub(1).ok_or(EINVAL)?;
        let top = self.top.0.checked_sub(1).ok_or(EINVAL)?;
        let mut deltas = self.copy_of_deltas(0)?;
        *deltas.get_mut(usize::from(below)).ok_or(ENOENT)? = dest;
        deltas.remove(usize::from(level.0)).map_err(|_| ENOENT)?;
        Ok(Self {
            deltas,
            top: Level(top),
            merge: None,
            map: self.map.clone(),
            ..*self
        })
    }

    /// Makes the words of a chain those of [`Self::without`]: `pair` knows where the clusters of
    /// `level` are now. With the queue frozen.
    pub(crate) fn take_level_out(&self, level: Level, pair: &Self) {
        let (Some(map), Some(below)) = (&self.map, level.0.checked_sub(1)) else {
            return;
        };
        map.for_each(|cluster, bits| {
            let word = Word::from_bits(bits.load(Relaxed));
            let Place::Slot { level: l, at } = word.place() else {
                return;
            };
            let slot = |level, at| Place::Slot {
                level: Level(level),
                at,
            };
            let place = match l.0.cmp(&level.0) {
                Ordering::Less => return,
                Ordering::Equal => match pair.lookup(Cluster(cluster)) {
                    Place::Slot { at, .. } => slot(below, at),
                    // Neither image has it.
                    Place::Hole => Place::Hole,
                },
                Ordering::Greater => slot(l.0 - 1, at),
            };
            bits.store(word.with_place(place).bits(), Release);
        });
    }

    /// The same chain with `top` as its top delta, which is the same image, larger. Words that get
    /// memory meanwhile are in this chain only: see [`Self::share_words`].
    pub(crate) fn grown(&self, top: Arc<Delta>, device: u32) -> Result<Self> {
        self.admit_change()?;
        let (size_sectors, mut deltas) = (top.format().size_sectors(), self.copy_of_deltas(0)?);
        let map = match (top.format(), &self.map) {
            (Format::Ploop1(format), Some(map)) => {
                let len = u64::from(format.header().nr_entries);
                check_memory(SparseWords::directory_bytes(len) + len * WORD_BYTES, device)?;
                Some(Arc::new(map.extended(len)?, GFP_KERNEL)?)
            }
            (Format::Ploop1(_), None) | (Format::Raw(_), _) => None,
        };
        *deltas.get_mut(usize::from(self.top.0)).ok_or(ENOENT)? = top;
        Ok(Self {
            deltas,
            merge: None,
            size_sectors,
            map,
            ..*self
        })
    }

    /// The same disk with other deltas below the top, read anew. Without the words of the top: see
    /// [`Self::take_top_words`].
    pub(crate) fn relinked(&self, deltas: KVec<Arc<Delta>>, device: u32) -> Result<Self> {
        self.admit_change()?;
        let nr = deltas.len().checked_sub(1).ok_or(ENOENT)?;
        let top = Level(u8::try_from(nr).map_err(|_| EINVAL)?);
        let map = match &self.map {
            Some(map) => {
                let nr = u32::try_from(map.len()).map_err(|_| EFBIG)?;
                let map = Self::new_map(nr, device)?;
                for (delta, level) in deltas.iter().zip(0u8..top.0) {
                    Self::read_index(&map, delta, Level(level), false, device)?;
                }
                Some(Arc::new(map, GFP_KERNEL)?)
            }
            None => None,
        };
        Ok(Self {
            deltas,
            top,
            merge: None,
            map,
            ..*self
        })
    }

    /// Takes over what the top of `old` holds, which is the same delta. With the queue frozen.
    pub(crate) fn take_top_words(&self, old: &Self) -> Result {
        let (Some(map), Some(from)) = (&self.map, &old.map) else {
            return Ok(());
        };
        let mut result = Ok(());
        from.for_each(|cluster, bits| {
            let word = Word::from_bits(bits.load(Relaxed));
            let Place::Slot { level, at } = word.place() else {
                return;
            };
            if level != old.top {
                return;
            }
            let level = self.top;
            match map.get_or_alloc(cluster) {
                Ok(to) => to.store(word.with_place(Place::Slot { level, at }).bits(), Relaxed),
                Err(e) => result = Err(e),
            }
        });
        result
    }

    /// A cluster that is in the delta of `level` is in another slot of it now. With the queue
    /// frozen.
    pub(crate) fn repoint(&self, level: Level, cluster: Cluster, to: ImageCluster) {
        let Some(bits) = self.map.as_ref().and_then(|map| map.get(cluster.0)) else {
            return;
        };
        let word = Word::from_bits(bits.load(Relaxed));
        match word.place() {
            Place::Slot { level: l, .. } if l == level => {
                let place = Place::Slot { level, at: to };
                bits.store(word.with_place(place).bits(), Release);
            }
            Place::Slot { .. } | Place::Hole => {}
        }
    }

    /// Makes all words of `old` those of this chain too, which [`Self::grown`] made of it. With the
    /// queue frozen.
    pub(crate) fn share_words(&self, old: &Self) {
        if let (Some(map), Some(old)) = (&self.map, &old.map) {
            map.share(old);
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
        "ploop{device}: the cluster map or the free slots need {} MiB, over the limit of {} MiB (parameter map_limit_mb)\n",
        need.div_ceil(1 << 20),
        limit >> 20
    );
    Err(ENOMEM)
}

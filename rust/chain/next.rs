// SPDX-License-Identifier: GPL-2.0
//! Chains that take the place of another while the disk is in use: with a delta more or less, a larger
//! disk, or images that were put in order.

use super::{check_memory, Chain, Hidden, Used, WORD_BYTES};
use crate::{
    chain::delta::Delta,
    format::Format,
    sys::{prelude::*, sparse::SparseWords},
};
use core::cmp::Ordering;
use ploop_pure::{
    map::{Place, Word},
    units::{Cluster, ImageCluster, Level},
};

impl Chain {
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
                // For the words of the top there is no memory to be waited for.
                self.for_each_in_top(|cluster, _| map.get_or_alloc(cluster).map(drop))?;
                map.refill();
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
        let Some(map) = &self.map else {
            return Ok(());
        };
        old.for_each_in_top(|cluster, (word, at)| {
            let place = Place::Slot {
                level: self.top,
                at,
            };
            let to = map.get_or_alloc(cluster)?;
            to.store(word.with_place(place).bits(), Relaxed);
            Ok(())
        })
    }

    /// Calls `f` for the clusters that are in the top, with word and slot; all of them, unless some are
    /// being mapped meanwhile. The last error.
    fn for_each_in_top(&self, f: impl Fn(u32, (Word, ImageCluster)) -> Result) -> Result {
        let Some(map) = &self.map else {
            return Ok(());
        };
        let mut result = Ok(());
        map.for_each(|cluster, bits| {
            let word = Word::from_bits(bits.load(Relaxed));
            match word.place() {
                Place::Slot { level, at } if level == self.top => {
                    if let Err(e) = f(cluster, (word, at)) {
                        result = Err(e);
                    }
                }
                Place::Slot { .. } | Place::Hole => {}
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
}

// SPDX-License-Identifier: GPL-2.0
//! Calls about single levels: DEL_DELTA and REPLACE_DELTA of a running device, UPDATE_INDEX,
//! TRUNCATE, MAX_DELTA_SIZE and DUMP_CACHED_BAT.

use super::{Control, Device};
use crate::{
    chain::{
        delta::{Delta, OpenArgs},
        Chain, Used,
    },
    engine::{Closed, Engine, Parts},
    error::{refusal, Shown},
    format::Format,
    io::Io,
    sys::{
        self,
        file::{Access, File},
        gen_disk::DiskRef,
        prelude::*,
    },
};
use core::ops::Range;
use ploop_pure::{
    abi, chain,
    lifecycle::{admit, Call},
    units::{Cluster, ImageCluster, Level},
};

/// Entries that DUMP_CACHED_BAT looks up at once.
const DUMP_STEP: u32 = 1 << 16;

impl Device {
    /// DEL_DELTA: the levels above move down by one. Of a running device only a delta between
    /// base and top, whose content the caller has put into the one below.
    pub(crate) fn del_delta(disk: DiskRef<'_, Self>, level: u32) -> Result {
        let this = disk.driver();
        let mut control = this.control.lock();
        admit(control.state(), Call::DelDelta(level)).map_err(refusal)?;
        this.admit_change(&control)?;
        let level = usize::try_from(level).map_err(|_| ENOENT)?;
        let Some(engine) = control.engine.clone() else {
            super::close_unused(control.deltas.get(level).ok_or(ENOENT)?);
            if control.deltas.len() == 1 {
                this.forget(&mut control, 0);
                return Ok(());
            }
            return this.drop_level(&mut control, level);
        };
        if level == usize::from(engine.chain.top_level().0) {
            return Err(EBUSY);
        }
        // The one below was written: its header and index are read anew.
        let below = control.deltas.get(level - 1).ok_or(ENOENT)?;
        let below = Arc::new(below.reopen(this.index)?, GFP_KERNEL)?;
        let mut deltas = KVec::with_capacity(control.deltas.len(), GFP_KERNEL)?;
        for (at, delta) in control.deltas.iter().enumerate() {
            if at == level - 1 {
                deltas.push(below.clone(), GFP_KERNEL)?;
            } else if at != level {
                deltas.push(delta.clone(), GFP_KERNEL)?;
            }
        }
        this.relink(disk, &mut control, &engine, deltas)?;
        if let Some(place) = control.deltas.get_mut(level - 1) {
            *place = below;
        }
        this.drop_level(&mut control, level)
    }

    /// Lets requests go to `deltas`, the same top and what is below it now.
    fn relink(
        &self,
        disk: DiskRef<'_, Self>,
        control: &mut Control,
        old: &Arc<Engine<Self>>,
        deltas: KVec<Arc<Delta>>,
    ) -> Result {
        let chain = old.chain.relinked(deltas, self.index)?;
        let parts = Parts::none(&chain)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        self.admit_limits(old, &new)?;
        self.replace_engine(disk, old, &new, || {
            new.chain.take_top_words(&old.chain)?;
            old.hand_over(&new)
        })?;
        control.engine = Some(new.clone());
        new.begin();
        Ok(())
    }

    /// REPLACE_DELTA: the image of `file` takes the place of that of `level`. That both hold the
    /// same is the caller's promise; what can be seen of it is looked at. A poisoned top is
    /// replaced too: the disk takes writes again.
    pub(crate) fn replace_delta(
        disk: DiskRef<'_, Self>,
        level: u8,
        file: &File,
        args: OpenArgs,
    ) -> Result {
        let this = disk.driver();
        this.admit_file(disk, file)?;
        let io = Io::open(file, args.access, &this.errands)?;
        let mut control = this.control.lock();
        this.admit_change(&control)?;
        let at = usize::from(level);
        let old = control.deltas.get(at).ok_or(ENOENT)?.clone();
        if (args.access == Access::ReadWrite) != old.is_writable() {
            return Err(EINVAL);
        }
        let new = Arc::new(Delta::open(io, args, &this.images, this.index)?, GFP_KERNEL)?;
        chain::admit_replacement(&old.member(), &new.member()).map_err(|misfit| {
            pr_err!("ploop{}: image refused: {}\n", this.index, Shown(misfit));
            EINVAL
        })?;
        let Some(engine) = control.engine.clone() else {
            new.mark(this.index)?;
            super::close_unused(&old);
            return this.put_level(&mut control, at, new);
        };
        let mut deltas = KVec::with_capacity(control.deltas.len(), GFP_KERNEL)?;
        for (i, delta) in control.deltas.iter().enumerate() {
            let delta = if i == at { &new } else { delta };
            deltas.push(delta.clone(), GFP_KERNEL)?;
        }
        if Level(level) != engine.chain.top_level() {
            this.relink(disk, &mut control, &engine, deltas)?;
            return this.put_level(&mut control, at, new);
        }
        new.mark(this.index)?;
        let replaced = this.replace_top(disk, &mut control, &engine, deltas);
        if replaced.is_err() {
            // Nothing was written to it.
            let _ = new.unmark_unused();
        }
        replaced?;
        this.put_level(&mut control, at, new)
    }

    /// Lets requests go to `deltas`, whose top is another image.
    fn replace_top(
        &self,
        disk: DiskRef<'_, Self>,
        control: &mut Control,
        old: &Arc<Engine<Self>>,
        deltas: KVec<Arc<Delta>>,
    ) -> Result {
        if old.is_poisoned() {
            let top = usize::from(old.chain.top_level().0);
            if deltas.iter().take(top).any(|delta| delta.is_unfinished()) {
                return Err(EIO);
            }
        } else {
            Self::commit_top(old)?;
        }
        let (chain, used) = Chain::load(deltas, self.index)?;
        let parts = Parts::of_top(&chain, &used, self.index)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        self.admit_limits(old, &new)?;
        self.replace_engine(disk, old, &new, || {
            new.forget_losses();
            Ok(())
        })?;
        control.engine = Some(new.clone());
        new.mended();
        new.begin();
        // The old image is as complete as it was; a failure leaves it marked.
        let closed = old.close();
        if let (Ok(Closed::Clean { is_empty }), Some(top)) = (closed, old.chain.top()) {
            let _ = top.unmark(is_empty);
        }
        Ok(())
    }

    fn put_level(&self, control: &mut Control, at: usize, new: Arc<Delta>) -> Result {
        self.update_info(at, new.info().clone());
        if at + 1 == control.deltas.len() {
            self.view.lock().version = new.format().version();
        }
        if let Some(place) = control.deltas.get_mut(at) {
            *place = new;
        }
        Ok(())
    }

    /// UPDATE_INDEX: clusters of a lower level have moved within its image.
    pub(crate) fn update_index(
        disk: DiskRef<'_, Self>,
        level: u8,
        maps: &[abi::ReverseMap],
    ) -> Result {
        let this = disk.driver();
        let control = this.control.lock();
        this.admit_change(&control)?;
        let delta = control.deltas.get(usize::from(level)).ok_or(ENOENT)?;
        let Some(engine) = &control.engine else {
            // The index is read when the device starts.
            return Ok(());
        };
        if Level(level) == engine.chain.top_level() {
            return Err(EINVAL);
        }
        let end = delta.format().cluster().floor(delta.io().len()?);
        if maps.iter().any(|m| m.slot == 0 || u64::from(m.slot) >= end) {
            return Err(EINVAL);
        }
        let updated = disk.frozen(
            || engine.has_parked(),
            |_| {
                for map in maps {
                    let to = ImageCluster(map.slot);
                    engine.chain.repoint(Level(level), Cluster(map.cluster), to);
                }
            },
        );
        updated.ok_or(ENOSPC)
    }

    /// TRUNCATE: cuts the image of a level that is only read to `clusters`, behind all that it
    /// holds; `file` is the same image, open for writing.
    pub(crate) fn truncate(&self, level: u8, file: &File, clusters: u32) -> Result {
        let control = self.control.lock();
        let delta = control.deltas.get(usize::from(level)).ok_or(ENOENT)?;
        self.admit_change(&control)?;
        if delta.is_writable() {
            return Err(EBUSY);
        }
        let Format::Ploop1(format) = delta.format() else {
            return Err(Errno::OpNotSupp.error());
        };
        let is_same = delta.io().as_file().inode_key() == file.inode_key();
        if !is_same || file.access() != Some(Access::ReadWrite) {
            return Err(EINVAL);
        }
        let used = Used::scan(delta, self.index, |_, _| Ok(()))?;
        if clusters < used.end.max(format.header().first_data.0) {
            return Err(EINVAL);
        }
        let len = delta.format().cluster().offset(ImageCluster(clusters));
        if len < delta.io().len()? {
            file.truncate(len)?;
        }
        file.sync()
    }

    /// MAX_DELTA_SIZE: the image of the top takes no more than `sectors` from here on, as long as
    /// it is the top. EINVAL without deltas.
    pub(crate) fn set_max_delta_size(&self, sectors: u64) -> Result {
        let mut control = self.control.lock();
        self.admit_change(&control)?;
        let top = control.deltas.last().ok_or(EINVAL)?.info().identity;
        control.max_delta = Some((sectors, top));
        if let Some(engine) = &control.engine {
            engine.limit_top(sectors);
        }
        Ok(())
    }

    /// DUMP_CACHED_BAT: gives `sink` the entries of a level for clusters from `first` on, as its
    /// index has them, or [`abi::ENTRY_UNKNOWN`] where a higher level hides what it has.
    pub(crate) fn dump_index(
        &self,
        args: abi::DumpBat,
        mut sink: impl FnMut(u32) -> Result,
    ) -> Result {
        let end = args.start_cluster.saturating_add(args.nr_clusters);
        let (mut first, mut seen) = (args.start_cluster, None);
        let mut entries = KVVec::with_capacity(DUMP_STEP.min(end - first) as usize, GFP_KERNEL)?;
        loop {
            if sys::is_killed() {
                return Err(EINTR);
            }
            let next = end.min(first.saturating_add(DUMP_STEP));
            entries.clear();
            self.entries_of(&args, first..next, &mut seen, &mut entries)?;
            // It may wait for whom it likes, the file systems on the disk too, so nobody waits for it.
            entries.iter().try_for_each(|entry| sink(*entry))?;
            if next >= end {
                return Ok(());
            }
            first = next;
        }
    }

    /// Adds the entries for `range`, a part of what `args` asks for, to `entries`. EBUSY if they are not
    /// of the delta that was `seen` before, or that is not where it was.
    fn entries_of(
        &self,
        args: &abi::DumpBat,
        range: Range<u32>,
        seen: &mut Option<(Arc<Delta>, bool)>,
        entries: &mut KVVec<u32>,
    ) -> Result {
        let control = self.control.lock();
        let engine = control.engine.as_ref().ok_or(ENODEV)?;
        self.admit_change(&control)?;
        let level = u8::try_from(args.level).map_err(|_| ENOENT)?;
        let delta = control.deltas.get(usize::from(level)).ok_or(ENOENT)?;
        if args.nr_clusters < 2 {
            return Err(EINVAL);
        }
        let Format::Ploop1(format) = delta.format() else {
            return Err(Errno::OpNotSupp.error());
        };
        let end = args.start_cluster.checked_add(args.nr_clusters);
        if end.is_none_or(|end| end > format.header().nr_entries) {
            return Err(EINVAL);
        }
        let is_top = Level(level) == engine.chain.top_level();
        let (then, was_top) = seen.get_or_insert_with(|| (delta.clone(), is_top));
        if !Arc::ptr_eq(then, delta) || *was_top != is_top {
            return Err(EBUSY);
        }
        // What is told is on disk.
        if is_top {
            Self::commit_top(engine)?;
        } else if delta.is_unfinished() {
            return Err(EIO);
        }
        for cluster in range.map(Cluster) {
            let entry = match engine.chain.slot_of(Level(level), cluster) {
                Some(at) => format.header().encode_entry(at),
                None if is_top => 0,
                None => abi::ENTRY_UNKNOWN,
            };
            entries.push(entry, GFP_KERNEL)?;
        }
        Ok(())
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Merge of a delta, the *source*, into the next lower one, the *destination*, while the disk is in
//! use (ordering rule 8).
//!
//! The top is merged by making the delta below the top first: writes go there from then on, the
//! source is only read, and every commit drops from the source, last, what the destination has. Two
//! lower deltas are merged by an engine of their own, unknown to requests; the source keeps its
//! entries and hides the destination until it is taken out of the chain.
//!
//! In both cases a crash at any point leaves two images that together hold the same as before, and
//! another merge completes it.

use super::{ops::Ops, Control, Device};
use crate::{
    chain::{delta::Delta, Chain},
    engine::{merge::Moved, Closed, Engine, Parts},
    error::is_no_space,
    format::Format,
    io::with_memory,
    sys::{self, gen_disk::DiskRef, mq::noio, pages::PageBuf, prelude::*},
};
use core::ops::Range;
use ploop_pure::{
    abi,
    rate::Pace,
    units::{ImageCluster, Level},
};

/// Pages of the buffer that clusters are copied through.
const BUF_PAGES: usize = 64;
/// Milliseconds until the deltas are tried to be put in order again.
const AGAIN_MS: u64 = 100;
/// How often, when there is no memory.
const MAX_NO_MEMORY: u32 = 100;
/// Milliseconds until a cluster that was locked is tried again.
const BUSY_MS: u64 = 2;

/// Clears the mark of a destination to which no entry was written. A mark that cannot be cleared keeps
/// it from being merged into, until attaching mends it.
fn leave_alone(dest: &Delta) {
    let _ = with_memory(|| dest.unmark_unused());
}

impl Device {
    /// The pair of a merge: level of the source, 0 excluded.
    fn source_level(control: &Control, level: u32) -> Result<usize> {
        let nr = control.deltas.len();
        let level = match level {
            abi::LEVEL_TOP => nr.checked_sub(1).ok_or(ENOENT)?,
            level => usize::try_from(level).map_err(|_| ENOENT)?,
        };
        match level > 0 && level < nr {
            true => Ok(level),
            false => Err(ENOENT),
        }
    }

    /// Whether a merge can begin, ENOENT for a level that is not there or has none below; if so, whether
    /// it is that of the top.
    pub(super) fn admit_merge(&self, control: &Control, level: u32) -> Result<bool> {
        let level = Self::source_level(control, level)?;
        Ok(level + 1 == control.deltas.len())
    }

    /// EINVAL for a source that ends inside a cluster over a raw destination, whose length says where the
    /// disk ends: clusters are copied whole.
    fn admit_pair(&self, engine: &Engine<Self>, source: &Delta, dest: &Delta) -> Result {
        let (size, cluster) = (source.format().size_sectors(), engine.chain.cluster());
        if matches!(dest.format(), Format::Raw(_)) && size % u64::from(cluster.sectors()) != 0 {
            pr_err!(
                "ploop{}: merge refused: the delta ends inside a cluster, and the one below is raw\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(())
    }

    pub(super) fn merge(&self, disk: DiskRef<'_, Self>, ops: &Arc<Ops>, level: u32) -> Result {
        let (engine, source, lower) = {
            let control = self.control.lock();
            let engine = control.engine.clone().ok_or(EINVAL)?;
            let level = Self::source_level(&control, level)?;
            let source = control.deltas.get(level).ok_or(ENOENT)?.clone();
            let lower = control.deltas.get(level - 1).ok_or(ENOENT)?.clone();
            let level = Level(u8::try_from(level).map_err(|_| ENOENT)?);
            if engine.is_poisoned() {
                return Err(EIO);
            }
            self.admit_pair(&engine, &source, &lower)?;
            (engine, (level, source), lower)
        };
        let dest = lower.open_writer(self.index)?;
        let dest = Arc::new(dest, GFP_KERNEL).inspect_err(|_| lower.writer_closed())?;
        let is_top = source.0 == engine.chain.top_level();
        let below = Level(source.0 .0.saturating_sub(1));
        let fit = self.fit(ops, &engine, below, &dest, &source.1);
        let result = fit.and_then(|dest| {
            if is_top {
                self.merge_top(disk, ops, &engine, dest)
            } else {
                self.merge_lower(disk, ops, &engine, source, dest)
            }
        });
        // Where it still is what is read, it is so alone again.
        let deltas = &self.control.lock().deltas;
        if deltas.iter().any(|d| Arc::ptr_eq(d, &lower)) {
            lower.writer_closed();
        }
        result
    }

    /// Marks the destination, which is the delta of `level`, and makes it as large as the source.
    fn fit(
        &self,
        ops: &Ops,
        engine: &Arc<Engine<Self>>,
        level: Level,
        dest: &Arc<Delta>,
        source: &Delta,
    ) -> Result<Arc<Delta>> {
        let size = source.format().size_sectors();
        let slots = dest
            .mark(self.index)
            .and_then(|()| dest.in_the_way(size))
            .inspect_err(|_| leave_alone(dest))?;
        let room = match slots.is_empty() {
            true => Ok(()),
            false => self.make_room(ops, engine, level, dest, slots),
        };
        let larger = room.and_then(|()| dest.fit(size)).inspect_err(|e| {
            // It was only asked to stop, or lacked something: entries are old or new, each good. After
            // a failed write or sync nobody knows, and the mark stays.
            if is_no_space(*e) || [Errno::Cancelled.error(), EBUSY, ENOMEM].contains(e) {
                leave_alone(dest);
            }
        })?;
        Ok(larger.unwrap_or_else(|| dest.clone()))
    }

    /// Moves what `dest` has in `slots`, where its larger index is to be, and lets requests, which
    /// know it as the delta of `level`, find it.
    fn make_room(
        &self,
        ops: &Ops,
        engine: &Arc<Engine<Self>>,
        level: Level,
        dest: &Arc<Delta>,
        slots: Range<ImageCluster>,
    ) -> Result {
        let mut deltas = KVec::with_capacity(1, GFP_KERNEL)?;
        deltas.push(dest.clone(), GFP_KERNEL)?;
        let (chain, used) = Chain::load(deltas, self.index)?;
        let parts = Parts::of_top(&chain, &used, self.index)?;
        let shared = engine.shared().clone();
        let alone = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        alone.set_private();
        alone.reserve_slots(slots.end);
        let moved = self.vacate(ops, &alone, slots);
        alone.quiet();
        let committed = moved.and_then(|()| alone.commit());
        if alone.is_poisoned() {
            return Err(EIO);
        }
        committed?;
        let mut from = 0;
        while let Some(cluster) = alone.chain.next_in(Level(0), from) {
            if let Some(to) = alone.chain.slot_of(Level(0), cluster) {
                while !engine.repoint_cluster(cluster, level, to) {
                    ops.check()?;
                    if engine.has_parked() {
                        return Err(ENOSPC);
                    }
                    sys::sleep_ms(BUSY_MS);
                }
            }
            match cluster.0.checked_add(1) {
                Some(next) => from = next,
                None => break,
            }
        }
        // Reads of the old places end before these become a part of the index.
        self.epoch.wait();
        Ok(())
    }

    /// Moves all clusters of the source of `engine`'s merge, and makes that durable.
    fn move_all(&self, ops: &Ops, engine: &Arc<Engine<Self>>) -> Result {
        let (source, _) = engine.chain.source().ok_or(EINVAL)?;
        let size = engine.chain.cluster().bytes();
        ops.set_total(engine.bytes_in(source));
        let mut buf = PageBuf::new(BUF_PAGES)?;
        let mut pace = Pace::default();
        // Again from the start for those that were locked.
        while let Some(mut cluster) = engine.chain.next_in(source, 0) {
            let mut was_busy = false;
            loop {
                ops.check()?;
                match engine.merge_cluster(cluster, &mut buf)? {
                    Moved::Done => ops.did(&mut pace, size)?,
                    Moved::Gone => {}
                    Moved::Busy => {
                        // Who has it may be waiting for space without end.
                        if engine.has_parked() {
                            return Err(ENOSPC);
                        }
                        was_busy = true;
                    }
                }
                let next = cluster.0.checked_add(1);
                match next.and_then(|n| engine.chain.next_in(source, n)) {
                    Some(next) => cluster = next,
                    None => break,
                }
            }
            if was_busy {
                sys::sleep_ms(BUSY_MS);
            }
        }
        engine.commit()
    }

    /// Merges the top into `dest`.
    fn merge_top(
        &self,
        disk: DiskRef<'_, Self>,
        ops: &Ops,
        old: &Arc<Engine<Self>>,
        dest: Arc<Delta>,
    ) -> Result {
        let new = match self.make_top(disk, old, &dest) {
            Ok(new) => new,
            Err(e) => {
                leave_alone(&dest);
                return Err(e);
            }
        };
        match self.move_all(ops, &new) {
            Ok(()) => self.patiently(&new, || self.end_merge(disk, &new)),
            // What is in which delta is not known any more.
            Err(e) if new.is_poisoned() => Err(e),
            Err(e) => {
                // Flushes wait for it, and so does who would have to write to give memory.
                self.patiently(&new, || noio(|| self.undo_merge(disk, &new)))?;
                Err(e)
            }
        }
    }

    /// Calls `f`, which puts the deltas in order by taking `engine` out of use, again while that
    /// fails because writes wait for space, which end when there is space or they are made to fail;
    /// and for a while without memory.
    fn patiently(&self, engine: &Engine<Self>, f: impl Fn() -> Result) -> Result {
        let mut no_memory = 0;
        loop {
            let error = match f() {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            no_memory += u32::from(error == ENOMEM);
            let passes = (error == ENOSPC && engine.has_parked())
                || (error == ENOMEM && no_memory < MAX_NO_MEMORY);
            if !passes || engine.is_poisoned() || !self.is_used(engine) {
                pr_err!(
                    "ploop{}: the deltas of a merge could not be put in order (errno {})\n",
                    self.index,
                    error.to_errno()
                );
                return Err(error);
            }
            sys::sleep_ms(AGAIN_MS);
        }
    }

    pub(super) fn is_used(&self, engine: &Engine<Self>) -> bool {
        let control = self.control.lock();
        control
            .engine
            .as_ref()
            .is_some_and(|e| core::ptr::eq(&**e, engine))
    }

    /// Makes `dest`, the delta below the top, the top, and the old top the source of a merge.
    fn make_top(
        &self,
        disk: DiskRef<'_, Self>,
        old: &Arc<Engine<Self>>,
        dest: &Arc<Delta>,
    ) -> Result<Arc<Engine<Self>>> {
        if !old.chain.top().is_some_and(|top| top.is_writable()) {
            return Err(EROFS);
        }
        let (hidden, used) = Chain::hidden_by(dest, self.index)?;
        let chain = old.chain.merging(dest.clone(), hidden)?;
        let parts = Parts::of_top(&chain, &used, self.index)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        self.admit_limits(old, &new)?;
        old.commit()?;
        let mut control = self.control.lock();
        // What the source hides is used again by the first write to it, and that waits for this: all of
        // the source has to be durable before.
        let gate = new.gate.close();
        let unfinished = self.replace_engine(disk, old, &new, || old.retire())?;
        control.engine = Some(new.clone());
        let committed = old.commit_retired(unfinished);
        if let Err(e) = committed {
            new.poison_for(e);
        }
        drop(gate);
        new.begin();
        let level = usize::from(new.chain.top_level().0);
        if let Some(place) = control.deltas.get_mut(level) {
            *place = dest.clone();
        }
        self.update_info(level, dest.info().clone());
        Ok(new)
    }

    /// Takes the source, which is empty, out of the chain.
    fn end_merge(&self, disk: DiskRef<'_, Self>, old: &Arc<Engine<Self>>) -> Result {
        let chain = old.chain.merged()?;
        let parts = Parts::none(&chain)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        let (_, source) = old.chain.source().ok_or(EINVAL)?;
        let mut control = self.control.lock();
        self.replace_engine(disk, old, &new, || old.hand_over(&new))?;
        control.engine = Some(new.clone());
        new.begin();
        // Its entries are dropped durably, so nothing is lost if this fails.
        let closed = source.unmark(true);
        let nr = usize::from(new.chain.top_level().0) + 1;
        self.forget(&mut control, nr);
        let mut view = self.view.lock();
        view.version = new.chain.top().map_or(0, |top| top.format().version());
        closed
    }

    /// Makes the source the top again: it and the destination hold together what they did.
    fn undo_merge(&self, disk: DiskRef<'_, Self>, old: &Arc<Engine<Self>>) -> Result {
        old.commit()?;
        let chain = old.chain.unmerged()?;
        let parts = Parts::none(&chain)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        let mut control = self.control.lock();
        let gate = new.gate.close();
        let top = new.chain.top_level();
        let slots = new.chain.slots_of(top)?;
        let (unfinished, used) = self.replace_engine(disk, old, &new, || {
            let used = new.chain.used_of(top, slots)?;
            let mut parts = Parts::of_used(&new.chain, &used, self.index)?;
            let unfinished = old.retire()?;
            new.exchange_parts(&mut parts);
            Ok((unfinished, used))
        })?;
        control.engine = Some(new.clone());
        control.limit_top(&new);
        let finished = old.finish(unfinished).and_then(|closed| {
            // The source's slots are free only now, and nobody has got one before `begin`. Of a file
            // that was cut nobody knows which are.
            new.check_length(used.end)?;
            Parts::prepare_file(&new.chain, &used, self.index)?;
            let dest = old.chain.top().ok_or(EIO)?;
            if let Closed::Clean { is_empty } = closed {
                dest.unmark(is_empty)?;
            }
            // It is only shown.
            if let Ok(info) = dest.seal() {
                self.update_info(usize::from(old.chain.top_level().0), info);
            }
            Ok(())
        });
        if let Err(e) = finished {
            old.chain.deltas().for_each(Delta::spoil_marked);
            new.poison_for(e);
        }
        drop(gate);
        new.begin();
        finished
    }

    /// Merges two lower deltas.
    fn merge_lower(
        &self,
        disk: DiskRef<'_, Self>,
        ops: &Ops,
        engine: &Arc<Engine<Self>>,
        (level, source): (Level, Arc<Delta>),
        dest: Arc<Delta>,
    ) -> Result {
        let made = Chain::pair(dest.clone(), source, self.index).and_then(|(chain, used)| {
            let parts = Parts::of_top(&chain, &used, self.index)?;
            let shared = engine.shared().clone();
            Engine::new(self.index, chain, parts, self.workers.clone(), shared)
        });
        let pair = made.inspect_err(|_| leave_alone(&dest))?;
        pair.set_private();
        let moved = self.move_all(ops, &pair);
        pair.quiet();
        let closed = with_memory(|| match pair.close()? {
            Closed::Clean { is_empty } => dest.unmark(is_empty),
            Closed::ReadOnly => Ok(()),
        });
        let info = closed.and_then(|()| dest.seal())?;
        moved?;
        let chain = engine.chain.without(level, dest.clone())?;
        let parts = Parts::none(&chain)?;
        let shared = engine.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        let mut control = self.control.lock();
        self.replace_engine(disk, engine, &new, || {
            engine.hand_over(&new)?;
            new.chain.take_level_out(level, &pair.chain);
            Ok(())
        })?;
        control.engine = Some(new.clone());
        new.begin();
        let at = usize::from(level.0);
        if let Some(place) = control.deltas.get_mut(at - 1) {
            *place = dest;
        }
        self.update_info(at - 1, info);
        self.drop_level(&mut control, at)
    }
}

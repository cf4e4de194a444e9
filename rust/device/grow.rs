// SPDX-License-Identifier: GPL-2.0
//! Growth of the disk while it is in use (ordering rule 10): clusters that stand where the larger
//! index has to be are moved away, durably; then that place is made zero, durably; the header comes
//! last, and only then is the disk larger. A crash before that leaves the disk as it was.

use super::{limits, ops::Ops, Device, Impatient};
use crate::{
    chain::{check_memory, delta::Delta},
    engine::{merge::Moved, Engine, Parts},
    format::Format,
    sys::{self, gen_disk::DiskRef, mq::noio, pages::PageBuf, prelude::*},
};
use core::ops::Range;
use ploop_pure::{
    chain::{self, Member},
    layout::ploop1::Header,
    rate::Pace,
    units::{Cluster, ImageCluster, Level, SECTOR_BYTES},
};

/// Pages of the buffer that clusters are copied through.
const BUF_PAGES: usize = 64;
/// Milliseconds until a cluster that was locked is tried again.
const BUSY_MS: u64 = 2;

impl Device {
    /// Whether the disk can be made `sectors` large: EINVAL if that is less than it is, or not
    /// whole clusters, or the delta below the top ends inside one, so that the larger top could not
    /// be attached on it again; EFBIG if the format cannot.
    pub(super) fn admit_grow(engine: &Engine<Self>, sectors: u64) -> Result {
        let chain = &engine.chain;
        let top = chain.top().ok_or(ENOENT)?;
        let rest = sectors & u64::from(chain.cluster().sectors() - 1);
        // A raw disk ends where its file does.
        let is_even = rest == 0 || matches!(top.format(), Format::Raw(_));
        if sectors < chain.size_sectors() || !is_even {
            return Err(EINVAL);
        }
        if !top.is_writable() {
            return Err(EROFS);
        }
        let below = chain.top_level().0.checked_sub(1).map(Level);
        if let Some(below) = below.and_then(|level| chain.delta(level)) {
            let larger = Member {
                size_sectors: sectors,
                ..top.member()
            };
            chain::admit(1, &below.member(), &larger).map_err(|_| EINVAL)?;
        }
        top.resized(sectors).map(drop)
    }

    pub(super) fn grow(&self, disk: DiskRef<'_, Self>, ops: &Arc<Ops>, sectors: u64) -> Result {
        let engine = {
            let control = self.control.lock();
            control.engine.clone().ok_or(EINVAL)?
        };
        Self::admit_grow(&engine, sectors)?;
        if sectors == engine.chain.size_sectors() {
            // Perhaps one before this could not show it, or not make its header durable.
            engine.commit()?;
            let _control = self.control.lock();
            self.show_size(disk, &engine);
            return Ok(());
        }
        let points = self.tracks.memory_for(sectors.saturating_mul(SECTOR_BYTES));
        check_memory(points, self.index)?;
        let top = engine.chain.top().ok_or(ENOENT)?;
        let larger = Arc::new(top.resized(sectors)?, GFP_KERNEL)?;
        if matches!(top.format(), Format::Raw(_)) {
            return self.grow_raw(disk, ops, &engine, larger);
        }
        let slots = top.in_the_way(sectors)?;
        let (start, end) = (slots.start, slots.end);
        if start < end {
            // With nobody on the way to publish a slot that was taken before.
            Self::at_rest(disk, &engine, |_| engine.reserve_slots(end))?;
            engine.begin();
        }
        self.vacate(ops, &engine, slots)
            .and_then(|()| Self::prepare_file(ops, &engine, &larger))
            .and_then(|()| self.end_grow(disk, &engine, larger))
            // What is free there is found again when the image is opened anew. What is before is the
            // index.
            .inspect_err(|_| engine.reserve_slots(start))
    }

    /// The same of a raw disk, which ends where its file does.
    fn grow_raw(
        &self,
        disk: DiskRef<'_, Self>,
        ops: &Ops,
        engine: &Arc<Engine<Self>>,
        larger: Arc<Delta>,
    ) -> Result {
        let top = engine.chain.top().ok_or(ENOENT)?;
        let size = engine.chain.size_sectors().saturating_mul(SECTOR_BYTES);
        engine.check_len(size)?;
        let before = top.io().len()?;
        let grown = Self::prepare_file(ops, engine, &larger)
            .and_then(|()| self.end_grow(disk, engine, larger));
        // A longer file would be a larger disk when it is attached again.
        if grown.is_err() && self.is_used(engine) && !engine.is_poisoned() {
            noio(|| top.io().cut(before)).inspect_err(|e| engine.poison_for(*e))?;
        }
        grown
    }

    /// Makes the top's file ready for the header of `larger`.
    fn prepare_file(ops: &Ops, engine: &Arc<Engine<Self>>, larger: &Delta) -> Result {
        let top = engine.chain.top().ok_or(ENOENT)?;
        match (top.format(), larger.format()) {
            (Format::Ploop1(old), Format::Ploop1(new)) => {
                Self::prepare_index(ops, engine, old.header(), new.header())?;
            }
            (Format::Raw(_), Format::Raw(new)) => {
                top.io()
                    .lengthen(new.size_sectors().saturating_mul(SECTOR_BYTES))?;
            }
            (Format::Raw(_) | Format::Ploop1(_), Format::Raw(_) | Format::Ploop1(_)) => {
                return Err(EINVAL)
            }
        }
        // Commits wait for it. What it reports may have been about writes of others.
        noio(|| top.io().sync()).inspect_err(|e| engine.poison_for(*e))
    }

    /// Makes zero, of a top whose header is `old`, what a disk with the header `new` finds there.
    fn prepare_index(ops: &Ops, engine: &Arc<Engine<Self>>, old: &Header, new: &Header) -> Result {
        Self::trim(ops, engine)?;
        // What an old tool left behind the last entry would become entries.
        engine.touch_page(old.nr_pages() - 1);
        engine.commit()?;
        let top = engine.chain.top().ok_or(ENOENT)?;
        top.zero_range(old.index_bytes()..new.zero_end(old))
    }

    /// Makes zero what an image, made by others, has in its last cluster behind the end of the disk.
    fn trim(ops: &Ops, engine: &Arc<Engine<Self>>) -> Result {
        let cluster = engine.chain.cluster();
        let end = engine.chain.size_sectors().saturating_mul(SECTOR_BYTES);
        let last = u32::try_from(end >> cluster.log_bytes()).map_err(|_| EFBIG)?;
        let within = end & (cluster.bytes() - 1);
        let mut buf = PageBuf::new(1)?;
        while within > 0 && engine.trim_cluster(Cluster(last), within, &mut buf)? == Moved::Busy {
            ops.check()?;
            if engine.has_parked() {
                return Err(ENOSPC);
            }
            sys::sleep_ms(BUSY_MS);
        }
        Ok(())
    }

    /// Moves all clusters out of these slots, which are not handed out any more.
    pub(super) fn vacate(
        &self,
        ops: &Ops,
        engine: &Arc<Engine<Self>>,
        slots: Range<ImageCluster>,
    ) -> Result {
        if slots.start >= slots.end {
            return Ok(());
        }
        let slots = slots.start.0..slots.end.0;
        // Who would have to write to give memory waits for it.
        noio(|| engine.reach(ImageCluster(slots.end)))?;
        let size = engine.chain.cluster().bytes();
        ops.set_total(size * u64::from(slots.end - slots.start));
        let mut buf = PageBuf::new(BUF_PAGES)?;
        let (mut pace, mut from) = (Pace::default(), 0);
        while let Some(cluster) = engine.chain.next_in_slots(from, &slots) {
            ops.check()?;
            match engine.relocate_cluster(cluster, false, &mut buf)? {
                Moved::Done => ops.did(&mut pace, size)?,
                Moved::Gone => {}
                Moved::Busy => {
                    if engine.has_parked() {
                        return Err(ENOSPC);
                    }
                    sys::sleep_ms(BUSY_MS);
                    continue;
                }
            }
            from = cluster.0;
        }
        Ok(())
    }

    /// Writes the header and makes the disk larger.
    fn end_grow(
        &self,
        disk: DiskRef<'_, Self>,
        old: &Arc<Engine<Self>>,
        larger: Arc<Delta>,
    ) -> Result {
        let chain = old.chain.grown(larger.clone(), self.index)?;
        let parts = Parts::none(&chain)?;
        let shared = old.shared().clone();
        let new = Engine::new(self.index, chain, parts, self.workers.clone(), shared)?;
        let size_bytes = new.chain.size_sectors().saturating_mul(SECTOR_BYTES);
        self.tracks.grow_points(size_bytes)?;
        let mut control = self.control.lock();
        // The first commit of the new engine is that of the header.
        let gate = new.gate.close();
        self.replace_engine(disk, old, &new, || {
            new.chain.share_words(&old.chain);
            old.hand_over(&new)
        })?;
        control.engine = Some(new.clone());
        if let Some(place) = control.deltas.last_mut() {
            *place = larger;
        }
        let written = new.commit_header();
        drop(gate);
        new.begin();
        written?;
        self.show_size(disk, &new);
        Ok(())
    }

    /// Under the control lock.
    fn show_size(&self, disk: DiskRef<'_, Self>, engine: &Arc<Engine<Self>>) {
        disk.set_capacity(limits::capacity(engine, self.index));
        // Who has partitions open keeps those that there are. What the disk's page cache holds is
        // written first, which must not wait for space.
        if !engine.has_parked() {
            let _impatient = Impatient::begin(Some(engine.clone()));
            let _ = disk.open_lock().rescan_partitions(false);
        }
        disk.notify_change();
    }
}

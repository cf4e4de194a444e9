// SPDX-License-Identifier: GPL-2.0
//! Compaction: the last slots of the top move into free ones, and the file is cut.

use super::{ops::Ops, Device};
use crate::{
    engine::{merge::Moved, Engine},
    format::Format,
    sys::{self, gen_disk::DiskRef, mq::noio, pages::PageBuf, prelude::*},
};
use ploop_pure::rate::Pace;

/// Pages of the buffer that clusters are copied through.
const BUF_PAGES: usize = 64;
/// Milliseconds until a cluster that was locked is tried again.
const BUSY_MS: u64 = 2;
/// Times that a locked cluster is tried: one that stays locked is left where it is.
const BUSY_TRIES: u32 = 500;

impl Device {
    /// Whether the top can be compacted: a raw image has no slots.
    pub(super) fn admit_compact(engine: &Engine<Self>) -> Result {
        let top = engine.chain.top().ok_or(ENOENT)?;
        match top.format() {
            Format::Raw(_) => Err(Errno::OpNotSupp.error()),
            Format::Ploop1(_) if top.is_writable() => Ok(()),
            Format::Ploop1(_) => Err(EROFS),
        }
    }

    pub(super) fn compact(&self, disk: DiskRef<'_, Self>, ops: &Arc<Ops>) -> Result {
        let engine = {
            let control = self.control.lock();
            control.engine.clone().ok_or(EINVAL)?
        };
        Self::admit_compact(&engine)?;
        // What was released becomes free, and free slots become clean.
        engine.commit()?;
        engine.clean()?;
        let moved = self.move_down(ops, &engine);
        if engine.is_poisoned() {
            return moved;
        }
        // What could be moved is, also if it was not all.
        engine.commit()?;
        engine.clean()?;
        let free = Self::at_rest(disk, &engine, |_| engine.give_end_back())?;
        // Who would have to write to give memory waits for it.
        let cut = free.and_then(|free| noio(|| engine.cut_end(free)));
        engine.begin();
        let (before, after) = cut?;
        engine.commit()?;
        ops.set_freed(before.saturating_sub(after));
        moved
    }

    fn move_down(&self, ops: &Ops, engine: &Arc<Engine<Self>>) -> Result {
        let slots = engine.dense_end()..engine.head();
        let size = engine.chain.cluster().bytes();
        ops.set_total(size * u64::from(slots.end.saturating_sub(slots.start)));
        let mut buf = PageBuf::new(BUF_PAGES)?;
        let (mut pace, mut from, mut tries) = (Pace::default(), 0, 0);
        while let Some(cluster) = engine.chain.next_in_slots(from, &slots) {
            ops.check()?;
            match engine.relocate_cluster(cluster, true, &mut buf) {
                Ok(Moved::Done) => ops.did(&mut pace, size)?,
                Ok(Moved::Busy) if tries < BUSY_TRIES => {
                    tries += 1;
                    sys::sleep_ms(BUSY_MS);
                    continue;
                }
                Ok(Moved::Gone | Moved::Busy) => {}
                // Others have taken the free slots.
                Err(e) if e == ENOSPC => return Ok(()),
                Err(e) => return Err(e),
            }
            tries = 0;
            match cluster.0.checked_add(1) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(())
    }
}

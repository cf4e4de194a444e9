// SPDX-License-Identifier: GPL-2.0
//! The write tracker, for copies of the top's image file, and checkpoints, for backups of the disk.

use super::Device;
use crate::{
    chain::{check_memory, checkpoints::Stored},
    engine::{tracks::bytes_of, Engine},
    format::Format,
    sys::prelude::*,
};
use ploop_pure::{
    abi,
    lifecycle::{admit, Call},
    track::{Answer, Grid},
    units::SECTOR_BYTES,
};

/// Bytes of the top's image file that a copy of it must have.
fn in_use(engine: &Engine<Device>) -> u64 {
    let chain = &engine.chain;
    match chain.top().map(|top| top.format()) {
        // The index of a disk that has grown is not handed out.
        Some(Format::Ploop1(format)) => {
            let end = engine.head().max(format.header().first_data.0);
            chain.cluster().bytes() * u64::from(end)
        }
        Some(Format::Raw(raw)) => raw.size_sectors().saturating_mul(SECTOR_BYTES),
        None => 0,
    }
}

/// Bits for all that the top's image file may come to have. While slots that came back are not free
/// yet, others are taken: the last bit stands for all beyond.
fn grid_of(engine: &Engine<Device>) -> Grid {
    let chain = &engine.chain;
    let cluster = chain.cluster().bytes();
    let clusters = chain
        .size_sectors()
        .saturating_mul(SECTOR_BYTES)
        .div_ceil(cluster);
    let now = in_use(engine).div_ceil(cluster);
    let bytes = now.saturating_add(clusters).saturating_mul(cluster);
    Grid::of_image(cluster.trailing_zeros(), bytes)
}

impl Device {
    /// The engine of a running device: ENOENT without deltas, EINVAL while it is stopped.
    fn running(control: &super::Control) -> Result<&Arc<Engine<Self>>> {
        admit(control.state(), Call::Change).map_err(crate::error::refusal)?;
        control.engine.as_ref().ok_or(EINVAL)
    }

    /// TRACK_INIT: the part of the top's image file that is to be copied. EBUSY while something else
    /// goes on.
    pub(crate) fn start_tracker(&self) -> Result<abi::TrackExtent> {
        let control = self.control.lock();
        let engine = Self::running(&control)?;
        self.admit_change(&control)?;
        let grid = grid_of(engine);
        check_memory(bytes_of(grid), self.index)?;
        self.tracks.start_tracker(grid)?;
        let (start, end) = (0, in_use(engine));
        Ok(abi::TrackExtent { start, end })
    }

    /// TRACK_READ: what is to be copied next; EAGAIN if nothing. What is in memory only is written
    /// before it says so.
    pub(crate) fn read_tracker(&self) -> Result<abi::TrackExtent> {
        let control = self.control.lock();
        let engine = Self::running(&control)?;
        let read = || self.tracks.read_tracker(|| in_use(engine));
        let answer = match read()? {
            Answer::Clean if engine.chain.top().is_some_and(|top| top.is_writable()) => {
                engine.commit()?;
                read()?
            }
            answer => answer,
        };
        match answer {
            Answer::Dirty(extent) | Answer::Beyond(extent) => Ok(extent),
            Answer::Clean => Err(EAGAIN),
        }
    }

    /// Lets checkpoints go on that were kept in the image, before the first request is served.
    pub(super) fn resume_points(&self, engine: &Engine<Self>, stored: KVec<Stored>) {
        let nr = stored.len();
        match self.tracks.resume(stored, disk_bytes(engine)) {
            Ok(()) if nr == 0 => {}
            Ok(()) => pr_notice!("ploop{}: {nr} checkpoints of the image go on\n", self.index),
            Err(_) => pr_warn!(
                "ploop{}: no memory for the image's checkpoints\n",
                self.index
            ),
        }
    }

    /// CHECKPOINT_START. EROFS if nothing is ever written; ENOMEM over the limit.
    pub(crate) fn start_checkpoint(&self, id: [u8; 16], log: u32, at_snapshot: bool) -> Result {
        let control = self.control.lock();
        let engine = Self::running(&control)?;
        if !engine.chain.top().is_some_and(|top| top.is_writable()) {
            return Err(EROFS);
        }
        // One that grows would come to another size.
        if self.ops.running().is_some() {
            return Err(EBUSY);
        }
        let bytes = disk_bytes(engine);
        let grid = Grid::new(log, bytes);
        let need = self.tracks.memory_for(bytes).saturating_add(bytes_of(grid));
        check_memory(need, self.index)?;
        self.tracks.add_point(id, grid, at_snapshot)
    }

    /// CHECKPOINT_LIST: the one that comes as number `idx`; ENOENT.
    pub(crate) fn checkpoint(&self, idx: u32) -> Result<abi::Checkpoint> {
        let control = self.control.lock();
        let engine = Self::running(&control)?;
        let point = self.tracks.point_at(idx as usize).ok_or(ENOENT)?;
        Ok(abi::Checkpoint {
            granularity: point.bitmap.grid().granularity() as u32,
            state: match point.is_recording() {
                true => abi::CHECKPOINT_RECORDING,
                false => abi::CHECKPOINT_ARMED,
            },
            index: idx,
            dirty: point.bitmap.dirty(),
            disk: disk_bytes(engine),
            ..abi::Checkpoint::new(point.id)
        })
    }

    /// CHECKPOINT_READ: gives `sink` up to `head.nr` extents that were written. EAGAIN if it has not
    /// started.
    pub(crate) fn read_checkpoint(
        &self,
        mut head: abi::CheckpointRead,
        mut sink: impl FnMut(abi::Extent) -> Result,
    ) -> Result<abi::CheckpointRead> {
        let disk = disk_bytes(Self::running(&self.control.lock())?);
        let point = self.tracks.point(head.id).ok_or(ENOENT)?;
        if !point.is_recording() {
            return Err(EAGAIN);
        }
        let grid = point.bitmap.grid();
        let end = head.start.saturating_add(head.len).min(disk);
        let bits = grid.bits(&(head.start..end));
        let (mut at, room) = (bits.start, core::mem::replace(&mut head.nr, 0));
        while let Some(run) = grid.next(&point.bitmap, at..bits.end) {
            let bytes = grid.bytes(&run);
            let (from, to) = (bytes.start.max(head.start), bytes.end.min(end));
            if head.nr == room {
                head.len = end - from;
                head.start = from;
                return Ok(head);
            }
            sink(abi::Extent {
                start: from,
                len: to - from,
            })?;
            head.nr += 1;
            at = run.end;
        }
        head.start = end;
        head.len = 0;
        Ok(head)
    }
}

fn disk_bytes(engine: &Engine<Device>) -> u64 {
    engine.chain.size_sectors().saturating_mul(SECTOR_BYTES)
}

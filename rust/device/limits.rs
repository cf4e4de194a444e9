// SPDX-License-Identifier: GPL-2.0
//! What the block layer is told of a running disk: capacity and queue limits.

use super::Device;
use crate::{
    engine::Engine,
    sys::{gen_disk::Limits, prelude::*},
};

/// Requests in flight for each CPU.
pub(super) const QUEUE_DEPTH: u32 = 128;

/// The capacity of a running disk in sectors: whole logical blocks.
pub(super) fn capacity(engine: &Engine<Device>, index: u32) -> u64 {
    let size = engine.chain.size_sectors();
    let block_sectors = u64::from(limits(engine).logical_block) >> SECTOR_SHIFT;
    let rest = size.checked_rem(block_sectors).unwrap_or(0);
    if rest != 0 {
        pr_notice!(
            "ploop{index}: the last {rest} sectors are less than a block and cannot be used\n"
        );
    }
    size - rest
}

/// Preferred I/O is the cluster, but not more than this: it decides how much is read ahead.
const IO_OPT_MAX: u64 = 4 << 20;

/// What file systems give back at once; a part of that is made zero.
const DISCARD_GRANULARITY: u32 = 4096;

/// The limits of a running disk.
pub(super) fn limits(engine: &Engine<Device>) -> Limits {
    let chain = &engine.chain;
    let cluster = chain.cluster();
    // What suits all images.
    let offset = chain.deltas().map(|d| d.io().align().offset).max();
    let memory = chain.deltas().map(|d| d.io().align().memory).max();
    Limits {
        logical_block: offset.unwrap_or(512),
        memory_align: memory.unwrap_or(512),
        // One read or write touches one cluster.
        chunk_sectors: cluster.sectors(),
        io_opt: cluster.bytes().min(IO_OPT_MAX) as u32,
        discard_granularity: match chain.top() {
            Some(top) if top.is_writable() && top.io().can_punch() => DISCARD_GRANULARITY,
            Some(_) | None => 0,
        },
    }
}

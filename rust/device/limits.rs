// SPDX-License-Identifier: GPL-2.0
//! What the block layer is told of a running disk: capacity and queue limits.

use super::Device;
use crate::{
    engine::Engine,
    sys::{file::Align, gen_disk::Limits, prelude::*},
};

/// Requests in flight for each CPU.
pub(super) const QUEUE_DEPTH: u32 = 128;

/// The capacity of a running disk in sectors: whole logical blocks.
pub(super) fn capacity(engine: &Engine<Device>, index: u32) -> u64 {
    let size = engine.chain.size_sectors();
    let block_sectors = u64::from(align(engine).offset) >> SECTOR_SHIFT;
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

/// What I/O has to keep to so that it suits all images.
pub(super) fn align(engine: &Engine<Device>) -> Align {
    let all = || engine.chain.deltas().map(|d| d.io().align());
    Align {
        offset: all().map(|a| a.offset).max().unwrap_or(512),
        memory: all().map(|a| a.memory).max().unwrap_or(512),
    }
}

/// The limits of a disk that is about to run. Not of one that does: it tries whether the image can be
/// punched.
pub(super) fn limits(engine: &Engine<Device>) -> Limits {
    let chain = &engine.chain;
    let cluster = chain.cluster();
    let align = align(engine);
    Limits {
        logical_block: align.offset,
        memory_align: align.memory,
        // One read or write touches one cluster.
        chunk_sectors: cluster.sectors(),
        io_opt: cluster.bytes().min(IO_OPT_MAX) as u32,
        discard_granularity: match chain.top() {
            Some(top) if top.is_writable() && top.io().can_punch() => DISCARD_GRANULARITY,
            Some(_) | None => 0,
        },
    }
}

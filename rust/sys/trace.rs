// SPDX-License-Identifier: GPL-2.0
//! Tracepoints of the slow path; `trace.h` has their fields.

use super::bindings;
use kernel::prelude::*;

fn errno(result: Result) -> i32 {
    result.err().map_or(0, Error::to_errno)
}

/// A cluster was given a slot.
pub(crate) fn map(device: u32, cluster: u32, slot: u32) {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_trace_map(device, cluster, slot) };
}

/// A cluster lost its slot.
pub(crate) fn unmap(device: u32, cluster: u32, slot: u32) {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_trace_unmap(device, cluster, slot) };
}

/// A slot of the delta of `level` was copied to one of the top.
pub(crate) fn copy(device: u32, level: u8, from: u32, to: u32, result: Result) {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_trace_copy(device, level.into(), from, to, errno(result)) };
}

/// A commit has ended.
pub(crate) fn commit(device: u32, result: Result) {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_trace_commit(device, errno(result)) };
}

/// The image file was to grow to so many clusters.
pub(crate) fn space(device: u32, clusters: u32, result: Result) {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_trace_space(device, clusters, errno(result)) };
}

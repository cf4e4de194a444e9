// SPDX-License-Identifier: GPL-2.0
//! What the kernel counts of a device.

use super::{line, number, Sysfs};
use serde::Serialize;
use std::io;
use std::path::Path;

/// What was done so far. The block layer counts from when the device was added, the driver from when
/// it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Reads done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Milliseconds that reads took, all added up.
    pub read_ms: u64,
    /// Writes done.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Milliseconds that writes took.
    pub write_ms: u64,
    /// Discards done.
    pub discards: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Milliseconds that discards took.
    pub discard_ms: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Milliseconds that flushes took.
    pub flush_ms: u64,
    /// Milliseconds in which there was something to do.
    pub busy_ms: u64,
    /// Requests that failed because of the image.
    pub io_errors: u64,
    /// Clusters that were given a place in the image.
    pub allocated_clusters: u64,
    /// Clusters copied by sharing blocks.
    pub cloned_clusters: u64,
    /// Clusters given back by discards.
    pub discarded_clusters: u64,
    /// Times that data and index were made durable.
    pub commits: u64,
    /// Pages of the index written.
    pub index_pages: u64,
}

/// What is so at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Gauges {
    /// Requests in the device.
    pub in_flight: u64,
    /// Memory of the map in bytes.
    pub map_bytes: u64,
}

/// Bytes of a page of the map.
const MAP_PAGE_BYTES: u64 = 4096;
/// Numbers in a disk's `stat`.
const STAT_FIELDS: usize = 17;

impl Counters {
    /// What was done since `before`. A counter that went back began anew.
    pub fn since(&self, before: &Self) -> Self {
        let of = |field: fn(&Self) -> u64| {
            let now = field(self);
            now.checked_sub(field(before)).unwrap_or(now)
        };
        Self {
            reads: of(|c| c.reads),
            read_bytes: of(|c| c.read_bytes),
            read_ms: of(|c| c.read_ms),
            writes: of(|c| c.writes),
            write_bytes: of(|c| c.write_bytes),
            write_ms: of(|c| c.write_ms),
            discards: of(|c| c.discards),
            discard_bytes: of(|c| c.discard_bytes),
            discard_ms: of(|c| c.discard_ms),
            flushes: of(|c| c.flushes),
            flush_ms: of(|c| c.flush_ms),
            busy_ms: of(|c| c.busy_ms),
            io_errors: of(|c| c.io_errors),
            allocated_clusters: of(|c| c.allocated_clusters),
            cloned_clusters: of(|c| c.cloned_clusters),
            discarded_clusters: of(|c| c.discarded_clusters),
            commits: of(|c| c.commits),
            index_pages: of(|c| c.index_pages),
        }
    }
}

impl Sysfs {
    /// What device `index` counts; an error if it has gone away.
    pub fn counters(&self, index: u32) -> io::Result<(Counters, Gauges)> {
        let dir = self.dir(index);
        let disk = disk_stat(&dir.join("stat"))?;
        let [reads, _, read_sectors, read_ms, writes, _, write_sectors, write_ms, in_flight, busy_ms, _, discards, _, discard_sectors, discard_ms, flushes, flush_ms] =
            disk;
        // A module that does not count it has nothing to tell.
        let of_driver = |name: &str| number(&dir.join("pstate").join(name)).unwrap_or(0);
        let counters = Counters {
            reads,
            read_bytes: read_sectors.saturating_mul(512),
            read_ms,
            writes,
            write_bytes: write_sectors.saturating_mul(512),
            write_ms,
            discards,
            discard_bytes: discard_sectors.saturating_mul(512),
            discard_ms,
            flushes,
            flush_ms,
            busy_ms,
            io_errors: of_driver("io_errors"),
            allocated_clusters: of_driver("allocated_clusters"),
            cloned_clusters: of_driver("cloned_clusters"),
            discarded_clusters: of_driver("discarded_clusters"),
            commits: of_driver("commits"),
            index_pages: of_driver("index_pages"),
        };
        let gauges = Gauges {
            in_flight,
            map_bytes: of_driver("map_pages").saturating_mul(MAP_PAGE_BYTES),
        };
        Ok((counters, gauges))
    }
}

/// The numbers of a disk's `stat`; Documentation/block/stat.rst of Linux tells which is which.
fn disk_stat(path: &Path) -> io::Result<[u64; STAT_FIELDS]> {
    let text = line(path)?;
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    let mut fields = [0; STAT_FIELDS];
    for field in &mut fields {
        *field = match numbers.next() {
            Some(Ok(number)) => number,
            _ => {
                return Err(io::Error::other(format!(
                    "{} says {text:?}",
                    path.display()
                )))
            }
        };
    }
    Ok(fields)
}

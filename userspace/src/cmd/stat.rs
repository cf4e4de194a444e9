// SPDX-License-Identifier: GPL-2.0
//! `ploopctl stat`: what devices do, in numbers: so far, each moment, or for Prometheus.

mod prometheus;

use super::{attached, list};
use crate::cli::StatArgs;
use crate::error::{Code, Error, Result};
use crate::output;
use crate::signals::Requests;
use crate::size::human;
use crate::sysfs::{Counters, Device, Gauges, Sysfs};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A device at a moment.
struct Seen {
    device: Device,
    counters: Counters,
    gauges: Gauges,
    /// The image that is written to, unless it cannot be reached from here.
    image_file: Option<ImageFile>,
}

/// The same as JSON shows it.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    row: list::Row<'a>,
    counters: &'a Counters,
    gauges: &'a Gauges,
    image_file: Option<ImageFile>,
}

/// What the host knows of an image.
#[derive(Debug, Clone, Copy, Serialize)]
struct ImageFile {
    /// Length in bytes.
    file_size: u64,
    /// Bytes that it takes on the host's file system.
    allocated_size: u64,
    /// Bytes that are free there.
    host_free: u64,
}

#[derive(Serialize)]
struct Answer<'a> {
    devices: Vec<Shown<'a>>,
}

/// Runs the command.
pub fn run(args: &StatArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    let wanted = wanted(&args.targets)?;
    if let Some(seconds) = args.watch {
        return watch(
            &sysfs,
            wanted.as_deref(),
            Duration::from_secs(seconds.into()),
        );
    }
    let seen = look(&sysfs, wanted.as_deref())?;
    if args.prometheus {
        let text = prometheus::text(&seen);
        return match &args.output {
            Some(path) => output::replace(path, &text),
            None => output::text(&text),
        };
    }
    if args.json {
        let devices = seen.iter().map(|s| Shown {
            row: list::Row::new(&s.device),
            counters: &s.counters,
            gauges: &s.gauges,
            image_file: s.image_file,
        });
        return output::json(&Answer {
            devices: devices.collect(),
        });
    }
    output::text(&totals(&seen))
}

/// The devices that are named, by number; `None` for all.
fn wanted(targets: &[PathBuf]) -> Result<Option<Vec<u32>>> {
    if targets.is_empty() {
        return Ok(None);
    }
    let devices = targets.iter().map(|t| Ok(attached::device(t)?.index));
    devices.collect::<Result<Vec<_>>>().map(Some)
}

/// The devices of these numbers that are there.
fn look(sysfs: &Sysfs, wanted: Option<&[u32]>) -> Result<Vec<Seen>> {
    let mut devices = sysfs.devices()?;
    devices.retain(|d| wanted.is_none_or(|w| w.contains(&d.index)));
    let seen = devices.into_iter().filter_map(|device| {
        // One that has gone away meanwhile is left out.
        let (counters, gauges) = sysfs.counters(device.index).ok()?;
        Some(Seen {
            counters,
            gauges,
            image_file: image_file(&device),
            device,
        })
    });
    Ok(seen.collect())
}

fn image_file(device: &Device) -> Option<ImageFile> {
    let path = device.top()?.reachable().ok()?;
    let meta = fs::metadata(path).ok()?;
    let host = nix::sys::statvfs::statvfs(path).ok()?;
    meta.is_file().then(|| ImageFile {
        file_size: meta.len(),
        allocated_size: meta.blocks().saturating_mul(512),
        host_free: host.blocks_available().saturating_mul(host.fragment_size()),
    })
}

fn totals(seen: &[Seen]) -> String {
    let head = [
        "DEVICE", "READS", "READ", "WRITES", "WRITTEN", "DISCARDS", "FLUSHES", "ERRORS", "MAP",
        "IMAGE", "STATE",
    ];
    let rows = seen.iter().map(|s| {
        let c = &s.counters;
        [
            s.name(),
            c.reads.to_string(),
            human(c.read_bytes),
            c.writes.to_string(),
            human(c.write_bytes),
            c.discards.to_string(),
            c.flushes.to_string(),
            c.io_errors.to_string(),
            human(s.gauges.map_bytes),
            s.image_file.map_or("-".into(), |f| human(f.allocated_size)),
            s.state(),
        ]
    });
    list::table(&with_head(head, rows))
}

fn with_head<const N: usize>(
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Vec<[String; N]> {
    std::iter::once(head.map(str::to_owned))
        .chain(rows)
        .collect()
}

impl Seen {
    fn name(&self) -> String {
        format!("ploop{}", self.device.index)
    }

    fn state(&self) -> String {
        list::condition(&self.device).to_owned()
    }
}

/// Prints what was done since the last time, until a signal asks to end.
fn watch(sysfs: &Sysfs, wanted: Option<&[u32]>, interval: Duration) -> Result<()> {
    let mut requests = Requests::begin();
    let mut before: BTreeMap<u32, Counters> = BTreeMap::new();
    let mut last: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let seen = look(sysfs, wanted)?;
        if seen.is_empty() && wanted.is_some() {
            return Err(Error::new(
                Code::NotAttached,
                "the devices are not attached any more",
            ));
        }
        if let Some(last) = last {
            output::text(&rates(&seen, &before, now.duration_since(last)))?;
        }
        before = seen.iter().map(|s| (s.device.index, s.counters)).collect();
        last = Some(now);
        if is_ended_within(&mut requests, now + interval) {
            return Ok(());
        }
    }
}

/// Waits until `until`; whether a signal asked to end before.
fn is_ended_within(requests: &mut Requests, until: Instant) -> bool {
    loop {
        if requests.is_end_asked() {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let Some(fd) = requests.fd() else {
            std::thread::sleep(left);
            continue;
        };
        // A longer wait goes on in the next round, as does one that a signal ends.
        let millis = left.as_millis().clamp(1, 60_000);
        let timeout = u16::try_from(millis).map_or(PollTimeout::MAX, PollTimeout::from);
        let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout);
    }
}

/// What the devices did in `elapsed`, since they had counted as `before`. Those that are new are
/// shown the next time.
fn rates(seen: &[Seen], before: &BTreeMap<u32, Counters>, elapsed: Duration) -> String {
    let head = [
        "DEVICE",
        "r/s",
        "read/s",
        "r_ms",
        "w/s",
        "written/s",
        "w_ms",
        "d/s",
        "f/s",
        "busy",
        "queue",
        "alloc/s",
        "commits/s",
        "STATE",
    ];
    let micros = elapsed.as_micros().max(1);
    let rate = |n: u64| per_second(n, micros);
    let rows = seen.iter().filter_map(|s| {
        let c = s.counters.since(before.get(&s.device.index)?);
        let bytes = |n: u64| human(u64::try_from(rate_of(n, micros)).unwrap_or(u64::MAX));
        Some([
            s.name(),
            rate(c.reads),
            bytes(c.read_bytes),
            tenths(u128::from(c.read_ms) * 10, c.reads.into()),
            rate(c.writes),
            bytes(c.write_bytes),
            tenths(u128::from(c.write_ms) * 10, c.writes.into()),
            rate(c.discards),
            rate(c.flushes),
            format!("{}%", busy(c.busy_ms, micros)),
            s.gauges.in_flight.to_string(),
            rate(c.allocated_clusters),
            rate(c.commits),
            s.state(),
        ])
    });
    list::table(&with_head(head, rows)) + "\n"
}

fn rate_of(n: u64, micros: u128) -> u128 {
    u128::from(n) * 1_000_000 / micros
}

/// With one decimal.
fn per_second(n: u64, micros: u128) -> String {
    tenths(u128::from(n) * 10_000_000, micros)
}

/// `n` tenths divided by `by`, or `-` if that is 0.
fn tenths(n: u128, by: u128) -> String {
    match n.checked_div(by) {
        None => "-".into(),
        Some(tenths) => format!("{}.{}", tenths / 10, tenths % 10),
    }
}

/// Percent of the time; the kernel may count a little more than there was.
fn busy(busy_ms: u64, micros: u128) -> u128 {
    (u128::from(busy_ms) * 100_000 / micros).min(100)
}

#[cfg(test)]
mod tests;

// SPDX-License-Identifier: GPL-2.0
//! The numbers as Prometheus' text format, version 0.0.4.

use super::Seen;
use crate::operate;
use crate::sysfs::Device;
use std::fmt::Write;

/// What becomes of a value.
#[derive(Clone, Copy)]
enum Kind {
    /// Only goes up, or begins anew. Its name ends with `_total`.
    Counter,
    /// The same in milliseconds, shown in seconds.
    Seconds,
    /// May go anywhere.
    Gauge,
}

/// A metric that each device has, or not.
struct Family {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    value: fn(&Seen) -> Option<u64>,
}

/// A family of the counter `$field`.
macro_rules! counter {
    ($name:literal, $kind:ident, $help:literal, $field:ident) => {
        Family {
            name: $name,
            kind: Kind::$kind,
            help: $help,
            value: |s| Some(s.counters.$field),
        }
    };
}

/// A family of a value that may be missing.
macro_rules! gauge {
    ($name:literal, $help:literal, $value:expr) => {
        Family {
            name: $name,
            kind: Kind::Gauge,
            help: $help,
            value: $value,
        }
    };
}

const FAMILIES: [Family; 30] = [
    gauge!(
        "ploop_running",
        "Whether the device serves requests.",
        |s| Some(s.device.running.into())
    ),
    gauge!(
        "ploop_failed",
        "Whether writes are refused since the image could not be written.",
        |s| Some(s.device.aborted.into())
    ),
    gauge!("ploop_size_bytes", "Size of the disk.", |s| Some(
        s.device.size
    )),
    gauge!("ploop_deltas", "Images of the chain.", |s| u64::try_from(
        s.device.deltas.len()
    )
    .ok()),
    gauge!(
        "ploop_openers",
        "How often the disk and its partitions are open.",
        |s| Some(s.device.open_count)
    ),
    gauge!("ploop_in_flight_requests", "Requests in the device.", |s| {
        Some(s.gauges.in_flight)
    }),
    gauge!("ploop_map_bytes", "Memory of the map.", |s| Some(
        s.gauges.map_bytes
    )),
    gauge!(
        "ploop_image_file_bytes",
        "Length of the image that is written to.",
        |s| Some(s.image_file?.file_size)
    ),
    gauge!(
        "ploop_image_allocated_bytes",
        "What that image takes on the host's file system.",
        |s| Some(s.image_file?.allocated_size)
    ),
    gauge!(
        "ploop_host_free_bytes",
        "What is free on that file system.",
        |s| Some(s.image_file?.host_free)
    ),
    gauge!(
        "ploop_space_low",
        "Whether there is less space for the image than the low-water mark, or none.",
        |s| Some((s.device.space != "ok").into())
    ),
    gauge!(
        "ploop_space_full",
        "Whether writes wait for space for the image.",
        |s| Some((s.device.space == "full").into())
    ),
    counter!("ploop_reads_completed_total", Counter, "Reads done.", reads),
    counter!("ploop_read_bytes_total", Counter, "Bytes read.", read_bytes),
    counter!(
        "ploop_read_time_seconds_total",
        Seconds,
        "Time that reads took, added up.",
        read_ms
    ),
    counter!(
        "ploop_writes_completed_total",
        Counter,
        "Writes done.",
        writes
    ),
    counter!(
        "ploop_written_bytes_total",
        Counter,
        "Bytes written.",
        write_bytes
    ),
    counter!(
        "ploop_write_time_seconds_total",
        Seconds,
        "Time that writes took, added up.",
        write_ms
    ),
    counter!(
        "ploop_discards_completed_total",
        Counter,
        "Discards done.",
        discards
    ),
    counter!(
        "ploop_discarded_bytes_total",
        Counter,
        "Bytes discarded.",
        discard_bytes
    ),
    counter!(
        "ploop_discard_time_seconds_total",
        Seconds,
        "Time that discards took, added up.",
        discard_ms
    ),
    counter!(
        "ploop_flushes_completed_total",
        Counter,
        "Flushes done.",
        flushes
    ),
    counter!(
        "ploop_flush_time_seconds_total",
        Seconds,
        "Time that flushes took, added up.",
        flush_ms
    ),
    counter!(
        "ploop_io_time_seconds_total",
        Seconds,
        "Time in which there was something to do.",
        busy_ms
    ),
    counter!(
        "ploop_io_errors_total",
        Counter,
        "Requests that failed because of the image, or for want of space.",
        io_errors
    ),
    counter!(
        "ploop_allocated_clusters_total",
        Counter,
        "Clusters that got a place in the image.",
        allocated_clusters
    ),
    counter!(
        "ploop_cloned_clusters_total",
        Counter,
        "Clusters copied by sharing blocks of the file system.",
        cloned_clusters
    ),
    counter!(
        "ploop_discarded_clusters_total",
        Counter,
        "Clusters given back by discards.",
        discarded_clusters
    ),
    counter!(
        "ploop_commits_total",
        Counter,
        "Times that data and index were made durable.",
        commits
    ),
    counter!(
        "ploop_index_pages_written_total",
        Counter,
        "Pages of the index written.",
        index_pages
    ),
];

/// The metrics of these devices.
pub fn text(seen: &[Seen]) -> String {
    let mut text = String::new();
    let info = "ploop_device_info";
    head(
        &mut text,
        info,
        Kind::Gauge,
        "What the device is; always 1.",
    );
    for s in seen {
        sample(&mut text, info, &labels(&s.device), "1");
    }
    for family in FAMILIES {
        head(&mut text, family.name, family.kind, family.help);
        for s in seen {
            if let Some(value) = (family.value)(s) {
                sample(
                    &mut text,
                    family.name,
                    &device(&s.device),
                    &shown(family.kind, value),
                );
            }
        }
    }
    operations(&mut text, seen);
    text
}

/// What devices do for long, as far as we may ask.
fn operations(text: &mut String, seen: &[Seen]) {
    let running = seen
        .iter()
        .filter_map(|s| Some((&s.device, operate::running(&s.device)?)));
    let running: Vec<_> = running.collect();
    let (done, size) = ("ploop_operation_done_bytes", "ploop_operation_size_bytes");
    for (name, help) in [
        (
            done,
            "What the merge, growth or compaction that runs has done.",
        ),
        (size, "What it has to do, as far as is known."),
    ] {
        head(text, name, Kind::Gauge, help);
        for (of, status) in &running {
            let mut labels = device(of);
            labels.push((
                "operation",
                operate::name(status.op).unwrap_or_default().into(),
            ));
            let value = if name == done {
                status.done
            } else {
                status.total
            };
            sample(text, name, &labels, &value.to_string());
        }
    }
}

type Labels = Vec<(&'static str, String)>;

fn device(device: &Device) -> Labels {
    vec![("device", format!("ploop{}", device.index))]
}

fn labels(of: &Device) -> Labels {
    let mut labels = device(of);
    let top = of.top();
    labels.push(("cookie", of.cookie.clone()));
    labels.push(("format", top.map(|t| t.format.clone()).unwrap_or_default()));
    labels.push(("format_version", of.format_version.to_string()));
    labels.push((
        "image",
        top.map(|t| t.image.display().to_string())
            .unwrap_or_default(),
    ));
    labels.push(("read_only", of.read_only.to_string()));
    labels
}

fn shown(kind: Kind, value: u64) -> String {
    match kind {
        Kind::Counter | Kind::Gauge => value.to_string(),
        Kind::Seconds => format!("{}.{:03}", value / 1000, value % 1000),
    }
}

fn head(text: &mut String, name: &str, kind: Kind, help: &str) {
    let kind = match kind {
        Kind::Counter | Kind::Seconds => "counter",
        Kind::Gauge => "gauge",
    };
    // Writing to a string does not fail.
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn sample(text: &mut String, name: &str, labels: &[(&str, String)], value: &str) {
    let labels: Vec<_> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    let _ = writeln!(text, "{name}{{{}}} {value}", labels.join(","));
}

/// The value of a label: a backslash, a double quote and a newline are escaped.
fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

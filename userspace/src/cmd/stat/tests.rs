// SPDX-License-Identifier: GPL-2.0
//! Numbers of devices that are not there.

use super::*;
use std::collections::BTreeSet;

fn seen(index: u32, counters: Counters) -> Seen {
    Seen {
        device: Device {
            index,
            device: format!("/dev/ploop{index}").into(),
            running: true,
            size: 1 << 30,
            read_only: false,
            cluster_size: 1 << 20,
            format_version: 2,
            cookie: "a \"b\" \\ c\nd".into(),
            open_count: 0,
            aborted: false,
            maintenance: "off".into(),
            space: "ok".into(),
            deltas: Vec::new(),
        },
        counters,
        gauges: Gauges::default(),
        image_file: None,
    }
}

#[test]
fn rates_are_those_of_the_time_between() {
    let first = Counters {
        reads: 1000,
        read_bytes: 1 << 30,
        read_ms: 500,
        io_errors: 3,
        ..Counters::default()
    };
    let second = Counters {
        reads: 1025,
        read_bytes: (1 << 30) + (20 << 20),
        read_ms: 600,
        busy_ms: 1000,
        // The driver was started again.
        io_errors: 1,
        ..first
    };
    assert_eq!(second.since(&first).reads, 25);
    assert_eq!(second.since(&first).io_errors, 1);
    let before = BTreeMap::from([(3, first)]);
    // Device 4 is new.
    let now = [seen(3, second), seen(4, second)];
    let text = rates(&now, &before, Duration::from_secs(2));
    let mut lines = text.lines();
    let head: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    let row = lines
        .next()
        .unwrap()
        .replace(" MiB", "MiB")
        .replace(" B", "B");
    let row: BTreeMap<_, _> = head.into_iter().zip(row.split_whitespace()).collect();
    for (column, want) in [
        ("DEVICE", "ploop3"),
        ("r/s", "12.5"),
        ("read/s", "10MiB"),
        ("r_ms", "4.0"),
        ("w/s", "0.0"),
        ("w_ms", "-"),
        ("busy", "50%"),
        ("STATE", "running"),
    ] {
        assert_eq!(row.get(column), Some(&want), "{column} of\n{text}");
    }
    assert_eq!(lines.next(), Some(""));
    assert_eq!(lines.next(), None);
}

/// Each family is announced once and holds together; names and values are as Prometheus wants them.
#[test]
fn metrics_are_well_formed() {
    let counters = Counters {
        write_ms: 12_034,
        ..Counters::default()
    };
    let text = prometheus::text(&[seen(0, counters), seen(1, counters)]);
    let mut families = BTreeSet::new();
    let mut family = String::new();
    let mut is_counter = false;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(families.insert(name.to_owned()), "{name} comes twice");
            assert!(help.ends_with('.'), "{line}");
            family = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, family);
            is_counter = kind == "counter";
            assert_eq!(is_counter, name.ends_with("_total"), "{line}");
        } else {
            let (name, rest) = line.split_once('{').unwrap();
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            assert_eq!(name, family, "{line}");
            assert!(labels.starts_with("device=\"ploop"), "{line}");
            assert!(value.parse::<f64>().is_ok_and(|v| v >= 0.0), "{line}");
            assert!(!is_counter || !value.contains('-'), "{line}");
        }
    }
    assert!(families.iter().all(|f| f.starts_with("ploop_")));
    assert!(text.ends_with('\n'));
    assert!(text.contains("ploop_write_time_seconds_total{device=\"ploop1\"} 12.034\n"));
    assert!(text.contains(r#"cookie="a \"b\" \\ c\nd""#), "{text}");
    // Of nothing there are no samples, but the families.
    let empty = prometheus::text(&[]);
    assert!(empty.lines().all(|l| l.starts_with('#')));
}

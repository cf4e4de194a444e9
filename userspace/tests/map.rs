// SPDX-License-Identifier: GPL-2.0
//! `map` and `info` on images that QEMU made and wrote to, compared with what QEMU says.

#![allow(missing_docs)]

mod common;
use common::{entry, get_u32, has_qemu, on, put_u32, qemu, qemu_io, Scratch};
use serde_json::Value;
use std::path::Path;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// Where each cluster is, by either map: offset in the image, or none.
fn by_cluster(runs: &[Value], start: &str, cluster: u64, size: u64) -> Vec<Option<u64>> {
    let mut map = vec![None; size.div_ceil(cluster) as usize];
    let mut next = 0;
    for run in runs {
        let (at, len) = (
            run[start].as_u64().unwrap(),
            run["length"].as_u64().unwrap(),
        );
        assert_eq!(at, next, "runs leave no gap");
        next += len;
        if let Some(offset) = run["offset"].as_u64() {
            for n in 0..len.div_ceil(cluster) {
                map[(at / cluster + n) as usize] = Some(offset + n * cluster);
            }
        }
    }
    assert_eq!(next, size);
    map
}

fn compare(image: &Path, cluster: u64, size: u64) {
    let path = image.to_str().unwrap();
    let ours = on(image, &["map", "--json"]).expect(0).json();
    assert_eq!(
        (&ours["size"], &ours["cluster_size"]),
        (&size.into(), &cluster.into())
    );
    let ours = by_cluster(ours["runs"].as_array().unwrap(), "start", cluster, size);
    let args = ["map", "--output=json", "-f", "parallels", path];
    let theirs: Value = serde_json::from_slice(&qemu("qemu-img", &args).stdout).unwrap();
    let theirs = by_cluster(theirs.as_array().unwrap(), "start", cluster, size);
    assert_eq!(ours, theirs);
    assert!(ours.iter().any(Option::is_some) && ours.iter().any(Option::is_none));
}

#[test]
fn our_map_is_qemus() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new("map");
    let mut rng = Rng(42);
    for (option, cluster) in [("32K", 32 << 10), ("1M", 1 << 20), ("4M", 4u64 << 20)] {
        // Not a multiple of the cluster.
        let size = 50 * cluster + 4096;
        for version in ["1", "2", "qemu"] {
            let image = scratch.path(&format!("{option}-{version}"));
            let path = image.to_str().unwrap();
            if version == "qemu" {
                let option = format!("cluster_size={cluster}");
                let size = size.to_string();
                qemu(
                    "qemu-img",
                    &["create", "-f", "parallels", "-o", &option, path, &size],
                );
            } else {
                let size = size.to_string();
                on(
                    &image,
                    &[
                        "create",
                        "--format-version",
                        version,
                        "-b",
                        option,
                        "-s",
                        &size,
                    ],
                )
                .expect(0);
            }
            let writes: Vec<String> = (0..20)
                .map(|n| {
                    let at = rng.below(size / 4096 - 2) * 4096;
                    format!("write -P {} {at} 8k", n + 1)
                })
                .collect();
            qemu_io(&image, &writes);
            on(&image, &["check"]).expect(0);
            compare(&image, cluster, size);
            std::fs::remove_file(image).unwrap();
        }
    }
}

#[test]
fn info_shows_what_qemu_wrote() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new("info");
    let image = scratch.path("image");
    qemu(
        "qemu-img",
        &["create", "-f", "parallels", image.to_str().unwrap(), "1G"],
    );
    qemu_io(&image, &["write 5M 2M".into(), "write 1000M 4k".into()]);
    let info = on(&image, &["info", "--json"]).expect(0).json();
    for (key, want) in [
        ("size", 1u64 << 30),
        ("format_version", 2),
        ("clusters", 1024),
        ("used_clusters", 3),
        ("leaked_clusters", 0),
        ("file_size", 4 << 20),
    ] {
        assert_eq!(info[key], want, "{key}");
    }
    assert_eq!(
        (&info["in_use"], &info["damaged"]),
        (&false.into(), &false.into())
    );
    assert_eq!(info["format"], "ploop1");
    let text = on(&image, &["info"]).expect(0).out;
    assert!(text.contains("3 of 1024 used"), "{text}");
}

#[test]
fn a_map_is_whole_or_an_error() {
    let scratch = Scratch::new("map-bad");
    let image = common::small(&scratch, "image");
    put_u32(&image, entry(9), 77);
    let run = on(&image, &["map", "--json"])
        .expect(41)
        .says(&["BAT[9]", "check"]);
    assert!(run.out.is_empty());
    put_u32(&image, entry(9), 0);
    on(&image, &["map", "--json"]).expect(0).json();
    assert_eq!(get_u32(&image, entry(1)), 2);
    let raw = scratch.create("raw", &["-f", "raw", "-s", "1M"]);
    on(&raw, &["map"]).expect(11).says(&["not a ploop1 image"]);
    on(&raw, &["info"]).expect(11).says(&["not a ploop1 image"]);
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl info` of a disk, named by its descriptor.

use crate::cmd::list::Row;
use crate::cmd::{disk, op};
use crate::descriptor::guid::Guid;
use crate::disk::files::{inspect, Which};
use crate::disk::intent::Intent;
use crate::error::Result;
use crate::output;
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Serialize)]
struct Info<'a> {
    #[serde(serialize_with = "output::path")]
    descriptor: &'a Path,
    size: u64,
    cluster_size: u64,
    format: &'static str,
    top: Guid,
    images: Vec<ImageRow>,
    unfinished: bool,
    problems: Vec<String>,
    /// Devices that have images of the disk.
    devices: Vec<Row<'a>>,
}

/// An image of the chain of the top, the base first.
#[derive(Serialize)]
struct ImageRow {
    uuid: Guid,
    #[serde(serialize_with = "output::path")]
    image: PathBuf,
    /// `null` if it is missing, as for the next.
    file_size: Option<u64>,
    allocated_size: Option<u64>,
}

/// Says it.
pub fn run(path: &Path, is_json: bool) -> Result<()> {
    let (path, descriptor) = disk::look(path)?;
    let said = descriptor.disk();
    let (_, mut found) = inspect(&path, &descriptor, Which::All);
    found.wrong.append(&mut found.changed);
    let devices = Sysfs::default().devices()?;
    let has_image = |d: &&Device| {
        said.images
            .iter()
            .any(|i| d.delta_of(&disk::file(&path, i)).is_some())
    };
    let devices: Vec<_> = devices.iter().filter(has_image).collect();
    let rows = said
        .chain(said.top)
        .unwrap_or_default()
        .into_iter()
        .map(|guid| {
            let image = disk::file(&path, descriptor.image(guid));
            let meta = std::fs::metadata(&image).ok();
            ImageRow {
                uuid: guid,
                image,
                file_size: meta.as_ref().map(std::fs::Metadata::len),
                allocated_size: meta.map(|m| m.blocks().saturating_mul(512)),
            }
        });
    let info = Info {
        descriptor: &path,
        size: said.size_sectors.saturating_mul(512),
        cluster_size: said.cluster.bytes(),
        format: if said.is_raw { "raw" } else { "ploop1" },
        top: said.top,
        images: rows.collect(),
        unfinished: Intent::is_there(&path),
        problems: found.wrong,
        devices: devices.iter().map(|d| Row::new(d)).collect(),
    };
    if is_json {
        return output::json(&info);
    }
    output::text(&describe(&info, said.images.len(), &devices))
}

fn describe(info: &Info<'_>, nr_images: usize, devices: &[&Device]) -> String {
    let mut lines = vec![
        ("descriptor", info.descriptor.display().to_string()),
        (
            "disk size",
            format!("{} ({} bytes)", human(info.size), info.size),
        ),
        (
            "format",
            format!(
                "{} base, {} clusters",
                info.format,
                human(info.cluster_size)
            ),
        ),
        (
            "deltas",
            format!(
                "{} in the chain of the top, {nr_images} in all",
                info.images.len()
            ),
        ),
    ];
    for (level, row) in info.images.iter().enumerate() {
        let space = row
            .allocated_size
            .map_or("missing".to_owned(), |n| format!("{} allocated", human(n)));
        lines.push((
            "delta",
            format!("{level} {} {} ({space})", row.uuid, row.image.display()),
        ));
    }
    for device in devices {
        let access = if device.read_only {
            "read-only"
        } else {
            "read-write"
        };
        lines.push((
            "device",
            format!("{}, {}, {access}", device.device.display(), device.state()),
        ));
        lines.extend(op::describe(device));
    }
    for problem in &info.problems {
        lines.push(("problem", problem.clone()));
    }
    output::fields(&lines)
}

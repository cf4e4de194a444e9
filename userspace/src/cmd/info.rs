// SPDX-License-Identifier: GPL-2.0
//! `ploopctl info`.

mod of_disk;

use super::list::Row;
use super::op::{self, Shown};
use super::{check, Target, LAGS};
use crate::cli::TargetArgs;
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image, Report};
use crate::operate;
use crate::output;
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use ploop_pure::layout::ploop1::{Mark, FLAG_EMPTY};
use ploop_pure::repair::Extension;
use ploop_pure::units::SECTOR_BYTES;
use serde::Serialize;
use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Serialize)]
struct Info<'a> {
    #[serde(serialize_with = "output::path_or_null")]
    image: Option<PathBuf>,
    #[serde(flatten)]
    ploop1: Option<Ploop1>,
    device: Option<Row<'a>>,
    /// The long operation that runs.
    operation: Option<Shown>,
}

/// What a ploop1 image says about itself.
#[derive(Serialize)]
struct Ploop1 {
    format: &'static str,
    format_version: u32,
    size: u64,
    cluster_size: u64,
    clusters: u32,
    used_clusters: u32,
    leaked_clusters: u32,
    tail_bytes: u64,
    file_size: u64,
    allocated_size: u64,
    in_use: bool,
    empty_flag: bool,
    damaged: bool,
    extension: &'static str,
    bitmaps: Vec<Bitmap>,
}

/// A dirty bitmap.
#[derive(Serialize)]
struct Bitmap {
    id: String,
    granularity: u64,
}

/// Runs the command.
pub fn run(args: &TargetArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    let (path, device) = match Target::resolve(&args.target, &sysfs)? {
        Target::Device(device) => (device.top().map(|t| t.image.clone()), Some(*device)),
        Target::Disk(path) => return of_disk::run(&path, args.json),
        Target::Image(path) => {
            let device = sysfs.find_image(&path)?.into_iter().next();
            (Some(path), device)
        }
    };
    let is_raw = device
        .as_ref()
        .is_some_and(|d| d.top().is_some_and(|t| t.format == "raw"));
    let ploop1 = match &path {
        Some(path) if !is_raw => match look(path, device.as_ref()) {
            // The device says enough, even if its image cannot be seen from here.
            Err(e) if device.is_some() => {
                output::note(&format!("note: {e}"));
                None
            }
            result => Some(result?),
        },
        Some(_) | None => None,
    };
    if args.json {
        return output::json(&Info {
            image: path,
            ploop1,
            device: device.as_ref().map(Row::new),
            operation: device
                .as_ref()
                .and_then(operate::running)
                .map(|s| Shown::new(&s)),
        });
    }
    if device.as_ref().is_some_and(|d| d.running) && ploop1.is_some() {
        output::note(&format!("note: {LAGS}"));
    }
    output::text(&describe(path.as_deref(), ploop1.as_ref(), device.as_ref()))
}

fn look(path: &Path, device: Option<&Device>) -> Result<Ploop1> {
    if let Some(top) = device.and_then(Device::top).filter(|t| t.image == path) {
        top.reachable()?;
    }
    let image = Image::open(path, Access::Read)?;
    if !image.has_magic()? {
        let what = format!("{} is not a ploop1 image", path.display());
        return Err(Error::new(Code::NotAnImage, what)
            .hint("if it is a raw image, there is nothing to show: it is the disk byte for byte"));
    }
    let is_written = |d: &Device| d.running && d.delta_of(path).is_some_and(|l| !l.read_only);
    let is_running = device.is_some_and(is_written);
    let report = match is_running {
        true => check::look_live(&image)?,
        false => image.check()?,
    };
    let report = report.map_err(|p| image.not_an_image(p))?;
    let is_damaged = match is_running {
        true => !report.problems.is_empty(),
        false => report.findings.cure().is_some() && !is_only_marked(&report),
    };
    let blocks = image
        .file()
        .metadata()
        .map_err(|e| Error::io(Code::Stat, format!("cannot stat {}", path.display()), e))?
        .blocks();
    Ok(summary(&report, blocks.saturating_mul(512), is_damaged))
}

fn summary(report: &Report, allocated_size: u64, damaged: bool) -> Ploop1 {
    let found = &report.findings;
    let header = found.header;
    Ploop1 {
        format: "ploop1",
        format_version: header.version.number(),
        size: header.size_sectors * SECTOR_BYTES,
        cluster_size: header.cluster.bytes(),
        clusters: header.nr_entries,
        used_clusters: found.usage.nr_used,
        leaked_clusters: report.nr_leaked,
        tail_bytes: found.tail_bytes(),
        file_size: found.len_bytes,
        allocated_size,
        in_use: header.mark == Mark::InUse,
        empty_flag: header.flags & FLAG_EMPTY != 0,
        damaged,
        extension: extension_name(found.extension),
        bitmaps: report
            .bitmaps
            .iter()
            .map(|(id, granularity)| Bitmap {
                id: uuid(id),
                granularity: u64::from(*granularity) * SECTOR_BYTES,
            })
            .collect(),
    }
}

/// Whether the in-use mark is all there is, but for the empty flag.
fn is_only_marked(report: &Report) -> bool {
    use ploop_pure::problem::Problem;
    let harmless = [Problem::InUse, Problem::EmptyFlag];
    report.nr_omitted == 0 && report.problems.iter().all(|p| harmless.contains(p))
}

/// `none`, `valid` or `invalid`.
pub fn extension_name(extension: Extension) -> &'static str {
    match extension {
        Extension::None => "none",
        Extension::Invalid => "invalid",
        Extension::Valid { .. } => "valid",
    }
}

fn uuid(id: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in id.iter().enumerate() {
        if [4, 6, 8, 10].contains(&i) {
            text.push('-');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn describe(path: Option<&Path>, ploop1: Option<&Ploop1>, device: Option<&Device>) -> String {
    let mut lines: Vec<(&str, String)> = Vec::new();
    if let Some(path) = path {
        lines.push(("image", path.display().to_string()));
    }
    if let Some(p) = ploop1 {
        lines.extend(describe_image(p));
    }
    if let Some(d) = device {
        let access = if d.read_only {
            "read-only"
        } else {
            "read-write"
        };
        let failed = if d.aborted { ", writes fail" } else { "" };
        lines.push(("device", d.device.display().to_string()));
        lines.push(("state", format!("{}, {access}{failed}", d.state())));
        lines.extend(op::describe(d));
        lines.push((
            "device size",
            format!("{} ({} bytes)", human(d.size), d.size),
        ));
        lines.push(("open", output::count(d.open_count, "time")));
        if !d.cookie.is_empty() {
            lines.push(("cookie", d.cookie.clone()));
        }
        for delta in &d.deltas {
            let what = format!("{} ({}, {})", delta.image.display(), delta.format, delta.io);
            lines.push(("delta", format!("{} {what}", delta.level)));
        }
    }
    output::fields(&lines)
}

fn describe_image(p: &Ploop1) -> Vec<(&'static str, String)> {
    let cluster = human(p.cluster_size);
    let mut lines = vec![
        (
            "format",
            format!(
                "{} version {}, {cluster} clusters",
                p.format, p.format_version
            ),
        ),
        ("disk size", format!("{} ({} bytes)", human(p.size), p.size)),
        (
            "file size",
            format!(
                "{} ({} allocated)",
                human(p.file_size),
                human(p.allocated_size)
            ),
        ),
        (
            "clusters",
            format!(
                "{} of {} used, {} leaked, {} unused at the end",
                p.used_clusters,
                p.clusters,
                p.leaked_clusters,
                human(p.tail_bytes)
            ),
        ),
        (
            "mark",
            if p.in_use { "in use" } else { "closed" }.to_owned(),
        ),
    ];
    if p.extension != "none" {
        lines.push(("extension", p.extension.to_owned()));
    }
    for b in &p.bitmaps {
        lines.push((
            "bitmap",
            format!("{}, {} a bit", b.id, human(b.granularity)),
        ));
    }
    if p.damaged {
        lines.push(("damage", "yes; 'ploopctl check' says what".to_owned()));
    }
    lines
}

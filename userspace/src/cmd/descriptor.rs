// SPDX-License-Identifier: GPL-2.0
//! `ploopctl descriptor`, and what `info` says about a disk.

use super::disk;
use super::info::describe_work;
use super::list::Row;
use crate::cli::{AttachFormat, DescriptorCommand, RestoreArgs, SnapshotListArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::lock::FileLock;
use crate::descriptor::{self, store, Descriptor};
use crate::disk::files::{inspect, Which};
use crate::disk::intent::Intent;
use crate::disk::restore::{rebuild, Request};
use crate::error::{Code, Error, Result};
use crate::output::{self, count};
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(command: &DescriptorCommand) -> Result<()> {
    match command {
        DescriptorCommand::Validate(args) => validate(args),
        DescriptorCommand::Restore(args) => restore(args),
    }
}

#[derive(Serialize)]
struct Verdict<'a> {
    #[serde(serialize_with = "output::path")]
    descriptor: &'a Path,
    valid: bool,
    problems: &'a [String],
    /// Lower images that changed since they were closed.
    changed: &'a [String],
    /// An operation is going on or was interrupted.
    unfinished: bool,
}

fn validate(args: &SnapshotListArgs) -> Result<()> {
    let path = disk::path(&args.disk)?;
    let text = store::read(&path)?;
    let mut problems = descriptor::problems(&text);
    let mut changed = Vec::new();
    if problems.is_empty() {
        let (_, found) = inspect(&path, &Descriptor::parse(&path, &text)?, Which::All);
        problems = found.wrong;
        changed = found.changed;
    }
    let unfinished = Intent::is_there(&path);
    let valid = problems.is_empty() && changed.is_empty();
    if args.json {
        output::json(&Verdict {
            descriptor: &path,
            valid,
            problems: &problems,
            changed: &changed,
            unfinished,
        })?;
    } else {
        let mut text = String::new();
        for problem in &problems {
            text += &format!("problem: {problem}\n");
        }
        for image in &changed {
            text += &format!("problem: a lower image changed since it was closed: {image}\n");
        }
        if unfinished {
            text += &format!(
                "An operation is going on, or was interrupted: 'ploopctl recover {}' ends it.\n",
                path.display()
            );
        }
        if valid {
            text += "No problem found.\n";
        }
        output::text(&text)?;
    }
    if valid {
        return Ok(());
    }
    let nr = problems.len() + changed.len();
    let what = format!("{} has {}", path.display(), count(nr as u64, "problem"));
    Err(Error::new(Code::Descriptor, what))
}

fn restore(args: &RestoreArgs) -> Result<()> {
    let dir = std::fs::canonicalize(&args.dir)
        .map_err(|e| Error::io(Code::Open, format!("cannot open {}", args.dir.display()), e))?;
    let path = dir.join(descriptor::NAME);
    let _lock = FileLock::take(&path, args.wait.patience())?;
    let is_there = path.symlink_metadata().is_ok();
    if is_there && !args.force {
        let what = format!("{} exists already and is left as it is", path.display());
        return Err(Error::new(Code::Create, what).hint(
            "'ploopctl descriptor validate' judges it; --force puts a new one in its place",
        ));
    }
    if Intent::is_there(&path) {
        let what = format!("an operation on {} was interrupted", path.display());
        return Err(Error::new(Code::Descriptor, what).hint(format!(
            "{}{} holds the descriptor as it was and was to be: put one of them in place and run 'ploopctl recover', \
             or remove that file, too",
            path.display(),
            crate::disk::intent::SUFFIX
        )));
    }
    let request = Request {
        path: &path,
        images: &args.images,
        is_raw: args.format == AttachFormat::Raw,
        cluster: args.cluster,
    };
    let (text, names) = rebuild(&request)?;
    if is_there {
        store::write(&store::beside(&path, ".old"), &store::read(&path)?)?;
    }
    store::write(&path, &text)?;
    let mut said = format!("{}\n", path.display());
    for (level, name) in names.iter().enumerate() {
        said += &format!("  {level} {name}\n");
    }
    output::text(&said)
}

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

/// `ploopctl info` of a disk.
pub fn info(path: &Path, is_json: bool) -> Result<()> {
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
        lines.extend(describe_work(device));
    }
    for problem in &info.problems {
        lines.push(("problem", problem.clone()));
    }
    lines.iter().fold(String::new(), |text, (name, value)| {
        text + &format!("{:<13} {value}\n", format!("{name}:"))
    })
}

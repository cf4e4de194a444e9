// SPDX-License-Identifier: GPL-2.0
//! `ploopctl snapshot`, but for mounting.

use super::{disk, mount};
use crate::cli::{SnapshotCommand, SnapshotListArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::model::{Disk, Shot};
use crate::descriptor::Descriptor;
use crate::disk::outside::Freeze;
use crate::disk::{Live, Removal, Work};
use crate::error::Result;
use crate::output;
use crate::size::human;
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(command: &SnapshotCommand) -> Result<()> {
    let live = Live::default();
    match command {
        SnapshotCommand::Create(args) => {
            let mut disk = disk::open(&args.disk.disk, &live, Work::Short, &args.disk.wait)?;
            let freeze = if args.no_freeze {
                Freeze::No
            } else {
                Freeze::Yes
            };
            let uuid = disk.snapshot(&live, args.uuid, freeze)?;
            output::text(&format!("{uuid}\n"))
        }
        SnapshotCommand::List(args) => list(args),
        SnapshotCommand::Tree(args) => tree(args),
        SnapshotCommand::Switch(args) => {
            let mut disk = disk::open(&args.disk.disk, &live, Work::Short, &args.disk.wait)?;
            disk.switch(&live, args.uuid, args.force)
        }
        SnapshotCommand::Delete(args) => {
            let live = Live::limited(args.rate.rate);
            let mut disk = disk::open(&args.disk.disk, &live, Work::Long, &args.disk.wait)?;
            if disk.delete(&live, args.uuid)? == Removal::Marked {
                output::note(&format!(
                    "note: several deltas build on {}: it is marked, and goes when one of them is left",
                    args.uuid
                ));
            }
            Ok(())
        }
        SnapshotCommand::Merge(args) => {
            let live = Live::limited(args.rate.rate);
            let mut disk = disk::open(&args.disk.disk, &live, Work::Long, &args.disk.wait)?;
            if args.all {
                disk.merge_all(&live)
            } else {
                disk.merge(&live, args.uuid)
            }
        }
        SnapshotCommand::Mount(args) => mount::mount(args),
        SnapshotCommand::Umount(args) => mount::umount(args),
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    #[serde(serialize_with = "output::path")]
    descriptor: &'a Path,
    size: u64,
    cluster_size: u64,
    top: Guid,
    snapshots: Vec<Row>,
}

/// A delta. The top is one too.
#[derive(Serialize)]
struct Row {
    uuid: Guid,
    parent: Option<Guid>,
    /// It is what the disk is.
    current: bool,
    /// It is being removed.
    temporary: bool,
    #[serde(serialize_with = "output::path")]
    image: PathBuf,
    /// Space that the image takes; `null` if it is missing.
    allocated_size: Option<u64>,
}

fn row(path: &Path, descriptor: &Descriptor, shot: &Shot) -> Row {
    let image = disk::file(path, descriptor.image(shot.guid));
    let meta = std::fs::metadata(&image).ok();
    Row {
        uuid: shot.guid,
        parent: (shot.parent != Guid::NULL).then_some(shot.parent),
        current: shot.guid == descriptor.disk().top,
        temporary: shot.is_temporary,
        allocated_size: meta.map(|m| m.blocks().saturating_mul(512)),
        image,
    }
}

/// In the order of the tree: a parent before its children.
fn rows(path: &Path, descriptor: &Descriptor) -> Vec<(usize, Row)> {
    fn walk(disk: &Disk, of: Guid, depth: usize, to: &mut Vec<(usize, Shot)>) {
        for shot in disk.children(of) {
            to.push((depth, *shot));
            walk(disk, shot.guid, depth + 1, to);
        }
    }
    let mut shots = Vec::new();
    walk(descriptor.disk(), Guid::NULL, 0, &mut shots);
    let row = |(depth, shot)| (depth, row(path, descriptor, &shot));
    shots.into_iter().map(row).collect()
}

fn list(args: &SnapshotListArgs) -> Result<()> {
    let (path, descriptor) = disk::look(&args.disk)?;
    let rows: Vec<_> = rows(&path, &descriptor)
        .into_iter()
        .map(|(_, r)| r)
        .collect();
    if args.json {
        return json(&path, &descriptor, rows);
    }
    let head = ["", "UUID", "PARENT", "ALLOCATED", "IMAGE"].map(str::to_owned);
    let cells = rows.iter().map(|r| {
        [
            mark(r).to_owned(),
            r.uuid.to_string(),
            r.parent.map_or("-".to_owned(), |p| p.to_string()),
            allocated(r),
            r.image.display().to_string(),
        ]
    });
    let all: Vec<_> = std::iter::once(head).chain(cells).collect();
    output::text(&super::list::table(&all))
}

fn json(path: &Path, descriptor: &Descriptor, snapshots: Vec<Row>) -> Result<()> {
    output::json(&Listed {
        descriptor: path,
        size: descriptor.disk().size_sectors.saturating_mul(512),
        cluster_size: descriptor.disk().cluster.bytes(),
        top: descriptor.disk().top,
        snapshots,
    })
}

fn tree(args: &SnapshotListArgs) -> Result<()> {
    let (path, descriptor) = disk::look(&args.disk)?;
    let rows = rows(&path, &descriptor);
    if args.json {
        return json(
            &path,
            &descriptor,
            rows.into_iter().map(|(_, r)| r).collect(),
        );
    }
    let mut text = String::new();
    for (depth, row) in &rows {
        let (mark, name) = (mark(row), row.uuid);
        let what = if row.current {
            "current state"
        } else {
            "snapshot"
        };
        let pad = "  ".repeat(*depth);
        text += &format!("{mark:1} {pad}{name} {what}, {}\n", allocated(row));
    }
    output::text(&text)
}

fn mark(row: &Row) -> &'static str {
    match (row.current, row.temporary) {
        (true, _) => "*",
        (false, true) => "-",
        (false, false) => "",
    }
}

fn allocated(row: &Row) -> String {
    row.allocated_size.map_or("missing".to_owned(), human)
}

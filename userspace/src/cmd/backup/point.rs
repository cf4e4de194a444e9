// SPDX-License-Identifier: GPL-2.0
//! A moment of a disk that can be read while the disk goes on: a snapshot, made for the time and
//! merged away again. Of a disk with a descriptor by its own means; of other devices with an image
//! beside the top.

use super::super::disk;
use super::interim;
use crate::cli::BackupArgs;
use crate::descriptor::guid::Guid;
use crate::disk::outside::{Freeze, NewDelta, Outside};
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::offline::Format;
use crate::operate::{self, Operation};
use crate::sysfs::{Device, Sysfs};
use ploop_pure::layout::ploop1::{Header, Version};
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};
use std::path::{Path, PathBuf};

/// The images that a disk is, base first.
#[derive(Debug, Clone)]
pub struct Images {
    /// Their paths.
    pub paths: Vec<PathBuf>,
    /// Format of the base.
    pub base: Format,
}

/// A disk that is to be backed up.
pub enum Subject {
    /// With a descriptor, whose locks are held.
    Disk(Box<Opened>),
    /// A device without.
    Device(Box<Device>),
}

/// A snapshot that was made for the time.
pub struct Point {
    /// What it is.
    pub images: Images,
    made: Made,
}

enum Made {
    /// Of a disk, by its name.
    Snapshot(Guid),
    /// This image is written to meanwhile.
    Image(PathBuf),
}

impl Subject {
    /// A disk, whose locks are taken.
    pub fn disk(path: &Path, args: &BackupArgs) -> Result<Self> {
        let live = Live::limited(args.bwlimit);
        let disk = disk::open(path, &live, Work::Long, &args.wait)?;
        Ok(Self::Disk(Box::new(disk)))
    }

    /// The device that writes to it, if it is attached.
    pub fn device(&self) -> Result<Option<Device>> {
        match self {
            Self::Disk(disk) => disk.top_writer(&disk.users(&Live::default())?),
            Self::Device(device) => Ok(Some(device.as_ref().clone())),
        }
    }

    /// Makes the snapshot. What is left of it after a failure is told by the error.
    pub fn snapshot(&mut self, args: &BackupArgs) -> Result<Point> {
        let live = Live::limited(args.bwlimit);
        let freeze = if args.no_freeze {
            Freeze::No
        } else {
            Freeze::Yes
        };
        match self {
            Self::Disk(disk) => of_disk(disk, &live, args, freeze),
            Self::Device(device) => of_device(device, args, &live, freeze),
        }
    }

    /// Merges the snapshot away.
    pub fn end(&mut self, point: &Point, args: &BackupArgs) -> Result<()> {
        let live = Live::limited(args.bwlimit);
        match (self, &point.made) {
            (Self::Disk(disk), Made::Snapshot(uuid)) => {
                let left = |e: Error| {
                    let what = format!(
                        "the snapshot {uuid} that was made for the backup is left: 'ploopctl recover' \
                         removes it"
                    );
                    e.hint(what)
                };
                disk.delete(&live, *uuid).map(drop).map_err(left)
            }
            (Self::Device(device), Made::Image(path)) => {
                // There is one at least.
                let old_top = point.images.paths.last().unwrap_or(path);
                merge(device, path, old_top, args.bwlimit)
            }
            (Self::Disk(_), Made::Image(_)) | (Self::Device(_), Made::Snapshot(_)) => Ok(()),
        }
    }
}

/// The images of a delta of a disk, and those below.
pub fn images_of(disk: &Opened, guid: Guid, force: bool) -> Result<Images> {
    let members = disk.members(guid, force)?;
    let base = match members.first() {
        Some(base) if base.header.is_none() => Format::Raw,
        Some(_) | None => Format::Ploop1,
    };
    Ok(Images {
        paths: members.into_iter().map(|m| m.path).collect(),
        base,
    })
}

fn of_disk(disk: &mut Opened, live: &Live, args: &BackupArgs, freeze: Freeze) -> Result<Point> {
    if args.temporary.is_some() {
        let what = "--temporary is for a device without a descriptor";
        let hint = "the images of a disk with one are beside it: make space there";
        return Err(Error::new(Code::Param, what).hint(hint));
    }
    let uuid = disk.snapshot(live, None, freeze)?;
    // A kill from here on leaves one that 'ploopctl recover' removes.
    let images = disk
        .mark_temporary(uuid)
        .and_then(|()| images_of(disk, uuid, true));
    match images {
        Ok(images) => Ok(Point {
            images,
            made: Made::Snapshot(uuid),
        }),
        Err(e) => match disk.delete(live, uuid) {
            Ok(_) => Err(e),
            Err(left) => Err(e.hint(format!(
                "and the snapshot {uuid} that was made for the backup is left: {}",
                left.without_hint()
            ))),
        },
    }
}

fn of_device(device: &Device, args: &BackupArgs, live: &Live, freeze: Freeze) -> Result<Point> {
    let at = device.device.display();
    let Some(top) = device.top().filter(|_| device.running) else {
        let what = format!("{at} is not running");
        return Err(Error::new(Code::NotAttached, what));
    };
    let paths = device
        .deltas
        .iter()
        .map(|d| d.reachable().map(PathBuf::from));
    let paths: Vec<PathBuf> = paths.collect::<Result<_>>()?;
    let base = match device.deltas.first() {
        Some(base) if base.format == "raw" => Format::Raw,
        Some(_) | None => Format::Ploop1,
    };
    let cluster = create::cluster_size(device.cluster_size)?;
    if device.size % cluster.bytes() != 0 && top.format == "raw" {
        let what = format!("{at} ends inside a cluster, and no snapshot of it can be made");
        return Err(Error::new(Code::Param, what)
            .hint("detach it, and back up the image, or make it larger: 'ploopctl resize'"));
    }
    let top = top.reachable()?;
    let path = interim::name(top, args.temporary.as_deref())?;
    make_empty(&path, device, cluster)?;
    interim::leave_link(top, &path);
    let delta = NewDelta {
        path: &path,
        cluster_log: cluster.log_sectors(),
        is_raw: false,
    };
    if let Err(e) = live.snapshot(device, delta, freeze) {
        // The kernel may have taken it all the same.
        let is_taken = now(device).is_ok_and(|d| d.delta_of(&path).is_some());
        if !is_taken {
            let _ = interim::remove(top, &path);
            return Err(e);
        }
        let what = format!("all the same, {at} writes to {} now", path.display());
        return Err(e.hint(what));
    }
    must_be_right_above(device, &paths, &path, args.bwlimit)?;
    Ok(Point {
        images: Images { paths, base },
        made: Made::Image(path),
    })
}

/// The new top `path` has to be right above `paths`: those are what is read. A device without a
/// descriptor has no lock, and another snapshot may have come between.
fn must_be_right_above(device: &Device, paths: &[PathBuf], path: &Path, rate: u64) -> Result<()> {
    let found = now(device)?;
    let are_same = found.deltas.len() == paths.len() + 1
        && found
            .deltas
            .iter()
            .zip(paths)
            .all(|(d, p)| found.delta_of(p) == Some(d));
    if are_same {
        return Ok(());
    }
    let what = format!(
        "another snapshot of {} was made at the same moment",
        device.device.display()
    );
    let error = Error::new(Code::Busy, what).hint("try again when nothing else works on it");
    let level = found.delta_of(path).map(|d| d.level);
    let below = level.and_then(|l| found.deltas.iter().find(|d| d.level + 1 == l));
    match below.map(|d| merge(device, path, d.reachable()?, rate)) {
        None | Some(Ok(())) => Err(error),
        Some(Err(left)) => Err(error.hint(left.to_string())),
    }
}

fn make_empty(path: &Path, device: &Device, cluster: ClusterSize) -> Result<()> {
    let is_v1 = device.deltas.iter().any(|d| d.format != "raw") && device.format_version == 1;
    let version = if is_v1 { Version::V1 } else { Version::V2 };
    let header = Header::new(version, cluster, device.size / SECTOR_BYTES);
    let header = header.map_err(|p| {
        let at = device.device.display();
        Error::new(
            Code::Create,
            format!("no image fits on the top of {at}: {p}"),
        )
    })?;
    create::ploop1(path, header, Space::Thin)
}

/// The device as it is now.
fn now(device: &Device) -> Result<Device> {
    let found = Sysfs::default().device(device.index)?;
    found.ok_or_else(|| {
        let what = format!("{} is gone", device.device.display());
        Error::new(Code::NotAttached, what)
    })
}

/// Merges the image `path`, the top of `device`, into that which was the top before, and removes it.
fn merge(device: &Device, path: &Path, old_top: &Path, rate: u64) -> Result<()> {
    let (at, image) = (device.device.display(), path.display());
    let lost = |e: Error| {
        e.hint(format!(
            "{image} holds what was written since the backup began: attach {} with it, then 'ploopctl \
             merge' the two",
            old_top.display()
        ))
    };
    let left = |e: Error| {
        e.hint(format!(
            "{at} goes on with the image {image}, which belongs to it now: 'ploopctl merge {at}' merges \
             it away, then it can be removed"
        ))
    };
    let found = now(device).map_err(lost)?;
    if let Some(level) = found.delta_of(path).map(|d| d.level) {
        operate::run(&found, Operation::Merge { level }, rate).map_err(left)?;
    }
    // The number may be another device's by now.
    let found = now(device).map_err(lost)?;
    if found.delta_of(path).is_some() {
        let what = format!("{at} still has {image}");
        return Err(left(Error::new(Code::Busy, what)));
    }
    let below = found.delta_of(old_top);
    if below.is_none() || below != found.top() {
        let what = format!("{at} does not have {image} any more, nor what was below it");
        return Err(lost(Error::new(Code::NotAttached, what)));
    }
    interim::remove(old_top, path).map_err(|e| {
        Error::io(
            Code::Unlink,
            format!("cannot remove {image}, which is merged"),
            e,
        )
    })
}

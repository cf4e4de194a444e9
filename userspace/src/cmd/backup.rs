// SPDX-License-Identifier: GPL-2.0
//! `ploopctl backup`.
//!
//! The order of a backup of what is attached: the new checkpoint is armed; the snapshot starts it;
//! what the old checkpoint noted is read, which is at least all that was written up to the snapshot;
//! the file is written and gets its name; the snapshot is merged away; the old checkpoint is dropped.
//! What fails before the file has its name is undone. From then on the backup is good, and the old
//! checkpoint is not needed any more, whatever becomes of the rest.

pub mod interim;
mod point;

use super::attached;
use crate::backup::read::{self, Reader};
use crate::backup::wire::{Header, Totals, FEATURE_ZSTD};
use crate::backup::write::Writer;
use crate::backup::{chain, restore, take, Pace, Source, Wanted};
use crate::checkpoint::{self, Written};
use crate::cli::{
    BackupArgs, BackupCommand, BackupFullArgs, BackupIncrementalArgs, BackupRestoreArgs,
    BackupVerifyArgs, RestoredFormat,
};
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use crate::offline::{Chain, Progress, State, Target};
use crate::output;
use crate::progress::Shown;
use crate::signals::Quiet;
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use ploop_pure::layout::ploop1::Version;
use point::{images_of, Images, Subject};
use serde::Serialize;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const BUFFER_BYTES: usize = 1 << 20;

/// Runs the command.
pub fn run(command: &BackupCommand) -> Result<()> {
    match command {
        BackupCommand::Full(args) => full(args),
        BackupCommand::Incremental(args) => incremental(args),
        BackupCommand::Verify(args) => verify(args),
        BackupCommand::Restore(args) => restore(args),
    }
}

/// A backup as JSON shows it.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(serialize_with = "output::path")]
    file: &'a Path,
    /// `full` or `incremental`.
    kind: &'static str,
    uuid: Guid,
    parent: Option<Guid>,
    checkpoint: Option<Guid>,
    /// Seconds since 1970.
    time: u64,
    disk_size: u64,
    cluster_size: u32,
    /// Bytes of the disk that it has, and of zeros that it tells of.
    data: u64,
    zeros: u64,
    /// Length of the file.
    length: u64,
}

impl<'a> Row<'a> {
    fn new(file: &'a Path, header: &Header, totals: &Totals) -> Self {
        Self {
            file,
            kind: match header.parent {
                None => "full",
                Some(_) => "incremental",
            },
            uuid: Guid::from_bytes(header.id),
            parent: header.parent.map(Guid::from_bytes),
            checkpoint: header.checkpoint.map(Guid::from_bytes),
            time: header.time,
            disk_size: header.disk_bytes,
            cluster_size: header.cluster_bytes,
            data: totals.data,
            zeros: totals.zeros,
            length: totals.length,
        }
    }

    fn describe(&self) -> String {
        let of = match self.parent {
            None => "full".to_owned(),
            Some(parent) => format!("incremental to {parent}"),
        };
        format!(
            "{}: backup {} of {}, {of}; {} of {}, {} long",
            self.file.display(),
            self.uuid,
            utc(self.time),
            human(self.data),
            human(self.disk_size),
            human(self.length)
        )
    }
}

/// `2026-01-31 12:00:00 UTC`.
fn utc(time: u64) -> String {
    let (days, second) = (time / 86400, time % 86400);
    // Years that begin in March have their leap day at the end; 719468 days from March of year 0.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..=9 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

fn full(args: &BackupFullArgs) -> Result<()> {
    must_be_new(&args.file)?;
    let job = Job {
        args: &args.how,
        file: &args.file,
        parent: None,
    };
    let mut subject = match attached::subject(&args.target)? {
        attached::Subject::Disk(path) => Subject::disk(&path, &args.how)?,
        attached::Subject::Device(device) => Subject::Device(device),
        attached::Subject::Image => {
            let images = Images {
                paths: vec![args.target.clone()],
                base: args.format.into(),
            };
            attached::must_be_whole(&images.paths)?;
            return closed(&job, &images);
        }
    };
    match (subject.device()?, &subject) {
        (Some(device), _) => running(&job, &mut subject, &device),
        (None, Subject::Disk(disk)) => {
            let images = images_of(disk, disk.descriptor().disk().top, false)?;
            closed(&job, &images)
        }
        (None, Subject::Device(device)) => {
            let what = format!("{} is not attached", device.device.display());
            Err(Error::new(Code::NotAttached, what))
        }
    }
}

/// A backup that is to be made.
struct Job<'a> {
    args: &'a BackupArgs,
    file: &'a Path,
    parent: Option<Parent<'a>>,
}

/// What an incremental backup builds on.
struct Parent<'a> {
    path: &'a Path,
    header: Header,
    /// The checkpoint that was started with it.
    checkpoint: Guid,
    /// Bytes written since.
    dirty: u64,
    is_kept: bool,
}

fn incremental(args: &BackupIncrementalArgs) -> Result<()> {
    must_be_new(&args.file)?;
    let header = read::complete(&args.parent)?;
    let mut subject = match attached::subject(&args.target)? {
        attached::Subject::Disk(path) => Subject::disk(&path, &args.how)?,
        attached::Subject::Device(device) => Subject::Device(device),
        attached::Subject::Image => return Err(detached(&args.target)),
    };
    let Some(device) = subject.device()? else {
        return Err(detached(&args.target));
    };
    let parent = match parent_of(args, header, &device) {
        Ok(parent) => Some(parent),
        Err(e) if e.code() == Code::NoCheckpoint && args.full_if_needed => {
            output::note(&format!("note: the backup is full: {}", e.without_hint()));
            None
        }
        Err(e) => return Err(e),
    };
    let job = Job {
        args: &args.how,
        file: &args.file,
        parent,
    };
    running(&job, &mut subject, &device)
}

fn detached(target: &Path) -> Error {
    let what = format!(
        "{} is not attached: what was written to it is known only then",
        target.display()
    );
    Error::new(Code::NotAttached, what).hint("attach it, or run 'ploopctl backup full'")
}

/// Whether `device` knows what was written since the parent.
fn parent_of<'a>(
    args: &'a BackupIncrementalArgs,
    header: Header,
    device: &Device,
) -> Result<Parent<'a>> {
    let (file, at) = (args.parent.display(), device.device.display());
    let unknown = |what: String| {
        Error::new(Code::NoCheckpoint, what)
            .hint("run 'ploopctl backup full', or add --full-if-needed")
    };
    let Some(id) = header.checkpoint.map(Guid::from_bytes) else {
        return Err(unknown(format!(
            "{file} is of a disk that was not attached: what was written since is not known"
        )));
    };
    if header.disk_bytes != device.size {
        return Err(unknown(format!(
            "{file} is of a disk of {} bytes, {at} has {}",
            header.disk_bytes, device.size
        )));
    }
    match checkpoint::find(device, id)? {
        Some(found) => Ok(Parent {
            path: &args.parent,
            header,
            checkpoint: id,
            dirty: found.dirty,
            is_kept: args.keep,
        }),
        None => Err(checkpoint::gone(device, id)),
    }
}

/// An existing file is refused before anything is done.
fn must_be_new(file: &Path) -> Result<()> {
    if file.symlink_metadata().is_ok() {
        return Err(create::exists(file));
    }
    Ok(())
}

fn new_id() -> Result<Guid> {
    Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))
}

/// Seconds since 1970.
fn seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |d| d.as_secs())
}

impl Job<'_> {
    /// The header but for what the images say.
    fn header(&self, checkpoint: Option<Guid>) -> Result<Header> {
        let id = new_id()?.bytes();
        let parent = self.parent.as_ref().map(|p| &p.header);
        Ok(Header {
            features: if self.args.compress { FEATURE_ZSTD } else { 0 },
            disk_bytes: 0,
            cluster_bytes: 0,
            id,
            parent: parent.map(|p| p.id),
            base: parent.map_or(id, |p| p.base),
            checkpoint: checkpoint.map(Guid::bytes),
            time: seconds(),
        })
    }

    fn tell(&self, (header, totals): &(Header, Totals)) -> Result<()> {
        let row = Row::new(self.file, header, totals);
        if self.args.json {
            return output::json(&row);
        }
        output::text(&format!("{}\n", row.describe()))
    }
}

/// A backup of what is attached.
fn running(job: &Job<'_>, subject: &mut Subject, device: &Device) -> Result<()> {
    // Who ends the program is heard while data is read; what is begun is undone.
    let _quiet = Quiet::begin();
    let own = new_id()?;
    let header = job.header(Some(own))?;
    checkpoint::arm(device, own)?;
    let point = match subject.snapshot(job.args) {
        Ok(point) => point,
        Err(e) => return Err(disarm(device, own, e)),
    };
    let written = match &job.parent {
        None => write(job, &point.images, State::Attached, header, Wanted::All),
        Some(parent) => Written::since(device, parent.checkpoint).and_then(|mut ranges| {
            let wanted = Wanted::These(&mut ranges);
            write(job, &point.images, State::Attached, header, wanted)
        }),
    };
    let ended = subject.end(&point, job.args);
    match (written, ended) {
        (Ok(done), ended) => {
            drop_old(device, job.parent.as_ref());
            job.tell(&done)?;
            if ended.is_err() {
                let what = format!("note: the backup {} is complete", job.file.display());
                output::note(&what);
            }
            ended
        }
        (Err(e), ended) => {
            if let Err(left) = ended {
                output::note(&format!("ploopctl: {left}"));
            }
            Err(disarm(device, own, e))
        }
    }
}

/// Drops the checkpoint of a backup that was not made.
fn disarm(device: &Device, id: Guid, e: Error) -> Error {
    match checkpoint::drop(device, id) {
        Ok(_) => e,
        Err(left) => {
            output::note(&format!(
                "note: the checkpoint {id} of {} is left: {}",
                device.device.display(),
                left.without_hint()
            ));
            e
        }
    }
}

/// The checkpoint of the parent is not needed any more.
fn drop_old(device: &Device, parent: Option<&Parent<'_>>) {
    let Some(parent) = parent.filter(|p| !p.is_kept) else {
        return;
    };
    if let Err(e) = checkpoint::drop(device, parent.checkpoint) {
        output::note(&format!(
            "note: the checkpoint {} of {} is left: {}",
            parent.checkpoint,
            parent.path.display(),
            e.without_hint()
        ));
    }
}

/// A full backup of what nobody has attached.
fn closed(job: &Job<'_>, images: &Images) -> Result<()> {
    for path in &images.paths {
        if let Some(device) = Sysfs::default().find_image(path)?.first() {
            return Err(crate::disk::in_use(path, device));
        }
    }
    let header = job.header(None)?;
    let done = write(job, images, State::Closed, header, Wanted::All)?;
    job.tell(&done)
}

impl Source for Chain<'_> {
    fn size_bytes(&self) -> u64 {
        Chain::size_bytes(self)
    }

    fn next_data(&mut self, from: u64) -> Result<u64> {
        Chain::next_data(self, from)
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        Chain::read(self, at, bytes)
    }
}

/// Writes the file, which is there complete and durable, or not at all.
fn write(
    job: &Job<'_>,
    images: &Images,
    state: State,
    header: Header,
    wanted: Wanted<'_>,
) -> Result<(Header, Totals)> {
    let file = job.file;
    let opened = images.paths.iter().map(|p| Image::open(p, Access::Read));
    let opened: Vec<Image> = opened.collect::<Result<_>>()?;
    let locks = opened
        .iter()
        .map(|image| ImageLock::take(image.file(), image.path(), Use::Read));
    let _locks: Vec<ImageLock<'_>> = locks.collect::<Result<_>>()?;
    let mut source = Chain::new(&opened, images.base, state)?;
    let header = Header {
        disk_bytes: source.size_bytes(),
        cluster_bytes: u32::try_from(source.cluster().bytes()).unwrap_or(u32::MAX),
        ..header
    };
    let parent = job.parent.as_ref();
    if parent.is_some_and(|p| p.header.disk_bytes != header.disk_bytes) {
        let what = "the disk has changed its size meanwhile: the next backup has to be full";
        return Err(Error::new(Code::NoCheckpoint, what));
    }
    let mut progress = Shown::new();
    let mut totals = Totals::default();
    let total = parent.map_or(header.disk_bytes, |p| p.dirty);
    progress.begin("backing up", total);
    let made = create::make(file, |out| {
        let out = BufWriter::with_capacity(BUFFER_BYTES, out);
        let mut writer = Writer::new(out, file, &header)?;
        let mut pace = Pace::new(job.args.bwlimit);
        take(&mut source, wanted, &mut writer, &mut pace, &mut progress)?;
        totals = writer.finish()?;
        Ok(())
    });
    progress.end();
    made.map(|()| (header, totals))
}

#[derive(Serialize)]
struct Verified<'a> {
    /// In the order of the chain.
    backups: Vec<Row<'a>>,
    /// It begins with a full backup.
    complete: bool,
}

fn verify(args: &BackupVerifyArgs) -> Result<()> {
    let mut progress = Shown::new();
    let mut found = Vec::new();
    let len = |p: &PathBuf| std::fs::metadata(p).map_or(0, |m| m.len());
    progress.begin("verifying", args.files.iter().map(len).sum());
    let read = args.files.iter().try_for_each(|path| {
        let mut reader = Reader::open(path)?;
        chain::read_through(&mut reader, &mut progress)?;
        found.push((path.as_path(), *reader.header(), reader.totals()));
        Ok(())
    });
    progress.end();
    read?;
    let headers: Vec<_> = found
        .iter()
        .map(|(path, header, _)| (*path, *header))
        .collect();
    let order = chain::arrange(&headers)?;
    let rows: Vec<_> = order
        .iter()
        .map(|i| &found[*i])
        .map(|(path, header, totals)| Row::new(path, header, totals))
        .collect();
    let complete = rows.first().is_some_and(|r| r.parent.is_none());
    if args.json {
        return output::json(&Verified {
            backups: rows,
            complete,
        });
    }
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        text += &format!("{}. {}\n", i + 1, row.describe());
    }
    let what = output::count(rows.len() as u64, "backup");
    text += &format!("{what}, sound.\n");
    if !complete {
        output::note("note: the full backup is not among them, and is needed to restore");
    }
    output::text(&text)
}

#[derive(Serialize)]
struct Restored<'a> {
    #[serde(serialize_with = "output::path")]
    image: &'a Path,
    /// The backup that the image is of, and its number in the chain.
    uuid: Guid,
    point: usize,
    time: u64,
    size: u64,
}

fn restore(args: &BackupRestoreArgs) -> Result<()> {
    let target = match args.format {
        RestoredFormat::Raw => Target::Raw(Space::Thin),
        RestoredFormat::Ploop1 => Target::Ploop1 {
            version: Version::V2,
            cluster: None,
            space: Space::Thin,
        },
    };
    must_be_new(&args.to)?;
    let mut progress = Shown::new();
    let (point, header) =
        restore::restore(&args.files, args.point, &args.to, target, &mut progress)?;
    let uuid = Guid::from_bytes(header.id);
    if args.json {
        return output::json(&Restored {
            image: &args.to,
            uuid,
            point,
            time: header.time,
            size: header.disk_bytes,
        });
    }
    output::text(&format!(
        "{}: the disk of {}, backup {uuid}\n",
        args.to.display(),
        utc(header.time)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (time, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(time), want);
        }
    }
}

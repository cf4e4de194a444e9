// SPDX-License-Identifier: GPL-2.0
//! `ploopctl map`.

use super::{Target, LAGS};
use crate::cli::TargetArgs;
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use crate::output::{self, SCHEMA};
use crate::sysfs::Sysfs;
use ploop_pure::check::Length;
use ploop_pure::extent::{Run, Runs};
use ploop_pure::layout::ploop1::Header;
use ploop_pure::problem::Problem;
use ploop_pure::units::{Cluster, ImageCluster, SECTOR_BYTES};
use serde::Serialize;
use std::io::Write;
use std::path::Path;

/// A run in bytes.
#[derive(Serialize)]
struct Row {
    start: u64,
    length: u64,
    /// Where it is in the image; `null` for a hole, which reads as zeros.
    offset: Option<u64>,
}

/// Runs the command.
pub fn run(args: &TargetArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    let (path, device) = match Target::resolve(&args.target, &sysfs)? {
        Target::Device(device) => match device.top() {
            Some(top) => (top.reachable()?.to_owned(), Some(device)),
            None => {
                let what = format!("{} has no image", device.device.display());
                return Err(Error::new(Code::NotAttached, what));
            }
        },
        Target::Disk(path) => {
            let what = format!("{} is a disk of several images", path.display());
            return Err(Error::new(Code::Param, what).hint("give one of its images"));
        }
        Target::Image(path) => {
            let device = sysfs.find_image(&path)?.into_iter().next().map(Box::new);
            (path, device)
        }
    };
    let is_running = device.as_ref().is_some_and(|d| d.running);
    let image = Image::open(&path, Access::Read)?;
    if !image.has_magic()? {
        let what = format!("{} is not a ploop1 image", path.display());
        return Err(
            Error::new(Code::NotAnImage, what).hint("a raw image maps every byte to itself")
        );
    }
    let (header, length, _) = image.good_header()?;
    // Only a sound map is shown, and nothing is shown of another: hence two scans.
    let whole = Whole {
        image,
        header,
        length,
        is_running,
    };
    whole.walk(&mut |_| Ok(()))?;
    if is_running {
        output::note(&format!("note: {LAGS}"));
    }
    if args.json {
        json(&whole)
    } else {
        text(&whole)
    }
}

/// An image that is mapped.
struct Whole {
    image: Image,
    header: Header,
    length: Length,
    /// It may change meanwhile.
    is_running: bool,
}

impl Whole {
    /// Gives every run of the disk to `sink`, holes included.
    fn walk(&self, sink: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
        let Self { image, header, .. } = self;
        let cluster = header.cluster;
        let size = header.size_sectors * SECTOR_BYTES;
        let mut emit = |run: Run| {
            let start = cluster.guest_offset(Cluster(run.cluster));
            // Entries past the end of the disk, and the part of the last cluster that is.
            let end = size.min(start + (u64::from(run.len) << cluster.log_bytes()));
            if start >= end {
                return Ok(());
            }
            sink(Row {
                start,
                length: end - start,
                offset: run.at.map(|at| cluster.offset(ImageCluster(at))),
            })
        };
        let mut runs = Runs::default();
        let mut next = 0;
        image.scan(header, self.length, &mut |at, entry| {
            let slot = match entry {
                Ok(slot) => slot,
                Err(Problem::EntryTorn { at, .. }) => ImageCluster(at),
                // The file grew since its length was taken.
                Err(Problem::EntryPastEnd { at, .. }) if self.has_now(ImageCluster(at))? => {
                    ImageCluster(at)
                }
                Err(problem) => return Err(damaged(image.path(), problem)),
            };
            for hole in next..at.0 {
                runs.push(hole, None).map_or(Ok(()), &mut emit)?;
            }
            next = at.0 + 1;
            runs.push(at.0, Some(slot.0)).map_or(Ok(()), &mut emit)
        })?;
        for hole in next..header.nr_entries {
            runs.push(hole, None).map_or(Ok(()), &mut emit)?;
        }
        runs.finish().map_or(Ok(()), emit)
    }

    /// Whether the image of a running device has grown to hold `at`.
    fn has_now(&self, at: ImageCluster) -> Result<bool> {
        let end = self.header.cluster.offset(at) + self.header.cluster.bytes();
        Ok(self.is_running && self.image.len_bytes()? >= end)
    }
}

fn damaged(path: &Path, problem: Problem) -> Error {
    let what = format!("{} is damaged: {problem}", path.display());
    let hint = format!("'ploopctl check {}' lists all problems", path.display());
    Error::new(Code::Damaged, what).hint(hint)
}

fn text(whole: &Whole) -> Result<()> {
    let mut out = output::stdout();
    writeln!(out, "{:<18} {:<18} IMAGE OFFSET", "START", "LENGTH").map_err(output::failed)?;
    whole.walk(&mut |row| {
        let (start, len) = (format!("{:#x}", row.start), format!("{:#x}", row.length));
        match row.offset {
            Some(offset) => writeln!(out, "{start:<18} {len:<18} {offset:#x}"),
            None => writeln!(out, "{start:<18} {len:<18} hole"),
        }
        .map_err(output::failed)
    })?;
    out.flush().map_err(output::failed)
}

/// Written piece by piece: a map can be larger than memory.
fn json(whole: &Whole) -> Result<()> {
    #[derive(Serialize)]
    struct Head<'a> {
        schema: u32,
        #[serde(serialize_with = "output::path")]
        image: &'a Path,
        size: u64,
        cluster_size: u64,
        lags: bool,
    }
    let head = serde_json::to_string(&Head {
        schema: SCHEMA,
        image: whole.image.path(),
        size: whole.header.size_sectors * SECTOR_BYTES,
        cluster_size: whole.header.cluster.bytes(),
        lags: whole.is_running,
    })
    .map_err(|e| Error::io(Code::System, "cannot write JSON", std::io::Error::from(e)))?;
    let mut out = output::stdout();
    // The runs are the last key of the object.
    let open = head.strip_suffix('}').unwrap_or(&head);
    write!(out, "{open},\"runs\":[").map_err(output::failed)?;
    let mut separator = "\n";
    whole.walk(&mut |row| {
        out.write_all(separator.as_bytes())
            .and_then(|()| serde_json::to_writer(&mut out, &row).map_err(Into::into))
            .map_err(output::failed)?;
        separator = ",\n";
        Ok(())
    })?;
    out.write_all(b"\n]}\n")
        .and_then(|()| out.flush())
        .map_err(output::failed)
}

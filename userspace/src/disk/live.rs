// SPDX-License-Identifier: GPL-2.0
//! The real kernel, and the real work on files.

use super::freeze::Frozen;
use super::outside::{Base, Freeze, NewDelta, Outside};
use crate::dev;
use crate::error::{Code, Error, Result};
use crate::image::create::Space;
use crate::offline::{self, Format, Zeros};
use crate::operate::{self, refused, Operation};
use crate::progress::Shown;
use crate::signals::Quiet;
use crate::sysfs::{Device, Sysfs};
use ploop_pure::abi;
use ploop_pure::units::SECTOR_BYTES;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// What there is outside, as it is.
#[derive(Debug, Default)]
pub struct Live {
    sysfs: Sysfs,
    /// Most bytes a second that the kernel copies; 0 is no limit.
    rate: u64,
}

impl Live {
    /// The same with a limit on what the kernel copies.
    pub fn limited(rate: u64) -> Self {
        let sysfs = Sysfs::default();
        Self { sysfs, rate }
    }
}

impl Outside for Live {
    fn devices(&self) -> Result<Vec<Device>> {
        self.sysfs.devices()
    }

    fn devices_of(&self, images: &[PathBuf]) -> Result<Vec<Device>> {
        self.sysfs.devices_of(images)
    }

    fn snapshot(&self, device: &Device, top: NewDelta<'_>, freeze: Freeze) -> Result<()> {
        let node = operate::open(device)?;
        let image = open_image(top.path, true)?;
        let flags = match freeze {
            Freeze::Yes => abi::FLAG_FS_SYNC,
            Freeze::No => 0,
        };
        // What is frozen is thawed, whatever happens.
        let _quiet = Quiet::begin();
        let _frozen = match freeze {
            Freeze::Yes => Frozen::stacked_on(&self.sysfs, device.index)?,
            Freeze::No => Frozen::default(),
        };
        let done = node.snapshot(delta(&image, top, flags));
        done.map_err(|e| refused(device, "make a snapshot of", e))
    }

    fn merge(&self, device: &Device, level: u32) -> Result<()> {
        operate::run(device, Operation::Merge { level }, self.rate).map(drop)
    }

    fn replace(&self, device: &Device, level: u32, with: NewDelta<'_>) -> Result<()> {
        let node = operate::open(device)?;
        let is_top = device.top().is_some_and(|t| t.level == level);
        let is_written = is_top && !device.read_only;
        let image = open_image(with.path, is_written)?;
        let flags = if is_written { 0 } else { abi::FLAG_RDONLY };
        let level = u8::try_from(level).map_err(|_| Error::new(Code::Param, "no such level"))?;
        let done = node.replace(level, delta(&image, with, flags));
        done.map_err(|e| refused(device, "replace an image of", e))
    }

    fn merge_files(&self, lower: &Path, kind: Base, upper: &Path) -> Result<()> {
        offline::merge(lower, format(kind), upper, &mut Shown::new()).map(drop)
    }

    fn grow(&self, device: &Device, sectors: u64) -> Result<()> {
        operate::run(device, Operation::Grow { sectors }, self.rate).map(drop)
    }

    fn grow_file(&self, path: &Path, kind: Base, sectors: u64) -> Result<()> {
        match kind {
            Base::Raw => offline::grow_raw(path, sectors.saturating_mul(SECTOR_BYTES), Space::Thin),
            Base::Ploop1 => offline::grow(path, sectors, &mut Shown::new()),
        }
        .map(drop)
    }

    fn compact(&self, device: &Device) -> Result<u64> {
        operate::run(device, Operation::Compact, self.rate).map(|s| s.freed)
    }

    fn compact_file(&self, path: &Path) -> Result<u64> {
        let done = offline::compact(path, Zeros::Keep, &mut Shown::new())?;
        Ok(done.len_before.saturating_sub(done.len))
    }

    fn settle(&self, device: &Device) -> Result<()> {
        operate::settle(device)
    }
}

fn format(kind: Base) -> Format {
    match kind {
        Base::Raw => Format::Raw,
        Base::Ploop1 => Format::Ploop1,
    }
}

fn delta<'a>(image: &'a std::fs::File, new: NewDelta<'_>, flags: u32) -> dev::Delta<'a> {
    dev::Delta {
        image: image.as_fd(),
        format: if new.is_raw {
            abi::FORMAT_RAW
        } else {
            abi::FORMAT_PLOOP1
        },
        flags,
        cluster_log: new.cluster_log,
        cookie: None,
    }
}

fn open_image(path: &Path, is_written: bool) -> Result<std::fs::File> {
    let open = OpenOptions::new().read(true).write(is_written).open(path);
    open.map_err(|e| Error::io(Code::Open, format!("cannot open {}", path.display()), e))
}

// SPDX-License-Identifier: GPL-2.0
//! The real kernel, and the real work on files.

use super::freeze::Frozen;
use super::outside::{Base, Freeze, NewDelta, Outside};
use crate::dev;
use crate::error::{Code, Error, Result};
use crate::image::create::Space;
use crate::offline::{self, Format, Go, Progress, Zeros};
use crate::progress::Shown;
use crate::signals::Quiet;
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;
use ploop_pure::abi::{self, OpStart, OpStatus};
use ploop_pure::units::SECTOR_BYTES;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// Between two looks at how far an operation is.
const PAUSE: Duration = Duration::from_millis(200);

/// What there is outside, as it is.
#[derive(Debug, Default)]
pub struct Live {
    sysfs: Sysfs,
}

impl Outside for Live {
    fn devices(&self) -> Result<Vec<Device>> {
        self.sysfs.devices()
    }

    fn snapshot(&self, device: &Device, top: NewDelta<'_>, freeze: Freeze) -> Result<()> {
        let node = open(device)?;
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
        let what = format!("merging level {level} of {}", device.device.display());
        operate(device, &OpStart::new(abi::OP_MERGE, level, 0), &what).map(drop)
    }

    fn replace(&self, device: &Device, level: u32, with: NewDelta<'_>) -> Result<()> {
        let node = open(device)?;
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
        let what = format!("growing {}", device.device.display());
        operate(device, &OpStart::new(abi::OP_GROW, 0, sectors), &what).map(drop)
    }

    fn grow_file(&self, path: &Path, kind: Base, sectors: u64) -> Result<()> {
        match kind {
            Base::Raw => offline::grow_raw(path, sectors.saturating_mul(SECTOR_BYTES), Space::Thin),
            Base::Ploop1 => offline::grow(path, sectors, &mut Shown::new()),
        }
        .map(drop)
    }

    fn compact(&self, device: &Device) -> Result<u64> {
        let what = format!("compacting {}", device.device.display());
        operate(device, &OpStart::new(abi::OP_COMPACT, 0, 0), &what).map(|s| s.freed)
    }

    fn compact_file(&self, path: &Path) -> Result<u64> {
        let done = offline::compact(path, Zeros::Keep, &mut Shown::new())?;
        Ok(done.len_before.saturating_sub(done.len))
    }

    fn settle(&self, device: &Device) -> Result<()> {
        let node = open(device)?;
        // A module without long operations has none.
        while node.op_status().is_ok_and(|s| s.state == abi::OP_RUNNING) {
            sleep(PAUSE);
        }
        Ok(())
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

fn open(device: &Device) -> Result<dev::Device> {
    dev::Device::open(device.index).map_err(|e| {
        let what = format!("cannot open {}", device.device.display());
        Error::io(Code::DeviceOpen, what, e).hint("only root may: run it with sudo")
    })
}

fn open_image(path: &Path, is_written: bool) -> Result<std::fs::File> {
    let open = OpenOptions::new().read(true).write(is_written).open(path);
    open.map_err(|e| Error::io(Code::Open, format!("cannot open {}", path.display()), e))
}

fn refused(device: &Device, what: &str, e: Errno) -> Error {
    let at = device.device.display();
    let error = Error::io(
        Code::DeviceIoctl,
        format!("the kernel refused to {what} {at}"),
        e,
    );
    match e {
        Errno::EBUSY => error.hint("another operation is going on, or somebody holds the image"),
        Errno::ENOTTY => error.hint("the loaded module is older than this tool"),
        Errno::EPERM => error.hint("only root may: run it with sudo"),
        _ => error.hint("'dmesg' may say more"),
    }
}

/// Runs a long operation to its end, or goes on waiting for it if it runs already. Ctrl-C ends it
/// early and cleanly.
pub fn operate(device: &Device, start: &OpStart, what: &str) -> Result<OpStatus> {
    let node = open(device)?;
    let mut shown = Shown::new();
    let serial = match node.op_start(start) {
        Ok(serial) => serial,
        Err(Errno::EBUSY) => adopt(device, &node, start)?,
        Err(e) => return Err(refused(device, "begin", e)),
    };
    let mut told = None;
    let mut is_cancelled = false;
    let status = loop {
        let status = node
            .op_status()
            .map_err(|e| refused(device, "tell the progress of", e))?;
        if status.serial != serial || status.state != abi::OP_RUNNING {
            break status;
        }
        tell(&mut shown, what, &mut told, &status);
        if !is_cancelled && shown.go() != Go::On {
            is_cancelled = true;
            // Nothing to cancel: it is over.
            let _ = node.op_cancel();
            continue;
        }
        sleep(PAUSE);
    };
    shown.end();
    if status.serial != serial {
        let what = format!("{what}: another operation began before its end was seen");
        return Err(Error::new(Code::Busy, what));
    }
    match Errno::from_raw(status.result.saturating_neg()) {
        _ if status.result == 0 => Ok(status),
        Errno::ECANCELED | Errno::EINTR => Err(Error::new(
            Code::Aborted,
            format!("{what}: ended early, as asked"),
        )),
        e => {
            Err(Error::io(Code::DeviceIoctl, format!("{what} failed"), e)
                .hint("'dmesg' may say more"))
        }
    }
}

/// Shows how far it is; `told` is how far it was, once the total is known.
fn tell(shown: &mut Shown, what: &str, told: &mut Option<u64>, status: &OpStatus) {
    if status.total == 0 {
        return;
    }
    let before = *told.get_or_insert_with(|| {
        shown.begin(what, status.total);
        0
    });
    shown.advance(status.done.saturating_sub(before));
    *told = Some(status.done.max(before));
}

/// The number of the operation that keeps ours from beginning, if it is the same.
fn adopt(device: &Device, node: &dev::Device, start: &OpStart) -> Result<u64> {
    let busy = || refused(device, "begin", Errno::EBUSY);
    let status = node.op_status().map_err(|_| busy())?;
    let top = device.top().map_or(0, |t| t.level);
    let level = |l: u32| if l == abi::LEVEL_TOP { top } else { l };
    let is_same = status.op == start.op && level(status.level) == level(start.level);
    if status.state == abi::OP_RUNNING && is_same {
        return Ok(status.serial);
    }
    Err(busy())
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl detach`: stop, drop the images, remove the device. Begun anywhere in between, it
//! goes on from there.

use super::attached::{self, of_image};
use super::{control, Target};
use crate::cli::DetachArgs;
use crate::disk::intent::{Intent, Operation};
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::locks::Turn;
use crate::operate;
use crate::output;
use crate::signals::Quiet;
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;
use std::path::Path;

/// `ptune/on_full` with which writes do not wait for space.
pub const FAIL: &str = "fail";
/// With which they do.
pub const WAIT: &str = "wait";

/// Runs the command.
pub fn run(args: &DetachArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    if args.force {
        let device = attached::device(&args.target)?;
        // Nothing is lost for a detach that cannot be.
        let users = control::settled_users(&sysfs, device.index)?;
        if !users.is_empty() {
            return Err(in_use(&device, &users));
        }
        // Ended in between, it would leave a device whose writes fail.
        let _quiet = Quiet::begin();
        return Forced::begin(&sysfs, &device)?.restore_after(orderly(&sysfs, args));
    }
    orderly(&sysfs, args)
}

fn orderly(sysfs: &Sysfs, args: &DetachArgs) -> Result<()> {
    let device = match Target::resolve(&args.target, sysfs)? {
        Target::Device(device) => *device,
        Target::Image(path) => of_image(sysfs, &path)?,
        Target::Disk(path) if is_left_for_later(&path, args) => attached::device(&path)?,
        Target::Disk(path) => return of_disk(&path, args),
    };
    match disk_of(&device, args) {
        Ok(Some(disk)) => from_disk(sysfs, disk, &device),
        Ok(None) => device_cleanly(sysfs, &device),
        Err(e) if args.force => {
            output::note(&format!("note: {e}"));
            device_cleanly(sysfs, &device)
        }
        Err(e) => Err(e.or_hint("--force detaches the device all the same")),
    }
}

/// The disk that `device` writes to: what is unfinished there is told by the device, and by nothing
/// when it is gone. One that only reads tells nothing, and may go while others have the locks; one
/// that is busy is refused by the kernel.
fn disk_of(device: &Device, args: &DetachArgs) -> Result<Option<Opened>> {
    if device.read_only || device.maintenance != "off" {
        return Ok(None);
    }
    let path = attached::descriptor_of(device)?;
    path.filter(|path| !is_left_for_later(path, args))
        .map(|path| super::disk::open(&path, &Live::default(), Work::Short, &args.wait))
        .transpose()
}

/// What is forced does not begin again what it has just ended. The images tell as much of it as the
/// device.
fn is_left_for_later(path: &Path, args: &DetachArgs) -> bool {
    let is_long = |intent: &Intent| match intent.operation {
        Operation::Merge { .. } | Operation::Grow { .. } => true,
        Operation::Snapshot { .. }
        | Operation::Switch { .. }
        | Operation::Delete { .. }
        | Operation::Replace { .. } => false,
    };
    args.force && matches!(Intent::load(path), Ok(Some(i)) if is_long(&i))
}

/// What was done to a device so that nothing holds it up.
struct Forced<'a> {
    sysfs: &'a Sysfs,
    device: &'a Device,
    /// What its writes did before that found no space.
    on_full: Option<String>,
}

impl<'a> Forced<'a> {
    /// Ends what it does for long, which a command may wait for that has the locks of its disk, and
    /// the waiting of its writes.
    fn begin(sysfs: &'a Sysfs, device: &'a Device) -> Result<Self> {
        let before = sysfs.on_full(device.index).ok();
        let on_full = before.filter(|now| device.running && now != FAIL);
        if on_full.is_some() {
            sysfs.set_on_full(device.index, FAIL).map_err(|e| {
                let what = format!("cannot let writes of {} fail", device.device.display());
                Error::io(Code::Sysfs, what, e).hint("only root may: run it with sudo")
            })?;
        }
        let forced = Self {
            sysfs,
            device,
            on_full,
        };
        let ended = match device.running {
            true => operate::cancel(device),
            false => Ok(false),
        };
        match ended {
            Ok(true) => output::note(&format!(
                "note: the {} of {} was ended early",
                device.maintenance,
                device.device.display()
            )),
            Ok(false) => {}
            Err(e) => forced.restore_after(Err(e))?,
        }
        Ok(forced)
    }

    /// A device that is not detached goes on as before.
    fn restore_after(&self, detached: Result<()>) -> Result<()> {
        if let (Err(_), Some(before)) = (&detached, &self.on_full) {
            // Best effort: if the device is gone there is nothing to go on.
            let _ = self.sysfs.set_on_full(self.device.index, before);
        }
        detached
    }
}

fn of_disk(path: &Path, args: &DetachArgs) -> Result<()> {
    let live = Live::default();
    let disk = super::disk::open(path, &live, Work::Short, &args.wait)?;
    let sysfs = Sysfs::default();
    let top = disk.file(disk.descriptor().top())?;
    let users = disk.users(&live)?;
    let device = match users.writers.into_iter().next() {
        Some(device) => device,
        None => of_image(&sysfs, &top)?,
    };
    from_disk(&sysfs, disk, &device)
}

/// Detaches `device` of a disk, and writes down what its lower images are now.
fn from_disk(sysfs: &Sysfs, mut disk: Opened, device: &Device) -> Result<()> {
    device_cleanly(sysfs, device)?;
    if disk.users(&Live::default())?.writers.is_empty() {
        if let Err(e) = disk.record_lower() {
            // It is detached all the same.
            output::note(&format!(
                "note: {} is detached; {e}",
                device.device.display()
            ));
        }
    }
    Ok(())
}

/// Detaches a device.
pub fn device_cleanly(sysfs: &Sysfs, device: &Device) -> Result<()> {
    let _turn = Turn::take()?;
    let control = control::open_any()?;
    let node = control::open_node(device.index)?;
    // It was looked for before others were waited for.
    let now = sysfs.device(device.index)?;
    if now.is_some_and(|now| !now.deltas.is_empty() && !now.shares_image_with(device)) {
        let what = format!("{} is another device by now", device.device.display());
        return Err(Error::new(Code::NotAttached, what));
    }
    let stopped = match control::while_busy(|| node.stop()) {
        // Not running: a tool was killed before START or after STOP.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        // It may have stopped, but without closing its image. That is said at the end.
        Err(e) if e != Errno::EBUSY && has_stopped(sysfs, device)? => Err(unclean(device, e)),
        Err(e) => return Err(refused(sysfs, device, "stop", e)),
    };
    control::while_busy(|| node.clear()).map_err(|e| refused(sysfs, device, "clear", e))?;
    drop(node);
    control::remove(&control, device.index).map_err(|e| refused(sysfs, device, "remove", e))?;
    stopped
}

fn has_stopped(sysfs: &Sysfs, device: &Device) -> Result<bool> {
    Ok(sysfs.device(device.index)?.is_some_and(|d| !d.running))
}

fn unclean(device: &Device, e: Errno) -> Error {
    let image = device.top().map(|t| t.image.display().to_string());
    let image = image.unwrap_or_default();
    let at = device.device.display();
    let message = format!("{at} is detached, but its image {image} could not be closed cleanly");
    Error::io(Code::DeviceIoctl, message, e).hint(format!(
        "what was written last may be missing; 'dmesg' says why, 'ploopctl check {image}' what is left"
    ))
}

fn refused(sysfs: &Sysfs, device: &Device, what: &str, e: Errno) -> Error {
    let at = device.device.display();
    if e != Errno::EBUSY {
        let message = format!("the kernel failed to {what} {at}");
        return Error::io(Code::DeviceIoctl, message, e).hint("'dmesg' may say more");
    }
    let now = sysfs.device(device.index).ok().flatten();
    if let Some(now) = now.filter(|d| d.maintenance != "off") {
        if now.maintenance == "track" {
            let message = format!("{at} is busy: it is being copied");
            return Error::new(Code::Busy, message).hint(format!(
                "end the 'ploopctl copy send' that copies it; 'ploopctl copy thaw {at}' ends what one \
                 that was killed has left"
            ));
        }
        let message = format!("{at} is busy: its images are changed ({})", now.maintenance);
        return Error::new(Code::Busy, message).hint(format!(
            "'ploopctl op status {at}' shows how far it is, 'ploopctl op wait {at}' waits, \
             'ploopctl detach --force {at}' ends it early, which loses nothing"
        ));
    }
    let mut users = control::users(sysfs, device.index);
    if users.is_empty() {
        users.push("open somewhere that cannot be seen from here".to_owned());
    }
    in_use(device, &users)
}

fn in_use(device: &Device, users: &[String]) -> Error {
    let message = format!(
        "{} is in use: {}",
        device.device.display(),
        users.join(", ")
    );
    Error::new(Code::Busy, message).hint("unmount it or end its users, then detach again")
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl detach`: stop, drop the images, remove the device. Begun anywhere in between, it
//! goes on from there.

use super::{control, Target};
use crate::cli::DetachArgs;
use crate::disk::{Live, Work};
use crate::error::{Code, Error, Result};
use crate::locks::Turn;
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;
use std::path::Path;

/// Runs the command.
pub fn run(args: &DetachArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    let device = match Target::resolve(&args.target, &sysfs)? {
        Target::Device(device) => *device,
        Target::Image(path) => of_image(&sysfs, &path)?,
        Target::Disk(path) => return of_disk(&path, args),
    };
    device_cleanly(&sysfs, &device)
}

/// Detaches a disk, and writes down what its lower images are now.
fn of_disk(path: &Path, args: &DetachArgs) -> Result<()> {
    let live = Live::default();
    let mut disk = super::disk::open(path, &live, Work::Short, &args.wait)?;
    let sysfs = Sysfs::default();
    let top = disk.file(disk.descriptor().top())?;
    let users = disk.users(&live)?;
    let device = match users.writer {
        Some(device) => device,
        None => of_image(&sysfs, &top)?,
    };
    device_cleanly(&sysfs, &device)?;
    if disk.users(&live)?.writer.is_none() {
        disk.record_lower()?;
    }
    Ok(())
}

/// Detaches a device.
pub fn device_cleanly(sysfs: &Sysfs, device: &Device) -> Result<()> {
    let _turn = Turn::take()?;
    let control = control::open()?;
    let node = control::open_node(device.index)?;
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

fn of_image(sysfs: &Sysfs, path: &Path) -> Result<Device> {
    let at = path.display();
    let mut devices = sysfs.find_image(path)?;
    match (devices.pop(), devices.as_slice()) {
        (Some(device), []) => Ok(device),
        (None, _) => Err(
            Error::new(Code::NotAttached, format!("{at} is not attached"))
                .hint("'ploopctl list' shows what is"),
        ),
        (Some(last), others) => {
            let all = others.iter().chain([&last]);
            let nodes: Vec<_> = all.map(|d| d.device.display().to_string()).collect();
            let what = format!("{at} is attached more than once: {}", nodes.join(", "));
            Err(Error::new(Code::Param, what).hint("give the device to be detached"))
        }
    }
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
    let users = control::users(sysfs, device.index);
    let users = if users.is_empty() {
        "open somewhere that cannot be seen from here".to_owned()
    } else {
        users.join(", ")
    };
    let message = format!("{at} is in use: {users}");
    Error::new(Code::Busy, message).hint("unmount it or end its users, then detach again")
}

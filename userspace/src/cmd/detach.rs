// SPDX-License-Identifier: GPL-2.0
//! `ploopctl detach`: stop, drop the images, remove the device. Begun anywhere in between, it
//! goes on from there.

use super::{control, Target};
use crate::cli::DetachArgs;
use crate::error::{Code, Error, Result};
use crate::locks::Turn;
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;

/// Runs the command.
pub fn run(args: &DetachArgs) -> Result<()> {
    let _turn = Turn::take()?;
    let sysfs = Sysfs::default();
    let device = match Target::resolve(&args.target, &sysfs)? {
        Target::Device(device) => *device,
        Target::Image(path) => sysfs.find_image(&path)?.ok_or_else(|| {
            let what = format!("{} is not attached", path.display());
            Error::new(Code::NotAttached, what).hint("'ploopctl list' shows what is")
        })?,
    };
    let control = control::open()?;
    let node = control::open_node(device.index)?;
    let stopped = match control::while_busy(|| node.stop()) {
        // Not running: a tool was killed before START or after STOP.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(e) => {
            let error = refused(&sysfs, &device, "stop", e);
            // It may have stopped, but without all its data on disk. That is said at the end.
            if sysfs.device(device.index)?.is_none_or(|d| d.running) {
                return Err(error);
            }
            Err(error)
        }
    };
    control::while_busy(|| node.clear()).map_err(|e| refused(&sysfs, &device, "clear", e))?;
    drop(node);
    control::remove(&control, device.index).map_err(|e| refused(&sysfs, &device, "remove", e))?;
    stopped
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

// SPDX-License-Identifier: GPL-2.0
//! What is attached, found by any of its names; and the disk that a device is of.

use super::Target;
use crate::descriptor::model::Disk;
use crate::descriptor::{self, store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::sysfs::{Device, Sysfs};
use std::fs;
use std::path::{Path, PathBuf};

/// The device that is named: by itself, by a disk that it writes to, or by an image that only it has.
pub fn device(target: &Path) -> Result<Device> {
    let sysfs = Sysfs::default();
    match Target::resolve(target, &sysfs)? {
        Target::Device(device) => Ok(*device),
        Target::Image(path) => of_image(&sysfs, &path),
        Target::Disk(path) => {
            let descriptor = Descriptor::parse(&path, &store::read(&path)?)?;
            of_image(&sysfs, &super::disk::file(&path, descriptor.top()))
        }
    }
}

/// The device that has the image `path`.
pub fn of_image(sysfs: &Sysfs, path: &Path) -> Result<Device> {
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
            Err(Error::new(Code::Param, what).hint("give the device that is meant"))
        }
    }
}

/// What a command that changes something is pointed at.
pub enum Subject {
    /// A disk with a descriptor, attached or not.
    Disk(PathBuf),
    /// A device that can be written, without a descriptor that names its images.
    Device(Box<Device>),
    /// An image that nobody has.
    Image,
}

/// What `target` is. A device of a disk with a descriptor is that disk: the descriptor must not
/// be left behind.
pub fn subject(target: &Path) -> Result<Subject> {
    let sysfs = Sysfs::default();
    let device = match Target::resolve(target, &sysfs)? {
        Target::Disk(path) => return Ok(Subject::Disk(path)),
        Target::Device(device) => device,
        Target::Image(path) => {
            let devices = sysfs.find_image(&path)?;
            // Of those that share a lower image, none is meant; the refusal is that of the image.
            match <[Device; 1]>::try_from(devices) {
                Ok([device]) if is_top(&device, &path) => Box::new(device),
                Ok(_) | Err(_) => return Ok(Subject::Image),
            }
        }
    };
    if device.read_only {
        let at = device.device.display();
        let what = format!("{at} is attached read-only: it is not changed");
        return Err(
            Error::new(Code::InUse, what).hint(format!("'ploopctl detach {at}' detaches it"))
        );
    }
    Ok(match descriptor_of(&device) {
        Some(path) => Subject::Disk(path),
        None => Subject::Device(device),
    })
}

fn is_top(device: &Device, path: &Path) -> bool {
    device.top().is_some() && device.delta_of(path) == device.top()
}

/// The descriptor beside the top of `device` that names the images of it.
pub fn descriptor_of(device: &Device) -> Option<PathBuf> {
    let top = device.top()?.reachable().ok()?;
    let path = top.parent()?.join(descriptor::NAME);
    let descriptor = Descriptor::parse(&path, &store::read(&path).ok()?).ok()?;
    names(&path, descriptor.disk(), top).then_some(path)
}

fn names(path: &Path, disk: &Disk, image: &Path) -> bool {
    let Ok(image) = fs::canonicalize(image) else {
        return false;
    };
    let mut files = disk
        .images
        .iter()
        .map(|i| store::dir_of(path).join(&i.file));
    files.any(|file| fs::canonicalize(file).is_ok_and(|f| f == image))
}

// SPDX-License-Identifier: GPL-2.0
//! What is attached, found by any of its names; and the disk that a device is of.

use super::backup::interim;
use super::Target;
use crate::cli::WaitArgs;
use crate::descriptor::model::{Disk, ImageEntry, ROOTS};
use crate::descriptor::{self, store, Descriptor};
use crate::disk::intent::Intent;
use crate::disk::{files, Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::sysfs::{Delta, Device, Sysfs};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
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
    Ok(match descriptor_of(&device)? {
        Some(path) => Subject::Disk(path),
        None => Subject::Device(device),
    })
}

fn is_top(device: &Device, path: &Path) -> bool {
    device.top().is_some() && device.delta_of(path) == device.top()
}

/// The descriptor that names the top of `device`.
pub fn descriptor_of(device: &Device) -> Result<Option<PathBuf>> {
    match device.top().map(Delta::reachable) {
        // A disk that cannot be reached from here cannot be worked on either.
        None | Some(Err(_)) => Ok(None),
        Some(Ok(top)) => naming(top),
    }
}

/// Refuses an image that a descriptor names: what is done to it alone, the descriptor and the other
/// images do not know of.
pub fn must_be_alone(image: &Path, force: bool) -> Result<()> {
    let descriptor = match fs::canonicalize(image) {
        // What cannot be opened is said by who opens it.
        Err(_) => None,
        Ok(_) if force => None,
        Ok(real) => naming(&real)?,
    };
    let Some(descriptor) = descriptor else {
        return Ok(());
    };
    let (at, of) = (image.display(), descriptor.display());
    let what = format!("{at} is an image of the disk {of}");
    Err(Error::new(Code::Param, what).hint(format!(
        "give the disk, {of}; --force changes the image alone, and what builds on it may be lost"
    )))
}

/// What the images that are named one by one are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// The last one is written to.
    Top,
    /// They are read as a disk.
    Chain,
}

/// Refuses `images`, base first, which are to be read as a disk, where they are not all of one: of a disk
/// with a descriptor not the chain of one of its snapshots, or amid a change; or one above which a backup
/// left another. A descriptor that cannot be understood keeps nobody from anything.
pub fn must_be_whole(images: &[PathBuf]) -> Result<()> {
    let Some((real, path)) = settled(images)? else {
        return Ok(());
    };
    match store::read(&path).and_then(|text| Descriptor::parse(&path, &text)) {
        Ok(descriptor) => must_be_chain(&descriptor, &path, &real, Wanted::Chain),
        Err(_) => Ok(()),
    }
}

/// The same of `images` of which the last is to be written to: only those of the top of a disk can be,
/// as what builds on another would be lost. That disk is opened, which completes or undoes what is
/// unfinished, and its locks keep others from changing it as long as the images are worked on.
pub fn disk_of_top(images: &[PathBuf], live: &Live, wait: &WaitArgs) -> Result<Option<Opened>> {
    interim::must_be_given(images)?;
    let Some((real, path)) = named(images) else {
        return Ok(None);
    };
    let disk = super::disk::open(&path, live, Work::Short, wait)?;
    must_be_chain(disk.descriptor(), disk.path(), &real, Wanted::Top)?;
    Ok(Some(disk))
}

/// Refuses an image that is read by itself while its disk is amid a change, or above which a backup left
/// another.
pub fn must_be_settled(image: &Path) -> Result<()> {
    settled(&[image.to_owned()]).map(drop)
}

/// What [`named`] finds, unless it is being changed or a backup has left something above `images`.
fn settled(images: &[PathBuf]) -> Result<Option<(Vec<PathBuf>, PathBuf)>> {
    interim::must_be_given(images)?;
    let found = named(images);
    if let Some((_, path)) = &found {
        must_be_unchanging(path)?;
    }
    Ok(found)
}

/// `images` without symbolic links, and the descriptor that names the last one. What cannot be opened
/// is said by who opens it.
fn named(images: &[PathBuf]) -> Option<(Vec<PathBuf>, PathBuf)> {
    let real = images.iter().map(|i| fs::canonicalize(i).ok());
    let real: Vec<_> = real.collect::<Option<_>>()?;
    let path = naming(real.last()?).ok().flatten()?;
    Some((real, path))
}

/// Which of its images a disk consists of is not known while that is being changed.
fn must_be_unchanging(path: &Path) -> Result<()> {
    if !Intent::is_there(path) {
        return Ok(());
    }
    let of = path.display();
    let what = format!("an operation on the disk {of} is going on, or was interrupted");
    Err(Error::new(Code::Busy, what)
        .hint(format!("'ploopctl recover {of}' completes or undoes it")))
}

/// Refuses `real`, images without symbolic links, that are not those of the top of the disk, or of the
/// snapshot that the last one is.
fn must_be_chain(
    descriptor: &Descriptor,
    path: &Path,
    real: &[PathBuf],
    wanted: Wanted,
) -> Result<()> {
    let Some(last) = real.last() else {
        return Ok(());
    };
    let file = |image: &ImageEntry| fs::canonicalize(store::dir_of(path).join(&image.file)).ok();
    let disk = descriptor.disk();
    let guid = match wanted {
        Wanted::Top => Some(disk.top),
        Wanted::Chain => {
            let mut all = disk.images.iter();
            all.find(|i| file(i).as_ref() == Some(last)).map(|i| i.guid)
        }
    };
    let (at, of) = (last.display(), path.display());
    if let Some(shot) = guid
        .and_then(|guid| disk.shot(guid))
        .filter(|s| s.is_temporary)
    {
        let what = format!(
            "{at} is of the snapshot {} of the disk {of}, which is being removed",
            shot.guid
        );
        return Err(
            Error::new(Code::Param, what).hint(format!("'ploopctl recover {of}' completes that"))
        );
    }
    let chain = guid.map(|guid| descriptor.chain(guid)).unwrap_or_default();
    if chain.into_iter().filter_map(file).eq(real.iter().cloned()) {
        return Ok(());
    }
    let (what, hint) = match wanted {
        Wanted::Top => (
            format!("{at} is an image of the disk {of}, and these are not those of its top"),
            "or -r to read the images: what builds on one that is written to is lost",
        ),
        Wanted::Chain => (
            format!("{at} is an image of the disk {of}, and what it builds on is not given"),
            "or all images of the chain, the base first",
        ),
    };
    Err(Error::new(Code::Param, what).hint(format!("give the disk, {of}, {hint}")))
}

/// [`must_be_alone`] of an image that is to be changed: nor may its file have other names.
pub fn must_be_ours(image: &Path, force: bool) -> Result<()> {
    must_be_alone(image, force)?;
    match fs::metadata(image) {
        Ok(meta) if meta.is_file() && !force => files::must_be_ours(image, meta.nlink()),
        // What cannot be opened, or is no file, is said by who opens it.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The descriptor that names `image`, a path without symbolic links: beside it or, as an image may
/// be in a directory below, above. One that cannot be understood may be that one.
pub fn naming(image: &Path) -> Result<Option<PathBuf>> {
    for dir in image.ancestors().skip(1) {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|e| e.path()).filter(|p| is_xml(p)).collect();
        // The usual one first.
        paths.sort_by_key(|p| (!p.ends_with(descriptor::NAME), p.clone()));
        for path in paths {
            if is_named_in(&path, image)? {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

fn is_xml(path: &Path) -> bool {
    let is_so_called = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("xml"));
    is_so_called && path.is_file()
}

fn is_named_in(path: &Path, image: &Path) -> Result<bool> {
    let is_beside = path.parent() == image.parent() && path.ends_with(descriptor::NAME);
    let text = match store::read(path) {
        Ok(text) => text,
        Err(e) if is_beside => return Err(e),
        Err(_) => return Ok(false),
    };
    let name = image
        .file_name()
        .and_then(OsStr::to_str)
        .unwrap_or_default();
    match Descriptor::parse(path, &text) {
        Ok(descriptor) => Ok(names(path, descriptor.disk(), image)),
        Err(e) if is_beside || (is_a_descriptor(&text) && text.contains(name)) => Err(e),
        Err(_) => Ok(false),
    }
}

fn is_a_descriptor(text: &str) -> bool {
    ROOTS.iter().any(|root| text.contains(&format!("<{root}")))
}

fn names(path: &Path, disk: &Disk, image: &Path) -> bool {
    let mut files = disk
        .images
        .iter()
        .map(|i| store::dir_of(path).join(&i.file));
    files.any(|file| fs::canonicalize(file).is_ok_and(|f| f == image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::edit;

    /// The descriptor of a disk whose image is in a directory below, or that has another name, was
    /// overlooked, and `merge /dev/ploop0` left it behind.
    #[test]
    fn the_descriptor_of_an_image_is_found() {
        let dir = std::env::temp_dir().join(format!("ploopctl-naming-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("img/deep")).unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        let image = dir.join("img/deep/n.hds");
        fs::write(&image, "").unwrap();
        let text = edit::new_text(64, 64, false, false, "img/deep/n.hds");
        assert_eq!(naming(&image).unwrap(), None);
        let other = dir.join("Disk.XML");
        fs::write(&other, &text).unwrap();
        fs::write(dir.join("a.xml"), "<settings/>").unwrap();
        fs::write(dir.join("b.xml"), [0xff]).unwrap();
        assert_eq!(naming(&image).unwrap(), Some(other.clone()));
        assert_eq!(naming(&dir.join("img/n.hds")).unwrap(), None);
        let usual = dir.join(descriptor::NAME);
        fs::write(&usual, &text).unwrap();
        assert_eq!(naming(&image).unwrap(), Some(usual.clone()));
        assert_eq!(
            must_be_alone(&image, false).unwrap_err().code(),
            Code::Param
        );
        must_be_alone(&image, true).unwrap();
        // It cannot be told whether these are of the image.
        fs::remove_file(&other).unwrap();
        fs::write(&usual, text.replace("<End>64", "<End>65")).unwrap();
        assert_eq!(naming(&image).unwrap_err().code(), Code::Descriptor);
        fs::write(
            &usual,
            text.replace("n.hds", "m.hds").replace("<End>64", "<End>65"),
        )
        .unwrap();
        assert_eq!(naming(&image).unwrap(), None);
        fs::write(image.with_file_name(descriptor::NAME), "").unwrap();
        assert_eq!(naming(&image).unwrap_err().code(), Code::Descriptor);
        fs::remove_dir_all(&dir).unwrap();
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Freezing what the kernel module cannot see: file systems on devices that are stacked on the
//! disk, such as dm-crypt and LVM. The module itself freezes those on the disk and its partitions.

use crate::dev;
use crate::error::{Code, Error, Result};
use crate::mountinfo::{self, Mount};
use crate::output;
use crate::sysfs::Sysfs;
use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// File systems that are frozen; thawed when dropped. The signals that end a program must be held
/// back meanwhile.
#[derive(Debug, Default)]
pub struct Frozen {
    all: Vec<(PathBuf, File)>,
    /// To be said when they are thawed: where it goes may be frozen with them.
    notes: Vec<String>,
}

impl Frozen {
    /// Freezes the mounted file systems on what is stacked on device `index`. One that cannot be
    /// frozen ends it, and all are thawed.
    pub fn stacked_on(sysfs: &Sysfs, index: u32) -> Result<Self> {
        Self::on(&sysfs.stacked(index))
    }

    /// The same for the disk itself and its partitions, where the module does not do it.
    pub fn mounted_on(sysfs: &Sysfs, index: u32) -> Result<Self> {
        Self::on(&sysfs.parts(index))
    }

    /// Leaves them frozen.
    pub fn keep(mut self) {
        self.all.clear();
        self.notes.clear();
    }

    fn on(devices: &[(String, String)]) -> Result<Self> {
        let mut frozen = Self::default();
        for (at, file) in mounted(devices)? {
            match dev::freeze(&file) {
                Ok(()) => frozen.all.push((at, file)),
                // By somebody else, who thaws it.
                Err(Errno::EBUSY) => {
                    let note = format!("note: {} is frozen already", at.display());
                    frozen.notes.push(note);
                }
                Err(e) => {
                    let what = format!("cannot freeze the file system at {}", at.display());
                    return Err(Error::io(Code::DeviceIoctl, what, e)
                        .hint("--no-freeze makes a snapshot as after a power cut"));
                }
            }
        }
        Ok(frozen)
    }
}

/// Thaws what [`Frozen`] has left frozen on what is stacked on device `index`, or somebody else.
pub fn thaw_stacked_on(sysfs: &Sysfs, index: u32) -> Result<()> {
    for (at, file) in mounted(&sysfs.stacked(index))? {
        match dev::thaw(&file) {
            // EINVAL: it is not frozen.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(e) => {
                let what = format!("cannot thaw the file system at {}", at.display());
                return Err(Error::io(Code::DeviceIoctl, what, e));
            }
        }
    }
    Ok(())
}

/// The mounted file systems on `devices` (name and `MAJOR:MINOR`), each once, open at a place where
/// nothing else is mounted over it.
pub fn mounted(devices: &[(String, String)]) -> Result<Vec<(PathBuf, File)>> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let mounts = mountinfo::mounts()?;
    let mut mounted: Vec<(String, PathBuf, File)> = Vec::new();
    let mut covered = None;
    for (number, at) in mount_points(mounts, devices) {
        if mounted.iter().any(|(n, ..)| *n == number) {
            continue;
        }
        let failed = |what: &str, e| {
            let what = format!("cannot {what} {}", at.display());
            Error::io(Code::Open, what, e)
        };
        let file = File::open(&at).map_err(|e| failed("open", e))?;
        let dev = file.metadata().map_err(|e| failed("look at", e))?.dev();
        // Of btrfs every subvolume has a number of its own.
        if number.starts_with("0:") || number == format!("{}:{}", major(dev), minor(dev)) {
            covered = covered.filter(|(n, _)| *n != number);
            mounted.push((number, at, file));
        } else {
            covered = covered.or(Some((number, at)));
        }
    }
    if let Some((_, at)) = covered {
        let what = format!(
            "another file system is mounted over that at {}",
            at.display()
        );
        return Err(Error::new(Code::Mount, what).hint("unmount that one first"));
    }
    Ok(mounted
        .into_iter()
        .map(|(_, at, file)| (at, file))
        .collect())
}

impl Drop for Frozen {
    fn drop(&mut self) {
        while let Some((at, file)) = self.all.pop() {
            if let Err(e) = dev::thaw(&file) {
                let at = at.display();
                self.notes.push(format!(
                    "cannot thaw the file system at {at}: {}; run 'fsfreeze -u {at}'",
                    e.desc()
                ));
            }
        }
        self.notes.iter().for_each(|note| output::note(note));
    }
}

/// Where of `mounts` the file systems on `devices` (name and `MAJOR:MINOR`) are, with their numbers.
fn mount_points(mounts: Vec<Mount>, devices: &[(String, String)]) -> Vec<(String, PathBuf)> {
    let is_on = |mount: &Mount| {
        let source = fs::canonicalize(&mount.source).unwrap_or_default();
        // btrfs has numbers of its own.
        devices
            .iter()
            .any(|(name, number)| *number == mount.number || source == Path::new("/dev").join(name))
    };
    let found = mounts.into_iter().filter(is_on);
    found.map(|mount| (mount.number, mount.at)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacked_file_systems_are_found() {
        let info = "30 1 254:3 / /mnt/a\\040b rw - ext4 /dev/mapper/x rw\n\
                    31 1 254:3 /sub /srv rw - ext4 /dev/mapper/x rw\n\
                    32 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let devices = [("dm-3".to_owned(), "254:3".to_owned())];
        let number = "254:3".to_owned();
        let want = ["/mnt/a b", "/srv"].map(|at| (number.clone(), PathBuf::from(at)));
        let mounts = mountinfo::parse(info.as_bytes());
        assert_eq!(mount_points(mounts.clone(), &devices), want);
        assert!(mount_points(mounts, &[]).is_empty());
    }
}

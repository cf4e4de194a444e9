// SPDX-License-Identifier: GPL-2.0
//! What the kernel says about its devices, read from sysfs.

use crate::dev;
use crate::error::{Code, Error, Result};
use crate::output;
use serde::Serialize;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

mod counters;

pub use counters::{Counters, Gauges};

/// `pstate/top` of a device without deltas.
const NO_TOP: u32 = u32::MAX;
/// How often a device that changes meanwhile is read.
const READ_TRIES: u32 = 5;
const READ_PAUSE: Duration = Duration::from_millis(20);
/// What the kernel appends to the path of an image that was unlinked.
const DELETED: &str = " (deleted)";

/// One delta of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Delta {
    /// Level, 0 for the base.
    pub level: u32,
    /// Path of the image file as the kernel knows it.
    #[serde(serialize_with = "output::path")]
    pub image: PathBuf,
    /// `raw` or `ploop1`.
    pub format: String,
    /// How its bytes are reached.
    pub io: String,
    /// Not written to.
    pub read_only: bool,
    /// Inode number of the file.
    #[serde(skip)]
    ino: u64,
    /// Device number of its file system.
    #[serde(skip)]
    dev: (u64, u64),
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// N of ploopN.
    pub index: u32,
    /// Path of its node.
    pub device: PathBuf,
    /// Serves requests.
    pub running: bool,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Rejects writes.
    pub read_only: bool,
    /// Cluster size in bytes, 0 without deltas.
    pub cluster_size: u64,
    /// Version of the format of its deltas.
    pub format_version: u64,
    /// Name given at attach.
    pub cookie: String,
    /// How often the disk and its partitions are open.
    pub open_count: u64,
    /// Writes fail since an error.
    pub aborted: bool,
    /// The long operation that runs, or `off`.
    pub maintenance: String,
    /// How it is about space for the image: `ok`, `low` or `full`.
    pub space: String,
    /// Deltas, the base first.
    pub deltas: Vec<Delta>,
}

impl Device {
    /// The delta that is written to.
    pub fn top(&self) -> Option<&Delta> {
        self.deltas.last()
    }

    /// Whether both have an image: a number may be given to another device at any time.
    pub fn shares_image_with(&self, other: &Self) -> bool {
        let is_same = |a: &Delta, b: &Delta| (a.ino, a.dev) == (b.ino, b.dev);
        let mut deltas = self.deltas.iter();
        deltas.any(|a| other.deltas.iter().any(|b| is_same(a, b)))
    }

    /// `running`, `stopped` or `empty`.
    pub fn state(&self) -> &'static str {
        match (self.running, self.deltas.is_empty()) {
            (true, _) => "running",
            (false, false) => "stopped",
            (false, true) => "empty",
        }
    }

    /// The delta that is the image `path`.
    pub fn delta_of(&self, path: &Path) -> Option<&Delta> {
        self.deltas.iter().find(|d| d.is_image(path))
    }
}

impl Delta {
    /// Path of the image, if that leads to it from here: not so for one that was unlinked, or is
    /// in another mount namespace. What is under the name then may be anything.
    pub fn reachable(&self) -> Result<&Path> {
        if self.is_reachable() {
            return Ok(&self.image);
        }
        let at = self.image.display();
        let what = format!("the image of the device, {at}, cannot be reached from here");
        Err(Error::new(Code::Open, what)
            .hint("it was removed or replaced, or is in another mount namespace"))
    }

    fn is_reachable(&self) -> bool {
        fs::metadata(&self.image).is_ok_and(|m| {
            // stat has other numbers than the kernel for some file systems (btrfs): without a device.
            let is_there = m.ino() == self.ino
                && (device_of(&m) == self.dev || device_of(&m).0 == 0 || self.dev.0 == 0);
            // Of a block device there is an inode in every /dev.
            is_there || m.file_type().is_block_device()
        })
    }

    fn is_image(&self, path: &Path) -> bool {
        let Ok(meta) = fs::metadata(path) else {
            // Unlinked while attached: the name is all there is.
            let image = self.image.to_string_lossy();
            let image = image.strip_suffix(DELETED).unwrap_or(&image);
            return absolute(path).is_some_and(|p| p == Path::new(image));
        };
        if meta.ino() == self.ino && device_of(&meta) == self.dev {
            return true;
        }
        // stat and the kernel name some file systems' devices differently (btrfs), and a block
        // device has an inode in every /dev.
        fs::metadata(&self.image).is_ok_and(|m| {
            let both_block = m.file_type().is_block_device() && meta.file_type().is_block_device();
            let same_file = m.ino() == self.ino && m.ino() == meta.ino() && m.dev() == meta.dev();
            same_file || (both_block && m.rdev() == meta.rdev())
        })
    }
}

/// The number of the device that a file is on.
fn device_of(meta: &fs::Metadata) -> (u64, u64) {
    let dev = meta.dev();
    (nix::sys::stat::major(dev), nix::sys::stat::minor(dev))
}

/// The inode number by which [`Delta::is_image`] knows the file `path`; `None` if it goes by something
/// else.
fn inode_of(path: &Path) -> Option<u64> {
    let meta = fs::metadata(path).ok()?;
    (!meta.file_type().is_block_device()).then(|| meta.ino())
}

fn absolute(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let parent = fs::canonicalize(path.parent()?).ok()?;
    Some(parent.join(path.file_name()?))
}

/// A sysfs tree.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Sysfs {
    /// The tree at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn dir(&self, index: u32) -> PathBuf {
        self.root.join(format!("block/ploop{index}"))
    }

    /// All devices by number; none if the module is not loaded. One that goes away meanwhile is
    /// left out.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let mut devices = Vec::new();
        for index in self.indexes()? {
            devices.extend(self.device(index)?);
        }
        Ok(devices)
    }

    /// All devices that may have one of these images, and perhaps others: of hundreds of devices not
    /// all has to be read.
    pub fn devices_of<P: AsRef<Path>>(&self, images: &[P]) -> Result<Vec<Device>> {
        let inodes: Option<Vec<u64>> = images.iter().map(|i| inode_of(i.as_ref())).collect();
        let mut devices = Vec::new();
        for index in self.indexes()? {
            if inodes.as_ref().is_none_or(|i| self.may_have(index, i)) {
                devices.extend(self.device(index)?);
            }
        }
        Ok(devices)
    }

    /// Whether a delta of device `index` is a file of one of these inodes, on whatever file system.
    /// Yes if it cannot be told.
    fn may_have(&self, index: u32, inodes: &[u64]) -> bool {
        let Ok(levels) = fs::read_dir(self.dir(index).join("pdelta")) else {
            return true;
        };
        levels.flatten().any(|level| {
            let info = fs::read_to_string(level.path().join("image_info"));
            let info = info.ok().and_then(|text| parse_info(&text));
            info.is_none_or(|(ino, _)| inodes.contains(&ino))
        })
    }

    /// Whether device `index` serves requests. No if it is gone.
    pub fn is_running(&self, index: u32) -> bool {
        number(&self.dir(index).join("pstate/running")).is_ok_and(|n| n != 0)
    }

    /// The numbers of all devices, ascending.
    pub fn indexes(&self) -> Result<Vec<u32>> {
        let dir = self.root.join("block");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => {
                let what = format!("cannot read {}", dir.display());
                return Err(Error::io(Code::Sysfs, what, e));
            }
        };
        let names = entries.flatten().map(|e| e.file_name());
        let mut indexes: Vec<u32> = names
            .filter_map(|n| n.to_str()?.strip_prefix("ploop")?.parse().ok())
            .collect();
        indexes.sort_unstable();
        Ok(indexes)
    }

    /// Device `index`; `None` if there is no such.
    pub fn device(&self, index: u32) -> Result<Option<Device>> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.read_device(index) {
                Ok(device) => return Ok(Some(device)),
                Err(_) if !self.dir(index).join("pstate").exists() => return Ok(None),
                // Attached or detached between one file and the next.
                Err(_) if tries < READ_TRIES => std::thread::sleep(READ_PAUSE),
                Err(e) => {
                    let what = format!("cannot read {}", self.dir(index).display());
                    return Err(Error::io(Code::Sysfs, what, e));
                }
            }
        }
    }

    fn read_device(&self, index: u32) -> io::Result<Device> {
        let dir = self.dir(index);
        let state = dir.join("pstate");
        let number = |name: &str| number(&state.join(name));
        let top = number("top")?;
        let mut deltas = Vec::new();
        if top != u64::from(NO_TOP) {
            for level in 0..=u32::try_from(top).map_err(io::Error::other)? {
                deltas.push(read_delta(&dir.join(format!("pdelta/{level}")), level)?);
            }
        }
        Ok(Device {
            index,
            device: dev::Device::path(index),
            running: number("running")? != 0,
            size: self::number(&dir.join("size"))?.saturating_mul(512),
            read_only: self::number(&dir.join("ro"))? != 0,
            cluster_size: number("block_size")?.saturating_mul(512),
            format_version: number("fmt_version")?,
            cookie: line(&state.join("cookie"))?,
            open_count: number("open_count")?,
            aborted: number("aborted").is_ok_and(|n| n != 0),
            // A module that knows neither has neither.
            maintenance: line(&state.join("maintenance")).unwrap_or_else(|_| "off".into()),
            space: line(&state.join("space")).unwrap_or_else(|_| "ok".into()),
            deltas,
        })
    }

    /// The devices that have the image `path` as a delta: more than one only if all read it.
    pub fn find_image(&self, path: &Path) -> Result<Vec<Device>> {
        let mut devices = self.devices_of(&[path])?;
        devices.retain(|d| d.delta_of(path).is_some());
        Ok(devices)
    }

    /// What the writes of device `index` do that find no space: `wait` or `fail`.
    pub fn on_full(&self, index: u32) -> io::Result<String> {
        line(&self.dir(index).join("ptune/on_full"))
    }

    /// Whether writes of device `index` wait for space now.
    pub fn waits_for_space(&self, index: u32) -> bool {
        line(&self.dir(index).join("pstate/space")).is_ok_and(|space| space == "full")
    }

    /// Changes that.
    pub fn set_on_full(&self, index: u32, what: &str) -> io::Result<()> {
        fs::write(self.dir(index).join("ptune/on_full"), what)
    }

    /// Device `index` and its partitions: name and `MAJOR:MINOR`.
    pub fn parts(&self, index: u32) -> Vec<(String, String)> {
        let dir = self.dir(index);
        let name = format!("ploop{index}");
        let prefix = format!("{name}p");
        let inside = fs::read_dir(&dir).into_iter().flatten().flatten();
        let parts = inside.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()));
        std::iter::once((name, dir))
            .chain(parts.filter(|(name, _)| name.starts_with(&prefix)))
            .map(|(name, dir)| (name, line(&dir.join("dev")).unwrap_or_default()))
            .collect()
    }

    /// Block devices stacked on device `index` or a partition of it.
    pub fn holders(&self, index: u32) -> Vec<String> {
        let dir = self.dir(index);
        let parts = fs::read_dir(&dir).into_iter().flatten().flatten();
        let prefix = format!("ploop{index}p");
        let parts = parts.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix));
        let dirs = std::iter::once(dir.clone()).chain(parts.map(|e| e.path()));
        dirs.flat_map(|d| fs::read_dir(d.join("holders")).into_iter().flatten())
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// All block devices stacked on device `index`, directly or not: name and `MAJOR:MINOR`.
    pub fn stacked(&self, index: u32) -> Vec<(String, String)> {
        let mut found: Vec<(String, String)> = Vec::new();
        let mut names = self.holders(index);
        while let Some(name) = names.pop() {
            if found.iter().any(|(n, _)| *n == name) {
                continue;
            }
            let dir = self.root.join("block").join(&name);
            let holders = fs::read_dir(dir.join("holders"))
                .into_iter()
                .flatten()
                .flatten();
            names.extend(holders.map(|e| e.file_name().to_string_lossy().into_owned()));
            let dev = line(&dir.join("dev")).unwrap_or_default();
            found.push((name, dev));
        }
        found
    }
}

fn read_delta(dir: &Path, level: u32) -> io::Result<Delta> {
    let info = fs::read_to_string(dir.join("image_info"))?;
    let (ino, dev) = parse_info(&info)
        .ok_or_else(|| io::Error::other(format!("image_info says {:?}", info.trim_end())))?;
    let mut delta = Delta {
        level,
        image: OsString::from_vec(bytes(&dir.join("image"))?).into(),
        format: line(&dir.join("format"))?,
        io: line(&dir.join("io"))?,
        read_only: number(&dir.join("ro"))? != 0,
        ino,
        dev,
    };
    if !delta.is_reachable() {
        let named = unescaped(&delta.image);
        if Path::new(&named) != delta.image {
            let raw = std::mem::replace(&mut delta.image, named);
            if !delta.is_reachable() {
                delta.image = raw;
            }
        }
    }
    Ok(delta)
}

/// The path of which the kernel shows bytes that are not Unicode as `\xNN`. A path may have such a text
/// itself, so the one that leads to the image is right.
fn unescaped(path: &Path) -> PathBuf {
    let shown = path.as_os_str().as_bytes();
    let mut bytes = Vec::with_capacity(shown.len());
    let mut rest = shown;
    while let Some((&first, after)) = rest.split_first() {
        let hex = after.strip_prefix(b"x").and_then(|hex| hex.get(..2));
        let hex = hex.and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match byte {
            Some(byte) if first == b'\\' && !byte.is_ascii() => {
                bytes.push(byte);
                rest = &after[3..];
            }
            Some(_) | None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// Reads `ino:%lu\nsdev:maj:min\n`.
fn parse_info(text: &str) -> Option<(u64, (u64, u64))> {
    let mut lines = text.lines();
    let ino = lines.next()?.strip_prefix("ino:")?.trim().parse().ok()?;
    let (major, minor) = lines.next()?.strip_prefix("sdev:")?.split_once(':')?;
    Some((
        ino,
        (major.trim().parse().ok()?, minor.trim().parse().ok()?),
    ))
}

/// What a file says, without the newline at its end.
fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = fs::read(path)?;
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    Ok(text)
}

/// The same as text: a cookie may be any bytes.
fn line(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&bytes(path)?).into_owned())
}

fn number(path: &Path) -> io::Result<u64> {
    let text = line(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{} says {text:?}", path.display())))
}

#[cfg(test)]
mod tests;

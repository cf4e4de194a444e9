// SPDX-License-Identifier: GPL-2.0
//! A disk with a descriptor: what may be done with it, and how that survives being ended anywhere.
//!
//! ```text
//! snapshot, merge, grow, replace, lower (the operations) -> recover -> intent, files
//! freeze (file systems stacked on the disk)           outside (kernel and long work)
//! ```
//!
//! Whoever has an [`Opened`] holds the locks of the descriptor, and nothing is unfinished. Every
//! operation of more than one step first writes an [`intent`] beside the descriptor. From then on
//! [`recover`] can tell, from the intent, the descriptor, the images and the kernel, whether to
//! complete or to undo it; the operation itself ends by that very way.

pub mod files;
pub mod freeze;
mod grow;
pub mod intent;
mod live;
pub mod lower;
mod merge;
pub mod outside;
mod recover;
mod replace;
pub mod restore;
mod snapshot;

#[cfg(test)]
mod tests;

pub use files::Member;
pub use live::Live;
pub use outside::Outside;
pub use snapshot::Removal;

use crate::descriptor::lock::{BaseLock, FileLock, Patience};
use crate::descriptor::model::ImageEntry;
use crate::descriptor::{store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::sysfs::Device;
use std::fs;
use std::path::{Path, PathBuf};

/// What somebody wants to do, as far as the locks care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Soon over.
    Short,
    /// Moves data.
    Long,
}

/// A descriptor that nobody else works on, with nothing unfinished.
pub struct Opened {
    path: PathBuf,
    descriptor: Descriptor,
    /// What was found unfinished, and what was done about it.
    mended: Vec<String>,
    _base: BaseLock,
    _file: FileLock,
}

/// Who has images of a disk attached.
#[derive(Debug, Default)]
pub struct Users {
    /// Those that write to one of them: more than one only if images were attached by name.
    pub writers: Vec<Device>,
    /// Those that only read.
    pub readers: Vec<Device>,
}

impl Users {
    /// All of them, those that write first.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        self.writers.iter().chain(&self.readers)
    }
}

impl Opened {
    /// Takes the locks, reads the descriptor, and completes or undoes what is unfinished.
    pub fn open(
        path: &Path,
        outside: &dyn Outside,
        work: Work,
        patience: Patience,
    ) -> Result<Self> {
        let path = &real(path)?;
        let file = FileLock::take(path, patience)?;
        let mut text = store::read(path)?;
        let (descriptor, base) = loop {
            let descriptor = Descriptor::parse(path, &text)?;
            let base = descriptor.disk().base().map(|b| dir_join(path, b));
            let base = base.unwrap_or_else(|| path.clone());
            let base = BaseLock::take(path, &base, work == Work::Long, patience)?;
            // Who had that lock alone may have changed it meanwhile.
            let now = store::read(path)?;
            if now == text {
                break (descriptor, base);
            }
            text = now;
        };
        let mut opened = Self {
            path: path.clone(),
            descriptor,
            mended: Vec::new(),
            _base: base,
            _file: file,
        };
        opened.recover(outside)?;
        Ok(opened)
    }

    /// Path of the descriptor.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// What was found unfinished when it was opened, and what was done about it.
    pub fn mended(&self) -> &[String] {
        &self.mended
    }

    /// The devices that have images of this disk.
    pub fn users(&self, outside: &dyn Outside) -> Result<Users> {
        let mut users = Users::default();
        let images = self.descriptor.disk().images.iter();
        let paths: Vec<_> = images.map(|i| dir_join(&self.path, i)).collect();
        for device in outside.devices_of(&paths)? {
            let deltas: Vec<_> = paths.iter().filter_map(|p| device.delta_of(p)).collect();
            match (deltas.is_empty(), deltas.iter().all(|d| d.read_only)) {
                (true, _) => {}
                (false, true) => users.readers.push(device),
                (false, false) => users.writers.push(device),
            }
        }
        Ok(users)
    }

    /// Nobody else may have `path`, which is to be changed or removed.
    fn must_be_unused(&self, path: &Path, devices: &[Device]) -> Result<()> {
        match devices.iter().find(|d| d.delta_of(path).is_some()) {
            Some(device) => Err(in_use(path, device)),
            None => Ok(()),
        }
    }

    /// Replaces the descriptor, durably.
    fn store(&mut self, text: &str) -> Result<()> {
        let descriptor = Descriptor::parse(&self.path, text)?;
        let written = store::write(&self.path, text);
        // It may have failed when the new one was in its place: what follows must know.
        if written.is_ok() || store::read(&self.path).is_ok_and(|now| now == text) {
            self.descriptor = descriptor;
        }
        written
    }
}

/// The path without symbolic links: a rename would replace the last one.
fn real(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|e| {
        let error = Error::io(Code::Open, format!("cannot open {}", path.display()), e);
        error.hint(
            "'ploopctl descriptor restore DIR' makes a descriptor for the images of a directory",
        )
    })
}

/// Where the descriptor `path` says that `image` is.
fn dir_join(path: &Path, image: &ImageEntry) -> PathBuf {
    store::dir_of(path).join(&image.file)
}

/// The refusal of what somebody has attached.
pub fn in_use(path: &Path, device: &Device) -> Error {
    let node = device.device.display();
    let what = format!("{} is attached, as {node}", path.display());
    Error::new(Code::InUse, what).hint(format!("'ploopctl detach {node}' detaches it"))
}

// SPDX-License-Identifier: GPL-2.0
//! What an operation needs besides the files of the disk: the devices, and the long work. Behind a
//! trait, so that tests can put a kernel of their own in its place and end an operation anywhere.

use crate::error::Result;
use crate::sysfs::Device;
use std::path::{Path, PathBuf};

/// Whether the file systems are made clean for a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// Those on the disk, and on what is stacked on it.
    Yes,
    /// The snapshot is as after a power cut.
    No,
}

/// Of what format a lower image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// It is the base, and raw.
    Raw,
    /// It is ploop1.
    Ploop1,
}

/// A delta of a device, to be put in place of another or on top.
#[derive(Debug, Clone, Copy)]
pub struct NewDelta<'a> {
    /// Its image.
    pub path: &'a Path,
    /// log2 of the sectors of a cluster.
    pub cluster_log: u32,
    /// It is raw.
    pub is_raw: bool,
}

/// The world outside of the descriptor and its files.
pub trait Outside {
    /// The devices there are.
    fn devices(&self) -> Result<Vec<Device>>;

    /// Those that may have one of these images, and perhaps others.
    fn devices_of(&self, _images: &[PathBuf]) -> Result<Vec<Device>> {
        self.devices()
    }

    /// Makes the running device write to a new top.
    fn snapshot(&self, device: &Device, top: NewDelta<'_>, freeze: Freeze) -> Result<()>;

    /// Merges `level` of the running device into the level below, or waits for that to end if it
    /// is going on. When it is over the device has one level less.
    fn merge(&self, device: &Device, level: u32) -> Result<()>;

    /// Puts another image in the place of `level` of the running device.
    fn replace(&self, device: &Device, level: u32, with: NewDelta<'_>) -> Result<()>;

    /// Merges the image `upper`, which nobody has attached, into `lower`, which is grown if it is
    /// smaller. Begun again after it was ended, it goes on.
    fn merge_files(&self, lower: &Path, kind: Base, upper: &Path) -> Result<()>;

    /// Gives the running device another size.
    fn grow(&self, device: &Device, sectors: u64) -> Result<()>;

    /// Gives the image of a top that nobody has attached another size.
    fn grow_file(&self, path: &Path, kind: Base, sectors: u64) -> Result<()>;

    /// Makes the image of the top of the running device shorter; by how many bytes.
    fn compact(&self, device: &Device) -> Result<u64>;

    /// The same for an image that nobody has attached.
    fn compact_file(&self, path: &Path) -> Result<u64>;

    /// Waits until no long operation runs on the device.
    fn settle(&self, device: &Device) -> Result<()>;

    /// Told after every step of an operation.
    fn step(&self, _name: &str) {}
}

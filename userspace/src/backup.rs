// SPDX-License-Identifier: GPL-2.0
//! Backups of a disk in files: a full one, and incremental ones that build on each other.
//!
//! ```text
//! take (from a disk) -> write -> wire        restore (to an image), verify -> chain -> read -> wire
//! ```
//!
//! None of this knows devices, checkpoints or snapshots: what is read is a [`Source`], which does
//! not change meanwhile, and what is wanted of it are ranges.

pub mod chain;
mod pace;
pub mod read;
pub mod restore;
pub mod take;
pub mod wire;
pub mod write;

#[cfg(test)]
mod tests;

pub use pace::Pace;
pub use take::{take, Wanted};

use crate::error::{Code, Error, Result};
use crate::offline::{Go, Progress};

/// A disk that does not change while it is read.
pub trait Source {
    /// Bytes of the disk.
    fn size_bytes(&self) -> u64;
    /// The first byte from `from` on that may not be zero; the end of the disk, or behind it, if all
    /// are.
    fn next_data(&mut self, from: u64) -> Result<u64>;
    /// Reads bytes of the disk.
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()>;
}

fn go_on(progress: &mut dyn Progress, what: &str) -> Result<()> {
    match progress.go() {
        Go::On => Ok(()),
        Go::Stop | Go::Die => Err(Error::new(Code::Aborted, format!("interrupted: {what}"))),
    }
}

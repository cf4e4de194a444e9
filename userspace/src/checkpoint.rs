// SPDX-License-Identifier: GPL-2.0
//! Checkpoints: what of its disk a device noted as written since a moment. They belong to the device,
//! are stored in its image when it is detached, and are gone after a crash.

use crate::descriptor::guid::Guid;
use crate::dev::{self, Begin};
use crate::error::{Code, Error, Result};
use crate::operate::{open, refused};
use crate::sysfs::Device;
use nix::errno::Errno;
use ploop_pure::abi::{self, Extent};
use std::collections::VecDeque;
use std::ops::Range;

/// A checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its name.
    pub id: Guid,
    /// It has begun; if not, it waits for a snapshot.
    pub is_recording: bool,
    /// Bytes that it tells apart.
    pub granularity: u32,
    /// Bytes written to since, in whole granules.
    pub dirty: u64,
    /// Bytes of the disk.
    pub disk: u64,
}

/// The checkpoints of `device`.
pub fn list(device: &Device) -> Result<Vec<Checkpoint>> {
    let node = open(device)?;
    let mut all = Vec::new();
    for index in 0.. {
        let found = node.checkpoint(index);
        match found.map_err(|e| refused(device, "list the checkpoints of", e))? {
            None => break,
            Some(found) => all.push(Checkpoint {
                id: Guid::from_bytes(found.id),
                is_recording: found.state == abi::CHECKPOINT_RECORDING,
                granularity: found.granularity,
                dirty: found.dirty,
                disk: found.disk,
            }),
        }
    }
    Ok(all)
}

/// The checkpoint `id` of `device`, if it notes what is written.
pub fn find(device: &Device, id: Guid) -> Result<Option<Checkpoint>> {
    let all = list(device)?;
    Ok(all.into_iter().find(|c| c.id == id && c.is_recording))
}

/// Lets the checkpoint `id` begin with the next snapshot of `device`.
pub fn arm(device: &Device, id: Guid) -> Result<()> {
    let done = open(device)?.checkpoint_start(id.bytes(), Begin::AtSnapshot);
    done.map_err(|e| {
        let error = refused(device, "start a checkpoint of", e);
        match e {
            Errno::EMFILE => error.hint(format!(
                "a device has at most {} checkpoints: 'ploopctl checkpoint list' shows them, 'ploopctl \
                 checkpoint drop' removes one",
                abi::CHECKPOINTS_MAX
            )),
            _ => error,
        }
    })
}

/// Drops the checkpoint `id` of `device`; whether there was one.
pub fn drop(device: &Device, id: Guid) -> Result<bool> {
    match open(device)?.checkpoint_drop(id.bytes()) {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(e) => Err(refused(device, "drop a checkpoint of", e)),
    }
}

/// What was written since a checkpoint, in ascending order, asked for as it is needed.
pub struct Written<'a> {
    device: &'a Device,
    node: dev::Device,
    id: Guid,
    /// What was not asked for yet.
    rest: (u64, u64),
    found: VecDeque<Extent>,
    has_failed: bool,
}

impl<'a> Written<'a> {
    /// Since the checkpoint `id` of `device`.
    pub fn since(device: &'a Device, id: Guid) -> Result<Self> {
        Ok(Self {
            device,
            node: open(device)?,
            id,
            rest: (0, device.size),
            found: VecDeque::new(),
            has_failed: false,
        })
    }

    fn ask(&mut self) -> Result<()> {
        let (start, len) = self.rest;
        let read = self.node.checkpoint_read(self.id.bytes(), start, len);
        let (found, rest) = read.map_err(|e| match e {
            Errno::ENOENT => gone(self.device, self.id),
            e => refused(self.device, "read a checkpoint of", e),
        })?;
        // An answer of nothing would be asked for without end.
        if rest.1 >= len && rest.1 != 0 {
            return Err(refused(self.device, "read a checkpoint of", Errno::EPROTO));
        }
        self.found = found.into();
        self.rest = rest;
        Ok(())
    }
}

impl Iterator for Written<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.found.is_empty() && self.rest.1 > 0 && !self.has_failed {
            if let Err(e) = self.ask() {
                self.has_failed = true;
                return Some(Err(e));
            }
        }
        let extent = self.found.pop_front()?;
        Some(Ok(extent.start..extent.start.saturating_add(extent.len)))
    }
}

/// The refusal of what needs the checkpoint `id`.
pub fn gone(device: &Device, id: Guid) -> Error {
    let at = device.device.display();
    let what = format!("{at} does not know what was written since the checkpoint {id}");
    Error::new(Code::NoCheckpoint, what).hint(
        "a checkpoint is lost in a crash, and when a raw image is detached: run 'ploopctl backup full'",
    )
}

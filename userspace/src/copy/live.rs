// SPDX-License-Identifier: GPL-2.0
//! What the kernel does for the copy of a disk in use: it notes what is written, and makes the disk
//! stand still. Behind a trait, so that tests can be the kernel.

use crate::dev;
use crate::disk::freeze::Frozen;
use crate::error::{Code, Error, Result};
use crate::operate;
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;
use ploop_pure::abi::TrackExtent;

/// A device whose writes are noted.
pub trait Live {
    /// Begins; what there is of the image file.
    fn begin(&mut self) -> Result<TrackExtent>;
    /// The image file is about to be read up to byte `end`.
    fn announce(&mut self, end: u64) -> Result<()>;
    /// Takes the next part that was written to, or was never announced.
    fn next(&mut self) -> Result<Option<TrackExtent>>;
    /// Ends. An error if anything is left.
    fn finish(&mut self) -> Result<()>;
    /// Ends, whatever is left.
    fn abort(&mut self);
    /// Makes the disk stand still, with all that was written in the image file.
    fn freeze(&mut self) -> Result<()>;
    /// Lets it go on.
    fn thaw(&mut self);
}

/// A device of the kernel.
pub struct Kernel {
    device: Device,
    node: dev::Device,
    is_tracked: bool,
    frozen: Option<Held>,
}

/// What is frozen, in the order in which it is thawed.
struct Held {
    is_by_module: bool,
    others: Vec<Frozen>,
}

impl Kernel {
    /// Opens the device.
    pub fn open(device: Device) -> Result<Self> {
        let node = operate::open(&device)?;
        Ok(Self {
            device,
            node,
            is_tracked: false,
            frozen: None,
        })
    }

    fn refused(&self, what: &str, e: Errno) -> Error {
        let at = self.device.device.display();
        match e {
            Errno::ECONNABORTED => {
                let what = format!("the kernel has lost track of what was written to {at}");
                Error::new(Code::DeviceIoctl, what).hint("copy it again")
            }
            _ => operate::refused(&self.device, what, e),
        }
    }

    /// Leaves the disk frozen.
    pub fn keep_frozen(mut self) {
        if let Some(held) = self.frozen.take() {
            held.others.into_iter().for_each(Frozen::keep);
        }
    }
}

impl Live for Kernel {
    fn begin(&mut self) -> Result<TrackExtent> {
        let begun = self
            .node
            .track_init()
            .map_err(|e| self.refused("track the writes of", e))?;
        self.is_tracked = true;
        // From here on nobody can change them.
        let now = Sysfs::default().device(self.device.index)?;
        if now.is_none_or(|now| now.deltas != self.device.deltas) {
            let what = format!(
                "the images of {} have changed",
                self.device.device.display()
            );
            return Err(Error::new(Code::Busy, what).hint("try again"));
        }
        Ok(begun)
    }

    fn announce(&mut self, end: u64) -> Result<()> {
        let done = self.node.track_setpos(end);
        done.map_err(|e| self.refused("track the writes of", e))
    }

    fn next(&mut self) -> Result<Option<TrackExtent>> {
        match self.node.track_read() {
            Ok(extent) => Ok(Some(extent)),
            Err(Errno::EAGAIN) => Ok(None),
            Err(e) => Err(self.refused("tell what was written to", e)),
        }
    }

    fn finish(&mut self) -> Result<()> {
        match self.node.track_stop() {
            Ok(()) => {
                self.is_tracked = false;
                Ok(())
            }
            Err(Errno::EBUSY) => Err(not_quiet(&self.device.device.display().to_string())),
            Err(e) => Err(self.refused("end the tracking of", e)),
        }
    }

    fn abort(&mut self) {
        if self.is_tracked {
            self.is_tracked = false;
            // The last close does it, too.
            let _ = self.node.track_abort();
        }
    }

    fn freeze(&mut self) -> Result<()> {
        let sysfs = Sysfs::default();
        // Undone by the drop of what is frozen, and by `thaw`.
        let mut held = Held {
            is_by_module: false,
            others: vec![Frozen::stacked_on(&sysfs, self.device.index)?],
        };
        match self.node.freeze() {
            Ok(()) => held.is_by_module = true,
            // A module that does not do it.
            Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => {
                held.others
                    .push(Frozen::mounted_on(&sysfs, self.device.index)?);
            }
            Err(e) => return Err(self.refused("freeze the file systems on", e)),
        }
        self.frozen = Some(held);
        self.node
            .sync()
            .map_err(|e| self.refused("write the data of", e))
    }

    fn thaw(&mut self) {
        let Some(held) = self.frozen.take() else {
            return;
        };
        let thawed = match held.is_by_module {
            true => self.node.thaw(),
            false => Ok(()),
        };
        drop(held);
        if let Err(e) = thawed {
            let at = self.device.device.display();
            crate::output::note(&format!(
                "cannot thaw the file systems on {at}: {}; run 'ploopctl copy thaw {at}'",
                e.desc()
            ));
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.thaw();
        self.abort();
    }
}

/// The disk is written to although it should stand still.
pub fn not_quiet(at: &str) -> Error {
    let what = format!("{at} is still written to after it was frozen");
    Error::new(Code::Loops, what).hint(
        "something writes to the disk itself, not to a mounted file system: stop it by --stop-command",
    )
}

// SPDX-License-Identifier: GPL-2.0
//! Handing judged images to the kernel, and saying why it does not take one.

use super::Judged;
use crate::cli::AttachArgs;
use crate::cmd::control::{self, Making};
use crate::dev::{Control, Delta};
use crate::error::{Code, Error, Result};
use crate::image::mend;
use nix::errno::Errno;
use ploop_pure::abi;
use ploop_pure::problem::Cure;
use ploop_pure::repair::{Plan, Scope};
use std::os::fd::AsFd;
use std::path::Path;

/// Gives the images, base first, to a new device and starts it. Returns its number.
pub(super) fn start(args: &AttachArgs, chain: &[Judged]) -> Result<u32> {
    let control: Control = control::open()?;
    let making = Making::begin(&control, args.device)?;
    let device = making.device()?;
    for judged in chain {
        let delta = Delta {
            image: judged.image.file().as_fd(),
            format: judged.format,
            flags: judged.flags,
            cluster_log: judged.member.cluster.log_sectors(),
            cookie: args.cookie.as_deref(),
        };
        let added = device.add_delta(delta);
        added.map_err(|e| judged.refused("attach", e))?;
    }
    if let Some(top) = chain.last() {
        device.start().map_err(|e| top.refused("start", e))?;
    }
    let index = making.index();
    making.finish();
    Ok(index)
}

impl Judged {
    /// The kernel did not take the image.
    fn refused(&self, what: &str, e: Errno) -> Error {
        match (e, self.format) {
            (Errno::EINVAL | Errno::EIO, abi::FORMAT_PLOOP1) => self
                .look()
                .err()
                .unwrap_or_else(|| refused(self.image.path(), what, e)),
            _ => refused(self.image.path(), what, e),
        }
    }

    /// What is wrong with the image, if that can be seen from here.
    fn look(&self) -> Result<()> {
        let report = self
            .image
            .check()?
            .map_err(|p| self.image.not_an_image(p))?;
        match Plan::new(&report.findings, Scope::Needed) {
            Some(plan) if plan.cure() != Cure::Lossless => {
                Err(mend::lossy(self.image.path(), &report))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn refused(path: &Path, what: &str, e: Errno) -> Error {
    let what = format!("the kernel refused to {what} {}", path.display());
    let (code, hint) = match e {
        Errno::EBUSY | Errno::ETXTBSY => (
            Code::InUse,
            "it is in use: attached, locked by another program, or being written to",
        ),
        Errno::EPERM | Errno::EACCES => (
            Code::DeviceIoctl,
            "only root may attach, and only with an image it may open",
        ),
        Errno::EROFS => (Code::Open, "its file system is read-only: use -r"),
        Errno::EINVAL => (
            Code::DeviceIoctl,
            "the image was found good here; 'dmesg' says what the kernel does not accept",
        ),
        Errno::ENOMEM => (Code::Memory, "'dmesg' says how much its map needs"),
        Errno::ENOTTY => (Code::DeviceIoctl, crate::operate::OLDER),
        _ => (Code::DeviceIoctl, "'dmesg' may say more"),
    };
    Error::io(code, what, e).hint(hint)
}

// SPDX-License-Identifier: GPL-2.0
//! ploop: a container's disk in image files, thin and stackable.
//!
//! A request goes down: `disk` (blk-mq) -> `engine` (what [`ploop_pure::flow`] decides, done) ->
//! `chain` (which delta, which slot) and `io` (bytes to the file). Control goes `ctl` -> `device`.
//! `docs/architecture.md` tells the whole story.

#![deny(unsafe_code)]

use crate::sys::prelude::*;

mod chain;
mod ctl;
mod device;
mod disk;
mod engine;
mod error;
mod format;
mod io;
mod sys;

module! {
    type: Ploop,
    name: "ploop",
    authors: ["The ploop authors"],
    description: "Container in a file: thin, stackable block devices",
    license: "GPL",
}

/// What exists while the module is loaded. Fields are dropped in this order: first nobody can ask
/// for devices any more, then the devices go.
#[pin_data]
struct Ploop {
    #[pin]
    control: sys::misc::MiscDevice<ctl::Registry>,
    major: sys::misc::BlockMajor<ctl::Registry>,
    minor_file: Option<sys::proc::NumberFile<ctl::Registry>>,
    _devices: Devices,
}

/// All devices go when this does.
struct Devices {
    registry: Arc<ctl::Registry>,
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.registry.close();
        sys::gen_disk::wait_until_freed();
        sys::report_leaks();
    }
}

impl kernel::InPlaceModule for Ploop {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            let registry = ctl::Registry::new()?;
            let minor_file = if sys::proc::is_wanted() {
                let owner = registry.clone();
                Some(sys::proc::NumberFile::new(c"vz", c"ploop_minor", owner)?)
            } else {
                None
            };
            // From the last one on devices are made, by who opens a node: nothing fails after it, and
            // nothing before it leaves one.
            Ok(try_pin_init!(Self {
                _devices: Devices {
                    registry: registry.clone(),
                },
                minor_file,
                control <- sys::misc::MiscDevice::register(c"ploop-control", registry.clone()),
                major: sys::misc::BlockMajor::register(
                    ploop_pure::abi::MAJOR,
                    c"ploop",
                    registry,
                )?,
            }? Error))
        })
    }
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl`: makes, attaches, checks and repairs ploop images.
//!
//! ```text
//! cli -> cmd -> disk (a disk with a descriptor) -> descriptor (the file that describes it)
//!        copy (to another place) -> descriptor, disk::freeze
//!               operate (long operations of the kernel), checkpoint (what it noted of writes)
//!               backup (files that hold a disk)
//!               conf (disks that a host attaches)
//!               offline (merge, grow, compact, convert image files), progress
//!               image (bytes of an image file), locks, sysfs and mountinfo (what the kernel says), dev (ioctls)
//!               output, error, signals, size below all
//! ```
//!
//! What is *decided* about an image is decided in `ploop_pure`, which the kernel module shares;
//! here are the files and the words.

#![deny(unsafe_code)]

pub mod backup;
pub mod checkpoint;
pub mod cli;
pub mod cmd;
pub mod conf;
pub mod copy;
pub mod descriptor;
#[allow(unsafe_code)]
pub mod dev;
pub mod disk;
pub mod error;
pub mod image;
pub mod locks;
pub mod mountinfo;
pub mod offline;
pub mod operate;
pub mod output;
pub mod progress;
pub mod signals;
pub mod size;
pub mod sysfs;

use clap::error::ErrorKind;
use clap::Parser;
use error::{Code, Error};
use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = match cli::Cli::try_parse() {
        Ok(args) => args,
        Err(e) => {
            // Help and version are answers, not errors.
            let is_answer = matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            let _ = e.print();
            if let (ErrorKind::DisplayVersion, Some(module)) = (e.kind(), cmd::module_version()) {
                let _ = output::text(&format!("{module}\n"));
            }
            return ExitCode::from(if is_answer { 0 } else { Code::Param as u8 });
        }
    };
    match cmd::run(args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn fail(e: &Error) -> ExitCode {
    if !e.is_broken_pipe() {
        output::note(&format!("ploopctl: {e}"));
    }
    ExitCode::from(e.code() as u8)
}

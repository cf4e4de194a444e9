// SPDX-License-Identifier: GPL-2.0
//! Everything in ploop that *decides*: the on-disk layout, the ioctl ABI, units, the cluster map,
//! allocation, the order of writes, the checks of an image and the device's states.
//!
//! This crate has no kernel types and does no I/O. The kernel module links it as an rlib, the
//! tool and the host tests use it as a Cargo package: all three run the same files. What must be
//! stored goes through [`mem::Vector`], whose growth can fail, or through slices of the caller.
//!
//! `cfg(kernel)` tells the module's build from Cargo's. `cfg(mutant = "…")` breaks one ordering
//! rule on purpose, so that the tests can show that they would notice; it is never set otherwise.
//! With `cfg(mutant = "chosen")`, the variable `PLOOP_MUTANT` says at run time which one.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

/// Whether this decision is turned round on purpose.
#[cfg(not(mutant = "chosen"))]
macro_rules! mutant {
    ($name:literal) => {
        cfg!(mutant = $name)
    };
}
#[cfg(mutant = "chosen")]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_chosen($name)
    };
}

pub mod abi;
pub mod alloc;
pub mod blocks;
pub mod chain;
pub mod check;
pub mod commit;
pub mod discard;
pub mod error;
pub mod extent;
pub mod flow;
pub mod index;
pub mod layout;
pub mod lifecycle;
pub mod map;
pub mod mem;
#[cfg(mutant = "chosen")]
mod mutants;
pub mod offline;
pub mod problem;
pub mod rate;
pub mod repair;
pub mod slots;
pub mod snapshot;
pub mod track;
pub mod units;

pub use error::Error;

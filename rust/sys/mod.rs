// SPDX-License-Identifier: GPL-2.0
//! THE UNSAFE: thin safe wrappers over the kernel's C objects, one file an object, no policy.
//!
//! Nothing outside this folder names `kernel::bindings`, uses `unsafe` or sees a raw pointer; the
//! crate root denies it. Types are called as in `kernel::block::mq`, so that a later move to it is
//! easy. Differences between kernel versions stay in here.
//!
//! What the wrappers rely on, in one place:
//!
//! * A [`mq::Request`] is owned by exactly one place from `queue_rq` until it is ended.
//! * A driver's data lives until its disk is freed, which is after the last request has ended, the
//!   last opener is gone and the last handler on the driver's workqueue has returned.
//! * Every table of C callbacks names this module as its owner.
#![allow(unsafe_code)]

mod bios;
pub(crate) mod blocks;
mod compat;
pub(crate) mod epoch;
pub(crate) mod file;
pub(crate) mod frozen;
pub(crate) mod fs_freeze;
pub(crate) mod gen_disk;
pub(crate) mod md5;
pub(crate) mod misc;
pub(crate) mod mq;
pub(crate) mod pages;
pub(crate) mod proc;
pub(crate) mod segments;
pub(crate) mod sparse;
pub(crate) mod sysfs;
pub(crate) mod trace;
pub(crate) mod work;

/// What the rest of the module uses of the kernel crate.
pub(crate) mod prelude {
    pub(crate) use kernel::{
        bindings::SECTOR_SHIFT,
        error::code::*,
        fmt, new_condvar, new_mutex, new_spinlock, pr_warn_once,
        prelude::*,
        static_lock_class,
        str::CString,
        sync::{
            atomic::{Acquire, Atomic, Full, Relaxed, Release},
            Arc, Completion, CondVar, Mutex, MutexGuard, SetOnce, SpinLock,
        },
        uaccess::{UserPtr, UserSlice},
    };

    pub(crate) use super::Errno;
}

/// The kernel's raw bindings, and ours of `helpers.h`.
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    dead_code,
    unused_imports
)]
mod bindings {
    pub(crate) use kernel::bindings::*;
    use kernel::ffi;
    include!(env!("PLOOP_BINDINGS"));
}

use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};

/// Lets a table of C callbacks, or of pointers to such, live in a `static`.
#[repr(transparent)]
pub(crate) struct Table<T>(T);
// SAFETY: Tables are never written after the compiler made them; C code reads them.
unsafe impl<T> Sync for Table<T> {}

/// Error numbers that the kernel crate has no name for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errno {
    /// The file system cannot do that.
    OpNotSupp,
    /// The quota is exhausted.
    Quota,
    /// Something would build on itself.
    Loop,
    /// A path is too long.
    NameTooLong,
    /// There are no locks to be had.
    NoLocks,
    /// Nothing of the kind exists.
    NoSys,
    /// Somebody wanted it to end early.
    Cancelled,
}

impl Errno {
    /// The error.
    pub(crate) fn error(self) -> Error {
        Error::from_errno(-(self.number() as i32))
    }

    /// Whether `error` is this one.
    pub(crate) fn is(self, error: Error) -> bool {
        error.to_errno() == -(self.number() as i32)
    }

    const fn number(self) -> u32 {
        match self {
            Self::OpNotSupp => bindings::EOPNOTSUPP,
            Self::Quota => bindings::EDQUOT,
            Self::Loop => bindings::ELOOP,
            Self::NameTooLong => bindings::ENAMETOOLONG,
            Self::NoLocks => bindings::ENOLCK,
            Self::NoSys => bindings::ENOSYS,
            Self::Cancelled => bindings::ECANCELED,
        }
    }
}

/// Live C objects that this module made; all must be gone when it is unloaded.
pub(crate) struct Live {
    name: &'static str,
    nr: Atomic<i64>,
}

impl Live {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            nr: Atomic::new(0),
        }
    }

    fn add(&self) {
        self.nr.add(1, Relaxed);
    }

    fn sub(&self) {
        self.nr.add(-1, Relaxed);
    }
}

static FILES: Live = Live::new("files");
static DISKS: Live = Live::new("disks");
static PAGES: Live = Live::new("pages");
static QUEUES: Live = Live::new("workqueues");

/// Complains about objects that are still there at module unload.
pub(crate) fn report_leaks() {
    for live in [&FILES, &DISKS, &PAGES, &QUEUES] {
        let nr = live.nr.load(Relaxed);
        if nr != 0 {
            pr_err!("leak: {} {}\n", nr, live.name);
        }
    }
}

/// Whether the caller may administer the system.
pub(crate) fn is_admin() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) }
}

/// Whether somebody wants the current task dead; long loops of control calls end then.
pub(crate) fn is_killed() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_fatal_signal_pending() }
}

/// Milliseconds since some moment in the past; never goes back.
pub(crate) fn uptime_ms() -> u64 {
    // SAFETY: No preconditions.
    unsafe { bindings::ktime_get() }.unsigned_abs() / 1_000_000
}

/// Sleeps.
pub(crate) fn sleep_ms(ms: u64) {
    let ms = c_uint::try_from(ms).unwrap_or(c_uint::MAX);
    // SAFETY: Callers may sleep.
    unsafe { bindings::ploop_sleep_ms(ms) };
}

/// The same, until a signal that kills the caller; whether there is one.
pub(crate) fn sleep_killable_ms(ms: u64) -> bool {
    let ms = c_uint::try_from(ms).unwrap_or(c_uint::MAX);
    // SAFETY: Callers may sleep.
    unsafe { bindings::ploop_sleep_killable_ms(ms) }
}

/// Bytes of memory of this machine.
pub(crate) fn ram_bytes() -> u64 {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_totalram_bytes() as u64 }
}

/// The module parameter `map_limit_mb`; 0 if not set.
pub(crate) fn map_limit_mb() -> u32 {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_map_limit_mb() }
}

/// The module parameter `bdev`: whether I/O may go past a file system where that can be done.
pub(crate) fn wants_bdev() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_wants_bdev() }
}

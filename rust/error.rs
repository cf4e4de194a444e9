// SPDX-License-Identifier: GPL-2.0
//! Faults of pure code as errnos, and what errnos say, in one place.

use crate::sys::prelude::*;
use ploop_pure::{lifecycle::Refusal, problem::Problem};

/// A fault of pure code, to be printed: the kernel has a `Display` of its own.
pub(crate) struct Shown<T>(pub(crate) T);

impl<T: core::fmt::Display> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}

/// The errno of a fault that pure code found.
pub(crate) fn errno(e: ploop_pure::Error) -> Error {
    match e {
        ploop_pure::Error::NoMemory => ENOMEM,
        ploop_pure::Error::Overflow | ploop_pure::Error::Invalid => EINVAL,
        ploop_pure::Error::Image(Problem::InUse) | ploop_pure::Error::Busy => EBUSY,
        ploop_pure::Error::Image(_) => EINVAL,
        ploop_pure::Error::NotFound => ENOENT,
        ploop_pure::Error::TooBig => EFBIG,
    }
}

/// Whether an error says that there is no space.
pub(crate) fn is_no_space(error: Error) -> bool {
    error == ENOSPC || Errno::Quota.is(error)
}

/// The errno of a control call that is not admitted.
pub(crate) fn refusal(r: Refusal) -> Error {
    match r {
        Refusal::Busy => EBUSY,
        Refusal::NotFound => ENOENT,
        Refusal::Invalid => EINVAL,
    }
}

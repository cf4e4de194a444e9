// SPDX-License-Identifier: GPL-2.0
//! The faults that pure code can find. Kernel and tool each map them to an errno once.

use crate::problem::Problem;

/// Why pure code refused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// Memory for a table could not be had.
    NoMemory,
    /// A number does not fit its type or range.
    Overflow,
    /// The image is not acceptable; says which field.
    Image(Problem),
    /// The device or image is in use in a way that excludes the request.
    Busy,
    /// The thing named does not exist.
    NotFound,
    /// The argument makes no sense.
    Invalid,
    /// A limit of the format is reached.
    TooBig,
}

impl From<Problem> for Error {
    fn from(p: Problem) -> Self {
        Self::Image(p)
    }
}

impl From<crate::mem::AllocError> for Error {
    fn from(_: crate::mem::AllocError) -> Self {
        Self::NoMemory
    }
}

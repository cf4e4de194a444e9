// SPDX-License-Identifier: GPL-2.0
//! Waiting until everybody who may still use an old place is gone: a sleepable-RCU domain.

use super::bindings;
use core::ptr::NonNull;
use kernel::prelude::*;

/// What the requests of a disk enter before they look a place up, and leave when they no longer
/// use it. Who frees or moves a place first makes it impossible to find, then waits.
///
/// # Invariants
///
/// The pointer is a domain of ours.
pub(crate) struct Epoch(NonNull<bindings::srcu_struct>);

// SAFETY: Sleepable RCU is thread-safe.
unsafe impl Send for Epoch {}
// SAFETY: As above.
unsafe impl Sync for Epoch {}

impl Epoch {
    /// A domain with nobody inside.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: No preconditions; may sleep.
        let raw = NonNull::new(unsafe { bindings::ploop_epoch_new() }).ok_or(ENOMEM)?;
        // INVARIANT: Just made.
        Ok(Self(raw))
    }

    /// Enters; what is returned goes to [`Self::leave`], from any context.
    pub(super) fn enter(&self) -> i32 {
        // SAFETY: A live domain by the invariant.
        unsafe { bindings::ploop_epoch_enter(self.0.as_ptr()) }
    }

    /// Leaves.
    ///
    /// # Safety
    ///
    /// `idx` is what [`Self::enter`] of this epoch returned, and is used once.
    pub(super) unsafe fn leave(&self, idx: i32) {
        // SAFETY: A live domain by the invariant; the rest by the contract.
        unsafe { bindings::ploop_epoch_leave(self.0.as_ptr(), idx) };
    }

    /// Waits until all who are inside now have left. The caller must not be inside.
    pub(crate) fn wait(&self) {
        // SAFETY: A live domain by the invariant.
        unsafe { bindings::ploop_epoch_wait(self.0.as_ptr()) };
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        // SAFETY: Ours by the invariant; who is inside holds the driver whose part this is.
        unsafe { bindings::ploop_epoch_free(self.0.as_ptr()) };
    }
}

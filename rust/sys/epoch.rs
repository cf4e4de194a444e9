// SPDX-License-Identifier: GPL-2.0
//! Waiting until everybody who may still use an old place is gone: a sleepable-RCU domain.

use super::bindings;
use core::{
    marker::PhantomData,
    ptr::{self, NonNull},
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed},
        Arc,
    },
};

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

/// A value that many look at without a lock and few exchange.
///
/// # Invariants
///
/// The pointer is null or came from `Arc::into_raw`, and that reference is ours. It is dropped only
/// after it was exchanged and all who were inside the epoch then have left.
pub(crate) struct Guarded<T> {
    at: Atomic<*mut T>,
    epoch: Arc<Epoch>,
    owns: PhantomData<Arc<T>>,
}

// SAFETY: It hands out `&T` on several threads and may drop the `T` on any.
unsafe impl<T: Send + Sync> Send for Guarded<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Guarded<T> {}

impl<T> Guarded<T> {
    /// Nothing, looked at inside `epoch`.
    pub(crate) fn new(epoch: Arc<Epoch>) -> Self {
        // INVARIANT: Null.
        Self {
            at: Atomic::new(ptr::null_mut()),
            epoch,
            owns: PhantomData,
        }
    }

    /// Whether there is a value.
    #[inline]
    pub(crate) fn is_some(&self) -> bool {
        !self.at.load(Relaxed).is_null()
    }

    /// Looks at the value, if there is one. Any context.
    pub(crate) fn with(&self, f: impl FnOnce(&T)) {
        if !self.is_some() {
            return;
        }
        let idx = self.epoch.enter();
        let at = self.at.load(Acquire);
        if !at.is_null() {
            // SAFETY: By the invariant it lives until we have left the epoch.
            f(unsafe { &*at });
        }
        // SAFETY: From `enter` above, used once.
        unsafe { self.epoch.leave(idx) };
    }

    /// Puts another value, or none, in its place, and waits until nobody looks at the old one. The
    /// caller must not be inside the epoch.
    pub(crate) fn set(&self, new: Option<Arc<T>>) {
        let new = new.map_or(ptr::null_mut(), |new| Arc::into_raw(new).cast_mut());
        // INVARIANT: Null or from `into_raw`; the old one is dropped after the wait.
        let old = self.at.xchg(new, Full);
        if !old.is_null() {
            self.epoch.wait();
            // SAFETY: By the invariant the reference was ours, and nobody can reach it any more.
            drop(unsafe { Arc::from_raw(old) });
        }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        self.set(None);
    }
}

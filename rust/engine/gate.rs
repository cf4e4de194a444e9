// SPDX-License-Identifier: GPL-2.0
//! What commits of a new engine wait for: that the top of the one before is finished.

use crate::sys::prelude::*;

/// The gate of an engine. It is open, or closed before anybody can see the engine and opened once.
#[pin_data]
pub(crate) struct Gate {
    is_open: Atomic<bool>,
    #[pin]
    opened: Completion,
}

impl Gate {
    /// An open one.
    pub(super) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            is_open: Atomic::new(true),
            opened <- Completion::new(),
        })
    }

    /// Closes it until the guard is dropped. Once, and before its engine is that of the device.
    pub(crate) fn close(&self) -> GateClosed<'_> {
        self.is_open.store(false, Relaxed);
        GateClosed(self)
    }

    /// Whether nobody has to wait at it.
    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Acquire)
    }

    /// Waits until it is open. May sleep for as long as it takes to write and sync an index.
    pub(super) fn pass(&self) {
        if !self.is_open() {
            self.opened.wait_for_completion();
        }
    }
}

/// Keeps a gate closed.
pub(crate) struct GateClosed<'a>(&'a Gate);

impl Drop for GateClosed<'_> {
    fn drop(&mut self) {
        self.0.is_open.store(true, Release);
        self.0.opened.complete_all();
    }
}

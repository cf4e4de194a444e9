// SPDX-License-Identifier: GPL-2.0
//! Holding back the signals that end a program while it must not be ended.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// The signals by which a user ends a program wait while this lives.
pub struct Quiet(Option<SigSet>);

impl Quiet {
    /// Holds the signals back.
    pub fn begin() -> Self {
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ] {
            set.add(signal);
        }
        Self(set.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = before.thread_set_mask();
        }
    }
}

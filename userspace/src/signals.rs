// SPDX-License-Identifier: GPL-2.0
//! Holding back the signals that end a program while it must not be ended.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, BorrowedFd};

/// The signals by which a user ends a program.
fn ending() -> SigSet {
    SigSet::from_iter([
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ])
}

/// Those, and what else would stop or end a program that has frozen file systems.
fn held() -> SigSet {
    let mut held = ending();
    for signal in [
        Signal::SIGTSTP,
        Signal::SIGALRM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        held.add(signal);
    }
    held
}

/// While this lives, those signals do not end the program, which asks for them instead.
pub struct Requests {
    /// `None` if they cannot be asked for: then they end the program as usual.
    arrived: Option<SignalFd>,
    _quiet: Option<Quiet>,
    is_end_asked: bool,
}

impl Requests {
    /// Holds the signals back.
    pub fn begin() -> Self {
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let arrived = SignalFd::with_flags(&ending(), flags).ok();
        Self {
            _quiet: arrived.is_some().then(Quiet::begin),
            arrived,
            is_end_asked: false,
        }
    }

    /// What becomes readable when one of them arrives.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.arrived.as_ref().map(AsFd::as_fd)
    }

    /// Whether one of them has arrived.
    pub fn is_end_asked(&mut self) -> bool {
        while let Some(Ok(Some(_))) = self.arrived.as_mut().map(|a| a.read_signal()) {
            self.is_end_asked = true;
        }
        self.is_end_asked
    }
}

/// The signals by which a user ends a program wait while this lives.
pub struct Quiet(Option<SigSet>);

impl Quiet {
    /// Holds the signals back.
    pub fn begin() -> Self {
        Self(held().thread_swap_mask(SigmaskHow::SIG_BLOCK).ok())
    }
}

/// Starts a program, by `start`: it shall not inherit that they wait. One that has arrived ends us.
pub fn for_child<T>(start: impl FnOnce() -> T) -> T {
    let before = held().thread_swap_mask(SigmaskHow::SIG_UNBLOCK);
    let started = start();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    started
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = before.thread_set_mask();
        }
    }
}

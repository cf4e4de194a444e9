// SPDX-License-Identifier: GPL-2.0
//! What administrators want to hear of: no space, little space, failed requests, a poisoned image, a
//! stopped device. All but the last are uevents, and what does not pass has a line in the kernel
//! log and is what `pstate/event` tells.
//!
//! Uevents are sent by a work item of its own: whoever else sends one, and keeps us from it, may be waiting
//! for memory that is got by writing to this very disk.
//!
//! Locks: `state` is a leaf.

use crate::sys::{
    self,
    gen_disk::{result_variable, Notifier},
    mq::Op,
    prelude::*,
    work::Work,
};
use ploop_pure::rate::Rarely;

/// Bytes of space below which there is a warning, if nothing else was said.
const LOW_WATER: u64 = 1 << 30;

/// What `pstate/event` tells; OpenVZ's numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The image takes no more writes.
    Poisoned = 1,
    /// The device has stopped.
    Stopped = 2,
    /// Writes wait for space.
    Full = 3,
}

/// How it is about space for the image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// Enough.
    Enough,
    /// Less than the low-water mark.
    Low,
    /// Writes wait for some.
    Full,
}

impl Space {
    /// Its name in sysfs and events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Enough => "ok",
            Self::Low => "low",
            Self::Full => "full",
        }
    }
}

/// What is to be told by uevents; of each kind the last.
#[derive(Default)]
struct News {
    /// How it is about space.
    space: bool,
    is_poisoned: bool,
    /// The event's first variable.
    failure: Option<(&'static CStr, Error)>,
}

struct State {
    news: News,
    space: Space,
    is_poisoned: bool,
    is_stopped: bool,
    /// Nobody has been told of [`Event::Full`] yet.
    is_full_new: bool,
    /// Requests that failed.
    failures: Rarely,
}

/// The events of a device, from START to STOP.
#[pin_data]
pub(crate) struct Events {
    device: u32,
    notifier: Notifier,
    low_water: Atomic<u64>,
    #[pin]
    state: Mutex<State>,
    #[pin]
    changed: CondVar,
    #[pin]
    tell: Work<Self>,
}

impl Events {
    /// Nothing has happened.
    pub(crate) fn new(device: u32, notifier: Notifier) -> Result<Arc<Self>> {
        let state = State {
            news: News::default(),
            space: Space::Enough,
            is_poisoned: false,
            is_stopped: false,
            is_full_new: false,
            failures: Rarely::default(),
        };
        Arc::pin_init(
            try_pin_init!(Self {
                device,
                notifier,
                low_water: Atomic::new(LOW_WATER),
                state <- new_mutex!(state),
                changed <- new_condvar!(),
                tell <- Work::new(|this: Arc<Self>| this.send(), static_lock_class!()),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// How it is about space.
    pub(crate) fn space(&self) -> Space {
        self.state.lock().space
    }

    /// The low-water mark in bytes; 0 for none.
    pub(crate) fn low_water(&self) -> u64 {
        self.low_water.load(Relaxed)
    }

    /// Sets it.
    pub(crate) fn set_low_water(&self, bytes: u64) {
        self.low_water.store(bytes, Relaxed);
    }

    /// Has the news told before long.
    fn tell(self: &Arc<Self>) {
        Work::queue_outside(self.clone(), |e| &e.tell);
    }

    /// Sends what is to be told.
    fn send(&self) {
        let (news, space) = {
            let mut state = self.state.lock();
            (core::mem::take(&mut state.news), state.space)
        };
        if let Some((what, error)) = news.failure {
            // Without memory the event is all that is lost.
            if let Ok(errno) = result_variable(Err(error)) {
                self.notifier.event([what, &errno]);
            }
        }
        if news.is_poisoned {
            self.notifier.event([c"PLOOP_POISONED=1"]);
        }
        match space {
            _ if !news.space => {}
            Space::Full => self.notifier.event([c"PLOOP_SPACE=full"]),
            Space::Low => self.notifier.event([c"PLOOP_SPACE=low"]),
            Space::Enough => self.notifier.event([c"PLOOP_SPACE=ok"]),
        }
    }

    /// Sends what is left. Nothing more may happen. Not from where the disk's requests are served.
    pub(crate) fn end(&self) {
        self.tell.cancel_sync();
        self.send();
    }

    /// Writes wait for space, or need not any more.
    pub(super) fn set_full(self: &Arc<Self>, is_full: bool) {
        let mut state = self.state.lock();
        if (state.space == Space::Full) == is_full {
            return;
        }
        state.is_full_new = is_full;
        state.space = match is_full {
            true => Space::Full,
            false => Space::Enough,
        };
        state.news.space = true;
        self.changed.notify_all();
        drop(state);
        if is_full {
            pr_warn!(
                "ploop{}: no space for the image: writes that need some wait for it\n",
                self.device
            );
        } else {
            pr_notice!("ploop{}: there is space for the image again\n", self.device);
        }
        self.tell();
    }

    /// So many bytes can still be written to the file system of the image.
    pub(super) fn space_left(self: &Arc<Self>, bytes: u64) {
        let is_low = bytes < self.low_water();
        let mut state = self.state.lock();
        let now = match (state.space, is_low) {
            (Space::Enough, true) => Space::Low,
            (Space::Low, false) => Space::Enough,
            (Space::Enough | Space::Low | Space::Full, _) => return,
        };
        state.space = now;
        state.news.space = true;
        drop(state);
        if now == Space::Low {
            pr_warn!(
                "ploop{}: {} MiB left in the image's file system\n",
                self.device,
                bytes >> 20
            );
        }
        self.tell();
    }

    /// A request failed, because of its image or for want of space. That is told rarely, as many may.
    pub(super) fn failed(self: &Arc<Self>, op: Op, error: Error) {
        let what = match op {
            Op::Read => c"PLOOP_ERROR=read",
            Op::Write => c"PLOOP_ERROR=write",
            Op::Flush => c"PLOOP_ERROR=flush",
            Op::Discard | Op::WriteZeroes => c"PLOOP_ERROR=discard",
            Op::Other => return,
        };
        {
            let mut state = self.state.lock();
            if !state.failures.is_due(sys::uptime_ms()) {
                return;
            }
            state.news.failure = Some((what, error));
        }
        self.tell();
    }

    /// The image takes no more writes.
    pub(super) fn poisoned(self: &Arc<Self>) {
        {
            let mut state = self.state.lock();
            state.is_poisoned = true;
            state.news.is_poisoned = true;
        }
        self.changed.notify_all();
        self.tell();
    }

    /// The image was replaced by one that takes writes.
    pub(super) fn mended(&self) {
        self.state.lock().is_poisoned = false;
    }

    /// The device has stopped.
    pub(crate) fn stopped(&self) {
        self.state.lock().is_stopped = true;
        self.changed.notify_all();
    }

    /// What there is to tell; waits once if that is nothing, and returns `None` if there still is
    /// not. EINTR if a signal comes first.
    pub(crate) fn wait(&self) -> Result<Option<Event>> {
        let mut state = self.state.lock();
        if let Some(event) = state.take() {
            return Ok(Some(event));
        }
        if self.changed.wait_interruptible(&mut state) {
            return Err(EINTR);
        }
        Ok(state.take())
    }
}

impl State {
    fn take(&mut self) -> Option<Event> {
        if core::mem::take(&mut self.is_full_new) {
            Some(Event::Full)
        } else if self.is_poisoned {
            Some(Event::Poisoned)
        } else if self.is_stopped {
            Some(Event::Stopped)
        } else {
            None
        }
    }
}

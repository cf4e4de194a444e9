// SPDX-License-Identifier: GPL-2.0
//! Telling how far a long operation is, on standard error, and hearing that it shall end: a bar on
//! a terminal, a line at every tenth of the way otherwise.

use crate::offline::{Go, Progress};
use crate::output;
use crate::signals::Requests;
use crate::size::human;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal};

/// Less than this is not worth a line.
const BYTES_MIN: u64 = 64 << 20;

/// The usual way to follow an operation.
pub struct Shown {
    requests: Requests,
    is_terminal: bool,
    bar: Option<ProgressBar>,
    what: String,
    done: u64,
    total: u64,
    tenths: u64,
}

impl Shown {
    /// From now on the signals that end a program ask the operation to end.
    pub fn new() -> Self {
        Self {
            requests: Requests::begin(),
            is_terminal: io::stderr().is_terminal(),
            bar: None,
            what: String::new(),
            done: 0,
            total: 0,
            tenths: 0,
        }
    }
}

impl Default for Shown {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Shown {
    fn begin(&mut self, what: &str, total_bytes: u64) {
        (self.done, self.total, self.tenths) = (0, total_bytes, 0);
        self.what = what.to_owned();
        if !self.is_terminal || total_bytes == 0 {
            return;
        }
        let bar = ProgressBar::new(total_bytes);
        let look = "{msg} {bar:30} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(look) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        } else if self.total >= BYTES_MIN {
            let tenths = (self.done.saturating_mul(10) / self.total).min(10);
            if tenths > self.tenths {
                self.tenths = tenths;
                let (percent, total) = (tenths * 10, human(self.total));
                output::note(&format!("{}: {percent}% of {total}", self.what));
            }
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::note(text)),
            None => output::note(text),
        }
    }

    fn go(&mut self) -> Go {
        if self.requests.is_end_asked() {
            Go::Stop
        } else {
            Go::On
        }
    }
}

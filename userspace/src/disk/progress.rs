// SPDX-License-Identifier: GPL-2.0
//! How far a long operation is: a bar on a terminal, else a line now and then. On standard error.

use crate::output;
use crate::size::human;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines, where there is no terminal.
const LINE_PAUSE: Duration = Duration::from_secs(10);

/// The progress of one operation.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Progress {
    /// Of the operation `what`.
    pub fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(what.clone());
            bar
        });
        Self {
            what,
            bar,
            told: Instant::now(),
        }
    }

    /// `done` of `total` bytes are done.
    pub fn tell(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(done));
            bar.set_position(done);
        } else if self.told.elapsed() >= LINE_PAUSE {
            self.told = Instant::now();
            let percent = u128::from(done) * 100 / u128::from(total.max(1));
            output::note(&format!(
                "{}: {} of {} ({percent}%)",
                self.what,
                human(done),
                human(total)
            ));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Not faster than so many bytes a second.

use super::go_on;
use crate::error::Result;
use crate::offline::Progress;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Between two looks whether the wait is to end.
const PAUSE: Duration = Duration::from_millis(100);

/// A limit on how much is read.
#[derive(Debug)]
pub struct Pace {
    /// Bytes a second; 0 is no limit.
    rate: u64,
    began: Instant,
    done: u64,
}

impl Pace {
    /// At most `rate` bytes a second from now on; 0 is no limit.
    pub fn new(rate: u64) -> Self {
        Self {
            rate,
            began: Instant::now(),
            done: 0,
        }
    }

    /// So many bytes were read: waits until that is not too many.
    pub fn note(&mut self, bytes: u64, progress: &mut dyn Progress) -> Result<()> {
        self.done += bytes;
        let Some(due_ms) = (u128::from(self.done) * 1000).checked_div(self.rate.into()) else {
            return Ok(());
        };
        let due = Duration::from_millis(u64::try_from(due_ms).unwrap_or(u64::MAX));
        while let Some(left) = due
            .checked_sub(self.began.elapsed())
            .filter(|d| !d.is_zero())
        {
            go_on(progress, "nothing was backed up")?;
            sleep(left.min(PAUSE));
        }
        Ok(())
    }
}

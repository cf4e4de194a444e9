// SPDX-License-Identifier: GPL-2.0
//! How long to wait so that no more than so many bytes are moved a second, and how often the same is
//! said.

/// Milliseconds after which what was done before does not count any more.
const WINDOW_MS: u64 = 1000;

/// The pace of an operation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// When the current window began.
    start_ms: u64,
    /// Bytes done since then.
    bytes: u64,
}

impl Pace {
    /// `bytes` were done just now, at `now_ms`; at most `rate` a second are allowed, 0 for any.
    /// Returns how many milliseconds to wait.
    pub fn did(&mut self, bytes: u64, rate: u64, now_ms: u64) -> u64 {
        if rate == 0 {
            *self = Self::default();
            return 0;
        }
        if self.bytes == 0 {
            self.start_ms = now_ms;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        let due = self.bytes.saturating_mul(1000) / rate;
        let gone = now_ms.saturating_sub(self.start_ms);
        if gone > due.saturating_add(WINDOW_MS) {
            // It was slower than it might have been; that is not made up for.
            *self = Self::default();
            return 0;
        }
        due.saturating_sub(gone)
    }
}

/// Milliseconds within which the same is not said again.
const SILENCE_MS: u64 = 10_000;

/// Something that may happen more often than anybody wants to hear of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rarely {
    /// When it was said last.
    last_ms: Option<u64>,
}

impl Rarely {
    /// It happened, at `now_ms`. Whether to say so.
    pub fn is_due(&mut self, now_ms: u64) -> bool {
        let is_due = self
            .last_ms
            .is_none_or(|last| now_ms.saturating_sub(last) >= SILENCE_MS);
        if is_due {
            self.last_ms = Some(now_ms);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn the_rate_is_kept() {
        for (rate, step) in [(1000u64, 100u64), (1 << 20, 1 << 20), (7, 1)] {
            let (mut pace, mut now, mut done) = (Pace::default(), 5u64, 0u64);
            for _ in 0..200 {
                now += pace.did(step, rate, now);
                done += step;
                assert!(
                    done * 1000 <= (now - 5) * rate + step * 1000 + 1000,
                    "{done} in {now}"
                );
            }
            assert!((now - 5) * rate <= (done + step) * 1000);
        }
    }

    #[test]
    fn no_limit_no_wait_and_slowness_is_forgotten() {
        let mut pace = Pace::default();
        assert_eq!(pace.did(1 << 40, 0, 1), 0);
        assert_eq!(pace.did(1000, 1000, 10), 1000);
        assert_eq!(pace.did(1000, 1000, 100_000), 0);
        assert_eq!(pace.did(1000, 1000, 100_000), 1000);
        assert_eq!(pace.did(u64::MAX, 1, 100_000), u64::MAX);
    }

    #[test]
    fn the_same_is_said_at_once_and_then_rarely() {
        let mut errors = Rarely::default();
        let said: Vec<u64> = (0..100u64)
            .map(|n| n * 300)
            .filter(|now| errors.is_due(*now))
            .collect();
        assert_eq!(said, [0, 10_200, 20_400]);
        // A clock that goes back is no reason to say it.
        assert!(!errors.is_due(0));
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Allocation of slots in the image file of the top delta.
//!
//! Slots are handed out in ascending order from `head`, so long as they lie inside the file, which
//! is grown ahead in steps. A slot comes back only when the write that took it failed; it may hold
//! data then and must read as zeros, durably, before it is handed out again (ordering rule 4).

use crate::mem::Vector;
use crate::units::{ClusterSize, ImageCluster};
use crate::Error;

/// Answer of [`Alloc::take`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// The slot is the caller's; it reads as zeros.
    Slot(ImageCluster),
    /// The file has to be grown, or returned slots cleaned, first.
    NeedSpace,
    /// No entry can name another slot.
    Full,
}

/// Most slots remembered after failed writes; more are left to the check after detach.
pub const RETURNED_MAX: usize = 256;
/// Growth of the file in one step: at least this, in bytes, and a cluster.
pub const STEP_BYTES_MIN: u64 = 8 << 20;
/// Growth of the file in one step: at most this, in bytes, or a cluster.
pub const STEP_BYTES_MAX: u64 = 128 << 20;

/// The free slots of an image file.
#[derive(Debug)]
pub struct Alloc {
    cluster: ClusterSize,
    /// First slot never handed out.
    head: u32,
    /// Slots inside the file.
    limit: u32,
    /// Slots that entries can name.
    max: u32,
    /// Came back and may hold data.
    returned: Vector<ImageCluster>,
    /// Of those, how many are being made zero at this moment.
    nr_cleaning: u32,
    /// Came back and read as zeros again.
    cleaned: Vector<ImageCluster>,
}

impl Alloc {
    /// For a file of `limit` clusters whose slots from `head` on were never used and read as
    /// zeros, in a format that can name `max` slots.
    ///
    /// All memory is had here: the other calls are made under a spin lock.
    pub fn new(cluster: ClusterSize, head: u32, limit: u32, max: u32) -> Result<Self, Error> {
        let (mut returned, mut cleaned) = (Vector::new(), Vector::new());
        returned.try_reserve(RETURNED_MAX)?;
        cleaned.try_reserve(RETURNED_MAX)?;
        Ok(Self {
            cluster,
            head,
            limit: limit.min(max),
            max,
            returned,
            nr_cleaning: 0,
            cleaned,
        })
    }

    /// Takes the next slot.
    pub fn take(&mut self) -> Take {
        if let Some(at) = self.cleaned.pop() {
            return Take::Slot(at);
        }
        if self.head < self.limit {
            self.head += 1;
            return Take::Slot(ImageCluster(self.head - 1));
        }
        if self.limit < self.max || !self.returned.is_empty() || self.nr_cleaning > 0 {
            Take::NeedSpace
        } else {
            Take::Full
        }
    }

    /// Takes back a slot whose write failed. Forgets it when too many came back: it is then lost
    /// until the image is checked.
    pub fn give_back(&mut self, at: ImageCluster) {
        Self::remember(&mut self.returned, at);
    }

    /// A slot to be made zero, durably, and then given to [`Self::cleaned`] or [`Self::lost`].
    pub fn next_returned(&mut self) -> Option<ImageCluster> {
        let at = self.returned.pop()?;
        self.nr_cleaning += 1;
        Some(at)
    }

    /// `at` reads as zeros, durably.
    pub fn cleaned(&mut self, at: ImageCluster) {
        self.nr_cleaning = self.nr_cleaning.saturating_sub(1);
        Self::remember(&mut self.cleaned, at);
    }

    /// A slot of [`Self::next_returned`] could not be made zero: it is left until the image is
    /// checked.
    pub fn lost(&mut self) {
        self.nr_cleaning = self.nr_cleaning.saturating_sub(1);
    }

    /// Stays within the memory reserved at the start; a slot too many is forgotten.
    fn remember(list: &mut Vector<ImageCluster>, at: ImageCluster) {
        if list.len() < RETURNED_MAX {
            // Cannot fail: room for RETURNED_MAX is reserved.
            let _ = list.try_push(at);
        }
    }

    /// The file should be grown before long.
    pub fn is_low(&self) -> bool {
        self.limit < self.max && u64::from(self.limit - self.head) * 2 < self.step()
    }

    /// Clusters the file should have after growing by a step; `None` at the format's limit.
    pub fn target(&self) -> Option<u32> {
        self.target_of(self.step())
    }

    /// The same for the smallest growth of one cluster, for when space is short.
    pub fn target_min(&self) -> Option<u32> {
        self.target_of(1)
    }

    fn target_of(&self, step: u64) -> Option<u32> {
        if self.limit >= self.max {
            return None;
        }
        let to = u64::from(self.limit) + step;
        Some(u32::try_from(to).map_or(self.max, |t| t.min(self.max)))
    }

    /// An eighth of the file, within bounds, in clusters.
    fn step(&self) -> u64 {
        let bytes = self.cluster.offset(ImageCluster(self.limit)) / 8;
        self.cluster
            .ceil(bytes.clamp(STEP_BYTES_MIN, STEP_BYTES_MAX))
    }

    /// The file now has `limit` clusters.
    pub fn grown(&mut self, limit: u32) {
        self.limit = self.limit.max(limit.min(self.max));
    }

    /// First slot never handed out: where the file is cut at a clean close.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Clusters inside the file.
    pub fn limit(&self) -> u32 {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascending_until_the_end_of_the_file() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 4, 100).unwrap();
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        assert_eq!(a.take(), Take::Slot(ImageCluster(3)));
        assert_eq!(a.take(), Take::NeedSpace);
        assert_eq!((a.target(), a.target_min()), (Some(12), Some(5)));
        a.grown(12);
        assert_eq!(a.take(), Take::Slot(ImageCluster(4)));
    }

    #[test]
    fn the_format_limits() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 3, 3).unwrap();
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        assert_eq!(
            (a.take(), a.target(), a.is_low()),
            (Take::Full, None, false)
        );
        a.give_back(ImageCluster(2));
        assert_eq!(a.take(), Take::NeedSpace);
        let at = a.next_returned().unwrap();
        assert_eq!(a.take(), Take::NeedSpace);
        a.cleaned(at);
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        a.give_back(ImageCluster(2));
        a.next_returned().unwrap();
        a.lost();
        assert_eq!(a.take(), Take::Full);
    }

    #[test]
    fn steps_are_bounded() {
        for log in ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX {
            let c = ClusterSize::from_log(log).unwrap();
            for limit in [1, 1000, 1 << 22] {
                let a = Alloc::new(c, 1, limit, u32::MAX).unwrap();
                let step = c.bytes() * u64::from(a.target().unwrap() - limit);
                assert!(step <= STEP_BYTES_MAX.max(c.bytes()) && step >= STEP_BYTES_MIN);
            }
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Which index pages differ from the disk.
//!
//! A page is *dirty* from the moment an entry of it changes in memory until a copy taken later is
//! durable. A copy is *in flight* while it is being written; never two copies of one page are.

use crate::mem::Vector;
use crate::Error;

/// Most pages written as one batch.
pub const BATCH_MAX: usize = 64;

/// The index pages of the top delta that are not durable as they are in memory.
#[derive(Debug)]
pub struct DirtyPages {
    nr_pages: u32,
    /// One bit a page.
    bits: Vector<u64>,
    nr_dirty: u32,
    /// The batch being written.
    in_flight: [u32; BATCH_MAX],
    nr_in_flight: usize,
}

impl DirtyPages {
    /// All of `nr_pages` clean.
    pub fn new(nr_pages: u32) -> Result<Self, Error> {
        let words = usize::try_from(nr_pages.div_ceil(64)).map_err(|_| Error::NoMemory)?;
        Ok(Self {
            nr_pages,
            bits: Vector::try_filled(0, words)?,
            nr_dirty: 0,
            in_flight: [0; BATCH_MAX],
            nr_in_flight: 0,
        })
    }

    /// There are `nr_pages` now, if that is more than before; the new ones are clean.
    pub fn extend(&mut self, nr_pages: u32) -> Result<(), Error> {
        let words = usize::try_from(nr_pages.div_ceil(64)).map_err(|_| Error::NoMemory)?;
        while self.bits.len() < words {
            self.bits.try_push(0)?;
        }
        self.nr_pages = self.nr_pages.max(nr_pages);
        Ok(())
    }

    /// An entry of `page` has changed in memory.
    pub fn mark(&mut self, page: u32) {
        if let Some(word) = self.bits.get_mut((page / 64) as usize) {
            let mask = 1u64 << (page % 64);
            if *word & mask == 0 {
                *word |= mask;
                self.nr_dirty += 1;
            }
        }
    }

    /// Whether the disk durably holds `page` as it is in memory.
    pub fn is_durable(&self, page: u32) -> bool {
        let dirty = self
            .bits
            .get((page / 64) as usize)
            .is_some_and(|w| w & (1 << (page % 64)) != 0);
        !dirty && !self.batch().contains(&page)
    }

    /// Whether there is anything to write.
    pub fn is_clean(&self) -> bool {
        self.nr_dirty == 0 && self.nr_in_flight == 0
    }

    /// Dirty pages that are not in flight.
    pub fn nr_dirty(&self) -> usize {
        self.nr_dirty as usize
    }

    /// The first dirty page from `from` on that is not in flight.
    pub fn next_dirty(&self, from: u32) -> Option<u32> {
        let mut page = from;
        while page < self.nr_pages {
            let rest = self.bits.get((page / 64) as usize)? >> (page % 64);
            if rest != 0 {
                return Some(page + rest.trailing_zeros());
            }
            page = (page / 64 + 1).saturating_mul(64);
        }
        None
    }

    /// How many pages there are.
    pub fn nr_pages(&self) -> u32 {
        self.nr_pages
    }

    /// Moves up to [`BATCH_MAX`] dirty pages from `cursor` on into flight and returns the cursor
    /// for the next batch, `None` when no page from there on was dirty any more. The batch
    /// before must be settled.
    pub fn take_batch(&mut self, cursor: u32) -> Option<u32> {
        let mut page = cursor;
        while page < self.nr_pages && self.nr_dirty > 0 && self.nr_in_flight < BATCH_MAX {
            let Some(word) = self.bits.get_mut((page / 64) as usize) else {
                break;
            };
            let rest = *word >> (page % 64);
            if rest == 0 {
                page = (page / 64 + 1).saturating_mul(64);
                continue;
            }
            page += rest.trailing_zeros();
            *word &= !(1 << (page % 64));
            self.nr_dirty -= 1;
            if let Some(slot) = self.in_flight.get_mut(self.nr_in_flight) {
                *slot = page;
                self.nr_in_flight += 1;
            }
            page += 1;
        }
        (self.nr_in_flight == BATCH_MAX).then_some(page)
    }

    /// The pages in flight, ascending.
    pub fn batch(&self) -> &[u32] {
        self.in_flight.get(..self.nr_in_flight).unwrap_or(&[])
    }

    /// The batch is durable, or failed and stays dirty.
    pub fn settle(&mut self, durable: bool) {
        let (batch, nr) = (self.in_flight, self.nr_in_flight);
        self.nr_in_flight = 0;
        if !durable {
            for page in batch.iter().take(nr) {
                self.mark(*page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_durable_only_when_settled() {
        let mut d = DirtyPages::new(1000).unwrap();
        d.mark(999);
        d.mark(999);
        d.mark(3);
        assert_eq!(d.take_batch(0), None);
        assert_eq!(d.batch(), [3, 999]);
        assert!(!d.is_durable(3));
        d.mark(3);
        d.settle(true);
        assert!(!d.is_durable(3) && d.is_durable(999) && !d.is_clean());
        d.take_batch(0);
        d.settle(false);
        assert!(!d.is_durable(3));
        d.take_batch(0);
        d.settle(true);
        assert!(d.is_clean());
    }

    #[test]
    fn batches_cover_every_dirty_page_once() {
        let mut d = DirtyPages::new(500).unwrap();
        for p in (0..500).step_by(3) {
            d.mark(p);
        }
        let (mut cursor, mut seen) = (Some(0), std::vec::Vec::new());
        while let Some(c) = cursor {
            cursor = d.take_batch(c);
            seen.extend_from_slice(d.batch());
            d.settle(true);
        }
        let all: std::vec::Vec<u32> = (0..500).step_by(3).collect();
        assert_eq!(seen, all);
        assert_eq!(d.next_dirty(0), None);
        // Without taking them, in the same order.
        for p in &all {
            d.mark(*p);
        }
        let mut next = d.next_dirty(0);
        let seen: std::vec::Vec<u32> = core::iter::from_fn(|| {
            let page = next?;
            next = d.next_dirty(page + 1);
            Some(page)
        })
        .collect();
        assert_eq!((seen, d.nr_dirty()), (all, 167));
    }
}

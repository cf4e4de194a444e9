// SPDX-License-Identifier: GPL-2.0
//! Sets of slots of an image file, lowest first.

use crate::mem::Vector;
use crate::units::ImageCluster;
use crate::Error;
use core::ops::Range;

const WORD_BITS: u32 = u64::BITS;

/// A set of slots below a bound. One bit a slot; the lowest is found without looking from zero.
#[derive(Debug, Default)]
pub struct SlotSet {
    words: Vector<u64>,
    nr: u32,
    /// No word below this one has a bit.
    low: usize,
    /// No word from this one on has a bit.
    high: usize,
}

/// Words for slots below `nr`.
fn words_of(nr: u32) -> usize {
    nr.div_ceil(WORD_BITS) as usize
}

fn place(slot: ImageCluster) -> (usize, u64) {
    ((slot.0 / WORD_BITS) as usize, 1 << (slot.0 % WORD_BITS))
}

/// `nr` bits from bit `skip` on, at most all of a word.
fn bits(skip: u32, nr: u32) -> u64 {
    let ones = match nr {
        0 => 0,
        nr => u64::MAX >> (WORD_BITS - nr.min(WORD_BITS)),
    };
    ones << skip
}

/// The words that the bits of `range` are in, with those bits of each.
pub(crate) fn words(range: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let (mut from, end) = (range.start, range.end);
    core::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let skip = from % WORD_BITS;
        let nr = (WORD_BITS - skip).min(end - from);
        let at = (from / WORD_BITS) as usize;
        from += nr;
        Some((at, bits(skip, nr)))
    })
}

impl SlotSet {
    /// Memory for slots below `nr`, for [`Self::exchange`].
    pub fn room(nr: u32) -> Result<Vector<u64>, Error> {
        Ok(Vector::try_filled(0, words_of(nr))?)
    }

    /// An empty set of slots below `nr`.
    pub fn new(nr: u32) -> Result<Self, Error> {
        Ok(Self {
            words: Self::room(nr)?,
            ..Self::default()
        })
    }

    /// Takes `room` for its memory if that is larger; leaves the smaller of the two there.
    pub fn exchange(&mut self, room: &mut Vector<u64>) {
        if room.len() <= self.words.len() {
            return;
        }
        if let Some(to) = room.get_mut(..self.words.len()) {
            to.copy_from_slice(&self.words);
        }
        core::mem::swap(&mut self.words, room);
    }

    /// The bound is at least this; a multiple of 64.
    pub fn bound(&self) -> u64 {
        self.words.len() as u64 * u64::from(WORD_BITS)
    }

    /// How many slots are in the set.
    pub fn len(&self) -> u32 {
        self.nr
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nr == 0
    }

    /// Whether `slot` is in the set.
    pub fn contains(&self, slot: ImageCluster) -> bool {
        let (word, bit) = place(slot);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Puts `slot` in. Returns whether it was not in before; not for one over the bound.
    pub fn insert(&mut self, slot: ImageCluster) -> bool {
        let (at, bit) = place(slot);
        let Some(word) = self.words.get_mut(at).filter(|w| **w & bit == 0) else {
            return false;
        };
        *word |= bit;
        if self.nr == 0 {
            self.low = at;
            self.high = at;
        }
        self.nr += 1;
        self.low = self.low.min(at);
        self.high = self.high.max(at + 1);
        true
    }

    /// Puts all slots of `range` in, as far as the bound allows.
    pub fn insert_all(&mut self, range: Range<u32>) {
        self.insert_gaps(range, &Self::default());
    }

    /// Takes `slot` out. Returns whether it was in.
    pub fn remove(&mut self, slot: ImageCluster) -> bool {
        let (at, bit) = place(slot);
        let Some(word) = self.words.get_mut(at).filter(|w| **w & bit != 0) else {
            return false;
        };
        *word &= !bit;
        self.nr -= 1;
        true
    }

    /// The lowest slot of the set that is not below `from`.
    pub fn lowest(&mut self, from: ImageCluster) -> Option<ImageCluster> {
        if self.nr == 0 {
            return None;
        }
        while self.low < self.high && self.words.get(self.low).is_none_or(|w| *w == 0) {
            self.low += 1;
        }
        let (first, bit) = place(from);
        let start = self.low.max(first);
        for at in start..self.high {
            let mut word = self.words.get(at).copied().unwrap_or(0);
            if at == first {
                word &= !(bit - 1);
            }
            if word != 0 {
                // Below the bound, which fits.
                return Some(ImageCluster(at as u32 * WORD_BITS + word.trailing_zeros()));
            }
        }
        None
    }

    /// Takes out the lowest slot that is not below `from`.
    pub fn pop_lowest(&mut self, from: ImageCluster) -> Option<ImageCluster> {
        let slot = self.lowest(from)?;
        self.remove(slot);
        Some(slot)
    }

    /// Takes out the lowest slot and those that follow it without a gap, `max` at most.
    pub fn pop_run(&mut self, max: u32) -> Option<Range<u32>> {
        let first = self.pop_lowest(ImageCluster(0))?.0;
        let mut end = first + 1;
        while end - first < max {
            let (at, _) = place(ImageCluster(end));
            let Some(word) = self.words.get_mut(at) else {
                break;
            };
            // A word at a time.
            let skip = end % WORD_BITS;
            let nr = (*word >> skip).trailing_ones().min(max - (end - first));
            *word &= !bits(skip, nr);
            self.nr -= nr;
            end += nr;
            if nr == 0 || skip + nr < WORD_BITS {
                break;
            }
        }
        Some(first..end)
    }

    /// Puts all slots of `range` in that `others` has not, as far as the bound allows.
    pub fn insert_gaps(&mut self, range: Range<u32>, others: &Self) {
        let end = u32::try_from(self.bound()).map_or(range.end, |b| range.end.min(b));
        for (at, wanted) in words(range.start..end) {
            let theirs = others.words.get(at).copied().unwrap_or(0);
            self.add(at, wanted & !theirs);
        }
    }

    /// Puts the slots of `bits` of a word in.
    fn add(&mut self, at: usize, bits: u64) {
        let Some(word) = self.words.get_mut(at) else {
            return;
        };
        let new = bits & !*word;
        if new == 0 {
            return;
        }
        *word |= new;
        if self.nr == 0 {
            self.low = at;
            self.high = at;
        }
        self.nr += new.count_ones();
        self.low = self.low.min(at);
        self.high = self.high.max(at + 1);
    }

    /// Bytes of its memory.
    pub fn memory_bytes(&self) -> u64 {
        self.bound() / 8
    }

    /// Moves all slots of `other` in here. The bound of `other` is not higher.
    pub fn absorb(&mut self, other: &mut Self) {
        if other.nr == 0 {
            return;
        }
        for at in other.low..other.high {
            if let Some(word) = other.words.get_mut(at) {
                let bits = core::mem::take(word);
                self.add(at, bits);
            }
        }
        other.nr = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: ImageCluster = ImageCluster(0);

    #[test]
    fn the_lowest_comes_first() {
        let mut s = SlotSet::new(1000).unwrap();
        for slot in [700, 3, 64, 63, 999] {
            assert!(s.insert(ImageCluster(slot)));
        }
        assert!(!s.insert(ImageCluster(3)) && !s.insert(ImageCluster(5000)));
        assert_eq!(s.len(), 5);
        assert_eq!(s.lowest(ImageCluster(4)), Some(ImageCluster(63)));
        assert_eq!(s.pop_run(10), Some(3..4));
        assert_eq!(s.pop_run(10), Some(63..65));
        assert_eq!(s.pop_lowest(ImageCluster(701)), Some(ImageCluster(999)));
        assert_eq!(s.pop_lowest(ZERO), Some(ImageCluster(700)));
        assert!(s.is_empty() && s.lowest(ZERO).is_none());
        assert!(s.insert(ImageCluster(1)));
        assert_eq!(s.lowest(ZERO), Some(ImageCluster(1)));
    }

    #[test]
    fn gaps_are_put_in_and_runs_taken_out() {
        let (mut s, mut others) = (SlotSet::new(256).unwrap(), SlotSet::new(128).unwrap());
        s.insert(ImageCluster(70));
        for slot in [0, 69, 127] {
            others.insert(ImageCluster(slot));
        }
        s.insert_gaps(0..1000, &others);
        assert_eq!(s.len(), 256 - 3);
        assert_eq!(s.pop_run(1000), Some(1..69));
        assert_eq!(s.pop_run(1000), Some(70..127));
        assert_eq!(s.pop_run(64), Some(128..192));
        assert_eq!(s.pop_run(1000), Some(192..256));
        assert_eq!((s.pop_run(1), s.len()), (None, 0));
        s.insert_gaps(66..67, &others);
        assert_eq!(s.pop_run(1000), Some(66..67));
    }

    #[test]
    fn room_is_exchanged_and_sets_absorbed() {
        let (mut a, mut b) = (SlotSet::new(64).unwrap(), SlotSet::new(64).unwrap());
        a.insert(ImageCluster(5));
        b.insert(ImageCluster(6));
        let mut room = SlotSet::room(129).unwrap();
        a.exchange(&mut room);
        assert_eq!((room.len(), a.bound()), (1, 192));
        a.insert(ImageCluster(130));
        a.absorb(&mut b);
        assert!(b.is_empty());
        assert_eq!(a.pop_run(9), Some(5..7));
        assert_eq!(a.pop_run(9), Some(130..131));
    }
}

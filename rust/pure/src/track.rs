// SPDX-License-Identifier: GPL-2.0
//! What was written: bitmaps that requests mark and control calls read, and the write tracker's
//! answers.
//!
//! Nothing is lost if a mark follows the write that it stands for, and who reads clears a bit
//! before he reads what it stands for: then either he sees the write, or the bit is set again.

use crate::abi::TrackExtent;
use core::ops::Range;

/// Bits of a word.
const WORD: u64 = 64;
/// log2 of the smallest granule of an image file, in bytes: what any direct I/O can read.
const BLOCK_LOG: u32 = 12;
/// Bits for an image file, where a cluster does not hold more: 4 MiB of memory.
pub const IMAGE_BITS_MAX: u64 = 1 << 25;

/// A bitmap's words, which several threads change at once.
pub trait Words {
    /// Word `idx`; zero behind the end.
    fn get(&self, idx: usize) -> u64;
    /// Sets bits of a word.
    fn set(&self, idx: usize, mask: u64);
    /// Clears bits of a word and returns those that were set, before anything that follows is read.
    fn take(&self, idx: usize, mask: u64) -> u64;
}

/// What the bits stand for: granules of a file or disk. The last one stands for all that follows,
/// too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    log: u32,
    nr: u64,
}

impl Grid {
    /// Granules of `1 << log` bytes, at most 2^63, for `bytes` bytes.
    pub fn new(log: u32, bytes: u64) -> Self {
        let nr = bytes.div_ceil(1 << log).max(1);
        Self { log, nr }
    }

    /// For an image file that may come to have `bytes` bytes, in clusters of `1 << cluster_log`: blocks
    /// of 4 KiB, or such that [`IMAGE_BITS_MAX`] are enough, but at most clusters.
    pub fn of_image(cluster_log: u32, bytes: u64) -> Self {
        let too_many = bytes.div_ceil(IMAGE_BITS_MAX).max(1);
        let log = too_many.next_power_of_two().ilog2().max(BLOCK_LOG);
        Self::new(log.min(cluster_log), bytes)
    }

    /// Bytes of a granule.
    pub fn granularity(self) -> u64 {
        1 << self.log
    }

    /// How many bits.
    pub fn nr(self) -> u64 {
        self.nr
    }

    /// How many words.
    pub fn nr_words(self) -> u64 {
        self.nr.div_ceil(WORD)
    }

    /// The bits of a range of bytes.
    pub fn bits(self, bytes: &Range<u64>) -> Range<u64> {
        if bytes.start >= bytes.end {
            return 0..0;
        }
        let last = self.nr - 1;
        let bit = |byte: u64| (byte >> self.log).min(last);
        bit(bytes.start)..bit(bytes.end - 1) + 1
    }

    /// The bytes of a range of bits.
    pub fn bytes(self, bits: &Range<u64>) -> Range<u64> {
        let end = match bits.end < self.nr {
            true => bits.end << self.log,
            false => u64::MAX,
        };
        bits.start << self.log..end
    }

    /// Notes that these bytes were written.
    pub fn mark(self, words: &impl Words, bytes: &Range<u64>) {
        for (idx, mask) in parts(self.bits(bytes)) {
            // Most writes are to what was written before.
            if words.get(idx) & mask != mask {
                words.set(idx, mask);
            }
        }
    }

    /// The next bits that are set, of `bits`.
    pub fn next(self, words: &impl Words, bits: Range<u64>) -> Option<Range<u64>> {
        let start = find(words, bits.clone(), |word| word)?;
        let end = find(words, start..bits.end, |word| !word).unwrap_or(bits.end);
        Some(start..end)
    }

    /// The same, cleared.
    pub fn take(self, words: &impl Words, bits: Range<u64>) -> Option<Range<u64>> {
        let start = find(words, bits.clone(), |word| word)?;
        let mut end = start;
        for (idx, mask) in parts(start..bits.end) {
            let ones = words.get(idx) & mask;
            // From its first bit on without a gap.
            let run = ones & !(ones.wrapping_add(mask & mask.wrapping_neg()));
            if run == 0 {
                break;
            }
            let taken = words.take(idx, run);
            debug_assert_eq!(taken, run);
            end += u64::from(run.count_ones());
            if run != mask {
                break;
            }
        }
        Some(start..end)
    }

    /// How many bits are set.
    pub fn count(self, words: &impl Words) -> u64 {
        let ones = |(idx, mask): (usize, u64)| u64::from((words.get(idx) & mask).count_ones());
        parts(0..self.nr).map(ones).sum()
    }
}

/// The words of a range of bits, and which of their bits are in it.
fn parts(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = bits.start;
    core::iter::from_fn(move || {
        if at >= bits.end {
            return None;
        }
        let (idx, first) = (at / WORD, at % WORD);
        let nr = (WORD - first).min(bits.end - at);
        at += nr;
        let mask = (u64::MAX >> (WORD - nr)) << first;
        Some((idx as usize, mask))
    })
}

/// The first of `bits` that is set in what `pick` makes of the words.
fn find(words: &impl Words, bits: Range<u64>, pick: impl Fn(u64) -> u64) -> Option<u64> {
    parts(bits).find_map(|(idx, mask)| {
        let found = pick(words.get(idx)) & mask;
        (found != 0).then(|| idx as u64 * WORD + u64::from(found.trailing_zeros()))
    })
}

/// What the reader of the write tracker is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// These bytes of the image file are to be read again.
    Dirty(TrackExtent),
    /// These were never announced.
    Beyond(TrackExtent),
    /// Nothing is left.
    Clean,
}

/// The reader's side of the write tracker: how far it is. Writes from `end` on are not noted, as
/// the reader has still to come there.
#[derive(Debug, Default)]
pub struct Reader {
    at: u64,
    end: u64,
}

impl Reader {
    /// Up to where the reader has announced to read, in bytes: writes behind it need not be noted.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// TRACK_SETPOS. Backwards only to 0, and then all that was noted is to be forgotten: true.
    /// `None` if it is not allowed.
    pub fn set_end(&mut self, end: u64) -> Option<bool> {
        let is_reset = end == 0;
        if end < self.end && !is_reset {
            return None;
        }
        self.end = end;
        if is_reset {
            self.at = 0;
        }
        Some(is_reset)
    }

    /// TRACK_READ of an image file of which so many bytes are in use.
    pub fn read(&mut self, grid: Grid, words: &impl Words, in_use: impl Fn() -> u64) -> Answer {
        for _ in 0..2 {
            let taken = grid.take(words, self.at..grid.nr());
            // After the bits: what they stand for is in use by now.
            let len = in_use();
            if let Some(bits) = taken {
                self.at = bits.end;
                let bytes = grid.bytes(&bits);
                let (start, end) = (bytes.start, bytes.end.min(len.max(bytes.start)));
                if start < end {
                    return Answer::Dirty(TrackExtent { start, end });
                }
            }
            if self.end < len {
                let (start, end) = (self.end, len);
                return Answer::Beyond(TrackExtent { start, end });
            }
            self.at = 0;
        }
        Answer::Clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Map(RefCell<std::vec::Vec<u64>>);

    impl Map {
        fn new(grid: Grid) -> Self {
            Self(RefCell::new(std::vec![0; grid.nr_words() as usize]))
        }
    }

    impl Words for Map {
        fn get(&self, idx: usize) -> u64 {
            self.0.borrow().get(idx).copied().unwrap_or(0)
        }

        fn set(&self, idx: usize, mask: u64) {
            self.0.borrow_mut()[idx] |= mask;
        }

        fn take(&self, idx: usize, mask: u64) -> u64 {
            let word = &mut self.0.borrow_mut()[idx];
            let had = *word & mask;
            *word &= !mask;
            had
        }
    }

    #[test]
    fn runs_are_found_and_taken_across_words() {
        let grid = Grid::new(12, 1000 << 12);
        let map = Map::new(grid);
        grid.mark(&map, &(5 << 12..5 << 12));
        assert_eq!(grid.next(&map, 0..1000), None);
        grid.mark(&map, &((60 << 12) + 5..(200 << 12) + 1));
        grid.mark(&map, &(300 << 12..(300 << 12) + 1));
        assert_eq!(grid.count(&map), 142);
        assert_eq!(grid.next(&map, 0..1000), Some(60..201));
        assert_eq!(grid.next(&map, 70..100), Some(70..100));
        assert_eq!(grid.take(&map, 70..100), Some(70..100));
        assert_eq!(grid.take(&map, 0..1000), Some(60..70));
        assert_eq!(grid.take(&map, 0..1000), Some(100..201));
        assert_eq!(grid.take(&map, 0..1000), Some(300..301));
        assert_eq!(grid.take(&map, 0..1000), None);
        assert_eq!(grid.count(&map), 0);
    }

    #[test]
    fn an_image_has_blocks_as_small_as_memory_allows() {
        let log = |cluster, bytes| Grid::of_image(cluster, bytes).log;
        assert_eq!(log(20, 0), 12);
        assert_eq!(log(20, IMAGE_BITS_MAX << 12), 12);
        assert_eq!(log(20, (IMAGE_BITS_MAX << 12) + 1), 13);
        assert_eq!(log(20, 1 << 40), 15);
        assert_eq!(log(15, 1 << 50), 15);
        assert_eq!(log(26, u64::MAX), 26);
        assert!(Grid::of_image(20, 3 << 40).nr() <= IMAGE_BITS_MAX);
    }

    #[test]
    fn the_last_bit_stands_for_all_that_follows() {
        let grid = Grid::new(16, 130 << 16);
        let map = Map::new(grid);
        grid.mark(&map, &(900 << 16..901 << 16));
        assert_eq!(grid.take(&map, 0..130), Some(129..130));
        assert_eq!(grid.bytes(&(129..130)), 129 << 16..u64::MAX);
    }

    #[test]
    fn the_reader_wraps_when_all_is_announced() {
        let grid = Grid::new(16, 10 << 16);
        let (map, mut reader) = (Map::new(grid), Reader::default());
        let len = 8 << 16;
        let all = TrackExtent { start: 0, end: len };
        assert_eq!(reader.read(grid, &map, || len), Answer::Beyond(all));
        assert_eq!(reader.set_end(4 << 16), Some(false));
        assert_eq!(reader.set_end(3 << 16), None);
        let mark = |n: u64| grid.mark(&map, &(n << 16..(n + 1) << 16));
        let dirty = |n: u64, m: u64| {
            let (start, end) = (n << 16, m << 16);
            Answer::Dirty(TrackExtent { start, end })
        };
        mark(2);
        assert_eq!(reader.read(grid, &map, || len), dirty(2, 3));
        mark(1);
        let rest = TrackExtent {
            start: 4 << 16,
            end: len,
        };
        assert_eq!(reader.read(grid, &map, || len), Answer::Beyond(rest));
        assert_eq!(reader.set_end(len), Some(false));
        assert_eq!(reader.read(grid, &map, || len), dirty(1, 2));
        assert_eq!(reader.read(grid, &map, || len), Answer::Clean);
        // What is behind the end in use is in nobody's way.
        mark(9);
        assert_eq!(reader.read(grid, &map, || len), Answer::Clean);
        mark(3);
        assert_eq!(reader.set_end(0), Some(true));
    }
}

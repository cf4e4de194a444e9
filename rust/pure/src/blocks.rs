// SPDX-License-Identifier: GPL-2.0
//! What is known of where the blocks of an image file are on the device below its file system.
//!
//! The file is cut into *chunks*, whose blocks mostly follow each other on the device. For each chunk
//! there is a word that says where it is, and words with a bit for each block that is known to be
//! there. All words zero: nothing is known. Who reads without a lock must be told apart from who
//! forgets by his caller, as a chunk's words are not read at once.

use core::ops::Range;

/// log2 of a block's bytes, whatever the blocks of the file system are.
pub const BLOCK_LOG: u32 = 12;
/// Sectors of a block.
const BLOCK_SECTORS: u64 = 1 << (BLOCK_LOG - 9);
/// Blocks of a group, which is what one word has bits for.
const GROUP: u64 = u64::BITS as u64;
/// log2 of the bytes of chunks.
const CHUNK_LOGS: (u32, u32) = (16, 20);

/// How a file is cut into chunks and groups of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    chunk_log: u32,
    /// Words of a chunk, its place's included.
    chunk_words: u32,
}

/// Some blocks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The word that says where the chunk is.
    pub place: u32,
    /// The word with the group's bits.
    pub bits: u32,
    /// Number of the group in its chunk.
    nr: u32,
    /// The group's first block, in the file.
    pub first: u64,
    /// The same, in the chunk.
    within: u64,
    /// The blocks, as bits.
    pub wanted: u64,
    /// The block after the last of them, in the file.
    next: u64,
    /// All that the group has.
    all: u64,
}

/// Where a chunk is, as its word says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Sector on the device at which the chunk would begin; may be negative, if its first blocks are
    /// elsewhere.
    start: i64,
    /// Groups all of whose blocks were looked up once.
    scanned: u8,
}

impl Place {
    /// What a word says; `None` for nothing.
    #[inline]
    pub fn from_bits(bits: u64) -> Option<Self> {
        // The sign is kept.
        (bits & 1 != 0).then_some(Self {
            start: (bits as i64) >> 8,
            scanned: (bits as u8 & 0x1e) >> 1,
        })
    }

    /// The word.
    pub fn bits(self) -> u64 {
        ((self.start << 8) as u64) | (u64::from(self.scanned & 0xf) << 1) | 1
    }
}

impl Layout {
    /// For an image with clusters of `1 << cluster_log` bytes.
    pub fn new(cluster_log: u32) -> Self {
        let chunk_log = cluster_log.clamp(CHUNK_LOGS.0, CHUNK_LOGS.1);
        let groups = (1u64 << (chunk_log - BLOCK_LOG)).div_ceil(GROUP);
        Self {
            chunk_log,
            // At most 5.
            chunk_words: 1 + groups as u32,
        }
    }

    #[inline]
    fn chunk_blocks(self) -> u64 {
        1 << (self.chunk_log - BLOCK_LOG)
    }

    /// Words for a file of `len` bytes.
    pub fn nr_words(self, len: u64) -> u64 {
        len.div_ceil(1 << self.chunk_log) * u64::from(self.chunk_words)
    }

    /// The groups of a range of bytes, in order, with the blocks that it touches; as far as numbers of
    /// words fit.
    #[inline]
    pub fn groups(self, range: &Range<u64>) -> impl Iterator<Item = Group> {
        let (mut next, end) = Self::blocks(range);
        core::iter::from_fn(move || {
            let group = self.group(next, end)?;
            next = group.next;
            Some(group)
        })
    }

    /// The first block of a range, and the one after its last.
    #[inline]
    fn blocks(range: &Range<u64>) -> (u64, u64) {
        (range.start >> BLOCK_LOG, range.end.div_ceil(1 << BLOCK_LOG))
    }

    /// The group of block number `next`, with the blocks from there to `end`. Every request looks for one.
    #[inline(always)]
    fn group(self, next: u64, end: u64) -> Option<Group> {
        if next >= end {
            return None;
        }
        let chunk_blocks = self.chunk_blocks();
        let chunk = next >> (self.chunk_log - BLOCK_LOG);
        // Powers of two.
        let within = next & (chunk_blocks - 1);
        let nr = within / GROUP;
        let group_blocks = GROUP.min(chunk_blocks);
        let first = next - within % GROUP;
        let (from, to) = (next - first, (end - first).min(group_blocks));
        let ones = |n: u64| u64::MAX.checked_shr((GROUP - n) as u32).unwrap_or(0);
        let place = chunk * u64::from(self.chunk_words);
        Some(Group {
            place: u32::try_from(place).ok()?,
            bits: u32::try_from(place + 1 + nr).ok()?,
            // At most 4.
            nr: nr as u32,
            first,
            within: nr * GROUP,
            wanted: ones(to) & !ones(from),
            next: first + to,
            all: ones(group_blocks),
        })
    }

    /// The words that have the bits of a group's chunk.
    pub fn bits_of_chunk(self, group: &Group) -> Range<u32> {
        group.place + 1..group.place + self.chunk_words
    }

    /// The first sector of a range of bytes in whole sectors, if all of it is known and in one
    /// piece. `word` gives the words.
    #[inline]
    pub fn find(self, range: &Range<u64>, word: impl Fn(u32) -> u64) -> Option<u64> {
        let (begin, end) = Self::blocks(range);
        let group = self.group(begin, end)?;
        let found = group.known(&word)?;
        // Mostly it is the only one.
        if group.next < end {
            let expected = found + (group.next - begin) * BLOCK_SECTORS;
            self.find_rest(group.next..end, expected, word)?;
        }
        Some(found + ((range.start % (1 << BLOCK_LOG)) >> 9))
    }

    /// Nothing unless all of some blocks is known, and `expected` is their first sector.
    #[inline(never)]
    fn find_rest(
        self,
        blocks: Range<u64>,
        mut expected: u64,
        word: impl Fn(u32) -> u64,
    ) -> Option<()> {
        let Range { mut start, end } = blocks;
        while let Some(group) = self.group(start, end) {
            if group.known(&word)? != expected {
                return None;
            }
            expected += (group.next - start) * BLOCK_SECTORS;
            start = group.next;
        }
        Some(())
    }
}

impl Group {
    /// The sector of the first block wanted, if all are known.
    #[inline(always)]
    fn known(&self, word: impl Fn(u32) -> u64) -> Option<u64> {
        let place = Place::from_bits(word(self.place))?;
        let is_known = word(self.bits) & self.wanted == self.wanted;
        is_known.then(|| self.sector(place, u64::from(self.wanted.trailing_zeros())))
    }

    #[inline]
    fn sector(&self, place: Place, block: u64) -> u64 {
        // Not negative: blocks that are known are on the device.
        place
            .start
            .wrapping_add_unsigned((self.within + block) * BLOCK_SECTORS) as u64
    }

    /// The blocks that are to be looked up, if its words are these: all of a new group.
    pub fn to_scan(&self, place: u64, bits: u64) -> u64 {
        let scanned = Place::from_bits(place).is_some_and(|p| p.scanned & (1 << self.nr) != 0);
        match self.wanted & !bits {
            0 => 0,
            _ if !scanned => self.all & !bits,
            missing => missing,
        }
    }

    /// Where the chunk is if block number `block` of the group begins at `sector`; `None` for a device
    /// too large to be.
    pub fn place_of(&self, block: u32, sector: u64) -> Option<Place> {
        let within = (self.within + u64::from(block)) * BLOCK_SECTORS;
        let start = i64::try_from(sector).ok()? - i64::try_from(within).ok()?;
        let place = Place { start, scanned: 0 };
        Place::from_bits(place.bits()).filter(|p| p.is_at(place))
    }

    /// The word of a place at which all blocks of this group have been looked up too, if `old` is
    /// what the word was; `None` if that is another place.
    pub fn scanned(&self, old: u64, place: Place) -> Option<u64> {
        let scanned = match Place::from_bits(old) {
            Some(old) if old.start != place.start => return None,
            Some(old) => old.scanned,
            None => 0,
        };
        Some(
            Place {
                scanned: scanned | (1 << self.nr),
                ..place
            }
            .bits(),
        )
    }
}

impl Place {
    /// Whether two are the same place.
    pub fn is_at(self, other: Self) -> bool {
        self.start == other.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// The words of a file whose blocks are where `at` says, after each of `ranges` was looked up.
    fn learned(layout: Layout, at: &HashMap<u64, u64>, ranges: &[Range<u64>]) -> HashMap<u32, u64> {
        let mut words = HashMap::new();
        for range in ranges {
            for group in layout.groups(range) {
                let get = |words: &HashMap<u32, u64>, i| words.get(&i).copied().unwrap_or(0);
                let (old, bits) = (get(&words, group.place), get(&words, group.bits));
                let mut place = Place::from_bits(old);
                let (scan, mut new) = (group.to_scan(old, bits), 0);
                for block in (0..64).filter(|b| scan & (1 << b) != 0) {
                    let Some(sector) = at.get(&(group.first + u64::from(block))) else {
                        continue;
                    };
                    let here = group.place_of(block, *sector).unwrap();
                    if place.get_or_insert(here).is_at(here) {
                        new |= 1 << block;
                    }
                }
                if let Some(word) = place.and_then(|p| group.scanned(old, p)) {
                    words.insert(group.place, word);
                    words.insert(group.bits, bits | new);
                }
            }
        }
        words
    }

    fn file_of(extents: &[(u64, u64, u64)]) -> HashMap<u64, u64> {
        let blocks = extents.iter().flat_map(|(file, device, nr)| {
            (0..*nr).map(move |i| (file + i, (device + i) * BLOCK_SECTORS))
        });
        blocks.collect()
    }

    #[test]
    fn what_is_found_is_where_it_is() {
        // In one piece, with a hole, in two pieces, and with a first block that is elsewhere.
        let at = file_of(&[
            (0, 5, 300),
            (310, 1000, 100),
            (410, 90, 50),
            (512, 7, 1),
            (513, 1, 200),
        ]);
        for log in [12, 15, 16, 17, 20, 22] {
            let layout = Layout::new(log);
            let all = 0..800 << BLOCK_LOG;
            let words = learned(layout, &at, &[all.clone(), all]);
            let mut nr = 0;
            for start in 0..800u64 {
                for len in [1, 2, 16, 65, 256, 257, 300] {
                    let range = start << BLOCK_LOG..(start + len) << BLOCK_LOG;
                    let get = |i| words.get(&i).copied().unwrap_or(0);
                    let Some(sector) = layout.find(&range, get) else {
                        continue;
                    };
                    nr += 1;
                    for i in 0..len {
                        assert_eq!(at.get(&(start + i)), Some(&(sector + i * BLOCK_SECTORS)));
                    }
                }
            }
            assert!(nr > 500, "{log}: {nr}");
        }
    }

    #[test]
    fn one_piece_is_found_at_once() {
        let at = file_of(&[(0, 77, 1024)]);
        for log in [16, 20] {
            let layout = Layout::new(log);
            // One block is asked for, its whole group is learned.
            let words = learned(layout, &at, std::slice::from_ref(&(5 << 12..6 << 12)));
            let get = |i| words.get(&i).copied().unwrap_or(0);
            assert_eq!(layout.find(&(512..1024), get), Some(77 * 8 + 1));
            let group = GROUP.min(layout.chunk_blocks()) << 12;
            assert!(layout.find(&(0..group), get).is_some());
            assert!(layout.find(&(0..group + 1), get).is_none());
        }
    }

    #[test]
    fn groups_cover_a_range_once() {
        for log in [16, 18, 20] {
            let layout = Layout::new(log);
            let range = 3 * 4096 + 512..(5 << 20) + 1;
            let mut next = 3;
            for group in layout.groups(&range) {
                let first = group.first + u64::from(group.wanted.trailing_zeros());
                assert_eq!(first, next);
                next += u64::from(group.wanted.count_ones());
                assert!(layout.bits_of_chunk(&group).contains(&group.bits));
                assert!(u64::from(group.bits) < layout.nr_words(range.end));
            }
            assert_eq!(next, (5 << 8) + 1);
        }
    }

    #[test]
    fn places_are_kept_in_words() {
        for start in [0, -8, 1, i64::MAX >> 8, i64::MIN >> 8] {
            for scanned in 0..16 {
                let place = Place { start, scanned };
                assert_eq!(Place::from_bits(place.bits()), Some(place));
            }
        }
        assert_eq!(Place::from_bits(0), None);
    }
}

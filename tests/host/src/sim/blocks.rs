// SPDX-License-Identifier: GPL-2.0
//! What sectors of the index hold, word by word.

use super::disk::Stamp;
use ploop_pure::layout::ploop1::{Header, HEADER_SLOTS, PAGE_SLOTS};
use zerocopy::IntoBytes;

/// 32-bit words of a sector.
pub const WORDS: usize = 128;
/// Sectors of an index page.
pub const PAGE_SECTORS: usize = PAGE_SLOTS as usize / WORDS;

/// The stamp of the first; data has others.
const FIRST: Stamp = 1 << 31;

/// Contents of index sectors; their stamps follow their order.
#[derive(Debug, Clone, Default)]
pub struct Blocks(Vec<[u32; WORDS]>);

impl Blocks {
    /// A stamp for `block`.
    pub fn stamp(&mut self, block: [u32; WORDS]) -> Stamp {
        if block == [0; WORDS] {
            return 0;
        }
        self.0.push(block);
        FIRST + self.0.len() as Stamp - 1
    }

    /// How many there are.
    pub fn nr(&self) -> usize {
        self.0.len()
    }

    /// Forgets all but the first `nr`.
    pub fn truncate(&mut self, nr: usize) {
        self.0.truncate(nr);
    }

    /// What the stamp stands for; nothing if it is of data.
    pub fn get(&self, stamp: Stamp) -> Option<[u32; WORDS]> {
        match stamp {
            0 => Some([0; WORDS]),
            _ => self.0.get(stamp.checked_sub(FIRST)? as usize).copied(),
        }
    }
}

/// The 16 words of a header.
pub fn header_words(header: &Header) -> [u32; HEADER_SLOTS as usize] {
    let raw = header.encode();
    let mut words = [0; HEADER_SLOTS as usize];
    for (word, bytes) in words.iter_mut().zip(raw.as_bytes().chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

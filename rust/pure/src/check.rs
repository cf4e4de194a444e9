// SPDX-License-Identifier: GPL-2.0
//! What is wrong with an image: the one judge for the kernel's attach and the tool's `check`.
//!
//! [`Header::parse`](crate::layout::ploop1::Header::parse) judges the header, [`Length::judge`]
//! the file's length, [`BatScan`] every BAT entry, all in O(n) and with one bit a slot.

use crate::layout::ploop1::{page_range, Header, HEADER_SLOTS};
use crate::mem::Vector;
use crate::problem::Problem;
use crate::slots::words;
use crate::units::{Cluster, ImageCluster};
use crate::Error;
use zerocopy::little_endian::U32;

/// How many clusters an image file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Whole clusters, at most what entries can name.
    pub clusters: u32,
    /// A partial cluster follows the whole ones.
    pub torn: bool,
}

impl Length {
    /// Judges the length of the file whose header this is.
    pub fn judge(header: &Header, len_bytes: u64) -> Result<Self, Problem> {
        let need = header.cluster.offset(header.first_data);
        if len_bytes < need {
            return Err(Problem::Truncated {
                need,
                have: len_bytes,
            });
        }
        let clusters = header.cluster.floor(len_bytes);
        let max = header.slots_max();
        Ok(Self {
            clusters: u32::try_from(clusters).map_or(max, |c| c.min(max)),
            torn: len_bytes & (header.cluster.bytes() - 1) != 0,
        })
    }
}

/// What a scan found out about the image as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Entries that name a slot.
    pub nr_used: u32,
    /// One past the highest slot in use; at least the first data cluster.
    pub end: u32,
}

/// Clusters that follow each other and have entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first cluster.
    pub cluster: Cluster,
    /// Its slot, which those of the others follow; or, of one cluster alone, what is wrong with its entry.
    pub first: Result<ImageCluster, Problem>,
    /// How many clusters, at least one.
    pub nr: u32,
}

impl Run {
    /// Cluster `n` of the run.
    pub fn cluster(&self, n: u32) -> Cluster {
        Cluster(self.cluster.0.saturating_add(n))
    }

    /// The slot of cluster `n` of the run.
    pub fn slot(&self, n: u32) -> Result<ImageCluster, Problem> {
        let first = self.first?;
        Ok(ImageCluster(first.0.saturating_add(n)))
    }
}

/// Judges the BAT page by page and remembers which slots are taken, one bit each.
pub struct BatScan {
    header: Header,
    length: Length,
    used: Vector<u64>,
    usage: Usage,
}

impl BatScan {
    /// Bytes of memory that a scan needs.
    pub fn memory_bytes(header: &Header, length: Length) -> u64 {
        u64::from(length.clusters.saturating_sub(header.first_data.0)) / 8 + 16
    }

    /// A scan of the BAT of an image of this header and length.
    pub fn new(header: Header, length: Length) -> Result<Self, Error> {
        // One more for the torn slot.
        let slots = u64::from(length.clusters.saturating_sub(header.first_data.0)) + 1;
        let words = usize::try_from(slots.div_ceil(64)).map_err(|_| Error::NoMemory)?;
        Ok(Self {
            header,
            length,
            used: Vector::try_filled(0, words)?,
            usage: Usage {
                nr_used: 0,
                end: header.first_data.0,
            },
        })
    }

    /// Judges the entries of index page `page`, given as its 1024 slots; slots of the header and
    /// past the last entry are skipped. `sink` gets each cluster that has an entry: its place, or
    /// what is wrong. It may end the scan with an error of its own.
    pub fn page<E>(
        &mut self,
        page: u32,
        slots: &[U32],
        mut sink: impl FnMut(Cluster, Result<ImageCluster, Problem>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.runs(page, slots, |run| {
            (0..run.nr).try_for_each(|n| sink(run.cluster(n), run.slot(n)))
        })
    }

    /// The same, with clusters whose slots follow each other, as those of most images do, at once.
    pub fn runs<E>(
        &mut self,
        page: u32,
        slots: &[U32],
        mut sink: impl FnMut(Run) -> Result<(), E>,
    ) -> Result<(), E> {
        let lead = if page == 0 { HEADER_SLOTS as usize } else { 0 };
        let (first, _) = page_range(page);
        let nr = u64::from(self.header.nr_entries).saturating_sub(first);
        let mut rest = slots.get(lead..).unwrap_or(&[]);
        rest = rest
            .get(..usize::try_from(nr).unwrap_or(usize::MAX))
            .unwrap_or(rest);
        let step = self.header.entry_of_next_slot();
        // Below `nr_entries`, a u32.
        let mut cluster = first as u32;
        while let Some((entry, behind)) = rest.split_first() {
            let entry = entry.get();
            let mut expected = entry;
            let follows = |next: &&U32| {
                expected = expected.wrapping_add(if entry == 0 { 0 } else { step });
                next.get() == expected && expected >= entry
            };
            let nr = 1 + behind.iter().take_while(follows).count();
            if entry != 0 {
                // At most a page of them.
                self.run(Cluster(cluster), entry, nr as u32, &mut sink)?;
            }
            cluster = cluster.saturating_add(nr as u32);
            rest = rest.get(nr..).unwrap_or(&[]);
        }
        Ok(())
    }

    /// Judges `nr` entries from that of `cluster` on, of which the first is `entry` and the others name
    /// the slots that follow.
    fn run<E>(
        &mut self,
        cluster: Cluster,
        entry: u32,
        nr: u32,
        sink: &mut impl FnMut(Run) -> Result<(), E>,
    ) -> Result<(), E> {
        let at = self.header.decode_entry(entry).ok().flatten();
        if let Some(at) = at.filter(|at| self.note_all(*at, nr)) {
            let first = Ok(at);
            return sink(Run { cluster, first, nr });
        }
        let mut entry = entry;
        for n in 0..nr {
            let cluster = Cluster(cluster.0.saturating_add(n));
            let found = self.place(entry);
            let first = found.ok_or_else(|| self.problem(cluster, entry));
            let nr = 1;
            sink(Run { cluster, first, nr })?;
            entry = entry.wrapping_add(self.header.entry_of_next_slot());
        }
        Ok(())
    }

    /// Notes `nr` slots, if all of them can be and none is noted already.
    fn note_all(&mut self, at: ImageCluster, nr: u32) -> bool {
        let end = at.0.checked_add(nr);
        let Some(end) = end.filter(|end| *end <= self.length.clusters) else {
            return false;
        };
        let Some(bit) = at.0.checked_sub(self.header.first_data.0) else {
            return false;
        };
        let bits = bit..bit.saturating_add(nr);
        let is_free =
            |(at, mask): (usize, u64)| self.used.get(at).is_some_and(|word| word & mask == 0);
        if !words(bits.clone()).all(is_free) {
            return false;
        }
        for (at, mask) in words(bits) {
            if let Some(word) = self.used.get_mut(at) {
                *word |= mask;
            }
        }
        self.usage.nr_used += nr;
        self.usage.end = self.usage.end.max(end);
        true
    }

    /// The place that an entry names, which is noted, if nothing is wrong with it.
    fn place(&mut self, entry: u32) -> Option<ImageCluster> {
        let at = self.header.decode_entry(entry).ok()??;
        (at.0 < self.length.clusters && self.note(at)).then_some(at)
    }

    /// Notes a slot. `false` if it cannot be one, or is noted already.
    fn note(&mut self, at: ImageCluster) -> bool {
        let bit = at.0.checked_sub(self.header.first_data.0);
        let word = bit.and_then(|bit| self.used.get_mut((bit / 64) as usize));
        let mask = 1 << (bit.unwrap_or(0) % 64);
        let Some(word) = word.filter(|w| **w & mask == 0) else {
            return false;
        };
        *word |= mask;
        self.usage.nr_used += 1;
        self.usage.end = self.usage.end.max(at.0.saturating_add(1));
        true
    }

    /// What is wrong with an entry that [`Self::place`] refused.
    #[cold]
    fn problem(&mut self, cluster: Cluster, entry: u32) -> Problem {
        let cluster = cluster.0;
        // Zero entries do not come here.
        let Ok(Some(at)) = self.header.decode_entry(entry) else {
            return Problem::EntryMisaligned { cluster, entry };
        };
        let (end, at) = (self.length.clusters, at.0);
        if at < self.header.first_data.0 {
            return Problem::EntryInHeader { cluster, at };
        }
        if at > end || (at == end && !self.length.torn) {
            return Problem::EntryPastEnd { cluster, at, end };
        }
        match self.note(ImageCluster(at)) {
            true => Problem::EntryTorn { cluster, at },
            false => Problem::EntryDuplicate { cluster, at },
        }
    }

    /// Whether a slot is named by an entry seen so far.
    pub fn is_used(&self, at: ImageCluster) -> bool {
        at.0.checked_sub(self.header.first_data.0)
            .is_some_and(|bit| {
                self.used
                    .get((bit / 64) as usize)
                    .is_some_and(|w| w & (1 << (bit % 64)) != 0)
            })
    }

    /// Takes back that an entry names a slot.
    pub fn release(&mut self, at: ImageCluster) {
        if !self.is_used(at) {
            return;
        }
        let bit = at.0 - self.header.first_data.0;
        if let Some(word) = self.used.get_mut((bit / 64) as usize) {
            *word &= !(1 << (bit % 64));
            self.usage.nr_used -= 1;
        }
    }

    /// What was found out so far; slots that were released do not lower the end.
    pub fn usage(&self) -> Usage {
        self.usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ploop1::Version;
    use crate::units::ClusterSize;
    use std::vec::Vec;

    type Entries = Vec<(u32, Result<ImageCluster, Problem>)>;

    fn scan(entries: &[u32], len: u64) -> (Entries, Usage) {
        let header = Header::new(Version::V2, ClusterSize::DEFAULT, 2048 * 100).unwrap();
        let length = Length::judge(&header, len).unwrap();
        let mut scan = BatScan::new(header, length).unwrap();
        let mut slots = [U32::ZERO; 1024];
        for (s, e) in slots[16..].iter_mut().zip(entries) {
            *s = U32::new(*e);
        }
        let mut out = Vec::new();
        scan.page::<()>(0, &slots, |c, r| {
            out.push((c.0, r));
            Ok(())
        })
        .unwrap();
        (out, scan.usage())
    }

    #[test]
    fn every_bad_entry_is_named() {
        let mib = 1 << 20;
        let (out, usage) = scan(&[3, 0, 3, 1, 5, u32::MAX, 4], 5 * mib + 7);
        assert_eq!(
            out,
            [
                (0, Ok(ImageCluster(3))),
                (2, Err(Problem::EntryDuplicate { cluster: 2, at: 3 })),
                (3, Ok(ImageCluster(1))),
                (4, Err(Problem::EntryTorn { cluster: 4, at: 5 })),
                (
                    5,
                    Err(Problem::EntryPastEnd {
                        cluster: 5,
                        at: u32::MAX,
                        end: 5
                    })
                ),
                (6, Ok(ImageCluster(4))),
            ]
        );
        assert_eq!(usage, Usage { nr_used: 4, end: 6 });
    }

    #[test]
    fn length_is_judged() {
        let header = Header::new(Version::V2, ClusterSize::DEFAULT, 2048).unwrap();
        assert!(matches!(
            Length::judge(&header, 4096),
            Err(Problem::Truncated { .. })
        ));
        let l = Length::judge(&header, u64::MAX).unwrap();
        assert_eq!((l.clusters, l.torn), (u32::MAX, true));
    }

    #[test]
    fn slots_beyond_the_last_entry_are_not_looked_at() {
        let header = Header::new(Version::V2, ClusterSize::DEFAULT, 2048).unwrap();
        let length = Length::judge(&header, 1 << 20).unwrap();
        let mut scan = BatScan::new(header, length).unwrap();
        let mut slots = [U32::new(77); 1024];
        slots[16] = U32::ZERO;
        scan.page(0, &slots, |_, _| Err(())).unwrap();
        assert_eq!(scan.usage().nr_used, 0);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Entries behind the end of the disk, which a header may have room for: of a disk that was larger
//! once, or was to be.

use super::ploop1::{locate, Header};
use crate::units::Cluster;
use core::{cmp::Ordering, ops::Range};
use zerocopy::little_endian::U32;

impl Header {
    /// The index pages with entries behind the end of the disk, that is of no cluster: they count
    /// for nothing, and are cleared before the disk grows or their slots are used again.
    pub fn surplus_pages(&self) -> Range<u32> {
        if self.disk_clusters() == self.nr_entries {
            return 0..0;
        }
        locate(Cluster(self.disk_clusters())).0..self.nr_pages()
    }

    /// Clears what index page `page_no` has behind the end of the disk. Returns whether there was
    /// anything.
    pub fn clear_surplus(&self, page_no: u32, slots: &mut [U32]) -> bool {
        let (page_of_end, slot_of_end) = locate(Cluster(self.disk_clusters()));
        let keep = match page_no.cmp(&page_of_end) {
            Ordering::Less => slots.len(),
            Ordering::Equal => slot_of_end,
            Ordering::Greater => 0,
        };
        let mut found = false;
        for slot in slots.iter_mut().skip(keep).filter(|s| s.get() != 0) {
            *slot = U32::ZERO;
            found = true;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::ploop1::{Version, HEADER_SLOTS, PAGE_SLOTS};
    use super::*;
    use crate::units::ClusterSize;

    /// Of so many clusters, with room for more entries.
    fn header(clusters: u32, nr_entries: u32) -> Header {
        let size = u64::from(clusters) * u64::from(ClusterSize::DEFAULT.sectors());
        let mut header = Header::new(Version::V2, ClusterSize::DEFAULT, size).unwrap();
        header.nr_entries = nr_entries;
        header
    }

    #[test]
    fn only_what_is_behind_the_disk_is_cleared() {
        let first = PAGE_SLOTS - HEADER_SLOTS;
        for (clusters, nr_entries) in [(5, 5), (5, 6), (5, 3000), (first, 3000), (2500, 3000)] {
            let header = header(clusters, nr_entries);
            let pages = header.surplus_pages();
            for page in 0..header.nr_pages() {
                let mut slots = [U32::new(7); PAGE_SLOTS as usize];
                let found = header.clear_surplus(page, &mut slots);
                assert!(found || !pages.contains(&page));
                for (slot, at) in slots.iter().zip(page * PAGE_SLOTS..) {
                    let is_kept = at < HEADER_SLOTS + clusters;
                    assert_eq!(slot.get(), if is_kept { 7 } else { 0 }, "slot {at}");
                }
                assert!(!header.clear_surplus(page, &mut slots));
            }
        }
        assert_eq!(header(5, 5).surplus_pages(), 0..0);
        assert_eq!(header(first, 3000).surplus_pages(), 1..3);
        assert_eq!(header(2500, 3000).surplus_pages(), 2..3);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! ploop1 images: header and BAT between bytes and memory.

use crate::sys::{pages::PAGE_BYTES, prelude::*};
use ploop_pure::{
    check::Length,
    layout::ploop1::{locate, page_range, Header, Mark, RawHeader, HEADER_BYTES, HEADER_SLOTS},
    problem::Problem,
    units::{Cluster, ImageCluster, INDEX_PAGE_BYTES},
};
use zerocopy::{little_endian::U32, FromBytes, IntoBytes};

const _: () = assert!(PAGE_BYTES as u64 == INDEX_PAGE_BYTES);

/// What the caller of ADD_DELTA expects of the image.
#[derive(Clone, Copy)]
pub(crate) struct Expect {
    /// log2 of the sectors of a cluster.
    pub(crate) cluster_log: u32,
    /// A mark left by a crash, and a torn tail that no entry names, are fine.
    pub(crate) accept_in_use: bool,
}

/// A ploop1 image.
pub(crate) struct Ploop1 {
    header: Header,
}

impl Ploop1 {
    /// Judges the first page and the length of an image.
    pub(crate) fn parse(
        page: &[u8; PAGE_BYTES],
        len_bytes: u64,
        expect: Expect,
    ) -> Result<Self, Problem> {
        let short = Problem::Truncated {
            need: INDEX_PAGE_BYTES,
            have: len_bytes,
        };
        let (raw, _) = RawHeader::ref_from_prefix(page).map_err(|_| short)?;
        let header = Header::parse(raw)?;
        if header.cluster.log_sectors() != expect.cluster_log {
            let sectors = header.cluster.sectors();
            return Err(Problem::ClusterSize { sectors });
        }
        let length = Length::judge(&header, len_bytes)?;
        if length.torn && !expect.accept_in_use {
            return Err(Problem::TornTail { len: len_bytes });
        }
        match header.mark {
            Mark::InUse if !expect.accept_in_use => Err(Problem::InUse),
            Mark::InUse | Mark::Closed | Mark::ClosedV21 => Ok(Self { header }),
        }
    }

    /// The header as it was read; mark, flags and extension change later, the rest does not.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// The same image with another header.
    pub(crate) fn with_header(&self, header: Header) -> Self {
        Self { header }
    }

    /// Clears what index page `page_no` has behind the end of the disk. Returns whether there was
    /// anything.
    pub(crate) fn clear_surplus(&self, page_no: u32, page: &mut [u8; PAGE_BYTES]) -> Result<bool> {
        let slots = <[U32]>::mut_from_bytes(page).map_err(|_| EINVAL)?;
        Ok(self.header.clear_surplus(page_no, slots))
    }

    /// Whether the rest is the same in `other`.
    pub(crate) fn is_same_layout(&self, other: &Self) -> bool {
        self.header.opened() == other.header.opened()
    }

    /// The slots of an index page.
    pub(crate) fn slots(page: &[u8; PAGE_BYTES]) -> Result<&[U32]> {
        <[U32]>::ref_from_bytes(page).map_err(|_| EINVAL)
    }

    /// Puts a header over the first bytes of index page 0.
    pub(crate) fn put_header(page: &mut [u8; PAGE_BYTES], header: &Header) {
        let raw = header.encode();
        if let Some(place) = page.get_mut(..HEADER_BYTES) {
            place.copy_from_slice(raw.as_bytes());
        }
    }

    /// Composes index page `page_no` from the map in memory: the one place where the content of
    /// index pages is made, so that header and entries of page 0 are always both current
    /// (ordering rule 9). The header is that of an image in use.
    pub(crate) fn encode_page(
        &self,
        page_no: u32,
        page: &mut [u8; PAGE_BYTES],
        lookup: impl Fn(Cluster) -> Option<ImageCluster>,
    ) -> Result {
        page.fill(0);
        if page_no == 0 {
            Self::put_header(page, &self.header.opened());
        }
        let lead = if page_no == 0 {
            HEADER_SLOTS as usize
        } else {
            0
        };
        let slots = <[U32]>::mut_from_bytes(page).map_err(|_| EINVAL)?;
        let (first, _) = page_range(page_no);
        let clusters = first..u64::from(self.header.disk_clusters());
        for (cluster, slot) in clusters.zip(slots.iter_mut().skip(lead)) {
            // Of the disk, so a u32.
            if let Some(at) = lookup(Cluster(cluster as u32)) {
                *slot = self.header.encode_entry(at).into();
            }
        }
        Ok(())
    }

    /// The index page that holds a cluster's entry.
    pub(crate) fn page_of(cluster: Cluster) -> u32 {
        locate(cluster).0
    }
}

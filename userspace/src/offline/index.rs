// SPDX-License-Identifier: GPL-2.0
//! The entries of an image, read in pieces, changed in memory and written in pages.

use crate::error::{Code, Error, Result};
use crate::image::Image;
use ploop_pure::layout::ploop1::{locate, Header, HEADER_BYTES, PAGE_SLOTS};
use ploop_pure::units::{Cluster, ImageCluster, INDEX_PAGE_BYTES};
use std::collections::BTreeMap;

const PAGE_BYTES: usize = INDEX_PAGE_BYTES as usize;
/// Index pages read at once: 256 KiB.
const PAGES_AT_ONCE: u32 = 64;

/// The index of an image whose entries were found to be good.
pub struct Index<'a> {
    image: &'a Image,
    header: Header,
    /// The pages read last.
    first: u32,
    read: Vec<u8>,
    /// Pages whose entries were changed.
    dirty: BTreeMap<u32, Vec<u8>>,
}

impl<'a> Index<'a> {
    /// Of an image with this header.
    pub fn new(image: &'a Image, header: Header) -> Self {
        Self {
            image,
            header,
            first: 0,
            read: Vec::new(),
            dirty: BTreeMap::new(),
        }
    }

    /// The image has this header now.
    pub fn set_header(&mut self, header: Header) {
        self.header = header;
    }

    fn page(&mut self, page: u32) -> Result<&[u8]> {
        if let Some(bytes) = self.dirty.get(&page) {
            return Ok(bytes);
        }
        let nr_read = (self.read.len() / PAGE_BYTES) as u32;
        if !(self.first..self.first + nr_read).contains(&page) {
            let first = page - page % PAGES_AT_ONCE;
            let nr = PAGES_AT_ONCE.min(self.header.nr_pages() - first);
            self.read.resize(nr as usize * PAGE_BYTES, 0);
            let done = self
                .image
                .read_at(&mut self.read, u64::from(first) * INDEX_PAGE_BYTES);
            if let Err(e) = done {
                self.read.clear();
                return Err(e);
            }
            self.first = first;
        }
        let at = (page - self.first) as usize * PAGE_BYTES;
        Ok(&self.read[at..at + PAGE_BYTES])
    }

    /// The slot of a cluster.
    pub fn get(&mut self, cluster: Cluster) -> Result<Option<ImageCluster>> {
        if cluster.0 >= self.header.nr_entries {
            return Ok(None);
        }
        let (page, slot) = locate(cluster);
        let bytes = &self.page(page)?[slot * 4..slot * 4 + 4];
        let entry = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.header.decode_entry(entry).map_err(|_| {
            let at = self.image.path().display();
            let what = format!("BAT[{}] of {at} has changed meanwhile", cluster.0);
            Error::new(Code::Damaged, what)
        })
    }

    /// The first cluster from `from` on that has a slot.
    pub fn next(&mut self, from: Cluster) -> Result<Option<(Cluster, ImageCluster)>> {
        let mut cluster = from;
        while cluster.0 < self.header.nr_entries {
            let (page, slot) = locate(cluster);
            let bytes = self.page(page)?;
            let rest = &bytes[slot * 4..];
            match rest.chunks_exact(4).position(|e| e != [0; 4]) {
                Some(nr) => {
                    cluster = Cluster(cluster.0.saturating_add(nr as u32));
                    return Ok(self.get(cluster)?.map(|at| (cluster, at)));
                }
                None => cluster = Cluster(cluster.0.saturating_add(PAGE_SLOTS - slot as u32)),
            }
        }
        Ok(None)
    }

    /// Changes an entry in memory.
    pub fn set(&mut self, cluster: Cluster, at: Option<ImageCluster>) -> Result<()> {
        let (page, slot) = locate(cluster);
        let mut bytes = match self.dirty.remove(&page) {
            Some(bytes) => bytes,
            None => self.page(page)?.to_vec(),
        };
        let entry = at.map_or(0, |at| self.header.encode_entry(at));
        bytes[slot * 4..slot * 4 + 4].copy_from_slice(&entry.to_le_bytes());
        self.dirty.insert(page, bytes);
        Ok(())
    }

    /// Writes the pages that were changed, never the header before the entries of page 0.
    pub fn write(&mut self) -> Result<()> {
        for (page, bytes) in std::mem::take(&mut self.dirty) {
            let skip = if page == 0 { HEADER_BYTES } else { 0 };
            let offset = u64::from(page) * INDEX_PAGE_BYTES + skip as u64;
            self.image.write_at(&bytes[skip..], offset)?;
        }
        // What was read before is not what is there now.
        self.read.clear();
        Ok(())
    }
}

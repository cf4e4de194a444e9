// SPDX-License-Identifier: GPL-2.0
//! The images of a trial, and what they must read as.

use super::{Config, Op, NR};
use crate::rng::Rng;
use crate::sim::blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use crate::sim::disk::{Image, Stamp};
use ploop_pure::layout::ploop1::{locate, Header, HEADER_SLOTS};
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster};
use std::collections::BTreeMap;

/// Stamps of data, not of index sectors, from here on.
const DATA: Stamp = 1 << 24;

/// What a cluster holds.
pub type Content = Vec<Stamp>;

/// What is known of the images by heart.
pub struct World {
    /// What is done.
    pub op: Op,
    /// Contents of the image before.
    pub before: BTreeMap<u32, Content>,
    /// Of the upper delta, and the slot of each.
    pub upper: BTreeMap<u32, (ImageCluster, Content)>,
    /// The header before.
    pub old: Header,
    /// Sectors of the disk in the end.
    pub size_sectors: u64,
}

impl World {
    /// What cluster `c` must hold if it is not hidden by the upper delta.
    pub fn own(&self, c: u32) -> Content {
        let zeros = || vec![0; NR];
        self.before.get(&c).cloned().unwrap_or_else(zeros)
    }

    /// What cluster `c` must hold in the end.
    pub fn last(&self, c: u32) -> Content {
        match self.upper.get(&c) {
            Some((_, content)) => content.clone(),
            None => self.own(c),
        }
    }

    /// All clusters that some image has.
    pub fn clusters(&self) -> impl Iterator<Item = u32> + '_ {
        let upper = self.upper.keys().filter(|c| !self.before.contains_key(c));
        self.before.keys().chain(upper).copied()
    }
}

/// Images with clusters in a random order, some free slots between them, and data behind the end.
pub fn created(cfg: &Config, rng: &mut Rng, blocks: &mut Blocks) -> (World, Image) {
    let cluster = ClusterSize::from_sectors(NR as u32).expect("a cluster size");
    let nr_entries = match cfg.op {
        // Up to the last one that the first slot has room for.
        Op::Grow => 8100 + rng.below(77) as u32,
        Op::Merge | Op::MergeRaw | Op::Compact | Op::Drop => 3000.max(cfg.clusters * 1030),
    };
    let cut_off = match cfg.op {
        Op::Grow => rng.below(NR as u64),
        Op::Merge | Op::MergeRaw | Op::Compact | Op::Drop => 0,
    };
    let sectors = u64::from(nr_entries) * NR as u64 - cut_off;
    let fresh = Header::new(cfg.version, cluster, sectors).expect("a header");
    let old = fresh.closed(false);
    let mut next = DATA;
    let mut content = |rng: &mut Rng, zeros: u64| -> Content {
        let is_zero = rng.chance(zeros);
        let fill = |_| {
            next += 1;
            if is_zero {
                0
            } else {
                next
            }
        };
        (0..NR).map(fill).collect()
    };
    let is_raw = cfg.op == Op::MergeRaw;
    // Few clusters, far apart, so that several index pages change; of a raw disk the first ones.
    let spread = |i: u32| {
        if is_raw {
            i
        } else {
            i * ((nr_entries - 1) / (cfg.clusters - 1))
        }
    };
    let zeros = if cfg.op == Op::Drop { 30 } else { 10 };
    let mut before = BTreeMap::new();
    let mut upper = BTreeMap::new();
    for i in 0..cfg.clusters {
        if is_raw || rng.chance(50) {
            before.insert(spread(i), content(rng, zeros));
        }
        if matches!(cfg.op, Op::Merge | Op::MergeRaw) && rng.chance(50) {
            let at = ImageCluster(100 + 7 * i);
            upper.insert(spread(i), (at, content(rng, 25)));
        }
    }
    let mut image = Image {
        sectors: Vec::new(),
        len: 0,
    };
    let mut entries = BTreeMap::new();
    let mut slots: Vec<u32> =
        (0..before.len() as u32 + rng.below(u64::from(cfg.clusters) / 2) as u32).collect();
    for i in (1..slots.len()).rev() {
        slots.swap(i, rng.pick(i + 1));
    }
    let first = if is_raw { 0 } else { old.first_data.0 };
    let nr_slots = slots.len() + rng.pick(4);
    image.sectors = (0..(first as usize + nr_slots) * NR)
        .map(|_| content(rng, 0)[0])
        .collect();
    image.sectors[..first as usize * NR].fill(0);
    image.len = image.sectors.len();
    for (i, (c, stamps)) in before.iter().enumerate() {
        let at = if is_raw { *c } else { first + slots[i] };
        image.sectors[at as usize * NR..][..NR].copy_from_slice(stamps);
        entries.insert(*c, old.encode_entry(ImageCluster(at)));
    }
    let size_sectors = match cfg.op {
        // Room for two to four slots of table.
        Op::Grow => sectors + rng.below(3 * 8192) * NR as u64 + 1 + rng.below(200),
        Op::Merge | Op::MergeRaw | Op::Compact | Op::Drop => sectors,
    };
    let world = World {
        op: cfg.op,
        before,
        upper,
        old,
        size_sectors,
    };
    if is_raw {
        // A raw disk that is short, as if it was not grown yet.
        let nr = cfg.clusters as usize;
        image.sectors.truncate(nr * NR);
        image.len = nr * NR;
        return (world, image);
    }
    let page = |p| compose(&image, blocks, &old, &entries, p);
    let pages: Vec<Vec<Stamp>> = (0..old.nr_pages()).map(page).map(|w| w.to_vec()).collect();
    for (p, words) in pages.iter().enumerate() {
        for (s, sector) in words.chunks_exact(WORDS).enumerate() {
            let stamp = blocks.stamp(sector.try_into().expect("a sector"));
            image.sectors[p * PAGE_SECTORS + s] = stamp;
        }
    }
    (world, image)
}

/// The words of an index page of `image`, with changed entries and the header.
pub fn compose(
    image: &Image,
    blocks: &Blocks,
    header: &Header,
    changed: &BTreeMap<u32, u32>,
    page: u32,
) -> [u32; PAGE_SECTORS * WORDS] {
    let mut words = [0; PAGE_SECTORS * WORDS];
    for (s, sector) in words.chunks_exact_mut(WORDS).enumerate() {
        let stamp = image.get(page as usize * PAGE_SECTORS + s);
        sector.copy_from_slice(&read(blocks, stamp));
    }
    if page == 0 {
        words[..HEADER_SLOTS as usize].copy_from_slice(&header_words(header));
    }
    for (c, entry) in changed {
        let (at, slot) = locate(Cluster(*c));
        if at == page {
            words[slot] = *entry;
        }
    }
    words
}

/// What an index sector says; data in its place is nonsense.
pub fn read(blocks: &Blocks, stamp: Stamp) -> [u32; WORDS] {
    blocks.get(stamp).unwrap_or([0x5555_5555; WORDS])
}

// SPDX-License-Identifier: GPL-2.0
//! The crash simulator: writes, FUA writes and flushes run through the machines of `ploop_pure`
//! on a model disk, one action at a time in an order drawn from a seed, and between any two
//! actions the power is cut. What is found then must be a sound image that holds every promise.
//!
//! Below the image may lie another one, a lower delta that is only read: its contents are known by
//! heart, and durable.
//!
//! Now and then the image found is attached again and used on.

pub mod blocks;
pub mod disk;
pub mod engine;
pub mod guest;
pub mod offline;

use crate::rng::Rng;
use blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use disk::{Disk, Image, Stamp};
use engine::Engine;
use guest::Guest;
use ploop_pure::check::{BatScan, Length, Problem};
use ploop_pure::layout::ploop1::{Header, Mark, RawHeader, Version, HEADER_BYTES, HEADER_SLOTS};
use ploop_pure::map::Place;
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster, Level};
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

/// The level of the image.
const TOP: Level = Level(1);
/// The level of the lower delta.
const BELOW: Level = Level(0);
/// Stamps from here on are the lower delta's.
const BELOW_STAMPS: Stamp = 1 << 30;

/// An executor that breaks a rule on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It does not.
    None,
    /// FLUSH is acknowledged and nothing is done.
    FlushIgnored,
    /// Index pages are copied when they are written, not before the data sync.
    CopyLate,
    /// A slot whose write failed is used again as it is.
    ReuseUnclean,
    /// Syncs do not make the file's length durable.
    LengthForgotten,
    /// The in-use mark is not synced before the first change.
    MarkUnsynced,
    /// The mark is cleared before the index is durable.
    MarkClearedEarly,
    /// A slot is published while the copy from the lower delta is still being written to it.
    PublishBeforeCopy,
}

/// One workload.
#[derive(Debug, Clone)]
pub struct Config {
    /// Version of the format.
    pub version: Version,
    /// BAT entries.
    pub nr_entries: u32,
    /// Clusters written to, spread over the disk.
    pub nr_clusters: usize,
    /// A lower delta holds every other one of them.
    pub below: bool,
    /// Writes of a whole cluster among writes.
    pub whole_percent: u64,
    /// Sectors that the disk keeps or loses at once, and the guest's block: 1 or 8.
    pub piece_sectors: usize,
    /// Requests between attach and detach or crash.
    pub requests: u32,
    /// Requests in flight at most.
    pub in_flight: usize,
    /// Slots the file may have; the executor then lives on slots given back.
    pub slots_max: u32,
    /// Flushes among requests.
    pub flush_percent: u64,
    /// FUA among writes.
    pub fua_percent: u64,
    /// Data writes that fail.
    pub fail_percent: u64,
    /// Syncs that fail.
    pub sync_fail_percent: u64,
    /// Power cuts tried after each action.
    pub cuts: u32,
    /// What the executor does wrong.
    pub fault: Fault,
}

impl Config {
    /// The usual workload.
    pub const fn usual() -> Self {
        Self {
            version: Version::V2,
            nr_entries: 2500,
            nr_clusters: 12,
            below: true,
            whole_percent: 6,
            piece_sectors: 1,
            requests: 60,
            in_flight: 5,
            slots_max: u32::MAX,
            flush_percent: 12,
            fua_percent: 15,
            fail_percent: 0,
            sync_fail_percent: 0,
            cuts: 2,
            fault: Fault::None,
        }
    }

    const fn cluster_size() -> u32 {
        64
    }

    /// Sectors of a cluster.
    pub const fn cluster_sectors(&self) -> usize {
        Self::cluster_size() as usize
    }

    /// The guest cluster that is number `i` of the workload, spread over the pages.
    pub fn cluster(&self, i: usize) -> Cluster {
        let step = self.nr_entries / self.nr_clusters as u32;
        Cluster(i as u32 * step + (i as u32 * 7) % step.max(1))
    }

    /// Where cluster `i` of the workload is while the top does not hold it.
    fn place_below(&self, i: usize) -> Place {
        if !self.below || i % 2 == 1 {
            return Place::Hole;
        }
        // Not in the order of the clusters, so that a mistaken slot shows.
        let at = ImageCluster((self.nr_clusters - i) as u32);
        Place::Slot { level: BELOW, at }
    }

    /// What sector `s` of a slot of the lower delta holds.
    fn stamp_below(&self, at: ImageCluster, s: usize) -> Stamp {
        BELOW_STAMPS + at.0 * Self::cluster_size() + s as Stamp
    }

    /// Sector `s` of cluster `i`, if the top does not hold it.
    fn read_below(&self, i: usize, s: usize) -> Stamp {
        match self.place_below(i) {
            Place::Slot { at, .. } => self.stamp_below(at, s),
            Place::Hole => 0,
        }
    }
}

/// How much was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    /// Actions.
    pub steps: u64,
    /// Images judged after a power cut.
    pub states: u64,
}

/// An image as judged after a power cut.
pub struct Found {
    header: Header,
    /// Slot of each cluster of the workload.
    places: Vec<Option<ImageCluster>>,
    /// First slot not in use.
    end: u32,
}

struct Run<'a> {
    cfg: &'a Config,
    rng: Rng,
    tried: Tried,
    /// Where crash images are made.
    scratch: Image,
    /// Images that may carry a mark that says closed.
    closed: Vec<Image>,
}

/// Runs `cfg` with `seed`: attach, work, crash and attach again twice, work, detach.
pub fn run(cfg: &Config, seed: u64) -> Result<Tried, String> {
    let mut run = Run {
        cfg,
        rng: Rng::new(seed),
        tried: Tried::default(),
        scratch: Image {
            sectors: Vec::new(),
            len: 0,
        },
        closed: Vec::new(),
    };
    let lives = run.lives();
    lives.map_err(|what| format!("seed {seed}, after {:?}: {what}", run.tried))?;
    Ok(run.tried)
}

impl Run<'_> {
    fn lives(&mut self) -> Result<(), String> {
        let (mut image, mut blocks, mut found) = self.created();
        let mut guest = self.reread(&image, &found);
        let mut next_stamp = 1;
        for life in 0..3 {
            let mut disk = Disk::new(image, self.cfg.piece_sectors);
            disk.forgets_length = self.cfg.fault == Fault::LengthForgotten;
            self.closed = vec![disk.live().clone()];
            let mut e = Engine::new(self.cfg, &found, disk, guest, blocks, next_stamp);
            e.header = e.header.opened();
            self.write_header(&mut e, self.cfg.fault != Fault::MarkUnsynced)?;
            if life == 2 {
                self.work(&mut e, u64::MAX)?;
                return match e.is_poisoned {
                    true => Ok(()),
                    false => self.close(&mut e),
                };
            }
            let until = self.rng.below(600);
            self.work(&mut e, until)?;
            // The lights go out; the image judged last is attached again.
            found = self.cut(&e)?;
            next_stamp = e.next_stamp;
            blocks = e.blocks.clone();
            // The repair of attach: cut the tail, which may hold data that no entry names.
            image = self.scratch.clone();
            image.len = found.end as usize * self.cfg.cluster_sectors();
            image.sectors.truncate(image.len);
            guest = self.reread(&image, &found);
        }
        Ok(())
    }

    /// A new image, closed and empty.
    fn created(&self) -> (Image, Blocks, Found) {
        let sectors = u64::from(self.cfg.nr_entries) * u64::from(Config::cluster_size());
        let cluster = ClusterSize::from_sectors(Config::cluster_size()).expect("a cluster size");
        let header = Header::new(self.cfg.version, cluster, sectors).expect("a header");
        let mut blocks = Blocks::default();
        let len = header.first_data.0 as usize * self.cfg.cluster_sectors();
        let mut image = Image {
            sectors: vec![0; len],
            len,
        };
        let mut block = [0; WORDS];
        block[..HEADER_SLOTS as usize].copy_from_slice(&header_words(&header));
        image.sectors[0] = blocks.stamp(block);
        let found = Found {
            header,
            places: vec![None; self.cfg.nr_clusters],
            end: header.first_data.0,
        };
        (image, blocks, found)
    }

    /// A guest that reads the image as found.
    fn reread(&self, image: &Image, found: &Found) -> Guest {
        let places = &found.places;
        let nr = self.cfg.cluster_sectors();
        let mut read = Vec::new();
        for (i, place) in places.iter().enumerate() {
            for s in 0..nr {
                read.push(match place {
                    Some(at) => image.get(at.0 as usize * nr + s),
                    None => self.cfg.read_below(i, s),
                });
            }
        }
        Guest::new(places.len(), nr, &read)
    }

    /// Writes page 0 with the header as it is now, and syncs.
    fn write_header(&mut self, e: &mut Engine<'_>, sync: bool) -> Result<(), String> {
        let page = e.page(0);
        let op = e.disk.write(0, &page);
        self.cuts(e)?;
        e.disk.complete(op);
        self.cuts(e)?;
        self.sync(e, sync)
    }

    fn sync(&mut self, e: &mut Engine<'_>, sync: bool) -> Result<(), String> {
        if sync {
            let covered = e.disk.sync_start();
            self.cuts(e)?;
            e.disk.sync_end(covered);
        }
        self.cuts(e)
    }

    fn work(&mut self, e: &mut Engine<'_>, until: u64) -> Result<(), String> {
        for _ in 0..until.min(100_000) {
            if !e.step(&mut self.rng)? || e.is_poisoned {
                break;
            }
            self.cuts(e)?;
        }
        Ok(())
    }

    /// A clean close: index, then the tail cut off, then the mark.
    fn close(&mut self, e: &mut Engine<'_>) -> Result<(), String> {
        let early = self.cfg.fault == Fault::MarkClearedEarly;
        while !early && !e.is_clean() {
            e.commit(&mut self.rng)?;
            self.cuts(e)?;
            if e.is_poisoned {
                return Ok(());
            }
        }
        let op = e
            .disk
            .set_len(e.alloc.head() as usize * self.cfg.cluster_sectors());
        self.cuts(e)?;
        e.disk.complete(op);
        self.sync(e, !early)?;
        e.header = e.header.closed(e.is_empty());
        let mut last = e.disk.live().clone();
        let page = e.page(0);
        last.sectors[..PAGE_SECTORS].copy_from_slice(&page);
        self.closed.push(last);
        let op = e.disk.write(0, &page);
        self.cuts(e)?;
        e.disk.complete(op);
        self.sync(e, true)?;
        e.guest.promise_all();
        let found = self.cut(e)?;
        if found.header.mark != Mark::Closed {
            return Err("the image is marked in use after a clean close".into());
        }
        Ok(())
    }

    fn cuts(&mut self, e: &Engine<'_>) -> Result<(), String> {
        self.tried.steps += 1;
        for _ in 0..self.cfg.cuts {
            self.cut(e)?;
        }
        Ok(())
    }

    /// Cuts the power and judges what is found.
    fn cut(&mut self, e: &Engine<'_>) -> Result<Found, String> {
        self.tried.states += 1;
        e.disk.crash(&mut self.rng, &mut self.scratch);
        let image = &self.scratch;
        let header = header_of(image, &e.blocks)?;
        if header.mark != Mark::InUse && !self.closed.iter().any(|c| same(c, image, &e.blocks)) {
            return Err("a changed image is not marked in use".into());
        }
        let found = self.scan(image, header, &e.blocks)?;
        let nr = self.cfg.cluster_sectors();
        for (cluster, place) in found.places.iter().enumerate() {
            let first = place.map(|at| at.0 as usize * nr);
            e.guest.judge(cluster, place.is_some(), |s| match first {
                Some(first) => image.get(first + s),
                None => self.cfg.read_below(cluster, s),
            })?;
        }
        Ok(found)
    }

    /// The project's own check must have nothing to say but what costs nothing to mend.
    fn scan(&self, image: &Image, header: Header, blocks: &Blocks) -> Result<Found, String> {
        let problem = |p: Problem| format!("after the power cut: {p}");
        let length = Length::judge(&header, image.len as u64 * 512).map_err(problem)?;
        let mut scan = BatScan::new(header, length).map_err(|e| format!("{e:?}"))?;
        let mut places = vec![None; self.cfg.nr_clusters];
        for page in 0..header.nr_pages() {
            let first = page as usize * PAGE_SECTORS;
            if (first..first + PAGE_SECTORS).all(|s| image.get(s) == 0) {
                continue;
            }
            let mut slots = [U32::ZERO; PAGE_SECTORS * WORDS];
            for (s, block) in slots.chunks_exact_mut(WORDS).enumerate() {
                let words = blocks.get(image.get(first + s));
                for (slot, word) in block.iter_mut().zip(words) {
                    *slot = U32::new(word);
                }
            }
            scan.page(page, &slots, |cluster, place| {
                let place = place.map_err(problem)?;
                let i = (0..places.len()).find(|i| self.cfg.cluster(*i) == cluster);
                let i = i.ok_or(format!("{cluster:?} is mapped but was never written"))?;
                places[i] = Some(place);
                Ok::<(), String>(())
            })?;
        }
        Ok(Found {
            header,
            places,
            end: scan.usage().end,
        })
    }
}

fn header_of(image: &Image, blocks: &Blocks) -> Result<Header, String> {
    let words = blocks.get(image.get(0));
    let mut bytes = [0; HEADER_BYTES];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let raw = RawHeader::read_from_bytes(&bytes).map_err(|e| format!("{e:?}"))?;
    Header::parse(&raw).map_err(|p| format!("after the power cut: {p}"))
}

/// Whether two images have the same bytes; page 0, written with the header, is compared by content.
fn same(a: &Image, b: &Image, blocks: &Blocks) -> bool {
    let is_same = |s: usize, x: Stamp, y: Stamp| {
        x == y || (s < PAGE_SECTORS && x != 0 && y != 0 && blocks.get(x) == blocks.get(y))
    };
    a.len == b.len && (0..a.len).all(|s| is_same(s, a.get(s), b.get(s)))
}

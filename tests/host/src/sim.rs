// SPDX-License-Identifier: GPL-2.0
//! The crash simulator: requests, and operations that change the chain under them, run through
//! the machines of `ploop_pure` on model disks, one action at a time in an order drawn from a
//! seed, and between any two actions the power is cut. What is found then must be sound images
//! that hold every promise.
//!
//! Below the first image may lie another one, a lower delta that is only read: its contents are
//! known by heart, and durable. A snapshot adds a second image, a merge takes it away again.
//!
//! Now and then the images found are attached again and used on.

pub mod blocks;
pub mod disk;
pub mod engine;
pub mod guest;
mod judge;
pub mod offline;
mod recover;
mod run;
pub mod story;

use blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use disk::{Disk, Image, Stamp};
use engine::File;
use judge::Found;
use ploop_pure::layout::ploop1::{locate, Header, Version, HEADER_SLOTS};
use ploop_pure::map::Place;
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster, Level};
pub use run::{run, Tried};

/// The level of the lower delta that is known by heart; the first image is on the next one.
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
    /// The mark of a snapshot's new top and of a merge's destination is not synced before it changes.
    ChainMarkUnsynced,
    /// The mark is cleared before the index is durable.
    MarkClearedEarly,
    /// A slot is published while the copy from the lower delta is still being written to it.
    PublishBeforeCopy,
    /// A slot is taken away from a cluster while requests that looked it up still use it.
    EpochNotWaited,
    /// Commits of a new top do not wait until the old one is durable.
    GateIgnored,
    /// A merge's destination gives its cluster's slot to a write while the entry of the source
    /// that hides it is not durable.
    HiddenReusedEarly,
    /// Such a slot is given to a write as it is.
    HiddenUnclean,
    /// A merge copies index pages of the destination before those of the source.
    DestinationCopiedFirst,
    /// A merge takes an entry of the destination for durable while the source still hides it.
    SettledBeforeDrops,
    /// A merge is given up, and slots of the source are free, before the drops of their entries
    /// are durable.
    UndoneEarly,
    /// A file is cut before the index that names the new places is durable.
    CutEarly,
    /// The place for a larger index is made zero before the index that names the new places of
    /// what stood there is durable.
    VacatedUncommitted,
    /// The place for a larger index is not made zero.
    BatNotZeroed,
    /// What stands behind the last entry in its page is not cleared before it counts.
    SurplusLeft,
    /// The place for a larger index is reserved while writes that took a slot there go on.
    ReservedUnfrozen,
    /// Two make the file longer at once, and the one that is late makes zero what is written there.
    GrowthUnlocked,
    /// A failed FUA write takes the batch from a commit that runs, which goes on.
    PoisonSettles,
    /// A commit writes a page while the last commit's write of it is on its way.
    PageWrittenTwice,
    /// The source of a merge is taken out before the last entries are dropped from it durably.
    MergeEndUncommitted,
    /// The source of a merge of lower deltas is taken out before the destination's index is durable.
    LowerUncommitted,
    /// The steps of a repair are not made durable one after the other.
    RepairUnsynced,
    /// The closed header is written with the entries of page 0 as they were at attach.
    StaleEntries,
    /// Page 0 is committed with the header as it was before the mark.
    StaleHeader,
}

/// What is done to the chain while requests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Nothing.
    None,
    /// A snapshot of one image, a merge of two.
    Chain,
    /// Compaction.
    Compact,
    /// Snapshots of up to four images, merges of two lower ones, and of the top.
    Lower,
    /// `Chain`, `Compact` or `Grow`: the top that is compacted may have another image below, that
    /// which grows has none.
    Mixed,
    /// Growth of the disk.
    Grow,
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
    /// The first image is a raw one: every cluster has its own slot in it, for ever.
    pub raw: bool,
    /// Writes of a whole cluster among writes.
    pub whole_percent: u64,
    /// Discards, or writes of zeroes, among reads and writes.
    pub zero_percent: u64,
    /// Reads among reads and writes.
    pub read_percent: u64,
    /// What is done to the chain.
    pub op: Op,
    /// How often, between attach and detach or crash.
    pub ops: u32,
    /// Sectors that the disk keeps or loses at once, and the guest's block: 1 or 8.
    pub piece_sectors: usize,
    /// Requests between attach and detach or crash.
    pub requests: u32,
    /// Requests whose I/O takes long.
    pub slow_percent: u64,
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
    /// Power cuts after which the chain is repaired, with the power cut meanwhile.
    pub recover_percent: u64,
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
            raw: false,
            whole_percent: 6,
            zero_percent: 12,
            read_percent: 8,
            op: Op::None,
            ops: 3,
            piece_sectors: 1,
            requests: 60,
            slow_percent: 15,
            in_flight: 5,
            slots_max: u32::MAX,
            flush_percent: 12,
            fua_percent: 15,
            fail_percent: 0,
            sync_fail_percent: 0,
            cuts: 2,
            recover_percent: 5,
            fault: Fault::None,
        }
    }

    /// One of each kind of workload, for a short look.
    pub fn all() -> [Self; 11] {
        let usual = Self::usual();
        let base = Self {
            below: false,
            zero_percent: 35,
            requests: 90,
            ..usual.clone()
        };
        let op = |op, below| Self {
            op,
            below,
            ..base.clone()
        };
        [
            base.clone(),
            Self {
                fail_percent: 5,
                ..op(Op::Chain, true)
            },
            Self {
                sync_fail_percent: 3,
                ..op(Op::Chain, false)
            },
            op(Op::Lower, false),
            op(Op::Compact, false),
            op(Op::Grow, false),
            Self {
                requests: 150,
                ops: 8,
                ..op(Op::Mixed, false)
            },
            Self {
                version: Version::V1,
                piece_sectors: 8,
                slots_max: 14,
                ..op(Op::Chain, true)
            },
            Self::raw(Op::Chain),
            Self::raw(Op::Lower),
            usual,
        ]
    }

    /// A raw image, and what is done to a chain over it.
    pub fn raw(op: Op) -> Self {
        Self {
            op,
            raw: true,
            below: false,
            nr_entries: 30,
            zero_percent: 25,
            requests: 90,
            ..Self::usual()
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

    /// The first image of a raw disk, all of which is zeros.
    fn raw_image(&self, blocks: &mut Blocks) -> File {
        let len = self.nr_entries as usize * self.cluster_sectors();
        let image = Image {
            sectors: vec![0; len],
            len,
        };
        // It has none, but the geometry of those above.
        let header = self.created(0, self.nr_entries, blocks).header.closed(true);
        self.reopened(Found {
            id: 0,
            image,
            header,
            places: self.own_slots(),
            findings: None,
        })
    }

    /// Where a raw image has its clusters.
    fn own_slots(&self) -> engine::Places {
        let own = |i| Some(ImageCluster(self.cluster(i).0));
        (0..self.nr_clusters).map(own).collect()
    }

    /// A new image of `nr_entries`, closed and empty, number `id`.
    fn created(&self, id: u32, nr_entries: u32, blocks: &mut Blocks) -> File {
        let sectors = u64::from(nr_entries) * u64::from(Self::cluster_size());
        let cluster = ClusterSize::from_sectors(Self::cluster_size()).expect("a cluster size");
        let header = Header::new(self.version, cluster, sectors).expect("a header");
        let len = header.first_data.0 as usize * self.cluster_sectors();
        let mut image = Image {
            sectors: vec![0; len],
            len,
        };
        let mut block = [0; WORDS];
        block[..HEADER_SLOTS as usize].copy_from_slice(&header_words(&header));
        image.sectors[0] = blocks.stamp(block);
        if id == 0 && matches!(self.op, Op::Grow | Op::Mixed) {
            // An entry that does not count, as long as there are no more.
            let (page, slot) = locate(Cluster(nr_entries));
            let mut block = [0; WORDS];
            block[slot % WORDS] = header.encode_entry(header.first_data);
            image.sectors[page as usize * PAGE_SECTORS + slot / WORDS] = blocks.stamp(block);
        }
        self.opened(id, image, header, vec![None; self.nr_clusters])
    }

    /// An image as it was found.
    fn reopened(&self, f: Found) -> File {
        let mut file = self.opened(f.id, f.image, f.header, f.places);
        if f.findings.is_none() {
            // Nothing marks it.
            (file.is_raw, file.header) = (true, f.header);
        }
        file
    }

    /// An image that is durable as it is.
    fn opened(&self, id: u32, image: Image, header: Header, places: engine::Places) -> File {
        let mut disk = Disk::new(image, self.piece_sectors);
        disk.forgets_length = self.fault == Fault::LengthForgotten;
        File {
            id,
            closed: vec![disk.live().clone()],
            disk,
            header: header.opened(),
            places,
            is_raw: false,
        }
    }
}

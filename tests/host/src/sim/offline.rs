// SPDX-License-Identifier: GPL-2.0
//! Merge, grow and compact on the model disk: the power is cut between any two actions, and what
//! is found must read as before, pass the check and let the operation, begun again, succeed.

pub mod images;

use super::blocks::{Blocks, PAGE_SECTORS, WORDS};
use super::disk::{Disk, Image};
use super::judge::{header_of, same};
use super::Tried;
use crate::rng::Rng;
use images::{compose, created, read, Content, World};
use ploop_pure::check::{BatScan, Length};
use ploop_pure::layout::ploop1::{locate, Header, Mark, Version};
use ploop_pure::offline::compact::{Compact, Zeros};
use ploop_pure::offline::grow::{Census, Grow, Plan};
use ploop_pure::offline::merge::Merge;
use ploop_pure::offline::{Action, Event, Found, Machine};
use ploop_pure::problem::Problem;
use ploop_pure::units::{Cluster, ImageCluster};
use std::collections::BTreeMap;
use zerocopy::little_endian::U32;

/// Sectors of a cluster.
const NR: usize = 64;
/// Actions after which a machine surely hangs.
const ACTIONS_MAX: u32 = 100_000;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// An upper delta is merged into the image.
    Merge,
    /// An upper delta is merged into a raw image.
    MergeRaw,
    /// The image gets a larger disk.
    Grow,
    /// The image is compacted.
    Compact,
    /// The same, and clusters full of zeros are dropped.
    Drop,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Merge,
        Self::MergeRaw,
        Self::Grow,
        Self::Compact,
        Self::Drop,
    ];
}

/// What is tried.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The operation.
    pub op: Op,
    /// Version of the format.
    pub version: Version,
    /// Sectors that the disk keeps or loses at once.
    pub piece_sectors: usize,
    /// Clusters there may be, spread over the index.
    pub clusters: u32,
    /// Power cuts after each action.
    pub cuts: u32,
}

impl Config {
    /// The usual trial of `op`.
    pub const fn usual(op: Op) -> Self {
        Self {
            op,
            version: Version::V2,
            piece_sectors: 1,
            clusters: 24,
            cuts: 2,
        }
    }
}

/// The entries of an image as found.
struct Map {
    header: Header,
    places: BTreeMap<u32, ImageCluster>,
    scan: BatScan,
}

/// One run of a machine.
struct Run<'a> {
    world: &'a World,
    rng: Rng,
    tried: Tried,
    disk: Disk,
    blocks: Blocks,
    header: Header,
    /// The entries as they are in memory.
    places: BTreeMap<u32, ImageCluster>,
    /// Of those, the ones changed there.
    changed: BTreeMap<u32, u32>,
    /// Images that may say that they are closed.
    closed: Vec<Image>,
    cuts: u32,
    is_done: bool,
    /// An image found after a cut, to go on with.
    kept: Option<Image>,
    scratch: Image,
}

/// Runs `cfg` with `seed`, then again what a power cut or an early end left.
pub fn run(cfg: &Config, seed: u64) -> Result<Tried, String> {
    let mut rng = Rng::new(seed ^ 0x6f66_666c);
    let mut blocks = Blocks::default();
    let (world, image) = created(cfg, &mut rng, &mut blocks);
    let mut tried = Tried::default();
    let lives = || -> Result<(), String> {
        let (mut image, mut blocks, mut cuts) = (image.clone(), blocks, cfg.cuts);
        for life in 0..3 {
            let header = match cfg.op {
                Op::MergeRaw => world.old,
                Op::Merge | Op::Grow | Op::Compact | Op::Drop => header_of(&image, &blocks)?,
            };
            let mut run = Run {
                world: &world,
                rng: Rng::new(rng.bits()),
                tried: Tried::default(),
                disk: Disk::new(image.clone(), cfg.piece_sectors),
                blocks,
                header,
                places: BTreeMap::new(),
                changed: BTreeMap::new(),
                closed: vec![image],
                cuts,
                is_done: false,
                kept: None,
                scratch: Image {
                    sectors: Vec::new(),
                    len: 0,
                },
            };
            let outcome = run.life(life < 2);
            tried.steps += run.tried.steps;
            tried.states += run.tried.states;
            outcome?;
            if life == 2 && !run.is_done {
                return Err("the operation was not completed".into());
            }
            // Most often what a cut left, else where the machine ended.
            let live = run.disk.live().clone();
            image = run.kept.take().unwrap_or(live);
            blocks = run.blocks;
            cuts = 1;
        }
        Ok(())
    };
    lives().map_err(|what| format!("seed {seed}, {:?}, after {tried:?}: {what}", cfg.op))?;
    Ok(tried)
}

impl Run<'_> {
    fn life(&mut self, is_eventful: bool) -> Result<(), String> {
        let Some(mut machine) = self.machine()? else {
            self.is_done = true;
            return self.judge().map(drop);
        };
        let stop_at = match is_eventful && self.rng.chance(30) {
            true => self.rng.below(80) as u32,
            false => u32::MAX,
        };
        let fail_percent = if is_eventful && self.rng.chance(10) {
            10
        } else {
            0
        };
        let mut event = Event::Ok;
        for nr in 0..ACTIONS_MAX {
            if nr == stop_at {
                machine.stop();
            }
            let action = machine.next(event);
            match action {
                Action::Done => {
                    self.is_done = true;
                    return self.cuts();
                }
                Action::Stopped => return self.cuts(),
                Action::Fail => return Err(format!("the machine failed after {event:?}")),
                action if self.rng.chance(fail_percent) && self.fail(action) => {
                    event = Event::Failed;
                }
                _ => event = self.act(action)?,
            }
            self.cuts()?;
        }
        Err("the machine does not come to an end".into())
    }

    /// Lets an action fail that needs space; false if it is another one.
    fn fail(&mut self, action: Action) -> bool {
        let op = match action {
            Action::Copy { from, to } => self.disk.write(to.0 as usize * NR, &self.source(from)),
            Action::Zero { start, end } => {
                let (first, last) = (start.div_ceil(512) as usize, (end / 512) as usize);
                self.disk.write(first, &vec![0; last - first])
            }
            Action::SetLen { len_bytes } => {
                return len_bytes / 512 > self.disk.live().len as u64;
            }
            Action::WriteHeader(_)
            | Action::Sync
            | Action::Find { .. }
            | Action::Test { .. }
            | Action::Publish { .. }
            | Action::WriteIndex
            | Action::Done
            | Action::Stopped
            | Action::Fail => return false,
        };
        self.disk.fail(op, &mut self.rng);
        true
    }

    /// The machine for the image as it is, after what the check mends; `None` if all is done.
    fn machine(&mut self) -> Result<Option<Box<dyn Machine>>, String> {
        if self.world.op == Op::MergeRaw {
            return Ok(Some(Box::new(Merge::into_raw(&self.world.old))));
        }
        let image = self.disk.live().clone();
        let map = self.map(&image)?;
        self.places.clone_from(&map.places);
        let usage = map.scan.usage();
        let refused = |r: &dyn std::fmt::Display| format!("refused: {r}");
        Ok(match self.world.op {
            Op::Merge | Op::MergeRaw => {
                let is_new = |c: &&u32| !map.places.contains_key(c);
                let nr = self.world.upper.keys().filter(is_new).count() as u32;
                let merge = Merge::into_ploop1(&map.header, usage, nr);
                Some(Box::new(merge.map_err(|r| refused(&r))?))
            }
            Op::Grow => {
                let plan = Plan::new(&map.header, self.world.size_sectors);
                let Some(plan) = plan.map_err(|r| refused(&r))? else {
                    return self.mended(&map);
                };
                let in_the_way = |at: &&ImageCluster| plan.is_in_the_way(**at);
                let last = map.header.disk_clusters() - 1;
                let census = Census {
                    usage,
                    nr_in_the_way: map.places.values().filter(in_the_way).count() as u32,
                    last: map.places.get(&last).copied(),
                };
                Some(Box::new(Grow::new(plan, census).map_err(|r| refused(&r))?))
            }
            Op::Compact | Op::Drop => {
                let zeros = match self.world.op {
                    Op::Drop => Zeros::Drop,
                    Op::Merge | Op::MergeRaw | Op::Grow | Op::Compact => Zeros::Keep,
                };
                let header = map.header;
                match Compact::new(&header, map.scan, image.len as u64 * 512, zeros) {
                    Some(machine) => Some(Box::new(machine)),
                    None => return self.mended(&self.map(&image)?),
                }
            }
        })
    }

    /// All was done but that the mark was cleared, which the check does.
    fn mended(&mut self, map: &Map) -> Result<Option<Box<dyn Machine>>, String> {
        let is_empty = map.scan.usage().nr_used == 0;
        self.act(Action::WriteHeader(map.header.opened().closed(is_empty)))?;
        self.act(Action::Sync)?;
        Ok(None)
    }

    fn source(&self, from: ImageCluster) -> Content {
        let upper = self.world.upper.values().find(|(at, _)| *at == from);
        match upper {
            Some((_, content)) => content.clone(),
            None => (0..NR)
                .map(|s| self.disk.live().get(from.0 as usize * NR + s))
                .collect(),
        }
    }

    fn act(&mut self, action: Action) -> Result<Event, String> {
        let op = match action {
            Action::WriteHeader(header) => {
                self.header = header;
                let live = self.disk.live();
                let words = compose(live, &self.blocks, &header, &BTreeMap::new(), 0);
                let sector = words[..WORDS].try_into().expect("a sector");
                let stamp = self.blocks.stamp(sector);
                if header.mark != Mark::InUse {
                    let mut last = live.clone();
                    last.sectors[0] = stamp;
                    self.closed.push(last);
                }
                self.disk.write(0, &[stamp])
            }
            Action::Sync => {
                let covered = self.disk.sync_start();
                self.cuts()?;
                self.disk.sync_end(covered);
                return Ok(Event::Ok);
            }
            Action::SetLen { len_bytes } => self.disk.set_len((len_bytes / 512) as usize),
            Action::Find { from } => return Ok(self.find(from)),
            Action::Test { at } => {
                let is_zero = self.source(at).iter().all(|s| *s == 0);
                return Ok(if is_zero { Event::Zeros } else { Event::Data });
            }
            Action::Copy { from, to } => self.disk.write(to.0 as usize * NR, &self.source(from)),
            Action::Zero { start, end } => return self.zero(start, end),
            Action::Publish { cluster, at } => {
                let entry = at.map_or(0, |at| self.header.encode_entry(at));
                self.changed.insert(cluster.0, entry);
                match at {
                    Some(at) => self.places.insert(cluster.0, at),
                    None => self.places.remove(&cluster.0),
                };
                return Ok(Event::Ok);
            }
            Action::WriteIndex => return self.write_index(),
            Action::Done | Action::Stopped | Action::Fail => return Ok(Event::Failed),
        };
        self.cuts()?;
        self.disk.complete(op);
        Ok(Event::Ok)
    }

    fn find(&self, from: Cluster) -> Event {
        let places = &self.places;
        let found = match self.world.op {
            Op::Merge | Op::MergeRaw => {
                let next = self.world.upper.range(from.0..).next();
                next.map(|(c, (at, _))| (*c, *at, places.get(c).copied()))
            }
            Op::Grow | Op::Compact | Op::Drop => {
                let next = places.range(from.0..).next();
                next.map(|(c, at)| (*c, *at, None))
            }
        };
        found.map_or(Event::End, |(cluster, at, below)| {
            Event::Found(Found {
                cluster: Cluster(cluster),
                at,
                below,
            })
        })
    }

    fn zero(&mut self, start: u64, end: u64) -> Result<Event, String> {
        let (mut first, last) = ((start / 512) as usize, (end / 512) as usize);
        if start % 512 != 0 {
            let mut words = read(&self.blocks, self.disk.live().get(first));
            words[(start % 512 / 4) as usize..].fill(0);
            let stamp = self.blocks.stamp(words);
            let op = self.disk.write(first, &[stamp]);
            self.disk.complete(op);
            self.cuts()?;
            first += 1;
        }
        let op = self.disk.write(first, &vec![0; last - first]);
        self.cuts()?;
        self.disk.complete(op);
        Ok(Event::Ok)
    }

    fn write_index(&mut self) -> Result<Event, String> {
        let changed = std::mem::take(&mut self.changed);
        for page in 0..self.header.nr_pages() {
            if !changed.keys().any(|c| locate(Cluster(*c)).0 == page) {
                continue;
            }
            let live = self.disk.live();
            let words = compose(live, &self.blocks, &self.header, &changed, page);
            let mut stamps = Vec::new();
            for sector in words.chunks_exact(WORDS) {
                stamps.push(self.blocks.stamp(sector.try_into().expect("a sector")));
            }
            let op = self.disk.write(page as usize * PAGE_SECTORS, &stamps);
            self.cuts()?;
            self.disk.complete(op);
        }
        Ok(Event::Ok)
    }

    fn cuts(&mut self) -> Result<(), String> {
        self.tried.steps += 1;
        for _ in 0..self.cuts {
            self.tried.states += 1;
            let mut found = std::mem::replace(
                &mut self.scratch,
                Image {
                    sectors: Vec::new(),
                    len: 0,
                },
            );
            self.disk.crash(&mut self.rng, &mut found);
            let end = self.judge_image(&found);
            if self.rng.chance(4) {
                let mut kept = found.clone();
                // What the check mends: the tail is cut.
                if let Some(end) = end.clone()? {
                    kept.len = kept.len.min(end as usize * NR);
                    kept.sectors.truncate(kept.len);
                }
                self.kept = Some(kept);
            }
            self.scratch = found;
            end?;
        }
        Ok(())
    }

    fn judge(&self) -> Result<Option<u32>, String> {
        self.judge_image(self.disk.live())
    }

    /// Judges an image as found; one past its last slot in use.
    fn judge_image(&self, image: &Image) -> Result<Option<u32>, String> {
        if self.world.op == Op::MergeRaw {
            let read = |c: u32| (0..NR).map(|s| image.get(c as usize * NR + s)).collect();
            self.contents(read)?;
            return Ok(None);
        }
        let map = self.map(image)?;
        let header = map.header;
        let is_known = |c: &Image| same(c, image, &self.blocks);
        if header.mark != Mark::InUse && !self.closed.iter().any(is_known) {
            return Err("a changed image is not marked in use".into());
        }
        if self.is_done && header.mark == Mark::InUse {
            return Err("the image is marked in use after all was done".into());
        }
        if let Some(c) = map
            .places
            .keys()
            .find(|c| !self.world.clusters().any(|w| w == **c))
        {
            return Err(format!("cluster {c} is mapped but nobody wrote it"));
        }
        self.contents(|c| {
            let at = map.places.get(&c);
            let get = |s| at.map_or(0, |at| image.get(at.0 as usize * NR + s));
            (0..NR).map(get).collect()
        })?;
        self.ending(image, &map)?;
        Ok(Some(map.scan.usage().end))
    }

    fn contents(&self, read: impl Fn(u32) -> Content) -> Result<(), String> {
        for c in self.world.clusters() {
            if !self.is_done && self.world.upper.contains_key(&c) {
                // Whatever it is: the upper delta hides it.
                continue;
            }
            let (have, mut want) = (read(c), self.world.last(c));
            let end = self
                .world
                .old
                .size_sectors
                .saturating_sub(u64::from(c) * NR as u64);
            let within = NR.min(end as usize);
            // Behind the end of the disk there may be anything until it is larger.
            want.truncate(within);
            if have[..within] != want[..] {
                return Err(format!("cluster {c} is not as it was"));
            }
            let is_larger = self.world.op == Op::Grow && self.is_done;
            if is_larger && have[within..].iter().any(|s| *s != 0) {
                return Err(format!("behind the old end, cluster {c} is not zeros"));
            }
        }
        Ok(())
    }

    /// What must be so in the end.
    fn ending(&self, image: &Image, map: &Map) -> Result<(), String> {
        if !self.is_done {
            return Ok(());
        }
        if map.header.size_sectors != self.world.size_sectors {
            return Err("the disk has not the size asked for".into());
        }
        let nr_slots = map.header.first_data.0 as usize + map.places.len();
        let is_compact = matches!(self.world.op, Op::Compact | Op::Drop);
        if is_compact && image.len != nr_slots * NR {
            return Err(format!("{} sectors long, {nr_slots} clusters", image.len));
        }
        let is_zero = |c: &&u32| self.world.own(**c).iter().all(|s| *s == 0);
        if self.world.op == Op::Drop && map.places.keys().any(|c| is_zero(&c)) {
            return Err("a cluster full of zeros was kept".into());
        }
        Ok(())
    }

    /// The entries of an image, if its check finds nothing but what costs nothing to mend.
    fn map(&self, image: &Image) -> Result<Map, String> {
        let problem = |p: Problem| format!("after the power cut: {p}");
        let header = header_of(image, &self.blocks)?;
        let length = Length::judge(&header, image.len as u64 * 512).map_err(problem)?;
        let mut scan = BatScan::new(header, length).map_err(|e| format!("{e:?}"))?;
        let mut places = BTreeMap::new();
        for page in 0..header.nr_pages() {
            let first = page as usize * PAGE_SECTORS;
            if (first..first + PAGE_SECTORS).all(|s| image.get(s) == 0) {
                continue;
            }
            let words = compose(image, &self.blocks, &header, &BTreeMap::new(), page);
            let slots = words.map(U32::new);
            scan.page(page, &slots, |cluster, place| {
                places.insert(cluster.0, place.map_err(problem)?);
                Ok::<(), String>(())
            })?;
        }
        Ok(Map {
            header,
            places,
            scan,
        })
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The executor: does what the machines of `ploop_pure` say, on the model disks, one action at a
//! time. It decides nothing that they decide; what it adds (who waits for what, how the file
//! grows, when the queue is held) is written as `docs/architecture.md` has it.

mod commits;
mod lower;
mod merge;
mod ops;
mod relocate;
mod requests;
mod snapshot;
mod space;

use super::blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use super::disk::{Covered, Disk, Image, OpId, Stamp};
use super::guest::{Guest, Promise, Range, Slot};
use super::{Config, Fault, BELOW};
use crate::rng::Rng;
use ploop_pure::alloc::Alloc;
use ploop_pure::flow::{self, Settled, Write};
use ploop_pure::index::DirtyPages;
use ploop_pure::layout::ploop1::{locate, page_range, Header, HEADER_SLOTS, PAGE_SLOTS};
use ploop_pure::map::{Place, Word};
use ploop_pure::units::{ImageCluster, Level};
use space::{Maker, Making};
use std::fmt;

/// What the entries of a file name, by cluster of the workload.
pub type Places = Vec<Option<ImageCluster>>;

/// An image file of the chain.
pub struct File {
    /// No other file has it.
    pub id: u32,
    pub(super) disk: Disk,
    pub(super) header: Header,
    /// What its entries name while it is not the top, nor the source of a merge.
    pub(super) places: Places,
    /// Contents that may carry a mark that says closed.
    pub(super) closed: Vec<Image>,
    /// It has neither a mark nor an index: its places are what they are.
    pub(super) is_raw: bool,
}

enum Job {
    /// A write, or zeroes.
    Write {
        /// Nothing while it is not decided how zeroes are made, or when they need no write.
        machine: Option<Box<Write>>,
        range: Range,
        stamp: Stamp,
        fua: bool,
        /// Zeroes may not unmap: WRITE ZEROES with NOUNMAP.
        keeps_space: bool,
    },
    Read {
        range: Range,
        oldest: Vec<usize>,
        place: Place,
    },
    Flush {
        promise: Promise,
    },
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sectors = |r: &Range| format!("cluster {} sectors {:?}", r.cluster, r.sectors());
        match self {
            Self::Write {
                range, stamp, fua, ..
            } => {
                let what = match (*stamp, *fua) {
                    (0, false) => "zeroes".to_string(),
                    (0, true) => "zeroes with FUA".to_string(),
                    (stamp, false) => format!("write {stamp}"),
                    (stamp, true) => format!("write {stamp} with FUA"),
                };
                write!(f, "{what} to {}", sectors(range))
            }
            Self::Read { range, .. } => write!(f, "read of {}", sectors(range)),
            Self::Flush { .. } => write!(f, "flush"),
        }
    }
}

impl Job {
    fn range(&self) -> Option<Range> {
        match self {
            Self::Write { range, .. } | Self::Read { range, .. } => Some(*range),
            Self::Flush { .. } => None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Wait {
    /// For nothing: the action is next.
    Ready(flow::Action),
    /// For nothing: a read is done now.
    Reading,
    /// For the disk.
    Io { op: OpId, durable: bool },
    /// For the disk to make the slot zero that a merge's source hides.
    Zeroing { op: OpId, at: ImageCluster },
    /// For the cluster's lock.
    Lock,
    /// For whoever has closed the cluster; then it starts again.
    Closed,
    /// For all who use the place of its cluster, which it has closed.
    Epoch,
    /// For space in the file.
    Space,
    /// For the source of a merge to be durable.
    Gate,
    /// For a flush of the device.
    Device(Covered),
    /// For a commit that starts after it began to wait.
    NextCommit,
    /// For the commit that is running.
    ThisCommit,
}

#[derive(Debug)]
struct Task {
    /// Drawn when it began.
    id: u64,
    job: Job,
    wait: Wait,
    /// It may use the place it looked up, without the lock.
    inside: bool,
    /// Its turn comes seldom.
    slow: bool,
}

/// Who makes the next step.
#[derive(Debug, Clone, Copy)]
enum Choice {
    NewRequest,
    Task(usize),
    Commit,
    Space(Maker),
    LateCopy,
    NewOp,
    Op,
}

/// One attached chain.
pub struct Engine<'a> {
    cfg: &'a Config,
    /// Base first. The last may be the source of a merge, and the top the one before it.
    pub(super) files: Vec<File>,
    /// Which of them requests write to.
    pub(super) top: usize,
    /// A file that is not in the chain: before the switch of a snapshot, or after a merge.
    pub(super) outside: Option<File>,
    /// What a merge of lower deltas took out of the chain: it may still be found there, so many
    /// files above the base.
    pub(super) taken_out: Option<(usize, File)>,
    /// What happened, if it is to be told.
    pub(super) story: Option<Vec<String>>,
    /// Until this snapshot is done, the chain without its new top keeps every promise too.
    pub(super) old_is_enough: bool,
    /// What the disk held at the switch of a snapshot that is done: the old top's for ever.
    pub(super) sealed: Option<Vec<Stamp>>,
    pub(super) guest: Guest,
    pub(super) blocks: Blocks,
    /// One word for each cluster of the workload.
    map: Vec<Word>,
    pub(super) alloc: Alloc,
    dirty: DirtyPages,
    tasks: Vec<Task>,
    commit: Option<commits::Running>,
    /// Of the file that is the top.
    settled: (u32, Settled),
    wants_commit: bool,
    /// No commit of the top starts.
    gate: bool,
    /// No request starts.
    is_frozen: bool,
    /// By [`Maker`].
    making: [Option<Making>; 2],
    /// There may be slots to be made clean.
    may_clean: bool,
    op: Option<ops::Running>,
    /// Copies from the lower delta that nobody waits for: a fault.
    late: Vec<OpId>,
    /// Who made the last step, as [`Self::id`] has it.
    pub(super) actor: u64,
    /// What it was about: a request that began, else the same.
    pub(super) subject: u64,
    /// What the last commit wrote, if that is still on its way: a fault.
    written: commits::Copies,
    requests_left: u32,
    ops_left: u32,
    pub(super) ops_done: u32,
    /// The first stamp not used.
    pub(super) next_stamp: Stamp,
    /// The first number of a file not used.
    pub(super) next_id: u32,
    /// A metadata write or sync has failed.
    pub(super) is_poisoned: bool,
}

/// The level of a file.
fn level_of(file: usize) -> Level {
    Level(file as u8 + BELOW.0 + 1)
}

impl<'a> Engine<'a> {
    /// The chain of `files` as it was found at attach; there is one at least.
    pub fn new(
        cfg: &'a Config,
        mut files: Vec<File>,
        guest: Guest,
        blocks: Blocks,
        (next_stamp, next_id): (Stamp, u32),
    ) -> Self {
        let mut map: Vec<_> = (0..cfg.nr_clusters).map(|i| cfg.place_below(i)).collect();
        for (n, file) in files.iter().enumerate() {
            for (place, at) in map.iter_mut().zip(&file.places) {
                if let Some(at) = *at {
                    let level = level_of(n);
                    *place = Place::Slot { level, at };
                }
            }
        }
        let word = |place| Word::default().with_place(place);
        let top = files.len() - 1;
        let places = files[top].places.clone();
        let alloc = Self::alloc_of(cfg, &mut files[top], &places);
        let nr_pages = files[top].header.nr_pages();
        Self {
            cfg,
            files,
            top,
            outside: None,
            taken_out: None,
            story: None,
            old_is_enough: false,
            sealed: None,
            guest,
            blocks,
            map: map.into_iter().map(word).collect(),
            alloc,
            dirty: DirtyPages::new(nr_pages).expect("memory"),
            tasks: Vec::new(),
            commit: None,
            settled: (0, Settled::default()),
            wants_commit: false,
            gate: false,
            is_frozen: false,
            making: [None, None],
            may_clean: true,
            op: None,
            late: Vec::new(),
            actor: 0,
            subject: 0,
            written: Vec::new(),
            requests_left: cfg.requests,
            ops_left: cfg.ops,
            ops_done: 0,
            next_stamp,
            next_id,
            is_poisoned: false,
        }
    }

    /// Adds to the story.
    pub(super) fn tell(&mut self, what: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(what());
        }
    }

    /// Nothing new begins from here on.
    pub(super) fn take_no_more(&mut self) {
        self.requests_left = 0;
        self.ops_left = 0;
    }

    /// Makes one step of something chosen at random, or of `actor`. False when there is nothing left
    /// to do, or that one cannot do anything.
    pub fn step(&mut self, rng: &mut Rng, actor: Option<u64>) -> Result<bool, String> {
        let luck = rng.bits();
        let mut choices = self.choices(luck, actor.is_some());
        if let Some(actor) = actor {
            choices.retain(|c| self.id(*c) == actor);
            if choices.is_empty() {
                return Ok(false);
            }
        }
        let Some(choice) = choices.into_iter().max_by_key(|c| self.mixed(luck, *c)) else {
            return match (self.tasks.first(), &self.op) {
                (None, None) => Ok(false),
                (task, op) => Err(format!("everybody waits: {task:?} {op:?}")),
            };
        };
        self.actor = self.id(choice);
        self.subject = self.actor;
        match choice {
            Choice::NewRequest => self.new_request(rng),
            Choice::Task(i) => self.task(i, rng)?,
            Choice::Commit => self.commit(rng)?,
            Choice::Space(maker) => self.space(maker, rng),
            Choice::LateCopy => {
                let op = self.late.swap_remove(rng.pick(self.late.len()));
                self.disk().complete(op);
            }
            Choice::NewOp => self.new_op(rng),
            Choice::Op => self.step_op(rng)?,
        }
        Ok(true)
    }

    /// The number of a request, or one of a kind.
    fn id(&self, choice: Choice) -> u64 {
        match choice {
            Choice::Task(i) => self.tasks[i].id,
            Choice::NewRequest => 1,
            Choice::Commit => 2,
            Choice::Space(Maker::Requests) => 3,
            Choice::Space(Maker::Op) => 7,
            Choice::LateCopy => 4,
            Choice::NewOp => 5,
            Choice::Op => 6,
        }
    }

    /// What `luck` means for a choice.
    fn mixed(&self, luck: u64, choice: Choice) -> u64 {
        Rng::new(luck ^ Rng::new(self.id(choice)).bits()).bits()
    }

    /// Who may make the next step; `all`, or only those who do so at once.
    fn choices(&self, luck: u64, all: bool) -> Vec<Choice> {
        let mut rng = Rng::new(luck);
        let mut chance = |percent| all || rng.chance(percent);
        let mut choices = Vec::new();
        let may_start = self.requests_left > 0 && self.tasks.len() < self.cfg.in_flight;
        if may_start && !self.is_frozen {
            choices.push(Choice::NewRequest);
        }
        let mut slow = Vec::new();
        for (i, task) in self.tasks.iter().enumerate() {
            match task.wait {
                Wait::Reading | Wait::Io { .. }
                    if task.slow && !all && self.mixed(luck, Choice::Task(i)) % 100 >= 3 =>
                {
                    slow.push(Choice::Task(i));
                }
                Wait::Ready(_)
                | Wait::Reading
                | Wait::Io { .. }
                | Wait::Zeroing { .. }
                | Wait::Device(_) => choices.push(Choice::Task(i)),
                Wait::Epoch if self.may_leave_epoch(i) => choices.push(Choice::Task(i)),
                Wait::Lock
                | Wait::Closed
                | Wait::Epoch
                | Wait::Space
                | Wait::Gate
                | Wait::NextCommit
                | Wait::ThisCommit => {}
            }
        }
        let may_clean = self.may_clean && (self.op_wants_clean() || chance(20));
        if may_clean || self.may_make_space(Maker::Requests) {
            choices.push(Choice::Space(Maker::Requests));
        }
        if self.may_make_space(Maker::Op) {
            choices.push(Choice::Space(Maker::Op));
        }
        let waits = |t: &Task| matches!(t.wait, Wait::NextCommit);
        let wanted = self.wants_commit || self.op_wants_commit() || self.tasks.iter().any(waits);
        let is_open = !self.gate || self.cfg.fault == Fault::GateIgnored;
        let is_late = !self.dirty.is_clean() && !self.is_frozen && chance(5);
        if self.commit.is_some() || (is_open && (wanted || is_late)) {
            choices.push(Choice::Commit);
        }
        if !self.late.is_empty() {
            choices.push(Choice::LateCopy);
        }
        if self.op_may_step() {
            choices.push(Choice::Op);
        } else if self.op.is_none() && self.ops_left > 0 && chance(10) {
            choices.push(Choice::NewOp);
        }
        if choices.is_empty() {
            return slow;
        }
        choices
    }

    /// Whether nobody is at work: no request, and nothing on the engine's own account.
    fn is_quiet(&self) -> bool {
        self.tasks.is_empty()
            && self.commit.is_none()
            && self.is_no_space_made()
            && self.late.is_empty()
    }

    /// The disk of the top.
    fn disk(&mut self) -> &mut Disk {
        &mut self.files[self.top].disk
    }

    fn top_level(&self) -> Level {
        level_of(self.top)
    }

    fn is_merging(&self) -> bool {
        self.top + 1 < self.files.len()
    }

    /// The slot of the destination that the source of a merge hides.
    fn hidden(&self, cluster: usize) -> Option<ImageCluster> {
        match self.is_merging() {
            true => self.files[self.top].places[cluster],
            false => None,
        }
    }

    /// The slot that the index of a file has to name.
    fn slot_in(&self, file: usize, cluster: usize) -> Option<ImageCluster> {
        if file < self.top {
            return self.files[file].places[cluster];
        }
        match self.map[cluster].place() {
            Place::Slot { level, at } if level == level_of(file) => Some(at),
            Place::Slot { .. } | Place::Hole if file == self.top => self.hidden(cluster),
            Place::Slot { .. } | Place::Hole => None,
        }
    }

    fn slots_in(&self, file: usize) -> Places {
        let clusters = 0..self.map.len();
        clusters
            .map(|cluster| self.slot_in(file, cluster))
            .collect()
    }

    /// The name of a place, for the guest.
    fn slot(&self, place: Place) -> Option<Slot> {
        match place {
            Place::Slot { level, at } if level > BELOW => {
                let file = usize::from(level.0 - BELOW.0 - 1);
                Some((self.files[file].id, at.0))
            }
            Place::Slot { .. } | Place::Hole => None,
        }
    }

    /// What a reader finds in a sector of a place.
    fn read(&self, place: Place, s: usize) -> Stamp {
        match place {
            Place::Hole => 0,
            Place::Slot { level, at } if level == BELOW => self.cfg.stamp_below(at, s),
            Place::Slot { level, at } => {
                let file = &self.files[usize::from(level.0 - BELOW.0 - 1)];
                let first = at.0 as usize * self.cfg.cluster_sectors();
                file.disk.live().get(first + s)
            }
        }
    }

    /// What all sectors read as now.
    fn read_all(&self) -> Vec<Stamp> {
        let sectors = 0..self.cfg.cluster_sectors();
        let cluster = |w: &Word| {
            let place = w.place();
            sectors.clone().map(move |s| self.read(place, s))
        };
        self.map.iter().flat_map(cluster).collect()
    }

    /// Unlocks a cluster, which has another place of the top now if `place` says so. What it had
    /// there is released.
    fn unlock(&mut self, cluster: usize, place: Option<Place>) {
        let word = self.map[cluster].unlocked();
        self.map[cluster] = word;
        if let Some(place) = place {
            match word.place() {
                Place::Slot { level, at } if level == self.top_level() => self.alloc.release(at),
                Place::Slot { .. } | Place::Hole => {}
            }
            self.map[cluster] = word.with_place(place);
            self.dirty.mark(locate(self.cfg.cluster(cluster)).0);
        }
        for i in 0..self.tasks.len() {
            let t = &mut self.tasks[i];
            if t.job.range().is_none_or(|r| r.cluster != cluster) {
                continue;
            }
            match t.wait {
                Wait::Lock => t.wait = Wait::Ready(flow::Action::Lock),
                Wait::Closed => self.start(i),
                _ => {}
            }
        }
    }

    /// Locks and closes a cluster if it is in the top: its slot there.
    fn close(&mut self, cluster: usize) -> Option<ImageCluster> {
        let word = self.map[cluster];
        match word.place() {
            Place::Slot { level, at } if level == self.top_level() && !word.is_locked() => {
                self.map[cluster] = word.closed();
                Some(at)
            }
            Place::Slot { .. } | Place::Hole => None,
        }
    }

    /// Whether nobody uses the place of a cluster without its lock any more.
    fn is_left(&self, cluster: usize) -> bool {
        let uses = |t: &Task| t.inside && t.job.range().is_some_and(|r| r.cluster == cluster);
        self.cfg.fault == Fault::EpochNotWaited || !self.tasks.iter().any(uses)
    }

    /// A copy of an index page of a file as it is in memory.
    pub fn page(&mut self, file: usize, page: u32) -> [Stamp; PAGE_SECTORS] {
        let (header, places) = (self.files[file].header, self.slots_in(file));
        self.compose(header, &places, page)
    }

    /// An index page.
    fn compose(&mut self, header: Header, places: &Places, page: u32) -> [Stamp; PAGE_SECTORS] {
        let mut words = [0; PAGE_SLOTS as usize];
        if page == 0 {
            words[..HEADER_SLOTS as usize].copy_from_slice(&header_words(&header));
        }
        let (first, end) = page_range(page);
        for (i, at) in places.iter().enumerate() {
            let cluster = self.cfg.cluster(i);
            let is_here = (first..end).contains(&u64::from(cluster.0));
            if let (true, Some(at)) = (is_here, *at) {
                words[locate(cluster).1] = header.encode_entry(at);
            }
        }
        let mut stamps = [0; PAGE_SECTORS];
        for (stamp, block) in stamps.iter_mut().zip(words.chunks_exact(WORDS)) {
            let mut copy = [0; WORDS];
            copy.copy_from_slice(block);
            *stamp = self.blocks.stamp(copy);
        }
        stamps
    }

    /// Whether the index on disk is the one in memory.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_clean() && self.commit.is_none()
    }
}

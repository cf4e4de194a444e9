// SPDX-License-Identifier: GPL-2.0
//! The executor: does what the machines of `ploop_pure` say, on the model disk, one action at a
//! time. It decides nothing that they decide; what it adds (who waits for what, how the file
//! grows, when a returned slot is clean) is written as `docs/architecture.md` has it.

mod commits;

use super::blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use super::disk::{Covered, Disk, OpId, Stamp};
use super::guest::{Guest, Promise, Range};
use super::{Config, Fault, Found, TOP};
use crate::rng::Rng;
use ploop_pure::alloc::{Alloc, Room, Take};
use ploop_pure::commit::{self, Commit};
use ploop_pure::flow::{self, Coverage, Durability, Write};
use ploop_pure::index::DirtyPages;
use ploop_pure::layout::ploop1::{locate, page_range, Header, HEADER_SLOTS, PAGE_SLOTS};
use ploop_pure::map::{Place, Word};
use ploop_pure::units::ImageCluster;

#[derive(Debug)]
enum Job {
    Write {
        machine: Box<Write>,
        range: Range,
        stamp: Stamp,
        fua: bool,
        /// This write put its cluster into the map.
        allocates: bool,
    },
    Flush {
        promise: Promise,
    },
}

#[derive(Debug, Clone, Copy)]
enum Wait {
    /// For nothing: the action is next.
    Ready(flow::Action),
    /// For the disk.
    Io { op: OpId, durable: bool },
    /// For the cluster's lock.
    Lock,
    /// For space in the file.
    Space,
    /// For a commit that starts after it began to wait.
    NextCommit,
    /// For the commit that is running.
    ThisCommit,
}

#[derive(Debug)]
struct Task {
    job: Job,
    wait: Wait,
}

/// What the committer is doing.
#[derive(Debug)]
enum Committing {
    Ready(commit::Action),
    Syncing(Covered, bool),
    Writing(OpId),
}

/// How the file gets more space.
#[derive(Debug, Clone, Copy)]
enum Making {
    Longer { op: OpId, to: u32 },
    Zeroing { op: OpId, at: ImageCluster },
    SyncingZeros { covered: Covered, at: ImageCluster },
}

/// Who makes the next step.
#[derive(Debug, Clone, Copy)]
enum Choice {
    NewRequest,
    Task(usize),
    Commit,
    WriteBack,
    Space,
    LateCopy,
}

/// One attached image.
pub struct Engine<'a> {
    cfg: &'a Config,
    pub(super) header: Header,
    pub(super) disk: Disk,
    pub(super) guest: Guest,
    pub(super) blocks: Blocks,
    /// One word for each cluster of the workload.
    map: Vec<Word>,
    pub(super) alloc: Alloc,
    dirty: DirtyPages,
    tasks: Vec<Task>,
    commit: Option<(Commit, Committing)>,
    /// Copies of the pages in flight.
    copies: Vec<(u32, [Stamp; PAGE_SECTORS])>,
    making: Option<Making>,
    /// Copies from the lower delta that nobody waits for: a fault.
    late: Vec<OpId>,
    pub(super) requests_left: u32,
    /// The first stamp not used.
    pub(super) next_stamp: Stamp,
    /// A metadata write or sync has failed.
    pub(super) is_poisoned: bool,
}

impl<'a> Engine<'a> {
    /// The image on `disk` as it was found at attach.
    pub fn new(
        cfg: &'a Config,
        found: &Found,
        disk: Disk,
        guest: Guest,
        blocks: Blocks,
        next_stamp: Stamp,
    ) -> Self {
        let (header, end) = (found.header, found.end);
        let word = |(i, at): (usize, &Option<ImageCluster>)| {
            let place = match at {
                Some(at) => Place::Slot {
                    level: TOP,
                    at: *at,
                },
                None => cfg.place_below(i),
            };
            Word::default().with_place(place)
        };
        let len = disk.live().len / cfg.cluster_sectors();
        let max = header.slots_max().min(end.max(cfg.slots_max));
        Self {
            cfg,
            header,
            disk,
            guest,
            blocks,
            map: found.places.iter().enumerate().map(word).collect(),
            alloc: Alloc::new(header.cluster, end, len as u32, max).expect("memory"),
            dirty: DirtyPages::new(header.nr_pages()).expect("memory"),
            tasks: Vec::new(),
            commit: None,
            copies: Vec::new(),
            making: None,
            late: Vec::new(),
            requests_left: cfg.requests,
            next_stamp,
            is_poisoned: false,
        }
    }

    /// Makes one step of something chosen at random. False when there is nothing left to do.
    pub fn step(&mut self, rng: &mut Rng) -> Result<bool, String> {
        let mut choices = Vec::new();
        let may_start = self.requests_left > 0 && self.tasks.len() < self.cfg.in_flight;
        if may_start {
            choices.push(Choice::NewRequest);
        }
        for (i, task) in self.tasks.iter().enumerate() {
            match task.wait {
                Wait::Ready(_) | Wait::Io { .. } => choices.push(Choice::Task(i)),
                Wait::Space if self.making.is_none() => choices.push(Choice::Space),
                Wait::Lock | Wait::Space | Wait::NextCommit | Wait::ThisCommit => {}
            }
        }
        if self.making.is_some() {
            choices.push(Choice::Space);
        }
        let wanted = self
            .tasks
            .iter()
            .any(|t| matches!(t.wait, Wait::NextCommit));
        if self.commit.is_some() || wanted {
            choices.push(Choice::Commit);
        } else if !self.dirty.is_clean() && rng.chance(5) {
            choices.push(Choice::WriteBack);
        }
        if !self.late.is_empty() {
            choices.push(Choice::LateCopy);
        }
        if choices.is_empty() {
            return match self.tasks.first() {
                None => Ok(false),
                Some(task) => Err(format!("everybody waits: {task:?}")),
            };
        }
        match choices[rng.pick(choices.len())] {
            Choice::NewRequest => self.new_request(rng),
            Choice::Task(i) => self.task(i, rng)?,
            Choice::Commit | Choice::WriteBack => {
                self.commit(rng)?;
            }
            Choice::Space => self.space(),
            Choice::LateCopy => {
                let op = self.late.swap_remove(rng.pick(self.late.len()));
                self.disk.complete(op);
            }
        }
        Ok(true)
    }

    fn new_request(&mut self, rng: &mut Rng) {
        self.requests_left -= 1;
        if rng.chance(self.cfg.flush_percent) {
            let promise = self.guest.flush_begins();
            if self.cfg.fault == Fault::FlushIgnored || flow::flush() == flow::Action::Done {
                self.guest.flush_done(&promise);
                return;
            }
            let wait = Wait::NextCommit;
            let job = Job::Flush { promise };
            self.tasks.push(Task { job, wait });
            return;
        }
        let range = self.some_range(rng);
        let busy = |t: &Task| matches!(&t.job, Job::Write { range: r, .. } if r.overlaps(&range));
        if self.tasks.iter().any(busy) {
            return;
        }
        let fua = rng.chance(self.cfg.fua_percent);
        let durability = if fua {
            Durability::Fua
        } else {
            Durability::Volatile
        };
        let coverage = if range.nr == self.cfg.cluster_sectors() {
            Coverage::Whole
        } else {
            Coverage::Part
        };
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.guest.issue(range, stamp);
        let mut machine = Box::new(Write::new(durability, coverage, TOP));
        let action = machine.next(self.found(range.cluster));
        let job = Job::Write {
            machine,
            range,
            stamp,
            fua,
            allocates: false,
        };
        let wait = Wait::Ready(action);
        self.tasks.push(Task { job, wait });
    }

    /// A range to write: some of the first sectors of a cluster, or all of it.
    fn some_range(&self, rng: &mut Rng) -> Range {
        let cluster = rng.pick(self.map.len());
        let unit = self.cfg.piece_sectors;
        let units = self.cfg.cluster_sectors() / unit;
        let (first, nr) = if rng.chance(self.cfg.whole_percent) {
            (0, units)
        } else {
            let first = rng.pick(units.min(6));
            (first, 1 + rng.pick(3.min(units - first)))
        };
        Range {
            cluster,
            first: first * unit,
            nr: nr * unit,
        }
    }

    fn found(&self, cluster: usize) -> flow::Event {
        let (page, _) = locate(self.cfg.cluster(cluster));
        flow::Event::Found {
            place: self.map[cluster].place(),
            entry_durable: self.dirty.is_durable(page),
        }
    }

    fn task(&mut self, i: usize, rng: &mut Rng) -> Result<(), String> {
        match self.tasks[i].wait {
            Wait::Ready(action) => self.act(i, action),
            Wait::Io { op, durable } => {
                let event = if rng.chance(self.cfg.fail_percent) {
                    self.disk.fail(op, rng);
                    flow::Event::Failed
                } else if durable {
                    self.disk.complete_durably(op);
                    flow::Event::Ok
                } else {
                    self.disk.complete(op);
                    flow::Event::Ok
                };
                self.event(i, event);
                Ok(())
            }
            Wait::Lock | Wait::Space | Wait::NextCommit | Wait::ThisCommit => Ok(()),
        }
    }

    fn event(&mut self, i: usize, event: flow::Event) {
        let task = &mut self.tasks[i];
        if let Job::Write { machine, .. } = &mut task.job {
            task.wait = Wait::Ready(machine.next(event));
        }
    }

    fn act(&mut self, i: usize, action: flow::Action) -> Result<(), String> {
        let Job::Write {
            range,
            stamp,
            fua,
            allocates,
            ..
        } = &mut self.tasks[i].job
        else {
            return Err("a flush has no actions".into());
        };
        let (range, stamp, fua) = (*range, *stamp, *fua);
        match action {
            flow::Action::Lock => {
                if self.map[range.cluster].is_locked() {
                    self.tasks[i].wait = Wait::Lock;
                } else {
                    self.map[range.cluster] = self.map[range.cluster].locked();
                    let event = self.found(range.cluster);
                    self.event(i, event);
                }
            }
            flow::Action::TakeSlot => match self.alloc.take() {
                Take::Slot(at) => self.event(i, flow::Event::Slot(at)),
                Take::NeedSpace => self.tasks[i].wait = Wait::Space,
                Take::Full => self.event(i, flow::Event::Failed),
            },
            flow::Action::CopyBelow { from, to, .. } => self.copy_below(i, range, from, to),
            flow::Action::WriteData { at, durable } => {
                self.write_data(i, range, stamp, at, durable)
            }
            flow::Action::UnlockAndWrite { at, durable } => {
                self.unlock(range.cluster);
                self.write_data(i, range, stamp, at, durable);
            }
            flow::Action::Publish { at } => {
                *allocates = true;
                self.guest.allocated(range, stamp);
                let place = Place::Slot { level: TOP, at };
                self.map[range.cluster] = self.map[range.cluster].with_place(place);
                self.dirty.mark(locate(self.cfg.cluster(range.cluster)).0);
                self.unlock(range.cluster);
                self.event(i, flow::Event::Ok);
            }
            flow::Action::Abandon { at } => {
                self.alloc.give_back(at);
                self.unlock(range.cluster);
                self.tasks.remove(i);
            }
            flow::Action::Unlock => {
                self.unlock(range.cluster);
                self.tasks.remove(i);
            }
            flow::Action::Commit => self.tasks[i].wait = Wait::NextCommit,
            flow::Action::Done => {
                self.guest.complete(range, stamp, fua);
                self.tasks.remove(i);
                self.read_back(range, stamp)?;
            }
            flow::Action::Fail => {
                self.tasks.remove(i);
            }
        }
        Ok(())
    }

    /// Writes to the slot `to` what a slot of the lower delta holds around `range`.
    fn copy_below(&mut self, i: usize, range: Range, from: ImageCluster, to: ImageCluster) {
        let nr = self.cfg.cluster_sectors();
        let rest = |sectors: std::ops::Range<usize>| -> Vec<Stamp> {
            sectors.map(|s| self.cfg.stamp_below(from, s)).collect()
        };
        let (before, after) = (rest(0..range.first), rest(range.sectors().end..nr));
        let first = to.0 as usize * nr;
        let op = self.disk.write(first, &before);
        let op = self
            .disk
            .write_more(op, first + range.sectors().end, &after);
        if self.cfg.fault == Fault::PublishBeforeCopy {
            self.late.push(op);
            return self.event(i, flow::Event::Ok);
        }
        let durable = false;
        self.tasks[i].wait = Wait::Io { op, durable };
    }

    fn write_data(
        &mut self,
        i: usize,
        range: Range,
        stamp: Stamp,
        at: ImageCluster,
        durable: bool,
    ) {
        let first = at.0 as usize * self.cfg.cluster_sectors() + range.first;
        let op = self.disk.write(first, &vec![stamp; range.nr]);
        self.tasks[i].wait = Wait::Io { op, durable };
    }

    /// A reader after the completion of a write sees its data, and around it what was there.
    fn read_back(&self, range: Range, stamp: Stamp) -> Result<(), String> {
        let Place::Slot { at, level: TOP } = self.map[range.cluster].place() else {
            return Err(format!("{range:?} was written but is not mapped"));
        };
        let first = at.0 as usize * self.cfg.cluster_sectors();
        let read = |s| self.disk.live().get(first + s);
        for s in range.sectors() {
            let have = read(s);
            if have != stamp {
                return Err(format!("{range:?} reads {have} after a write of {stamp}"));
            }
        }
        self.guest.judge(range.cluster, true, read)
    }

    fn unlock(&mut self, cluster: usize) {
        self.map[cluster] = self.map[cluster].unlocked();
        for t in &mut self.tasks {
            let waits = matches!(&t.job, Job::Write { range, .. } if range.cluster == cluster);
            if waits && matches!(t.wait, Wait::Lock) {
                t.wait = Wait::Ready(flow::Action::Lock);
            }
        }
    }

    /// One step towards more space for those who wait for it.
    fn space(&mut self) {
        self.making = match self.making {
            None => self.make_space(),
            Some(Making::Longer { op, to }) => {
                self.disk.complete(op);
                self.alloc.expand(&mut Room::new(to).expect("memory"));
                self.alloc.grown(to);
                None
            }
            Some(Making::Zeroing { op, at }) => {
                self.disk.complete(op);
                let covered = self.disk.sync_start();
                Some(Making::SyncingZeros { covered, at })
            }
            Some(Making::SyncingZeros { covered, at }) => {
                self.disk.sync_end(covered);
                self.alloc.cleaned(at.0..at.0 + 1);
                None
            }
        };
        if self.making.is_none() {
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::Space) {
                    t.wait = Wait::Ready(flow::Action::TakeSlot);
                }
            }
        }
    }

    fn make_space(&mut self) -> Option<Making> {
        if let Some(run) = self.alloc.next_freed(1) {
            let at = ImageCluster(run.start);
            if self.cfg.fault == Fault::ReuseUnclean {
                self.alloc.cleaned(run);
                return None;
            }
            let nr = self.cfg.cluster_sectors();
            let op = self.disk.write(at.0 as usize * nr, &vec![0; nr]);
            return Some(Making::Zeroing { op, at });
        }
        let to = self.alloc.target()?;
        let op = self.disk.set_len(to as usize * self.cfg.cluster_sectors());
        Some(Making::Longer { op, to })
    }

    /// A copy of an index page as it is in memory.
    pub fn page(&mut self, page: u32) -> [Stamp; PAGE_SECTORS] {
        let mut words = [0; PAGE_SLOTS as usize];
        if page == 0 {
            words[..HEADER_SLOTS as usize].copy_from_slice(&header_words(&self.header));
        }
        let (first, end) = page_range(page);
        for (i, word) in self.map.iter().enumerate() {
            let cluster = self.cfg.cluster(i);
            if let (true, Place::Slot { at, level: TOP }) =
                ((first..end).contains(&u64::from(cluster.0)), word.place())
            {
                words[locate(cluster).1] = self.header.encode_entry(at);
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

    /// Whether the image holds no cluster.
    pub fn is_empty(&self) -> bool {
        let in_top = |w: &Word| matches!(w.place(), Place::Slot { level: TOP, .. });
        !self.map.iter().any(in_top)
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The executor: does what the machines of `ploop_pure` say, on the model disk, one action at a
//! time. It decides nothing that they decide; what it adds (who waits for what, how the file
//! grows, when a returned slot is clean) is written as `docs/architecture.md` has it.

use super::blocks::{header_words, Blocks, PAGE_SECTORS, WORDS};
use super::disk::{Covered, Disk, OpId, Stamp};
use super::guest::{Guest, Promise, Range};
use super::{Config, Fault, Found};
use crate::rng::Rng;
use ploop_pure::alloc::{Alloc, Take};
use ploop_pure::commit::{self, Commit};
use ploop_pure::flow::{self, Durability, Write};
use ploop_pure::index::DirtyPages;
use ploop_pure::layout::ploop1::{locate, page_range, Header, HEADER_SLOTS, PAGE_SLOTS};
use ploop_pure::map::{Place, Word};
use ploop_pure::units::{ImageCluster, Level};

const TOP: Level = Level(0);

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
        let word = |at: &Option<ImageCluster>| match at {
            Some(at) => Word::default().with_place(Place::Slot {
                level: TOP,
                at: *at,
            }),
            None => Word::default(),
        };
        let len = disk.live().len / cfg.cluster_sectors();
        let max = header.slots_max().min(end.max(cfg.slots_max));
        Self {
            cfg,
            header,
            disk,
            guest,
            blocks,
            map: found.places.iter().map(word).collect(),
            alloc: Alloc::new(header.cluster, end, len as u32, max).expect("memory"),
            dirty: DirtyPages::new(header.nr_pages()).expect("memory"),
            tasks: Vec::new(),
            commit: None,
            copies: Vec::new(),
            making: None,
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
        let unit = self.cfg.piece_sectors;
        let units = self.cfg.cluster_sectors() / unit;
        let first = rng.pick(units.min(6));
        let range = Range {
            cluster: rng.pick(self.map.len()),
            first: first * unit,
            nr: (1 + rng.pick(3.min(units - first))) * unit,
        };
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
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.guest.issue(range, stamp);
        let mut machine = Box::new(Write::new(durability, TOP));
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

    /// A reader after the completion of a write sees its data.
    fn read_back(&self, range: Range, stamp: Stamp) -> Result<(), String> {
        let Place::Slot { at, .. } = self.map[range.cluster].place() else {
            return Err(format!("{range:?} was written but is not mapped"));
        };
        for s in range.sectors() {
            let have = self
                .disk
                .live()
                .get(at.0 as usize * self.cfg.cluster_sectors() + s);
            if have != stamp {
                return Err(format!("{range:?} reads {have} after a write of {stamp}"));
            }
        }
        Ok(())
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
                self.alloc.cleaned(at);
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
        if let Some(at) = self.alloc.next_returned() {
            if self.cfg.fault == Fault::ReuseUnclean {
                self.alloc.cleaned(at);
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

    /// One step of the commit; starts one if none runs. True when it has ended.
    pub fn commit(&mut self, rng: &mut Rng) -> Result<bool, String> {
        let Some((mut machine, doing)) = self.commit.take() else {
            let (machine, action) = Commit::start();
            for t in &mut self.tasks {
                if matches!(t.wait, Wait::NextCommit) {
                    t.wait = Wait::ThisCommit;
                }
            }
            self.commit = Some((machine, Committing::Ready(action)));
            return Ok(false);
        };
        let doing = match doing {
            Committing::Ready(commit::Action::Copy { cursor }) => {
                let next = self.dirty.take_batch(cursor);
                self.copies.clear();
                let pages = Vec::from(self.dirty.batch());
                for page in pages {
                    let copy = self.page(page);
                    self.copies.push((page, copy));
                }
                let nr = self.copies.len();
                Committing::Ready(machine.next(commit::Event::Copied { nr, next }))
            }
            Committing::Ready(commit::Action::SyncData) => {
                Committing::Syncing(self.disk.sync_start(), false)
            }
            Committing::Ready(commit::Action::SyncIndex) => {
                Committing::Syncing(self.disk.sync_start(), true)
            }
            Committing::Syncing(covered, is_index) => {
                let event = if rng.chance(self.cfg.sync_fail_percent) {
                    self.disk.sync_fail(covered, rng);
                    commit::Event::Failed
                } else {
                    self.disk.sync_end(covered);
                    commit::Event::Ok
                };
                if is_index && event == commit::Event::Ok {
                    self.dirty.settle(true);
                }
                Committing::Ready(machine.next(event))
            }
            Committing::Ready(commit::Action::WriteIndex) => {
                Committing::Writing(self.write_index())
            }
            Committing::Writing(op) => {
                self.disk.complete(op);
                Committing::Ready(machine.next(commit::Event::Ok))
            }
            Committing::Ready(commit::Action::Done) => {
                self.commit_ended(true);
                return Ok(true);
            }
            Committing::Ready(commit::Action::Fail) => {
                self.dirty.settle(false);
                self.is_poisoned = true;
                self.commit_ended(false);
                return Ok(true);
            }
        };
        self.commit = Some((machine, doing));
        Ok(false)
    }

    fn commit_ended(&mut self, ok: bool) {
        let mut i = 0;
        while i < self.tasks.len() {
            if !matches!(self.tasks[i].wait, Wait::ThisCommit) {
                i += 1;
                continue;
            }
            match &self.tasks[i].job {
                Job::Flush { promise } => {
                    if ok {
                        self.guest.flush_done(promise);
                    }
                    self.tasks.remove(i);
                }
                Job::Write { .. } => {
                    let event = if ok {
                        flow::Event::Ok
                    } else {
                        flow::Event::Failed
                    };
                    self.event(i, event);
                    i += 1;
                }
            }
        }
    }

    /// Writes the copies. All pages of a batch are one operation, torn anywhere.
    fn write_index(&mut self) -> OpId {
        if self.cfg.fault == Fault::CopyLate {
            for (page, _) in std::mem::take(&mut self.copies) {
                let copy = self.page(page);
                self.copies.push((page, copy));
            }
        }
        let mut op = None;
        for (page, copy) in &self.copies {
            let first = *page as usize * PAGE_SECTORS;
            op = Some(match op {
                None => self.disk.write(first, copy),
                Some(op) => self.disk.write_more(op, first, copy),
            });
        }
        op.unwrap_or_else(|| self.disk.write(0, &[]))
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
            if let (true, Place::Slot { at, .. }) =
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

    /// Whether no cluster is mapped.
    pub fn is_empty(&self) -> bool {
        self.map.iter().all(|w| w.place() == Place::Hole)
    }
}

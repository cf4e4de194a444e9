// SPDX-License-Identifier: GPL-2.0
//! Requests: which come, and what the machines of writes, discards and reads make of them.

use super::ops::copy_to;
use super::{Engine, Job, Task, Wait};
use crate::rng::Rng;
use crate::sim::disk::Stamp;
use crate::sim::guest::Range;
use crate::sim::Fault;
use ploop_pure::alloc::Take;
use ploop_pure::discard::{decide, Action, Wish};
use ploop_pure::flow::{self, Coverage, Durability, Settled, Write};
use ploop_pure::layout::ploop1::locate;
use ploop_pure::map::Place;
use ploop_pure::units::ImageCluster;

impl Engine<'_> {
    pub(super) fn new_request(&mut self, rng: &mut Rng) {
        self.requests_left -= 1;
        let id = rng.bits();
        if rng.chance(self.cfg.flush_percent) {
            let promise = self.guest.flush_begins();
            if self.cfg.fault == Fault::FlushIgnored || flow::flush() == flow::Action::Done {
                self.guest.flush_done(&promise);
                return;
            }
            let wait = match self.is_flush_enough() {
                true => Wait::Device(self.disk().sync_start()),
                false => Wait::NextCommit,
            };
            self.tell(|| format!("new: flush: {wait:?}"));
            return self.push(Job::Flush { promise }, wait, id);
        }
        let is_zeroes = rng.chance(self.cfg.zero_percent);
        let whole = match is_zeroes {
            true => 50,
            false => self.cfg.whole_percent,
        };
        let range = self.some_range(rng, whole);
        let is_read = rng.chance(self.cfg.read_percent);
        // What zeroes race with may win or lose; two writes in a race show nothing more.
        let races_badly = |t: &Task| match &t.job {
            Job::Write {
                range: r, stamp, ..
            } => r.overlaps(&range) && !is_read && is_zeroes == (*stamp == 0),
            Job::Read { .. } | Job::Flush { .. } => false,
        };
        if self.tasks.iter().any(races_badly) {
            return;
        }
        let job = if is_read {
            let (oldest, place) = (self.guest.read_begins(range), Place::Hole);
            Job::Read {
                range,
                oldest,
                place,
            }
        } else {
            let stamp = if is_zeroes { 0 } else { self.next_stamp };
            self.next_stamp += 1;
            self.guest.issue(range, stamp);
            Job::Write {
                machine: None,
                range,
                stamp,
                fua: rng.chance(self.cfg.fua_percent),
                keeps_space: rng.chance(25),
            }
        };
        self.tell(|| format!("new: {job:?}"));
        self.push(job, Wait::Closed, id);
        self.start(self.tasks.len() - 1);
    }

    fn push(&mut self, job: Job, wait: Wait, id: u64) {
        self.subject = id;
        self.tasks.push(Task {
            id,
            job,
            wait,
            inside: false,
            slow: id % 100 < self.cfg.slow_percent,
        });
    }

    /// Whether a flush of the device is one of the disk, as `rust/engine/inline.rs` has it.
    fn is_flush_enough(&mut self) -> bool {
        if self.gate || self.is_poisoned || self.is_merging() {
            return false;
        }
        let (id, changes) = (self.files[self.top].id, self.disk().changes);
        if self.settled.0 != id {
            self.settled = (id, Settled::default());
        }
        self.settled.1.is_flush_enough(changes, &self.dirty, 0)
    }

    /// A range: most often some of the first sectors of a cluster, so that they meet; or all of it.
    fn some_range(&self, rng: &mut Rng, whole_percent: u64) -> Range {
        let cluster = rng.pick(self.map.len());
        let unit = self.cfg.piece_sectors;
        let units = self.cfg.cluster_sectors() / unit;
        let (first, nr) = if rng.chance(whole_percent) {
            (0, units)
        } else if rng.chance(15) {
            // Of any size, anywhere.
            let first = rng.pick(units);
            (first, 1 + rng.pick(units - first))
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

    /// Starts a request, or starts it again after somebody else had its cluster closed.
    pub(super) fn start(&mut self, i: usize) {
        let Some(range) = self.tasks[i].job.range() else {
            return;
        };
        let word = self.map[range.cluster];
        let coverage = if range.nr == self.cfg.cluster_sectors() {
            Coverage::Whole
        } else {
            Coverage::Part
        };
        let (top, found) = (self.top_level(), self.found(range.cluster));
        let is_base = self.files.len() == 1 && !self.cfg.below && !self.files[0].is_raw;
        let task = &mut self.tasks[i];
        task.wait = Wait::Closed;
        match &mut task.job {
            Job::Flush { .. } => {}
            Job::Read { place, .. } if !word.is_closed() => {
                *place = word.place();
                task.inside = true;
                task.wait = Wait::Reading;
            }
            Job::Read { .. } => {}
            Job::Write {
                machine,
                stamp,
                fua,
                keeps_space,
                ..
            } => {
                *machine = None;
                if *stamp == 0 {
                    let keeps_space = *keeps_space;
                    let wish = Wish {
                        coverage,
                        keeps_space,
                    };
                    match decide(word.place(), wish, top, is_base) {
                        // Nothing, once it is durable if that is asked for.
                        Action::Nothing => {
                            task.wait = match *fua {
                                true => Wait::NextCommit,
                                false => Wait::Ready(flow::Action::Done),
                            };
                            return;
                        }
                        Action::Unmap { .. } => {
                            if self.close(range.cluster).is_some() {
                                self.tasks[i].wait = Wait::Epoch;
                            }
                            return;
                        }
                        Action::Zero => {}
                    }
                }
                if word.is_closed() {
                    return;
                }
                let durability = match *fua {
                    true => Durability::Fua,
                    false => Durability::Volatile,
                };
                task.inside = true;
                let mut write = Box::new(Write::new(durability, coverage, top));
                task.wait = Wait::Ready(write.next(found));
                *machine = Some(write);
            }
        }
    }

    fn found(&self, cluster: usize) -> flow::Event {
        let (page, _) = locate(self.cfg.cluster(cluster));
        flow::Event::Found {
            place: self.map[cluster].place(),
            entry_durable: self.dirty.is_durable(page),
        }
    }

    /// Whether everybody has left the place that a request has closed.
    pub(super) fn may_leave_epoch(&self, i: usize) -> bool {
        self.tasks[i]
            .job
            .range()
            .is_some_and(|r| self.is_left(r.cluster))
    }

    pub(super) fn task(&mut self, i: usize, rng: &mut Rng) -> Result<(), String> {
        let t = &self.tasks[i];
        if let Some(story) = &mut self.story {
            story.push(format!("{:?}: {:?}", t.job, t.wait));
        }
        match self.tasks[i].wait {
            Wait::Ready(action) => self.act(i, action)?,
            Wait::Reading => {
                let Job::Read {
                    range,
                    oldest,
                    place,
                } = self.tasks.remove(i).job
                else {
                    return Err("only a read reads".into());
                };
                let read = |s| self.read(place, s);
                let read: Vec<_> = range.sectors().map(read).collect();
                self.guest.read_done(range, &oldest, &read)?;
            }
            Wait::Io { op, durable } => {
                let event = if rng.chance(self.cfg.fail_percent) {
                    self.disk().fail(op, rng);
                    flow::Event::Failed
                } else if durable && rng.chance(self.cfg.sync_fail_percent) {
                    self.disk().fail(op, rng);
                    self.poison();
                    flow::Event::Failed
                } else if durable {
                    self.disk().complete_durably(op);
                    flow::Event::Ok
                } else {
                    self.disk().complete(op);
                    flow::Event::Ok
                };
                self.tasks[i].inside = false;
                self.event(i, event);
            }
            Wait::Device(covered) => {
                let Job::Flush { promise } = self.tasks.remove(i).job else {
                    return Err("only a flush flushes the device".into());
                };
                if rng.chance(self.cfg.sync_fail_percent) {
                    self.disk().sync_fail(covered, rng);
                    self.poison();
                } else {
                    self.disk().flush_end(covered);
                    self.guest.flush_done(&promise);
                }
            }
            Wait::Zeroing { op, at } => {
                self.disk().complete(op);
                self.event(i, flow::Event::Slot(at));
            }
            Wait::Epoch => {
                let Job::Write { range, fua, .. } = self.tasks[i].job else {
                    return Err("only zeroes unmap".into());
                };
                self.unlock(range.cluster, Some(Place::Hole));
                self.tasks[i].wait = match fua {
                    true => Wait::NextCommit,
                    false => Wait::Ready(flow::Action::Done),
                };
            }
            Wait::Lock
            | Wait::Closed
            | Wait::Space
            | Wait::Gate
            | Wait::NextCommit
            | Wait::ThisCommit => {}
        }
        Ok(())
    }

    pub(super) fn event(&mut self, i: usize, event: flow::Event) {
        let task = &mut self.tasks[i];
        if let Job::Write {
            machine: Some(machine),
            ..
        } = &mut task.job
        {
            task.wait = Wait::Ready(machine.next(event));
        }
    }

    fn act(&mut self, i: usize, action: flow::Action) -> Result<(), String> {
        let Job::Write {
            range, stamp, fua, ..
        } = self.tasks[i].job
        else {
            return Err("only writes have actions".into());
        };
        match action {
            flow::Action::Lock => {
                self.tasks[i].inside = false;
                if self.map[range.cluster].is_locked() {
                    self.tasks[i].wait = Wait::Lock;
                } else {
                    self.map[range.cluster] = self.map[range.cluster].locked();
                    let event = self.found(range.cluster);
                    self.event(i, event);
                }
            }
            flow::Action::TakeSlot => self.take_slot(i, range),
            flow::Action::CopyBelow { level, from, to } => {
                self.copy_below(i, range, Place::Slot { level, at: from }, to);
            }
            flow::Action::WriteData { at, durable } => {
                self.write_data(i, range, stamp, at, durable)
            }
            flow::Action::UnlockAndWrite { at, durable } => {
                self.tasks[i].inside = true;
                self.unlock(range.cluster, None);
                self.write_data(i, range, stamp, at, durable);
            }
            flow::Action::Publish { at } => {
                let level = self.top_level();
                let place = Place::Slot { level, at };
                if let Some(slot) = self.slot(place) {
                    self.guest.mapped(range.cluster, slot, Some(range));
                }
                self.unlock(range.cluster, Some(place));
                self.event(i, flow::Event::Ok);
            }
            flow::Action::Abandon { at } => {
                if self.hidden(range.cluster) != Some(at) {
                    self.alloc.give_back(at);
                    self.may_clean = true;
                }
                self.unlock(range.cluster, None);
                self.failed(i, range, stamp);
            }
            flow::Action::Unlock => {
                self.unlock(range.cluster, None);
                self.failed(i, range, stamp);
            }
            flow::Action::Commit => self.tasks[i].wait = Wait::NextCommit,
            flow::Action::Done => {
                self.guest.complete(range, stamp, fua);
                self.tasks.remove(i);
                self.read_back(range)?;
            }
            flow::Action::Fail => self.failed(i, range, stamp),
        }
        Ok(())
    }

    fn failed(&mut self, i: usize, range: Range, stamp: Stamp) {
        self.guest.end(range, stamp);
        self.tasks.remove(i);
    }

    fn take_slot(&mut self, i: usize, range: Range) {
        if let Some(at) = self.hidden(range.cluster) {
            // Only a durable entry of the source hides it.
            if self.gate && self.cfg.fault != Fault::HiddenReusedEarly {
                self.tasks[i].wait = Wait::Gate;
                return;
            }
            if self.cfg.fault == Fault::HiddenUnclean {
                return self.event(i, flow::Event::Slot(at));
            }
            let op = self.zero_slot(at);
            self.tasks[i].wait = Wait::Zeroing { op, at };
            return;
        }
        match self.alloc.take() {
            Take::Slot(at) => self.event(i, flow::Event::Slot(at)),
            Take::NeedSpace => self.tasks[i].wait = Wait::Space,
            Take::Full => self.event(i, flow::Event::Failed),
        }
    }

    /// Those who wait for the gate go on.
    pub(super) fn open_gate(&mut self) {
        self.gate = false;
        for t in &mut self.tasks {
            if matches!(t.wait, Wait::Gate) {
                t.wait = Wait::Ready(flow::Action::TakeSlot);
            }
        }
    }

    /// Writes to the slot `to` what a lower delta holds around `range`.
    fn copy_below(&mut self, i: usize, range: Range, from: Place, to: ImageCluster) {
        let nr = self.cfg.cluster_sectors();
        let rest = |sectors: std::ops::Range<usize>| -> Vec<Stamp> {
            sectors.map(|s| self.read(from, s)).collect()
        };
        let (before, after) = (rest(0..range.first), rest(range.sectors().end..nr));
        // What the write covers is copied too, where one I/O is less than two.
        let middle = match self.tasks[i].id / 1000 % 2 {
            0 => rest(range.sectors()),
            _ => Vec::new(),
        };
        let first = to.0 as usize * nr;
        let op = self.disk().write(first, &[]);
        copy_to(self.disk(), op, first, &before);
        copy_to(self.disk(), op, first + range.first, &middle);
        copy_to(self.disk(), op, first + range.sectors().end, &after);
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
        // What is mapped may be written past the file system.
        let (id, stamps) = (self.tasks[i].id, vec![stamp; range.nr]);
        let op = match self.tasks[i].inside && !durable && stamp != 0 && id / 100 % 2 == 0 {
            true => self.disk().write_straight(first, &stamps),
            false => self.disk().write(first, &stamps),
        };
        self.tasks[i].wait = Wait::Io { op, durable };
    }

    /// Zeroes that needed no write are durable.
    pub(super) fn zeroed(&mut self, i: usize) {
        if let Job::Write {
            range, stamp, fua, ..
        } = self.tasks[i].job
        {
            self.guest.complete(range, stamp, fua);
        }
    }

    /// A reader after the completion of a write sees its data, and around it what was there.
    fn read_back(&mut self, range: Range) -> Result<(), String> {
        let place = self.map[range.cluster].place();
        let read: Vec<_> = range.sectors().map(|s| self.read(place, s)).collect();
        let oldest = self.guest.read_begins(range);
        self.guest.read_done(range, &oldest, &read)?;
        let read = |s| self.read(place, s);
        self.guest.judge(range.cluster, self.slot(place), read)
    }
}

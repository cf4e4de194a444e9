// SPDX-License-Identifier: GPL-2.0
//! SNAPSHOT: what [`ploop_pure::snapshot`] decides, done to a running device.

use super::{limits, Control, Device};
use crate::{
    chain::{
        delta::{Delta, OpenArgs},
        Used,
    },
    engine::{Closed, Engine, Parts, Unfinished},
    error::{refusal, Shown},
    io::Io,
    sys::{file::File, gen_disk::DiskRef, mq::noio, prelude::*},
};
use ploop_pure::{
    chain,
    lifecycle::{admit, Call},
    snapshot::{Action, Event, Snapshot},
};

/// What a snapshot has at hand.
struct Steps<'a> {
    disk: DiskRef<'a, Device>,
    delta: Arc<Delta>,
    /// Of it.
    used: Used,
    old: Arc<Engine<Device>>,
    new: Arc<Engine<Device>>,
}

impl Device {
    /// SNAPSHOT of a running device: the image of `file`, empty, becomes the top. With
    /// `freeze_fs`, the file systems on the disk are frozen around the switch. On failure
    /// the old top goes on, unless it could not be finished after the switch: then the image
    /// takes no more writes.
    pub(crate) fn snapshot(
        disk: DiskRef<'_, Self>,
        file: &File,
        args: OpenArgs,
        freeze_fs: bool,
    ) -> Result {
        let this = disk.driver();
        this.admit_file(disk, file)?;
        let io = Io::open(file, args.access, &this.errands)?;
        let mut control = this.control.lock();
        admit(control.state(), Call::Snapshot).map_err(refusal)?;
        let Some(old) = control.engine.clone() else {
            drop(control);
            return this.add_opened(io, args, None);
        };
        this.admit_change(&control)?;
        if freeze_fs && control.nr_thawing > 0 {
            return Err(EBUSY);
        }
        if old.is_poisoned() {
            return Err(EIO);
        }
        let delta = Arc::new(Delta::open(io, args, &this.images, this.index)?, GFP_KERNEL)?;
        let level = control.deltas.len();
        let used = Used::scan(&delta, this.index, |_, _| Ok(()))?;
        let below = old.chain.top().ok_or(ENOENT)?.member();
        let is_empty = delta.is_empty();
        chain::admit_snapshot(level, &below, &delta.member(), is_empty).map_err(|misfit| {
            pr_err!("ploop{}: image refused: {}\n", this.index, Shown(misfit));
            EINVAL
        })?;
        if !below.is_writable {
            return Err(EROFS);
        }
        let chain = old.chain.with_top(delta.clone(), this.index)?;
        // Its file is made ready when it is marked.
        let parts = Parts::of_used(&chain, &used, this.index)?;
        let shared = old.shared().clone();
        let new = Engine::new(this.index, chain, parts, this.workers.clone(), shared)?;
        this.admit_limits(&old, &new)?;
        // All that can fail for want of memory is had before the switch.
        control.deltas.reserve(1, GFP_KERNEL)?;
        this.infos.lock().reserve(1, GFP_KERNEL)?;
        control.folders.add_delta(level)?;
        let steps = Steps {
            disk,
            delta,
            used,
            old,
            new,
        };
        let frozen_fs = match freeze_fs {
            // They would be waited for without end.
            true if steps.old.has_parked() => Err(ENOSPC),
            true => {
                let frozen;
                (control, frozen) = Self::freeze_fs(disk, control);
                frozen.map(Some)
            }
            false => Ok(None),
        };
        let (result, frozen_fs) = match frozen_fs {
            // Flushes wait for it, and so does who would have to write to give memory.
            Ok(fs) => (noio(|| steps.run(&mut control)), fs),
            Err(e) => (Err(e), None),
        };
        if !control
            .engine
            .as_ref()
            .is_some_and(|e| Arc::ptr_eq(e, &steps.new))
        {
            control.folders.truncate(level);
        }
        if let Some(fs) = frozen_fs {
            // Last: thawing writes durably, which is a commit of the new top.
            this.thaw_fs(control, fs);
        }
        result
    }

    /// ELOOP for an image that is on the disk itself: it would wait for its own requests.
    pub(super) fn admit_file(&self, disk: DiskRef<'_, Self>, file: &File) -> Result {
        if disk.carries(file) {
            pr_err!("ploop{}: image refused: it is on this disk\n", self.index);
            return Err(Errno::Loop.error());
        }
        Ok(())
    }

    /// Whether the disk's limits suit another engine: its block size cannot change now.
    pub(super) fn admit_limits(&self, old: &Engine<Self>, new: &Engine<Self>) -> Result {
        let (old, new) = (limits::align(old), limits::align(new));
        if new.offset > old.offset || new.memory > old.memory {
            pr_err!(
                "ploop{}: image refused: its file needs I/O in blocks of {} bytes at multiples of {} in memory, the disk has {} and {}\n",
                self.index,
                new.offset,
                new.memory,
                old.offset,
                old.memory
            );
            return Err(EINVAL);
        }
        Ok(())
    }
}

impl Steps<'_> {
    fn run(&self, control: &mut Control) -> Result {
        let this = self.disk.driver();
        let (mut snapshot, mut action) = Snapshot::start();
        let (mut unfinished, mut closed) = (None, Closed::ReadOnly);
        let (mut gate, mut error) = (None, EIO);
        loop {
            let result = match action {
                Action::MarkNew => self
                    .delta
                    .mark(this.index)
                    .and_then(|()| Parts::prepare_file(&self.new.chain, &self.used, this.index)),
                // What came back is cleaned with requests running: FinishOld has to clean the rest,
                // and flushes wait for that.
                Action::CommitOld => self.old.commit().and_then(|()| self.old.clean()),
                Action::Switch => {
                    // Until this is let go, no commit of the new top begins.
                    gate = Some(self.new.gate.close());
                    let switched = self.switch(control).map(|u| unfinished = Some(u));
                    if switched.is_ok() {
                        // Its file grows from now on, or first writes would wait for the old one, too.
                        self.new.begin();
                    }
                    switched
                }
                Action::FinishOld => unfinished
                    .take()
                    .ok_or(EIO)
                    .and_then(|u| self.old.finish(u))
                    .map(|c| closed = c),
                Action::UnmarkOld => self.unmark_old(closed),
                Action::Done => {
                    drop(gate.take());
                    self.disk.notify_change();
                    return Ok(());
                }
                Action::Undo => {
                    drop(gate.take());
                    // A mark that cannot be cleared stays with an image that nobody uses.
                    let _ = self.delta.unmark_unused();
                    return Err(error);
                }
                Action::Poison => {
                    pr_err!(
                        "ploop{}: the delta below the new top could not be finished: both stay marked in use\n",
                        this.index
                    );
                    self.old.chain.deltas().for_each(Delta::spoil_marked);
                    self.new.poison_for(error);
                    drop(gate.take());
                    self.new.begin();
                    return Err(error);
                }
            };
            let event = match result {
                Ok(()) => Event::Ok,
                Err(e) => {
                    error = e;
                    Event::Failed
                }
            };
            action = snapshot.next(event);
        }
    }

    /// Makes the new engine the one that requests use.
    fn switch(&self, control: &mut Control) -> Result<Unfinished> {
        let this = self.disk.driver();
        let unfinished = this.replace_engine(self.disk, &self.old, &self.new, || {
            let unfinished = self.old.retire()?;
            this.tracks.snapshot_taken();
            Ok(unfinished)
        })?;
        control.engine = Some(self.new.clone());
        // That of the old top.
        control.max_delta = None;
        // There is room for both.
        let _ = control.deltas.push_within_capacity(self.delta.clone());
        let _ = this
            .infos
            .lock()
            .push_within_capacity(self.delta.info().clone());
        this.view.lock().version = self.delta.format().version();
        Ok(unfinished)
    }

    fn unmark_old(&self, closed: Closed) -> Result {
        let this = self.disk.driver();
        let level = self.old.chain.top_level();
        let top = self.old.chain.top().ok_or(EIO)?;
        let Closed::Clean { is_empty } = closed else {
            return Err(EIO);
        };
        top.unmark(is_empty)?;
        let info = top.seal();
        // It is only shown.
        if let Ok(info) = info {
            this.update_info(usize::from(level.0), info);
        }
        Ok(())
    }
}

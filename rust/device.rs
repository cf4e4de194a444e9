// SPDX-License-Identifier: GPL-2.0
//! One ploopN: its deltas, its state, and the calls that change them.
//!
//! Locks, outermost first: `control` is held over a whole control call; then the disk's open lock,
//! then the frozen queue. `view` is a leaf and is all that readers of sysfs take, so a folder
//! may be removed under `control`.

mod compact;
mod freeze;
mod grow;
mod levels;
mod limits;
mod merge;
pub(crate) mod ops;
pub(crate) mod show;
mod snapshot;
mod track;

use crate::{
    chain::{
        delta::{Delta, Info, OpenArgs},
        Chain,
    },
    engine::{events::Events, tracks::Tracks, Closed, Engine, Parts, Shared},
    error::{refusal, Shown},
    io::{lock::Images, Io},
    sys::{
        epoch::Epoch,
        file::{File, Identity},
        frozen::{FrozenCell, Handler, QueueFrozen},
        fs_freeze::FrozenFs,
        gen_disk::{DiskRef, Limits},
        misc::ModulePin,
        mq::TagSet,
        prelude::*,
        work::Workqueue,
    },
};
use ops::{Ops, Wanted};
use ploop_pure::{
    abi, chain,
    lifecycle::{admit, Call, Op, State},
};

/// What only control calls touch.
struct Control {
    deltas: KVec<Arc<Delta>>,
    folders: show::Folders,
    engine: Option<Arc<Engine<Device>>>,
    /// Held while there are deltas.
    pin: Option<ModulePin>,
    /// MAX_DELTA_SIZE in sectors, and the image that was the top then.
    max_delta: Option<(u64, Identity)>,
    /// FREEZE.
    frozen_fs: Option<FrozenFs>,
    /// A call freezes file systems on the disk, for FREEZE or a snapshot, and waits for that without the
    /// control lock.
    is_freezing: bool,
    /// Calls that thaw file systems on the disk.
    nr_thawing: u32,
    /// The disk is going away.
    is_removed: bool,
}

/// What sysfs shows.
#[derive(Clone)]
pub(crate) struct View {
    engine: Option<Arc<Engine<Device>>>,
    version: u32,
    cluster_sectors: u32,
    is_frozen: bool,
    takes_discards: bool,
    cookie: abi::Cookie,
}

impl View {
    const EMPTY: Self = Self {
        engine: None,
        version: 0,
        cluster_sectors: 0,
        is_frozen: false,
        takes_discards: false,
        cookie: [0; 64],
    };
}

/// A device. It exists as long as its disk.
#[pin_data]
pub(crate) struct Device {
    index: u32,
    images: Arc<Images>,
    /// What requests use; set while the device runs.
    engine: FrozenCell<Option<Arc<Engine<Device>>>>,
    #[pin]
    control: Mutex<Control>,
    #[pin]
    view: Mutex<View>,
    #[pin]
    infos: Mutex<KVec<Arc<Info>>>,
    #[pin]
    tags: TagSet<Device>,
    /// What requests enter before they look a place up.
    epoch: Arc<Epoch>,
    workers: Arc<Workqueue>,
    ops: Arc<Ops>,
    tracks: Arc<Tracks>,
    /// Where long operations run. They wait for `workers`.
    op_worker: Workqueue,
    /// Where file I/O of callers runs.
    errands: Arc<Workqueue>,
}

impl Device {
    /// A device without deltas.
    pub(crate) fn new(index: u32, images: Arc<Images>) -> Result<Arc<Self>> {
        let control = Control {
            deltas: KVec::new(),
            folders: show::Folders::new(),
            engine: None,
            pin: None,
            max_delta: None,
            frozen_fs: None,
            is_freezing: false,
            nr_thawing: 0,
            is_removed: false,
        };
        let workers = Arc::new(Workqueue::per_cpu(c"ploop")?, GFP_KERNEL)?;
        let epoch = Arc::new(Epoch::new()?, GFP_KERNEL)?;
        let tracks = Tracks::new(&epoch)?;
        Arc::pin_init(
            try_pin_init!(Self {
                index,
                images,
                engine: FrozenCell::new(None),
                control <- new_mutex!(control),
                view <- new_mutex!(View::EMPTY),
                infos <- new_mutex!(KVec::new()),
                epoch,
                tags <- TagSet::new(limits::QUEUE_DEPTH),
                workers,
                ops: Ops::new()?,
                tracks,
                op_worker: Workqueue::unbound(c"ploop_op")?,
                errands: Arc::new(Workqueue::unbound(c"ploop_errand")?, GFP_KERNEL)?,
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The disk's requests.
    pub(crate) fn tag_set(&self) -> &TagSet<Self> {
        &self.tags
    }

    /// What requests enter before they look a place up.
    pub(crate) fn users(&self) -> &Epoch {
        &self.epoch
    }

    /// What is noted of the writes.
    pub(crate) fn noted(&self) -> &Tracks {
        &self.tracks
    }

    /// Where handlers and work items run.
    pub(crate) fn workqueue(&self) -> &Workqueue {
        &self.workers
    }

    /// The engine, for a request's handler; none while the device is stopped.
    pub(crate) fn engine<'a>(&'a self, handler: &'a Handler<'_>) -> Option<&'a Arc<Engine<Self>>> {
        self.engine.get(handler)?.as_ref()
    }

    /// GETDEVICE: the lowest number whose device has no deltas. Another caller may get it too.
    pub(crate) fn lowest_idle(&self) -> Result<u32> {
        self.images
            .lowest_idle_device(abi::DEVICES_MAX)
            .ok_or(ERANGE)
    }

    /// Whether the number is promised to a reader of `/proc/vz/ploop_minor`.
    fn is_reserved(&self) -> bool {
        self.images.is_reserved(self.index)
    }

    /// Makes the folders of a device in sysfs, after its disk was added.
    pub(crate) fn add_folders(disk: DiskRef<'_, Self>) -> Result {
        disk.driver().control.lock().folders.add_state(disk)
    }

    /// Removes all folders, before the disk goes.
    pub(crate) fn remove_folders(&self) {
        let folders = {
            let mut control = self.control.lock();
            core::mem::replace(&mut control.folders, show::Folders::new())
        };
        drop(folders);
    }

    /// ADD_DELTA: opens the image of `file` as the new top.
    pub(crate) fn add_delta(
        &self,
        file: &File,
        args: OpenArgs,
        cookie: Option<&abi::Cookie>,
    ) -> Result {
        // Before the lock: opening a block device may wait for whoever removes another.
        let io = Io::open(file, args.access, &self.errands)?;
        self.add_opened(io, args, cookie)
    }

    fn add_opened(&self, io: Io, args: OpenArgs, cookie: Option<&abi::Cookie>) -> Result {
        let this = self;
        let mut control = this.control.lock();
        if control.is_removed {
            return Err(ENODEV);
        }
        admit(control.state(), Call::AddDelta).map_err(refusal)?;
        let pin = ModulePin::new()?;
        let delta = Arc::new(Delta::open(io, args, &this.images, this.index)?, GFP_KERNEL)?;
        let level = control.deltas.len();
        if let Some(below) = control.deltas.last() {
            chain::admit(level, &below.member(), &delta.member()).map_err(|misfit| {
                pr_err!("ploop{}: image refused: {}\n", this.index, Shown(misfit));
                EINVAL
            })?;
        }
        let added = control
            .folders
            .add_delta(level)
            .and_then(|()| Ok(this.infos.lock().push(delta.info().clone(), GFP_KERNEL)?))
            .and_then(|()| Ok(control.deltas.push(delta.clone(), GFP_KERNEL)?))
            .and_then(|()| delta.mark_top(this.index));
        if let Err(e) = added {
            this.forget(&mut control, level);
            return Err(e);
        }
        control.pin.get_or_insert(pin);
        let mut view = this.view.lock();
        view.version = delta.format().version();
        view.cluster_sectors = delta.format().cluster().sectors();
        if let Some(cookie) = cookie {
            view.cookie = *cookie;
        }
        Ok(())
    }

    /// Whether a delta may be added now.
    pub(crate) fn admit_add(&self) -> Result {
        admit(self.control.lock().state(), Call::AddDelta).map_err(refusal)
    }

    /// Drops what is known of the deltas from level `keep` on.
    fn forget(&self, control: &mut Control, keep: usize) {
        self.infos.lock().truncate(keep);
        control.folders.truncate(keep);
        control.deltas.truncate(keep);
        if keep == 0 {
            control.max_delta = None;
            *self.view.lock() = View::EMPTY;
            control.pin = None;
        }
    }

    /// START: from here on requests are served.
    pub(crate) fn start(disk: DiskRef<'_, Self>) -> Result {
        let this = disk.driver();
        let mut control = this.control.lock();
        admit(control.state(), Call::Start).map_err(refusal)?;
        let mut deltas = KVec::with_capacity(control.deltas.len(), GFP_KERNEL)?;
        for delta in &control.deltas {
            delta.mark_top(this.index)?;
            deltas.push(delta.clone(), GFP_KERNEL)?;
        }
        let (chain, used) = Chain::load(deltas, this.index)?;
        let stored = match chain.top() {
            Some(top) => top.stored_checkpoints(this.index),
            None => KVec::new(),
        };
        let parts = Parts::of_top(&chain, &used, this.index)?;
        let events = Events::new(this.index, disk.notifier())?;
        let shared = Shared::new(this.epoch.clone(), events, this.tracks.clone());
        let shared = Arc::new(shared, GFP_KERNEL)?;
        let engine = Engine::new(this.index, chain, parts, this.workers.clone(), shared)?;
        let chain = &engine.chain;
        let limits = limits::limits(&engine);
        disk.set_limits(limits)?;
        disk.set_read_only(!chain.top().is_some_and(|top| top.is_writable()));
        this.resume_points(&engine, stored);
        let swapped = disk.frozen(
            || false,
            |frozen| this.engine.replace(frozen, Some(engine.clone())),
        );
        if !matches!(swapped, Some(Ok(_))) {
            this.tracks.end();
            engine.shared().events.end();
            return Err(EINVAL);
        }
        control.limit_top(&engine);
        engine.begin();
        {
            let mut view = this.view.lock();
            view.engine = Some(engine.clone());
            view.takes_discards = limits.discard_granularity != 0;
        }
        disk.new_medium();
        disk.set_capacity(limits::capacity(&engine, this.index));
        control.engine = Some(engine);
        // A disk without a partition table, or with a bad one, is as good as any.
        let _ = disk.open_lock().rescan_partitions(false);
        disk.notify_change();
        Ok(())
    }

    /// STOP: EBUSY while anybody but the caller has the disk or a partition open. Data, index and
    /// header are durable when this succeeds; if it fails with another error than EBUSY or EINVAL
    /// the device is stopped but its image keeps the mark.
    pub(crate) fn stop(disk: DiskRef<'_, Self>) -> Result {
        let this = disk.driver();
        let mut control = this.control.lock();
        let call = |openers| Call::Stop { openers };
        admit(control.state(), call(disk.openers())).map_err(refusal)?;
        if this.ops.running().is_some() || control.frozen_fs.is_some() || control.is_freezing {
            return Err(EBUSY);
        }
        let impatient = Impatient::begin(control.engine.clone());
        // What was written through the page cache of the disk. A failure has been reported to who
        // wrote it, or will show as a poisoned image; it must not keep the device from stopping.
        let _ = disk.sync_and_invalidate();
        {
            let open = disk.open_lock();
            admit(control.state(), call(disk.openers())).map_err(refusal)?;
            // Who opens the disk from here on finds it empty.
            disk.set_capacity(0);
            let _ = open.rescan_partitions(true);
            disk.forget_medium();
        }
        let swapped = disk.frozen(|| false, |frozen| this.engine.replace(frozen, None));
        this.view.lock().engine = None;
        control.engine = None;
        let Some(Ok(Some(engine))) = swapped else {
            return Err(EINVAL);
        };
        engine.shared().events.stopped();
        let points = this.tracks.end();
        drop(impatient);
        engine.quiet();
        let closed = engine
            .close()
            .and_then(|closed| match (closed, engine.chain.top()) {
                (Closed::Clean { is_empty }, Some(top)) => {
                    let recording = points.iter().filter(|p| p.is_recording());
                    let recording = recording.map(|point| &**point);
                    let extension = top.store_checkpoints(recording, this.index);
                    top.unmark_with(is_empty, extension)
                }
                (Closed::ReadOnly, _) | (_, None) => Ok(()),
            });
        if let Some((_, source)) = engine.chain.source() {
            // Of a merge that could neither be ended nor undone: it is marked until it is looked at.
            source.spoil_marked();
        }
        engine.shared().events.end();
        disk.set_read_only(false);
        let _ = disk.set_limits(Limits::NONE);
        disk.notify_change();
        closed.inspect_err(|e| {
            // Below the top, that of a snapshot or merge that failed.
            engine.chain.deltas().for_each(Delta::spoil_marked);
            pr_err!(
                "ploop{}: image could not be closed cleanly (errno {}): it stays marked in use\n",
                this.index,
                e.to_errno()
            );
        })
    }

    /// CLEAR: drops the deltas of a stopped device. One that was never started, or not since it
    /// was stopped, is closed cleanly; a poisoned one keeps its mark.
    pub(crate) fn clear(&self) -> Result {
        let mut control = self.control.lock();
        admit(control.state(), Call::Clear).map_err(refusal)?;
        control.deltas.iter().for_each(|delta| close_unused(delta));
        self.forget(&mut control, 0);
        Ok(())
    }

    /// Takes the delta of a level, not the only one, out of the table.
    fn drop_level(&self, control: &mut Control, level: usize) -> Result {
        control.deltas.remove(level).map_err(|_| ENOENT)?;
        self.infos.lock().remove(level).map_err(|_| ENOENT)?;
        if let Some(top) = control.deltas.last() {
            let mut view = self.view.lock();
            view.version = top.format().version();
            view.cluster_sectors = top.format().cluster().sectors();
        }
        // A folder shows what is at its level by then.
        let nr = control.deltas.len();
        control.folders.truncate(nr);
        Ok(())
    }

    /// Calls `f` with the queue frozen and the work items of `engine` at rest, which they stay: it is up
    /// to the caller to begin them again. ENOSPC, and all goes on, if writes wait for space, which
    /// requests in flight would be waited for without end.
    fn at_rest<R>(
        disk: DiskRef<'_, Self>,
        engine: &Arc<Engine<Self>>,
        f: impl FnOnce(&QueueFrozen<'_>) -> R,
    ) -> Result<R> {
        engine.settle();
        let (mut f, ready) = (Some(f), disk.ready_to_freeze());
        loop {
            let frozen = ready.frozen(
                || engine.has_parked(),
                |frozen| match engine.try_rest() {
                    true => f.take().map(|f| f(frozen)),
                    false => None,
                },
            );
            let helped = match frozen {
                Some(Some(r)) => return Ok(r),
                Some(None) => engine.help_to_rest(),
                None => Err(ENOSPC),
            };
            helped.inspect_err(|_| engine.begin())?;
        }
    }

    /// Lets `new` take the place of `old`, which goes on if this fails; `retire` is called in
    /// between, when no request is in flight. The work items of `new` are still to be begun. ENOSPC if
    /// writes wait for space.
    fn replace_engine<R>(
        &self,
        disk: DiskRef<'_, Self>,
        old: &Arc<Engine<Self>>,
        new: &Arc<Engine<Self>>,
        retire: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let retired = Self::at_rest(disk, old, |frozen| {
            let retired = retire()?;
            let swapped = self.engine.replace(frozen, Some(new.clone()));
            swapped.map_err(|_| EBUSY)?;
            Ok(retired)
        })?;
        match &retired {
            Ok(_) => {
                self.view.lock().engine = Some(new.clone());
                // What is queued would keep it, and its files open.
                old.quiet();
            }
            Err(_) => old.resume(),
        }
        retired
    }

    /// Makes data and index of the top durable; nothing of one that is only read.
    fn commit_top(engine: &Arc<Engine<Self>>) -> Result {
        match engine.chain.top().is_some_and(|top| top.is_writable()) {
            true => engine.commit(),
            false => Ok(()),
        }
    }

    /// The maintenance that is going on, and the level of the top, as BALLOON tells them. ENOENT
    /// without deltas.
    pub(crate) fn maintenance(&self) -> Result<(u32, u8)> {
        let control = self.control.lock();
        let top = control.deltas.len().checked_sub(1).ok_or(ENOENT)?;
        let op = match self.ops.running() {
            Some(op) => op.number(),
            None if self.tracks.is_tracking() => abi::OP_TRACK,
            None => abi::OP_NONE,
        };
        Ok((op, u8::try_from(top).unwrap_or(u8::MAX)))
    }

    /// Sectors of a cluster; ENOENT without deltas.
    pub(crate) fn cluster_sectors(&self) -> Result<u32> {
        match self.view.lock().cluster_sectors {
            0 => Err(ENOENT),
            sectors => Ok(sectors),
        }
    }

    /// OP_START: begins a long operation; returns its number.
    pub(crate) fn start_op(disk: DiskRef<'_, Self>, wanted: Wanted) -> Result<u64> {
        let this = disk.driver();
        let control = this.control.lock();
        admit(control.state(), Call::Change).map_err(refusal)?;
        let engine = control.engine.as_ref().ok_or(EINVAL)?;
        let mut is_of_top = false;
        match wanted.op {
            Op::Merge => is_of_top = this.admit_merge(&control, wanted.level)?,
            Op::Grow => Self::admit_grow(engine, wanted.sectors)?,
            Op::Compact => Self::admit_compact(engine)?,
        }
        if engine.is_poisoned() {
            return Err(EIO);
        }
        this.admit_change(&control)?;
        this.ops.start(disk, wanted, is_of_top, &this.op_worker)
    }

    /// Shows something else of a level.
    fn update_info(&self, level: usize, info: Arc<Info>) {
        if let Some(place) = self.infos.lock().get_mut(level) {
            *place = info;
        }
    }

    /// SYNC: makes data and index of the top durable.
    pub(crate) fn sync(&self) -> Result {
        let control = self.control.lock();
        admit(control.state(), Call::Sync).map_err(refusal)?;
        control.engine.as_ref().map_or(Ok(()), Self::commit_top)
    }

    /// Decides whether the device itself may be removed; if so, the caller removes it, and who
    /// opens it until then can do nothing with it.
    pub(crate) fn admit_remove(disk: DiskRef<'_, Self>) -> Result {
        // Whoever holds it is busy with the device; the table must not wait for that.
        let mut control = disk.driver().control.try_lock().ok_or(EBUSY)?;
        let openers = disk.openers();
        admit(control.state(), Call::Remove { openers }).map_err(refusal)?;
        control.is_removed = true;
        Ok(())
    }
}

/// While this exists, nothing waits for space: somebody waits for all that is written, to stop the
/// device for example.
struct Impatient(Option<Arc<Engine<Device>>>);

impl Impatient {
    fn begin(engine: Option<Arc<Engine<Device>>>) -> Self {
        if let Some(engine) = &engine {
            engine.shared().set_impatient(true);
            engine.retry_parked();
        }
        Self(engine)
    }
}

impl Drop for Impatient {
    fn drop(&mut self) {
        if let Some(engine) = &self.0 {
            engine.shared().set_impatient(false);
        }
    }
}

/// Clears the mark of a delta of a stopped device, which nobody has written since it was closed or
/// opened; one that could not be closed cleanly keeps it.
fn close_unused(delta: &Delta) {
    if !delta.is_spoiled() {
        // On failure the mark stays, which is what it is for.
        let _ = delta.unmark_unused();
    }
}

impl Control {
    fn state(&self) -> State {
        let nr_deltas = self.deltas.len();
        match (&self.engine, nr_deltas) {
            (Some(_), _) => State::Running { nr_deltas },
            (None, 0) => State::Empty,
            (None, _) => State::Stopped { nr_deltas },
        }
    }

    /// Limits the top of `engine` if that is still or again the image it was said of.
    fn limit_top(&self, engine: &Engine<Device>) {
        let top = self.deltas.last().map(|top| top.info().identity);
        if let Some((sectors, _)) = self.max_delta.filter(|(_, image)| top == Some(*image)) {
            engine.limit_top(sectors);
        }
    }
}

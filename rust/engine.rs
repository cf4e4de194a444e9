// SPDX-License-Identifier: GPL-2.0
//! The executor: does for each request what [`ploop_pure::flow`] decides, against chain and io.
//!
//! A request comes in through [`Engine::handle`] on a worker and is owned by the engine until it is
//! ended: in I/O, in a list of waiters, or in a function's hands. No handler waits for a request
//! that waits for a worker: it is put into a list instead and the handler returns. Handlers of
//! discards wait for the epoch, in which nobody is but who runs or is in I/O; those that write to what
//! the source of a merge hides, for the [`Gate`]: for the thread that ends the old top, and its I/O.
//!
//! Locks: `slow` is a spin lock, taken by handlers and work items only, never across I/O or
//! memory allocation; `commit` ([`index_wb`]) and `growth` ([`space`]) are mutexes held across the I/O
//! of a commit and of growing the file, with `slow` inside them.

mod cow;
mod discard;
pub(crate) mod events;
mod gate;
pub(crate) mod index_wb;
mod inline;
mod lockout;
pub(crate) mod merge;
mod rest;
mod space;
mod succeed;
pub(crate) mod tracks;
mod write;

use crate::{
    chain::{check_memory, Chain, Used},
    error::is_no_space,
    format::Format,
    sys::{
        mq::{Driver, Op, Request, RequestList, Sync},
        pages::PageBuf,
        prelude::*,
        work::{Work, Workqueue},
    },
};
use ploop_pure::{
    alloc::Alloc,
    flow::{self, Action, Event, Settled, Write},
    index::DirtyPages,
    map::Place,
    units::{Cluster, ImageCluster, Level},
};

use gate::Gate;
use index_wb::Copies;
use lockout::Waiters;
pub(crate) use succeed::{Shared, Stats, Unfinished};
use tracks::Tracks;

/// What a request is waiting for when its handler is called.
#[derive(Clone, Copy)]
enum Phase {
    /// Nothing: it has just arrived.
    New,
    /// Nothing any more: it starts again from what it has done.
    Again,
    /// The rest of its data is to be moved, from or to this byte of a delta's image.
    Moving { level: Level, pos: u64, sync: Sync },
    /// Space for the data it was moving.
    Space { level: Level, pos: u64, sync: Sync },
    /// This step of its write.
    Act(Action),
    /// That the page cache forgets what was at this byte of the top's image; then it ends.
    Stale { pos: u64 },
    /// Nothing more: it ends with success.
    Done,
    /// Nothing more: it ends with `Cmd::error`.
    Failed,
}

/// A part of one cluster.
#[derive(Clone, Copy)]
struct Extent {
    cluster: Cluster,
    /// First byte, in the cluster.
    within: u32,
    /// Bytes.
    len: u32,
}

/// The engine's part of a request.
pub(crate) struct Cmd {
    phase: Phase,
    /// The steps of a write; nothing for other operations.
    write: Option<Write>,
    /// What it works on: all of a read or write, a cluster of a discard.
    extent: Extent,
    /// Bytes of data moved, or discarded, so far.
    moved: usize,
    /// Why it fails, once it does.
    error: Error,
    /// It failed in an I/O that synced the file too.
    is_sync_failed: bool,
    /// Its data goes past the file system.
    is_straight: bool,
    /// How often it has come back because it would have had to wait.
    nr_again: u8,
}

/// A request that comes back so often although it may wait has failed.
const AGAIN_MAX: u8 = 100;

impl Cmd {
    /// Of a request that has not arrived yet.
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::New,
            write: None,
            extent: Extent {
                cluster: Cluster(0),
                within: 0,
                len: 0,
            },
            moved: 0,
            error: EIO,
            is_sync_failed: false,
            is_straight: false,
            nr_again: 0,
        }
    }

    /// Of a request that arrives.
    pub(crate) fn arrive(&mut self) {
        *self = Self::new();
    }
}

/// A driver whose requests the engine can work on.
pub(crate) trait Disk: Driver<Pdu = Cmd> {
    /// What is noted of its writes.
    fn tracks(&self) -> &Tracks;
}

/// What changes on the slow path.
struct Slow<D: Disk> {
    alloc: Alloc,
    dirty: DirtyPages,
    settled: Settled,
    /// Writes that wait for a locked cluster.
    lock_waiters: Waiters<D>,
    /// Writes that wait for a slot, until the file has grown. Each holds its cluster's lock.
    space_waiters: RequestList<D>,
    /// Writes that wait for space in the file system, for who knows how long. Each holds its
    /// cluster's lock, or nothing at all.
    parked: RequestList<D>,
    /// Buffers for copies from lower deltas that are free.
    copy_bufs: KVec<PageBuf>,
    /// Writes that wait for a buffer; each holds its cluster's lock and a slot.
    copy_waiters: RequestList<D>,
    /// Flushes and writes with FUA that wait for a commit.
    commit_waiters: RequestList<D>,
}

/// The running part of a device. What changes the deltas of a running device makes a new one.
#[pin_data]
pub(crate) struct Engine<D: Disk> {
    device: u32,
    /// Where requests go.
    pub(crate) chain: Chain,
    workers: Arc<Workqueue>,
    shared: Arc<Shared>,
    /// An index write or sync has failed: the image takes no more writes (see [`index_wb`]).
    is_poisoned: Atomic<bool>,
    /// No request uses it: it does a part of a merge.
    is_private: Atomic<bool>,
    /// Some image may be reached past its file system, see [`Io::submit_inline`].
    may_inline: bool,
    /// Slots can share blocks of the file system, as far as is known.
    clones: Atomic<bool>,
    /// Whether work items may run.
    rest: rest::Rest,
    #[pin]
    slow: SpinLock<Slow<D>>,
    /// Closed while the top of the engine before is being finished.
    #[pin]
    pub(crate) gate: Gate,
    /// Held while the file grows: what it grows by is made zero.
    #[pin]
    growth: Mutex<()>,
    #[pin]
    commit: Mutex<Copies>,
    #[pin]
    commit_now: Work<Self>,
    #[pin]
    commit_later: Work<Self>,
    #[pin]
    make_space: Work<Self>,
    #[pin]
    make_space_later: Work<Self>,
}

/// What an engine knows of the file of its top.
pub(crate) struct Parts {
    alloc: Alloc,
    dirty: DirtyPages,
}

impl Parts {
    /// Of nothing.
    pub(crate) fn none(chain: &Chain) -> Result<Self> {
        let alloc = Alloc::new(chain.cluster(), 0, 0, 0).map_err(crate::error::errno)?;
        let dirty = DirtyPages::new(0).map_err(crate::error::errno)?;
        Ok(Self { alloc, dirty })
    }

    /// Of a top that was opened just now, of whose slots `used` are in use. If it is writable, it
    /// is marked and its index gets the space it lacks.
    pub(crate) fn of_top(chain: &Chain, used: &Used, device: u32) -> Result<Self> {
        let parts = Self::of_used(chain, used, device)?;
        Self::prepare_file(chain, used, device)?;
        Ok(parts)
    }

    /// The same without looking at the file: [`Self::prepare_file`] has to follow before any slot is
    /// handed out.
    pub(crate) fn of_used(chain: &Chain, used: &Used, device: u32) -> Result<Self> {
        let top = chain.top().ok_or(ENOENT)?;
        // A source's pages are written too; it has as many or more.
        let source = chain.source().map_or(0, |(_, d)| d.nr_index_pages());
        let dirty = DirtyPages::new(top.nr_index_pages().max(source));
        let dirty = dirty.map_err(crate::error::errno)?;
        let Format::Ploop1(format) = top.format() else {
            let none = Self::none(chain)?;
            return Ok(Self { dirty, ..none });
        };
        let header = format.header();
        let slots = used.end.min(header.slots_max());
        check_memory(
            Alloc::memory_bytes(slots) + used.slots.memory_bytes(),
            device,
        )?;
        let alloc = Alloc::new(chain.cluster(), used.end, used.end, header.slots_max());
        let mut alloc = alloc.map_err(crate::error::errno)?;
        alloc.give_back_unused(header.first_data.0..used.end, &used.slots);
        Ok(Self { alloc, dirty })
    }

    /// Makes the file of a writable top ready for [`Self::of_used`].
    pub(crate) fn prepare_file(chain: &Chain, used: &Used, device: u32) -> Result {
        let top = chain.top().ok_or(ENOENT)?;
        let Format::Ploop1(format) = top.format() else {
            return Ok(());
        };
        if !top.is_writable() {
            return Ok(());
        }
        // Not all up to the first cluster: a header may say that it is anywhere.
        let index = 0..format.header().index_bytes();
        top.io().reserve(index).inspect_err(|e| {
            let errno = e.to_errno();
            pr_err!("ploop{device}: no space for the image's index (errno {errno})\n");
        })?;
        top.drop_extension();
        // What lies behind the last slot in use is old or preallocated, that extension too; cut, it
        // will read as zeros when the file grows again.
        top.io().cut(chain.cluster().offset(ImageCluster(used.end)))
    }
}

impl<D: Disk> Engine<D> {
    /// An engine for a chain whose top, if writable, is marked in use.
    pub(crate) fn new(
        device: u32,
        chain: Chain,
        parts: Parts,
        workers: Arc<Workqueue>,
        shared: Arc<Shared>,
    ) -> Result<Arc<Self>> {
        let slow = Slow {
            alloc: parts.alloc,
            dirty: parts.dirty,
            settled: Settled::default(),
            lock_waiters: Waiters::new(),
            space_waiters: RequestList::new(),
            parked: RequestList::new(),
            copy_bufs: if chain.is_base() {
                KVec::new()
            } else {
                cow::buffers()?
            },
            copy_waiters: RequestList::new(),
            commit_waiters: RequestList::new(),
        };
        let pages = Copies::new(&chain, 0)?;
        let may_inline = chain.deltas().any(|d| d.io().may_inline());
        Arc::pin_init(
            try_pin_init!(Self {
                device,
                chain,
                workers,
                shared,
                is_poisoned: Atomic::new(false),
                is_private: Atomic::new(false),
                may_inline,
                clones: Atomic::new(true),
                rest: rest::Rest::stopped(),
                slow <- new_spinlock!(slow),
                gate <- Gate::new(),
                growth <- new_mutex!(()),
                commit <- new_mutex!(pages),
                commit_now <- Work::new(Self::run_commit, static_lock_class!()),
                commit_later <- Work::new(Self::run_commit, static_lock_class!()),
                make_space <- Work::new(Self::run_make_space, static_lock_class!()),
                make_space_later <- Work::new(Self::run_look_again, static_lock_class!()),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// What outlives the engine: counters and settings.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether writes are refused because an index write or sync has failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.is_poisoned.load(Relaxed)
    }

    /// Goes on with a request. On a worker, in the submitter's cgroup.
    pub(crate) fn handle(self: &Arc<Self>, mut rq: Request<D>) {
        match rq.pdu().phase {
            Phase::New => {
                self.shared.stats.requests.add(1, Relaxed);
                self.start(rq);
            }
            Phase::Again => self.start(rq),
            Phase::Moving { level, pos, sync } => self.submit(rq, level, pos, sync),
            Phase::Space { level, pos, sync } => self.data_lacks_space(rq, level, pos, sync),
            Phase::Act(action) => self.act(rq, action),
            Phase::Stale { pos } => {
                if let Some(top) = self.chain.top() {
                    top.io()
                        .uncache(&(pos..pos.saturating_add(rq.len() as u64)));
                }
                rq.end(Ok(()));
            }
            Phase::Done => rq.end(Ok(())),
            Phase::Failed => self.fail(rq),
        }
    }

    fn start(self: &Arc<Self>, rq: Request<D>) {
        match rq.op() {
            Op::Read => self.read(rq),
            Op::Write => self.write(rq),
            Op::Flush => self.flush(rq),
            Op::Discard | Op::WriteZeroes => self.discard(rq),
            Op::Other => rq.end(Err(Errno::OpNotSupp.error())),
        }
    }

    /// Takes a request back from I/O; any context. Ends the most frequent requests at once.
    pub(crate) fn io_done(mut rq: Request<D>, result: Result<usize>) {
        if rq.op() == Op::Flush {
            return Self::flushed(rq, result.map(drop));
        }
        let len = rq.len();
        if rq.op() == Op::Write {
            Self::written(&mut rq, result.as_ref().map(drop));
        }
        let is_stale = rq.take_stale();
        let cmd = rq.pdu();
        let holds_lock = cmd.write.is_some_and(|w| w.holds_lock());
        let event = match result {
            // Nothing moved before the end of the data: the file has become shorter.
            Ok(0) => Err(EIO),
            Ok(n) => {
                cmd.moved = cmd.moved.saturating_add(n);
                Ok(())
            }
            Err(e) if e == EAGAIN && cmd.nr_again >= AGAIN_MAX => Err(EIO),
            Err(e) => Err(e),
        };
        match (event, &mut cmd.write) {
            (Ok(()), _) if cmd.moved < len && holds_lock => {}
            // What was looked up without the lock is looked up again.
            (Ok(()), _) if cmd.moved < len => cmd.phase = Phase::Again,
            // It was not to wait, and would have had to.
            (Err(e), _) if e == EAGAIN && !holds_lock => {
                cmd.nr_again += 1;
                cmd.phase = Phase::Again;
            }
            (Ok(()), None) => return rq.complete(Ok(())),
            // To be told where one may sleep.
            (Err(e), None) => {
                cmd.error = e;
                cmd.phase = Phase::Failed;
            }
            (Ok(()), Some(write)) => match write.next(Event::Ok) {
                Action::Done => {
                    let pos = match cmd.phase {
                        Phase::Moving { pos, .. } => pos,
                        _ => 0,
                    };
                    if !is_stale {
                        return rq.complete(Ok(()));
                    }
                    cmd.phase = Phase::Stale { pos };
                }
                action => cmd.phase = Phase::Act(action),
            },
            (Err(e), Some(write)) => {
                cmd.error = e;
                match cmd.phase {
                    Phase::Moving { level, pos, sync } if is_no_space(e) => {
                        cmd.phase = Phase::Space { level, pos, sync };
                    }
                    phase => {
                        let sync = Sync::Data;
                        cmd.is_sync_failed =
                            matches!(phase, Phase::Moving { sync: s, .. } if s == sync);
                        cmd.phase = Phase::Act(write.next(Event::Failed));
                    }
                }
            }
        }
        // A worker may be waiting until nobody is inside, and we wait for a worker.
        rq.leave();
        rq.enqueue();
    }

    /// Notes what a write has changed, perhaps, also if it failed.
    fn written(rq: &mut Request<D>, result: Result<(), &Error>) {
        // One past the file system syncs nothing.
        if rq.pdu().is_straight && !rq.driver().tracks().is_noting() {
            rq.pdu().is_straight = false;
            return;
        }
        let (disk, len) = (rq.pos(), rq.len() as u64);
        let (pos, is_sync) = match rq.pdu().phase {
            Phase::Moving { pos, sync, .. } => (Some(pos), sync == Sync::Data),
            _ => (None, false),
        };
        let is_straight = core::mem::take(&mut rq.pdu().is_straight);
        let tracks = rq.driver().tracks();
        if !is_straight {
            tracks.file_written();
        }
        // No space is about this write alone.
        let is_lost = result.is_err_and(|e| !is_no_space(*e) && *e != EAGAIN);
        match (is_sync, is_lost) {
            (true, false) => tracks.fua.succeeds(),
            (true, true) => tracks.fua.fails(),
            (false, _) => {}
        }
        if let Some(pos) = pos {
            tracks.image_written(&(pos..pos.saturating_add(len)));
        }
        tracks.disk_written(&(disk..disk.saturating_add(len)));
    }

    /// What a read or write works on; an error if it has data in two clusters. The disk's limits
    /// prevent that.
    #[inline]
    fn extent_of(&self, rq: &Request<D>) -> Result<Extent> {
        let size = self.chain.cluster();
        let (cluster, within) = size.split(rq.pos()).ok_or(EIO)?;
        let len = rq.len() as u64;
        if u64::from(within) + len > size.bytes() {
            pr_warn_once!("ploop: a request crosses a cluster\n");
            return Err(EIO);
        }
        // Within a cluster, so it fits.
        let len = len as u32;
        Ok(Extent {
            cluster,
            within,
            len,
        })
    }

    fn read(&self, mut rq: Request<D>) {
        let extent = match self.extent_of(&rq) {
            Ok(extent) => extent,
            Err(e) => return rq.end(Err(e)),
        };
        rq.pdu().extent = extent;
        // Before the lookup: who takes the place away waits until we are done.
        rq.enter();
        let word = self.chain.word(extent.cluster);
        if word.is_closed() {
            return self.wait_for_cluster(rq);
        }
        match word.place() {
            Place::Hole => {
                rq.zero_fill();
                rq.end(Ok(()));
            }
            Place::Slot { level, at } => {
                let pos = self.chain.cluster().offset(at) + u64::from(extent.within);
                self.submit(rq, level, pos, Sync::No);
            }
        }
    }

    /// Moves the data that is left, to or from the place of the request's first byte: `pos` in the
    /// image of `level`.
    fn submit(&self, mut rq: Request<D>, level: Level, pos: u64, sync: Sync) {
        let Some(delta) = self.chain.delta(level) else {
            return rq.end(Err(EIO));
        };
        let cmd = rq.pdu();
        cmd.phase = Phase::Moving { level, pos, sync };
        let moved = cmd.moved;
        let end = pos.saturating_add(rq.len() as u64);
        if rq.op() == Op::Write && delta.io().ends_before(end) {
            return Self::io_done(rq, Err(EIO));
        }
        let Some(rq) = self.try_straight(rq, delta.io(), pos..end) else {
            return;
        };
        if rq.op() == Op::Write && sync == Sync::Data {
            self.shared.tracks.fua.begins();
        }
        delta.io().submit(rq, pos + moved as u64, moved, sync);
    }

    /// Whether the disk may be written.
    fn may_write(&self) -> bool {
        self.chain.top().is_some_and(|t| t.is_writable()) && !self.is_poisoned()
    }

    fn flush(self: &Arc<Self>, rq: Request<D>) {
        let may_write = self.chain.top().is_some_and(|t| t.is_writable());
        if may_write && flow::flush() == Action::Commit {
            self.join_commit(rq);
        } else {
            rq.end(Ok(()));
        }
    }

    /// Whether writes wait for space, for who knows how long.
    pub(crate) fn has_parked(&self) -> bool {
        !self.slow.lock().parked.is_empty()
    }

    /// Makes everything durable and closes the top delta cleanly; leaves its mark if anything
    /// fails. The caller has called [`Self::quiet`], or it is at rest.
    pub(crate) fn close(&self) -> Result<Closed> {
        let top = self.chain.top().ok_or(ENOENT)?;
        if !top.is_writable() {
            return Ok(Closed::ReadOnly);
        }
        if self.is_poisoned() {
            return Err(EIO);
        }
        self.commit()?;
        self.cut_top()
    }

    /// Gives the space of all free slots back and cuts the file behind the last one in use. All
    /// entries are durable.
    fn cut_top(&self) -> Result<Closed> {
        let top = self.chain.top().ok_or(ENOENT)?;
        let Format::Ploop1(format) = top.format() else {
            return Ok(Closed::Clean { is_empty: false });
        };
        self.clean_freed()?;
        let (head, end) = {
            let mut slow = self.slow.lock();
            (slow.alloc.head(), slow.alloc.cut())
        };
        self.check_length(head)?;
        top.io()
            .cut(self.chain.cluster().offset(ImageCluster(end)))?;
        top.io().sync()?;
        let first = format.header().first_data;
        Ok(Closed::Clean {
            is_empty: ImageCluster(end) == first,
        })
    }
}

/// How the top delta was closed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It was never written.
    ReadOnly,
    /// All is durable and the mark may go.
    Clean {
        /// No entry is used.
        is_empty: bool,
    },
}

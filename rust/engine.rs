// SPDX-License-Identifier: GPL-2.0
//! The executor: does for each request what [`ploop_pure::flow`] decides, against chain and io.
//!
//! A request comes in through [`Engine::handle`] on a worker and is owned by the engine until it is
//! ended: in I/O, in a list of waiters, or in a function's hands. No handler waits for another
//! request: where one has to, the request is put into a list and the handler returns.
//!
//! Locks: `slow` is a spin lock, taken by handlers and work items only, never across I/O or
//! memory allocation; `commit` ([`index_wb`]) is a mutex held across the I/O of a commit, with
//! `slow` inside it.

mod cow;
pub(crate) mod index_wb;
mod lockout;
mod space;

use crate::{
    chain::Chain,
    format::{ploop1::Ploop1, Format},
    sys::{
        mq::{Driver, Op, Request, RequestList, Sync},
        pages::PageBuf,
        prelude::*,
        work::{Work, Workqueue},
    },
};
use ploop_pure::{
    alloc::Alloc,
    flow::{self, Action, Coverage, Durability, Event, Write},
    index::DirtyPages,
    map::Place,
    units::{Cluster, ImageCluster, Level},
};

use cow::Copy;

/// What a request is waiting for when its handler is called.
#[derive(Clone, Copy)]
enum Phase {
    /// Nothing: it has just arrived.
    New,
    /// The rest of its data is to be moved, from or to this byte of a delta's image.
    Moving { level: Level, pos: u64, sync: Sync },
    /// This step of its write.
    Act(Action),
    /// Nothing more: it ends with success.
    Done,
    /// Nothing more: it ends with `Cmd::error`.
    Failed,
}

/// The engine's part of a request.
pub(crate) struct Cmd {
    phase: Phase,
    /// The steps of a write; nothing for other operations.
    write: Option<Write>,
    /// Bytes of data moved so far.
    moved: usize,
    /// Why it fails, once it does.
    error: Error,
    /// It failed in an I/O that synced the file too.
    is_sync_failed: bool,
}

impl Cmd {
    /// Of a request that has not arrived yet.
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::New,
            write: None,
            moved: 0,
            error: EIO,
            is_sync_failed: false,
        }
    }

    /// Of a request that arrives.
    pub(crate) fn arrive(&mut self) {
        *self = Self::new();
    }
}

/// A driver whose requests the engine can work on.
pub(crate) trait Disk: Driver<Pdu = Cmd> {}

/// What changes on the slow path.
struct Slow<D: Disk> {
    alloc: Alloc,
    dirty: DirtyPages,
    /// Writes that wait for a locked cluster.
    lock_waiters: RequestList<D>,
    /// Writes that wait for a slot; each holds its cluster's lock.
    space_waiters: RequestList<D>,
    /// Buffers for copies from lower deltas that are free.
    copy_bufs: KVec<PageBuf>,
    /// Writes that wait for a buffer; each holds its cluster's lock and a slot.
    copy_waiters: RequestList<D>,
    /// Flushes and writes with FUA that wait for a commit.
    commit_waiters: RequestList<D>,
}

/// Counters of a running device.
pub(crate) struct Stats {
    /// Requests taken.
    pub(crate) requests: Atomic<u64>,
    /// Slots taken by writes to holes.
    pub(crate) allocated: Atomic<u64>,
    /// Commits done.
    pub(crate) commits: Atomic<u64>,
    /// Index pages written.
    pub(crate) index_pages: Atomic<u64>,
}

impl Stats {
    const fn new() -> Self {
        Self {
            requests: Atomic::new(0),
            allocated: Atomic::new(0),
            commits: Atomic::new(0),
            index_pages: Atomic::new(0),
        }
    }
}

/// The running part of a device.
#[pin_data]
pub(crate) struct Engine<D: Disk> {
    device: u32,
    /// Where requests go.
    pub(crate) chain: Chain,
    workers: Arc<Workqueue>,
    stats: Stats,
    /// An index write or sync has failed: the image takes no more writes (see [`index_wb`]).
    is_poisoned: Atomic<bool>,
    #[pin]
    slow: SpinLock<Slow<D>>,
    #[pin]
    commit: Mutex<PageBuf>,
    #[pin]
    commit_now: Work<Self>,
    #[pin]
    commit_later: Work<Self>,
    #[pin]
    make_space: Work<Self>,
}

impl<D: Disk> Engine<D> {
    /// An engine for a chain whose top, if writable, is marked in use.
    pub(crate) fn new(device: u32, chain: Chain, workers: Arc<Workqueue>) -> Result<Arc<Self>> {
        let top = chain.top().ok_or(ENOENT)?;
        let (alloc, nr_pages) = match top.format() {
            Format::Ploop1(format) => {
                let header = format.header();
                // What lies behind the last slot in use is old or preallocated; cut, it will read
                // as zeros when the file grows again.
                if top.is_writable() {
                    let index = 0..chain.cluster().offset(header.first_data);
                    top.io().reserve(index).inspect_err(|e| {
                        let errno = e.to_errno();
                        pr_err!("ploop{device}: no space for the image's index (errno {errno})\n");
                    })?;
                    top.io()
                        .cut(chain.cluster().offset(ImageCluster(chain.end())))?;
                }
                let alloc = Alloc::new(
                    chain.cluster(),
                    chain.end(),
                    chain.end(),
                    header.slots_max(),
                );
                (alloc, header.nr_pages())
            }
            Format::Raw(_) => (Alloc::new(chain.cluster(), 0, 0, 0), 0),
        };
        let slow = Slow {
            alloc: alloc.map_err(crate::error::errno)?,
            dirty: DirtyPages::new(nr_pages).map_err(crate::error::errno)?,
            lock_waiters: RequestList::new(),
            space_waiters: RequestList::new(),
            copy_bufs: if chain.top_level() == Level(0) {
                KVec::new()
            } else {
                cow::buffers()?
            },
            copy_waiters: RequestList::new(),
            commit_waiters: RequestList::new(),
        };
        let pages = PageBuf::new(ploop_pure::index::BATCH_MAX)?;
        Arc::pin_init(
            try_pin_init!(Self {
                device,
                chain,
                workers,
                stats: Stats::new(),
                is_poisoned: Atomic::new(false),
                slow <- new_spinlock!(slow),
                commit <- new_mutex!(pages),
                commit_now <- Work::new(Self::run_commit),
                commit_later <- Work::new(Self::run_commit),
                make_space <- Work::new(Self::run_make_space),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The counters.
    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Whether writes are refused because an index write or sync has failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.is_poisoned.load(Relaxed)
    }

    /// Goes on with a request. On a worker, in the submitter's cgroup.
    pub(crate) fn handle(self: &Arc<Self>, mut rq: Request<D>) {
        match rq.pdu().phase {
            Phase::New => {
                self.stats.requests.add(1, Relaxed);
                match rq.op() {
                    Op::Read => self.read(rq),
                    Op::Write => self.write(rq),
                    Op::Flush => self.flush(rq),
                    Op::Other => rq.end(Err(Errno::OpNotSupp.error())),
                }
            }
            Phase::Moving { level, pos, sync } => self.submit(rq, level, pos, sync),
            Phase::Act(action) => self.act(rq, action),
            Phase::Done => rq.end(Ok(())),
            Phase::Failed => self.fail(rq),
        }
    }

    /// Takes a request back from I/O; any context. Ends the most frequent requests at once.
    pub(crate) fn io_done(mut rq: Request<D>, result: Result<usize>) {
        let len = rq.len();
        let cmd = rq.pdu();
        let event = match result {
            // Nothing moved before the end of the data: the file has become shorter.
            Ok(0) => Err(EIO),
            Ok(n) => {
                cmd.moved = cmd.moved.saturating_add(n);
                Ok(())
            }
            Err(e) => Err(e),
        };
        match (event, &mut cmd.write) {
            (Ok(()), _) if cmd.moved < len => {}
            (Ok(()), None) => return rq.complete(Ok(())),
            (Err(e), None) => return rq.complete(Err(e)),
            (Ok(()), Some(write)) => match write.next(Event::Ok) {
                Action::Done => return rq.complete(Ok(())),
                action => cmd.phase = Phase::Act(action),
            },
            (Err(e), Some(write)) => {
                cmd.error = e;
                let sync = Sync::Data;
                cmd.is_sync_failed =
                    matches!(cmd.phase, Phase::Moving { sync: s, .. } if s == sync);
                cmd.phase = Phase::Act(write.next(Event::Failed));
            }
        }
        rq.enqueue();
    }

    /// The cluster of a request and the byte inside it; an error if it has data in two. The
    /// disk's limits prevent that.
    fn cluster_of(&self, rq: &Request<D>) -> Result<(Cluster, u32)> {
        let size = self.chain.cluster();
        let (cluster, within) = size.split(rq.pos()).ok_or(EIO)?;
        if self.chain.is_identity() || u64::from(within) + rq.len() as u64 <= size.bytes() {
            Ok((cluster, within))
        } else {
            pr_warn_once!("ploop: a request crosses a cluster\n");
            Err(EIO)
        }
    }

    fn read(&self, mut rq: Request<D>) {
        let (cluster, within) = match self.cluster_of(&rq) {
            Ok(c) => c,
            Err(e) => return rq.end(Err(e)),
        };
        match self.chain.lookup(cluster) {
            Place::Hole => {
                rq.zero_fill();
                rq.end(Ok(()));
            }
            Place::Slot { level, at } => {
                let pos = self.chain.cluster().offset(at) + u64::from(within);
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
        delta.io().submit(rq, pos + moved as u64, moved, sync);
    }

    fn write(self: &Arc<Self>, mut rq: Request<D>) {
        let may_write = self.chain.top().is_some_and(|t| t.is_writable());
        if !may_write || self.is_poisoned() {
            return rq.end(Err(EIO));
        }
        let (cluster, within) = match self.cluster_of(&rq) {
            Ok(c) => c,
            Err(e) => return rq.end(Err(e)),
        };
        let coverage = if within == 0 && rq.len() as u64 == self.chain.cluster().bytes() {
            Coverage::Whole
        } else {
            Coverage::Part
        };
        let durability = if rq.is_fua() {
            Durability::Fua
        } else {
            Durability::Volatile
        };
        let mut write = Write::new(durability, coverage, self.chain.top_level());
        let action = write.next(self.found(cluster, durability));
        rq.pdu().write = Some(write);
        self.act(rq, action);
    }

    /// Where a cluster is. Whether its entry is durable matters for FUA only.
    fn found(&self, cluster: Cluster, durability: Durability) -> Event {
        let entry_durable = match durability {
            Durability::Volatile => true,
            Durability::Fua => {
                self.chain.is_identity()
                    || self.slow.lock().dirty.is_durable(Ploop1::page_of(cluster))
            }
        };
        Event::Found {
            place: self.chain.lookup(cluster),
            entry_durable,
        }
    }

    /// Does `action` and what follows from it, until the request waits for something or ends.
    fn act(self: &Arc<Self>, mut rq: Request<D>, mut action: Action) {
        let (cluster, within) = match self.cluster_of(&rq) {
            Ok(c) => c,
            Err(e) => return rq.end(Err(e)),
        };
        loop {
            let event = match action {
                // It was poisoned while the request waited.
                Action::Lock | Action::TakeSlot if self.is_poisoned() => Event::Failed,
                Action::Lock => match self.lock_cluster(rq, cluster) {
                    Some((r, event)) => {
                        rq = r;
                        event
                    }
                    None => return,
                },
                Action::TakeSlot => match self.take_slot(rq) {
                    Some((r, event)) => {
                        rq = r;
                        event
                    }
                    None => return,
                },
                Action::CopyBelow { level, from, to } => {
                    let copy = Copy { level, from, to };
                    match self.copy_below(rq, copy, within) {
                        Some((r, event)) => {
                            rq = r;
                            event
                        }
                        None => return,
                    }
                }
                Action::WriteData { at, durable } => {
                    return self.write_data(rq, at, within, durable);
                }
                Action::UnlockAndWrite { at, durable } => {
                    self.unlock_cluster(cluster, None);
                    return self.write_data(rq, at, within, durable);
                }
                Action::Publish { at } => {
                    self.unlock_cluster(cluster, Some(at));
                    Event::Ok
                }
                Action::Commit => return self.join_commit(rq),
                Action::Done => return rq.end(Ok(())),
                Action::Abandon { at } => {
                    self.slow.lock().alloc.give_back(at);
                    self.unlock_cluster(cluster, None);
                    return self.fail(rq);
                }
                Action::Unlock => {
                    self.unlock_cluster(cluster, None);
                    return self.fail(rq);
                }
                Action::Fail => return self.fail(rq),
            };
            action = match &mut rq.pdu().write {
                Some(write) => write.next(event),
                None => Action::Fail,
            };
        }
    }

    fn fail(&self, mut rq: Request<D>) {
        let cmd = rq.pdu();
        let error = cmd.error;
        // A sync reports what was lost once, so this may have been about earlier writes too. No
        // space for a direct write is about that write alone.
        if cmd.is_sync_failed {
            let top = self.chain.top();
            let is_alone = top.is_some_and(|t| t.io().is_direct()) && is_no_space(error);
            if !is_alone {
                self.poison(error);
            }
        }
        rq.end(Err(error));
    }

    fn write_data(&self, rq: Request<D>, at: ImageCluster, within: u32, durable: bool) {
        let pos = self.chain.cluster().offset(at) + u64::from(within);
        let sync = if durable { Sync::Data } else { Sync::No };
        self.submit(rq, self.chain.top_level(), pos, sync);
    }

    fn flush(self: &Arc<Self>, rq: Request<D>) {
        let may_write = self.chain.top().is_some_and(|t| t.is_writable());
        if may_write && flow::flush() == Action::Commit {
            self.join_commit(rq);
        } else {
            rq.end(Ok(()));
        }
    }

    /// EIO, and the image is poisoned, if the file has less than `clusters` whole clusters:
    /// somebody has made it shorter. To make it longer again would hide that data is gone.
    fn check_length(&self, clusters: u32) -> Result {
        let top = self.chain.top().ok_or(EIO)?;
        let need = self.chain.cluster().offset(ImageCluster(clusters));
        if top.io().len()? >= need {
            return Ok(());
        }
        pr_err!(
            "ploop{}: the image file has been made shorter\n",
            self.device
        );
        self.poison(EIO);
        Err(EIO)
    }

    /// Ends all that runs on the engine's own account. No request may be in flight or come.
    pub(crate) fn quiet(&self) {
        self.commit_later.cancel_sync();
        self.commit_now.cancel_sync();
        self.make_space.cancel_sync();
    }

    /// Makes everything durable and closes the top delta cleanly; leaves its mark if anything
    /// fails. The caller has called [`Self::quiet`].
    pub(crate) fn close(&self) -> Result<Closed> {
        let top = self.chain.top().ok_or(ENOENT)?;
        if !top.is_writable() {
            return Ok(Closed::ReadOnly);
        }
        if self.is_poisoned() {
            return Err(EIO);
        }
        self.commit()?;
        let Format::Ploop1(format) = top.format() else {
            return Ok(Closed::Clean { is_empty: false });
        };
        let head = self.slow.lock().alloc.head();
        self.check_length(head)?;
        top.io()
            .cut(self.chain.cluster().offset(ImageCluster(head)))?;
        top.io().sync()?;
        let first = format.header().first_data;
        Ok(Closed::Clean {
            is_empty: ImageCluster(head) == first,
        })
    }
}

/// Whether an error says that there is no space.
fn is_no_space(error: Error) -> bool {
    error == ENOSPC || Errno::Quota.is(error)
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

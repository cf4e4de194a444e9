// SPDX-License-Identifier: GPL-2.0
//! Long operations: merge, grow, compact. One at a time on a device, to which it belongs: it goes on
//! whatever becomes of the process that started it. Anybody may look at it, wait for it, slow it
//! down or cancel it.
//!
//! Locks: `state` is a leaf. The operation takes the device's control lock for the moments at which
//! it changes the deltas, and not in between.

use super::{Control, Device};
use crate::sys::{
    self,
    gen_disk::{result_variable, DiskRef, HeldDisk},
    prelude::*,
    work::{Work, Workqueue},
};
use ploop_pure::{abi, lifecycle::Op, rate::Pace};

/// What is known of the operation that runs or ran last.
struct State {
    op: Option<Op>,
    is_running: bool,
    level: u32,
    sectors: u64,
    /// A merge of what was the top then.
    is_of_top: bool,
    serial: u64,
    /// How the last ones ended, for who waits for one and comes late: number and result.
    ended: [(u64, Result); KEPT],
    /// Keeps the disk until it has ended.
    disk: Option<HeldDisk<Device>>,
}

/// Of so many operations it is known how they ended.
const KEPT: usize = 8;

impl State {
    /// How operation `serial` ended, if it has and is one of the last.
    fn result_of(&self, serial: u64) -> Option<Result> {
        let (nr, result) = self.ended[serial as usize % KEPT];
        (nr == serial).then_some(result)
    }

    /// Whether it is what is wanted, of which nothing else matters.
    fn is(&self, wanted: &Wanted) -> bool {
        self.op == Some(wanted.op)
            && match wanted.op {
                Op::Merge if wanted.level == abi::LEVEL_TOP => self.is_of_top,
                Op::Merge => self.level == wanted.level,
                Op::Grow => self.sectors == wanted.sectors,
                Op::Compact => true,
            }
    }
}

/// The long operations of a device.
#[pin_data]
pub(crate) struct Ops {
    #[pin]
    state: Mutex<State>,
    #[pin]
    ended: CondVar,
    is_cancelled: Atomic<bool>,
    rate: Atomic<u64>,
    done: Atomic<u64>,
    total: Atomic<u64>,
    freed: Atomic<u64>,
    #[pin]
    work: Work<Ops>,
}

/// What an operation is to do.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    /// Which.
    pub(crate) op: Op,
    /// `abi::OpStart::level`.
    pub(crate) level: u32,
    /// `abi::OpStart::sectors`.
    pub(crate) sectors: u64,
    /// `abi::OpStart::rate`.
    pub(crate) rate: u64,
}

impl Ops {
    /// None has run.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let state = State {
            op: None,
            is_running: false,
            level: 0,
            sectors: 0,
            is_of_top: false,
            serial: 0,
            ended: [(0, Ok(())); KEPT],
            disk: None,
        };
        Arc::pin_init(
            try_pin_init!(Self {
                state <- new_mutex!(state),
                ended <- new_condvar!(),
                is_cancelled: Atomic::new(false),
                rate: Atomic::new(0),
                done: Atomic::new(0),
                total: Atomic::new(0),
                freed: Atomic::new(0),
                work <- Work::new(Self::run, static_lock_class!()),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// The operation that runs.
    pub(crate) fn running(&self) -> Option<Op> {
        let state = self.state.lock();
        state.op.filter(|_| state.is_running)
    }

    /// The number of the operation that runs, if it is just what is wanted.
    pub(crate) fn running_as(&self, wanted: &Wanted) -> Option<u64> {
        let state = self.state.lock();
        (state.is_running && state.is(wanted)).then_some(state.serial)
    }

    /// Starts an operation, perhaps a merge of the top; returns its number. EBUSY while one runs.
    pub(super) fn start(
        self: &Arc<Self>,
        disk: DiskRef<'_, Device>,
        wanted: Wanted,
        is_of_top: bool,
        queue: &Workqueue,
    ) -> Result<u64> {
        let mut state = self.state.lock();
        if state.is_running {
            return Err(EBUSY);
        }
        state.op = Some(wanted.op);
        state.is_running = true;
        state.level = wanted.level;
        state.sectors = wanted.sectors;
        state.is_of_top = is_of_top;
        state.serial += 1;
        state.disk = Some(disk.hold());
        self.is_cancelled.store(false, Relaxed);
        self.rate.store(wanted.rate, Relaxed);
        self.done.store(0, Relaxed);
        self.total.store(0, Relaxed);
        self.freed.store(0, Relaxed);
        let serial = state.serial;
        Work::queue(self.clone(), |ops| &ops.work, queue, 0);
        Ok(serial)
    }

    fn run(self: Arc<Self>) {
        let (disk, wanted) = {
            let mut state = self.state.lock();
            let (Some(disk), Some(op)) = (state.disk.take(), state.op) else {
                return;
            };
            let wanted = Wanted {
                op,
                level: state.level,
                sectors: state.sectors,
                rate: 0,
            };
            (disk, wanted)
        };
        let result = Device::run_op(disk.as_ref(), &self, wanted);
        tell(disk.as_ref(), wanted.op, result);
        // Before anybody may remove the disk: our reference must not be the last.
        drop(disk);
        let mut state = self.state.lock();
        state.is_running = false;
        let serial = state.serial;
        state.ended[serial as usize % KEPT] = (serial, result);
        self.ended.notify_all();
    }

    /// What the operation has done.
    pub(crate) fn status(&self) -> abi::OpStatus {
        let state = self.state.lock();
        abi::OpStatus {
            op: state.op.map_or(abi::OP_NONE, Op::number),
            state: match state.is_running {
                true => abi::OP_RUNNING,
                false => abi::OP_IDLE,
            },
            result: match state.result_of(state.serial) {
                Some(Err(e)) => e.to_errno(),
                // It runs still, or all is well.
                Some(Ok(())) | None => 0,
            },
            level: state.level,
            serial: state.serial,
            done: self.done.load(Relaxed),
            total: self.total.load(Relaxed),
            rate: self.rate.load(Relaxed),
            freed: self.freed.load(Relaxed),
            ..abi::OpStatus::read()
        }
    }

    /// Waits until no operation runs; EINTR if a signal comes first.
    pub(crate) fn wait(&self) -> Result {
        let mut state = self.state.lock();
        while state.is_running {
            if self.ended.wait_interruptible(&mut state) && state.is_running {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// Waits until operation `serial` has ended; its result. Only a signal that kills the caller ends
    /// that before, with EINTR: who was only stopped would begin another by the same call.
    pub(crate) fn wait_for(&self, serial: u64) -> Result {
        loop {
            {
                let state = self.state.lock();
                if !(state.is_running && state.serial == serial) {
                    // So many may have come after it that nobody knows any more.
                    return state.result_of(serial).unwrap_or(Err(EIO));
                }
            }
            if sys::sleep_killable_ms(WAIT_MS) {
                return Err(EINTR);
            }
        }
    }

    /// Asks the operation to end early.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Relaxed);
    }

    /// Sets the most bytes a second, 0 for no limit.
    pub(crate) fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Relaxed);
    }

    /// ECANCELED if it is to end early.
    pub(super) fn check(&self) -> Result {
        match self.is_cancelled.load(Relaxed) {
            true => Err(Errno::Cancelled.error()),
            false => Ok(()),
        }
    }

    /// Notes that `bytes` are to be done in all.
    pub(super) fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Relaxed);
    }

    /// Notes by how much the file became shorter.
    pub(super) fn set_freed(&self, bytes: u64) {
        self.freed.store(bytes, Relaxed);
    }

    /// Notes that `bytes` more are done, and waits as the rate limit wants it.
    pub(super) fn did(&self, pace: &mut Pace, bytes: u64) -> Result {
        let done = self.done.fetch_add(bytes, Relaxed).saturating_add(bytes);
        // What a write has done meanwhile was not counted before.
        if done > self.total.load(Relaxed) {
            self.total.store(done, Relaxed);
        }
        let rate = self.rate.load(Relaxed);
        let mut left = pace.did(bytes, rate, sys::uptime_ms());
        while left > 0 {
            self.check()?;
            if self.rate.load(Relaxed) != rate {
                // Of the old limit nothing is left to be waited for.
                *pace = Pace::default();
                break;
            }
            let now = left.min(WAIT_MS);
            sys::sleep_ms(now);
            left -= now;
        }
        self.check()
    }
}

/// Sends the event of the end of an operation.
fn tell(disk: DiskRef<'_, Device>, op: Op, result: Result) {
    let name = CString::try_from_fmt(fmt!("PLOOP_OP={}", op.name()));
    match (name, result_variable(result)) {
        (Ok(name), Ok(errno)) => disk.notifier().event([&name, &errno]),
        // Without memory it tells no more than that something changed.
        (Err(_), _) | (_, Err(_)) => disk.notify_change(),
    }
}

/// Milliseconds between two looks at whether it is to end.
const WAIT_MS: u64 = 50;

impl Device {
    /// EBUSY while a long operation or the write tracker runs or file systems are being frozen, and after
    /// a merge that could neither be ended nor undone.
    pub(super) fn admit_change(&self, control: &Control) -> Result {
        if control.is_freezing {
            return Err(EBUSY);
        }
        let engine = self.view.lock().engine.clone();
        let is_merging = engine.is_some_and(|e| e.chain.source().is_some());
        match self.ops.running() {
            None if !is_merging && !self.tracks.is_tracking() => Ok(()),
            Some(_) | None => Err(EBUSY),
        }
    }

    /// What goes on, as sysfs names it.
    pub(super) fn maintenance_name(&self) -> &'static str {
        match self.ops.running() {
            Some(op) => op.name(),
            None if self.tracks.is_tracking() => "track",
            None => "off",
        }
    }

    /// The long operations.
    pub(crate) fn ops(&self) -> &Arc<Ops> {
        &self.ops
    }

    fn run_op(disk: DiskRef<'_, Self>, ops: &Arc<Ops>, wanted: Wanted) -> Result {
        let this = disk.driver();
        let result = match wanted.op {
            Op::Merge => this.merge(disk, ops, wanted.level),
            Op::Grow => this.grow(disk, ops, wanted.sectors),
            Op::Compact => this.compact(disk, ops),
        };
        match result {
            Ok(()) => pr_info!("ploop{}: {} done\n", this.index, wanted.op.name()),
            Err(e) => pr_warn!(
                "ploop{}: {} ended early (errno {})\n",
                this.index,
                wanted.op.name(),
                e.to_errno()
            ),
        }
        result
    }
}

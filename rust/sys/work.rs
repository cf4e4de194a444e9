// SPDX-License-Identifier: GPL-2.0
//! Workqueues and work items.

use super::{bindings, QUEUES};
use core::{
    ffi::c_void,
    ptr::{self, NonNull},
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        Arc, LockClassKey,
    },
    types::Opaque,
};

/// A workqueue that makes progress under memory pressure and may sleep in its handlers.
///
/// # Invariants
///
/// The pointer is a live workqueue of ours.
pub(crate) struct Workqueue(NonNull<bindings::workqueue_struct>);

// SAFETY: Workqueues are thread-safe.
unsafe impl Send for Workqueue {}
// SAFETY: As above.
unsafe impl Sync for Workqueue {}

impl Workqueue {
    /// A queue whose items run on the CPU that queues them, one after the other unless they sleep: no
    /// worker is woken for each when there are many, with a few microseconds of work.
    pub(crate) fn per_cpu(name: &CStr) -> Result<Self> {
        Self::new(name, bindings::wq_flags_WQ_PERCPU)
    }

    /// A queue whose items run anywhere, and may take long.
    pub(crate) fn unbound(name: &CStr) -> Result<Self> {
        Self::new(name, bindings::wq_flags_WQ_UNBOUND)
    }

    /// With an own rescuer, so that it can serve writes that free memory.
    fn new(name: &CStr, flags: bindings::wq_flags) -> Result<Self> {
        let flags = flags | bindings::wq_flags_WQ_MEM_RECLAIM;
        // SAFETY: `%s` takes the one string that follows.
        let wq = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, 0, name.as_char_ptr())
        };
        let wq = NonNull::new(wq).ok_or(ENOMEM)?;
        QUEUES.add();
        // INVARIANT: Just made.
        Ok(Self(wq))
    }

    /// Queues a raw work item.
    ///
    /// # Safety
    ///
    /// `work` is initialised, stays where it is until its handler has started, and is on no queue.
    pub(super) unsafe fn queue_raw(&self, work: *mut bindings::work_struct) {
        let cpu = bindings::wq_misc_consts_WORK_CPU_UNBOUND as i32;
        // SAFETY: A live queue by the invariant; the item by the contract.
        unsafe { bindings::queue_work_on(cpu, self.0.as_ptr(), work) };
    }

    /// Calls `f`, which waits for I/O and takes no lock that is held across errands, on a worker if the caller
    /// can be killed, and waits for it all the same. Nothing else that waits may be on this queue.
    /// Sleeps.
    pub(crate) fn errand<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Option<R> {
        /// What `f` is, and what it returns.
        struct Call<F, R>(Option<F>, Option<R>);

        /// # Safety
        ///
        /// `arg` is a `Call` that nobody else uses meanwhile.
        unsafe extern "C" fn run<F: FnOnce() -> R, R>(arg: *mut c_void) {
            // SAFETY: By the contract.
            let call = unsafe { &mut *arg.cast::<Call<F, R>>() };
            call.1 = call.0.take().map(|f| f());
        }

        fn run_of<F: FnOnce() -> R, R>(_: &Call<F, R>) -> unsafe extern "C" fn(*mut c_void) {
            run::<F, R>
        }

        let mut call = Call(Some(f), None);
        let run = run_of(&call);
        let arg = ptr::from_mut(&mut call).cast();
        // SAFETY: No preconditions.
        if !unsafe { bindings::ploop_is_mortal() } {
            // SAFETY: `arg` is of the type that `run` is for.
            unsafe { run(arg) };
        } else {
            // SAFETY: A live queue by the invariant; `arg` as above, and its parts may go to another thread.
            unsafe { bindings::ploop_errand(self.0.as_ptr(), Some(run), arg) };
        }
        call.1
    }

    /// Waits until everything queued before has run.
    pub(crate) fn flush(&self) {
        // SAFETY: A live queue by the invariant.
        unsafe { bindings::__flush_workqueue(self.0.as_ptr()) };
    }
}

impl Drop for Workqueue {
    fn drop(&mut self) {
        // SAFETY: Ours by the invariant; drains first.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
        QUEUES.sub();
    }
}

/// A work item, a part of a `T`, that runs a function on it, at once or after a delay.
///
/// A queued item holds a reference to its `T`; [`Work::cancel_sync`] gives it back.
///
/// # Invariants
///
/// While the item is queued, `target` came from `Arc::into_raw` and that reference is the item's.
#[repr(C)]
#[pin_data]
pub(crate) struct Work<T: Send + Sync + 'static> {
    #[pin]
    raw: Opaque<bindings::delayed_work>,
    run: fn(Arc<T>),
    target: Atomic<*mut T>,
}

// SAFETY: Work items are thread-safe; `T` is `Send` and `Sync`.
unsafe impl<T: Send + Sync + 'static> Send for Work<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync + 'static> Sync for Work<T> {}

impl<T: Send + Sync + 'static> Work<T> {
    /// An idle item that will call `run`. Items of one key are one to lockdep.
    pub(crate) fn new(run: fn(Arc<T>), key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            raw <- Opaque::ffi_init(|p: *mut bindings::delayed_work| {
                // SAFETY: `p` is valid for writes and pinned.
                unsafe {
                    bindings::ploop_init_delayed_work(p, Some(Self::handler), key.as_ptr());
                }
            }),
            run,
            target: Atomic::new(ptr::null_mut()),
        })
    }

    /// Queues the item of `this`, picked by `item`, to run after `delay_ms`. Nothing happens if it
    /// is queued already.
    pub(crate) fn queue(this: Arc<T>, item: fn(&T) -> &Self, queue: &Workqueue, delay_ms: u32) {
        // SAFETY: A live queue by the invariant.
        unsafe { Self::queue_on(this, item, queue.0.as_ptr(), delay_ms) }
    }

    /// The same on a queue of the kernel, at once: for what may wait for memory. Somebody has to call
    /// [`Self::cancel_sync`] before the module goes.
    pub(crate) fn queue_outside(this: Arc<T>, item: fn(&T) -> &Self) {
        // SAFETY: Set at boot, and never destroyed.
        unsafe { Self::queue_on(this, item, bindings::system_dfl_wq, 0) }
    }

    /// # Safety
    ///
    /// `queue` is live.
    unsafe fn queue_on(
        this: Arc<T>,
        item: fn(&T) -> &Self,
        queue: *mut bindings::workqueue_struct,
        delay_ms: u32,
    ) {
        let raw = Arc::into_raw(this);
        // SAFETY: We hold a reference until the end of this function or give it to the item.
        let work = item(unsafe { &*raw });
        // An item is for the one `T` that queued it first, for ever.
        match work.target.cmpxchg(ptr::null_mut(), raw.cast_mut(), Full) {
            Ok(_) => {}
            Err(first) if ptr::eq(first, raw) => {}
            // SAFETY: Nobody took the reference.
            Err(_) => return drop(unsafe { Arc::from_raw(raw) }),
        }
        let cpu = bindings::wq_misc_consts_WORK_CPU_UNBOUND as i32;
        // SAFETY: Initialised and pinned; a live queue by the contract.
        let queued = unsafe {
            let delay = bindings::ploop_msecs_to_jiffies(delay_ms);
            bindings::queue_delayed_work_on(cpu, queue, work.raw.get(), delay)
        };
        if !queued {
            // SAFETY: The item has a reference already and did not take this one.
            drop(unsafe { Arc::from_raw(raw) });
        }
    }

    /// Takes the item off its queue or waits for it to finish. It may be queued again by others.
    pub(crate) fn cancel_sync(&self) {
        // SAFETY: Initialised and pinned.
        if unsafe { bindings::cancel_delayed_work_sync(self.raw.get()) } {
            let raw = self.target.load(Relaxed);
            // SAFETY: The item was queued, so it had a reference by the invariant, now ours.
            drop(unsafe { Arc::from_raw(raw.cast_const()) });
        }
    }

    /// # Safety
    ///
    /// Called by the workqueue with the item of a `Work<T>` that was queued.
    unsafe extern "C" fn handler(work: *mut bindings::work_struct) {
        // `work` is the first field of `delayed_work`, which is the first field of `Work`.
        let this = work.cast::<Self>();
        // SAFETY: By the contract it is a live `Work`.
        let (run, raw) = unsafe { ((*this).run, (*this).target.load(Relaxed)) };
        // SAFETY: The item's reference by the invariant; the item is off the queue now.
        run(unsafe { Arc::from_raw(raw.cast_const()) });
    }
}

// SPDX-License-Identifier: GPL-2.0
//! blk-mq: tag sets, requests, and the I/O of a request's data to a file.
//!
//! A request is in one of these states; each has one owner:
//!
//! 1. idle: blk-mq's; its [`Pdu`] is initialised.
//! 2. [`Request`]: ours, from `queue_rq` on. May be moved to a handler ([`Request::enqueue`]), into a
//!    [`RequestList`], or to 3.
//! 3. in I/O ([`Request::submit`], [`Inside::submit`](super::blocks::Inside::submit)): the file
//!    system's or a device's; comes back through [`Driver::io_done`].
//! 4. ended: blk-mq's again. Dropping a `Request` ends it with an error.

use super::{
    bindings,
    blocks::Blocks,
    compat,
    epoch::Epoch,
    file::{self, File, Kind},
    frozen::Handler,
    segments::Segments,
    work::Workqueue,
};
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    mem::{self, MaybeUninit},
    ptr,
    ptr::NonNull,
};
use kernel::{
    alloc::flags,
    error::to_result,
    pr_notice_once,
    prelude::*,
    static_lock_class,
    sync::atomic::{Atomic, Full, Relaxed},
    types::Opaque,
};

/// Operation of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    /// Data from the disk.
    Read,
    /// Data to the disk.
    Write,
    /// Make earlier writes durable; no data.
    Flush,
    /// What the range holds is not needed any more; no data.
    Discard,
    /// The range has to read as zeros; no data.
    WriteZeroes,
    /// Anything we do not offer.
    Other,
}

/// Whether a data I/O must be durable when it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sync {
    /// No.
    No,
    /// Yes, with the metadata needed to read it back.
    Data,
}

/// A blk-mq driver: one value per disk.
pub(crate) trait Driver: Sized + Send + core::marker::Sync + 'static {
    /// Private data of each request, touched only by the request's owner.
    type Pdu: Send;
    /// The private data of an idle request.
    fn new_pdu() -> Self::Pdu;
    /// The tag set of the disk, a part of the driver.
    fn tags(&self) -> &TagSet<Self>;
    /// The queue on which handlers run.
    fn workers(&self) -> &Workqueue;
    /// What [`Request::enter`] enters; a part of the driver.
    fn epoch(&self) -> &Epoch;
    /// Takes over a new request; may sleep, but not wait for another request.
    fn queue_rq(&self, rq: Request<Self>, handler: &Handler<'_>);
    /// Handles a request passed to [`Request::enqueue`]; may sleep.
    fn run(&self, rq: Request<Self>, handler: &Handler<'_>);
    /// Gets a request back from I/O, with the bytes moved; any context, must not sleep.
    fn io_done(rq: Request<Self>, result: Result<usize>);
}

/// Largest logical block of a disk; what `SEGMENTS_INLINE` sectors have at least.
const BLOCK_BYTES_MAX: usize = 4096;

/// Segments that a request's I/O can do with without allocating memory.
const SEGMENTS_INLINE: usize = 8;

/// [`Pdu::epoch`] of a request that has not entered: no index of an epoch is negative.
const OUTSIDE: i32 = -1;

/// What follows each `struct request` of our tag sets.
#[repr(C)]
pub(super) struct Pdu<D: Driver> {
    work: Opaque<bindings::work_struct>,
    /// The next of a [`RequestList`].
    next: UnsafeCell<*mut bindings::request>,
    /// The result that `complete` ends the request with.
    pub(super) status: UnsafeCell<bindings::blk_status_t>,
    /// What [`Epoch::enter`] returned; [`OUTSIDE`] if the request is not inside.
    epoch: UnsafeCell<i32>,
    iocb: UnsafeCell<bindings::kiocb>,
    /// References to the I/O in flight: the submitter's and the completion's; of bios, one each.
    pub(super) io_refs: Atomic<i32>,
    /// What the I/O returned.
    io_ret: Atomic<isize>,
    inline: UnsafeCell<[bindings::bio_vec; SEGMENTS_INLINE]>,
    pub(super) bio: UnsafeCell<MaybeUninit<bindings::bio>>,
    /// What the bios in flight are inside of, and the byte of the file that they begin at.
    pub(super) blocks: UnsafeCell<(*const Blocks, i32, u64)>,
    /// The page cache has what the bios have overwritten.
    pub(super) is_stale: UnsafeCell<bool>,
    segments: UnsafeCell<KVec<bindings::bio_vec>>,
    user: UnsafeCell<D::Pdu>,
}

/// Reads a field of a request by name. No reference to the whole request may exist: C code changes
/// other fields concurrently.
macro_rules! field {
    ($rq:expr, $f:ident) => {
        // SAFETY: A live request by the type invariant; the field is stable while we own it.
        unsafe { (&raw const (*$rq.0.as_ptr()).$f).read() }
    };
}

/// A started request, owned by us.
///
/// # Invariants
///
/// The pointer is a started request of a tag set of `D`, which nobody else may end or change.
pub(crate) struct Request<D: Driver>(NonNull<bindings::request>, PhantomData<fn() -> D>);

// SAFETY: A request may be ended from any context, and `D::Pdu` is `Send`.
unsafe impl<D: Driver> Send for Request<D> {}

impl<D: Driver> Request<D> {
    /// # Safety
    ///
    /// `rq` fulfils the type invariant and the caller hands it over.
    pub(super) unsafe fn from_raw(rq: *mut bindings::request) -> Self {
        // SAFETY: Not null by the contract. INVARIANT: By the contract.
        Self(unsafe { NonNull::new_unchecked(rq) }, PhantomData)
    }

    pub(super) fn into_raw(self) -> *mut bindings::request {
        let rq = self.0.as_ptr();
        mem::forget(self);
        rq
    }

    pub(super) fn raw_pdu(&self) -> *mut Pdu<D> {
        // SAFETY: `cmd_size` bytes follow the request; see `TagSet::new`.
        unsafe { self.0.as_ptr().add(1).cast() }
    }

    /// Whether the page cache of the file that was written past it has what was there before; to be
    /// asked once.
    pub(crate) fn take_stale(&mut self) -> bool {
        // SAFETY: We own the request, so its `Pdu` too.
        mem::take(unsafe { &mut *(*self.raw_pdu()).is_stale.get() })
    }

    /// The first bio, with others behind it; null if there is no data.
    pub(super) fn first_bio(&self) -> *mut bindings::bio {
        field!(self, bio)
    }

    /// Its queue.
    pub(super) fn queue(&self) -> *mut bindings::request_queue {
        field!(self, q)
    }

    /// The operation.
    pub(crate) fn op(&self) -> Op {
        match field!(self, cmd_flags) & bindings::REQ_OP_MASK {
            bindings::req_op_REQ_OP_READ => Op::Read,
            bindings::req_op_REQ_OP_WRITE => Op::Write,
            bindings::req_op_REQ_OP_FLUSH => Op::Flush,
            bindings::req_op_REQ_OP_DISCARD => Op::Discard,
            bindings::req_op_REQ_OP_WRITE_ZEROES => Op::WriteZeroes,
            _ => Op::Other,
        }
    }

    /// Whether the guest wants the data durable at completion.
    pub(crate) fn is_fua(&self) -> bool {
        field!(self, cmd_flags) & bindings::REQ_FUA != 0
    }

    /// Whether some part of it is to fail with EAGAIN rather than wait. The block layer merges such bios
    /// with others.
    pub(crate) fn has_nowait(&self) -> bool {
        let mut bio = self.first_bio();
        while !bio.is_null() {
            // SAFETY: A bio of an owned request.
            let (flags, next) = unsafe { ((*bio).bi_opf, (*bio).bi_next) };
            if flags & bindings::REQ_NOWAIT != 0 {
                return true;
            }
            bio = next;
        }
        false
    }

    /// Whether zeros are to keep the space that they take.
    pub(crate) fn keeps_space(&self) -> bool {
        field!(self, cmd_flags) & bindings::REQ_NOUNMAP != 0
    }

    /// Enters the driver's epoch, if the request is not inside. It leaves at the latest when it
    /// ends.
    pub(crate) fn enter(&mut self) {
        // SAFETY: We own the request, so its `Pdu` too.
        let idx = unsafe { &mut *(*self.raw_pdu()).epoch.get() };
        if *idx == OUTSIDE {
            *idx = self.driver().epoch().enter();
        }
    }

    /// Leaves the epoch: what was looked up may not be used any more.
    pub(crate) fn leave(&mut self) {
        // SAFETY: We own the request, so its `Pdu` too.
        let idx = unsafe { &mut *(*self.raw_pdu()).epoch.get() };
        let idx = mem::replace(idx, OUTSIDE);
        if idx != OUTSIDE {
            // SAFETY: From `enter`, of the same driver; forgotten just now.
            unsafe { self.driver().epoch().leave(idx) };
        }
    }

    /// First byte on the disk. The block layer keeps requests below the capacity.
    pub(crate) fn pos(&self) -> u64 {
        field!(self, __sector).saturating_mul(1 << bindings::SECTOR_SHIFT)
    }

    /// Bytes of data.
    pub(crate) fn len(&self) -> usize {
        field!(self, __data_len) as usize
    }

    /// The driver's data.
    pub(crate) fn pdu(&mut self) -> &mut D::Pdu {
        // SAFETY: Initialised by `init_request`; only the owner of the request touches it.
        unsafe { &mut *(*self.raw_pdu()).user.get() }
    }

    /// The driver.
    pub(crate) fn driver(&self) -> &D {
        let q = self.queue();
        // SAFETY: `queuedata` is an `Arc<D>` that lives until the disk is freed, which is after
        // every request has ended.
        unsafe { &*(*q).queuedata.cast::<D>() }
    }

    /// Whether the data is zeros.
    pub(crate) fn is_zero(&self) -> bool {
        // SAFETY: We own the request, so its data too.
        unsafe { bindings::ploop_rq_is_zero(self.0.as_ptr()) }
    }

    /// Fills the data with zeros.
    pub(crate) fn zero_fill(&mut self) {
        let mut bio = field!(self, bio);
        while !bio.is_null() {
            // SAFETY: A bio of an owned request.
            bio = unsafe {
                bindings::zero_fill_bio(bio);
                (*bio).bi_next
            };
        }
    }

    /// Ends the request; must not be called in interrupt context.
    pub(crate) fn end(mut self, result: Result) {
        self.leave();
        let status = status_of(result);
        // SAFETY: We own the request and give it back.
        unsafe { bindings::blk_mq_end_request(self.into_raw(), status) };
    }

    /// Ends the request from any context; from an interrupt, on the CPU that submitted it.
    pub(crate) fn complete(mut self, result: Result) {
        // SAFETY: No preconditions.
        if unsafe { bindings::ploop_in_task() } {
            // Else it would be passed to a thread.
            return self.end(result);
        }
        self.leave();
        // SAFETY: We own the request; nobody else touches its status.
        unsafe { *(*self.raw_pdu()).status.get() = status_of(result) };
        // SAFETY: We own the request and give it to blk-mq, which calls `complete`.
        unsafe { bindings::blk_mq_complete_request(self.into_raw()) };
    }

    /// Passes the request to [`Driver::run`]; any context.
    pub(crate) fn enqueue(self) {
        let pdu = self.raw_pdu();
        let workers = ptr::from_ref(self.driver().workers());
        let _ = self.into_raw();
        // SAFETY: The driver lives at least until the request ends, which the handler will see to.
        // The item was initialised by `init_request` and is on no queue, as we own the request.
        unsafe { (*workers).queue_raw((*pdu).work.get()) };
    }

    /// Moves the request's data, from byte `skip` of it on, to or from byte `pos` of `file`. The
    /// request comes back through [`Driver::io_done`], perhaps before this returns. Less than all
    /// may be moved.
    pub(crate) fn submit(self, file: &File, pos: u64, skip: usize, sync: Sync) {
        let dir = match self.op() {
            Op::Write => bindings::ITER_SOURCE,
            Op::Read | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Other => bindings::ITER_DEST,
        };
        let iocb = match file.kiocb(pos) {
            Ok(iocb) => iocb,
            Err(e) => return D::io_done(self, Err(e)),
        };
        // A page needs bios of the pool that its own comes from; see docs/hazards.md.
        if field!(self, cmd_flags) & bindings::REQ_SWAP != 0 && file.kind() == Kind::Regular {
            pr_notice_once!("swap goes through an image's file system, and can hang without memory; with bdev=1 it does not\n");
        }
        let mut iter = self.data_iter(dir, skip);
        let pdu = self.raw_pdu();
        let bio = field!(self, bio);
        // SAFETY: We own the request, so its control block and bios too; nothing is in flight.
        unsafe {
            let slot = (*pdu).iocb.get();
            *slot = iocb;
            (*slot).ki_filp = file.get_raw();
            (*slot).ki_complete = Some(Self::io_complete);
            if !bio.is_null() {
                (*slot).ki_ioprio = (*bio).bi_ioprio;
            }
            if sync == Sync::Data {
                (*slot).ki_flags |= bindings::IOCB_DSYNC;
            }
            (*pdu).io_refs.store(2, Relaxed);
        }
        // From here the request is the I/O's.
        let _ = self.into_raw();
        // SAFETY: Control block and segments are the request's, which is not ended before both
        // references are gone; `io_put` ends the write.
        let ret = unsafe { file.start((*pdu).iocb.get(), &mut iter, dir) };
        if ret != -(bindings::EIOCBQUEUED as isize) {
            // SAFETY: The file system did not take the control block over.
            unsafe { Self::io_complete((*pdu).iocb.get(), ret) };
        }
        // SAFETY: The submitter's reference.
        unsafe { Self::io_put(pdu) };
    }

    /// An iterator over the request's data from byte `skip` on; over a part of that if memory for
    /// more segments cannot be had.
    fn data_iter(&self, dir: u32, skip: usize) -> bindings::iov_iter {
        // SAFETY: All zeroes is a valid `iov_iter`.
        let mut iter: bindings::iov_iter = unsafe { mem::zeroed() };
        let (bio, tail) = (field!(self, bio), field!(self, biotail));
        let len = self.len();
        if ptr::eq(bio, tail) && !bio.is_null() {
            // SAFETY: The only bio of an owned request; its vector lives as long.
            unsafe {
                let mut at = (&raw const (*bio).bi_iter).read();
                let nr = Segments::new(bio).count();
                let segs = (*bio).bi_io_vec.add(at.bi_idx as usize);
                bindings::iov_iter_bvec(&mut iter, dir, segs, nr, len);
                iter.iov_offset = *compat::segment_done(&mut at) as usize;
                bindings::iov_iter_advance(&mut iter, skip);
            }
            return iter;
        }
        let pdu = self.raw_pdu();
        // SAFETY: We own the request, so its segment stores and bios too.
        let (inline, heap, segments) = unsafe {
            (
                &mut *(*pdu).inline.get(),
                &mut *(*pdu).segments.get(),
                || Segments::new(bio).skip_bytes(skip),
            )
        };
        heap.clear();
        let nr = segments().count();
        let fits = nr <= SEGMENTS_INLINE
            || heap
                .reserve(nr, flags::GFP_NOWAIT | flags::__GFP_NOWARN)
                .is_err();
        let (mut nr, mut len) = (0, 0);
        for seg in segments() {
            let len_seg = seg.bv_len as usize;
            let room = if fits {
                inline.get_mut(nr).map(|slot| *slot = seg).is_some()
            } else {
                heap.push_within_capacity(seg).is_ok()
            };
            if !room {
                break;
            }
            nr += 1;
            len += len_seg;
        }
        if skip.saturating_add(len) < self.len() {
            // A part that direct I/O can do: whole blocks of any size that disks have.
            len &= !(BLOCK_BYTES_MAX - 1);
        }
        let segs = if fits { inline.as_ptr() } else { heap.as_ptr() };
        // SAFETY: `nr` segments were stored; they stay until the request is ours again.
        unsafe { bindings::iov_iter_bvec(&mut iter, dir, segs, nr, len) };
        iter
    }

    /// # Safety
    ///
    /// Called once for each I/O, with the control block in the `Pdu` of a request of `D`.
    unsafe extern "C" fn io_complete(iocb: *mut bindings::kiocb, ret: c_long) {
        // SAFETY: By the contract.
        unsafe {
            let pdu = kernel::container_of!(iocb.cast::<UnsafeCell<_>>(), Pdu<D>, iocb);
            (*pdu).io_ret.store(ret, Relaxed);
            Self::io_put(pdu);
        }
    }

    /// # Safety
    ///
    /// The caller gives up one of the two references to the I/O in flight.
    unsafe fn io_put(pdu: *mut Pdu<D>) {
        // SAFETY: Alive while a reference is left.
        if unsafe { (*pdu).io_refs.fetch_sub(1, Full) } != 1 {
            return;
        }
        // SAFETY: Nobody else refers to the I/O: the request and all in its `Pdu` are ours again.
        // The `Pdu` follows its request.
        let (rq, ret) = unsafe {
            let rq = Self::from_raw(pdu.cast::<bindings::request>().sub(1));
            let iocb = (*pdu).iocb.get();
            if rq.op() == Op::Write {
                bindings::ploop_kiocb_end_write(iocb);
            }
            file::put_raw((*iocb).ki_filp);
            (rq, (*pdu).io_ret.load(Relaxed))
        };
        let result =
            usize::try_from(ret).map_err(|_| Error::from_errno(i32::try_from(ret).unwrap_or(0)));
        D::io_done(rq, result);
    }
}

impl<D: Driver> Drop for Request<D> {
    fn drop(&mut self) {
        self.leave();
        // SAFETY: We own the request and give it back.
        unsafe { bindings::blk_mq_end_request(self.0.as_ptr(), bindings::BLK_STS_IOERR) };
    }
}

fn status_of(result: Result) -> bindings::blk_status_t {
    match result {
        Ok(()) => bindings::BLK_STS_OK as bindings::blk_status_t,
        // SAFETY: A pure function.
        Err(e) => unsafe { bindings::errno_to_blk_status(e.to_errno()) },
    }
}

/// A first-in first-out list of requests; no memory of its own, any length.
///
/// # Invariants
///
/// `head` starts a chain of owned requests, linked by `next` of their `Pdu` and ended by null;
/// `tail` is the last of it, null if there is none.
pub(crate) struct RequestList<D: Driver> {
    head: *mut bindings::request,
    tail: *mut bindings::request,
    _requests: PhantomData<fn() -> D>,
}

// SAFETY: Requests are `Send`.
unsafe impl<D: Driver> Send for RequestList<D> {}

impl<D: Driver> RequestList<D> {
    /// An empty list.
    pub(crate) const fn new() -> Self {
        Self {
            head: ptr::null_mut(),
            tail: ptr::null_mut(),
            _requests: PhantomData,
        }
    }

    /// Appends a request.
    pub(crate) fn push_back(&mut self, rq: Request<D>) {
        let pdu = rq.raw_pdu();
        let rq = rq.into_raw();
        // SAFETY: We own the request, so its link too. INVARIANT: It is the new end of the chain.
        unsafe { *(*pdu).next.get() = ptr::null_mut() };
        if self.tail.is_null() {
            self.head = rq;
        } else {
            // SAFETY: An owned request by the invariant; its `Pdu` follows it.
            unsafe { *(*self.tail.add(1).cast::<Pdu<D>>()).next.get() = rq };
        }
        self.tail = rq;
    }

    /// Takes the first request.
    pub(crate) fn pop_front(&mut self) -> Option<Request<D>> {
        if self.head.is_null() {
            return None;
        }
        // SAFETY: An owned request by the invariant, which leaves the chain.
        let rq = unsafe { Request::<D>::from_raw(self.head) };
        // SAFETY: As above.
        self.head = unsafe { *(*rq.raw_pdu()).next.get() };
        if self.head.is_null() {
            self.tail = ptr::null_mut();
        }
        Some(rq)
    }

    /// Takes all requests.
    pub(crate) fn take(&mut self) -> Self {
        mem::replace(self, Self::new())
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_null()
    }
}

impl<D: Driver> Drop for RequestList<D> {
    fn drop(&mut self) {
        while self.pop_front().is_some() {}
    }
}

/// A tag set: the requests of a disk, one hardware queue a CPU.
#[pin_data(PinnedDrop)]
pub(crate) struct TagSet<D: Driver> {
    #[pin]
    raw: Opaque<bindings::blk_mq_tag_set>,
    /// What handlers are inside of while they run.
    handlers: Epoch,
    _driver: PhantomData<D>,
}

/// Most hardware queues, which processors share then: each has requests of its own, about 100 KiB, for
/// every device.
const HW_QUEUES_MAX: u32 = 8;

// SAFETY: Synchronised by blk-mq.
unsafe impl<D: Driver> Send for TagSet<D> {}
// SAFETY: As above.
unsafe impl<D: Driver> core::marker::Sync for TagSet<D> {}

impl<D: Driver> TagSet<D> {
    const PDU_FITS: () = {
        assert!(mem::align_of::<Pdu<D>>() <= 64);
        assert!(mem::size_of::<bindings::request>() % mem::align_of::<Pdu<D>>() == 0);
    };

    /// `depth` requests for each CPU, as far as there are queues.
    pub(crate) fn new(depth: u32) -> impl PinInit<Self, Error> {
        let () = Self::PDU_FITS;
        try_pin_init!(Self {
            // What may fail before the tag set, which nobody frees if the rest fails.
            handlers: Epoch::new()?,
            raw <- Opaque::try_ffi_init(move |p: *mut bindings::blk_mq_tag_set| {
                let set = bindings::blk_mq_tag_set {
                    ops: &Ops::<D>::TABLE,
                    // SAFETY: Set at boot.
                    nr_hw_queues: unsafe { bindings::nr_cpu_ids }.min(HW_QUEUES_MAX),
                    queue_depth: depth,
                    nr_maps: 1,
                    numa_node: bindings::NUMA_NO_NODE,
                    cmd_size: mem::size_of::<Pdu<D>>() as u32,
                    // SAFETY: No preconditions.
                    driver_data: unsafe { bindings::ploop_lock_classes_new() },
                    flags: bindings::BLK_MQ_F_NO_SCHED_BY_DEFAULT
                        | bindings::BLK_MQ_F_STACKING
                        | bindings::BLK_MQ_F_BLOCKING,
                    ..pin_init::zeroed()
                };
                // SAFETY: `p` is valid for writes.
                unsafe { p.write(set) };
                // SAFETY: Initialised just now, and pinned.
                to_result(unsafe { bindings::blk_mq_alloc_tag_set(p) }).inspect_err(|_| {
                    // SAFETY: From above; nobody else has it.
                    unsafe { bindings::ploop_lock_classes_free((*p).driver_data) }
                })
            }),
            _driver: PhantomData,
        }? Error)
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::blk_mq_tag_set {
        self.raw.get()
    }

    /// Waits until the handlers that run now have returned, `queue_rq` too. It does not wait for what
    /// else their workqueue does: that may need the disk.
    pub(super) fn wait_for_handlers(&self) {
        // SAFETY: A live tag set, which `new` has made one whose `queue_rq` may sleep.
        unsafe { bindings::ploop_wait_dispatched(self.raw.get()) };
        self.handlers.wait();
    }
}

#[pinned_drop]
impl<D: Driver> PinnedDrop for TagSet<D> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Allocated in `new`, its data too; the driver, whose part we are, is dropped after its disk.
        unsafe {
            bindings::blk_mq_free_tag_set(self.raw.get());
            bindings::ploop_lock_classes_free((*self.raw.get()).driver_data);
        }
    }
}

/// The callbacks of blk-mq. Each function is called by blk-mq only, as its contract says.
struct Ops<D>(PhantomData<D>);

impl<D: Driver> Ops<D> {
    const TABLE: bindings::blk_mq_ops = bindings::blk_mq_ops {
        queue_rq: Some(Self::queue_rq),
        complete: Some(Self::complete),
        init_hctx: Some(bindings::ploop_init_hctx),
        init_request: Some(Self::init_request),
        exit_request: Some(Self::exit_request),
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// Called by blk-mq with an idle request.
    unsafe extern "C" fn queue_rq(
        _hctx: *mut bindings::blk_mq_hw_ctx,
        bd: *const bindings::blk_mq_queue_data,
    ) -> bindings::blk_status_t {
        // SAFETY: The request is idle by the contract; it is ours once started.
        let rq = unsafe {
            bindings::blk_mq_start_request((*bd).rq);
            Request::<D>::from_raw((*bd).rq)
        };
        let driver = ptr::from_ref(rq.driver());
        // SAFETY: The disk, which keeps the driver, is not freed while blk-mq dispatches to it; what the
        // driver exchanges is only exchanged after `wait_for_handlers`.
        let driver = unsafe { &*driver };
        driver.queue_rq(rq, &Handler::new(driver));
        bindings::BLK_STS_OK as bindings::blk_status_t
    }

    /// # Safety
    ///
    /// Called by blk-mq with a request that `Request::complete` gave it.
    unsafe extern "C" fn complete(rq: *mut bindings::request) {
        // SAFETY: By the contract the request is given back to us to be ended.
        unsafe {
            let status = *(*rq.add(1).cast::<Pdu<D>>()).status.get();
            bindings::blk_mq_end_request(rq, status);
        }
    }

    /// # Safety
    ///
    /// Called by the workqueue with the item of a request that `Request::enqueue` queued.
    unsafe extern "C" fn work(work: *mut bindings::work_struct) {
        // SAFETY: The item is the first field of the `Pdu`, which follows its request; that is
        // ours by the contract.
        let rq = unsafe { Request::<D>::from_raw(work.cast::<bindings::request>().sub(1)) };
        let bio = field!(rq, bio);
        let driver = ptr::from_ref(rq.driver());
        let mut scope = bindings::ploop_io_scope::default();
        // SAFETY: A bio of an owned request, or null; ended below on the same task.
        unsafe { bindings::ploop_io_enter(&mut scope, bio) };
        // SAFETY: The driver is not dropped before its workqueue is flushed; see `free_disk`.
        let driver = unsafe { &*driver };
        let handlers = &driver.tags().handlers;
        let idx = handlers.enter();
        driver.run(rq, &Handler::new(driver));
        // SAFETY: From `enter` above, used once.
        unsafe { handlers.leave(idx) };
        // SAFETY: Entered above.
        unsafe { bindings::ploop_io_leave(&mut scope) };
    }

    /// # Safety
    ///
    /// Called by blk-mq once for each request of a tag set, before its first use.
    unsafe extern "C" fn init_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        _hctx_idx: c_uint,
        _numa_node: c_int,
    ) -> c_int {
        // SAFETY: `cmd_size` zeroed bytes follow the request, aligned as `PDU_FITS` says; they
        // stay in place.
        unsafe {
            let pdu = rq.add(1).cast::<Pdu<D>>();
            bindings::init_work_with_key(
                (*pdu).work.get(),
                Some(Self::work),
                false,
                c"ploop request".as_char_ptr(),
                static_lock_class!().as_ptr(),
            );
            (&raw mut (*pdu).epoch).write(UnsafeCell::new(OUTSIDE));
            (&raw mut (*pdu).segments).write(UnsafeCell::new(KVec::new()));
            (&raw mut (*pdu).user).write(UnsafeCell::new(D::new_pdu()));
        }
        0
    }

    /// # Safety
    ///
    /// Called by blk-mq once for each request that `init_request` saw, after its last use.
    unsafe extern "C" fn exit_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        _hctx_idx: c_uint,
    ) {
        // SAFETY: Written by `init_request`.
        unsafe {
            let pdu = rq.add(1).cast::<Pdu<D>>();
            ptr::drop_in_place(&raw mut (*pdu).segments);
            ptr::drop_in_place(&raw mut (*pdu).user);
        }
    }
}

/// Marks the current task as one that does I/O for a device on its own account, such as index
/// writes: memory it allocates is never got by starting other I/O.
pub(crate) fn noio<R>(f: impl FnOnce() -> R) -> R {
    let mut scope = bindings::ploop_io_scope::default();
    // SAFETY: No bio; ended below on the same task.
    unsafe { bindings::ploop_io_enter(&mut scope, ptr::null_mut()) };
    let r = f();
    // SAFETY: Entered above.
    unsafe { bindings::ploop_io_leave(&mut scope) };
    r
}

// SPDX-License-Identifier: GPL-2.0
//! The blocks of a file on the device below its file system, and a request's I/O straight to them.

use super::{
    bindings,
    epoch::Epoch,
    file::File,
    mq::{Driver, Op, Request},
    FILES,
};
use core::{ffi::c_void, ptr::NonNull};
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        Arc,
    },
    types::ScopeGuard,
};

/// What makes a file durable: how many syncs of it, and flushes of its device alone, have begun, and how
/// many of them have succeeded.
///
/// A device may report what it lost but once, and to any of those that are on their way. So one of them
/// that has succeeded counts only if all others that have begun have, too.
pub(crate) struct Syncs {
    begun: Atomic<u64>,
    succeeded: Atomic<u64>,
    /// One has failed, and what it was told nobody else is.
    is_lost: Atomic<bool>,
}

impl Syncs {
    /// None so far.
    pub(crate) fn new() -> Self {
        Self {
            begun: Atomic::new(0),
            succeeded: Atomic::new(0),
            is_lost: Atomic::new(false),
        }
    }

    /// One begins.
    pub(crate) fn begins(&self) {
        self.begun.fetch_add(1, Full);
    }

    /// One that has begun has succeeded, or it has told the caller alone why not.
    pub(crate) fn succeeds(&self) {
        self.succeeded.fetch_add(1, Full);
    }

    /// One that has begun has failed.
    pub(crate) fn fails(&self) {
        self.is_lost.store(true, Release);
    }

    /// What failed was of another image: none is on its way.
    pub(crate) fn begin_anew(&self) {
        self.succeeded.store(self.begun.load(Acquire), Release);
        self.is_lost.store(false, Release);
    }

    /// Whether one has failed: what was written before may be gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost.load(Acquire)
    }

    /// Whether all that have begun have succeeded.
    pub(crate) fn are_all_done(&self) -> bool {
        // In this order: never more than have begun.
        let succeeded = self.succeeded.load(Acquire);
        self.begun.load(Acquire) == succeeded
    }
}

/// A file whose blocks stay where they are, but for what we ourselves do to the file: nobody else
/// can write, cut or move it until [`Self::release`].
///
/// # Invariants
///
/// `file` is a live file, to which we own a reference, and `device` the device that has its blocks,
/// which lives as long. `treatment` is only compared. I/O to the device is inside `users` and ends
/// before it leaves; it begins only while `is_held`, which is when nobody else has write access to
/// the file.
pub(crate) struct Blocks {
    file: NonNull<bindings::file>,
    device: NonNull<bindings::block_device>,
    /// How the file system treated the file's data when it was taken hold of.
    treatment: *const c_void,
    users: Epoch,
    syncs: Arc<Syncs>,
    is_held: Atomic<bool>,
    /// Somebody has written since the last look.
    was_written: Atomic<bool>,
}

// SAFETY: Files and block devices are reference counted and internally synchronised.
unsafe impl Send for Blocks {}
// SAFETY: As above.
unsafe impl Sync for Blocks {}

impl File {
    /// Whether its file system is one whose blocks can be reached past it.
    pub(crate) fn has_blocks(&self) -> bool {
        // SAFETY: A live file by the invariant.
        !unsafe { bindings::ploop_file_bdev(self.as_ptr().as_ptr()) }.is_null()
    }

    /// Takes hold of the blocks; `syncs` are those of the file. EOPNOTSUPP if the file system does not
    /// fit, ETXTBSY if somebody else has the file open for writing, or for reading this one a writer.
    pub(crate) fn hold_blocks(&self, syncs: Arc<Syncs>) -> Result<Blocks> {
        // SAFETY: A live file by the invariant.
        let device = unsafe { bindings::ploop_file_bdev(self.as_ptr().as_ptr()) };
        let device = NonNull::new(device).ok_or(super::Errno::OpNotSupp.error())?;
        // SAFETY: As above.
        to_result(unsafe { bindings::ploop_file_deny_writers(self.as_ptr().as_ptr()) })?;
        let allow = ScopeGuard::new(|| {
            // SAFETY: As above; denied just now.
            unsafe { bindings::ploop_file_allow_writers(self.as_ptr().as_ptr()) };
        });
        // SAFETY: As above.
        let treatment = unsafe { bindings::ploop_file_treatment(self.as_ptr().as_ptr()) };
        // Asked anew, after that: without direct I/O it may journal the data.
        if self.direct_align().is_none() {
            return Err(super::Errno::OpNotSupp.error());
        }
        let users = Epoch::new()?;
        allow.dismiss();
        // SAFETY: As above.
        unsafe { bindings::ploop_get_file(self.as_ptr().as_ptr()) };
        FILES.add();
        // INVARIANT: The reference is ours; an open file keeps its file system and that its device;
        // writers are denied just now.
        Ok(Blocks {
            file: self.as_ptr(),
            device,
            treatment,
            users,
            syncs,
            is_held: Atomic::new(true),
            was_written: Atomic::new(false),
        })
    }
}

impl Blocks {
    /// The device's sector of byte `pos` of the file, a multiple of 4096. `None` if there is none, or
    /// if what it has does not count yet. May sleep.
    pub(crate) fn find(&self, pos: u64) -> Option<u64> {
        let mut sector = 0;
        // SAFETY: A live file by the invariant.
        let ret = unsafe { bindings::ploop_file_bmap(self.file.as_ptr(), pos, &mut sector) };
        (ret == 0 && sector != 0).then_some(sector)
    }

    /// Whether [`Self::release`] has not been called.
    pub(crate) fn is_held(&self) -> bool {
        self.is_held.load(Relaxed)
    }

    /// Enters: what was looked up holds until the guard is dropped or its I/O is done. `None` after
    /// [`Self::release`].
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let idx = self.users.enter();
        let inside = Inside { blocks: self, idx };
        self.is_held.load(Relaxed).then_some(inside)
    }

    /// Waits until all who are inside now have left. The caller must not be inside.
    pub(crate) fn wait(&self) {
        self.users.wait();
    }

    /// Lets others write the file again, once nobody is inside any more. Tells the file system what
    /// it did not see.
    pub(crate) fn release(&self) {
        if !self.is_held.xchg(false, Full) {
            return;
        }
        self.users.wait();
        // SAFETY: A live file by the invariant; writers were denied as long as `is_held`.
        unsafe {
            if self.was_written.load(Relaxed) {
                bindings::ploop_file_was_written(self.file.as_ptr());
            }
            bindings::ploop_file_allow_writers(self.file.as_ptr());
        }
    }

    fn is_cached(&self, pos: u64, len: usize) -> bool {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_file_is_cached(self.file.as_ptr(), pos, len as u64) }
    }

    /// Whether the page cache has been filled with what was at byte `pos` of the file, while it was
    /// being written. Before [`Self::done`].
    ///
    /// # Safety
    ///
    /// As of [`Self::done`].
    pub(super) unsafe fn is_stale(blocks: *const Self, pos: u64, len: usize) -> bool {
        // SAFETY: It lives until the last who is inside has left.
        unsafe { &*blocks }.is_cached(pos, len)
    }

    /// A flush of the device has ended; whether it has succeeded and counts, see [`Syncs`]. Before
    /// [`Self::done`].
    ///
    /// # Safety
    ///
    /// As of [`Self::done`].
    pub(super) unsafe fn flushed(blocks: *const Self, status: bindings::blk_status_t) -> bool {
        // SAFETY: It lives until the last who is inside has left.
        let this = unsafe { &*blocks };
        // What was not begun has lost nothing.
        match status == 0 || status == bindings::BLK_STS_AGAIN {
            true => this.syncs.succeeds(),
            false => this.syncs.fails(),
        }
        status == 0 && this.syncs.are_all_done()
    }

    /// Ends what [`Inside::submit`] or [`Inside::flush`] began.
    ///
    /// # Safety
    ///
    /// `blocks` and `idx` are what it stored, and the I/O is done; once.
    pub(super) unsafe fn done(blocks: *const Self, idx: i32, op: Op) {
        // SAFETY: It lives until the last who is inside has left.
        let this = unsafe { &*blocks };
        if op == Op::Write {
            // SAFETY: A live file by the invariant; begun by `submit`.
            unsafe { bindings::ploop_file_end_write(this.file.as_ptr()) };
        }
        // SAFETY: From `enter`, by the contract used once.
        unsafe { this.users.leave(idx) };
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.release();
        // Also those that found it released.
        self.users.wait();
        // SAFETY: We own a reference by the invariant.
        unsafe { bindings::fput(self.file.as_ptr()) };
        FILES.sub();
    }
}

/// Keeps blocks where they are: who changes that waits for it.
pub(crate) struct Inside<'a> {
    blocks: &'a Blocks,
    idx: i32,
}

impl Inside<'_> {
    /// Moves a request's data to or from the device, from `sector` on, where byte `pos` of the file
    /// is. The request comes back through [`Driver::io_done`], perhaps before this returns; or at
    /// once, if its memory cannot be had, if the caller's plug keeps requests that it may have to wait
    /// for, if the page cache may have something newer, and a write also if the file system is frozen
    /// or the page cache has what was there. May sleep.
    pub(crate) fn submit<D: Driver>(
        self,
        rq: Request<D>,
        pos: u64,
        sector: u64,
    ) -> Option<Request<D>> {
        let (blocks, idx) = (self.blocks, self.idx);
        let is_write = rq.op() == Op::Write;
        let (file, len) = (blocks.file.as_ptr(), rq.len() as u64);
        // SAFETY: A live file by the invariant; a write that begins is ended by `done`.
        let may_go = unsafe {
            bindings::ploop_has_stack()
                && !bindings::ploop_plug_has_others(rq.queue())
                && bindings::ploop_file_begin_bios(file, blocks.treatment, pos, len, is_write)
        };
        if !may_go {
            return Some(rq);
        }
        if is_write && !blocks.was_written.load(Relaxed) {
            blocks.was_written.store(true, Relaxed);
        }
        core::mem::forget(self);
        let op = rq.op();
        // SAFETY: The device has the file's blocks and lives until we have left, which is when the
        // I/O is done.
        let rq = unsafe { rq.submit_bios(blocks, idx, blocks.device.as_ptr(), pos, sector) }?;
        // SAFETY: No I/O has begun.
        unsafe { Blocks::done(blocks, idx, op) };
        Some(rq)
    }

    /// Asks the device to make durable what was written to it. The request comes back through
    /// [`Driver::io_done`]: with EAGAIN if that does not count, see [`Syncs`]; or at once, for reasons that
    /// [`Self::submit`] has.
    pub(crate) fn flush<D: Driver>(self, rq: Request<D>) -> Option<Request<D>> {
        let (blocks, idx) = (self.blocks, self.idx);
        let file = blocks.file.as_ptr();
        // SAFETY: A live file by the invariant; no write begins.
        let may_go = unsafe {
            bindings::ploop_has_stack()
                && !bindings::ploop_plug_has_others(rq.queue())
                && bindings::ploop_file_begin_bios(file, blocks.treatment, 0, 0, false)
        };
        if !may_go {
            return Some(rq);
        }
        core::mem::forget(self);
        blocks.syncs.begins();
        // SAFETY: The device lives until we have left, which is when the I/O is done; `flushed` is told.
        unsafe { rq.submit_flush(blocks, idx, blocks.device.as_ptr()) };
        None
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // SAFETY: From `enter`, used once: `submit` forgets the guard.
        unsafe { self.blocks.users.leave(self.idx) };
    }
}

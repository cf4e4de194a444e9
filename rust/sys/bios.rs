// SPDX-License-Identifier: GPL-2.0
//! A request's bios, cloned and sent to another device.

use super::{
    bindings,
    blocks::Blocks,
    mq::{Driver, Op, Pdu, Request},
};
use core::ptr;
use kernel::{
    prelude::*,
    sync::atomic::{Full, Relaxed},
};

/// What a clone must not have of its request: flushes and durable writes are handled above, and who
/// polls does not know the device.
const DROPPED: bindings::blk_opf_t =
    bindings::REQ_FUA | bindings::REQ_PREFLUSH | bindings::REQ_POLLED;
/// The same of the clone in the request, whose memory belongs to no cache.
const DROPPED_OF_OWN: bindings::blk_opf_t = DROPPED | bindings::REQ_ALLOC_CACHE;

impl<D: Driver> Request<D> {
    /// Sends clones of the request's bios to `device`, from `sector` on, where byte `pos` of a file
    /// is. The request comes back through [`Driver::io_done`], after [`Blocks::done`] was called with
    /// `blocks` and `idx`; or at once, if there is no memory for clones. The first one needs none.
    ///
    /// # Safety
    ///
    /// `device` lives until then, and the sectors may be read or written.
    pub(super) unsafe fn submit_bios(
        self,
        blocks: *const Blocks,
        idx: i32,
        device: *mut bindings::block_device,
        pos: u64,
        sector: u64,
    ) -> Option<Self> {
        let pdu = self.raw_pdu();
        let (mut bio, mut nr, mut at) = (self.first_bio(), 0, sector);
        let mut list: *mut bindings::bio = ptr::null_mut();
        let mut tail: *mut *mut bindings::bio = &mut list;
        while !bio.is_null() {
            // SAFETY: A bio of a request that we own; the first clone's memory is ours until its I/O
            // is done.
            let clone = unsafe {
                if nr == 0 {
                    let own = (*pdu).bio.get().cast();
                    let ret = bindings::bio_init_clone(device, own, bio, bindings::GFP_NOWAIT);
                    if ret == 0 {
                        own
                    } else {
                        ptr::null_mut()
                    }
                } else {
                    let set = &raw mut bindings::fs_bio_set;
                    bindings::bio_alloc_clone(device, bio, bindings::GFP_NOWAIT, set)
                }
            };
            if clone.is_null() {
                // SAFETY: Clones of ours that were not submitted.
                unsafe { Self::put_clones(list) };
                return Some(self);
            }
            // SAFETY: A clone of ours, not submitted yet.
            unsafe {
                (*clone).bi_opf &= if nr == 0 { !DROPPED_OF_OWN } else { !DROPPED };
                (*clone).bi_iter.bi_sector = at;
                (*clone).bi_end_io = Some(Self::bio_done);
                (*clone).bi_private = pdu.cast();
                *tail = clone;
                tail = &raw mut (*clone).bi_next;
                at += u64::from((*clone).bi_iter.bi_size >> bindings::SECTOR_SHIFT);
                bio = (*bio).bi_next;
            }
            nr += 1;
        }
        // SAFETY: Complete bios, whose memory lives until they are done.
        unsafe { self.submit_list(list, nr, (blocks, idx, pos)) };
        None
    }

    /// Asks `device` to make durable what was written to it, without waiting for a tag. The request comes
    /// back as from [`Self::submit_bios`].
    ///
    /// # Safety
    ///
    /// `device` lives until then; `blocks` was entered with `idx` for this flush, which has begun in its
    /// [`Syncs`](super::blocks::Syncs).
    pub(super) unsafe fn submit_flush(
        self,
        blocks: *const Blocks,
        idx: i32,
        device: *mut bindings::block_device,
    ) {
        let pdu = self.raw_pdu();
        // The worker that issues flushes may be the one that they end on.
        let flags = bindings::req_op_REQ_OP_WRITE | bindings::REQ_PREFLUSH | bindings::REQ_NOWAIT;
        // SAFETY: We own the request, so the bio in its `Pdu` too; it has no data.
        let bio = unsafe {
            let bio: *mut bindings::bio = (*pdu).bio.get().cast();
            bindings::bio_init(bio, device, ptr::null_mut(), 0, flags);
            (*bio).bi_end_io = Some(Self::bio_done);
            (*bio).bi_private = pdu.cast();
            bio
        };
        // SAFETY: A complete bio, whose memory lives until it is done.
        unsafe { self.submit_list(bio, 1, (blocks, idx, 0)) };
    }

    /// # Safety
    ///
    /// `list` are `nr` bios with [`Self::bio_done`] for this request, and `entered` is what that is to
    /// leave.
    unsafe fn submit_list(
        self,
        list: *mut bindings::bio,
        nr: i32,
        entered: (*const Blocks, i32, u64),
    ) {
        let pdu = self.raw_pdu();
        // SAFETY: We own the request, so its `Pdu` too.
        unsafe {
            *(*pdu).blocks.get() = entered;
            *(*pdu).status.get() = 0;
            (*pdu).io_refs.store(nr, Relaxed);
        }
        // From here the request is the I/O's.
        let _ = self.into_raw();
        // SAFETY: By the contract.
        unsafe { bindings::ploop_submit_bios(list) };
    }

    /// # Safety
    ///
    /// `list` are clones of a request's bios, the first of which is in the request; nobody else has
    /// them.
    unsafe fn put_clones(mut list: *mut bindings::bio) {
        let first = list;
        while !list.is_null() {
            // SAFETY: By the contract.
            unsafe {
                let next = (*list).bi_next;
                if ptr::eq(list, first) {
                    bindings::bio_uninit(list);
                } else {
                    bindings::bio_put(list);
                }
                list = next;
            }
        }
    }

    /// # Safety
    ///
    /// Called by the block layer once for each clone that was submitted.
    unsafe extern "C" fn bio_done(bio: *mut bindings::bio) {
        // SAFETY: By the contract a clone of ours, with the `Pdu` of a request that is in I/O.
        let (pdu, is_last) = unsafe {
            let pdu = (*bio).bi_private.cast::<Pdu<D>>();
            let status = (*bio).bi_status;
            if status != 0 {
                // Any of several errors.
                (&raw mut *(*pdu).status.get()).write_volatile(status);
            }
            if ptr::eq(bio, (*pdu).bio.get().cast()) {
                bindings::bio_uninit(bio);
            } else {
                bindings::bio_put(bio);
            }
            (pdu, (*pdu).io_refs.fetch_sub(1, Full) == 1)
        };
        if !is_last {
            return;
        }
        // SAFETY: Nobody else refers to the I/O: the request is ours again. `Pdu` follows it. `blocks`
        // was stored with the I/O, which is done.
        let (rq, status, is_unsure) = unsafe {
            let rq = Self::from_raw(pdu.cast::<bindings::request>().sub(1));
            let (blocks, idx, pos) = *(*pdu).blocks.get();
            let (status, mut is_unsure) = (*(*pdu).status.get(), false);
            match rq.op() {
                Op::Write => *(*pdu).is_stale.get() = Blocks::is_stale(blocks, pos, rq.len()),
                Op::Flush => is_unsure = !Blocks::flushed(blocks, status),
                Op::Read | Op::Discard | Op::WriteZeroes | Op::Other => {}
            }
            Blocks::done(blocks, idx, rq.op());
            (rq, status, is_unsure)
        };
        let result = match status {
            0 if is_unsure => Err(EAGAIN),
            0 => Ok(rq.len()),
            // SAFETY: A pure function.
            status => Err(Error::from_errno(unsafe {
                bindings::blk_status_to_errno(status)
            })),
        };
        D::io_done(rq, result);
    }
}

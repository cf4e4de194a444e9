// SPDX-License-Identifier: GPL-2.0
//! The memory segments of a request's bios.

use super::{bindings, compat};
use core::marker::PhantomData;

/// Iterates over the segments of a chain of bios, as `rq_for_each_bvec` does.
pub(super) struct Segments<'a> {
    bio: *mut bindings::bio,
    iter: bindings::bvec_iter,
    _owner: PhantomData<&'a ()>,
}

impl<'a> Segments<'a> {
    /// The segments of `bio` and its followers.
    ///
    /// # Safety
    ///
    /// The chain stays valid and is not advanced for `'a`.
    pub(super) unsafe fn new(bio: *mut bindings::bio) -> Self {
        let iter = if bio.is_null() {
            pin_init::zeroed()
        } else {
            // SAFETY: Valid by the contract.
            unsafe { (&raw const (*bio).bi_iter).read() }
        };
        Self {
            bio,
            iter,
            _owner: PhantomData,
        }
    }

    /// Skips `bytes` from the front, within segments too.
    pub(super) fn skip_bytes(self, bytes: usize) -> impl Iterator<Item = bindings::bio_vec> + 'a {
        let mut left = bytes;
        self.filter_map(move |mut seg| {
            let skip = left.min(seg.bv_len as usize);
            left -= skip;
            // At most `bv_len`.
            seg.bv_offset += skip as u32;
            seg.bv_len -= skip as u32;
            (seg.bv_len > 0).then_some(seg)
        })
    }
}

impl Iterator for Segments<'_> {
    type Item = bindings::bio_vec;

    fn next(&mut self) -> Option<bindings::bio_vec> {
        while !self.bio.is_null() && self.iter.bi_size == 0 {
            // SAFETY: A valid chain by the contract of `new`, which holds for the rest of it too.
            *self = unsafe { Self::new((*self.bio).bi_next) };
        }
        if self.bio.is_null() {
            return None;
        }
        // SAFETY: `bi_idx` is within the vector while `bi_size` is not zero.
        let seg = unsafe { (*self.bio).bi_io_vec.add(self.iter.bi_idx as usize).read() };
        let done = *compat::segment_done(&mut self.iter);
        let len = self.iter.bi_size.min(seg.bv_len - done);
        self.iter.bi_size -= len;
        if done + len == seg.bv_len {
            self.iter.bi_idx += 1;
            *compat::segment_done(&mut self.iter) = 0;
        } else {
            *compat::segment_done(&mut self.iter) = done + len;
        }
        Some(bindings::bio_vec {
            bv_page: seg.bv_page,
            bv_len: len,
            bv_offset: seg.bv_offset + done,
        })
    }
}

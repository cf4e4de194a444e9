// SPDX-License-Identifier: GPL-2.0
//! Page buffers for metadata I/O.

use super::{bindings, PAGES};
use core::{ops::Range, ptr::NonNull};
use kernel::prelude::*;

/// Bytes of a page of a [`PageBuf`]; also of an index page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A number of zeroed pages, only ours, that files can be read into and written from directly,
/// without allocating any more memory.
///
/// # Invariants
///
/// Each pointer is a page of ours, mapped in the kernel, that nobody else refers to; the segments
/// are those pages, whole and in the same order.
pub(crate) struct PageBuf {
    pages: KVec<NonNull<[u8; PAGE_BYTES]>>,
    segments: KVec<bindings::bio_vec>,
}

// SAFETY: The pages are owned, like a box's.
unsafe impl Send for PageBuf {}
// SAFETY: As above; shared access only reads.
unsafe impl Sync for PageBuf {}

impl PageBuf {
    /// `nr` zeroed pages.
    pub(crate) fn new(nr: usize) -> Result<Self> {
        let mut buf = Self {
            pages: KVec::with_capacity(nr, GFP_KERNEL)?,
            segments: KVec::with_capacity(nr, GFP_KERNEL)?,
        };
        for _ in 0..nr {
            let page = zeroed_page(bindings::GFP_KERNEL)?;
            // INVARIANT: A new page, in the kernel's mapping, known only to us. There is room.
            buf.pages.push(page, GFP_KERNEL)?;
            let segment = bindings::bio_vec {
                // SAFETY: In the kernel's mapping.
                bv_page: unsafe { bindings::ploop_virt_to_page(page.as_ptr().cast()) },
                bv_len: PAGE_BYTES as u32,
                bv_offset: 0,
            };
            // INVARIANT: That page. There is room.
            buf.segments.push(segment, GFP_KERNEL)?;
        }
        Ok(buf)
    }

    /// How many pages.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Page `idx`.
    pub(crate) fn page(&self, idx: usize) -> Option<&[u8; PAGE_BYTES]> {
        // SAFETY: Ours by the invariant; borrowed as `self` is.
        self.pages.get(idx).map(|p| unsafe { p.as_ref() })
    }

    /// Page `idx`, to be changed.
    pub(crate) fn page_mut(&mut self, idx: usize) -> Option<&mut [u8; PAGE_BYTES]> {
        // SAFETY: Ours by the invariant; borrowed as `self` is.
        self.pages.get_mut(idx).map(|p| unsafe { p.as_mut() })
    }

    /// Pages as segments for I/O.
    pub(super) fn segments(&self, range: Range<usize>) -> Option<&[bindings::bio_vec]> {
        self.segments.get(range)
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        for page in &self.pages {
            // SAFETY: Ours by the invariant; no reference is left.
            unsafe { put_page(*page) };
        }
    }
}

/// A new page of zeros in the kernel's mapping, with one reference.
pub(super) fn zeroed_page<T>(flags: u32) -> Result<NonNull<T>> {
    const { assert!(size_of::<T>() == PAGE_BYTES) };
    // SAFETY: No preconditions; the flags are the caller's.
    let addr = unsafe { bindings::get_zeroed_page_noprof(flags) };
    let page = NonNull::new(addr as *mut T).ok_or(ENOMEM)?;
    PAGES.add();
    Ok(page)
}

/// Takes another reference to a page.
///
/// # Safety
///
/// `page` is of [`zeroed_page`], and a reference to it is left.
pub(super) unsafe fn get_page<T>(page: NonNull<T>) {
    // SAFETY: A live page by the contract.
    unsafe { bindings::ploop_page_get(page.as_ptr().cast()) };
    PAGES.add();
}

/// Gives up a reference to a page, which is freed with the last.
///
/// # Safety
///
/// `page` is of [`zeroed_page`] and the caller has a reference to it.
pub(super) unsafe fn put_page<T>(page: NonNull<T>) {
    // SAFETY: By the contract.
    unsafe { bindings::free_pages(page.as_ptr() as usize, 0) };
    PAGES.sub();
}

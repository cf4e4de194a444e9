// SPDX-License-Identifier: GPL-2.0
//! A sparse array of atomic words, read without locks.

use super::PAGES;
use core::ptr;
use kernel::{
    alloc::KVVec,
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full, Relaxed},
};

const PAGE_WORDS: usize = 512;

type Page = [Atomic<u64>; PAGE_WORDS];

/// Words 0 to `len`, all zero at first. Memory exists only where a word was asked for by
/// [`Self::get_or_alloc`], in pages that stay until the array is dropped; so a reference to a word
/// is good for as long as the array, and readers need no lock.
///
/// # Invariants
///
/// Each non-null pointer is a `Page` from `KBox::into_raw`, never replaced or freed before drop.
pub(crate) struct SparseWords {
    pages: KVVec<Atomic<*mut Page>>,
    len: u64,
    nr_allocated: Atomic<i64>,
}

// SAFETY: All words are atomic; the pages are owned.
unsafe impl Send for SparseWords {}
// SAFETY: As above.
unsafe impl Sync for SparseWords {}

impl SparseWords {
    /// Bytes of the directory of an array of `len` words.
    pub(crate) fn directory_bytes(len: u64) -> u64 {
        len.div_ceil(PAGE_WORDS as u64) * size_of::<usize>() as u64
    }

    /// An array of `len` zero words.
    pub(crate) fn new(len: u64) -> Result<Self> {
        let nr = usize::try_from(len.div_ceil(PAGE_WORDS as u64)).map_err(|_| ENOMEM)?;
        let mut pages = KVVec::with_capacity(nr, GFP_KERNEL)?;
        for _ in 0..nr {
            pages.push(Atomic::new(ptr::null_mut()), GFP_KERNEL)?;
        }
        Ok(Self {
            pages,
            len,
            nr_allocated: Atomic::new(0),
        })
    }

    /// Word `idx`, if its page exists; else it is zero.
    pub(crate) fn get(&self, idx: u32) -> Option<&Atomic<u64>> {
        let page = self.pages.get(idx as usize / PAGE_WORDS)?.load(Acquire);
        if page.is_null() {
            return None;
        }
        // SAFETY: A live page by the invariant.
        unsafe { (*page).get(idx as usize % PAGE_WORDS) }
    }

    /// Word `idx`, with its page made if needed. `None` out of range is an error as well.
    pub(crate) fn get_or_alloc(&self, idx: u32) -> Result<&Atomic<u64>> {
        if let Some(word) = self.get(idx) {
            return Ok(word);
        }
        let entry = self.pages.get(idx as usize / PAGE_WORDS).ok_or(ERANGE)?;
        let new = KBox::init(
            pin_init::init_array_from_fn(|_| Ok::<_, Error>(Atomic::new(0u64))),
            GFP_KERNEL,
        );
        let new: *mut Page = KBox::into_raw(new?);
        // INVARIANT: From `KBox::into_raw`; set once.
        match entry.cmpxchg(ptr::null_mut(), new, Full) {
            Ok(_) => {
                PAGES.add();
                self.nr_allocated.add(1, Relaxed);
            }
            // SAFETY: Somebody else was first; ours was never shared.
            Err(_) => drop(unsafe { KBox::from_raw(new) }),
        }
        self.get(idx).ok_or(ERANGE)
    }

    /// How many words.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Pages that exist.
    pub(crate) fn nr_pages(&self) -> i64 {
        self.nr_allocated.load(Relaxed)
    }
}

impl Drop for SparseWords {
    fn drop(&mut self) {
        for entry in &self.pages {
            let page = entry.load(Acquire);
            if !page.is_null() {
                // SAFETY: From `KBox::into_raw` by the invariant; no reader is left.
                drop(unsafe { KBox::from_raw(page) });
                PAGES.sub();
            }
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! A sparse array of atomic words, read without locks.

use super::{bindings, pages};
use core::{
    mem,
    ptr::{self, NonNull},
};
use kernel::{
    alloc::KVVec,
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full, Relaxed},
};

const PAGE_WORDS: usize = 512;
/// Pages kept for when memory is short.
const RESERVE: usize = 16;

type Words = [Atomic<u64>; PAGE_WORDS];

/// A reference to a page of words, which arrays may share: a whole page of memory, as a box of it with a
/// count would take two.
///
/// # Invariants
///
/// The pointer is a page in the kernel's mapping with nothing but words, and one of its references is ours.
struct Page(NonNull<Words>);

impl Page {
    /// A page of zeros.
    fn new(flags: u32) -> Result<Self> {
        // INVARIANT: A new page; zeros are words.
        Ok(Self(pages::zeroed_page(flags)?))
    }

    /// The reference, to be given to [`Self::from_raw`].
    fn into_raw(self) -> *mut Words {
        let words = self.0.as_ptr();
        mem::forget(self);
        words
    }

    /// # Safety
    ///
    /// `words` is of [`Self::into_raw`], once; or null.
    unsafe fn from_raw(words: *mut Words) -> Option<Self> {
        // INVARIANT: By the contract.
        NonNull::new(words).map(Self)
    }

    /// Another reference to a page; `None` for null.
    ///
    /// # Safety
    ///
    /// `words` is of [`Self::into_raw`], and that reference stays meanwhile; or null.
    unsafe fn share(words: *mut Words) -> Option<Self> {
        let words = NonNull::new(words)?;
        // SAFETY: By the contract.
        unsafe { pages::get_page(words) };
        // INVARIANT: Taken just now.
        Some(Self(words))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: Our reference by the invariant.
        unsafe { pages::put_page(self.0) };
    }
}

/// Words 0 to `len`, all zero at first. Memory exists only where a word was asked for by
/// [`Self::get_or_alloc`], in pages that stay until the array is dropped; so a reference to a word
/// is good for as long as the array, and readers need no lock.
///
/// # Invariants
///
/// Each non-null pointer, of the reserve too, came from [`Page::into_raw`], and that reference is ours until drop; it is
/// never replaced.
pub(crate) struct SparseWords {
    pages: KVVec<Atomic<*mut Words>>,
    len: u64,
    nr_allocated: Atomic<i64>,
    /// For when memory is so short that getting some would wait for I/O.
    reserve: [Atomic<*mut Words>; RESERVE],
}

// SAFETY: All words are atomic; the pages are reference counted.
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
            reserve: [const { Atomic::new(ptr::null_mut()) }; RESERVE],
        })
    }

    /// Word `idx`, if its page exists; else it is zero.
    pub(crate) fn get(&self, idx: u32) -> Option<&Atomic<u64>> {
        self.page(idx as usize / PAGE_WORDS)?
            .get(idx as usize % PAGE_WORDS)
    }

    /// Word `idx`, with its page made if needed. `None` out of range is an error as well.
    pub(crate) fn get_or_alloc(&self, idx: u32) -> Result<&Atomic<u64>> {
        if let Some(word) = self.get(idx) {
            return Ok(word);
        }
        let entry = self.pages.get(idx as usize / PAGE_WORDS).ok_or(ERANGE)?;
        if set_once(entry, self.new_page()?) {
            self.nr_allocated.add(1, Relaxed);
        }
        self.get(idx).ok_or(ERANGE)
    }

    /// Stores words from `first` on, with their pages made if needed; those out of range are left out.
    /// Nobody else may be changing them.
    pub(crate) fn fill(&self, first: u32, words: impl ExactSizeIterator<Item = u64>) -> Result {
        let (mut words, mut at) = (words, first);
        while words.len() > 0 && u64::from(at) < self.len {
            self.get_or_alloc(at)?;
            let page = self.page(at as usize / PAGE_WORDS).ok_or(ERANGE)?;
            let room = page.get(at as usize % PAGE_WORDS..).ok_or(ERANGE)?;
            let before = words.len();
            // Not the other way round: that would take a word for which there is no room.
            for (place, word) in room.iter().zip(&mut words) {
                place.store(word, Relaxed);
            }
            at = at.saturating_add((before - words.len()) as u32);
        }
        Ok(())
    }

    fn page(&self, idx: usize) -> Option<&Words> {
        let page = self.pages.get(idx)?.load(Acquire);
        // SAFETY: A live page by the invariant, or null.
        unsafe { page.as_ref() }
    }

    /// An array of `len` words, not fewer, that shares the pages that exist now: the same words.
    pub(crate) fn extended(&self, len: u64) -> Result<Self> {
        let new = Self::new(len.max(self.len))?;
        new.share(self);
        Ok(new)
    }

    /// Shares the pages of `other` where there are none yet.
    pub(crate) fn share(&self, other: &Self) {
        for (from, to) in other.pages.iter().zip(&self.pages) {
            if !to.load(Relaxed).is_null() {
                continue;
            }
            // SAFETY: From `Page::into_raw` by the invariant, and a reference that `other` keeps.
            let page = unsafe { Page::share(from.load(Acquire)) };
            if page.is_some_and(|page| set_once(to, page)) {
                self.nr_allocated.add(1, Relaxed);
            }
        }
    }

    /// A page for who is in a request's way: at once, or from the reserve, or by waiting.
    fn new_page(&self) -> Result<Page> {
        if let Ok(page) = Page::new(bindings::GFP_NOWAIT | bindings::__GFP_NOWARN) {
            return Ok(page);
        }
        for place in &self.reserve {
            let page = place.xchg(ptr::null_mut(), Full);
            // SAFETY: From `Page::into_raw` by the invariant, or null; it is not in the reserve any more.
            if let Some(page) = unsafe { Page::from_raw(page) } {
                return Ok(page);
            }
        }
        Page::new(bindings::GFP_KERNEL)
    }

    /// Fills the reserve. May wait for memory, so not in a request's way.
    pub(crate) fn refill(&self) {
        for place in &self.reserve {
            if !place.load(Relaxed).is_null() {
                continue;
            }
            let Ok(page) = Page::new(bindings::GFP_KERNEL) else {
                return;
            };
            set_once(place, page);
        }
    }

    /// Calls `f` for every word that has memory.
    pub(crate) fn for_each(&self, mut f: impl FnMut(u32, &Atomic<u64>)) {
        for idx in 0..self.pages.len() {
            let Some(page) = self.page(idx) else { continue };
            // The last index of all is that of the last word.
            for (word, nr) in page.iter().zip((idx * PAGE_WORDS) as u32..=u32::MAX) {
                f(nr, word);
            }
        }
    }

    /// The first word from `from` on that `is_wanted` says is.
    pub(crate) fn find(&self, from: u32, is_wanted: impl Fn(u64) -> bool) -> Option<u32> {
        let first = from as usize / PAGE_WORDS;
        for idx in first..self.pages.len() {
            let Some(page) = self.page(idx) else { continue };
            let skip = if idx == first {
                from as usize % PAGE_WORDS
            } else {
                0
            };
            let found = page
                .iter()
                .skip(skip)
                .position(|w| is_wanted(w.load(Acquire)));
            if let Some(at) = found {
                return u32::try_from(idx * PAGE_WORDS + skip + at).ok();
            }
        }
        None
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
        for entry in Iterator::chain(self.pages.iter(), &self.reserve) {
            // SAFETY: From `Page::into_raw` by the invariant, or null; no reader of ours is left.
            drop(unsafe { Page::from_raw(entry.load(Acquire)) });
        }
    }
}

/// Puts a page where there is none; whether it was the first.
fn set_once(place: &Atomic<*mut Words>, page: Page) -> bool {
    let page = page.into_raw();
    let is_first = place.cmpxchg(ptr::null_mut(), page, Full).is_ok();
    if !is_first {
        // SAFETY: Somebody else was first: it is still ours.
        drop(unsafe { Page::from_raw(page) });
    }
    is_first
}

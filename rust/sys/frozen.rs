// SPDX-License-Identifier: GPL-2.0
//! Data that request handlers read without a lock and that changes only while there are none.

use core::{cell::UnsafeCell, marker::PhantomData, mem, ops::Range};
use kernel::sync::atomic::{Atomic, Full, Release};

/// Proof that the caller is a request handler of a driver.
pub(crate) struct Handler<'a> {
    driver: Range<usize>,
    _scope: PhantomData<&'a ()>,
}

impl<'a> Handler<'a> {
    /// Only for the handler's entry, which has the driver.
    pub(super) fn new<D>(driver: &'a D) -> Self {
        Self {
            driver: range_of(driver),
            _scope: PhantomData,
        }
    }
}

/// Proof that no request of a driver is in flight, none enters, and none of its handlers runs.
///
/// It stays with the task that froze the queue: two writers with one proof would race.
pub(crate) struct QueueFrozen<'a> {
    driver: Range<usize>,
    _scope: PhantomData<(&'a (), *mut ())>,
}

impl<'a> QueueFrozen<'a> {
    /// Only for [`DiskRef::frozen`](super::gen_disk::DiskRef::frozen), which froze the queue and
    /// waited for the handlers.
    pub(super) fn new<D>(driver: &'a D) -> Self {
        Self {
            driver: range_of(driver),
            _scope: PhantomData,
        }
    }
}

fn range_of<D>(driver: &D) -> Range<usize> {
    let start = core::ptr::from_ref(driver) as usize;
    start..start + mem::size_of::<D>()
}

/// A field of a driver that handlers read without a lock.
///
/// # Invariants
///
/// The value is written only with proof that no handler of the driver that holds this cell runs.
pub(crate) struct FrozenCell<T> {
    value: UnsafeCell<T>,
    /// Queues can be frozen twice at a time: only one of the two may write.
    is_writing: Atomic<bool>,
}

// SAFETY: Shared between handlers for reading only; written when there are none.
unsafe impl<T: Send + Sync> Sync for FrozenCell<T> {}

impl<T> FrozenCell<T> {
    /// A cell with a value.
    pub(crate) const fn new(value: T) -> Self {
        Self {
            value: UnsafeCell::new(value),
            is_writing: Atomic::new(false),
        }
    }

    /// The value; `None` if the handler is another driver's.
    pub(crate) fn get<'a>(&'a self, handler: &'a Handler<'_>) -> Option<&'a T> {
        if !handler
            .driver
            .contains(&(core::ptr::from_ref(self) as usize))
        {
            return None;
        }
        // SAFETY: By the invariant nobody writes while this handler runs.
        Some(unsafe { &*self.value.get() })
    }

    /// Swaps the value; gives `value` back if the proof is about another driver, or somebody else
    /// is swapping it at this moment.
    pub(crate) fn replace(&self, frozen: &QueueFrozen<'_>, value: T) -> Result<T, T> {
        if !frozen
            .driver
            .contains(&(core::ptr::from_ref(self) as usize))
        {
            return Err(value);
        }
        if self.is_writing.xchg(true, Full) {
            return Err(value);
        }
        // SAFETY: No handler runs and nobody else writes, so there is no other reference.
        let old = mem::replace(unsafe { &mut *self.value.get() }, value);
        self.is_writing.store(false, Release);
        Ok(old)
    }
}

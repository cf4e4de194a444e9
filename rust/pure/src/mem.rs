// SPDX-License-Identifier: GPL-2.0
//! The one growable array of this crate; growth can fail, in the kernel and outside alike.

#[cfg(kernel)]
mod imp {
    pub use kernel::alloc::AllocError;
    use kernel::alloc::{flags::GFP_KERNEL, KVVec};

    /// Growable array. In the kernel it is kvmalloc-backed and allocated with `GFP_KERNEL`;
    /// callers on the I/O path hold a NOIO scope, which turns that into NOIO.
    pub struct Vector<T>(KVVec<T>);

    impl<T> Vector<T> {
        /// An empty array, without memory.
        pub const fn new() -> Self {
            Self(KVVec::new())
        }

        /// Makes room for `nr` more elements.
        pub fn try_reserve(&mut self, nr: usize) -> Result<(), AllocError> {
            self.0.reserve(nr, GFP_KERNEL)
        }

        /// Appends `value`, growing if needed.
        pub fn try_push(&mut self, value: T) -> Result<(), AllocError> {
            self.0.push(value, GFP_KERNEL)
        }

        /// Appends `nr` copies of `value`, growing if needed.
        pub fn try_extend(&mut self, nr: usize, value: T) -> Result<(), AllocError>
        where
            T: Clone,
        {
            self.0.extend_with(nr, value, GFP_KERNEL)
        }

        /// Removes and returns the last element.
        pub fn pop(&mut self) -> Option<T> {
            self.0.pop()
        }

        /// Removes all elements, keeps the memory.
        pub fn clear(&mut self) {
            self.0.clear();
        }
    }

    impl<T> core::ops::Deref for Vector<T> {
        type Target = [T];
        fn deref(&self) -> &[T] {
            &self.0
        }
    }

    impl<T> core::ops::DerefMut for Vector<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            &mut self.0
        }
    }
}

#[cfg(not(kernel))]
mod imp {
    extern crate std;
    use std::vec::Vec;

    /// Out of memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AllocError;

    /// Growable array over `std::vec::Vec`, growing only through `try_reserve`.
    pub struct Vector<T>(Vec<T>);

    impl<T> Vector<T> {
        /// An empty array, without memory.
        pub const fn new() -> Self {
            Self(Vec::new())
        }

        /// Makes room for `nr` more elements.
        pub fn try_reserve(&mut self, nr: usize) -> Result<(), AllocError> {
            self.0.try_reserve(nr).map_err(|_| AllocError)
        }

        /// Appends `value`, growing if needed.
        pub fn try_push(&mut self, value: T) -> Result<(), AllocError> {
            self.0.try_reserve(1).map_err(|_| AllocError)?;
            self.0.push(value);
            Ok(())
        }

        /// Appends `nr` copies of `value`, growing if needed.
        pub fn try_extend(&mut self, nr: usize, value: T) -> Result<(), AllocError>
        where
            T: Clone,
        {
            self.try_reserve(nr)?;
            self.0.resize(self.0.len() + nr, value);
            Ok(())
        }

        /// Removes and returns the last element.
        pub fn pop(&mut self) -> Option<T> {
            self.0.pop()
        }

        /// Removes all elements, keeps the memory.
        pub fn clear(&mut self) {
            self.0.clear();
        }
    }

    impl<T> core::ops::Deref for Vector<T> {
        type Target = [T];
        fn deref(&self) -> &[T] {
            &self.0
        }
    }

    impl<T> core::ops::DerefMut for Vector<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            &mut self.0
        }
    }
}

pub use imp::{AllocError, Vector};

impl<T: core::fmt::Debug> core::fmt::Debug for Vector<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T> Default for Vector<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Copy> Vector<T> {
    /// An array of `nr` copies of `value`.
    pub fn try_filled(value: T, nr: usize) -> Result<Self, AllocError> {
        let mut v = Self::new();
        v.try_extend(nr, value)?;
        Ok(v)
    }
}

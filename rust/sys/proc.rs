// SPDX-License-Identifier: GPL-2.0
//! `/proc/vz/ploop_minor`: each open reserves a number, reads show it, the close gives it back.

use super::bindings;
use core::{marker::PhantomData, ptr, ptr::NonNull};
use kernel::{fmt, prelude::*, str::NullTerminatedFormatter, sync::Arc};

/// Who hands the numbers out.
pub(crate) trait Reserve: Send + Sync + 'static {
    /// A number that nobody else gets until it is given back.
    fn reserve(&self) -> Result<u32>;
    /// Gives a number back.
    fn give_back(&self, number: u32);
}

/// The module parameter `compat_proc`.
pub(crate) fn is_wanted() -> bool {
    // SAFETY: No preconditions.
    unsafe { bindings::ploop_compat_proc() }
}

/// The file and its folder. Dropping it removes both, after the last user.
///
/// # Invariants
///
/// `dir` is a live entry made by us; the data of the file below it is `owner`.
pub(crate) struct NumberFile<T: Reserve> {
    dir: NonNull<bindings::proc_dir_entry>,
    /// Keeps what the file's data points to.
    _owner: Arc<T>,
}

// SAFETY: Entries of procfs are thread-safe; `T` is `Send` and `Sync`.
unsafe impl<T: Reserve> Send for NumberFile<T> {}
// SAFETY: As above.
unsafe impl<T: Reserve> Sync for NumberFile<T> {}

impl<T: Reserve> NumberFile<T> {
    /// Makes `/proc/DIR/FILE`, readable for root.
    pub(crate) fn new(dir: &CStr, file: &CStr, owner: Arc<T>) -> Result<Self> {
        // SAFETY: Names are copied; no parent is the root of procfs.
        let dir = unsafe { bindings::proc_mkdir(dir.as_char_ptr(), ptr::null_mut()) };
        let dir = NonNull::new(dir).ok_or(EEXIST)?;
        let data = Arc::as_ptr(&owner).cast_mut().cast();
        // INVARIANT: Made just now; the file gets the data below.
        let this = Self { dir, _owner: owner };
        let ops: &'static bindings::proc_ops = Ops::<T>::TABLE;
        // SAFETY: A live folder; a static table; the data lives as long as the folder.
        let file = unsafe {
            bindings::proc_create_data(file.as_char_ptr(), 0o440, this.dir.as_ptr(), ops, data)
        };
        if file.is_null() {
            return Err(ENOMEM);
        }
        Ok(this)
    }
}

impl<T: Reserve> Drop for NumberFile<T> {
    fn drop(&mut self) {
        // SAFETY: Ours by the invariant. Open files are released before this returns.
        unsafe { bindings::proc_remove(self.dir.as_ptr()) };
    }
}

/// The callbacks of procfs. Each is called by it only, as its contract says.
struct Ops<T>(PhantomData<T>);

impl<T: Reserve> Ops<T> {
    const TABLE: &'static bindings::proc_ops = &bindings::proc_ops {
        proc_open: Some(Self::open),
        proc_read: Some(Self::read),
        proc_release: Some(Self::release),
        // SAFETY: All zeroes is a table without callbacks.
        ..unsafe { core::mem::zeroed() }
    };

    /// # Safety
    ///
    /// Called for a file of a `NumberFile<T>` that exists.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The data of the file is a live `T`, by the invariant of `NumberFile`.
        let owner = unsafe { &*bindings::ploop_pde_data(inode).cast::<T>() };
        match owner.reserve() {
            Ok(number) => {
                // SAFETY: The open file's private data is the opener's to use.
                unsafe { (*file).private_data = ptr::without_provenance_mut(number as usize) };
                0
            }
            Err(e) => e.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called for a file that `open` opened.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buf: *mut u8,
        len: usize,
        pos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: Set by `open`.
        let number = unsafe { (*file).private_data.addr() };
        let mut text = [0u8; 24];
        let Some(mut out) = NullTerminatedFormatter::new(&mut text) else {
            return EINVAL.to_errno() as isize;
        };
        if fmt::Write::write_fmt(&mut out, fmt!("{number}")).is_err() {
            return EINVAL.to_errno() as isize;
        }
        let size = text.iter().position(|b| *b == 0).unwrap_or(0);
        // SAFETY: A user buffer and a position by the contract; the text is ours.
        unsafe {
            bindings::simple_read_from_buffer(buf.cast(), len, pos, text.as_ptr().cast(), size)
        }
    }

    /// # Safety
    ///
    /// Called once for a file that `open` opened.
    unsafe extern "C" fn release(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: As in `open`; the private data was set there.
        let (owner, number) = unsafe {
            let owner = &*bindings::ploop_pde_data(inode).cast::<T>();
            (owner, (*file).private_data.addr())
        };
        // It was a `u32`.
        owner.give_back(number as u32);
        0
    }
}

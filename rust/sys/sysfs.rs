// SPDX-License-Identifier: GPL-2.0
//! Folders of files below a disk's folder in sysfs.

use super::{
    bindings, compat,
    gen_disk::{BlockDevice, DiskRef},
    Table,
};
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{error::to_result, fmt, prelude::*, str::NullTerminatedFormatter};

/// Bytes that a file can show.
const FILE_BYTES: usize = 4096;

/// A driver that has such files.
pub(crate) trait ShowFiles: BlockDevice {
    /// Writes what `file` of the folder named `dir` shows. Must not wait for anybody who removes
    /// a folder.
    fn show(disk: DiskRef<'_, Self>, dir: &CStr, file: &CStr, out: &mut Output<'_>) -> Result;
    /// Takes what was written to `file` of the folder named `dir`. The same holds.
    fn store(disk: DiskRef<'_, Self>, dir: &CStr, file: &CStr, text: &[u8]) -> Result;
}

/// Where a file's content goes.
pub(crate) struct Output<'a>(NullTerminatedFormatter<'a>, usize);

impl fmt::Write for Output<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.0.write_str(s)?;
        self.1 += s.len();
        Ok(())
    }
}

/// The files of a kind of folder, `DEPTH` levels below the folder of a disk of `D`.
pub(crate) struct Files<D, const DEPTH: usize, const N: usize>(
    Table<[bindings::kobj_attribute; N]>,
    PhantomData<fn() -> D>,
);

impl<D: ShowFiles, const DEPTH: usize, const N: usize> Files<D, DEPTH, N> {
    /// Files of these names.
    pub(crate) const fn new(names: [&'static CStr; N]) -> Self {
        let mut files: [bindings::kobj_attribute; N] = [const { pin_init::zeroed() }; N];
        let mut i = 0;
        while i < N {
            files[i] = compat::attribute(names[i], show::<D, DEPTH>);
            i += 1;
        }
        Self(Table(files), PhantomData)
    }

    /// Files of these names that root alone can read.
    pub(crate) const fn secret(names: [&'static CStr; N]) -> Self {
        let mut files = Self::new(names);
        let mut i = 0;
        while i < N {
            files.0 .0[i].attr.mode = 0o400;
            i += 1;
        }
        files
    }

    /// Files of these names that root can write.
    pub(crate) const fn writable(names: [&'static CStr; N]) -> Self {
        let mut files: [bindings::kobj_attribute; N] = [const { pin_init::zeroed() }; N];
        let mut i = 0;
        while i < N {
            files[i] = compat::attribute_rw(names[i], show::<D, DEPTH>, store::<D, DEPTH>);
            i += 1;
        }
        Self(Table(files), PhantomData)
    }
}

/// A folder. Dropping it removes it and waits for its readers.
///
/// # Invariants
///
/// The pointer is a kobject of ours that is in sysfs, `DEPTH` levels below the folder of a disk of
/// `D`.
pub(crate) struct Dir<D, const DEPTH: usize>(NonNull<bindings::kobject>, PhantomData<fn() -> D>);

// SAFETY: kobjects are thread-safe.
unsafe impl<D, const DEPTH: usize> Send for Dir<D, DEPTH> {}
// SAFETY: As above.
unsafe impl<D, const DEPTH: usize> Sync for Dir<D, DEPTH> {}

impl<D: ShowFiles> Dir<D, 1> {
    /// Makes a folder in the disk's. It must be dropped before the disk is removed.
    pub(crate) fn of_disk(disk: DiskRef<'_, D>, name: &CStr) -> Result<Self> {
        // SAFETY: A live disk has its whole-disk block device, which holds its kobject.
        let parent = unsafe { &raw mut (*(*disk.as_ptr()).part0).bd_device.kobj };
        Self::below(parent, name)
    }

    /// Makes a folder in this one. It must be dropped before this one.
    pub(crate) fn dir(&self, name: &CStr) -> Result<Dir<D, 2>> {
        Dir::below(self.0.as_ptr(), name)
    }
}

impl<D: ShowFiles, const DEPTH: usize> Dir<D, DEPTH> {
    fn below(parent: *mut bindings::kobject, name: &CStr) -> Result<Self> {
        // SAFETY: The parent is live; the name is copied.
        let kobj = unsafe { bindings::kobject_create_and_add(name.as_char_ptr(), parent) };
        // INVARIANT: Just made, where the callers say.
        let kobj = NonNull::new(kobj).ok_or(ENOMEM)?;
        Ok(Self(kobj, PhantomData))
    }

    /// Adds files.
    pub(crate) fn add<const N: usize>(&self, files: &'static Files<D, DEPTH, N>) -> Result {
        for file in &files.0 .0 {
            // SAFETY: A live kobject by the invariant; the attribute is static.
            to_result(unsafe {
                bindings::sysfs_create_file_ns(self.0.as_ptr(), &file.attr, core::ptr::null())
            })?;
        }
        Ok(())
    }
}

impl<D, const DEPTH: usize> Drop for Dir<D, DEPTH> {
    fn drop(&mut self) {
        // SAFETY: Ours by the invariant; `kobject_del` removes the files and waits for readers.
        unsafe {
            bindings::kobject_del(self.0.as_ptr());
            bindings::kobject_put(self.0.as_ptr());
        }
    }
}

/// The disk `DEPTH` levels above a folder.
///
/// # Safety
///
/// `kobj` is the folder of a `Dir` that is `DEPTH` levels below the folder of a disk of `D`, a file
/// of which is being read or written for `'a`.
unsafe fn disk_of<'a, D: ShowFiles, const DEPTH: usize>(
    kobj: *mut bindings::kobject,
) -> DiskRef<'a, D> {
    let mut top = kobj;
    for _ in 0..DEPTH {
        // SAFETY: A folder that is being read has its parents.
        top = unsafe { (*top).parent };
    }
    // SAFETY: By the contract that is a disk's folder; folders go before their disk does.
    unsafe { DiskRef::<D>::from_kobj(top) }
}

/// # Safety
///
/// Called by sysfs for a file of a `Dir` that is `DEPTH` levels below the folder of a disk of `D`,
/// with `len` bytes that were written.
unsafe extern "C" fn store<D: ShowFiles, const DEPTH: usize>(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *const u8,
    len: usize,
) -> isize {
    // SAFETY: By the contract.
    let disk = unsafe { disk_of::<D, DEPTH>(kobj) };
    // SAFETY: Both are set for as long as the file exists; sysfs gives `len` bytes.
    let (dir, file, text) = unsafe {
        (
            CStr::from_char_ptr((*kobj).name),
            CStr::from_char_ptr((*attr).attr.name),
            core::slice::from_raw_parts(buf, len),
        )
    };
    match D::store(disk, dir, file, text.trim_ascii()) {
        Ok(()) => len as isize,
        Err(e) => e.to_errno() as isize,
    }
}

/// # Safety
///
/// Called by sysfs for a file of a `Dir` that is `DEPTH` levels below the folder of a disk of `D`.
unsafe extern "C" fn show<D: ShowFiles, const DEPTH: usize>(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::kobj_attribute,
    buf: *mut u8,
) -> isize {
    // SAFETY: By the contract.
    let disk = unsafe { disk_of::<D, DEPTH>(kobj) };
    // SAFETY: Both are set for as long as the file exists.
    let (dir, file) = unsafe {
        (
            CStr::from_char_ptr((*kobj).name),
            CStr::from_char_ptr((*attr).attr.name),
        )
    };
    // SAFETY: sysfs gives a page to write to.
    let buf = unsafe { core::slice::from_raw_parts_mut(buf, FILE_BYTES) };
    let Some(formatter) = NullTerminatedFormatter::new(buf) else {
        return EINVAL.to_errno() as isize;
    };
    let mut out = Output(formatter, 0);
    match D::show(disk, dir, file, &mut out) {
        Ok(()) => out.1 as isize,
        Err(e) => e.to_errno() as isize,
    }
}

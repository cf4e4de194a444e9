// SPDX-License-Identifier: GPL-2.0
//! Open files, and synchronous I/O of pages to them. Asynchronous I/O of requests is in
//! [`mq`](super::mq).

use super::{bindings, pages::PageBuf, FILES};
use core::{ops::Range, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, to_result},
    pr_warn_once,
    prelude::*,
};

/// What a file is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// Only reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// How bytes move between a file and memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// What kind of file it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// Anything else.
    Other,
}

/// Alignment in bytes that direct I/O needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Align {
    /// Of positions and lengths in the file.
    pub(crate) offset: u32,
    /// Of addresses in memory.
    pub(crate) memory: u32,
}

/// Which file it is, as stat(2) says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    /// Inode number.
    pub(crate) ino: u64,
    /// Major and minor number of the file system's device.
    pub(crate) dev: (u32, u32),
}

/// A reference to an open file.
///
/// # Invariants
///
/// The pointer is a live file; we own a reference to it.
pub(crate) struct File {
    raw: NonNull<bindings::file>,
    mode: Mode,
}

// SAFETY: `struct file` is reference counted and internally synchronised; its position is not used.
unsafe impl Send for File {}
// SAFETY: As above.
unsafe impl Sync for File {}

impl File {
    /// The file behind a descriptor of the calling process.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        let fd = u32::try_from(fd).map_err(|_| EBADF)?;
        // SAFETY: Any number is fine.
        let raw = NonNull::new(unsafe { bindings::fget(fd) }).ok_or(EBADF)?;
        FILES.add();
        // INVARIANT: `fget` gave us a reference.
        Ok(Self {
            raw,
            mode: Mode::Buffered,
        })
    }

    /// Opens the same file anew: an open file of our own, whose locks and flags nobody else can
    /// change. A block device is claimed exclusively for writing. EINVAL if `mode` cannot be had.
    pub(crate) fn reopen(&self, access: Access, mode: Mode) -> Result<Self> {
        let mut flags = bindings::O_LARGEFILE;
        flags |= match access {
            Access::Read => bindings::O_RDONLY,
            Access::ReadWrite => bindings::O_RDWR,
        };
        if mode == Mode::Direct {
            flags |= bindings::O_DIRECT;
        }
        if self.kind() == Kind::Block && access == Access::ReadWrite {
            flags |= bindings::O_EXCL;
        }
        // SAFETY: A live file by the invariant.
        let raw = unsafe { bindings::ploop_reopen(self.raw.as_ptr(), flags as i32) };
        let raw = NonNull::new(from_err_ptr(raw)?).ok_or(EINVAL)?;
        FILES.add();
        // INVARIANT: Just opened for us.
        Ok(Self { raw, mode })
    }

    /// Whether the file was opened for reading and writing.
    pub(crate) fn access(&self) -> Option<Access> {
        // SAFETY: A live file by the invariant; its mode does not change.
        let mode = unsafe { (*self.raw.as_ptr()).f_mode };
        let (read, write) = (bindings::FMODE_READ, bindings::FMODE_WRITE);
        match (mode & read != 0, mode & write != 0) {
            (true, true) => Some(Access::ReadWrite),
            (true, false) => Some(Access::Read),
            (false, _) => None,
        }
    }

    /// What kind of file it is.
    pub(crate) fn kind(&self) -> Kind {
        // SAFETY: A live file by the invariant.
        let mode = unsafe { bindings::ploop_file_mode(self.raw.as_ptr()) };
        match u32::from(mode) & bindings::S_IFMT {
            bindings::S_IFREG => Kind::Regular,
            bindings::S_IFBLK => Kind::Block,
            _ => Kind::Other,
        }
    }

    /// How bytes move.
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Which file it is.
    pub(crate) fn identity(&self) -> Result<Identity> {
        let mut id = bindings::ploop_file_id::default();
        // SAFETY: A live file by the invariant.
        to_result(unsafe { bindings::ploop_file_identify(self.raw.as_ptr(), &mut id) })?;
        Ok(Identity {
            ino: id.ino,
            dev: (id.dev_major, id.dev_minor),
        })
    }

    /// A number that two open files share only if they are the same file, while both are open.
    pub(crate) fn inode_key(&self) -> usize {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_file_host(self.raw.as_ptr()) as usize }
    }

    /// The path at this moment, as far as it fits.
    pub(crate) fn path<'a>(&self, buf: &'a mut [u8]) -> Result<&'a [u8]> {
        let len = i32::try_from(buf.len()).map_err(|_| EINVAL)?;
        // SAFETY: A live file by the invariant; the buffer is ours.
        let p = unsafe { bindings::file_path(self.raw.as_ptr(), buf.as_mut_ptr(), len) };
        let p = from_err_ptr(p)?;
        // SAFETY: `file_path` made a string that ends inside the buffer, borrowed for `'a`.
        Ok(unsafe { CStr::from_char_ptr(p) }.to_bytes())
    }

    /// Length in bytes, asked for anew.
    pub(crate) fn len(&self) -> Result<u64> {
        // SAFETY: A live file by the invariant.
        let len = unsafe { bindings::ploop_file_size(self.raw.as_ptr()) };
        u64::try_from(len).map_err(|_| Error::from_errno(i32::try_from(len).unwrap_or(0)))
    }

    /// Bytes that can still be written to the file system, as far as it tells.
    pub(crate) fn space_left(&self) -> u64 {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_file_space(self.raw.as_ptr()) }
    }

    /// Length in bytes as the VFS knows it: cheap, and right unless another machine changed it.
    pub(crate) fn len_cached(&self) -> u64 {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_file_size_cached(self.raw.as_ptr()) }.unsigned_abs()
    }

    /// What direct I/O needs; `None` if the file cannot do it.
    pub(crate) fn direct_align(&self) -> Option<Align> {
        let mut align = bindings::ploop_dio_align::default();
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_file_dio_align(self.raw.as_ptr(), &mut align) };
        (align.offset != 0).then_some(Align {
            offset: align.offset,
            memory: align.memory,
        })
    }

    /// Drops what the page cache has of a range that was written past it.
    pub(crate) fn uncache(&self, range: &Range<u64>) {
        let len = range.end.saturating_sub(range.start);
        // SAFETY: A live file by the invariant.
        let ret = unsafe { bindings::ploop_file_uncache(self.raw.as_ptr(), range.start, len) };
        if ret != 0 {
            pr_warn_once!("an image in use looks old to who reads it through the page cache\n");
        }
    }

    /// Makes everything written so far durable, and the length with it.
    pub(crate) fn sync(&self) -> Result {
        // SAFETY: A live file by the invariant.
        to_result(unsafe { bindings::vfs_fsync(self.raw.as_ptr(), 1) })
    }

    fn fallocate(&self, mode: u32, range: Range<u64>) -> Result {
        let start = i64::try_from(range.start).map_err(|_| EFBIG)?;
        let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| EFBIG)?;
        // SAFETY: A live file by the invariant; the VFS checks the rest.
        to_result(unsafe { bindings::vfs_fallocate(self.raw.as_ptr(), mode as i32, start, len) })
    }

    /// Allocates space for `range`, which reads as zeros, and grows the file to its end.
    pub(crate) fn allocate(&self, range: Range<u64>) -> Result {
        self.fallocate(0, range)
    }

    /// The same with zeros written, by the device itself: what is written there later is a plain
    /// overwrite to the file system. EOPNOTSUPP where file system or device cannot do that cheaply.
    pub(crate) fn allocate_written(&self, range: Range<u64>) -> Result {
        self.fallocate(bindings::FALLOC_FL_WRITE_ZEROES, range)
    }

    /// Gives back the space of `range`, which then reads as zeros.
    pub(crate) fn punch(&self, range: Range<u64>) -> Result {
        let mode = bindings::FALLOC_FL_PUNCH_HOLE | bindings::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, range)
    }

    /// Makes `range` read as zeros, keeping its space.
    pub(crate) fn zero(&self, range: Range<u64>) -> Result {
        let mode = bindings::FALLOC_FL_ZERO_RANGE | bindings::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, range)
    }

    /// Makes `len` bytes from `to` on share what `from` has at `pos`. Only within a file system, where
    /// that can do it, and in its blocks.
    pub(crate) fn clone_range(&self, to: u64, from: &Self, pos: u64, len: u64) -> Result {
        let signed = |n: u64| i64::try_from(n).map_err(|_| EFBIG);
        let (to, pos, len) = (signed(to)?, signed(pos)?, signed(len)?);
        // SAFETY: Live files by the invariant; the VFS checks the rest.
        let done = unsafe {
            bindings::vfs_clone_file_range(from.raw.as_ptr(), pos, self.raw.as_ptr(), to, len, 0)
        };
        match done {
            n if n == len => Ok(()),
            n if n >= 0 => Err(EIO),
            e => Err(Error::from_errno(i32::try_from(e).unwrap_or(0))),
        }
    }

    /// Cuts the file, or grows it by a hole, to `len` bytes.
    pub(crate) fn truncate(&self, len: u64) -> Result {
        let len = i64::try_from(len).map_err(|_| EFBIG)?;
        // SAFETY: A live file by the invariant.
        to_result(unsafe { bindings::ploop_file_truncate(self.raw.as_ptr(), len) })
    }

    /// Locks byte `at` shared, as `F_OFD_SETLK` does, until this file is dropped.
    pub(crate) fn lock_byte(&self, at: u8) -> Result {
        // SAFETY: A live file by the invariant.
        to_result(unsafe { bindings::ploop_ofd_read_lock(self.raw.as_ptr(), i64::from(at)) })
    }

    /// Ends [`Self::lock_byte`].
    pub(crate) fn unlock_byte(&self, at: u8) {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_ofd_unlock(self.raw.as_ptr(), i64::from(at)) };
    }

    /// Whether another open file holds a lock on byte `at`: the holder's pid, -1 if it has none.
    pub(crate) fn byte_locked_by(&self, at: u8) -> Option<i32> {
        let mut pid = -1;
        // SAFETY: A live file by the invariant.
        let held =
            unsafe { bindings::ploop_ofd_is_locked(self.raw.as_ptr(), i64::from(at), &mut pid) };
        held.then_some(pid)
    }

    /// Reads into the pages `range` of `buf` from byte `pos` on. Returns the bytes read, fewer
    /// only at the end of the file.
    pub(crate) fn read_pages(
        &self,
        pos: u64,
        buf: &mut PageBuf,
        range: Range<usize>,
    ) -> Result<usize> {
        self.rw_pages(pos, buf, range, bindings::ITER_DEST)
    }

    /// Writes the pages `range` of `buf` at byte `pos`, all of them or an error.
    pub(crate) fn write_pages(&self, pos: u64, buf: &PageBuf, range: Range<usize>) -> Result {
        let want = range.len() * super::pages::PAGE_BYTES;
        let done = self.rw_pages(pos, buf, range, bindings::ITER_SOURCE)?;
        if done == want {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    fn rw_pages(&self, pos: u64, buf: &PageBuf, range: Range<usize>, dir: u32) -> Result<usize> {
        let segs = buf.segments(range).ok_or(EINVAL)?;
        let total = segs.len() * super::pages::PAGE_BYTES;
        let mut done = 0;
        while done < total {
            // SAFETY: All zeroes is a valid `iov_iter`.
            let mut iter: bindings::iov_iter = unsafe { core::mem::zeroed() };
            // SAFETY: The segments outlive the iterator; `done` is below their total.
            unsafe {
                bindings::iov_iter_bvec(&mut iter, dir, segs.as_ptr(), segs.len(), total);
                bindings::iov_iter_advance(&mut iter, done);
            }
            let at = pos.checked_add(done as u64).ok_or(EFBIG)?;
            // No completion function: synchronous.
            let mut iocb = self.kiocb(at)?;
            // SAFETY: Both are valid until the call returns, which is when a synchronous I/O ends.
            // A read changes the pages, which `buf` was borrowed mutably for.
            let ret = unsafe { self.start(&mut iocb, &mut iter, dir) };
            if dir == bindings::ITER_SOURCE {
                // SAFETY: `start` began the write.
                unsafe { bindings::ploop_kiocb_end_write(&mut iocb) };
            }
            match usize::try_from(ret) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(_) => return Err(Error::from_errno(i32::try_from(ret).unwrap_or(0))),
            }
        }
        Ok(done)
    }

    /// An I/O control block for this file, without completion function.
    pub(super) fn kiocb(&self, pos: u64) -> Result<bindings::kiocb> {
        Ok(bindings::kiocb {
            ki_filp: self.raw.as_ptr(),
            ki_pos: i64::try_from(pos).map_err(|_| EFBIG)?,
            ki_flags: match self.mode {
                Mode::Direct => bindings::IOCB_DIRECT,
                Mode::Buffered => 0,
            },
            ..pin_init::zeroed()
        })
    }

    /// Takes another reference to the file, for an I/O in flight; [`put_raw`] gives it back.
    pub(super) fn get_raw(&self) -> *mut bindings::file {
        // SAFETY: A live file by the invariant.
        unsafe { bindings::ploop_get_file(self.raw.as_ptr()) };
        self.raw.as_ptr()
    }

    /// The file, for who lives no longer or takes a reference of his own.
    pub(super) fn as_ptr(&self) -> NonNull<bindings::file> {
        self.raw
    }

    /// Starts an I/O and returns what the file system returned.
    ///
    /// # Safety
    ///
    /// `iocb` is for this file; it, and what `iter` points to, stay valid until the I/O is done.
    /// When a write is done, `ploop_kiocb_end_write` is called for it.
    pub(super) unsafe fn start(
        &self,
        iocb: *mut bindings::kiocb,
        iter: *mut bindings::iov_iter,
        dir: u32,
    ) -> isize {
        // SAFETY: A live file by the invariant; operation tables never change.
        let ops = unsafe { &*(*self.raw.as_ptr()).f_op };
        let start = if dir == bindings::ITER_SOURCE {
            // SAFETY: By the contract. Stacked file systems look at the flag when it is done.
            unsafe {
                (*iocb).ki_flags |= bindings::IOCB_WRITE;
                bindings::ploop_kiocb_start_write(iocb);
            }
            ops.write_iter
        } else {
            ops.read_iter
        };
        match start {
            // SAFETY: By the contract.
            Some(start) => unsafe { start(iocb, iter) },
            None => -(bindings::EINVAL as isize),
        }
    }

    /// Whether the file can do the I/O that is needed of an image.
    pub(crate) fn can_do_io(&self) -> bool {
        // SAFETY: A live file by the invariant; operation tables never change.
        let ops = unsafe { &*(*self.raw.as_ptr()).f_op };
        ops.read_iter.is_some() && ops.write_iter.is_some()
    }
}

/// Gives back a reference of [`File::get_raw`]; any context.
///
/// # Safety
///
/// The caller owns that reference.
pub(super) unsafe fn put_raw(raw: *mut bindings::file) {
    // SAFETY: By the contract.
    unsafe { bindings::fput(raw) };
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the invariant.
        unsafe { bindings::fput(self.raw.as_ptr()) };
        FILES.sub();
    }
}

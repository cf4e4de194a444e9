// SPDX-License-Identifier: GPL-2.0
//! What only the C library can do: ioctls with good and bad arguments, synchronous direct writes,
//! several reads in one call, giving up privileges. The one file of this package with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;

/// Alignment that direct I/O needs at most.
pub const ALIGN: usize = 4096;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// Memory for direct I/O: whole pages.
pub struct Buffer(Vec<Page>);

impl Buffer {
    /// `nr` pages of zeros.
    pub fn new(nr: usize) -> Self {
        Self(vec![Page([0; ALIGN]); nr])
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let len = self.0.len() * ALIGN;
        // SAFETY: a Vec<Page> is `len` initialised bytes without padding, and we hold it `&mut`.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// Writes all of `bytes` at `offset` with RWF_DSYNC, which reaches the device as FUA.
pub fn write_durably(file: &File, bytes: &[u8], offset: u64) -> Result<()> {
    let vec = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let offset = libc::off_t::try_from(offset).map_err(Error::other)?;
    // SAFETY: one vector that describes `bytes`, which a write only reads.
    let n = unsafe { libc::pwritev2(file.as_raw_fd(), &vec, 1, offset, libc::RWF_DSYNC) };
    match usize::try_from(n) {
        Err(_) => Err(Error::last_os_error()),
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(Error::other("short write")),
    }
}

/// `struct iocb` of linux/aio_abi.h, little endian.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct IoEvent {
    data: u64,
    iocb: u64,
    result: i64,
    second: i64,
}

/// A part of [`read_at_once`]: bytes, and whether it is to fail with EAGAIN rather than wait (RWF_NOWAIT).
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Bytes: whole pages.
    pub len: usize,
    /// With RWF_NOWAIT.
    pub is_nowait: bool,
}

/// Submits reads of `parts`, one behind the other from `offset` on, in one call, so that the block layer
/// may join them, and waits for all. Returns of each the bytes read, or the negative error number.
pub fn read_at_once(file: &File, offset: u64, parts: &[Part]) -> Result<Vec<i64>> {
    let check = |result: libc::c_long| match usize::try_from(result) {
        Err(_) => Err(Error::last_os_error()),
        Ok(n) => Ok(n),
    };
    let fd = u32::try_from(file.as_raw_fd()).map_err(Error::other)?;
    let mut buffer = Buffer::new(parts.iter().map(|p| p.len.div_ceil(ALIGN)).sum());
    let (base, mut at) = (buffer.bytes().as_mut_ptr(), 0);
    let mut iocbs = Vec::new();
    for (part, data) in parts.iter().zip(0..) {
        iocbs.push(Iocb {
            data,
            rw_flags: if part.is_nowait {
                libc::RWF_NOWAIT as u32
            } else {
                0
            },
            fd,
            buf: (base.expose_provenance() + at) as u64,
            bytes: part.len as u64,
            offset: i64::try_from(offset + at as u64).map_err(Error::other)?,
            ..Iocb::default()
        });
        at += part.len.next_multiple_of(ALIGN);
    }
    let pointers: Vec<*const Iocb> = iocbs.iter().map(|iocb| &raw const *iocb).collect();
    let mut events = vec![IoEvent::default(); parts.len()];
    let (nr, mut context) = (parts.len(), 0usize);
    // SAFETY: `context` is written.
    check(unsafe { libc::syscall(libc::SYS_io_setup, nr, &raw mut context) })?;
    // SAFETY: as many pointers to control blocks, whose buffers are parts of `buffer`; that lives until
    // the context is gone, which waits for what is on its way.
    let submitted =
        check(unsafe { libc::syscall(libc::SYS_io_submit, context, nr, pointers.as_ptr()) });
    let got = submitted.and_then(|nr| {
        // SAFETY: there is room for that many events; no time limit.
        check(unsafe {
            let no_limit = std::ptr::null::<libc::timespec>();
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                nr,
                nr,
                events.as_mut_ptr(),
                no_limit,
            )
        })
    });
    // SAFETY: a context of ours.
    unsafe { libc::syscall(libc::SYS_io_destroy, context) };
    if got? != nr {
        return Err(Error::other("not all was submitted"));
    }
    events.sort_by_key(|event| event.data);
    Ok(events.iter().map(|event| event.result).collect())
}

/// What is passed as an ioctl's argument.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A null pointer.
    Null,
    /// A pointer to memory that cannot be read.
    Unreadable,
    /// A pointer to these bytes; what follows them cannot be read.
    Bytes(&'a [u8]),
    /// A number below [`ALIGN`], for calls that take one.
    Number(usize),
}

/// A page of memory followed by one that cannot be touched.
pub struct Guarded {
    base: *mut u8,
}

// SAFETY: the mapping belongs to the value alone, not to the thread that made it.
unsafe impl Send for Guarded {}

impl Guarded {
    /// Two pages.
    pub fn new() -> Result<Self> {
        let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_NONE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), 2 * ALIGN, none, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let base = base.cast::<u8>();
        // SAFETY: the first page of the mapping just made.
        if unsafe { libc::mprotect(base.cast(), ALIGN, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(Self { base })
    }

    /// Calls `request` on `file`. Returns what the call returned and the bytes of the argument as
    /// they are afterwards.
    pub fn ioctl(&mut self, file: &File, request: u32, arg: Arg<'_>) -> Result<(i32, Vec<u8>)> {
        let (at, len) = match arg {
            Arg::Null => (0, 0),
            Arg::Unreadable => (self.base as usize + ALIGN, 0),
            Arg::Number(n) => (n % ALIGN, 0),
            Arg::Bytes(bytes) => {
                let len = bytes.len().min(ALIGN);
                // SAFETY: the last `len` bytes of our first page; nobody has a reference there.
                let to = unsafe { self.base.add(ALIGN - len) };
                // SAFETY: `to` has room for `len` bytes, and `bytes` is other memory.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, len) };
                (to as usize, len)
            }
        };
        let number = libc::Ioctl::from(request);
        // SAFETY: whatever the call writes goes to `at`: our own page, the one that cannot be
        // touched, or the first page of the address space, which is never mapped.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), number, at) };
        if result < 0 {
            return Err(Error::last_os_error());
        }
        let mut out = vec![0; len];
        // SAFETY: the bytes put there above.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(ALIGN - len), out.as_mut_ptr(), len) };
        Ok((result, out))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, to which no reference exists.
        unsafe { libc::munmap(self.base.cast(), 2 * ALIGN) };
    }
}

/// Gives up every capability of this thread, for good.
pub fn drop_privileges() -> Result<()> {
    // struct __user_cap_header_struct, version 3, this thread; two empty sets.
    let header = [0x2008_0522u32, 0];
    let sets = [0u32; 6];
    // SAFETY: capset reads the two structures, which have the sizes of version 3.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

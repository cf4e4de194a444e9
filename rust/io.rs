// SPDX-License-Identifier: GPL-2.0
//! How bytes reach an image file. Knows nothing of formats, chains and devices.
//!
//! Positions are bytes in the image file. Everything but [`Io::submit`] sleeps until it is done.
//! Nothing here is durable before [`Io::sync`] has returned, except a `submit` that asks for it.

pub(crate) mod bdev;
pub(crate) mod file;
pub(crate) mod lock;

use crate::sys::{
    self,
    file::{Access, Align, File, Kind, Mode},
    mq::{Driver, Request, Sync},
    pages::PageBuf,
    prelude::*,
    work::Workqueue,
};
use bdev::DiskShape;
use core::ops::Range;

/// Bytes behind the end of a file that are punched to see whether that can be done.
const PUNCH_PROBE: u64 = 1 << 20;

/// Milliseconds between two tries without memory.
const NO_MEMORY_MS: u64 = 100;
/// Milliseconds after which it is not tried again.
const NO_MEMORY_MAX_MS: u64 = 10_000;

/// Calls `f`, again for some seconds as long as there is no memory; one in another for no longer. May
/// sleep.
pub(crate) fn with_memory<T>(mut f: impl FnMut() -> Result<T>) -> Result<T> {
    let end = sys::uptime_ms().saturating_add(NO_MEMORY_MAX_MS);
    loop {
        match f() {
            Err(e) if e == ENOMEM && sys::uptime_ms() < end => sys::sleep_ms(NO_MEMORY_MS),
            result => return result,
        }
    }
}

/// An open image file.
pub(crate) enum Io {
    /// Through the file system, or the page cache of a block device, that holds the file; and past
    /// it, where that can be done.
    File(file::FileIo),
}

impl Io {
    /// Opens the image that `user` is an open file of, for ourselves. File I/O of processes runs on
    /// `errands`.
    pub(crate) fn open(user: &File, access: Access, errands: &Arc<Workqueue>) -> Result<Self> {
        file::FileIo::open(user, access, errands).map(Self::File)
    }

    /// Opens the image anew.
    pub(crate) fn reopen(&self, access: Access) -> Result<Self> {
        Self::open(self.as_file(), access, self.file().errands())
    }

    fn file(&self) -> &file::FileIo {
        match self {
            Self::File(io) => io,
        }
    }

    /// The open file, for locks and names.
    pub(crate) fn as_file(&self) -> &File {
        self.file().as_file()
    }

    /// Name of the engine, as in sysfs: OpenVZ's word where it has one.
    pub(crate) fn name(&self) -> &'static str {
        match (self.file().as_file().kind(), self.file().as_file().mode()) {
            (Kind::Block, _) => "bdev",
            (Kind::Regular | Kind::Other, Mode::Direct) => "direct",
            (Kind::Regular | Kind::Other, Mode::Buffered) => "buffered",
        }
    }

    /// What requests have to keep to: 512 to 4096 bytes each.
    pub(crate) fn align(&self) -> Align {
        self.file().align()
    }

    /// Whether the file ends before `end`: somebody has made it shorter. A write there would make
    /// it longer again and hide that.
    pub(crate) fn ends_before(&self, end: u64) -> bool {
        self.file().as_file().len_cached() < end
    }

    /// Length of the file in bytes, asked for anew.
    pub(crate) fn len(&self) -> Result<u64> {
        self.file().to_the_end(File::len)
    }

    /// Reads whole pages; fewer bytes only at the end of the file.
    pub(crate) fn read(&self, pos: u64, buf: &mut PageBuf, pages: Range<usize>) -> Result<usize> {
        self.file()
            .to_the_end(|file| file.read_pages(pos, buf, pages))
    }

    /// Writes whole pages; again for a while without memory, as it makes no difference how much was.
    pub(crate) fn write(&self, pos: u64, buf: &PageBuf, pages: Range<usize>) -> Result {
        with_memory(|| {
            self.file()
                .write(|file| file.write_pages(pos, buf, pages.clone()))
        })
    }

    /// Bytes that can still be written to the file system, as far as it tells.
    pub(crate) fn space_left(&self) -> u64 {
        self.file().as_file().space_left()
    }

    /// Makes all data written and the file's length durable.
    pub(crate) fn sync(&self) -> Result {
        self.file().sync()
    }

    /// Whether I/O goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.file().as_file().mode() == Mode::Direct
    }

    /// Allocates space for `range` of the file, so that writing there cannot fail for want of it,
    /// where the file system can do that.
    pub(crate) fn reserve(&self, range: Range<u64>) -> Result {
        match self.file().write(|file| file.allocate(range)) {
            Err(e) if Errno::OpNotSupp.is(e) => Ok(()),
            other => other,
        }
    }

    /// Grows the file from the length `range.start` to `range.end`; all of that reads as zeros, whatever
    /// was there.
    pub(crate) fn grow(&self, range: Range<u64>) -> Result {
        self.file().grow(range)
    }

    /// Grows the file to `len` bytes by a hole.
    pub(crate) fn lengthen(&self, len: u64) -> Result {
        if self.len()? >= len {
            return Ok(());
        }
        self.file().write(|file| file.truncate(len))
    }

    /// Cuts the file to `len` bytes, also if it has that length: a file system may have set the length
    /// before it failed, and what was behind it would show again when the file grows. Without memory it
    /// is tried again, for the same reason.
    pub(crate) fn cut(&self, len: u64) -> Result {
        let old = self.len()?;
        if old == len && self.file().as_file().kind() != Kind::Regular {
            return Ok(());
        }
        with_memory(|| self.file().change(len..old, |file| file.truncate(len)))
    }

    /// Makes `range` read as zeros, giving its space back where the file system can.
    pub(crate) fn punch(&self, range: Range<u64>) -> Result {
        self.file().change(range.clone(), |file| file.punch(range))
    }

    /// Makes `len` bytes from `to` on share what `from` has at `pos`, where the file system can do
    /// that.
    pub(crate) fn clone_range(&self, to: u64, from: &Self, pos: u64, len: u64) -> Result {
        let from = from.file().as_file();
        let range = to..to.saturating_add(len);
        self.file()
            .change(range, |file| file.clone_range(to, from, pos, len))
    }

    /// Makes `range` read as zeros, keeping its space.
    pub(crate) fn zero(&self, range: Range<u64>) -> Result {
        self.file().change(range.clone(), |file| file.zero(range))
    }

    /// Whether [`Self::punch`] works on this file, which is tried behind its end: nobody may write to
    /// it, or let it grow, meanwhile.
    pub(crate) fn can_punch(&self) -> bool {
        let probe = |file: &File| {
            // Behind the end of a file there is nothing to lose.
            let start = file.len()?.next_multiple_of(PUNCH_PROBE);
            file.punch(start..start.saturating_add(PUNCH_PROBE))
        };
        self.file().as_file().kind() == Kind::Regular && self.file().to_the_end(probe).is_ok()
    }

    /// Moves a request's data past the file system, from or to byte `pos`; gives it back where that
    /// cannot be done or is not known yet. It comes back through [`Driver::io_done`]. For whoever may
    /// sleep, but must not do file I/O.
    pub(crate) fn submit_inline<D: Driver>(&self, rq: Request<D>, pos: u64) -> Option<Request<D>> {
        match self.file().bdev() {
            Some(bdev) => bdev.submit(rq, pos),
            None => Some(rq),
        }
    }

    /// Makes durable what [`Self::submit_inline`] has written, past the file system; gives the request
    /// back where that cannot be done. It comes back through [`Driver::io_done`], with EAGAIN if
    /// [`Self::sync`] has to do it. Context as of [`Self::submit_inline`].
    pub(crate) fn flush_inline<D: Driver>(&self, rq: Request<D>) -> Option<Request<D>> {
        match self.file().bdev() {
            Some(bdev) => bdev.flush(rq),
            None => Some(rq),
        }
    }

    /// Changes of the file through its file system that have ended, but for those of requests.
    pub(crate) fn nr_changes(&self) -> u64 {
        self.file().nr_changes()
    }

    /// Whether [`Self::submit_inline`] may ever do it.
    pub(crate) fn may_inline(&self) -> bool {
        self.file().bdev().is_some()
    }

    /// Finds out what [`Self::submit_inline`] needs to know of `range`.
    pub(crate) fn learn(&self, range: &Range<u64>, disk: DiskShape) {
        self.file().learn(range, disk);
    }

    /// Drops what the page cache has of what was written past it; see [`Request::take_stale`].
    pub(crate) fn uncache(&self, range: &Range<u64>) {
        self.file().as_file().uncache(range);
    }

    /// From here on others may write the file: nothing goes past its file system any more.
    pub(crate) fn release(&self) {
        self.file().release();
    }

    /// Whether requests go past the file system, where they can.
    pub(crate) fn is_inline(&self) -> bool {
        self.file().bdev().is_some_and(|bdev| bdev.is_held())
    }

    /// Moves a request's data; see [`Request::submit`].
    pub(crate) fn submit<D: Driver>(&self, rq: Request<D>, pos: u64, skip: usize, sync: Sync) {
        rq.submit(self.file().as_file(), pos, skip, sync);
    }
}

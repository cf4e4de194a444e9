// SPDX-License-Identifier: GPL-2.0
//! The `file` engine: control blocks on a file of any file system, directly where it can.

use super::bdev::{Bdev, DiskShape};
use crate::sys::{
    self,
    file::{Access, Align, File, Kind, Mode},
    mq::noio,
    prelude::*,
    work::Workqueue,
};
use core::ops::Range;

/// Largest alignment of direct I/O that a disk with 4096-byte blocks keeps to.
const ALIGN_MAX: u32 = 4096;
/// What any disk can keep to, and what is asked of it at least.
const ALIGN_MIN: Align = Align {
    offset: 512,
    memory: 512,
};

/// Bytes that a device is asked at once to make zero: other I/O to the file waits for that.
const ZEROES_MAX: u64 = 8 << 20;

/// An image in a file or on a block device.
pub(crate) struct FileIo {
    /// The way past the file system, where there may be one. Dropped before the file.
    bdev: Option<Pin<KBox<Bdev>>>,
    file: File,
    align: Align,
    errands: Arc<Workqueue>,
    /// A sync has failed. Locked while one runs: what is lost is told but once, to any of those who
    /// sync at the same time.
    is_lost: Pin<KBox<Mutex<bool>>>,
    /// Changes through the file system that have ended, but for those of requests.
    changes: Atomic<u64>,
}

impl FileIo {
    /// Opens the file anew: for direct I/O if it can do that in blocks of at most 4096 bytes, else
    /// through the page cache, where our syncs are what makes data durable all the same.
    pub(crate) fn open(user: &File, access: Access, errands: &Arc<Workqueue>) -> Result<Self> {
        match user.kind() {
            Kind::Regular | Kind::Block => {}
            Kind::Other => return Err(EINVAL),
        }
        if !user.can_do_io() {
            return Err(Errno::OpNotSupp.error());
        }
        if let Some(align) = user
            .direct_align()
            .filter(|a| a.offset.max(a.memory) <= ALIGN_MAX)
        {
            match user.reopen(access, Mode::Direct) {
                Ok(file) => {
                    let align = Align {
                        offset: align.offset.max(ALIGN_MIN.offset),
                        memory: align.memory.max(ALIGN_MIN.memory),
                    };
                    return Self::new(file, align, errands);
                }
                // The file system cannot.
                Err(e) if e == EINVAL => {}
                Err(e) => return Err(e),
            }
        }
        Self::new(user.reopen(access, Mode::Buffered)?, ALIGN_MIN, errands)
    }

    fn new(file: File, align: Align, errands: &Arc<Workqueue>) -> Result<Self> {
        let may_be = file.mode() == Mode::Direct && file.has_blocks() && sys::wants_bdev();
        let bdev = may_be.then(Bdev::new).transpose()?;
        Ok(Self {
            bdev,
            errands: errands.clone(),
            file,
            align,
            is_lost: KBox::pin_init(new_mutex!(false), GFP_KERNEL)?,
            changes: Atomic::new(0),
        })
    }

    /// The way past the file system, where there may be one.
    pub(super) fn bdev(&self) -> Option<&Bdev> {
        self.bdev.as_deref()
    }

    /// Learns where the blocks of `range` are, for [`Bdev::submit`], if that may be.
    pub(super) fn learn(&self, range: &Range<u64>, disk: DiskShape) {
        if let Some(bdev) = self.bdev() {
            bdev.learn(&self.file, range, disk);
        }
    }

    /// Gives the way past the file system up, for good.
    pub(super) fn release(&self) {
        if let Some(bdev) = self.bdev() {
            bdev.release();
        }
    }

    /// Where file I/O of processes runs.
    pub(super) fn errands(&self) -> &Arc<Workqueue> {
        &self.errands
    }

    /// Calls `f` so that neither a signal to the caller nor a limit of his ends its I/O: on a network, in a
    /// program, or through a page cache, which direct I/O may go through, too, it does not go on in who
    /// is killed.
    pub(super) fn to_the_end<R: Send>(
        &self,
        f: impl FnOnce(&File) -> Result<R> + Send,
    ) -> Result<R> {
        match self.file.kind() {
            Kind::Block => f(&self.file),
            // The worker does not know what memory may be got for this.
            Kind::Regular | Kind::Other => {
                self.errands.errand(|| noio(|| f(&self.file))).ok_or(EIO)?
            }
        }
    }

    /// Calls `f`, which may change where the blocks of `range` are or what counts of them.
    pub(super) fn change(
        &self,
        range: Range<u64>,
        f: impl FnOnce(&File) -> Result + Send,
    ) -> Result {
        self.write(|file| match self.bdev() {
            Some(bdev) => bdev.change(&range, || f(file)),
            None => f(file),
        })
    }

    /// Calls `f`, which changes the file in any other way.
    pub(super) fn write(&self, f: impl FnOnce(&File) -> Result + Send) -> Result {
        let result = self.to_the_end(f);
        self.changes.fetch_add(1, Release);
        result
    }

    /// Changes so far; those that are under way do not count yet, nor those of requests.
    pub(super) fn nr_changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    /// Makes everything durable. Once that has failed, EIO for ever.
    pub(super) fn sync(&self) -> Result {
        let mut is_lost = self.is_lost.lock();
        if *is_lost {
            return Err(EIO);
        }
        let result = self.to_the_end(|file| match self.bdev() {
            Some(bdev) => bdev.sync(|| file.sync()),
            None => file.sync(),
        });
        *is_lost = result.is_err();
        result
    }

    /// The open file.
    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// What requests have to keep to: 512 to 4096 bytes each.
    pub(crate) fn align(&self) -> Align {
        self.align
    }

    /// Allocates the space, with zeros written there if the device does that by itself, if the file
    /// system can; else grows the file by a hole.
    pub(crate) fn grow(&self, range: Range<u64>) -> Result {
        let is_unknown = |result: &Result| result.is_err_and(|e| Errno::OpNotSupp.is(e));
        self.change(range.clone(), |file| {
            let mut parts = range.clone().step_by(ZEROES_MAX as usize);
            let mut result = parts.try_for_each(|start| {
                file.allocate_written(start..range.end.min(start.saturating_add(ZEROES_MAX)))
            });
            if is_unknown(&result) {
                result = file.allocate(range.clone());
            }
            if is_unknown(&result) {
                result = file.truncate(range.end);
            }
            result
        })
    }
}

impl Drop for FileIo {
    fn drop(&mut self) {
        super::lock::release(&self.file);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The `file` engine: control blocks on a file of any file system, directly where it can.

use crate::sys::{
    file::{Access, Align, File, Kind, Mode},
    prelude::*,
};
use core::ops::Range;

/// Largest alignment of direct I/O that a disk with 4096-byte blocks keeps to.
const ALIGN_MAX: u32 = 4096;
/// What any disk can keep to, and what is asked of it at least.
const ALIGN_MIN: Align = Align {
    offset: 512,
    memory: 512,
};

/// An image in a file or on a block device.
pub(crate) struct FileIo {
    file: File,
    align: Align,
}

impl FileIo {
    /// Opens the file anew: for direct I/O if it can do that in blocks of at most 4096 bytes, else
    /// through the page cache, where our syncs are what makes data durable all the same.
    pub(crate) fn open(user: &File, access: Access) -> Result<Self> {
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
                    return Ok(Self { file, align });
                }
                // The file system cannot.
                Err(e) if e == EINVAL => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Self {
            file: user.reopen(access, Mode::Buffered)?,
            align: ALIGN_MIN,
        })
    }

    /// The open file.
    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// What requests have to keep to: 512 to 4096 bytes each.
    pub(crate) fn align(&self) -> Align {
        self.align
    }

    /// Allocates the space if the file system can, else grows the file by a hole.
    pub(crate) fn grow(&self, range: Range<u64>) -> Result {
        let end = range.end;
        match self.file.allocate(range) {
            Err(e) if Errno::OpNotSupp.is(e) => self.file.truncate(end),
            other => other,
        }
    }
}

impl Drop for FileIo {
    fn drop(&mut self) {
        super::lock::release(&self.file);
    }
}

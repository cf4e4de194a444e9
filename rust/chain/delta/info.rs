// SPDX-License-Identifier: GPL-2.0
//! What a delta shows of itself.

use crate::{
    format::Format,
    io::Io,
    sys::{
        file::{Access, Identity},
        prelude::*,
    },
};

/// Longest path that is shown.
const PATH_BYTES: usize = 1024;

/// What sysfs shows of a delta; fixed while it exists.
pub(crate) struct Info {
    /// Path of the image when it was added.
    pub(crate) path: KVec<u8>,
    /// The image file.
    pub(crate) identity: Identity,
    /// Name of the format.
    pub(crate) format: &'static str,
    /// Name of the io engine.
    pub(crate) io: &'static str,
    /// Whether the delta is read-only.
    pub(crate) read_only: bool,
}

impl Info {
    /// Of an image that is open as `io`.
    pub(super) fn new(io: &Io, format: &Format, access: Access) -> Result<Self> {
        let mut buf = KVec::from_elem(0u8, PATH_BYTES, GFP_KERNEL)?;
        let mut path = KVec::new();
        match io.as_file().path(&mut buf) {
            Ok(p) => path.extend_from_slice(p, GFP_KERNEL)?,
            // Only shown, so a longer one does not matter.
            Err(e) if Errno::NameTooLong.is(e) => {
                path.extend_from_slice(b"(path too long)", GFP_KERNEL)?
            }
            Err(e) => return Err(e),
        }
        Ok(Self {
            path,
            identity: io.as_file().identity()?,
            format: format.name(),
            io: io.name(),
            read_only: access == Access::Read,
        })
    }
}

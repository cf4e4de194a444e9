// SPDX-License-Identifier: GPL-2.0
//! File systems on a disk, frozen.

use super::{
    bindings,
    gen_disk::{BlockDevice, DiskRef},
};
use kernel::{error::to_result, prelude::*};

/// The file systems on a disk and its partitions, all clean and not to be written until this is
/// dropped.
///
/// # Invariants
///
/// Filled by `ploop_fs_freeze`; thawed once, by drop.
pub(crate) struct FrozenFs(KBox<bindings::ploop_frozen_fs>);

// SAFETY: References to open files, which any task may give back.
unsafe impl Send for FrozenFs {}

impl FrozenFs {
    /// Freezes them; waits until what they have to write is written.
    pub(crate) fn freeze<D: BlockDevice>(disk: DiskRef<'_, D>) -> Result<Self> {
        let mut fs = KBox::new(bindings::ploop_frozen_fs::default(), GFP_KERNEL)?;
        // SAFETY: A live disk; the structure is ours.
        to_result(unsafe { bindings::ploop_fs_freeze(disk.as_ptr(), &mut *fs) })?;
        // INVARIANT: Just filled.
        Ok(Self(fs))
    }
}

impl Drop for FrozenFs {
    fn drop(&mut self) {
        // SAFETY: By the invariant.
        unsafe { bindings::ploop_fs_thaw(&mut *self.0) };
    }
}

// SPDX-License-Identifier: GPL-2.0
//! FREEZE and THAW, and the freezing around a snapshot.

use super::{Control, Device, Impatient};
use crate::{
    error::refusal,
    sys::{fs_freeze::FrozenFs, gen_disk::DiskRef, prelude::*},
};
use ploop_pure::lifecycle::{admit, Call};

impl Device {
    /// FREEZE and THAW: freezes the file systems on the disk, or thaws them; nothing if they are.
    pub(crate) fn set_frozen(disk: DiskRef<'_, Self>, frozen: bool) -> Result {
        let this = disk.driver();
        let mut control = this.control.lock();
        admit(control.state(), Call::Freeze).map_err(refusal)?;
        let is_changing = control.is_freezing || control.nr_thawing > 0;
        if is_changing && (frozen || control.frozen_fs.is_none()) {
            return Err(EBUSY);
        }
        let (mut thawed, mut result) = (None, Ok(()));
        if frozen && control.frozen_fs.is_none() {
            if control.engine.as_ref().is_some_and(|e| e.has_parked()) {
                // They would be waited for without end.
                return Err(ENOSPC);
            }
            let fs;
            (control, fs) = Self::freeze_fs(disk, control);
            let fs = fs?;
            result = control.engine.as_ref().map_or(Ok(()), Self::commit_top);
            match result {
                Ok(()) => control.frozen_fs = Some(fs),
                // Nobody else would.
                Err(_) => thawed = Some(fs),
            }
        } else if !frozen {
            thawed = control.frozen_fs.take();
        }
        match thawed {
            Some(fs) => this.thaw_fs(control, fs),
            None => this.view.lock().is_frozen = control.frozen_fs.is_some(),
        }
        result
    }

    /// Thaws file systems, without the control lock: what that writes may wait for space, and nobody
    /// must wait for it.
    pub(super) fn thaw_fs(&self, mut control: MutexGuard<'_, Control>, fs: FrozenFs) {
        control.nr_thawing += 1;
        drop(control);
        drop(fs);
        let mut control = self.control.lock();
        control.nr_thawing -= 1;
        self.view.lock().is_frozen = control.frozen_fs.is_some();
    }

    /// Freezes the file systems on the disk. What they write before that fails, rather than waits,
    /// if there is no space for it. Without the control lock meanwhile: a write on its way is waited for,
    /// and how long that takes is up to who writes. What would change the deltas, stop the device, freeze
    /// or thaw is EBUSY until then.
    pub(super) fn freeze_fs<'a>(
        disk: DiskRef<'a, Self>,
        mut control: MutexGuard<'a, Control>,
    ) -> (MutexGuard<'a, Control>, Result<FrozenFs>) {
        control.is_freezing = true;
        let engine = control.engine.clone();
        drop(control);
        let frozen = {
            let _impatient = Impatient::begin(engine);
            FrozenFs::freeze(disk)
        };
        let mut control = disk.driver().control.lock();
        control.is_freezing = false;
        (control, frozen)
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Who holds an image: a table of this module's own users, and QEMU's byte locks against others.
//!
//! Locks: `reserved`, then `users`; both leaves.

use crate::sys::{
    file::{Access, File},
    prelude::*,
};

/// QEMU: the holder writes to the image.
const BYTE_WRITES: u8 = 101;
/// QEMU: the holder changes the image's length.
const BYTE_RESIZES: u8 = 103;
/// QEMU: the holder reads the image and needs it to make sense.
const BYTE_READS: u8 = 100;
/// QEMU: the holder wants nobody else to write.
const BYTE_DENIES_WRITE: u8 = 201;
/// QEMU: the holder wants nobody else to change the length.
const BYTE_DENIES_RESIZE: u8 = 203;

/// What the holder of an image does with it.
const SHOWN_TO_READ: [u8; 3] = [BYTE_READS, BYTE_DENIES_WRITE, BYTE_DENIES_RESIZE];
const SHOWN_TO_WRITE: [u8; 5] = [
    BYTE_READS,
    BYTE_WRITES,
    BYTE_RESIZES,
    BYTE_DENIES_WRITE,
    BYTE_DENIES_RESIZE,
];
/// What nobody else may be doing then.
const EXCLUDED_BY_READ: [u8; 2] = [BYTE_WRITES, BYTE_RESIZES];
const EXCLUDED_BY_WRITE: [u8; 4] = [
    BYTE_WRITES,
    BYTE_RESIZES,
    BYTE_DENIES_WRITE,
    BYTE_DENIES_RESIZE,
];

struct User {
    inode_key: usize,
    access: Access,
    device: u32,
}

/// The images that this module has open, by inode: one writer or many readers each.
#[pin_data]
pub(crate) struct Images {
    #[pin]
    users: Mutex<KVec<User>>,
    /// Device numbers promised to readers of `/proc/vz/ploop_minor`.
    #[pin]
    reserved: Mutex<KVec<u32>>,
}

impl Images {
    /// No image is open.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            users <- new_mutex!(KVec::new()),
            reserved <- new_mutex!(KVec::new()),
        })
    }

    /// The lowest of `nr` device numbers that is not reserved and whose device has no image.
    pub(crate) fn lowest_idle_device(&self, nr: u32) -> Option<u32> {
        let reserved = self.reserved.lock();
        let users = self.users.lock();
        let is_idle = |i| users.iter().all(|u| u.device != i) && !reserved.contains(&i);
        (0..nr).find(|i| is_idle(*i))
    }

    /// The same, and nobody else gets it until it is given back.
    pub(crate) fn reserve_idle_device(&self, nr: u32) -> Result<u32> {
        loop {
            let idle = self.lowest_idle_device(nr).ok_or(ERANGE)?;
            let mut reserved = self.reserved.lock();
            if !reserved.contains(&idle) {
                reserved.push(idle, GFP_KERNEL)?;
                return Ok(idle);
            }
        }
    }

    /// Ends a reservation.
    pub(crate) fn give_back_device(&self, device: u32) {
        self.reserved.lock().retain(|i| *i != device);
    }

    /// Whether a device number is reserved.
    pub(crate) fn is_reserved(&self, device: u32) -> bool {
        self.reserved.lock().contains(&device)
    }

    /// Takes the image for device `device`, or says who has it and returns EBUSY. `file` must be
    /// an own open file of the device; the locks end when it is dropped.
    pub(crate) fn lock(
        self: &Arc<Self>,
        file: &File,
        access: Access,
        device: u32,
    ) -> Result<ImageLock> {
        let inode_key = file.inode_key();
        {
            let mut users = self.users.lock();
            let writes = |a| a == Access::ReadWrite;
            let other = users
                .iter()
                .find(|u| u.inode_key == inode_key && (writes(u.access) || writes(access)));
            if let Some(user) = other {
                pr_err!("ploop{device}: image is in use by ploop{}\n", user.device);
                return Err(EBUSY);
            }
            let user = User {
                inode_key,
                access,
                device,
            };
            users.push(user, GFP_KERNEL)?;
        }
        // From here on the table is given back by drop.
        let lock = ImageLock {
            images: self.clone(),
            inode_key,
            device,
        };
        lock_against_others(file, access, device)?;
        Ok(lock)
    }
}

impl ImageLock {
    /// From here on the image, of which `file` is the open file that was locked, is only read.
    pub(crate) fn downgrade(&self, file: &File) {
        self.set_access(Access::Read);
        for byte in SHOWN_TO_WRITE {
            if !SHOWN_TO_READ.contains(&byte) {
                file.unlock_byte(byte);
            }
        }
    }

    /// From here on the image, which is only read through `file`, is written through `writer` too.
    /// EBUSY if another device or program has it.
    pub(crate) fn upgrade(&self, file: &File, writer: &File) -> Result {
        {
            let mut users = self.images.users.lock();
            let is_other = |u: &&User| u.inode_key == self.inode_key && u.device != self.device;
            if let Some(user) = users.iter().find(is_other) {
                pr_err!(
                    "ploop{}: image is in use by ploop{}\n",
                    self.device,
                    user.device
                );
                return Err(EBUSY);
            }
            // At once, or another device might come to read it.
            set_access(&mut users, self, Access::ReadWrite);
        }
        let locked = show(writer, Access::ReadWrite, self.device).and_then(|shown| {
            // The writer wishes too that nobody writes: there is no moment without. Its own wish of the
            // reader would be in the way of the look.
            for byte in [BYTE_DENIES_WRITE, BYTE_DENIES_RESIZE] {
                file.unlock_byte(byte);
            }
            let looked = match shown {
                true => look(writer, Access::ReadWrite, self.device),
                false => Ok(()),
            };
            self.relock(file);
            looked
        });
        locked.inspect_err(|_| self.set_access(Access::Read))
    }

    fn relock(&self, file: &File) {
        for byte in SHOWN_TO_READ {
            // Where there are no locks there were none before.
            let _ = file.lock_byte(byte);
        }
    }

    /// From here on the image is read through `file` only again.
    pub(crate) fn reclaim(&self, file: &File) {
        self.relock(file);
        self.set_access(Access::Read);
    }

    fn set_access(&self, access: Access) {
        set_access(&mut self.images.users.lock(), self, access);
    }
}

fn set_access(users: &mut [User], lock: &ImageLock, access: Access) {
    let is_ours = |u: &&mut User| u.inode_key == lock.inode_key && u.device == lock.device;
    if let Some(user) = users.iter_mut().find(is_ours) {
        user.access = access;
    }
}

/// An image taken in the table.
pub(crate) struct ImageLock {
    images: Arc<Images>,
    inode_key: usize,
    device: u32,
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        let mut users = self.images.users.lock();
        let idx = users
            .iter()
            .position(|u| u.inode_key == self.inode_key && u.device == self.device);
        if let Some(idx) = idx {
            // Found just now.
            let _ = users.remove(idx);
        }
    }
}

/// Ends all locks of an open file now: its last reference may go later, on another thread.
pub(super) fn release(file: &File) {
    for byte in SHOWN_TO_WRITE {
        file.unlock_byte(byte);
    }
}

/// Takes QEMU's locks: first shows what we do, then looks whether anybody does what that excludes.
/// Two at once may both be refused; never are both let in.
fn lock_against_others(file: &File, access: Access, device: u32) -> Result {
    match show(file, access, device)? {
        true => look(file, access, device),
        false => Ok(()),
    }
}

/// Shows what we do; no where the file system has no locks.
fn show(file: &File, access: Access, device: u32) -> Result<bool> {
    let shown: &[u8] = match access {
        Access::Read => &SHOWN_TO_READ,
        Access::ReadWrite => &SHOWN_TO_WRITE,
    };
    for byte in shown {
        match file.lock_byte(*byte) {
            Ok(()) => {}
            // Some network file systems have no locks. So has QEMU nothing to go by there.
            Err(e)
                if [Errno::OpNotSupp, Errno::NoLocks, Errno::NoSys]
                    .iter()
                    .any(|n| n.is(e)) =>
            {
                pr_notice!(
                    "ploop{device}: the image's file system has no locks: QEMU is not kept out\n"
                );
                return Ok(false);
            }
            Err(e) => {
                pr_err!("ploop{device}: image is locked by another program (byte {byte})\n");
                return Err(if e == EAGAIN { EBUSY } else { e });
            }
        }
    }
    Ok(true)
}

/// Looks whether anybody does what we exclude.
fn look(file: &File, access: Access, device: u32) -> Result {
    let excluded: &[u8] = match access {
        Access::Read => &EXCLUDED_BY_READ,
        Access::ReadWrite => &EXCLUDED_BY_WRITE,
    };
    for byte in excluded {
        if let Some(pid) = file.byte_locked_by(*byte) {
            pr_err!(
                "ploop{device}: image is open in another program, pid {pid} (lock byte {byte})\n"
            );
            return Err(EBUSY);
        }
    }
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! The control device and the block devices: typed ioctls, nothing else. The only `unsafe` code
//! of the tool.

use nix::errno::Errno;
use nix::fcntl::OFlag;
use ploop_pure::abi::{
    self, AddDelta, Checkpoint, CheckpointRead, Chunk, Ctl, DeviceArg, Extent, OpStart, OpStatus,
    TrackExtent, Version,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zerocopy::FromZeros;

/// The calls as functions. nix's macros make them; their arguments are pointers to the very
/// structures of `ploop_pure::abi` that the numbers belong to.
mod raw {
    use super::abi;
    use nix::sys::ioctl::ioctl_num_type as Num;

    nix::ioctl_none_bad!(
        /// CLEAR.
        clear,
        abi::CLEAR as Num
    );
    nix::ioctl_none_bad!(
        /// STOP.
        stop,
        abi::STOP as Num
    );
    nix::ioctl_none_bad!(
        /// START.
        start,
        abi::START as Num
    );
    nix::ioctl_write_ptr_bad!(
        /// ADD_DELTA.
        add_delta,
        abi::ADD_DELTA as Num,
        abi::AddDelta
    );
    nix::ioctl_write_ptr_bad!(
        /// SNAPSHOT: head and chunk, without a cookie.
        snapshot,
        abi::SNAPSHOT as Num,
        abi::AddDelta
    );
    nix::ioctl_write_ptr_bad!(
        /// REPLACE_DELTA: head and chunk, without a cookie.
        replace_delta,
        abi::REPLACE_DELTA as Num,
        abi::AddDelta
    );
    nix::ioctl_readwrite_bad!(
        /// OP_START.
        op_start,
        abi::OP_START as Num,
        abi::OpStart
    );
    nix::ioctl_readwrite_bad!(
        /// OP_STATUS.
        op_status,
        abi::OP_STATUS as Num,
        abi::OpStatus
    );
    nix::ioctl_none_bad!(
        /// OP_CANCEL.
        op_cancel,
        abi::OP_CANCEL as Num
    );
    nix::ioctl_write_ptr_bad!(
        /// OP_RATE.
        op_rate,
        abi::OP_RATE as Num,
        u64
    );
    nix::ioctl_read_bad!(
        /// TRACK_INIT.
        track_init,
        abi::TRACK_INIT as Num,
        abi::TrackExtent
    );
    nix::ioctl_write_ptr_bad!(
        /// TRACK_SETPOS.
        track_setpos,
        abi::TRACK_SETPOS as Num,
        u64
    );
    nix::ioctl_read_bad!(
        /// TRACK_READ.
        track_read,
        abi::TRACK_READ as Num,
        abi::TrackExtent
    );
    nix::ioctl_none_bad!(
        /// TRACK_STOP.
        track_stop,
        abi::TRACK_STOP as Num
    );
    nix::ioctl_none_bad!(
        /// TRACK_ABORT.
        track_abort,
        abi::TRACK_ABORT as Num
    );
    nix::ioctl_none_bad!(
        /// SYNC.
        sync,
        abi::SYNC as Num
    );
    nix::ioctl_none_bad!(
        /// FREEZE.
        freeze,
        abi::FREEZE as Num
    );
    nix::ioctl_none_bad!(
        /// THAW.
        thaw,
        abi::THAW as Num
    );
    nix::ioctl_write_ptr_bad!(
        /// CHECKPOINT_START.
        checkpoint_start,
        abi::CHECKPOINT_START as Num,
        abi::Checkpoint
    );
    nix::ioctl_write_ptr_bad!(
        /// CHECKPOINT_DROP.
        checkpoint_drop,
        abi::CHECKPOINT_DROP as Num,
        abi::Checkpoint
    );
    nix::ioctl_readwrite_bad!(
        /// CHECKPOINT_LIST.
        checkpoint_list,
        abi::CHECKPOINT_LIST as Num,
        abi::Checkpoint
    );
    nix::ioctl_readwrite_bad!(
        /// CHECKPOINT_READ.
        checkpoint_read,
        abi::CHECKPOINT_READ as Num,
        super::ReadArg
    );
    nix::ioctl_readwrite!(
        /// FITRIM of linux/fs.h.
        fitrim,
        b'X',
        121,
        super::TrimRange
    );
    nix::ioctl_readwrite!(
        /// FIFREEZE of linux/fs.h.
        fifreeze,
        b'X',
        119,
        nix::libc::c_int
    );
    nix::ioctl_readwrite!(
        /// FITHAW of linux/fs.h.
        fithaw,
        b'X',
        120,
        nix::libc::c_int
    );
    nix::ioctl_readwrite_bad!(
        /// CTL_ADD.
        ctl_add,
        abi::CTL_ADD as Num,
        abi::DeviceArg
    );
    nix::ioctl_readwrite_bad!(
        /// CTL_VERSION.
        ctl_version,
        abi::CTL_VERSION as Num,
        abi::Version
    );
    nix::ioctl_write_ptr_bad!(
        /// CTL_REMOVE.
        ctl_remove,
        abi::CTL_REMOVE as Num,
        abi::DeviceArg
    );
}

/// `/dev/ploop-control`.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Its path.
    pub fn path() -> PathBuf {
        Path::new("/dev").join(abi::CONTROL_NAME)
    }

    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(Self::path());
        file.map(Self)
    }

    /// Adds a device, of index `index` or the lowest unused one, and returns the index.
    pub fn add(&self, index: Option<u32>) -> Result<u32, Errno> {
        let index = index.map_or(Ok(-1), i32::try_from);
        let mut arg = DeviceArg::new(index.map_err(|_| Errno::EINVAL)?);
        // SAFETY: the descriptor is open and `arg` is the structure of CTL_ADD, exclusively ours
        // and alive for the call.
        unsafe { raw::ctl_add(self.0.as_raw_fd(), &mut arg) }?;
        u32::try_from(arg.index).map_err(|_| Errno::EPROTO)
    }

    /// Which module answers; ENOTTY if it is older than this call.
    pub fn version(&self) -> Result<Version, Errno> {
        let mut arg = Version::read();
        // SAFETY: the descriptor is open and `arg` is the structure of CTL_VERSION, exclusively
        // ours and alive for the call.
        unsafe { raw::ctl_version(self.0.as_raw_fd(), &mut arg) }?;
        Ok(arg)
    }

    /// Removes the device of index `index`, which has no delta and is not open.
    pub fn remove(&self, index: u32) -> Result<(), Errno> {
        let arg = DeviceArg::new(i32::try_from(index).map_err(|_| Errno::EINVAL)?);
        // SAFETY: the descriptor is open and `arg` is the structure of CTL_REMOVE, alive for the
        // call.
        unsafe { raw::ctl_remove(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }
}

/// What ADD_DELTA is to add.
#[derive(Debug, Clone, Copy)]
pub struct Delta<'a> {
    /// The image file.
    pub image: BorrowedFd<'a>,
    /// `FORMAT_*`.
    pub format: u32,
    /// `FLAG_*`, without `FLAG_COOKIE`.
    pub flags: u32,
    /// log2 of the sectors of a cluster.
    pub cluster_log: u32,
    /// Name of the device; at most [`abi::COOKIE_LEN_MAX`] bytes.
    pub cookie: Option<&'a str>,
}

/// When a checkpoint begins to note what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// At once.
    Now,
    /// At the switch of the next snapshot.
    AtSnapshot,
}

/// Extents that one CHECKPOINT_READ can return.
const EXTENTS: usize = 1024;

/// Argument of CHECKPOINT_READ.
#[repr(C)]
pub struct ReadArg {
    head: CheckpointRead,
    extents: [Extent; EXTENTS],
}

const _: () = assert!(std::mem::offset_of!(ReadArg, extents) == size_of::<CheckpointRead>());

/// A block device `/dev/ploopN`, open.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    /// Path of device `index`.
    pub fn path(index: u32) -> PathBuf {
        PathBuf::from(format!("/dev/ploop{index}"))
    }

    /// Opens device `index` for control only: read-only, which wakes no udev rule at close. A
    /// node that is something else is not opened.
    pub fn open(index: u32) -> io::Result<Self> {
        let path = Self::path(index);
        let meta = std::fs::metadata(&path)?;
        if !meta.file_type().is_block_device() || disk_of(meta.rdev()) != Some(index) {
            return Err(Errno::ENODEV.into());
        }
        let flags = OFlag::O_NONBLOCK.bits();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        file.map(Self)
    }

    /// Adds an image to the stopped device.
    pub fn add_delta(&self, delta: Delta<'_>) -> Result<(), Errno> {
        let arg = argument(delta, 0)?;
        // SAFETY: the descriptor is open and `arg` has head, one chunk as `chunks` says, and a
        // cookie; it is alive for the call.
        unsafe { raw::add_delta(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// Makes the running device write to a new top. `FLAG_FS_SYNC` is possible here.
    pub fn snapshot(&self, top: Delta<'_>) -> Result<(), Errno> {
        let arg = argument(top, 0)?;
        // SAFETY: the descriptor is open and `arg` has head and one chunk as `chunks` says; it is
        // alive for the call.
        unsafe { raw::snapshot(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// Puts another image in the place of that of `level`.
    pub fn replace(&self, level: u8, with: Delta<'_>) -> Result<(), Errno> {
        let arg = argument(with, level)?;
        // SAFETY: as for `snapshot`.
        unsafe { raw::replace_delta(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// Starts a long operation, and returns its number.
    pub fn op_start(&self, start: &OpStart) -> Result<u64, Errno> {
        let mut arg = *start;
        // SAFETY: the descriptor is open and `arg` is the structure of OP_START, exclusively ours
        // and alive for the call.
        unsafe { raw::op_start(self.0.as_raw_fd(), &mut arg) }?;
        Ok(arg.serial)
    }

    /// How far the long operation is, or how the last one ended.
    pub fn op_status(&self) -> Result<OpStatus, Errno> {
        let mut arg = OpStatus::new_zeroed();
        arg.size = u32::try_from(size_of::<OpStatus>()).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the descriptor is open and `arg` is the structure of OP_STATUS, exclusively ours
        // and alive for the call.
        unsafe { raw::op_status(self.0.as_raw_fd(), &mut arg) }?;
        Ok(arg)
    }

    /// Ends the long operation early, and waits until it has ended.
    pub fn op_cancel(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::op_cancel(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Limits the long operation to `rate` bytes a second; 0 is no limit.
    pub fn op_rate(&self, rate: u64) -> Result<(), Errno> {
        // SAFETY: the descriptor is open and `rate` is the number that OP_RATE reads, alive for the
        // call.
        unsafe { raw::op_rate(self.0.as_raw_fd(), &rate) }?;
        Ok(())
    }

    /// Starts the write tracker; what there is to read of the image file of the top.
    pub fn track_init(&self) -> Result<TrackExtent, Errno> {
        let mut arg = TrackExtent::new_zeroed();
        // SAFETY: the descriptor is open and `arg` is the structure of TRACK_INIT, exclusively ours
        // and alive for the call.
        unsafe { raw::track_init(self.0.as_raw_fd(), &mut arg) }?;
        Ok(arg)
    }

    /// Announces that the image file is read up to byte `end`.
    pub fn track_setpos(&self, end: u64) -> Result<(), Errno> {
        // SAFETY: the descriptor is open and `end` is the number that TRACK_SETPOS reads, alive for
        // the call.
        unsafe { raw::track_setpos(self.0.as_raw_fd(), &end) }?;
        Ok(())
    }

    /// Takes the next range that was written to; EAGAIN if there is none.
    pub fn track_read(&self) -> Result<TrackExtent, Errno> {
        let mut arg = TrackExtent::new_zeroed();
        // SAFETY: the descriptor is open and `arg` is the structure of TRACK_READ, exclusively ours
        // and alive for the call.
        unsafe { raw::track_read(self.0.as_raw_fd(), &mut arg) }?;
        Ok(arg)
    }

    /// Stops the write tracker; EBUSY if there is something left to read.
    pub fn track_stop(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::track_stop(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Drops the write tracker.
    pub fn track_abort(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::track_abort(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Makes data and index durable.
    pub fn sync(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::sync(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Freezes the file systems on the disk and its partitions.
    pub fn freeze(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::freeze(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Thaws them.
    pub fn thaw(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::thaw(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Starts the checkpoint `id`, with the next snapshot or at once.
    pub fn checkpoint_start(&self, id: [u8; 16], begin: Begin) -> Result<(), Errno> {
        let mut arg = Checkpoint::new(id);
        arg.flags = match begin {
            Begin::Now => 0,
            Begin::AtSnapshot => abi::CHECKPOINT_AT_SNAPSHOT,
        };
        // SAFETY: the descriptor is open and `arg` is the structure of CHECKPOINT_START, alive for
        // the call.
        unsafe { raw::checkpoint_start(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// Drops the checkpoint `id`.
    pub fn checkpoint_drop(&self, id: [u8; 16]) -> Result<(), Errno> {
        let arg = Checkpoint::new(id);
        // SAFETY: the descriptor is open and `arg` is the structure of CHECKPOINT_DROP, alive for
        // the call.
        unsafe { raw::checkpoint_drop(self.0.as_raw_fd(), &arg) }?;
        Ok(())
    }

    /// The checkpoint number `index`, `None` if there are not so many.
    pub fn checkpoint(&self, index: u32) -> Result<Option<Checkpoint>, Errno> {
        let mut arg = Checkpoint::new([0; 16]);
        arg.index = index;
        // SAFETY: the descriptor is open and `arg` is the structure of CHECKPOINT_LIST, exclusively
        // ours and alive for the call.
        match unsafe { raw::checkpoint_list(self.0.as_raw_fd(), &mut arg) } {
            Ok(_) => Ok(Some(arg)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What was written since the checkpoint `id` to `len` bytes from `start` of the disk; and the
    /// rest that was not answered for, as its first byte and length.
    pub fn checkpoint_read(
        &self,
        id: [u8; 16],
        start: u64,
        len: u64,
    ) -> Result<(Vec<Extent>, (u64, u64)), Errno> {
        let mut arg = Box::new(ReadArg {
            head: CheckpointRead::new_zeroed(),
            extents: [Extent { start: 0, len: 0 }; EXTENTS],
        });
        arg.head.size = u32::try_from(size_of::<CheckpointRead>()).map_err(|_| Errno::EINVAL)?;
        arg.head.id = id;
        (arg.head.start, arg.head.len) = (start, len);
        arg.head.nr = u32::try_from(EXTENTS).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the descriptor is open; `arg` is the structure of CHECKPOINT_READ with room for as
        // many extents as it says, exclusively ours and alive for the call.
        unsafe { raw::checkpoint_read(self.0.as_raw_fd(), &mut *arg) }?;
        let nr = usize::try_from(arg.head.nr).map_err(|_| Errno::EPROTO)?;
        let found = arg.extents.get(..nr).ok_or(Errno::EPROTO)?;
        Ok((found.to_vec(), (arg.head.start, arg.head.len)))
    }

    /// Starts the device.
    pub fn start(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::start(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Stops the device.
    pub fn stop(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::stop(self.0.as_raw_fd()) }?;
        Ok(())
    }

    /// Drops all deltas of the stopped device.
    pub fn clear(&self) -> Result<(), Errno> {
        // SAFETY: the descriptor is open; the call has no argument.
        unsafe { raw::clear(self.0.as_raw_fd()) }?;
        Ok(())
    }
}

/// The argument of a call that hands over an image.
fn argument(delta: Delta<'_>, level: u8) -> Result<AddDelta, Errno> {
    let mut cookie = [0; 64];
    let mut flags = delta.flags;
    if let Some(text) = delta.cookie {
        if text.len() > abi::COOKIE_LEN_MAX {
            return Err(Errno::EINVAL);
        }
        cookie[..text.len()].copy_from_slice(text.as_bytes());
        flags |= abi::FLAG_COOKIE;
    }
    Ok(AddDelta {
        ctl: Ctl {
            format: delta.format,
            flags,
            cluster_log: delta.cluster_log,
            size: 0,
            chunks: 1,
            level,
            mbz1: 0,
            mbz2: 0,
        },
        chunk: Chunk {
            fd: delta.image.as_raw_fd(),
            io: abi::IO_AUTO,
            flags: 0,
            offset: 0,
            start: 0,
            len: 0,
        },
        cookie,
    })
}

/// struct fstrim_range of linux/fs.h.
#[repr(C)]
pub struct TrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

/// Discards what the mounted file system that `file` is of does not use; how many bytes.
pub fn trim(file: &File) -> Result<u64, Errno> {
    let mut range = TrimRange {
        start: 0,
        len: u64::MAX,
        minlen: 0,
    };
    // SAFETY: the descriptor is open and `range` is the structure of FITRIM, exclusively ours and
    // alive for the call.
    unsafe { raw::fitrim(file.as_raw_fd(), &mut range) }?;
    Ok(range.len)
}

/// Freezes the file system that `file` is of.
pub fn freeze(file: &File) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: the descriptor is open, and the kernel does not look at the argument.
    unsafe { raw::fifreeze(file.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// Thaws the file system that `file` is of.
pub fn thaw(file: &File) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: as for `freeze`.
    unsafe { raw::fithaw(file.as_raw_fd(), &mut unused) }?;
    Ok(())
}

/// Index of the ploop device that device number `rdev` is, or is a partition of.
pub fn disk_of(rdev: u64) -> Option<u32> {
    let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
    if major != u64::from(abi::MAJOR) {
        return None;
    }
    u32::try_from(minor >> abi::MINOR_SHIFT).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_belong_to_their_disk() {
        let dev = nix::sys::stat::makedev;
        assert_eq!(disk_of(dev(182, 0)), Some(0));
        assert_eq!(disk_of(dev(182, 33)), Some(2));
        assert_eq!(disk_of(dev(8, 0)), None);
    }
}

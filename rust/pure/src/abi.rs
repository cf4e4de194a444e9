// SPDX-License-Identifier: GPL-2.0
//! THE ABI: ioctl numbers and the structures they carry, native endian.
//!
//! Numbers 0 to 34 and their structures are binary compatible with OpenVZ's `ploop_if.h`. The
//! directions in those numbers are not reliable (several "write" calls return data); they are kept
//! for compatibility. Calls of our own start at [`NR_OWN`], carry their own size and reserved
//! fields that must be zero. `docs/abi.md` quotes this file; a test compares the two.

mod version;

pub use version::{Mismatch, Version};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Block major of ploop devices.
pub const MAJOR: u32 = 182;
/// Minors of a device: the disk and 15 partitions.
pub const MINORS: u32 = 16;
/// log2 of [`MINORS`].
pub const MINOR_SHIFT: u32 = 4;
/// Number of devices the minors allow: 2^20 minors of 16 each.
pub const DEVICES_MAX: u32 = 1 << (20 - MINOR_SHIFT);
/// Name of the control device below `/dev`.
pub const CONTROL_NAME: &str = "ploop-control";

/// Version of module and tool.
pub const VERSION: &str = "0.1.0";
/// What module and tool are to each other: goes up when a call, a field or a file in sysfs is added
/// that the other may need.
pub const INTERFACE: u32 = 1;
/// The oldest interface that this module and this tool still get on with: goes up when something is
/// given up that the other may need.
pub const INTERFACE_OLDEST: u32 = 1;

/// ioctl type letter of every ploop call.
pub const TYPE: u32 = b'P' as u32;
/// First call number that OpenVZ does not use.
pub const NR_OWN: u32 = 0x80;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

const fn ioc(dir: u32, nr: u32, size: usize) -> u32 {
    assert!(size < 1 << 14);
    (dir << 30) | ((size as u32) << 16) | (TYPE << 8) | nr
}

/// Adds an image as the new top delta of a stopped device: [`AddDelta`].
pub const ADD_DELTA: u32 = ioc(WRITE, 0, 24);
/// Drops all deltas of a stopped device.
pub const CLEAR: u32 = ioc(NONE, 1, 0);
/// Stops a running device and closes its images cleanly.
pub const STOP: u32 = ioc(NONE, 2, 0);
/// Starts a device that has deltas.
pub const START: u32 = ioc(NONE, 3, 0);
/// Adds a new top delta to a running device.
pub const SNAPSHOT: u32 = ioc(WRITE, 4, 24);
/// Removes the delta of a level (u32).
pub const DEL_DELTA: u32 = ioc(WRITE, 5, 4);
/// Starts the write tracker.
pub const TRACK_INIT: u32 = ioc(READ, 6, 16);
/// Stops the write tracker if nothing is dirty.
pub const TRACK_STOP: u32 = ioc(NONE, 7, 0);
/// Drops the write tracker.
pub const TRACK_ABORT: u32 = ioc(NONE, 8, 0);
/// Says up to where the image was read (u64 bytes).
pub const TRACK_SETPOS: u32 = ioc(WRITE, 9, 8);
/// Returns and clears the next dirty range.
pub const TRACK_READ: u32 = ioc(READ, 10, 16);
/// Makes data, index and header of the top delta durable.
pub const SYNC: u32 = ioc(NONE, 11, 0);
/// Merges the top delta into the next lower one.
pub const MERGE: u32 = ioc(NONE, 12, 0);
/// Swaps the file behind a delta.
pub const REPLACE_DELTA: u32 = ioc(WRITE, 13, 24);
/// Cuts the image file of a read-only level.
pub const TRUNCATE: u32 = ioc(WRITE, 14, 16);
/// Changes entries of the map in memory.
pub const UPDATE_INDEX: u32 = ioc(WRITE, 16, 8);
/// Grows a running device.
pub const GROW: u32 = ioc(WRITE, 17, 24);
/// Returns the loaded free blocks.
pub const FBGET: u32 = ioc(WRITE, 18, 16);
/// Enters, leaves or asks for the balloon state.
pub const BALLOON: u32 = ioc(WRITE, 19, 16);
/// Loads free blocks.
pub const FREEBLKS: u32 = ioc(WRITE, 20, 16);
/// Relocates tail blocks into free ones and truncates.
pub const RELOCBLKS: u32 = ioc(WRITE, 21, 16);
/// Returns the minor of the first unused device: [`GetDevice`].
pub const GETDEVICE: u32 = ioc(WRITE, 22, 8);
/// Enters discard maintenance.
pub const DISCARD_INIT: u32 = ioc(NONE, 23, 0);
/// Leaves discard maintenance.
pub const DISCARD_FINI: u32 = ioc(NONE, 24, 0);
/// Waits for discards in discard maintenance.
pub const DISCARD_WAIT: u32 = ioc(NONE, 25, 0);
/// Drops the free blocks.
pub const FBDROP: u32 = ioc(NONE, 26, 0);
/// Drops free extents below a length, given by value.
pub const FBFILTER: u32 = ioc(READ, 27, 8);
/// Limits the size of the top delta (u64 sectors).
pub const MAX_DELTA_SIZE: u32 = ioc(WRITE, 28, 8);
/// Starts a push backup.
pub const PUSH_BACKUP_INIT: u32 = ioc(READ, 29, 24);
/// Moves extents of a push backup.
pub const PUSH_BACKUP_IO: u32 = ioc(READ, 30, 24);
/// Ends a push backup.
pub const PUSH_BACKUP_STOP: u32 = ioc(READ, 31, 24);
/// Freezes the file systems on the device.
pub const FREEZE: u32 = ioc(NONE, 32, 0);
/// Thaws them.
pub const THAW: u32 = ioc(NONE, 33, 0);
/// Returns map entries as cached.
pub const DUMP_CACHED_BAT: u32 = ioc(WRITE, 34, 16);

/// Control device: adds a device: [`DeviceArg`], in and out.
pub const CTL_ADD: u32 = ioc(READ | WRITE, NR_OWN, 32);
/// Control device: removes a device that has no delta and is not open: [`DeviceArg`].
pub const CTL_REMOVE: u32 = ioc(WRITE, NR_OWN + 1, 32);

/// Starts a long operation, which then belongs to the device: [`OpStart`].
pub const OP_START: u32 = ioc(READ | WRITE, NR_OWN + 2, 64);
/// What the current long operation, or the last one, has done: [`OpStatus`].
pub const OP_STATUS: u32 = ioc(READ | WRITE, NR_OWN + 3, 64);
/// Waits until the long operation is over, then the same as [`OP_STATUS`].
pub const OP_WAIT: u32 = ioc(READ | WRITE, NR_OWN + 4, 64);
/// Asks the long operation to end early and waits until it has.
pub const OP_CANCEL: u32 = ioc(NONE, NR_OWN + 5, 0);
/// Sets the rate limit of the long operation (u64 bytes a second, 0 for none).
pub const OP_RATE: u32 = ioc(WRITE, NR_OWN + 6, 8);

/// Starts a checkpoint: from now on, or from the next snapshot on, it tells what is written to the
/// disk: [`Checkpoint`].
pub const CHECKPOINT_START: u32 = ioc(WRITE, NR_OWN + 7, 64);
/// Drops a checkpoint: [`Checkpoint`], of which only `id` is looked at.
pub const CHECKPOINT_DROP: u32 = ioc(WRITE, NR_OWN + 8, 64);
/// Tells of the checkpoint `index`, counted from 0: [`Checkpoint`].
pub const CHECKPOINT_LIST: u32 = ioc(READ | WRITE, NR_OWN + 9, 64);
/// Tells what was written since a checkpoint, in a part of the disk: [`CheckpointRead`], which
/// [`Extent`]s follow.
pub const CHECKPOINT_READ: u32 = ioc(READ | WRITE, NR_OWN + 10, 64);

/// Control device: tells which module this is: [`Version`].
pub const CTL_VERSION: u32 = ioc(READ | WRITE, NR_OWN + 11, 64);

/// [`Checkpoint::flags`]: it starts with the next snapshot, at the moment of its switch.
pub const CHECKPOINT_AT_SNAPSHOT: u32 = 1;
/// [`Checkpoint::state`]: it waits for a snapshot.
pub const CHECKPOINT_ARMED: u32 = 0;
/// [`Checkpoint::state`]: it notes what is written.
pub const CHECKPOINT_RECORDING: u32 = 1;
/// Checkpoints a device can have.
pub const CHECKPOINTS_MAX: usize = 16;
/// Bytes that a checkpoint tells apart if it is not said otherwise.
pub const GRANULARITY: u32 = 64 << 10;
/// Fewest that it can tell apart.
pub const GRANULARITY_MIN: u32 = 4 << 10;
/// Most.
pub const GRANULARITY_MAX: u32 = 64 << 20;

/// [`OpStart::op`]: none.
pub const OP_NONE: u32 = 0;
/// [`Balloon::mntn_type`]: the write tracker runs. OpenVZ's number for it.
pub const OP_TRACK: u32 = 3;
/// [`OpStart::op`]: merges a delta into the next lower one. OpenVZ's number for it.
pub const OP_MERGE: u32 = 257;
/// [`OpStart::op`]: makes the disk larger. OpenVZ's number for it.
pub const OP_GROW: u32 = 258;
/// [`OpStart::op`]: moves the last slots of the top into free ones and cuts the file. OpenVZ's
/// number for it.
pub const OP_COMPACT: u32 = 259;
/// [`OpStart::level`]: the top.
pub const LEVEL_TOP: u32 = u32::MAX;
/// [`OpStatus::state`]: nothing is running; `result` tells how the last operation ended.
pub const OP_IDLE: u32 = 0;
/// [`OpStatus::state`]: it is running.
pub const OP_RUNNING: u32 = 1;

/// [`Ctl::format`]: the file is the disk, byte for byte.
pub const FORMAT_RAW: u32 = 1;
/// [`Ctl::format`]: ploop1, versions 1 and 2.
pub const FORMAT_PLOOP1: u32 = 2;

/// [`Ctl::flags`]: the delta is read-only.
pub const FLAG_RDONLY: u32 = 1;
/// [`Ctl::flags`]: a [`Cookie`] follows the chunk.
pub const FLAG_COOKIE: u32 = 4;
/// [`Ctl::flags`]: [`Ctl::size`] is in clusters, not sectors.
pub const FLAG_CLUBLKS: u32 = 8;
/// [`Ctl::flags`]: freeze the file systems for the snapshot.
pub const FLAG_FS_SYNC: u32 = 0x1000_0000;
/// [`Ctl::flags`], ours: accept, read-only, an image that a crash left marked in use or with a
/// torn tail that no entry names. Needs [`FLAG_RDONLY`].
pub const FLAG_ACCEPT_INUSE: u32 = 0x2000_0000;

/// [`Chunk::io`]: choose by the file.
pub const IO_AUTO: u32 = 0;
/// [`Chunk::io`]: OpenVZ's direct engine; taken as a synonym of [`IO_AUTO`].
pub const IO_DIRECT: u32 = 1;
/// [`Chunk::io`]: OpenVZ's NFS engine; taken as a synonym of [`IO_AUTO`].
pub const IO_NFS: u32 = 2;
/// [`Chunk::io`]: OpenVZ's kaio engine; taken as a synonym of [`IO_AUTO`].
pub const IO_KAIO: u32 = 4;

/// Longest cookie, without the terminating zero.
pub const COOKIE_LEN_MAX: usize = 63;

/// `struct ploop_ctl`: head of ADD_DELTA, SNAPSHOT, REPLACE_DELTA and GROW. 24 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ctl {
    /// `FORMAT_*`.
    pub format: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// log2 of the sectors of a cluster.
    pub cluster_log: u32,
    /// New size, for GROW only: sectors, or clusters with `FLAG_CLUBLKS`.
    pub size: u32,
    /// Number of [`Chunk`]s that follow.
    pub chunks: u16,
    /// Level, for REPLACE_DELTA only.
    pub level: u8,
    /// Zero.
    pub mbz1: u8,
    /// Zero.
    pub mbz2: u32,
}

/// `struct ploop_ctl_chunk`: one image file. 32 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Chunk {
    /// Open file descriptor of the image.
    pub fd: i32,
    /// `IO_*`.
    pub io: u32,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub offset: u32,
    /// Zero.
    pub start: u64,
    /// Zero.
    pub len: u64,
}

/// A name given to the device at ADD_DELTA, shown in `pstate/cookie`. 64 bytes.
pub type Cookie = [u8; 64];

/// Argument of ADD_DELTA with a cookie: 120 bytes; the cookie is read only with `FLAG_COOKIE`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AddDelta {
    /// Head; `chunks` must be 1.
    pub ctl: Ctl,
    /// The image.
    pub chunk: Chunk,
    /// Name of the device, zero terminated.
    pub cookie: Cookie,
}

/// `struct ploop_getdevice_ctl`: result of GETDEVICE. 8 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct GetDevice {
    /// Minor of the disk node: index times 16.
    pub minor: u32,
    /// Zero.
    pub mbz: u32,
}

/// `struct ploop_truncate_ctl`: argument of TRUNCATE. 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Truncate {
    /// The same image file, open for writing.
    pub fd: i32,
    /// Clusters to keep.
    pub alloc_head: u32,
    /// Level.
    pub level: u8,
    /// Zero.
    pub mbz: [u8; 7],
}

/// `struct ploop_index_update_ctl`: head of UPDATE_INDEX's argument; [`ReverseMap`]s follow.
/// 8 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IndexUpdate {
    /// How many follow.
    pub n_maps: u32,
    /// Level.
    pub level: u8,
    /// Zero.
    pub mbz: [u8; 3],
}

/// `struct reverse_map`: a guest cluster and its image cluster. 8 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReverseMap {
    /// Guest cluster.
    pub cluster: u32,
    /// Image cluster.
    pub slot: u32,
}

/// `struct ploop_balloon_ctl`: argument of BALLOON. 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Balloon {
    /// Out: the maintenance that is going on, `OP_*`.
    pub mntn_type: u32,
    /// Out: zero.
    pub alloc_head: u32,
    /// Out: level of the top.
    pub level: u8,
    /// 1: to enter the balloon state.
    pub inflate: u8,
    /// 1, 2: only to ask.
    pub keep_intact: u8,
    /// Zero.
    pub mbz: [u8; 5],
}

/// `struct ploop_dump_bat_ctl`: head of DUMP_CACHED_BAT's argument; u32 entries follow. 12 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DumpBat {
    /// Level.
    pub level: u32,
    /// First guest cluster.
    pub start_cluster: u32,
    /// How many.
    pub nr_clusters: u32,
}

/// What DUMP_CACHED_BAT says of an entry that a higher level hides.
pub const ENTRY_UNKNOWN: u32 = u32::MAX;

/// Argument of `CTL_ADD` and `CTL_REMOVE`. 32 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeviceArg {
    /// Size of this structure, 32.
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// Index N of ploopN; for `CTL_ADD` -1 asks for the lowest unused one and the answer is put
    /// here.
    pub index: i32,
    /// Zero.
    pub reserved: [u32; 5],
}

impl DeviceArg {
    /// Asks for device `index`, or any with -1.
    pub const fn new(index: i32) -> Self {
        Self {
            size: 32,
            flags: 0,
            index,
            reserved: [0; 5],
        }
    }
}

/// Argument of [`OP_START`]. 64 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct OpStart {
    /// Size of this structure, 64.
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// `OP_MERGE`, `OP_GROW` or `OP_COMPACT`.
    pub op: u32,
    /// For a merge, the upper level of the pair: it goes. Zero for the others.
    pub level: u32,
    /// For growing, the new size in sectors. Zero for the others.
    pub sectors: u64,
    /// Most bytes a second; 0 for no limit.
    pub rate: u64,
    /// Out: the operation's number on this device, from 1 up.
    pub serial: u64,
    /// Zero.
    pub reserved: [u64; 3],
}

impl OpStart {
    /// Starts `op` without a limit.
    pub const fn new(op: u32, level: u32, sectors: u64) -> Self {
        Self {
            size: 64,
            flags: 0,
            op,
            level,
            sectors,
            rate: 0,
            serial: 0,
            reserved: [0; 3],
        }
    }
}

/// Argument of [`OP_STATUS`] and [`OP_WAIT`]; all but `size` and `flags` is out. 64 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct OpStatus {
    /// Size of this structure, 64.
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// `OP_*`: the operation that is running or ran last; `OP_NONE` if none has.
    pub op: u32,
    /// `OP_IDLE` or `OP_RUNNING`.
    pub state: u32,
    /// 0, or the negative errno with which it ended.
    pub result: i32,
    /// The level given to a merge.
    pub level: u32,
    /// The operation's number on this device.
    pub serial: u64,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do, as far as is known.
    pub total: u64,
    /// Most bytes a second; 0 for no limit.
    pub rate: u64,
    /// Bytes by which the image file became shorter.
    pub freed: u64,
}

impl OpStatus {
    /// Asks.
    pub const fn read() -> Self {
        Self {
            size: 64,
            flags: 0,
            op: OP_NONE,
            state: OP_IDLE,
            result: 0,
            level: 0,
            serial: 0,
            done: 0,
            total: 0,
            rate: 0,
            freed: 0,
        }
    }
}

/// `struct ploop_track_extent`: what TRACK_INIT and TRACK_READ return, bytes of the top's image
/// file. 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TrackExtent {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// Argument of `CHECKPOINT_START`, `CHECKPOINT_DROP` and `CHECKPOINT_LIST`. 64 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Checkpoint {
    /// Size of this structure, 64.
    pub size: u32,
    /// `CHECKPOINT_AT_SNAPSHOT` or zero.
    pub flags: u32,
    /// Its name, 16 bytes of a UUID as it is written; not all zero.
    pub id: [u8; 16],
    /// Bytes that it tells apart, a power of two; START takes 0 for [`GRANULARITY`].
    pub granularity: u32,
    /// Out: `CHECKPOINT_ARMED` or `CHECKPOINT_RECORDING`.
    pub state: u32,
    /// LIST: which one.
    pub index: u32,
    /// Zero.
    pub mbz: u32,
    /// Out: bytes written to since, in whole granules.
    pub dirty: u64,
    /// Out: bytes of the disk.
    pub disk: u64,
    /// Zero.
    pub reserved: u64,
}

impl Checkpoint {
    /// Of this name; the rest is zero.
    pub const fn new(id: [u8; 16]) -> Self {
        Self {
            size: 64,
            flags: 0,
            id,
            granularity: 0,
            state: 0,
            index: 0,
            mbz: 0,
            dirty: 0,
            disk: 0,
            reserved: 0,
        }
    }
}

/// Head of `CHECKPOINT_READ`'s argument; `nr` [`Extent`]s follow. 64 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CheckpointRead {
    /// Size of this structure, 64.
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// Which.
    pub id: [u8; 16],
    /// First byte of the disk asked about. Out: where the answer ends.
    pub start: u64,
    /// How many bytes. Out: how many were not answered for, as there were too many extents.
    pub len: u64,
    /// Room for extents behind this structure. Out: how many there are.
    pub nr: u32,
    /// Zero.
    pub mbz: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

/// A part of the disk. 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// How many bytes.
    pub len: u64,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<TrackExtent>() == 16);
    assert!(size_of::<Checkpoint>() == 64);
    assert!(offset_of!(Checkpoint, granularity) == 24);
    assert!(offset_of!(Checkpoint, dirty) == 40);
    assert!(size_of::<CheckpointRead>() == 64);
    assert!(offset_of!(CheckpointRead, start) == 24);
    assert!(offset_of!(CheckpointRead, nr) == 40);
    assert!(size_of::<Extent>() == 16);
    assert!(size_of::<Truncate>() == 16);
    assert!(offset_of!(Truncate, level) == 8);
    assert!(size_of::<IndexUpdate>() == 8);
    assert!(offset_of!(IndexUpdate, level) == 4);
    assert!(size_of::<ReverseMap>() == 8);
    assert!(size_of::<Balloon>() == 16);
    assert!(offset_of!(Balloon, inflate) == 9);
    assert!(size_of::<DumpBat>() == 12);
    assert!(size_of::<OpStart>() == 64);
    assert!(offset_of!(OpStart, sectors) == 16);
    assert!(size_of::<OpStatus>() == 64);
    assert!(offset_of!(OpStatus, serial) == 24);
    assert!(size_of::<Ctl>() == 24);
    assert!(offset_of!(Ctl, chunks) == 16);
    assert!(offset_of!(Ctl, level) == 18);
    assert!(size_of::<Chunk>() == 32);
    assert!(offset_of!(Chunk, start) == 16);
    assert!(size_of::<AddDelta>() == 120);
    assert!(offset_of!(AddDelta, chunk) == 24);
    assert!(offset_of!(AddDelta, cookie) == 56);
    assert!(size_of::<GetDevice>() == 8);
    assert!(size_of::<DeviceArg>() == 32);
    assert!(offset_of!(DeviceArg, index) == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as a C compiler printed them from OpenVZ's header.
    #[test]
    fn numbers_are_those_of_openvz() {
        for (have, want) in [
            (ADD_DELTA, 0x4018_5000),
            (CLEAR, 0x0000_5001),
            (STOP, 0x0000_5002),
            (START, 0x0000_5003),
            (SNAPSHOT, 0x4018_5004),
            (DEL_DELTA, 0x4004_5005),
            (TRACK_INIT, 0x8010_5006),
            (TRACK_STOP, 0x0000_5007),
            (TRACK_ABORT, 0x0000_5008),
            (TRACK_SETPOS, 0x4008_5009),
            (TRACK_READ, 0x8010_500A),
            (SYNC, 0x0000_500B),
            (MERGE, 0x0000_500C),
            (REPLACE_DELTA, 0x4018_500D),
            (TRUNCATE, 0x4010_500E),
            (UPDATE_INDEX, 0x4008_5010),
            (GROW, 0x4018_5011),
            (FBGET, 0x4010_5012),
            (BALLOON, 0x4010_5013),
            (FREEBLKS, 0x4010_5014),
            (RELOCBLKS, 0x4010_5015),
            (GETDEVICE, 0x4008_5016),
            (DISCARD_INIT, 0x0000_5017),
            (DISCARD_FINI, 0x0000_5018),
            (DISCARD_WAIT, 0x0000_5019),
            (FBDROP, 0x0000_501A),
            (FBFILTER, 0x8008_501B),
            (MAX_DELTA_SIZE, 0x4008_501C),
            (PUSH_BACKUP_INIT, 0x8018_501D),
            (PUSH_BACKUP_IO, 0x8018_501E),
            (PUSH_BACKUP_STOP, 0x8018_501F),
            (FREEZE, 0x0000_5020),
            (THAW, 0x0000_5021),
            (DUMP_CACHED_BAT, 0x4010_5022),
            (OP_START, 0xC040_5082),
            (OP_STATUS, 0xC040_5083),
            (OP_WAIT, 0xC040_5084),
            (OP_CANCEL, 0x0000_5085),
            (OP_RATE, 0x4008_5086),
        ] {
            assert_eq!(have, want);
        }
    }
}

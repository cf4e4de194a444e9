// SPDX-License-Identifier: GPL-2.0
//! What the ABI consists of, by name.

use super::text;
use ploop_pure::abi;
use std::mem::{offset_of, size_of};

/// The size of what a projection points to.
pub fn size_of_field<T, U>(_: fn(&T) -> &U) -> usize {
    size_of::<U>()
}

/// Name, offset and size of fields of a structure.
macro_rules! fields {
    ($s:ty: $($f:ident),+ $(,)?) => {
        vec![$((stringify!($f), offset_of!($s, $f), size_of_field(|s: &$s| &s.$f))),+]
    };
}

/// Name, offset and size of each field.
pub type Fields = Vec<(&'static str, usize, usize)>;

/// The fields follow each other without a hole from 0 to `size`.
pub fn is_dense(name: &str, fields: &Fields, size: usize) {
    let mut at = 0;
    for (field, offset, len) in fields {
        assert_eq!(*offset, at, "{name}.{field}");
        at += len;
    }
    assert_eq!(at, size, "{name} has a field that this test does not know");
}

/// The structures of the ABI: name, size and fields.
pub fn structures() -> Vec<(&'static str, usize, Fields)> {
    vec![
        (
            "Ctl",
            size_of::<abi::Ctl>(),
            fields!(abi::Ctl: format, flags, cluster_log, size, chunks, level, mbz1, mbz2),
        ),
        (
            "Chunk",
            size_of::<abi::Chunk>(),
            fields!(abi::Chunk: fd, io, flags, offset, start, len),
        ),
        (
            "AddDelta",
            size_of::<abi::AddDelta>(),
            fields!(abi::AddDelta: ctl, chunk, cookie),
        ),
        (
            "GetDevice",
            size_of::<abi::GetDevice>(),
            fields!(abi::GetDevice: minor, mbz),
        ),
        (
            "DeviceArg",
            size_of::<abi::DeviceArg>(),
            fields!(abi::DeviceArg: size, flags, index, reserved),
        ),
        (
            "Version",
            size_of::<abi::Version>(),
            fields!(abi::Version: size, flags, interface, oldest, name, reserved),
        ),
        (
            "Truncate",
            size_of::<abi::Truncate>(),
            fields!(abi::Truncate: fd, alloc_head, level, mbz),
        ),
        (
            "IndexUpdate",
            size_of::<abi::IndexUpdate>(),
            fields!(abi::IndexUpdate: n_maps, level, mbz),
        ),
        (
            "ReverseMap",
            size_of::<abi::ReverseMap>(),
            fields!(abi::ReverseMap: cluster, slot),
        ),
        (
            "Balloon",
            size_of::<abi::Balloon>(),
            fields!(abi::Balloon: mntn_type, alloc_head, level, inflate, keep_intact, mbz),
        ),
        (
            "DumpBat",
            size_of::<abi::DumpBat>(),
            fields!(abi::DumpBat: level, start_cluster, nr_clusters),
        ),
        (
            "OpStart",
            size_of::<abi::OpStart>(),
            fields!(abi::OpStart: size, flags, op, level, sectors, rate, serial, reserved),
        ),
        (
            "OpStatus",
            size_of::<abi::OpStatus>(),
            fields!(abi::OpStatus: size, flags, op, state, result, level, serial, done, total, rate, freed),
        ),
        (
            "TrackExtent",
            size_of::<abi::TrackExtent>(),
            fields!(abi::TrackExtent: start, end),
        ),
        (
            "Checkpoint",
            size_of::<abi::Checkpoint>(),
            fields!(abi::Checkpoint: size, flags, id, granularity, state, index, mbz, dirty, disk, reserved),
        ),
        (
            "CheckpointRead",
            size_of::<abi::CheckpointRead>(),
            fields!(abi::CheckpointRead: size, flags, id, start, len, nr, mbz, reserved),
        ),
        (
            "Extent",
            size_of::<abi::Extent>(),
            fields!(abi::Extent: start, len),
        ),
    ]
}

/// All calls: name and number.
pub fn calls() -> Vec<(&'static str, u32)> {
    macro_rules! calls {
        ($($name:ident),+ $(,)?) => { vec![$((stringify!($name), abi::$name)),+] };
    }
    let calls = calls![
        ADD_DELTA,
        CLEAR,
        STOP,
        START,
        SNAPSHOT,
        DEL_DELTA,
        TRACK_INIT,
        TRACK_STOP,
        TRACK_ABORT,
        TRACK_SETPOS,
        TRACK_READ,
        SYNC,
        MERGE,
        REPLACE_DELTA,
        TRUNCATE,
        UPDATE_INDEX,
        GROW,
        FBGET,
        BALLOON,
        FREEBLKS,
        RELOCBLKS,
        GETDEVICE,
        DISCARD_INIT,
        DISCARD_FINI,
        DISCARD_WAIT,
        FBDROP,
        FBFILTER,
        MAX_DELTA_SIZE,
        PUSH_BACKUP_INIT,
        PUSH_BACKUP_IO,
        PUSH_BACKUP_STOP,
        FREEZE,
        THAW,
        DUMP_CACHED_BAT,
        CTL_ADD,
        CTL_REMOVE,
        OP_START,
        OP_STATUS,
        OP_WAIT,
        OP_CANCEL,
        OP_RATE,
        CHECKPOINT_START,
        CHECKPOINT_DROP,
        CHECKPOINT_LIST,
        CHECKPOINT_READ,
        CTL_VERSION,
    ];
    let source = text("rust/pure/src/abi.rs");
    let nr = source.matches(": u32 = ioc(").count();
    assert_eq!(calls.len(), nr, "a call of abi.rs is missing in this test");
    calls
}

/// Plain numbers of the ABI, named as in the C header without its prefix.
pub fn constants() -> Vec<(&'static str, u64)> {
    vec![
        ("MAJOR", abi::MAJOR.into()),
        ("MINORS", abi::MINORS.into()),
        ("MINOR_SHIFT", abi::MINOR_SHIFT.into()),
        ("DEVICES_MAX", abi::DEVICES_MAX.into()),
        ("COOKIE_LEN_MAX", abi::COOKIE_LEN_MAX as u64),
        ("INTERFACE", abi::INTERFACE.into()),
        ("INTERFACE_OLDEST", abi::INTERFACE_OLDEST.into()),
        ("FORMAT_RAW", abi::FORMAT_RAW.into()),
        ("FORMAT_PLOOP1", abi::FORMAT_PLOOP1.into()),
        ("FLAG_RDONLY", abi::FLAG_RDONLY.into()),
        ("FLAG_COOKIE", abi::FLAG_COOKIE.into()),
        ("FLAG_CLUBLKS", abi::FLAG_CLUBLKS.into()),
        ("FLAG_FS_SYNC", abi::FLAG_FS_SYNC.into()),
        ("FLAG_ACCEPT_INUSE", abi::FLAG_ACCEPT_INUSE.into()),
        ("IO_AUTO", abi::IO_AUTO.into()),
        ("IO_DIRECT", abi::IO_DIRECT.into()),
        ("IO_NFS", abi::IO_NFS.into()),
        ("IO_KAIO", abi::IO_KAIO.into()),
        ("OP_NONE", abi::OP_NONE.into()),
        ("OP_MERGE", abi::OP_MERGE.into()),
        ("OP_GROW", abi::OP_GROW.into()),
        ("OP_COMPACT", abi::OP_COMPACT.into()),
        ("OP_IDLE", abi::OP_IDLE.into()),
        ("OP_RUNNING", abi::OP_RUNNING.into()),
        ("ENTRY_UNKNOWN", abi::ENTRY_UNKNOWN.into()),
        ("LEVEL_TOP", abi::LEVEL_TOP.into()),
        ("OP_TRACK", abi::OP_TRACK.into()),
        ("CHECKPOINT_AT_SNAPSHOT", abi::CHECKPOINT_AT_SNAPSHOT.into()),
        ("CHECKPOINT_ARMED", abi::CHECKPOINT_ARMED.into()),
        ("CHECKPOINT_RECORDING", abi::CHECKPOINT_RECORDING.into()),
        ("CHECKPOINTS_MAX", abi::CHECKPOINTS_MAX as u64),
        ("GRANULARITY", abi::GRANULARITY.into()),
        ("GRANULARITY_MIN", abi::GRANULARITY_MIN.into()),
        ("GRANULARITY_MAX", abi::GRANULARITY_MAX.into()),
    ]
}

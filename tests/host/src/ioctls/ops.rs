// SPDX-License-Identifier: GPL-2.0
//! The part of the table about calls that change a running device.

use super::Table;
use crate::dev::Arg;
use crate::device::Device;
use libc::{EBADF, EFAULT, EINVAL, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP};
use ploop_pure::abi;
use zerocopy::IntoBytes;

/// Calls with a structure.
const WITH_ARGUMENT: [(&str, u32); 17] = [
    ("SNAPSHOT", abi::SNAPSHOT),
    ("REPLACE_DELTA", abi::REPLACE_DELTA),
    ("TRUNCATE", abi::TRUNCATE),
    ("UPDATE_INDEX", abi::UPDATE_INDEX),
    ("GROW", abi::GROW),
    ("BALLOON", abi::BALLOON),
    ("MAX_DELTA_SIZE", abi::MAX_DELTA_SIZE),
    ("DUMP_CACHED_BAT", abi::DUMP_CACHED_BAT),
    ("OP_START", abi::OP_START),
    ("OP_STATUS", abi::OP_STATUS),
    ("OP_WAIT", abi::OP_WAIT),
    ("OP_RATE", abi::OP_RATE),
    ("TRACK_INIT", abi::TRACK_INIT),
    ("CHECKPOINT_START", abi::CHECKPOINT_START),
    ("CHECKPOINT_DROP", abi::CHECKPOINT_DROP),
    ("CHECKPOINT_LIST", abi::CHECKPOINT_LIST),
    ("CHECKPOINT_READ", abi::CHECKPOINT_READ),
];

/// Of a device without deltas.
pub(super) fn without_deltas(t: &mut Table, d: &mut Device, delta: &abi::AddDelta) {
    let mut bad = |what: &str, want: i32, request, arg: Arg<'_>| {
        t.refuse(d, &format!("{what}, empty"), &[want], request, arg);
    };
    let start = abi::OpStart::new(abi::OP_COMPACT, 0, 0);
    let dump = abi::DumpBat {
        level: 0,
        start_cluster: 0,
        nr_clusters: 2,
    };
    let grow = abi::Ctl {
        flags: 0,
        ..delta.ctl
    };
    bad("MERGE", ENOENT, abi::MERGE, Arg::Null);
    bad("GROW", ENOENT, abi::GROW, Arg::Bytes(grow.as_bytes()));
    bad(
        "OP_START",
        ENOENT,
        abi::OP_START,
        Arg::Bytes(start.as_bytes()),
    );
    bad(
        "MAX_DELTA_SIZE",
        EINVAL,
        abi::MAX_DELTA_SIZE,
        Arg::Bytes(&[0; 8]),
    );
    bad("BALLOON", ENOENT, abi::BALLOON, Arg::Bytes(&[0; 16]));
    bad(
        "DUMP_CACHED_BAT",
        ENODEV,
        abi::DUMP_CACHED_BAT,
        Arg::Bytes(dump.as_bytes()),
    );
    bad(
        "UPDATE_INDEX",
        ENOENT,
        abi::UPDATE_INDEX,
        Arg::Bytes(&[0; 8]),
    );
    bad("FREEZE", EINVAL, abi::FREEZE, Arg::Null);
    bad("THAW", EINVAL, abi::THAW, Arg::Null);
    let snapshot = &delta.as_bytes()[..56];
    let mut two = snapshot.to_vec();
    two[16] = 2;
    bad(
        "SNAPSHOT of two chunks",
        EINVAL,
        abi::SNAPSHOT,
        Arg::Bytes(&two),
    );
}

/// The write tracker, which does not run, and checkpoints, of which there are none.
fn tracking(bad: &mut impl FnMut(&str, i32, u32, Arg<'_>)) {
    let extent = Arg::Bytes(&[0; 16]);
    bad("TRACK_READ", EINVAL, abi::TRACK_READ, extent);
    bad(
        "TRACK_SETPOS",
        EINVAL,
        abi::TRACK_SETPOS,
        Arg::Bytes(&[0; 8]),
    );
    let good = abi::Checkpoint::new([1; 16]);
    let points: [super::Bad<abi::Checkpoint>; 13] = [
        ("size", |a| a.size = 60),
        ("flags", |a| a.flags = 2),
        ("id 0", |a| a.id = [0; 16]),
        ("granularity 1", |a| a.granularity = 1),
        ("granularity 2048", |a| a.granularity = 2048),
        ("granularity 65537", |a| a.granularity = 65537),
        ("granularity 128 MiB", |a| a.granularity = 128 << 20),
        ("state", |a| a.state = 1),
        ("index", |a| a.index = 1),
        ("mbz", |a| a.mbz = 1),
        ("dirty", |a| a.dirty = 1),
        ("disk", |a| a.disk = 1),
        ("reserved", |a| a.reserved = 1),
    ];
    for (what, change) in points {
        let mut arg = good;
        change(&mut arg);
        let what = format!("CHECKPOINT_START {what}");
        bad(
            &what,
            EINVAL,
            abi::CHECKPOINT_START,
            Arg::Bytes(arg.as_bytes()),
        );
    }
    let none = Arg::Bytes(good.as_bytes());
    bad("CHECKPOINT_DROP", ENOENT, abi::CHECKPOINT_DROP, none);
    let none = Arg::Bytes(good.as_bytes());
    bad("CHECKPOINT_LIST", ENOENT, abi::CHECKPOINT_LIST, none);
    let mut head = abi::CheckpointRead {
        size: 64,
        flags: 0,
        id: [1; 16],
        start: u64::MAX,
        len: u64::MAX,
        nr: u32::MAX,
        mbz: 0,
        reserved: [0; 2],
    };
    let none = Arg::Bytes(head.as_bytes());
    bad("CHECKPOINT_READ", ENOENT, abi::CHECKPOINT_READ, none);
    head.size = 0;
    let size = Arg::Bytes(head.as_bytes());
    bad("CHECKPOINT_READ size", EINVAL, abi::CHECKPOINT_READ, size);
}

/// Of a running device with one ploop1 delta.
pub(super) fn running(t: &mut Table, d: &mut Device, delta: &abi::AddDelta) {
    let mut bad = |what: &str, want: i32, request, arg: Arg<'_>| {
        t.refuse(d, what, &[want], request, arg);
    };
    for (name, request) in WITH_ARGUMENT {
        bad(&format!("{name} NULL"), EFAULT, request, Arg::Null);
        bad(
            &format!("{name} unreadable"),
            EFAULT,
            request,
            Arg::Unreadable,
        );
    }
    let good = abi::OpStart::new(abi::OP_COMPACT, 0, 0);
    let starts: [super::Bad<abi::OpStart>; 12] = [
        ("size 0", |a| a.size = 0),
        ("size 65", |a| a.size = 65),
        ("flags", |a| a.flags = 1),
        ("op 0", |a| a.op = 0),
        ("op 260", |a| a.op = 260),
        ("level", |a| a.level = 1),
        ("sectors", |a| a.sectors = 8),
        ("serial", |a| a.serial = 1),
        ("reserved 0", |a| a.reserved[0] = 1),
        ("reserved 2", |a| a.reserved[2] = 1),
        ("grow to less", |a| {
            a.op = abi::OP_GROW;
            a.sectors = 2048;
        }),
        ("grow to a part of a cluster", |a| {
            a.op = abi::OP_GROW;
            a.sectors = (1 << 40) + 8;
        }),
    ];
    for (what, change) in starts {
        let mut arg = good;
        change(&mut arg);
        let arg = Arg::Bytes(arg.as_bytes());
        bad(&format!("OP_START {what}"), EINVAL, abi::OP_START, arg);
    }
    for level in [0, 1, 255, 256, abi::LEVEL_TOP] {
        let arg = abi::OpStart::new(abi::OP_MERGE, level, 0);
        let arg = Arg::Bytes(arg.as_bytes());
        bad(
            &format!("merge of level {level}"),
            ENOENT,
            abi::OP_START,
            arg,
        );
    }
    tracking(&mut bad);
    bad("MERGE of one delta", ENOENT, abi::MERGE, Arg::Null);
    for (name, request) in [("OP_STATUS", abi::OP_STATUS), ("OP_WAIT", abi::OP_WAIT)] {
        bad(
            &format!("{name} size"),
            EINVAL,
            request,
            Arg::Bytes(&[0; 64]),
        );
        let mut flags = abi::OpStatus::read();
        flags.flags = 1;
        bad(
            &format!("{name} flags"),
            EINVAL,
            request,
            Arg::Bytes(flags.as_bytes()),
        );
    }
    let snapshot = &delta.as_bytes()[..56];
    let mut replace = snapshot.to_vec();
    replace[18] = 1;
    bad(
        "REPLACE_DELTA of no level",
        ENOENT,
        abi::REPLACE_DELTA,
        Arg::Bytes(&replace),
    );
    let truncate = |fd, level| abi::Truncate {
        fd,
        alloc_head: 1,
        level,
        mbz: [0; 7],
    };
    let arg = truncate(-1, 0);
    bad(
        "TRUNCATE fd -1",
        EBADF,
        abi::TRUNCATE,
        Arg::Bytes(arg.as_bytes()),
    );
    let arg = truncate(delta.chunk.fd, 1);
    bad(
        "TRUNCATE of no level",
        ENOENT,
        abi::TRUNCATE,
        Arg::Bytes(arg.as_bytes()),
    );
    let arg = truncate(delta.chunk.fd, 0);
    bad(
        "TRUNCATE of the top",
        libc::EBUSY,
        abi::TRUNCATE,
        Arg::Bytes(arg.as_bytes()),
    );
    let update = |n_maps, level| abi::IndexUpdate {
        n_maps,
        level,
        mbz: [0; 3],
    };
    let arg = update(u32::MAX, 0);
    bad(
        "UPDATE_INDEX of too many",
        ENOMEM,
        abi::UPDATE_INDEX,
        Arg::Bytes(arg.as_bytes()),
    );
    let arg = update(0, 1);
    bad(
        "UPDATE_INDEX of no level",
        ENOENT,
        abi::UPDATE_INDEX,
        Arg::Bytes(arg.as_bytes()),
    );
    let arg = update(0, 0);
    bad(
        "UPDATE_INDEX of the top",
        EINVAL,
        abi::UPDATE_INDEX,
        Arg::Bytes(arg.as_bytes()),
    );
    let arg = update(2, 0);
    bad(
        "UPDATE_INDEX cut short",
        EFAULT,
        abi::UPDATE_INDEX,
        Arg::Bytes(arg.as_bytes()),
    );
    let dump = |level, start_cluster, nr_clusters| abi::DumpBat {
        level,
        start_cluster,
        nr_clusters,
    };
    for (what, arg, want) in [
        ("of no level", dump(1, 0, 2), ENOENT),
        ("of level 256", dump(256, 0, 2), ENOENT),
        ("of one cluster", dump(0, 0, 1), EINVAL),
        ("past the end", dump(0, u32::MAX, 2), EINVAL),
        ("of too many", dump(0, 1, u32::MAX - 1), EINVAL),
        ("without room", dump(0, 0, 2), EFAULT),
    ] {
        let what = format!("DUMP_CACHED_BAT {what}");
        bad(
            &what,
            want,
            abi::DUMP_CACHED_BAT,
            Arg::Bytes(arg.as_bytes()),
        );
    }
    let mut balloon = [0; 16];
    balloon[9] = 1;
    bad(
        "BALLOON inflate",
        EOPNOTSUPP,
        abi::BALLOON,
        Arg::Bytes(&balloon),
    );
    balloon[10] = 1;
    bad(
        "BALLOON inflate, keep",
        EINVAL,
        abi::BALLOON,
        Arg::Bytes(&balloon),
    );
    bad("DISCARD_INIT", EOPNOTSUPP, abi::DISCARD_INIT, Arg::Null);
    for (name, request) in [
        ("FREEBLKS", abi::FREEBLKS),
        ("FBGET", abi::FBGET),
        ("RELOCBLKS", abi::RELOCBLKS),
        ("FBDROP", abi::FBDROP),
    ] {
        bad(name, EINVAL, request, Arg::Bytes(&[0; 64]));
    }
    bad("FBFILTER", EINVAL, abi::FBFILTER, Arg::Number(1));
}

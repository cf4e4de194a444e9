// SPDX-License-Identifier: GPL-2.0
//! The table of errors that every ioctl must answer to bad arguments, wrong states and
//! unprivileged callers, with the state unchanged after each.

use crate::cli::{Failure, Outcome, Words};
use crate::dev::{drop_privileges, Arg};
use crate::device::{add_delta, Device};
use libc::{
    EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, ENOTTY, EOPNOTSUPP, EPERM, ERANGE,
};
use ploop_pure::abi;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use zerocopy::IntoBytes;

mod ops;

/// Wrong answers so far, and the state that no refused call may change.
struct Table {
    wrong: Vec<String>,
    nr: u32,
}

impl Table {
    fn expect(&mut self, what: &str, want: &[i32], got: io::Result<i32>) {
        self.nr += 1;
        let got = match got {
            Ok(_) => 0,
            Err(e) => e.raw_os_error().unwrap_or(-1),
        };
        if !want.contains(&got) {
            let name = |n: &i32| match n {
                0 => "success".to_string(),
                n => io::Error::from_raw_os_error(*n).to_string(),
            };
            let want: Vec<_> = want.iter().map(name).collect();
            self.wrong.push(format!(
                "{what}: {}, expected {}",
                name(&got),
                want.join(" or ")
            ));
        }
    }

    /// One refused call on the disk; the device must be as it was.
    fn refuse(&mut self, d: &mut Device, what: &str, want: &[i32], request: u32, arg: Arg<'_>) {
        let before = state(d.index);
        let got = d.call(request, arg);
        self.expect(what, want, got);
        let after = state(d.index);
        if before != after {
            self.wrong.push(format!(
                "{what} changed the device from {before} to {after}"
            ));
        }
    }

    /// The same on the control device.
    fn refuse_control(
        &mut self,
        d: &mut Device,
        what: &str,
        want: i32,
        request: u32,
        arg: Arg<'_>,
    ) {
        let before = devices();
        let got = d.memory.ioctl(&d.control, request, arg).map(|(n, _)| n);
        self.expect(what, &[want], got);
        if before != devices() {
            self.wrong
                .push(format!("{what} changed the set of devices"));
        }
    }
}

/// What sysfs says of a device, and its size.
fn state(index: i32) -> String {
    let dir = format!("/sys/block/ploop{index}");
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("{dir}/{name}"));
        text.map_or("-".into(), |t| t.trim().to_string())
    };
    let mut deltas: Vec<_> = match std::fs::read_dir(format!("{dir}/pdelta")) {
        Ok(entries) => entries.flatten().map(|e| e.file_name()).collect(),
        Err(_) => Vec::new(),
    };
    deltas.sort();
    let (running, top, size) = (read("pstate/running"), read("pstate/top"), read("size"));
    format!("running {running}, top {top}, size {size}, deltas {deltas:?}")
}

fn devices() -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = match std::fs::read_dir("/sys/block") {
        Ok(entries) => entries.flatten().map(|e| e.file_name()).collect(),
        Err(_) => Vec::new(),
    };
    names.sort();
    names
}

/// What is wrong with an argument, and how to make it so.
type Bad<T> = (&'static str, fn(&mut T));

/// Calls that are not served.
const UNSERVED: [(&str, u32); 3] = [
    ("PUSH_BACKUP_INIT", abi::PUSH_BACKUP_INIT),
    ("number 15", 0x500F),
    ("number 0x7f", 0x507F),
];

/// `ioctl-table IMAGE`: IMAGE is a good ploop1 image with clusters of 1 MiB, not attached.
pub fn table(words: Words) -> Outcome {
    let [path] = words.operands()?;
    let image = OpenOptions::new().read(true).write(true).open(&path)?;
    let delta = add_delta(&image, abi::FORMAT_PLOOP1, 11, 0);
    let mut t = Table {
        wrong: Vec::new(),
        nr: 0,
    };
    let mut d = Device::add()?;
    bad_control_arguments(&mut t, &mut d);
    bad_arguments(&mut t, &mut d, &delta, &path)?;
    ops::without_deltas(&mut t, &mut d, &delta);
    wrong_states(&mut t, &mut d, &delta)?;
    ops::running(&mut t, &mut d, &delta);
    d.detach()?;
    // Privileges are those of a thread.
    let dropped = std::thread::scope(|s| {
        let thread = s.spawn(|| unprivileged(&mut t, &mut d, &delta));
        thread.join()
    });
    dropped.map_err(|_| Failure::Trouble("the unprivileged thread died".into()))??;
    d.remove()?;
    for wrong in &t.wrong {
        println!("{wrong}");
    }
    if !t.wrong.is_empty() {
        let (bad, nr) = (t.wrong.len(), t.nr);
        return Err(Failure::Broken(format!("{bad} of {nr} calls")));
    }
    println!("{} calls answered as they should", t.nr);
    Ok(())
}

fn bad_control_arguments(t: &mut Table, d: &mut Device) {
    let good = abi::DeviceArg::new(-1);
    for (name, request) in [("CTL_ADD", abi::CTL_ADD), ("CTL_REMOVE", abi::CTL_REMOVE)] {
        let mut bad = |what: &str, want, arg: Arg<'_>| {
            t.refuse_control(d, &format!("{name} {what}"), want, request, arg);
        };
        bad("NULL", EFAULT, Arg::Null);
        bad("unreadable", EFAULT, Arg::Unreadable);
        bad("short", EFAULT, Arg::Bytes(&good.as_bytes()[..20]));
        let fields: [Bad<abi::DeviceArg>; 6] = [
            ("size 0", |a| a.size = 0),
            ("size 31", |a| a.size = 31),
            ("flags", |a| a.flags = 1),
            ("reserved 0", |a| a.reserved[0] = 1),
            ("reserved 4", |a| a.reserved[4] = 1 << 31),
            ("index -2", |a| a.index = -2),
        ];
        for (what, change) in fields {
            let mut arg = good;
            change(&mut arg);
            bad(what, EINVAL, Arg::Bytes(arg.as_bytes()));
        }
    }
    let arg = abi::DeviceArg::new(abi::DEVICES_MAX as i32);
    let large = Arg::Bytes(arg.as_bytes());
    t.refuse_control(d, "CTL_ADD index too large", ERANGE, abi::CTL_ADD, large);
    let arg = abi::DeviceArg::new(d.index);
    let ours = Arg::Bytes(arg.as_bytes());
    t.refuse_control(d, "CTL_ADD of a device in use", EEXIST, abi::CTL_ADD, ours);
    t.refuse_control(
        d,
        "CTL_REMOVE of an open device",
        EBUSY,
        abi::CTL_REMOVE,
        ours,
    );
    let arg = abi::DeviceArg::new(4321);
    let absent = Arg::Bytes(arg.as_bytes());
    t.refuse_control(
        d,
        "CTL_REMOVE of no device",
        ENODEV,
        abi::CTL_REMOVE,
        absent,
    );
    bad_version(t, d);
    for (what, request) in [
        ("ADD_DELTA on the control device", abi::ADD_DELTA),
        ("an unknown number", 0x508F),
        ("another letter", 0xC020_4C80),
    ] {
        t.refuse_control(d, what, ENOTTY, request, Arg::Bytes(good.as_bytes()));
    }
}

fn bad_version(t: &mut Table, d: &mut Device) {
    let good = abi::Version::read();
    let fields: [Bad<abi::Version>; 7] = [
        ("size 0", |a| a.size = 0),
        ("size 65", |a| a.size = 65),
        ("flags", |a| a.flags = 1),
        ("interface", |a| a.interface = 1),
        ("oldest", |a| a.oldest = 1),
        ("name", |a| a.name[31] = 1),
        ("reserved 1", |a| a.reserved[1] = 1),
    ];
    for (what, change) in fields {
        let mut arg = good;
        change(&mut arg);
        let (what, bytes) = (format!("CTL_VERSION {what}"), Arg::Bytes(arg.as_bytes()));
        t.refuse_control(d, &what, EINVAL, abi::CTL_VERSION, bytes);
    }
    let short = Arg::Bytes(&good.as_bytes()[..20]);
    for (what, arg) in [("NULL", Arg::Null), ("short", short)] {
        let what = format!("CTL_VERSION {what}");
        t.refuse_control(d, &what, EFAULT, abi::CTL_VERSION, arg);
    }
    let answer = d
        .memory
        .ioctl(&d.control, abi::CTL_VERSION, Arg::Bytes(good.as_bytes()));
    let want = abi::Version::ours();
    let is_ours = answer.is_ok_and(|(_, bytes)| bytes.starts_with(want.as_bytes()));
    if !is_ours {
        t.wrong.push("CTL_VERSION tells another version".into());
    }
}

fn bad_arguments(t: &mut Table, d: &mut Device, delta: &abi::AddDelta, path: &str) -> Outcome {
    for (what, arg) in [("NULL", Arg::Null), ("unreadable", Arg::Unreadable)] {
        for (name, request) in [
            ("ADD_DELTA", abi::ADD_DELTA),
            ("DEL_DELTA", abi::DEL_DELTA),
            ("GETDEVICE", abi::GETDEVICE),
        ] {
            t.refuse(d, &format!("{name} {what}"), &[EFAULT], request, arg);
        }
    }
    for len in [20, 40] {
        let short = Arg::Bytes(&delta.as_bytes()[..len]);
        t.refuse(
            d,
            &format!("ADD_DELTA of {len} bytes"),
            &[EFAULT],
            abi::ADD_DELTA,
            short,
        );
    }
    let mut cookie = *delta;
    cookie.ctl.flags |= abi::FLAG_COOKIE;
    let short = Arg::Bytes(&cookie.as_bytes()[..100]);
    t.refuse(
        d,
        "ADD_DELTA with half a cookie",
        &[EFAULT],
        abi::ADD_DELTA,
        short,
    );

    let fields: [(&[i32], Bad<abi::AddDelta>); 14] = [
        (&[EINVAL], ("no chunk", |a| a.ctl.chunks = 0)),
        (&[EINVAL], ("two chunks", |a| a.ctl.chunks = 2)),
        (&[EINVAL], ("an unknown format", |a| a.ctl.format = 77)),
        (&[EINVAL], ("an unknown flag", |a| a.ctl.flags |= 1 << 9)),
        (&[EINVAL], ("mbz1", |a| a.ctl.mbz1 = 1)),
        (&[EINVAL], ("mbz2", |a| a.ctl.mbz2 = 1)),
        (&[EINVAL], ("chunk flags", |a| a.chunk.flags = 1)),
        (&[EINVAL], ("chunk offset", |a| a.chunk.offset = 512)),
        (&[EINVAL], ("chunk start", |a| a.chunk.start = 1)),
        (&[EINVAL], ("chunk len", |a| a.chunk.len = 1)),
        (&[EINVAL, EOPNOTSUPP], ("an unknown io", |a| a.chunk.io = 9)),
        (
            &[EINVAL],
            ("another cluster size", |a| a.ctl.cluster_log = 12),
        ),
        (
            &[EINVAL],
            ("an absurd cluster size", |a| a.ctl.cluster_log = 200),
        ),
        (&[EBADF], ("a bad descriptor", |a| a.chunk.fd = -1)),
    ];
    for (want, (what, change)) in fields {
        let mut arg = *delta;
        change(&mut arg);
        let what = format!("ADD_DELTA with {what}");
        t.refuse(d, &what, want, abi::ADD_DELTA, Arg::Bytes(arg.as_bytes()));
    }
    let reader = File::open(path)?;
    let mut arg = *delta;
    arg.chunk.fd = reader.as_raw_fd();
    let bytes = Arg::Bytes(arg.as_bytes());
    t.refuse(
        d,
        "a read-only file for a writable delta",
        &[EINVAL],
        abi::ADD_DELTA,
        bytes,
    );
    let mut arg = *delta;
    arg.ctl.flags |= abi::FLAG_RDONLY;
    let bytes = Arg::Bytes(arg.as_bytes());
    t.refuse(
        d,
        "a writable file for a read-only delta",
        &[EINVAL],
        abi::ADD_DELTA,
        bytes,
    );
    let null = File::open("/dev/null")?;
    let mut arg = *delta;
    arg.chunk.fd = null.as_raw_fd();
    arg.ctl.flags |= abi::FLAG_RDONLY;
    let bytes = Arg::Bytes(arg.as_bytes());
    t.refuse(
        d,
        "a character device",
        &[EINVAL, EOPNOTSUPP],
        abi::ADD_DELTA,
        bytes,
    );
    for (what, request) in UNSERVED {
        let zeros = [0; 64];
        t.refuse(d, what, &[ENOTTY], request, Arg::Bytes(&zeros));
    }
    Ok(())
}

fn wrong_states(t: &mut Table, d: &mut Device, delta: &abi::AddDelta) -> Outcome {
    let level = |n: u32| n.to_ne_bytes();
    let (base, first) = (level(0), level(1));
    t.refuse(
        d,
        "START of an empty device",
        &[ENOENT],
        abi::START,
        Arg::Null,
    );
    t.refuse(
        d,
        "STOP of an empty device",
        &[EINVAL],
        abi::STOP,
        Arg::Null,
    );
    t.refuse(
        d,
        "SYNC of an empty device",
        &[ENOENT],
        abi::SYNC,
        Arg::Null,
    );
    t.refuse(
        d,
        "DEL_DELTA of nothing",
        &[ENOENT],
        abi::DEL_DELTA,
        Arg::Bytes(&base),
    );

    d.call(abi::ADD_DELTA, Arg::Bytes(delta.as_bytes()))?;
    t.refuse(
        d,
        "STOP of a stopped device",
        &[EINVAL],
        abi::STOP,
        Arg::Null,
    );
    t.refuse(
        d,
        "DEL_DELTA of no level",
        &[ENOENT],
        abi::DEL_DELTA,
        Arg::Bytes(&first),
    );
    let got = d.call(abi::DEL_DELTA, Arg::Bytes(&base));
    t.expect("DEL_DELTA of a stopped device", &[0], got);
    let got = d.call(abi::CLEAR, Arg::Null);
    t.expect("CLEAR of an empty device", &[0], got);

    d.attach(delta)?;
    t.refuse(
        d,
        "START of a running device",
        &[EBUSY],
        abi::START,
        Arg::Null,
    );
    t.refuse(
        d,
        "CLEAR of a running device",
        &[EBUSY],
        abi::CLEAR,
        Arg::Null,
    );
    let bytes = Arg::Bytes(delta.as_bytes());
    t.refuse(
        d,
        "ADD_DELTA to a running device",
        &[EBUSY],
        abi::ADD_DELTA,
        bytes,
    );
    t.refuse(
        d,
        "DEL_DELTA of the base",
        &[EBUSY],
        abi::DEL_DELTA,
        Arg::Bytes(&base),
    );
    t.refuse(
        d,
        "DEL_DELTA of no level, running",
        &[ENOENT],
        abi::DEL_DELTA,
        Arg::Bytes(&first),
    );
    let got = d.call(abi::SYNC, Arg::Null);
    t.expect("SYNC of a running device", &[0], got);
    let other = File::open(d.path())?;
    t.refuse(
        d,
        "STOP of a disk open twice",
        &[EBUSY],
        abi::STOP,
        Arg::Null,
    );
    drop(other);
    let arg = abi::DeviceArg::new(d.index);
    let ours = Arg::Bytes(arg.as_bytes());
    t.refuse_control(
        d,
        "CTL_REMOVE of a running device",
        EBUSY,
        abi::CTL_REMOVE,
        ours,
    );
    Ok(())
}

/// Every call, good argument or bad, is EPERM without CAP_SYS_ADMIN.
fn unprivileged(t: &mut Table, d: &mut Device, delta: &abi::AddDelta) -> io::Result<()> {
    drop_privileges()?;
    let good = Arg::Bytes(delta.as_bytes());
    for (what, request) in [
        ("ADD_DELTA", abi::ADD_DELTA),
        ("START", abi::START),
        ("STOP", abi::STOP),
        ("CLEAR", abi::CLEAR),
        ("SYNC", abi::SYNC),
        ("DEL_DELTA", abi::DEL_DELTA),
        ("GETDEVICE", abi::GETDEVICE),
    ] {
        for arg in [good, Arg::Null] {
            t.refuse(d, &format!("{what}, unprivileged"), &[EPERM], request, arg);
        }
    }
    let arg = abi::DeviceArg::new(-1);
    for (what, request) in [
        ("CTL_ADD", abi::CTL_ADD),
        ("CTL_REMOVE", abi::CTL_REMOVE),
        ("CTL_VERSION", abi::CTL_VERSION),
    ] {
        let what = format!("{what}, unprivileged");
        t.refuse_control(d, &what, EPERM, request, Arg::Bytes(arg.as_bytes()));
    }
    Ok(())
}

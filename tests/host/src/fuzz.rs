// SPDX-License-Identifier: GPL-2.0
//! Random ioctls on the control device and on a disk. Any answer is right; what counts is that the
//! kernel survives, that its log stays clean, and that the device can be taken down afterwards.

use crate::cli::{Failure, Outcome, Words};
use crate::dev::Arg;
use crate::device::{add_delta, Device};
use crate::rng::Rng;
use ploop_pure::abi;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const KNOWN: [u32; 47] = [
    abi::ADD_DELTA,
    abi::CLEAR,
    abi::STOP,
    abi::START,
    abi::SNAPSHOT,
    abi::DEL_DELTA,
    abi::TRACK_INIT,
    abi::TRACK_STOP,
    abi::TRACK_ABORT,
    abi::TRACK_SETPOS,
    abi::TRACK_READ,
    abi::SYNC,
    abi::MERGE,
    abi::REPLACE_DELTA,
    abi::TRUNCATE,
    0x500F,
    abi::UPDATE_INDEX,
    abi::GROW,
    abi::FBGET,
    abi::BALLOON,
    abi::FREEBLKS,
    abi::RELOCBLKS,
    abi::GETDEVICE,
    abi::DISCARD_INIT,
    abi::DISCARD_FINI,
    abi::DISCARD_WAIT,
    abi::FBDROP,
    abi::FBFILTER,
    abi::MAX_DELTA_SIZE,
    abi::PUSH_BACKUP_INIT,
    abi::PUSH_BACKUP_IO,
    abi::PUSH_BACKUP_STOP,
    abi::FREEZE,
    abi::THAW,
    abi::DUMP_CACHED_BAT,
    abi::CTL_ADD,
    abi::CTL_REMOVE,
    abi::OP_START,
    abi::OP_STATUS,
    abi::OP_WAIT,
    abi::OP_CANCEL,
    abi::OP_RATE,
    abi::CHECKPOINT_START,
    abi::CHECKPOINT_DROP,
    abi::CHECKPOINT_LIST,
    abi::CHECKPOINT_READ,
    abi::CTL_VERSION,
];

/// What random arguments are made of.
struct Parts {
    /// Images, the first of which is large enough for all; the rest can become its tops.
    images: Vec<File>,
    /// What an image holds that was never used.
    empty: Vec<u8>,
    files: Vec<File>,
    delta: abi::AddDelta,
    index: i32,
}

fn edge(rng: &mut Rng) -> u32 {
    let edges = [0, 1, 2, 3, 11, 32, 64, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    match rng.below(3) {
        0 => rng.bits() as u32,
        _ => edges[rng.pick(edges.len())],
    }
}

/// A call as a tool would make it: what it belongs to may have come before, or not.
fn sentence(rng: &mut Rng, parts: &Parts) -> (u32, Vec<u8>) {
    let level = rng.below(4) as u32;
    let id = [1 + rng.below(3) as u8; 16];
    let number = |n: u64| n.to_ne_bytes().to_vec();
    let delta = |rng: &mut Rng, level: u32| {
        let mut delta = parts.delta;
        delta.chunk.fd = parts.images[rng.pick(parts.images.len())].as_raw_fd();
        delta.ctl.level = level as u8;
        delta.as_bytes().to_vec()
    };
    let checkpoint = abi::Checkpoint::new(id);
    match rng.below(32) {
        0..=2 => (abi::ADD_DELTA, delta(rng, 0)),
        3..=5 => (abi::START, Vec::new()),
        6 => (abi::STOP, Vec::new()),
        7 => (abi::CLEAR, Vec::new()),
        8..=10 => (abi::SNAPSHOT, delta(rng, 0)),
        11 => (abi::REPLACE_DELTA, delta(rng, level)),
        12 => (abi::DEL_DELTA, level.to_ne_bytes().to_vec()),
        13 => (abi::MERGE, Vec::new()),
        14..=17 => {
            let start = match rng.below(4) {
                0 => abi::OpStart::new(abi::OP_MERGE, abi::LEVEL_TOP, 0),
                1 => abi::OpStart::new(abi::OP_MERGE, level, 0),
                2 => abi::OpStart::new(abi::OP_COMPACT, 0, 0),
                _ => abi::OpStart::new(abi::OP_GROW, 0, (64 + rng.below(9)) << 11),
            };
            (abi::OP_START, start.as_bytes().to_vec())
        }
        18 => (abi::OP_STATUS, abi::OpStatus::read().as_bytes().to_vec()),
        19 => (abi::OP_WAIT, abi::OpStatus::read().as_bytes().to_vec()),
        20 => (abi::OP_CANCEL, Vec::new()),
        21 => (abi::SYNC, Vec::new()),
        22 => (abi::TRACK_INIT, vec![0; 16]),
        23 => (abi::TRACK_SETPOS, number(rng.below(40) << 20)),
        24 => (abi::TRACK_READ, vec![0; 16]),
        25 => match rng.below(2) {
            0 => (abi::TRACK_STOP, Vec::new()),
            _ => (abi::TRACK_ABORT, Vec::new()),
        },
        26 => {
            let flags = rng.below(2) as u32 * abi::CHECKPOINT_AT_SNAPSHOT;
            let start = abi::Checkpoint {
                flags,
                ..checkpoint
            };
            (abi::CHECKPOINT_START, start.as_bytes().to_vec())
        }
        27 => (abi::CHECKPOINT_DROP, checkpoint.as_bytes().to_vec()),
        28 => {
            let index = rng.below(4) as u32;
            let list = abi::Checkpoint {
                index,
                ..checkpoint
            };
            (abi::CHECKPOINT_LIST, list.as_bytes().to_vec())
        }
        29 => {
            let nr = rng.below(5) as u32;
            let head = abi::CheckpointRead {
                size: 64,
                flags: 0,
                id,
                start: rng.below(70) << 20,
                len: rng.below(70) << 20,
                nr,
                mbz: 0,
                reserved: [0; 2],
            };
            let mut bytes = head.as_bytes().to_vec();
            bytes.resize(bytes.len() + nr as usize * size_of::<abi::Extent>(), 0);
            (abi::CHECKPOINT_READ, bytes)
        }
        30 => {
            let head = abi::DumpBat {
                level,
                start_cluster: rng.below(70) as u32,
                nr_clusters: rng.below(70) as u32,
            };
            let mut bytes = head.as_bytes().to_vec();
            bytes.resize(bytes.len() + 70 * 4, 0);
            (abi::DUMP_CACHED_BAT, bytes)
        }
        _ => match rng.below(2) {
            0 => (abi::FREEZE, Vec::new()),
            _ => (abi::THAW, Vec::new()),
        },
    }
}

/// Any call with any argument.
fn noise(rng: &mut Rng, parts: &Parts) -> (u32, Vec<u8>) {
    let request = match rng.below(3) {
        0..=1 => KNOWN[rng.pick(KNOWN.len())],
        // Our letter with any number, size and direction; never the letters of others.
        _ => (rng.bits() as u32 & 0xFFFF_00FF) | (abi::TYPE << 8),
    };
    let bytes = match rng.below(4) {
        0 => {
            let mut bytes = vec![0; 1 + rng.pick(160)];
            rng.fill(&mut bytes);
            bytes
        }
        1 => abi::DeviceArg::new(if rng.chance(50) { parts.index } else { -1 })
            .as_bytes()
            .to_vec(),
        2 => sentence(rng, parts).1,
        _ => {
            let mut delta = parts.delta;
            delta.chunk.fd = match rng.below(4) {
                0 => -1,
                _ => parts.files[rng.pick(parts.files.len())].as_raw_fd(),
            };
            delta.ctl.flags ^= rng.below(2) as u32 * abi::FLAG_RDONLY;
            delta.ctl.format ^= rng.below(2) as u32 * 3;
            delta.as_bytes().to_vec()
        }
    };
    (request, bytes)
}

/// Changes a word of an argument, or cuts it.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    if bytes.len() >= 4 && rng.chance(70) {
        let at = rng.pick(bytes.len() / 4) * 4;
        bytes[at..at + 4].copy_from_slice(&edge(rng).to_ne_bytes());
    }
    if !bytes.is_empty() && rng.chance(15) {
        bytes.truncate(1 + rng.pick(bytes.len()));
    }
}

/// What happens between calls: the disk is written to and read, and an image is made empty,
/// attached or not. Whether that succeeds does not matter.
fn meanwhile(rng: &mut Rng, parts: &Parts, path: &str) {
    // Not for longer: who has it open keeps it from being stopped.
    let Ok(disk) = OpenOptions::new().read(true).write(true).open(path) else {
        return;
    };
    let mut bytes = [0; 8192];
    rng.fill(&mut bytes);
    let at = rng.below(64 << 8) << 12;
    match rng.below(20) {
        0..=11 => drop(disk.write_all_at(&bytes, at)),
        12..=14 => drop(disk.sync_data()),
        15..=18 => drop(disk.read_exact_at(&mut bytes, at)),
        _ => {
            let image = &parts.images[rng.pick(parts.images.len())];
            let _ = image.set_len(parts.empty.len() as u64);
            let _ = image.write_all_at(&parts.empty, 0);
        }
    }
}

/// `ioctl-fuzz [--seed S] [--count N] [--seconds N] IMAGE...`: empty images of the same size with
/// clusters of 1 MiB; what they hold afterwards does not matter.
pub fn fuzz(mut words: Words) -> Outcome {
    let seed = words.number("--seed", 1)?;
    let count = words.number("--count", u64::MAX)?;
    let end = Instant::now() + Duration::from_secs(words.number("--seconds", 60)?);
    let paths = words.all_operands()?;
    let path = paths.first().ok_or(Failure::Trouble("no image".into()))?;
    let mut rng = Rng::new(seed);
    let mut images = Vec::new();
    for path in &paths {
        images.push(OpenOptions::new().read(true).write(true).open(path)?);
    }
    let mut device = Device::add()?;
    let parts = Parts {
        delta: add_delta(&images[0], abi::FORMAT_PLOOP1, 11, 0),
        images,
        empty: std::fs::read(path)?,
        // A read-only file, a directory, character devices, a pipe's like.
        files: vec![
            File::open(path)?,
            File::open("/")?,
            File::open("/dev/zero")?,
            File::open("/proc/self/mounts")?,
            device.control.try_clone()?,
        ],
        index: device.index,
    };
    let (mut done, mut answers) = (BTreeSet::new(), BTreeMap::new());
    let mut nr = 0;
    while nr < count && Instant::now() < end {
        nr += 1;
        if rng.chance(30) {
            meanwhile(&mut rng, &parts, &device.path());
        }
        let (request, mut bytes) = match rng.below(10) {
            0..=6 => sentence(&mut rng, &parts),
            _ => noise(&mut rng, &parts),
        };
        let is_mutated = rng.chance(25);
        if is_mutated {
            mutate(&mut rng, &mut bytes);
        }
        let arg = match rng.below(40) {
            0 => Arg::Null,
            1 => Arg::Unreadable,
            2 => Arg::Number(rng.pick(4096)),
            _ if bytes.is_empty() => Arg::Null,
            _ => Arg::Bytes(&bytes),
        };
        let on_control = rng.chance(3) || matches!(request, abi::CTL_ADD | abi::CTL_REMOVE);
        // New devices would only pile up.
        if request == abi::CTL_ADD && rng.chance(98) {
            continue;
        }
        let answer = if on_control {
            let answer = device.memory.ioctl(&device.control, request, arg);
            answer.map(|(n, _)| n)
        } else {
            device.call(request, arg)
        };
        let answer = answer.map_or_else(|e| -e.raw_os_error().unwrap_or(1), |n| n.min(1));
        *answers.entry(answer).or_insert(0u64) += 1;
        if answer >= 0 && !is_mutated && !on_control {
            done.insert(request);
        }
        // It would be waited for as long as a random rate has it.
        if matches!(request, abi::OP_START | abi::OP_RATE) {
            let _ = device.call(abi::OP_RATE, Arg::Bytes(&0u64.to_ne_bytes()));
        }
    }
    println!(
        "{nr} calls; {} of the known ones succeeded",
        done.iter().filter(|r| KNOWN.contains(r)).count()
    );
    println!("seed {seed}: answers {answers:?}");
    drop(parts);
    for name in std::fs::read_dir("/sys/block")?.flatten() {
        let name = name.file_name().to_string_lossy().into_owned();
        let is_other = name != format!("ploop{}", device.index);
        if name.starts_with("ploop") && is_other {
            let mut other = Device::open(&format!("/dev/{name}"))?;
            take_down(&mut other);
            other.remove()?;
        }
    }
    take_down(&mut device);
    device
        .remove()
        .map_err(|e| Failure::Broken(format!("the device cannot be removed: {e}")))
}

/// Whatever state it is in.
fn take_down(device: &mut Device) {
    let _ = device.call(abi::THAW, Arg::Null);
    let _ = device.detach();
    let _ = device.call(abi::CLEAR, Arg::Null);
}

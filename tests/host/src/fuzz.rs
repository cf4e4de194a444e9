// SPDX-License-Identifier: GPL-2.0
//! Random ioctls on the control device and on a disk. Any answer is right; what counts is that the
//! kernel survives, that its log stays clean, and that the device can be taken down afterwards.

use crate::cli::{Failure, Outcome, Words};
use crate::dev::Arg;
use crate::device::{add_delta, Device};
use crate::rng::Rng;
use ploop_pure::abi;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use zerocopy::IntoBytes;

const KNOWN: [u32; 37] = [
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
];

/// What random arguments are made of.
struct Parts {
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

fn request(rng: &mut Rng) -> u32 {
    match rng.below(10) {
        // The calls that change states, often.
        0..=4 => {
            let calls = [abi::ADD_DELTA, abi::CLEAR, abi::STOP, abi::START, abi::SYNC];
            calls[rng.pick(calls.len())]
        }
        5..=7 => KNOWN[rng.pick(KNOWN.len())],
        // Our letter with any number, size and direction; never the letters of others.
        _ => (rng.bits() as u32 & 0xFFFF_00FF) | (abi::TYPE << 8),
    }
}

fn argument(rng: &mut Rng, parts: &Parts) -> Vec<u8> {
    let mut bytes = match rng.below(5) {
        0 => {
            let mut bytes = vec![0; 1 + rng.pick(160)];
            rng.fill(&mut bytes);
            return bytes;
        }
        1 => abi::DeviceArg::new(if rng.chance(50) { parts.index } else { -1 })
            .as_bytes()
            .to_vec(),
        _ => {
            let mut delta = parts.delta;
            delta.chunk.fd = match rng.below(6) {
                0..=2 => delta.chunk.fd,
                3 => -1,
                _ => parts.files[rng.pick(parts.files.len())].as_raw_fd(),
            };
            if rng.chance(20) {
                delta.ctl.flags ^= abi::FLAG_RDONLY;
            }
            if rng.chance(20) {
                delta.ctl.format ^= 3;
            }
            delta.as_bytes().to_vec()
        }
    };
    if rng.chance(50) {
        let at = rng.pick(bytes.len() / 4) * 4;
        bytes[at..at + 4].copy_from_slice(&edge(rng).to_ne_bytes());
    }
    if rng.chance(15) {
        bytes.truncate(1 + rng.pick(bytes.len()));
    }
    bytes
}

/// `ioctl-fuzz [--seed S] [--count N] IMAGE`: IMAGE is a good image with clusters of 1 MiB; what
/// it holds afterwards does not matter.
pub fn fuzz(mut words: Words) -> Outcome {
    let seed = words.number("--seed", 1)?;
    let count = words.number("--count", 10_000)?;
    let [path] = words.operands()?;
    let mut rng = Rng::new(seed);
    let image = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut device = Device::add()?;
    let parts = Parts {
        // A read-only file, a directory, a character device, a pipe's like, and the disk itself.
        files: vec![
            File::open(&path)?,
            File::open("/")?,
            File::open("/dev/zero")?,
            File::open("/proc/self/mounts")?,
            File::open(device.path())?,
            device.control.try_clone()?,
        ],
        delta: add_delta(&image, abi::FORMAT_PLOOP1, 11, 0),
        index: device.index,
    };
    let mut answers = BTreeMap::new();
    for _ in 0..count {
        let request = request(&mut rng);
        let bytes = argument(&mut rng, &parts);
        let arg = match rng.below(12) {
            0 => Arg::Null,
            1 => Arg::Unreadable,
            2 => Arg::Number(rng.pick(4096)),
            _ => Arg::Bytes(&bytes),
        };
        let on_control = rng.chance(20) || matches!(request, abi::CTL_ADD | abi::CTL_REMOVE);
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
    }
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

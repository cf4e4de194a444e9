// SPDX-License-Identifier: GPL-2.0
//! Copies the top's image of a device in use by the write tracker, as libploop does; checkpoints
//! started, told and dropped.

use crate::cli::{parse, Failure, Outcome, Words};
use crate::dev::Arg;
use crate::device::Device;
use ploop_pure::abi::{self, TrackExtent};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes read at once.
const PIECE: u64 = 256 << 10;
/// What direct I/O wants.
const ALIGN: usize = 4096;

/// A copy that goes on.
struct Copy {
    device: Device,
    image: File,
    target: File,
    buffer: Vec<u8>,
    announced: u64,
    copied: u64,
}

impl Copy {
    fn extent(&mut self, request: u32) -> io::Result<TrackExtent> {
        let disk = File::open(self.device.path())?;
        let none = TrackExtent { start: 0, end: 0 };
        let arg = Arg::Bytes(none.as_bytes());
        let (_, out) = self.device.memory.ioctl(&disk, request, arg)?;
        let extent = TrackExtent::read_from_prefix(&out);
        extent
            .map(|(e, _)| e)
            .map_err(|_| io::Error::other("no extent"))
    }

    fn announce(&mut self, end: u64) -> io::Result<()> {
        self.device
            .call(abi::TRACK_SETPOS, Arg::Bytes(end.as_bytes()))?;
        self.announced = end;
        Ok(())
    }

    /// Copies what is to be copied, announced first where it never was.
    fn copy(&mut self, extent: TrackExtent) -> io::Result<()> {
        let mut at = extent.start;
        while at < extent.end {
            let end = (at + PIECE).min(extent.end);
            if end > self.announced {
                self.announce(end)?;
            }
            let first = self.buffer.as_ptr().align_offset(ALIGN);
            let buffer = &mut self.buffer[first..first + PIECE as usize];
            let nr = self.image.read_at(buffer, at)?.min((end - at) as usize);
            self.target.write_all_at(&buffer[..nr], at)?;
            self.copied += nr as u64;
            if nr < (end - at) as usize {
                // The end of the file.
                break;
            }
            at = end;
        }
        Ok(())
    }

    /// Copies what was written meanwhile; how many bytes that were.
    fn round(&mut self, max: u32) -> io::Result<u64> {
        let before = self.copied;
        for _ in 0..max {
            match self.extent(abi::TRACK_READ) {
                Ok(extent) => self.copy(extent)?,
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(self.copied - before)
    }
}

/// `track-copy [--rounds N] --quiesce COMMAND DEVICE IMAGE TARGET`: what the device holds after
/// COMMAND has ended all writing is what TARGET holds then.
pub fn copy(mut words: Words) -> Outcome {
    let rounds = words.number("--rounds", 3)?;
    let quiesce = words.needed("--quiesce")?;
    let [path, image, target] = words.operands()?;
    let direct = || {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT).open(&image)
    };
    let mut copy = Copy {
        device: Device::open(&path)?,
        image: direct()?,
        target: File::create_new(target)?,
        buffer: vec![0; PIECE as usize + ALIGN],
        announced: 0,
        copied: 0,
    };
    let all = copy.extent(abi::TRACK_INIT)?;
    copy.copy(all)?;
    let mut told = vec![copy.copied];
    for _ in 0..rounds {
        told.push(copy.round(200)?);
    }
    let ended = Command::new("sh").args(["-c", &quiesce]).status()?;
    if !ended.success() {
        return Err(Failure::Trouble(format!("{quiesce}: {ended}")));
    }
    copy.device.call(abi::SYNC, Arg::Null)?;
    told.push(copy.round(u32::MAX)?);
    copy.device
        .call(abi::TRACK_STOP, Arg::Null)
        .map_err(|e| Failure::Broken(format!("not all was copied: {e}")))?;
    println!("{told:?} bytes");
    Ok(())
}

fn id_of(text: &str) -> Result<[u8; 16], Failure> {
    let n = parse(text)?;
    Ok(std::array::from_fn(|i| (n >> (i % 8 * 8)) as u8))
}

/// `checkpoint start|arm|drop DEVICE ID`, `checkpoint list DEVICE` or `checkpoint read DEVICE ID`,
/// which prints the extents in bytes.
pub fn checkpoint(mut words: Words) -> Outcome {
    let granularity = words.number("--granularity", 0)? as u32;
    let words = words.all_operands()?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["list", path] => list(path),
        ["read", path, id] => read(path, id_of(id)?),
        [what @ ("start" | "arm" | "drop"), path, id] => {
            let mut point = abi::Checkpoint::new(id_of(id)?);
            let request = match what {
                "drop" => abi::CHECKPOINT_DROP,
                _ => abi::CHECKPOINT_START,
            };
            if what != "drop" {
                point.granularity = granularity;
            }
            if what == "arm" {
                point.flags = abi::CHECKPOINT_AT_SNAPSHOT;
            }
            let done = Device::open(path)?.call(request, Arg::Bytes(point.as_bytes()));
            done.map(drop)
                .map_err(|e| Failure::Broken(format!("refused: {e}")))
        }
        _ => Err(Failure::Trouble(format!("no checkpoint {words:?}"))),
    }
}

fn list(path: &str) -> Outcome {
    let mut device = Device::open(path)?;
    let disk = File::open(path)?;
    for index in 0.. {
        let mut point = abi::Checkpoint::new([0; 16]);
        point.index = index;
        let arg = Arg::Bytes(point.as_bytes());
        match device.memory.ioctl(&disk, abi::CHECKPOINT_LIST, arg) {
            Ok((_, out)) => {
                let (point, _) = abi::Checkpoint::read_from_prefix(&out)
                    .map_err(|_| Failure::Trouble("no checkpoint".into()))?;
                let id = u64::from_le_bytes(std::array::from_fn(|i| point.id[i]));
                let state = point.state;
                println!("{id} {state} {} {}", point.granularity, point.dirty);
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn read(path: &str, id: [u8; 16]) -> Outcome {
    const ROOM: usize = 16;
    let mut device = Device::open(path)?;
    let disk = File::open(path)?;
    let (mut start, mut len) = (0, u64::MAX);
    while len > 0 {
        let head = abi::CheckpointRead {
            size: 64,
            flags: 0,
            id,
            start,
            len,
            nr: ROOM as u32,
            mbz: 0,
            reserved: [0; 2],
        };
        let mut bytes = head.as_bytes().to_vec();
        bytes.resize(bytes.len() + ROOM * size_of::<abi::Extent>(), 0);
        let arg = Arg::Bytes(&bytes);
        let (_, out) = device
            .memory
            .ioctl(&disk, abi::CHECKPOINT_READ, arg)
            .map_err(|e| Failure::Broken(format!("refused: {e}")))?;
        let trouble = |_| Failure::Trouble("no extents".into());
        let (head, rest) = abi::CheckpointRead::read_from_prefix(&out).map_err(|_| trouble(()))?;
        let mut rest = rest;
        for _ in 0..head.nr {
            let (extent, more) = abi::Extent::read_from_prefix(rest).map_err(|_| trouble(()))?;
            println!("{} {}", extent.start, extent.len);
            rest = more;
        }
        (start, len) = (head.start, head.len);
    }
    Ok(())
}

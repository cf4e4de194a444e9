// SPDX-License-Identifier: GPL-2.0
//! Random operations on a real device, compared with a model in memory: writes, discards, snapshots,
//! merges, growth, compaction, rollback, detach and attach, from a seed.

use crate::cli::{Failure, Outcome, Words};
use crate::dev::{Arg, Buffer};
use crate::device::{add_delta, Device};
use crate::rng::Rng;
use ploop_pure::abi;
use ploop_pure::layout::ploop1::{Header, Version};
use ploop_pure::units::ClusterSize;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use zerocopy::IntoBytes;

/// `_IO(0x12, 119)`: BLKDISCARD.
const BLKDISCARD: u32 = 0x1277;
/// `_IO(0x12, 127)`: BLKZEROOUT.
const BLKZEROOUT: u32 = 0x127f;
const SECTOR: usize = 512;
/// Longest write, in sectors.
const WRITE_MAX: usize = 512;

/// A delta of the chain.
struct Delta {
    path: PathBuf,
    /// What the disk held when the delta became a lower one.
    saved: Vec<u8>,
}

struct Run {
    rng: Rng,
    dir: PathBuf,
    cluster: ClusterSize,
    version: Version,
    is_raw: bool,
    device: Device,
    disk: Option<File>,
    deltas: Vec<Delta>,
    /// What the disk must hold.
    model: Vec<u8>,
    nr_images: usize,
    /// What was done last, for the report.
    log: Vec<String>,
    /// An operation that runs while others go on.
    running: bool,
}

fn call<T>(what: &str, result: io::Result<T>) -> Result<T, Failure> {
    result.map_err(|e| Failure::Broken(format!("{what}: {e}")))
}

/// `model [--seed S] [--ops N] [--cluster-log L] [--version V] [--raw] [--sectors N] DIR`
pub fn model(mut words: Words) -> Outcome {
    let seed = words.number("--seed", 1)?;
    let ops = words.number("--ops", 400)?;
    let log = words.number("--cluster-log", 7)? as u32;
    let sectors = words.number("--sectors", 16 << 11)?;
    let version = match words.number("--version", 2)? {
        1 => Version::V1,
        _ => Version::V2,
    };
    let is_raw = words.flag("--raw");
    let [dir] = words.operands()?;
    let cluster = ClusterSize::from_log(log)
        .ok_or_else(|| Failure::Trouble(format!("no cluster size {log}")))?;
    let mut run = Run {
        rng: Rng::new(seed),
        dir: dir.into(),
        cluster,
        version,
        is_raw,
        device: Device::add()?,
        disk: None,
        deltas: Vec::new(),
        model: vec![0; sectors as usize * SECTOR],
        nr_images: 0,
        log: Vec::new(),
        running: false,
    };
    let done = run.run(ops);
    if done.is_err() {
        let from = run.log.len().saturating_sub(40);
        for line in &run.log[from..] {
            println!("{line}");
        }
    }
    done.map_err(|e| match e {
        Failure::Broken(what) => {
            Failure::Broken(format!("seed {seed}, operation {}: {what}", run.log.len()))
        }
        trouble => trouble,
    })?;
    run.disk = None;
    call("detach", run.device.detach())?;
    call("remove", run.device.remove())?;
    let mut kinds = std::collections::BTreeMap::new();
    for line in &run.log {
        let kind = line.split(' ').next().unwrap_or_default().to_owned();
        *kinds.entry(kind).or_insert(0) += 1;
    }
    println!("{ops} operations from seed {seed} agree with the model: {kinds:?}");
    Ok(())
}

impl Run {
    fn run(&mut self, ops: u64) -> Outcome {
        let base = self.new_image(self.is_raw)?;
        self.deltas.push(Delta {
            path: base,
            saved: Vec::new(),
        });
        self.attach()?;
        for _ in 0..ops {
            self.operation()?;
        }
        self.wait_op()?;
        self.reattach()?;
        self.verify(0, self.model.len())
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    fn operation(&mut self) -> Outcome {
        match self.rng.below(100) {
            0..=47 => self.write(),
            48..=57 => self.zero(BLKDISCARD),
            58..=62 => self.zero(BLKZEROOUT),
            63..=66 => self.flush(),
            67..=78 => {
                let (first, len) = self.some_range(self.model.len() / SECTOR);
                self.verify(first * SECTOR, len * SECTOR)
            }
            79..=80 => self.verify(0, self.model.len()),
            81..=85 => self.snapshot(),
            86..=90 => self.merge(),
            91..=92 => self.grow(),
            93..=94 => self.compact(),
            95..=96 => self.reattach(),
            97 => self.roll_back(),
            _ => self.wait_op(),
        }
    }

    /// A range of sectors: first and how many, `max` at most.
    fn some_range(&mut self, max: usize) -> (usize, usize) {
        let sectors = self.model.len() / SECTOR;
        let per = self.cluster.sectors() as usize;
        let mut first = self.rng.pick(sectors);
        let mut len = 1 + self.rng.pick(max.min(4 * per));
        if self.rng.chance(40) {
            // Whole clusters, which are special.
            first -= first % per;
            len = len.next_multiple_of(per);
        } else if self.rng.chance(50) {
            first &= !7;
            len = len.next_multiple_of(8);
        }
        let len = len.min(max).min(sectors - first);
        (first, len)
    }

    fn disk(&self) -> Result<&File, Failure> {
        self.disk
            .as_ref()
            .ok_or_else(|| Failure::Trouble("no disk".into()))
    }

    fn write(&mut self) -> Outcome {
        let (first, len) = self.some_range(WRITE_MAX);
        self.note(format!("write {first}+{len}"));
        let range = first * SECTOR..(first + len) * SECTOR;
        if self.rng.chance(10) {
            self.model[range.clone()].fill(0);
        } else {
            self.rng.fill(&mut self.model[range.clone()]);
        }
        let mut buffer = Buffer::new(range.len().div_ceil(4096));
        let bytes = &mut buffer.bytes()[..range.len()];
        bytes.copy_from_slice(&self.model[range.clone()]);
        call(
            "write",
            self.disk()?.write_all_at(bytes, range.start as u64),
        )
    }

    fn zero(&mut self, request: u32) -> Outcome {
        let (first, len) = self.some_range(self.model.len() / SECTOR);
        self.note(format!("zero {request:#x} {first}+{len}"));
        let range = [(first * SECTOR) as u64, (len * SECTOR) as u64];
        self.model[first * SECTOR..(first + len) * SECTOR].fill(0);
        let disk = self.disk()?.try_clone()?;
        let arg = Arg::Bytes(range.as_bytes());
        call("discard", self.device.memory.ioctl(&disk, request, arg))?;
        if request == BLKDISCARD {
            // What is smaller than a block of the image's file system may be kept.
            let part = |at: usize| at % 8 != 0;
            if part(first) || part(first + len) {
                let arg = Arg::Bytes(range.as_bytes());
                call("zero", self.device.memory.ioctl(&disk, BLKZEROOUT, arg))?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Outcome {
        self.note("flush".into());
        call("flush", self.disk()?.sync_data())
    }

    fn verify(&mut self, start: usize, len: usize) -> Outcome {
        let mut at = start;
        while at < start + len {
            let nr = (start + len - at).min(1 << 20);
            let mut buffer = Buffer::new(nr.div_ceil(4096));
            let bytes = &mut buffer.bytes()[..nr];
            call("read", self.disk()?.read_exact_at(bytes, at as u64))?;
            let want = &self.model[at..at + nr];
            if let Some(i) = (0..nr).find(|i| bytes[*i] != want[*i]) {
                let byte = at + i;
                let last = (i..nr).rev().find(|i| bytes[*i] != want[*i]).unwrap_or(i) + at;
                return Err(Failure::Broken(format!(
                    "sectors {} to {} (cluster {}) are wrong: {:#x}, not {:#x}",
                    byte / SECTOR,
                    last / SECTOR,
                    byte as u64 / self.cluster.bytes(),
                    bytes[i],
                    want[i]
                )));
            }
            at += nr;
        }
        Ok(())
    }

    fn sectors(&self) -> u64 {
        (self.model.len() / SECTOR) as u64
    }

    fn new_image(&mut self, is_raw: bool) -> Result<PathBuf, Failure> {
        let path = self.dir.join(format!("{}.img", self.nr_images));
        self.nr_images += 1;
        let mut file = File::create_new(&path)?;
        if is_raw {
            file.set_len(self.model.len() as u64)?;
            return Ok(path);
        }
        let header = Header::new(self.version, self.cluster, self.sectors())
            .map_err(|p| Failure::Trouble(p.to_string()))?;
        file.write_all(header.encode().as_bytes())?;
        file.set_len(self.cluster.offset(header.first_data))?;
        file.sync_all()?;
        Ok(path)
    }

    fn attach(&mut self) -> Outcome {
        let top = self.deltas.len() - 1;
        let (mut files, mut args) = (Vec::new(), Vec::new());
        for (level, delta) in self.deltas.iter().enumerate() {
            let is_top = level == top;
            let file = OpenOptions::new()
                .read(true)
                .write(is_top)
                .open(&delta.path)?;
            let format = match self.is_raw && level == 0 {
                true => abi::FORMAT_RAW,
                false => abi::FORMAT_PLOOP1,
            };
            let flags = if is_top { 0 } else { abi::FLAG_RDONLY };
            let log = self.cluster.log_sectors();
            args.push(add_delta(&file, format, log, flags));
            files.push(file);
        }
        call("attach", self.device.attach_chain(&args))?;
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.device.path())?;
        self.disk = Some(disk);
        Ok(())
    }

    fn reattach(&mut self) -> Outcome {
        self.wait_op()?;
        self.note("detach and attach".into());
        self.disk = None;
        call("detach", self.device.detach())?;
        self.attach()
    }

    fn snapshot(&mut self) -> Outcome {
        if self.running || self.deltas.len() > 8 {
            return Ok(());
        }
        self.note(format!("snapshot to level {}", self.deltas.len()));
        let path = self.new_image(false)?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let log = self.cluster.log_sectors();
        let arg = add_delta(&file, abi::FORMAT_PLOOP1, log, 0);
        let bytes = &arg.as_bytes()[..56];
        call(
            "snapshot",
            self.device.call(abi::SNAPSHOT, Arg::Bytes(bytes)),
        )?;
        if let Some(old) = self.deltas.last_mut() {
            old.saved = self.model.clone();
        }
        let saved = Vec::new();
        self.deltas.push(Delta { path, saved });
        Ok(())
    }

    fn start_op(&mut self, op: abi::OpStart) -> Outcome {
        let arg = Arg::Bytes(op.as_bytes());
        call("OP_START", self.device.call(abi::OP_START, arg))?;
        self.running = true;
        if self.rng.chance(50) {
            return self.wait_op();
        }
        Ok(())
    }

    fn merge(&mut self) -> Outcome {
        if self.running || self.deltas.len() < 2 {
            return Ok(());
        }
        let level = 1 + self.rng.pick(self.deltas.len() - 1);
        let is_top = level == self.deltas.len() - 1;
        self.note(format!("merge level {level} of {}", self.deltas.len()));
        let upper = self.deltas.remove(level);
        let lower = &mut self.deltas[level - 1];
        lower.saved = upper.saved;
        let named = if is_top { abi::LEVEL_TOP } else { level as u32 };
        self.start_op(abi::OpStart::new(abi::OP_MERGE, named, 0))
    }

    fn grow(&mut self) -> Outcome {
        if self.running || self.model.len() > 64 << 20 {
            return Ok(());
        }
        let more = 1 + self.rng.below(6);
        let sectors = self.sectors() + more * u64::from(self.cluster.sectors());
        self.note(format!("grow to {sectors}"));
        let op = abi::OpStart::new(abi::OP_GROW, 0, sectors);
        self.start_op(op)?;
        self.wait_op()?;
        self.model.resize(sectors as usize * SECTOR, 0);
        Ok(())
    }

    fn compact(&mut self) -> Outcome {
        if self.running || (self.is_raw && self.deltas.len() == 1) {
            return Ok(());
        }
        self.note("compact".into());
        self.start_op(abi::OpStart::new(abi::OP_COMPACT, 0, 0))
    }

    fn wait_op(&mut self) -> Outcome {
        if !self.running {
            return Ok(());
        }
        self.running = false;
        let status = abi::OpStatus::read();
        let arg = Arg::Bytes(status.as_bytes());
        let disk = File::open(self.device.path())?;
        let (_, out) = call(
            "OP_WAIT",
            self.device.memory.ioctl(&disk, abi::OP_WAIT, arg),
        )?;
        let result = i32::from_ne_bytes(std::array::from_fn(|i| out[16 + i]));
        self.note(format!("operation ended with {result}"));
        match result {
            0 => Ok(()),
            e => Err(Failure::Broken(format!(
                "the operation failed: errno {}",
                -e
            ))),
        }
    }

    /// Throws away what was written since the last snapshot.
    fn roll_back(&mut self) -> Outcome {
        self.wait_op()?;
        let nr = self.deltas.len();
        if nr < 2 || self.deltas[nr - 2].saved.len() != self.model.len() {
            return Ok(());
        }
        self.note("roll back".into());
        self.disk = None;
        call("detach", self.device.detach())?;
        let top = self.deltas.remove(nr - 1);
        std::fs::remove_file(&top.path)?;
        self.model.clone_from(&self.deltas[nr - 2].saved);
        let path = self.new_image(false)?;
        let saved = Vec::new();
        self.deltas.push(Delta { path, saved });
        self.attach()
    }
}

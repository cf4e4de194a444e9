// SPDX-License-Identifier: GPL-2.0
//! A load that knows what it wrote: several threads write, zero, flush and read a disk, and compare
//! all they read. Every sector says which sector and which write it is from, so that what is wrong
//! can be told. What the disk must hold can be kept in a file, for a later look.
//!
//! Parts of the disk are shared out in pieces that do not end where clusters do, so that the threads
//! meet in most clusters; the rest in pieces of 1 MiB, in which whole clusters are written at once.

use crate::cli::{self, Failure, Outcome, Words};
use crate::dev::{self, Arg, Buffer, Guarded, Part};
use crate::rng::Rng;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// `_IO(0x12, 119)`: BLKDISCARD.
const BLKDISCARD: u32 = 0x1277;
/// `_IO(0x12, 127)`: BLKZEROOUT.
const BLKZEROOUT: u32 = 0x127f;
const SECTOR: usize = 512;
const MAGIC: u64 = 0x706c_6f6f_706c_6f61;
/// Sectors of a large piece.
const LARGE: u64 = 2048;
/// Sectors of a small piece: 20 KiB.
const SMALL: u64 = 40;
/// So much is done when it is said that the load has begun.
const FIRST: u64 = 10;
/// The version of a sector whose write failed: any is right.
const ANY: u32 = u32::MAX;

/// What the disk holds: for each sector the number of its last write, 0 for zeros.
struct Model {
    versions: Vec<AtomicU32>,
}

fn word(sector: u64, version: u32, i: usize) -> u64 {
    match i {
        0 => MAGIC,
        1 => sector,
        2 => u64::from(version),
        i => (sector ^ (u64::from(version) << 40))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(i as u64),
    }
}

fn fill(sector: u64, version: u32, out: &mut [u8]) {
    for (i, bytes) in out.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(sector, version, i).to_le_bytes());
    }
}

/// The write that a sector's content is from; nothing if it is none's.
fn version_of(sector: u64, have: &[u8]) -> Option<u32> {
    if have.iter().all(|b| *b == 0) {
        return Some(0);
    }
    let at = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| have[i * 8 + b]));
    let version = u32::try_from(at(2)).ok()?;
    let is_whole = (0..have.len() / 8).all(|i| at(i) == word(sector, version, i));
    is_whole.then_some(version)
}

impl Model {
    fn new(sectors: u64) -> Self {
        let versions = (0..sectors).map(|_| AtomicU32::new(0)).collect();
        Self { versions }
    }

    fn load(path: &str) -> Result<Self, Failure> {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        let words = bytes.chunks_exact(4);
        let versions =
            words.map(|w| AtomicU32::new(u32::from_le_bytes(std::array::from_fn(|i| w[i]))));
        Ok(Self {
            versions: versions.collect(),
        })
    }

    fn save(&self, path: &str) -> Result<(), Failure> {
        let words = self.versions.iter().map(|v| v.load(Relaxed).to_le_bytes());
        let bytes: Vec<u8> = words.flatten().collect();
        File::create(path)?.write_all(&bytes)?;
        Ok(())
    }

    fn extend(&mut self, sectors: u64) {
        let sectors = sectors.max(self.versions.len() as u64) as usize;
        self.versions.resize_with(sectors, || AtomicU32::new(0));
    }

    fn len(&self) -> u64 {
        self.versions.len() as u64
    }

    fn newest(&self) -> u32 {
        let known = self.versions.iter().map(|v| v.load(Relaxed));
        known.filter(|v| *v != ANY).max().unwrap_or(0)
    }

    fn set(&self, first: u64, nr: u64, version: u32) {
        for at in first..first + nr {
            self.versions[at as usize].store(version, Relaxed);
        }
    }

    fn compare(&self, first: u64, bytes: &[u8]) -> Result<(), Failure> {
        for (sector, have) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let want = self.versions[sector as usize].load(Relaxed);
            let found = version_of(sector, have);
            if found == Some(want) || (want == ANY && found.is_some()) {
                continue;
            }
            let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| have[i * 8 + b]));
            let found = match found {
                Some(0) => "zeros".into(),
                Some(v) => format!("write {v}"),
                None if word(0) == MAGIC => format!("sector {} of write {}", word(1), word(2)),
                None => format!("nothing we wrote ({:#x})", word(0)),
            };
            return Err(Failure::Broken(format!(
                "sector {sector} holds {found}, not write {want}"
            )));
        }
        Ok(())
    }

    /// All of the disk, or only the MiB of it that were written.
    fn verify(&self, disk: &File, only_written: bool) -> Outcome {
        let mut buffer = Buffer::new(256);
        let mut at = 0;
        while at < self.len() {
            let nr = LARGE.min(self.len() - at);
            let versions = &self.versions[at as usize..(at + nr) as usize];
            if !only_written || versions.iter().any(|v| v.load(Relaxed) != 0) {
                let bytes = &mut buffer.bytes()[..nr as usize * SECTOR];
                disk.read_exact_at(bytes, at * SECTOR as u64)
                    .map_err(|e| Failure::Broken(format!("read of sector {at}: {e}")))?;
                self.compare(at, bytes)?;
            }
            at += nr;
        }
        Ok(())
    }
}

fn open(path: &str, write: bool) -> Result<File, Failure> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    let file = options.open(path);
    file.map_err(|e| Failure::Trouble(format!("cannot open {path}: {e}")))
}

/// `plooptest read-at-once`.
pub fn read_at_once(words: Words) -> Outcome {
    let operands = words.all_operands()?;
    let [path, offset, parts @ ..] = operands.as_slice() else {
        let what = "a device, an offset and lengths are wanted";
        return Err(Failure::Trouble(what.into()));
    };
    let parts = parts.iter().map(|text| {
        let kib = text.strip_suffix('n');
        let len = (cli::parse(kib.unwrap_or(text))? << 10) as usize;
        Ok(Part {
            len,
            is_nowait: kib.is_some(),
        })
    });
    let parts = parts.collect::<Result<Vec<_>, Failure>>()?;
    for result in dev::read_at_once(&open(path, false)?, cli::parse(offset)?, &parts)? {
        println!("{result}");
    }
    Ok(())
}

fn sectors_of(disk: &mut File) -> Result<u64, Failure> {
    Ok(disk.seek(SeekFrom::End(0))? / SECTOR as u64)
}

struct Load<'a> {
    path: &'a str,
    model: &'a Model,
    next: &'a AtomicU32,
    done: &'a AtomicU64,
    failed: &'a AtomicU64,
    stop: &'a AtomicBool,
    jobs: u64,
    /// Nothing but 4 KiB written every so many sectors, once; 0 for the usual.
    apart: u64,
    discards: bool,
    tolerates: bool,
}

impl Load<'_> {
    /// Some sectors that belong to thread `job`: first and how many.
    fn choose(&self, job: u64, rng: &mut Rng) -> (u64, u64) {
        loop {
            let large = rng.below(self.model.len().div_ceil(LARGE));
            let (start, size) = if large % 4 == 0 {
                (large * LARGE, LARGE)
            } else {
                let small = (large * LARGE + rng.below(LARGE)) / SMALL;
                (small * SMALL, SMALL)
            };
            // A small piece may begin or end in a large one's place.
            let is_large = |at: u64| at / LARGE % 4 == 0;
            let end = (start + size).min(self.model.len());
            if size == SMALL && (is_large(start) || is_large(end - 1)) {
                continue;
            }
            let owner = if size == LARGE {
                large / 4
            } else {
                start / SMALL
            };
            if owner % self.jobs != job {
                continue;
            }
            let (mut first, mut nr) = (start + rng.below(end - start), 1 + rng.below(size));
            if size == LARGE {
                // Whole clusters of any size below a MiB, often.
                let unit = 64 << rng.below(6);
                first = start + rng.below(size) / unit * unit;
                nr = if rng.chance(70) {
                    unit
                } else {
                    1 + rng.below(unit)
                };
            } else if rng.chance(60) {
                first &= !7;
                nr = nr.next_multiple_of(8);
            }
            if first < end {
                return (first, nr.min(end - first));
            }
        }
    }

    fn run(&self, job: u64, seed: u64) -> Outcome {
        let disk = open(self.path, true)?;
        let mut memory = Guarded::new()?;
        let mut rng = Rng::new(seed ^ ((job + 1) << 32));
        let mut buffer = Buffer::new(256);
        let mut nr_done = 0;
        while !self.stop.load(Relaxed) {
            let (mut first, mut nr, kind) = if self.apart > 0 {
                nr_done += 1;
                ((nr_done * self.jobs + job) * self.apart, 8, 99)
            } else {
                let (first, nr) = self.choose(job, &mut rng);
                (first, nr, rng.below(100))
            };
            if first + nr > self.model.len() {
                break;
            }
            let (what, result) = if kind < 25 {
                let bytes = &mut buffer.bytes()[..nr as usize * SECTOR];
                let read = disk.read_exact_at(bytes, first * SECTOR as u64);
                if read.is_ok() {
                    self.model.compare(first, bytes)?;
                }
                ("read", read)
            } else if kind < 30 {
                ("flush", disk.sync_data())
            } else if kind < 42 && self.discards {
                let end = (first + nr) & !7;
                first = first.next_multiple_of(8);
                if first >= end {
                    continue;
                }
                nr = end - first;
                let range = [first * SECTOR as u64, nr * SECTOR as u64];
                let request = if rng.chance(50) {
                    BLKDISCARD
                } else {
                    BLKZEROOUT
                };
                let done = memory.ioctl(&disk, request, Arg::Bytes(range.as_bytes()));
                self.model
                    .set(first, nr, if done.is_ok() { 0 } else { ANY });
                ("discard", done.map(drop))
            } else {
                let version = self.next.fetch_add(1, Relaxed);
                let bytes = &mut buffer.bytes()[..nr as usize * SECTOR];
                for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
                    fill(sector, version, bytes);
                }
                let done = disk.write_all_at(bytes, first * SECTOR as u64);
                self.model
                    .set(first, nr, if done.is_ok() { version } else { ANY });
                ("write", done)
            };
            match result {
                Ok(()) => drop(self.done.fetch_add(1, Relaxed)),
                Err(_) if self.tolerates => {
                    self.failed.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => {
                    return Err(Failure::Broken(format!(
                        "{what} of {nr} sectors at {first}: {e}"
                    )))
                }
            }
        }
        Ok(())
    }
}

/// `load [--seed S] [--seconds N] [--stop FILE [--at-least N]] [--begun FILE] [--jobs J] [--discard]
/// [--tolerate] [--from FILE] [--save FILE] [--written] [--apart BYTES] DEV`
pub fn load(mut words: Words) -> Outcome {
    let seed = words.number("--seed", 1)?;
    let seconds = words.number("--seconds", 10)?;
    let stop_file = words.text("--stop")?;
    let at_least = words.number("--at-least", 0)?;
    let mut begun = words.text("--begun")?;
    let jobs = words.number("--jobs", 4)?.max(1);
    let (discards, tolerates) = (words.flag("--discard"), words.flag("--tolerate"));
    let (from, save) = (words.text("--from")?, words.text("--save")?);
    let only_written = words.flag("--written");
    let apart = words.number("--apart", 0)? / SECTOR as u64;
    let [path] = words.operands()?;
    let mut disk = open(&path, false)?;
    let sectors = sectors_of(&mut disk)?;
    let mut model = match from {
        Some(from) => Model::load(&from)?,
        None => Model::new(0),
    };
    model.extend(sectors);
    let next = AtomicU32::new(model.newest() + 1);
    let (done, failed, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let load = Load {
        path: &path,
        model: &model,
        next: &next,
        done: &done,
        failed: &failed,
        stop: &stop,
        jobs,
        apart,
        discards,
        tolerates,
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let results = std::thread::scope(|scope| {
        let load = &load;
        let threads: Vec<_> = (0..jobs)
            .map(|job| {
                scope.spawn(move || {
                    let result = load.run(job, seed);
                    if result.is_err() {
                        load.stop.store(true, Relaxed);
                    }
                    result
                })
            })
            .collect();
        let is_wanted = || stop_file.as_ref().is_some_and(|f| Path::new(f).exists());
        let is_over =
            || Instant::now() >= end || (load.done.load(Relaxed) >= at_least && is_wanted());
        let mut told = Ok(());
        while !stop.load(Relaxed) && !is_over() && told.is_ok() {
            if load.done.load(Relaxed) >= FIRST {
                told = begun.take().map_or(Ok(()), |f| File::create(f).map(drop));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Relaxed);
        let joined = threads.into_iter().map(|t| match t.join() {
            Ok(result) => result,
            Err(_) => Err(Failure::Trouble("a thread panicked".into())),
        });
        let told = std::iter::once(told.map_err(Failure::from));
        joined.chain(told).collect::<Vec<_>>()
    });
    for result in results {
        result?;
    }
    model.verify(&disk, only_written)?;
    if let Some(save) = save {
        model.save(&save)?;
    }
    println!(
        "seed {seed}: {} done, {} failed",
        done.load(Relaxed),
        failed.load(Relaxed)
    );
    Ok(())
}

/// `load-verify [--written] DEV FILE`: the disk holds what `load --save` kept, and zeros behind that.
pub fn verify(mut words: Words) -> Outcome {
    let only_written = words.flag("--written");
    let [path, from] = words.operands()?;
    let mut disk = open(&path, false)?;
    let mut model = Model::load(&from)?;
    model.extend(sectors_of(&mut disk)?);
    model.verify(&disk, only_written)
}

// SPDX-License-Identifier: GPL-2.0
//! A load of numbered blocks, each made durable before it is acknowledged, and its judge.
//!
//! Block n goes to one of K places spread over the whole disk, so that clusters are allocated all
//! the time and places are overwritten. The acknowledged number is kept outside the disk.

use crate::cli::{parse, Failure, Outcome, Words};
use crate::dev::{write_durably, Buffer, ALIGN};
use crate::rng::Rng;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

const MAGIC: u64 = 0x706c_6f6f_7073_6571;

/// Where the blocks go.
struct Places {
    nr: u64,
    stride: u64,
}

impl Places {
    /// Spread over `len` bytes; 0: all that the disk has now.
    fn new(disk: &mut File, nr: u64, len: u64) -> Result<Self, Failure> {
        let len = match len {
            0 => disk.seek(SeekFrom::End(0))?,
            len => len,
        };
        let stride = len / nr.max(1) / ALIGN as u64 * ALIGN as u64;
        if stride == 0 {
            return Err(Failure::Trouble("the disk is too small".into()));
        }
        Ok(Self { nr, stride })
    }

    fn place(&self, n: u64) -> u64 {
        Rng::new(n).below(self.nr)
    }

    fn offset(&self, place: u64) -> u64 {
        place * self.stride
    }
}

fn fill(n: u64, block: &mut [u8]) {
    Rng::new(!n).fill(block);
    block[..8].copy_from_slice(&MAGIC.to_le_bytes());
    block[8..16].copy_from_slice(&n.to_le_bytes());
}

fn open(path: &str, write: bool) -> Result<File, Failure> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    let file = options.open(path);
    file.map_err(|e| Failure::Trouble(format!("cannot open {path}: {e}")))
}

/// `seqwrite DEV --ack FILE [--fua] [--prefill] [--seconds N] [--blocks K] [--count C] [--length BYTES]`
///
/// With `--prefill` all places are written and synced first: on a file, the FUA writes then change
/// no metadata. (To a block device the kernel sends a FLUSH after each of them anyway.)
pub fn write(mut words: Words) -> Outcome {
    let ack = words.needed("--ack")?;
    let fua = words.flag("--fua");
    let prefill = words.flag("--prefill");
    let seconds = words.number("--seconds", 10)?;
    let blocks = words.number("--blocks", 1000)?;
    let count = words.number("--count", u64::MAX)?;
    let length = words.number("--length", 0)?;
    let [path] = words.operands()?;
    let mut disk = open(&path, true)?;
    let places = Places::new(&mut disk, blocks, length)?;
    let ack = File::create(ack)?;
    let mut buffer = Buffer::new(1);
    if prefill {
        for place in 0..blocks {
            disk.write_all_at(buffer.bytes(), places.offset(place))?;
        }
        disk.sync_all()?;
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut n = 0;
    while n < count && Instant::now() < end {
        n += 1;
        fill(n, buffer.bytes());
        let at = places.offset(places.place(n));
        if fua {
            write_durably(&disk, buffer.bytes(), at)?;
        } else {
            disk.write_all_at(buffer.bytes(), at)?;
            disk.sync_data()?;
        }
        ack.write_all_at(&n.to_le_bytes(), 0)?;
    }
    println!("{n}");
    Ok(())
}

/// `acked FILE`: prints the number acknowledged so far.
pub fn acked(words: Words) -> Outcome {
    let [path] = words.operands()?;
    let file = File::open(path)?;
    let read = || -> Result<u64, Failure> {
        let mut bytes = [0; 8];
        // Nothing there yet is number 0.
        let _ = file.read_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    };
    // A number read twice was not torn.
    let mut n = read()?;
    loop {
        let again = read()?;
        if again == n {
            break;
        }
        n = again;
    }
    println!("{n}");
    Ok(())
}

/// `seqverify DEV --acked N [--blocks K] [--length BYTES]`
pub fn verify(mut words: Words) -> Outcome {
    let acked = parse(&words.needed("--acked")?)?;
    let blocks = words.number("--blocks", 1000)?;
    let length = words.number("--length", 0)?;
    let [path] = words.operands()?;
    let mut disk = open(&path, false)?;
    let places = Places::new(&mut disk, blocks, length)?;
    let mut newest = vec![0; usize::try_from(blocks).unwrap_or(0)];
    for n in 1..=acked {
        newest[places.place(n) as usize] = n;
    }
    let (mut have, mut want) = (Buffer::new(1), vec![0; ALIGN]);
    let (mut bad, mut kept) = (Vec::new(), 0);
    for (place, newest) in newest.iter().enumerate() {
        disk.read_exact_at(have.bytes(), places.offset(place as u64))?;
        let have = have.bytes();
        let n = u64::from_le_bytes(std::array::from_fn(|i| have[8 + i]));
        let is_zero = have.iter().all(|b| *b == 0);
        fill(n, &mut want);
        if is_zero && *newest == 0 {
            continue;
        }
        if is_zero {
            bad.push(format!(
                "place {place}: zeros, block {newest} was acknowledged"
            ));
        } else if have != want.as_slice() || places.place(n) != place as u64 {
            bad.push(format!("place {place}: neither an old nor a new block"));
        } else if n < *newest {
            bad.push(format!(
                "place {place}: block {n}, {newest} was acknowledged"
            ));
        } else {
            kept += 1;
        }
    }
    if let Some(first) = bad.first() {
        let nr = bad.len();
        return Err(Failure::Broken(format!(
            "{nr} of {blocks} places, first {first}"
        )));
    }
    println!("{acked} acknowledged writes kept, {kept} places in use");
    Ok(())
}

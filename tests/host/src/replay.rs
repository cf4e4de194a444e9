// SPDX-License-Identifier: GPL-2.0
//! Replays a log of dm-log-writes: what had reached the disk when a mark was set.
//!
//! The log is a superblock and then entries, each one log sector (its 32 bytes and, for a mark,
//! its text) followed by the data written, if any. What a flush covers is logged when it has ended,
//! right before it. So writes that no flush followed are logged later than the mark: replayed up to
//! the mark, they are lost. Between a flush and the next any of the writes may be lost, but not those
//! with FUA.

use crate::cli::{Failure, Outcome, Words};
use crate::rng::Rng;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

struct Log {
    file: File,
    nr_entries: u64,
    sector: u64,
}

struct Entry {
    /// Where on the disk, in bytes.
    at: u64,
    len: u64,
    flags: u64,
    mark: String,
    /// Where in the log the data is and the next entry begins.
    data: u64,
    next: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

impl Log {
    fn open(path: &str) -> Result<Self, Failure> {
        let file = File::open(path)?;
        let mut head = [0; 512];
        file.read_exact_at(&mut head, 0)?;
        if u64_at(&head, 0) != MAGIC || u64_at(&head, 8) != 1 {
            return Err(Failure::Trouble(format!("{path} is no dm-log-writes log")));
        }
        let nr_entries = u64_at(&head, 16);
        let sector = u64_at(&head, 24) & 0xffff_ffff;
        Ok(Self {
            file,
            nr_entries,
            sector,
        })
    }

    fn entry(&self, pos: u64) -> Result<Entry, Failure> {
        let mut bytes = vec![0; self.sector as usize];
        self.file.read_exact_at(&mut bytes, pos)?;
        // Positions are in the log's sectors, as are lengths.
        let (at, len) = (
            u64_at(&bytes, 0) * self.sector,
            u64_at(&bytes, 8) * self.sector,
        );
        let (flags, text) = (u64_at(&bytes, 16), u64_at(&bytes, 24) as usize);
        let mark = match flags & MARK {
            0 => String::new(),
            _ => String::from_utf8_lossy(&bytes[32..bytes.len().min(32 + text)])
                .trim_end_matches('\0')
                .into(),
        };
        let data = pos + self.sector;
        let is_data = flags & (DISCARD | MARK) == 0;
        Ok(Entry {
            at,
            len,
            flags,
            mark,
            data,
            next: data + if is_data { len } else { 0 },
        })
    }
}

/// Where to go on: entries done and position in the log.
fn resume(state: Option<&str>, log: &Log) -> Result<(u64, u64), Failure> {
    let Some(text) = state.and_then(|path| std::fs::read_to_string(path).ok()) else {
        return Ok((0, log.sector));
    };
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(nr)), Some(Ok(pos))) => Ok((nr, pos)),
        _ => Err(Failure::Trouble("the state file is damaged".into())),
    }
}

/// The entries from number `nr`, which is at `pos`, to the mark or entry `to`.
fn entries(log: &Log, nr: u64, mut pos: u64, to: &str) -> Result<Vec<Entry>, Failure> {
    let last = to.parse::<u64>().ok();
    let mut found: Vec<Entry> = Vec::new();
    for nr in nr.. {
        let is_mark = found
            .last()
            .is_some_and(|e| e.flags & MARK != 0 && e.mark == to);
        if last == Some(nr) || is_mark {
            break;
        }
        if nr >= log.nr_entries {
            return Err(Failure::Trouble(format!("the log has no mark '{to}'")));
        }
        let entry = log.entry(pos)?;
        pos = entry.next;
        found.push(entry);
    }
    Ok(found)
}

/// `replay --log LOGDEV --target DEV --to MARK|ENTRY [--lose SEED] [--state FILE]`; with a state file, a
/// later call goes on where this one ends. With `--lose` half of what no flush covers is left out, and the
/// later call begins at that flush.
pub fn replay(mut words: Words) -> Outcome {
    let log = Log::open(&words.needed("--log")?)?;
    let target = words.needed("--target")?;
    let to = words.needed("--to")?;
    let mut lose = match words.number("--lose", 0)? {
        0 => None,
        seed => Some(Rng::new(seed)),
    };
    let state = words.text("--state")?;
    let [] = words.operands()?;
    let target = OpenOptions::new().write(true).open(target)?;
    let (nr, pos) = resume(state.as_deref(), &log)?;
    let entries = entries(&log, nr, pos, &to)?;
    let last_flush = entries.iter().rposition(|e| e.flags & FLUSH != 0);
    let covered = last_flush.map_or(0, |i| i + 1);
    let (mut data, mut bytes, mut lost) = (Vec::new(), 0, 0);
    for (i, entry) in entries.iter().enumerate() {
        let may_lose = i >= covered && entry.flags & (FUA | MARK) == 0;
        if may_lose && lose.as_mut().is_some_and(|rng| rng.chance(50)) {
            lost += 1;
        } else if entry.flags & MARK == 0 {
            bytes += entry.len;
            copy(&log, entry, &target, &mut data)?;
        }
    }
    target.sync_all()?;
    if let Some(state) = state {
        let done = &entries[..if lose.is_some() {
            covered
        } else {
            entries.len()
        }];
        let next = done.last().map_or(pos, |entry| entry.next);
        std::fs::write(state, format!("{} {next}\n", nr + done.len() as u64))?;
    }
    let all = nr + entries.len() as u64;
    println!("{bytes} bytes replayed, {all} entries in all, {lost} lost");
    Ok(())
}

fn copy(log: &Log, entry: &Entry, target: &File, data: &mut Vec<u8>) -> Outcome {
    let step = 1 << 20;
    for done in (0..entry.len).step_by(step) {
        let nr = (entry.len - done).min(step as u64) as usize;
        data.clear();
        data.resize(nr, 0);
        if entry.flags & DISCARD == 0 {
            log.file.read_exact_at(data, entry.data + done)?;
        }
        target.write_all_at(data, entry.at + done)?;
    }
    Ok(())
}

/// `list-marks --log LOGDEV`
pub fn list_marks(words: Words) -> Outcome {
    list(words, |nr, entry| {
        if entry.flags & MARK != 0 {
            println!("{nr} {}", entry.mark);
        }
    })
}

/// `list-flushes --log LOGDEV`: how many entries are before each.
pub fn list_flushes(words: Words) -> Outcome {
    list(words, |nr, entry| {
        if entry.flags & FLUSH != 0 {
            println!("{nr}");
        }
    })
}

fn list(mut words: Words, tell: impl Fn(u64, &Entry)) -> Outcome {
    let log = Log::open(&words.needed("--log")?)?;
    let [] = words.operands()?;
    let mut pos = log.sector;
    for nr in 0..log.nr_entries {
        let entry = log.entry(pos)?;
        pos = entry.next;
        tell(nr, &entry);
    }
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! Reading the disk into a backup.

use super::write::Writer;
use super::{go_on, Pace, Source};
use crate::error::Result;
use crate::offline::{runs, Progress};
use std::io::Write;
use std::ops::Range;

/// Bytes read at once.
const READ_BYTES: u64 = 1 << 20;
/// What a file system says of holes is in such units, more or less.
const HOLE_BYTES: u64 = 4096;

/// What of the disk a backup is to have.
pub enum Wanted<'a> {
    /// All that is not zeros.
    All,
    /// These ranges, in ascending order, zeros and all.
    These(&'a mut dyn Iterator<Item = Result<Range<u64>>>),
}

/// Reads what is wanted of `source` and writes it.
pub fn take<W: Write>(
    source: &mut dyn Source,
    wanted: Wanted<'_>,
    to: &mut Writer<W>,
    pace: &mut Pace,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mut taker = Taker {
        source,
        to,
        pace,
        buf: vec![0; READ_BYTES as usize],
    };
    let size = taker.source.size_bytes();
    match wanted {
        Wanted::All => taker.range(0..size, Zeros::Omitted, progress),
        Wanted::These(ranges) => {
            let mut end = 0;
            for range in ranges {
                let range = range?;
                // Granules end on their own boundaries, not on that of the disk.
                let range = range.start.max(end)..range.end.min(size);
                end = end.max(range.end);
                taker.range(range, Zeros::Told, progress)?;
            }
            Ok(())
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeros {
    Omitted,
    Told,
}

struct Taker<'a, W> {
    source: &'a mut dyn Source,
    to: &'a mut Writer<W>,
    pace: &'a mut Pace,
    buf: Vec<u8>,
}

impl<W: Write> Taker<'_, W> {
    fn range(
        &mut self,
        range: Range<u64>,
        zeros: Zeros,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            go_on(progress, "no backup was made")?;
            let next = self.source.next_data(at)?;
            let next = (next - next % HOLE_BYTES).clamp(at, range.end);
            if next > at && zeros == Zeros::Told {
                self.to.zeros(at, next - at)?;
            }
            progress.advance(next - at);
            at = next;
            let nr = (READ_BYTES - at % READ_BYTES).min(range.end - at);
            if nr > 0 {
                self.piece(at, nr as usize, zeros)?;
                self.pace.note(nr, progress)?;
                progress.advance(nr);
                at += nr;
            }
        }
        Ok(())
    }

    fn piece(&mut self, start: u64, nr: usize, zeros: Zeros) -> Result<()> {
        let bytes = &mut self.buf[..nr];
        self.source.read(start, bytes)?;
        let mut at = start;
        for run in runs(bytes) {
            let len = run.len() as u64;
            if run.iter().any(|b| *b != 0) {
                self.to.data(at, run)?;
            } else if zeros == Zeros::Told {
                self.to.zeros(at, len)?;
            }
            at += len;
        }
        Ok(())
    }
}

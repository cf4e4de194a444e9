// SPDX-License-Identifier: GPL-2.0
//! The order in which a disk is copied.
//!
//! At rest: one pass. In use: what is only read first; then a pass over the top, each piece of which
//! is announced before it is read; then rounds over what was written to meanwhile, each part of which
//! the kernel forgets before it is read. Then the disk stands still, the rest is sent, the header
//! last, and the kernel confirms that nothing is left.

use super::live::{not_quiet, Live};
use super::source::{runs, Buffer, Piece, Source};
use super::wire::{Format, Part, PIECE_MAX};
use super::{Event, Sink, Watch};
use crate::error::{Code, Error, Result};
use crate::signals::for_child;
use ploop_pure::abi::TrackExtent;
use ploop_pure::units::SECTOR_BYTES;
use std::io;
use std::ops::Range;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// So little is sent while the disk stands still rather than in another round.
const SMALL: u64 = 1 << 20;
/// Passes while the disk stands still: one would do but for writes that were on their way.
const PASSES_MAX: u32 = 8;
/// Least that is read at once.
const STEP_MIN: u64 = 4096;
/// Between two reports.
const REPORT: Duration = Duration::from_millis(500);
const NAP: Duration = Duration::from_millis(100);

/// How a disk is copied.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most bytes a second while the disk is in use; 0 is no limit.
    pub rate: u64,
    /// Most rounds.
    pub rounds: u32,
    /// Ends what writes to the disk, before it is frozen.
    pub stop_command: Option<String>,
}

/// Copies what nobody writes to.
pub fn at_rest(
    source: &Source,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
    options: &Options,
) -> Result<()> {
    let mut copy = Copy::new(source, sink, watch, options);
    let done = copy.all_at_rest();
    if let Err(e) = &done {
        sink.abort(&e.without_hint());
    }
    done
}

/// Copies a disk that is in use. Afterwards it is frozen; after an error it is not, and nothing is
/// tracked any more.
pub fn live(
    source: &Source,
    live: &mut dyn Live,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
    options: &Options,
) -> Result<()> {
    let mut copy = Copy::new(source, sink, watch, options);
    let done = copy.all_live(live);
    if let Err(e) = &done {
        live.thaw();
        live.abort();
        sink.abort(&e.without_hint());
    }
    done
}

/// What is known of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Zeros: nothing was sent there.
    Nothing,
    /// Anything.
    Something,
}

struct Copy<'a> {
    source: &'a Source,
    sink: &'a mut dyn Sink,
    watch: &'a mut dyn Watch,
    options: &'a Options,
    buf: Buffer,
    /// A hole that may go on.
    hole: Option<Part>,
    begun: Instant,
    reported: Instant,
    round: u32,
    done: u64,
    total: u64,
    /// Length that the receiver knows of the top.
    len: u64,
    /// Up to where the top was announced.
    end: u64,
    is_frozen: bool,
}

/// What a round found.
struct Round {
    bytes: u64,
    is_clean: bool,
}

impl<'a> Copy<'a> {
    fn new(
        source: &'a Source,
        sink: &'a mut dyn Sink,
        watch: &'a mut dyn Watch,
        options: &'a Options,
    ) -> Self {
        let now = Instant::now();
        Self {
            source,
            sink,
            watch,
            options,
            buf: Buffer::default(),
            hole: None,
            begun: now,
            reported: now,
            round: 0,
            done: 0,
            total: source.files.iter().map(|f| f.info.len_bytes).sum(),
            len: source.files.last().map_or(0, |f| f.info.len_bytes),
            end: 0,
            is_frozen: false,
        }
    }

    fn begin(&mut self, live: bool) {
        let files = self.source.files.len() as u32;
        self.watch.event(&Event::Begin {
            files,
            bytes: self.total,
            live,
        });
    }

    fn all_at_rest(&mut self) -> Result<()> {
        self.begin(false);
        for (file, nr) in self.source.files.iter().zip(0..) {
            self.range(nr, 0..file.info.len_bytes, Over::Nothing)?;
            self.finish_hole()?;
        }
        self.sink.end()?;
        let bytes = self.sink.sent_bytes();
        self.watch.event(&Event::End {
            bytes,
            downtime_ms: 0,
        });
        Ok(())
    }

    fn all_live(&mut self, live: &mut dyn Live) -> Result<()> {
        self.begin(true);
        let begun = live.begin()?;
        let (top, lower) = self.source.files.split_last().ok_or_else(nothing)?;
        for (file, nr) in lower.iter().zip(0..) {
            self.range(nr, 0..file.info.len_bytes, Over::Nothing)?;
            self.finish_hole()?;
        }
        self.round = 1;
        self.sink.round(1, 0)?;
        self.fresh(live, begun.end)?;
        self.rounds(live)?;
        // What is durable now need not be made so while the disk stands still.
        self.sink.sync()?;
        if let Some(command) = &self.options.stop_command {
            stop(command)?;
        }
        let frozen = Instant::now();
        self.watch.event(&Event::Frozen { rounds: self.round });
        self.is_frozen = true;
        live.freeze()?;
        let mut passes = 0;
        loop {
            let found = self.pass(live)?;
            if found.is_clean {
                break;
            }
            passes += 1;
            // The first has what was left, the next what making the index durable writes.
            if passes >= PASSES_MAX || (passes > 2 && found.bytes > SMALL) {
                return Err(not_quiet(&top.path.display().to_string()));
            }
        }
        let nr = lower.len() as u32;
        let len = match top.info.format {
            Format::Raw => top.len_bytes()?,
            Format::Ploop1(_) => {
                let cluster = u64::from(top.info.cluster_sectors) * SECTOR_BYTES;
                self.end.next_multiple_of(cluster)
            }
        };
        self.sink.length(nr, len)?;
        if let Some(page) = top.closed_page(&mut self.buf)? {
            let part = Part {
                file: nr,
                offset: 0,
                len: page.len() as u64,
            };
            self.sink.data(part, &page)?;
        }
        live.finish()?;
        self.sink.end()?;
        let downtime_ms = frozen.elapsed().as_millis() as u64;
        let bytes = self.sink.sent_bytes();
        self.watch.event(&Event::End { bytes, downtime_ms });
        Ok(())
    }

    /// Rounds while the disk is in use, until they do not get smaller.
    fn rounds(&mut self, live: &mut dyn Live) -> Result<()> {
        let mut before = u64::MAX;
        while self.round < self.options.rounds {
            (self.done, self.total) = (0, before.min(self.total));
            let begun = Instant::now();
            self.round += 1;
            let found = self.pass(live)?;
            let took = begun.elapsed().as_millis() as u64;
            self.sink.round(self.round, found.bytes)?;
            self.watch.event(&Event::Round {
                round: self.round,
                dirty: found.bytes,
                downtime_ms: took,
            });
            // Less than a tenth smaller is not worth another.
            if found.bytes <= SMALL || found.bytes >= before / 10 * 9 {
                break;
            }
            before = found.bytes;
        }
        Ok(())
    }

    /// Once over what was written to. Writes that go on do not make it longer than the file.
    fn pass(&mut self, live: &mut dyn Live) -> Result<Round> {
        let mut round = Round {
            bytes: 0,
            is_clean: false,
        };
        let mut from = 0;
        let most = self.end.saturating_mul(2);
        while let Some(TrackExtent { start, end }) = live.next()? {
            if start >= end {
                let what = format!("the kernel tells of bytes {start} to {end}");
                return Err(Error::new(Code::DeviceIoctl, what));
            }
            round.bytes += end - start;
            if start < self.end {
                // What is beyond was not noted: it is told again when it is next.
                let known = start..end.min(self.end);
                self.lengthen(known.end)?;
                self.range(self.top(), known, Over::Something)?;
                if end > self.end {
                    self.fresh(live, end)?;
                }
            } else {
                self.fresh(live, end)?;
            }
            if start < from || round.bytes > most {
                return Ok(round);
            }
            from = start;
        }
        round.is_clean = true;
        Ok(round)
    }

    fn top(&self) -> u32 {
        self.source.files.len().saturating_sub(1) as u32
    }

    /// Reads the top from where it was announced up to `end`. A piece is announced, then looked at.
    fn fresh(&mut self, live: &mut dyn Live, end: u64) -> Result<()> {
        self.lengthen(end)?;
        while self.end < end {
            let next = end.min(self.end + PIECE_MAX as u64);
            live.announce(next)?;
            let range = self.end..next;
            self.end = next;
            self.range(self.top(), range, Over::Nothing)?;
        }
        self.finish_hole()
    }

    fn lengthen(&mut self, end: u64) -> Result<()> {
        if end > self.len {
            self.sink.length(self.top(), end)?;
            self.len = end;
        }
        Ok(())
    }

    /// Sends a range of a file.
    fn range(&mut self, file: u32, range: Range<u64>, over: Over) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let step = self.step();
            let end = range.end.min((at / step + 1) * step);
            self.piece(file, at..end, over)?;
            self.done += end - at;
            at = end;
            self.report();
            self.pace()?;
        }
        Ok(())
    }

    /// How much is sent at once: under a limit less, so that a connection that is lost is noticed.
    fn step(&self) -> u64 {
        let most = PIECE_MAX as u64;
        match self.options.rate {
            0 => most,
            rate => (rate / 4).clamp(STEP_MIN, most).next_power_of_two(),
        }
    }

    fn piece(&mut self, file: u32, range: Range<u64>, over: Over) -> Result<()> {
        let source = self.source.files.get(file as usize).ok_or_else(nothing)?;
        let mut buf = std::mem::take(&mut self.buf);
        let sent = match source.read(&range, &mut buf)? {
            Piece::Hole => self.empty(Part::of(file, &range), over, true),
            Piece::Zero => self.empty(Part::of(file, &range), over, over == Over::Nothing),
            Piece::Data(bytes) => self.bytes(file, range.start, bytes, over),
        };
        self.buf = buf;
        sent
    }

    fn bytes(&mut self, file: u32, start: u64, bytes: &[u8], over: Over) -> Result<()> {
        for (is_zero, run) in runs(bytes) {
            let part = Part {
                file,
                offset: start + run.start as u64,
                len: run.len() as u64,
            };
            if is_zero {
                self.empty(part, over, over == Over::Nothing)?;
            } else {
                self.finish_hole()?;
                self.sink.data(part, &bytes[run])?;
            }
        }
        Ok(())
    }

    /// Zeros. Where nothing was sent before, they are as good as a hole.
    fn empty(&mut self, part: Part, over: Over, is_hole: bool) -> Result<()> {
        if !is_hole {
            return self.sink.zero(part);
        }
        if over == Over::Something {
            return self.sink.hole(part);
        }
        match &mut self.hole {
            Some(hole) if hole.file == part.file && hole.offset + hole.len == part.offset => {
                hole.len += part.len;
                Ok(())
            }
            Some(_) | None => {
                self.finish_hole()?;
                self.hole = Some(part);
                Ok(())
            }
        }
    }

    fn finish_hole(&mut self) -> Result<()> {
        self.hole.take().map_or(Ok(()), |hole| self.sink.hole(hole))
    }

    fn report(&mut self) {
        if self.reported.elapsed() < REPORT {
            return;
        }
        self.reported = Instant::now();
        let sent = self.sink.sent_bytes();
        let millis = self.begun.elapsed().as_millis().max(1);
        self.watch.event(&Event::Progress {
            round: self.round,
            done: self.done,
            total: self.total.max(self.done),
            sent,
            rate: (u128::from(sent) * 1000 / millis) as u64,
        });
    }

    /// Waits as long as the limit wants it. A disk that stands still does not wait.
    fn pace(&mut self) -> Result<()> {
        loop {
            if self.watch.is_end_asked() {
                return Err(Error::new(
                    Code::Aborted,
                    "the copy was ended early, as asked",
                ));
            }
            if self.options.rate == 0 || self.is_frozen {
                return Ok(());
            }
            let due = u128::from(self.sink.sent_bytes()) * 1000 / u128::from(self.options.rate);
            if due <= self.begun.elapsed().as_millis() {
                return Ok(());
            }
            sleep(NAP);
        }
    }
}

impl Part {
    fn of(file: u32, range: &Range<u64>) -> Self {
        Self {
            file,
            offset: range.start,
            len: range.end - range.start,
        }
    }
}

fn nothing() -> Error {
    Error::new(Code::Param, "there is nothing to copy")
}

/// Runs the stop command. Its output must not get into the stream.
fn stop(command: &str) -> Result<()> {
    let mut shell = Command::new("/bin/sh");
    let shell = shell
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(io::stderr());
    let run = for_child(|| shell.spawn()).and_then(|mut child| child.wait());
    let status = run.map_err(|e| Error::io(Code::System, "cannot run /bin/sh", e))?;
    if !status.success() {
        let what = format!("the stop command failed: {status}");
        return Err(
            Error::new(Code::System, what).hint("the disk goes on; nothing is left of the copy")
        );
    }
    Ok(())
}

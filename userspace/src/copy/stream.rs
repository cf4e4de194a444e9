// SPDX-License-Identifier: GPL-2.0
//! Our stream as a sink: no more on its way than the window, and what the receiver says.

use super::answer::{Answer, Kind};
use super::source::Source;
use super::wire::{self, FileInfo, Header, Layout, Part, Record, Writer, PIECE_MAX};
use super::Sink;
use crate::error::{Code, Error, Result};
use std::collections::VecDeque;
use std::io::{Read, Write};

/// Most bytes on their way: what a line of 1 Gbit/s and 250 ms holds.
const WINDOW: u64 = 32 << 20;
/// After so much data the receiver is asked to make it durable: what it has to write at the end, while
/// it is silent, is no more.
const SYNC_AFTER: u64 = 1 << 30;
/// How the refusal of a receiver begins.
const GAVE_UP: &str = "the receiver gave up";

/// Our stream, as a sink.
pub struct Stream<W, R> {
    writer: Writer<W>,
    back: Option<R>,
    /// What was sent and not answered: up to which record, and how many bytes.
    waiting: VecDeque<(u64, u64)>,
    waiting_bytes: u64,
    sent: u64,
    /// Bytes of data that need not be durable yet.
    unsynced: u64,
}

impl<W: Write, R: Read> Stream<W, R> {
    /// Begins the stream of `source`.
    pub fn begin(to: W, back: Option<R>, source: &Source, is_packed: bool) -> Result<Self> {
        let top = source.files.last();
        let top = top.ok_or_else(|| Error::new(Code::Param, "there is nothing to copy"))?;
        let id = crate::descriptor::guid::Guid::random()
            .map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?;
        let header = Header {
            features: (if back.is_some() { wire::ANSWERS } else { 0 })
                | (if is_packed { wire::ZSTD } else { 0 }),
            layout: match (&source.descriptor, source.is_directory) {
                (Some(_), _) => Layout::Disk,
                (None, true) => Layout::Directory,
                (None, false) => Layout::File,
            },
            // The descriptor has 255 at most.
            nr_files: source.files.len() as u32,
            cluster_sectors: top.info.cluster_sectors,
            size_sectors: top.info.size_sectors,
            id: id.bytes(),
        };
        let mut stream = Self {
            writer: Writer::begin(to, &header)?,
            back,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sent: wire::HEADER_BYTES as u64,
            unsynced: 0,
        };
        for (file, nr) in source.files.iter().zip(0..) {
            let is_top = nr + 1 == header.nr_files;
            let info = FileInfo {
                is_top,
                ..file.info.clone()
            };
            stream.put(&Record::File(nr, info))?;
        }
        for piece in source
            .descriptor
            .iter()
            .flat_map(|d| d.as_bytes().chunks(PIECE_MAX))
        {
            stream.put(&Record::Descriptor(piece))?;
        }
        Ok(stream)
    }

    fn put(&mut self, record: &Record<'_>) -> Result<()> {
        match self.writer.put(record) {
            Ok(bytes) => {
                self.sent += bytes;
                self.waiting_bytes += bytes;
                self.waiting
                    .push_back((self.writer.totals().records, bytes));
            }
            Err(e) => return Err(self.reason(e)),
        }
        if self.back.is_none() {
            self.waiting.clear();
            self.waiting_bytes = 0;
        }
        while self.waiting_bytes > WINDOW {
            self.answer()?;
        }
        Ok(())
    }

    /// What the receiver says about it, if it went away.
    fn reason(&mut self, e: Error) -> Error {
        while e.code() == Code::Protocol && self.back.is_some() {
            match self.answer() {
                Ok(_) => {}
                Err(said) if is_refusal(&said) => return said,
                Err(_) => break,
            }
        }
        e
    }

    /// Waits for an answer.
    fn answer(&mut self) -> Result<Kind> {
        let Some(back) = &mut self.back else {
            return Ok(Kind::Done);
        };
        let answer = Answer::read(back)?;
        while let Some((records, bytes)) = self.waiting.front().copied() {
            if records > answer.records {
                break;
            }
            self.waiting.pop_front();
            self.waiting_bytes -= bytes;
        }
        match answer.kind {
            Kind::Failed => Err(Error::new(
                Code::Protocol,
                format!("{GAVE_UP}: {}", answer.text),
            )),
            kind => Ok(kind),
        }
    }

    fn wait_for(&mut self, kind: Kind) -> Result<()> {
        while self.back.is_some() && self.answer()? != kind {}
        Ok(())
    }
}

/// Whether the receiver has said that it did not make the copy.
fn is_refusal(e: &Error) -> bool {
    e.code() == Code::Protocol && e.without_hint().starts_with(GAVE_UP)
}

impl<W: Write, R: Read> Sink for Stream<W, R> {
    fn data(&mut self, part: Part, bytes: &[u8]) -> Result<()> {
        self.put(&Record::Data(part, bytes))?;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_AFTER {
            self.sync()?;
        }
        Ok(())
    }

    fn zero(&mut self, part: Part) -> Result<()> {
        self.put(&Record::Zero(part))
    }

    fn hole(&mut self, part: Part) -> Result<()> {
        self.put(&Record::Hole(part))
    }

    fn length(&mut self, file: u32, len_bytes: u64) -> Result<()> {
        self.put(&Record::Length(file, len_bytes))
    }

    fn round(&mut self, round: u32, dirty: u64) -> Result<()> {
        self.put(&Record::Round(round, dirty))
    }

    fn sync(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.put(&Record::Sync)?;
        self.wait_for(Kind::Durable)
    }

    fn end(&mut self) -> Result<()> {
        let totals = self.writer.totals();
        self.put(&Record::End(totals))?;
        // Who refuses it has removed what came, or says what is left.
        self.wait_for(Kind::Done).map_err(|e| match is_refusal(&e) {
            true => e,
            false => e.hint("the copy may be complete on the other side; do not use both"),
        })
    }

    fn abort(&mut self, why: &str) {
        // It may be the connection that failed.
        let _ = self.writer.put(&Record::Abort(why.to_owned()));
    }

    fn sent_bytes(&self) -> u64 {
        self.sent
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Writing a backup.

use super::wire::{Head, Header, Kind, Totals, DATA_MAX, FEATURE_ZSTD, HEADER_BYTES, HEAD_BYTES};
use crate::error::{Code, Error, Result};
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// zstd's own default.
const LEVEL: i32 = 3;

/// A backup that is being written, record by record in the order of the disk.
pub struct Writer<W> {
    path: PathBuf,
    to: W,
    digest: Sha256,
    totals: Totals,
    /// Zeros that may become more.
    zeros: Option<(u64, u64)>,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    compressed: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins one; `path` is for messages. Data is compressed if the header says that it may be.
    pub fn new(to: W, path: &Path, header: &Header) -> Result<Self> {
        let compressor = match header.features & FEATURE_ZSTD {
            0 => None,
            _ => Some(
                zstd::bulk::Compressor::new(LEVEL)
                    .map_err(|e| Error::io(Code::Memory, "cannot begin to compress", e))?,
            ),
        };
        let mut writer = Self {
            path: path.to_owned(),
            to,
            digest: Sha256::new(),
            totals: Totals {
                length: HEADER_BYTES as u64,
                ..Totals::default()
            },
            zeros: None,
            compressor,
            compressed: vec![0; DATA_MAX as usize],
        };
        writer.put(&header.encode())?;
        Ok(writer)
    }

    fn failed(&self, e: io::Error) -> Error {
        Error::io(
            Code::Write,
            format!("cannot write {}", self.path.display()),
            e,
        )
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        self.to.write_all(bytes).map_err(|e| self.failed(e))
    }

    fn record(&mut self, head: Head, stored: &[u8]) -> Result<()> {
        self.put(&head.encode())?;
        self.put(stored)?;
        self.totals.note(&head);
        Ok(())
    }

    /// The disk has these bytes there.
    pub fn data(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        self.end_zeros()?;
        let mut at = start;
        for piece in bytes.chunks(DATA_MAX as usize) {
            self.piece(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn piece(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        // At most DATA_MAX, as are all below.
        let len = bytes.len() as u32;
        let head = Head {
            kind: Kind::Data,
            stored: len,
            start,
            len: len.into(),
            sum: crc32c::crc32c(bytes),
        };
        let Some(mut compressor) = self.compressor.take() else {
            return self.record(head, bytes);
        };
        let mut room = std::mem::take(&mut self.compressed);
        // What does not become shorter does not fit.
        let fits = room.get_mut(..bytes.len().saturating_sub(1));
        let done = match fits.map(|room| compressor.compress_to_buffer(bytes, room)) {
            Some(Ok(nr)) => {
                let stored = nr as u32;
                let kind = Kind::Zstd;
                self.record(
                    Head {
                        kind,
                        stored,
                        ..head
                    },
                    &room[..nr],
                )
            }
            Some(Err(_)) | None => self.record(head, bytes),
        };
        self.compressed = room;
        self.compressor = Some(compressor);
        done
    }

    /// The disk has zeros there. Not for a full backup, of which what is missing is zeros.
    pub fn zeros(&mut self, start: u64, len: u64) -> Result<()> {
        match &mut self.zeros {
            Some((before, nr)) if *before + *nr == start => *nr += len,
            Some(_) | None => {
                self.end_zeros()?;
                self.zeros = Some((start, len));
            }
        }
        Ok(())
    }

    fn end_zeros(&mut self) -> Result<()> {
        let Some((start, len)) = self.zeros.take().filter(|(_, len)| *len > 0) else {
            return Ok(());
        };
        let head = Head {
            kind: Kind::Zeros,
            stored: 0,
            start,
            len,
            sum: 0,
        };
        self.record(head, &[])
    }

    /// Writes the end, and tells what the backup has. To make it durable is up to the caller.
    pub fn finish(mut self) -> Result<Totals> {
        self.end_zeros()?;
        let digest = self.digest.finalize_reset().into();
        let payload = self.totals.encode(&digest);
        let head = Head {
            kind: Kind::End,
            stored: payload.len() as u32,
            start: 0,
            len: 0,
            sum: crc32c::crc32c(&payload),
        };
        self.put(&head.encode())?;
        self.put(&payload)?;
        let mut totals = self.totals;
        totals.length += (HEAD_BYTES + payload.len()) as u64;
        self.to.flush().map_err(|e| self.failed(e))?;
        Ok(totals)
    }
}

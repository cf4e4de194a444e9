// SPDX-License-Identifier: GPL-2.0
//! Reading a backup, with every check. No length in the file is trusted: what is held in memory is
//! at most one record.

use super::wire::{
    Head, Header, Kind, Problem, Totals, DATA_MAX, END_BYTES, HEADER_BYTES, HEAD_BYTES,
};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

/// For heads of records; what is larger is read past it. Many backups may be open.
const BUFFER_BYTES: usize = 64 << 10;

/// A part of the disk that a backup has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// It is zeros.
    pub is_zero: bool,
}

/// A backup that is being read.
pub struct Reader<R> {
    path: PathBuf,
    from: R,
    header: Header,
    digest: Sha256,
    totals: Totals,
    /// The next record begins here or later.
    next: u64,
    part: Option<Part>,
    data: Vec<u8>,
    stored: Vec<u8>,
    decompressor: Option<zstd::bulk::Decompressor<'static>>,
    is_ended: bool,
}

impl Reader<BufReader<File>> {
    /// Opens the backup `path`.
    pub fn open(path: &Path) -> Result<Self> {
        // A regular file or block device: the rules for images are as good here.
        let image = Image::open(path, Access::Read)?;
        let file = image.file().try_clone();
        let file =
            file.map_err(|e| Error::io(Code::Open, format!("cannot open {}", path.display()), e))?;
        Self::new(BufReader::with_capacity(BUFFER_BYTES, file), path)
    }
}

/// The header of the backup `path`, which has an end; what is between is not looked at.
pub fn complete(path: &Path) -> Result<Header> {
    let header = *Reader::open(path)?.header();
    let image = Image::open(path, Access::Read)?;
    let len = image.len_bytes()?;
    let at = len.saturating_sub((HEAD_BYTES + END_BYTES) as u64);
    let bad = |problem| refusal(path, at, problem);
    if at < HEADER_BYTES as u64 {
        return Err(bad(Problem::Shorter));
    }
    let (mut head, mut said) = ([0; HEAD_BYTES], [0; END_BYTES]);
    image.read_at(&mut head, at)?;
    image.read_at(&mut said, at + HEAD_BYTES as u64)?;
    let is_end = Head::parse(&head, &header)
        .is_ok_and(|h| h.kind == Kind::End && h.sum == crc32c::crc32c(&said));
    if is_end {
        Ok(header)
    } else {
        Err(bad(Problem::Shorter))
    }
}

impl<R: Read> Reader<R> {
    /// Reads the header; `path` is for messages.
    pub fn new(from: R, path: &Path) -> Result<Self> {
        let mut raw = [0; HEADER_BYTES];
        let mut from = from;
        let problem = |p| refusal(path, 0, p);
        // A short file of something else is not a damaged backup.
        let nr = read_all(&mut from, &mut raw).map_err(|e| unreadable(path, e))?;
        let header = match Header::parse(&raw) {
            Err(Problem::Magic) => Err(Problem::Magic),
            _ if nr < HEADER_BYTES => Err(Problem::Shorter),
            parsed => parsed,
        };
        let header = header.map_err(problem)?;
        let mut digest = Sha256::new();
        digest.update(raw);
        Ok(Self {
            path: path.to_owned(),
            from,
            header,
            digest,
            totals: Totals {
                length: HEADER_BYTES as u64,
                ..Totals::default()
            },
            next: 0,
            part: None,
            data: Vec::new(),
            stored: Vec::new(),
            decompressor: None,
            is_ended: false,
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was read so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The part read last.
    pub fn part(&self) -> Option<Part> {
        self.part
    }

    /// Its bytes, unless it is zeros.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    fn bad(&self, problem: Problem) -> Error {
        refusal(&self.path, self.totals.length, problem)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        match read_all(&mut self.from, bytes) {
            Ok(nr) if nr == bytes.len() => Ok(()),
            Ok(_) => Err(self.bad(Problem::Shorter)),
            Err(e) => Err(unreadable(&self.path, e)),
        }
    }

    /// Reads the next record. `None` is the end, at which all was as it should be.
    pub fn read_part(&mut self) -> Result<Option<Part>> {
        self.part = None;
        if self.is_ended {
            return Ok(None);
        }
        let mut raw = [0; HEAD_BYTES];
        self.fill(&mut raw)?;
        let head = Head::parse(&raw, &self.header).map_err(|p| self.bad(p))?;
        if head.kind == Kind::End {
            self.end(&head)?;
            return Ok(None);
        }
        if head.start < self.next {
            return Err(self.bad(Problem::Order));
        }
        self.digest.update(raw);
        self.read_data(&head)?;
        self.totals.note(&head);
        let part = Part {
            start: head.start,
            end: head.start + head.len,
            is_zero: head.kind == Kind::Zeros,
        };
        self.next = part.end;
        self.part = Some(part);
        Ok(self.part)
    }

    /// Reads what follows the head, at most [`DATA_MAX`] bytes.
    fn read_data(&mut self, head: &Head) -> Result<()> {
        self.data.clear();
        if head.kind == Kind::Zeros {
            return Ok(());
        }
        let mut stored = std::mem::take(&mut self.stored);
        stored.resize(head.stored as usize, 0);
        self.fill(&mut stored)?;
        self.digest.update(&stored);
        match head.kind {
            Kind::Data => self.data.extend(&stored),
            Kind::Zstd => self.decompress(head, &stored)?,
            Kind::Zeros | Kind::End => {}
        }
        self.stored = stored;
        if crc32c::crc32c(&self.data) != head.sum {
            return Err(self.bad(Problem::DataSum));
        }
        Ok(())
    }

    fn decompress(&mut self, head: &Head, stored: &[u8]) -> Result<()> {
        let mut decompressor = match self.decompressor.take() {
            Some(d) => d,
            None => zstd::bulk::Decompressor::new()
                .map_err(|e| Error::io(Code::Memory, "cannot begin to decompress", e))?,
        };
        // Checked to be at most DATA_MAX; what is longer does not fit.
        self.data.resize(head.len.min(DATA_MAX.into()) as usize, 0);
        let done = decompressor.decompress_to_buffer(stored, self.data.as_mut_slice());
        self.decompressor = Some(decompressor);
        match done {
            Ok(nr) if nr as u64 == head.len => Ok(()),
            Ok(_) | Err(_) => Err(self.bad(Problem::Compressed)),
        }
    }

    fn end(&mut self, head: &Head) -> Result<()> {
        let mut said = [0; END_BYTES];
        self.fill(&mut said)?;
        if crc32c::crc32c(&said) != head.sum {
            return Err(self.bad(Problem::DataSum));
        }
        let digest = self.digest.finalize_reset().into();
        let compared = self.totals.compare(&digest, &said);
        compared.map_err(|p| self.bad(p))?;
        self.totals.length += (HEAD_BYTES + END_BYTES) as u64;
        match read_all(&mut self.from, &mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(self.bad(Problem::Longer)),
            Err(e) => return Err(unreadable(&self.path, e)),
        }
        self.is_ended = true;
        Ok(())
    }
}

/// Fills `bytes` as far as there is something.
fn read_all(from: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut nr = 0;
    while nr < bytes.len() {
        match from.read(&mut bytes[nr..]) {
            Ok(0) => break,
            Ok(more) => nr += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(nr)
}

fn unreadable(path: &Path, e: io::Error) -> Error {
    Error::io(Code::Read, format!("cannot read {}", path.display()), e)
}

fn refusal(path: &Path, at: u64, problem: Problem) -> Error {
    let path = path.display();
    match problem {
        Problem::Version(_) | Problem::Features(_) => {
            let what = format!("{path} cannot be read: {problem}");
            Error::new(Code::NotAnImage, what).hint("a newer ploopctl made it")
        }
        Problem::Magic => Error::new(
            Code::NotAnImage,
            format!("{path} is not a backup: {problem}"),
        ),
        _ => {
            let what = format!("the backup {path} is damaged: {problem} (near byte {at})");
            Error::new(Code::Damaged, what)
        }
    }
}

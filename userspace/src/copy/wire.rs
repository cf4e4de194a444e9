// SPDX-License-Identifier: GPL-2.0
//! The bytes of the stream, as in `docs/copy-stream.md`: a header, then records, each with its
//! number and checksums. No I/O but through [`Read`] and [`Write`], no files, no policy. The decoder
//! believes nothing and keeps no more than one piece.

use crate::error::{Code, Error, Result};
use std::io::{self, Read, Write};

/// First bytes of a stream.
pub const MAGIC: [u8; 8] = *b"PLOOPCPY";
/// Version that is written here, and the newest that is read.
pub const VERSION: u32 = 1;
/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// Length of the head of a record.
pub const HEAD_BYTES: usize = 48;
/// Most bytes of a file in one record, and of a payload.
pub const PIECE_MAX: usize = 1 << 20;
/// Most files in a stream: the images of a descriptor.
pub const FILES_MAX: u32 = 255;
/// Longest name of a file.
pub const NAME_MAX: usize = 255;
/// Longest message of a sender that gives up.
pub const TEXT_MAX: usize = 1024;

/// Feature: the sender reads answers.
pub const ANSWERS: u32 = 1;
/// Feature: pieces may be compressed by zstd.
pub const ZSTD: u32 = 2;
const FEATURES: u32 = ANSWERS | ZSTD;

const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"PCR1");
const INFO_BYTES: usize = 48;
const TOTALS_BYTES: usize = 24;
/// Flag of a record: the payload is compressed.
const PACKED: u16 = 1;
/// Flag of a file: it is the top.
const IS_TOP: u32 = 1;
/// Fast, and what it gains more than that is small.
const ZSTD_LEVEL: i32 = 1;

/// What the copy is put into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The one image becomes a file.
    File,
    /// A directory of images.
    Directory,
    /// A directory of images and their descriptor.
    Disk,
}

/// The beginning of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// [`ANSWERS`], [`ZSTD`].
    pub features: u32,
    /// What comes.
    pub layout: Layout,
    /// How many files.
    pub nr_files: u32,
    /// Sectors of a cluster.
    pub cluster_sectors: u32,
    /// Sectors of the disk.
    pub size_sectors: u64,
    /// Name of this copy, random.
    pub id: [u8; 16],
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk byte for byte.
    Raw,
    /// ploop1 of this version.
    Ploop1(u32),
}

/// What is known of an image before its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// Its name in the directory.
    pub name: String,
    /// GUID of the delta; zero if it has none.
    pub guid: [u8; 16],
    /// Its format.
    pub format: Format,
    /// Sectors of a cluster.
    pub cluster_sectors: u32,
    /// Sectors of the disk in it.
    pub size_sectors: u64,
    /// Length of the file.
    pub len_bytes: u64,
    /// When it was changed last, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// The one that is written to.
    pub is_top: bool,
}

/// Part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which file, counted from 0.
    pub file: u32,
    /// First byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// What the sender has sent before the end record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Records.
    pub records: u64,
    /// Bytes of files in data records.
    pub bytes: u64,
    /// CRC32C of the heads of the records.
    pub digest: u32,
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record<'a> {
    /// A file: its number and what is known of it.
    File(u32, FileInfo),
    /// The next piece of the descriptor.
    Descriptor(&'a [u8]),
    /// Bytes of a file.
    Data(Part, &'a [u8]),
    /// These bytes are zeros.
    Zero(Part),
    /// These are zeros, and need no space.
    Hole(Part),
    /// The file has this length now.
    Length(u32, u64),
    /// A round begins: its number, and how many bytes the one before had.
    Round(u32, u64),
    /// All before it is to be made durable, and answered.
    Sync,
    /// The copy is complete.
    End(Totals),
    /// The sender gives up, for this reason.
    Abort(String),
}

/// The refusal of a stream.
pub fn damaged(what: impl Into<String>) -> Error {
    let what = format!("the stream is damaged: {}", what.into());
    Error::new(Code::Protocol, what).hint("send it again, over a connection that loses nothing")
}

/// The stream ends too early.
pub fn cut() -> Error {
    let what = "the stream ends before the copy is complete";
    Error::new(Code::Protocol, what).hint("the sender died or gave up, or the connection was lost")
}

/// A failed read of a stream.
pub fn read_failed(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => cut(),
        _ => super::line::failed(Code::Read, "cannot read the stream", e),
    }
}

fn write_failed(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::new(
            Code::Protocol,
            "the receiver went away before the copy was complete",
        )
        .hint("what it said is on its side"),
        _ => super::line::failed(Code::Write, "cannot write the stream", e),
    }
}

/// A number of `bytes`; beyond their end there are zeros.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = bytes.get(at..at + N).and_then(|b| b.try_into().ok());
    found.unwrap_or([0; N])
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(number(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(bytes, at))
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let layout: u32 = match self.layout {
            Layout::File => 0,
            Layout::Directory => 1,
            Layout::Disk => 2,
        };
        let mut bytes = MAGIC.to_vec();
        for n in [VERSION, self.features, layout, self.nr_files] {
            bytes.extend(n.to_le_bytes());
        }
        bytes.extend(self.cluster_sectors.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.size_sectors.to_le_bytes());
        bytes.extend(self.id);
        bytes.extend([0; 4]);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        if bytes[..8] != MAGIC {
            return Err(foreign());
        }
        let version = le32(bytes, 8);
        if version > VERSION {
            let what = format!("the stream has version {version}, newer than {VERSION}");
            return Err(Error::new(Code::Protocol, what)
                .hint("install a newer ploopctl here, or send with an older one"));
        }
        if version == 0 || crc32c::crc32c(&bytes[..60]) != le32(bytes, 60) {
            return Err(damaged("the checksum of its header is wrong"));
        }
        let unknown = le32(bytes, 12) & !FEATURES;
        if unknown != 0 {
            let what = format!("the stream has features {unknown:#x} that are not known here");
            return Err(Error::new(Code::Protocol, what).hint("install a newer ploopctl here"));
        }
        let layout = match le32(bytes, 16) {
            0 => Layout::File,
            1 => Layout::Directory,
            2 => Layout::Disk,
            n => return Err(damaged(format!("there is no layout {n}"))),
        };
        let nr_files = le32(bytes, 20);
        if nr_files == 0 || nr_files > FILES_MAX || (layout == Layout::File && nr_files != 1) {
            return Err(damaged(format!("it cannot have {nr_files} files")));
        }
        if le32(bytes, 28) != 0 || le32(bytes, 56) != 0 {
            return Err(damaged("a reserved field is not zero"));
        }
        Ok(Self {
            features: le32(bytes, 12),
            layout,
            nr_files,
            cluster_sectors: le32(bytes, 24),
            size_sectors: le64(bytes, 32),
            id: number(bytes, 40),
        })
    }
}

/// The refusal of something else.
pub fn foreign() -> Error {
    let what = "this is no stream of 'ploopctl copy send' or of OpenVZ's 'ploop copy'";
    Error::new(Code::Protocol, what).hint("does the other side write something before the stream?")
}

impl FileInfo {
    fn encode(&self) -> Vec<u8> {
        let (format, version): (u32, u32) = match self.format {
            Format::Raw => (1, 0),
            Format::Ploop1(version) => (2, version),
        };
        let flags = if self.is_top { IS_TOP } else { 0 };
        let mut bytes = self.guid.to_vec();
        for n in [format, version, self.cluster_sectors, flags] {
            bytes.extend(n.to_le_bytes());
        }
        bytes.extend(self.size_sectors.to_le_bytes());
        bytes.extend(self.mtime_ns.to_le_bytes());
        bytes.extend(self.name.as_bytes());
        bytes
    }

    fn parse(bytes: &[u8], len_bytes: u64) -> Result<Self> {
        let name = bytes.get(INFO_BYTES..).unwrap_or_default();
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(damaged("the name of a file is too short or too long"));
        }
        let name = String::from_utf8(name.to_vec())
            .map_err(|_| damaged("the name of a file is not Unicode"))?;
        let format = match (le32(bytes, 16), le32(bytes, 20)) {
            (1, 0) => Format::Raw,
            (2, version @ 1..=2) => Format::Ploop1(version),
            (format, version) => {
                let what = format!("there is no image format {format} of version {version}");
                return Err(damaged(what));
            }
        };
        let flags = le32(bytes, 28);
        if flags & !IS_TOP != 0 {
            return Err(damaged(format!("a file has unknown flags {flags:#x}")));
        }
        Ok(Self {
            name,
            guid: number(bytes, 0),
            format,
            cluster_sectors: le32(bytes, 24),
            size_sectors: le64(bytes, 32),
            len_bytes,
            mtime_ns: i64::from_le_bytes(number(bytes, 40)),
            is_top: flags & IS_TOP != 0,
        })
    }
}

mod kind {
    pub const FILE: u16 = 1;
    pub const DESCRIPTOR: u16 = 2;
    pub const DATA: u16 = 3;
    pub const ZERO: u16 = 4;
    pub const HOLE: u16 = 5;
    pub const LENGTH: u16 = 6;
    pub const ROUND: u16 = 7;
    pub const SYNC: u16 = 8;
    pub const END: u16 = 9;
    pub const ABORT: u16 = 10;
}

/// Writes a stream.
pub struct Writer<W> {
    to: W,
    is_packed: bool,
    totals: Totals,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    pub fn begin(mut to: W, header: &Header) -> Result<Self> {
        to.write_all(&header.encode()).map_err(write_failed)?;
        Ok(Self {
            to,
            is_packed: header.features & ZSTD != 0,
            totals: Totals::default(),
        })
    }

    /// What was written so far, for the end record.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Writes a record; how many bytes the stream got longer.
    pub fn put(&mut self, record: &Record<'_>) -> Result<u64> {
        let none = Part {
            file: 0,
            offset: 0,
            len: 0,
        };
        let part = |file, offset, len| Part { file, offset, len };
        match record {
            Record::File(file, info) => self.raw(
                kind::FILE,
                part(*file, 0, info.len_bytes),
                &info.encode(),
                0,
            ),
            Record::Descriptor(bytes) => self.raw(kind::DESCRIPTOR, none, bytes, 0),
            Record::Data(part, bytes) => self.data(*part, bytes),
            Record::Zero(part) => self.raw(kind::ZERO, *part, &[], 0),
            Record::Hole(part) => self.raw(kind::HOLE, *part, &[], 0),
            Record::Length(file, len) => self.raw(kind::LENGTH, part(*file, 0, *len), &[], 0),
            Record::Round(round, dirty) => self.raw(kind::ROUND, part(*round, 0, *dirty), &[], 0),
            Record::Sync => self.raw(kind::SYNC, none, &[], 0),
            Record::End(totals) => {
                let mut bytes = totals.records.to_le_bytes().to_vec();
                bytes.extend(totals.bytes.to_le_bytes());
                bytes.extend(totals.digest.to_le_bytes());
                bytes.extend([0; 4]);
                self.raw(kind::END, none, &bytes, 0)
            }
            Record::Abort(text) => {
                let end = text.floor_boundary(TEXT_MAX);
                self.raw(kind::ABORT, none, &text.as_bytes()[..end], 0)
            }
        }
    }

    fn data(&mut self, part: Part, bytes: &[u8]) -> Result<u64> {
        self.totals.bytes += part.len;
        if self.is_packed {
            let packed = zstd::bulk::compress(bytes, ZSTD_LEVEL)
                .map_err(|e| Error::io(Code::System, "cannot compress", e))?;
            if packed.len() < bytes.len() {
                return self.raw(kind::DATA, part, &packed, PACKED);
            }
        }
        self.raw(kind::DATA, part, bytes, 0)
    }

    fn raw(&mut self, kind: u16, part: Part, payload: &[u8], flags: u16) -> Result<u64> {
        let len = u32::try_from(payload.len()).ok();
        let len = len.filter(|len| *len as usize <= PIECE_MAX);
        let len = len.ok_or_else(|| damaged("a piece is too long"))?;
        let mut head = RECORD_MAGIC.to_le_bytes().to_vec();
        head.extend(kind.to_le_bytes());
        head.extend(flags.to_le_bytes());
        head.extend(self.totals.records.to_le_bytes());
        head.extend(part.file.to_le_bytes());
        head.extend(len.to_le_bytes());
        head.extend(part.offset.to_le_bytes());
        head.extend(part.len.to_le_bytes());
        head.extend(crc32c::crc32c(payload).to_le_bytes());
        let crc = crc32c::crc32c(&head);
        head.extend(crc.to_le_bytes());
        self.totals.digest = crc32c::crc32c_append(self.totals.digest, &head);
        self.totals.records += 1;
        self.to.write_all(&head).map_err(write_failed)?;
        self.to.write_all(payload).map_err(write_failed)?;
        self.to.flush().map_err(write_failed)?;
        Ok((head.len() + payload.len()) as u64)
    }
}

trait FloorBoundary {
    /// The end of a character at `max` at most.
    fn floor_boundary(&self, max: usize) -> usize;
}

impl FloorBoundary for str {
    fn floor_boundary(&self, max: usize) -> usize {
        let end = self.len().min(max);
        (0..=end)
            .rev()
            .find(|i| self.is_char_boundary(*i))
            .unwrap_or(0)
    }
}

/// Reads a stream.
pub struct Reader<R> {
    from: R,
    header: Header,
    totals: Totals,
    payload: Vec<u8>,
    piece: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn begin(mut from: R) -> Result<Self> {
        let mut bytes = [0; HEADER_BYTES];
        from.read_exact(&mut bytes).map_err(read_failed)?;
        Ok(Self {
            from,
            header: Header::parse(&bytes)?,
            totals: Totals::default(),
            payload: Vec::new(),
            piece: Vec::new(),
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was read so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The next record.
    pub fn read(&mut self) -> Result<Record<'_>> {
        let before = self.totals;
        let mut head = [0; HEAD_BYTES];
        self.from.read_exact(&mut head).map_err(read_failed)?;
        let nr = before.records;
        if le32(&head, 0) != RECORD_MAGIC || crc32c::crc32c(&head[..44]) != le32(&head, 44) {
            return Err(damaged(format!("the head of record {nr} is wrong")));
        }
        if le64(&head, 8) != nr {
            let what = format!("record {} comes where {nr} should", le64(&head, 8));
            return Err(damaged(what));
        }
        let len = le32(&head, 20) as usize;
        if len > PIECE_MAX {
            return Err(damaged(format!("record {nr} is too long")));
        }
        self.payload.resize(len, 0);
        self.from
            .read_exact(&mut self.payload)
            .map_err(read_failed)?;
        if crc32c::crc32c(&self.payload) != le32(&head, 40) {
            return Err(damaged(format!("the checksum of record {nr} is wrong")));
        }
        self.totals.records += 1;
        self.totals.digest = crc32c::crc32c_append(self.totals.digest, &head);
        self.record(&head, before)
    }

    fn record(&mut self, head: &[u8; HEAD_BYTES], before: Totals) -> Result<Record<'_>> {
        let (kind, flags) = (le16(head, 4), le16(head, 6));
        let part = Part {
            file: le32(head, 16),
            offset: le64(head, 24),
            len: le64(head, 32),
        };
        let may_be_packed = kind == kind::DATA && self.header.features & ZSTD != 0;
        if flags & !PACKED != 0 || (flags != 0 && !may_be_packed) {
            return Err(damaged(format!("a record has unknown flags {flags:#x}")));
        }
        let has_payload = !matches!(
            kind,
            kind::ZERO | kind::HOLE | kind::LENGTH | kind::ROUND | kind::SYNC
        );
        if !has_payload && !self.payload.is_empty() {
            return Err(damaged("a record is longer than it should be"));
        }
        Ok(match kind {
            kind::FILE => Record::File(part.file, FileInfo::parse(&self.payload, part.len)?),
            kind::DESCRIPTOR => Record::Descriptor(&self.payload),
            kind::DATA => {
                self.totals.bytes = self.totals.bytes.saturating_add(part.len);
                Record::Data(part, self.unpacked(part.len, flags)?)
            }
            kind::ZERO => Record::Zero(part),
            kind::HOLE => Record::Hole(part),
            kind::LENGTH => Record::Length(part.file, part.len),
            kind::ROUND => Record::Round(part.file, part.len),
            kind::SYNC => Record::Sync,
            kind::END => Record::End(self.end(before)?),
            kind::ABORT => {
                let end = self.payload.len().min(TEXT_MAX);
                Record::Abort(String::from_utf8_lossy(&self.payload[..end]).into_owned())
            }
            _ => {
                let what = format!("there is no kind {kind} of records");
                return Err(damaged(what));
            }
        })
    }

    fn unpacked(&mut self, len: u64, flags: u16) -> Result<&[u8]> {
        let wrong = || damaged("a piece has another length than it says");
        let len = usize::try_from(len).map_err(|_| wrong())?;
        if len == 0 || len > PIECE_MAX {
            return Err(wrong());
        }
        let piece = if flags & PACKED == 0 {
            &self.payload
        } else {
            self.piece.resize(len, 0);
            let got = zstd::bulk::decompress_to_buffer(&self.payload, &mut self.piece);
            self.piece.truncate(got.map_err(|_| wrong())?);
            &self.piece
        };
        if piece.len() != len {
            return Err(wrong());
        }
        Ok(piece)
    }

    fn end(&self, before: Totals) -> Result<Totals> {
        let said = Totals {
            records: le64(&self.payload, 0),
            bytes: le64(&self.payload, 8),
            digest: le32(&self.payload, 16),
        };
        if self.payload.len() != TOTALS_BYTES || said != before {
            return Err(damaged("what came is not what its end says"));
        }
        Ok(said)
    }
}

#[cfg(test)]
mod tests;

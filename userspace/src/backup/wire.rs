// SPDX-License-Identifier: GPL-2.0
//! The bytes of a backup file: its header, the heads of its records, its end. `docs/backup-format.md`
//! has the same as tables.
//!
//! What is parsed here is checked by itself; what must hold between records is up to the reader.

use std::fmt;

/// First bytes of a backup. A transfer that changes ends of lines breaks it.
pub const MAGIC: [u8; 16] = *b"ploop-backup\r\n\x1a\n";
/// Version of the format.
pub const VERSION: u32 = 1;
/// Length of the header.
pub const HEADER_BYTES: usize = 256;
/// Length of the head of a record.
pub const HEAD_BYTES: usize = 32;
/// Length of what follows the head of the end record.
pub const END_BYTES: usize = 64;
/// Most bytes of the disk in a data record.
pub const DATA_MAX: u32 = 1 << 20;
/// All places and lengths are multiples of it.
pub const SECTOR: u64 = 512;

/// [`Header::features`]: some data is compressed with zstd.
pub const FEATURE_ZSTD: u64 = 1;
const FEATURES: u64 = FEATURE_ZSTD;

const KIND_FULL: u32 = 0;
const KIND_INCREMENTAL: u32 = 1;
const HEADER_SUM: usize = HEADER_BYTES - 4;
const HEAD_SUM: usize = HEAD_BYTES - 4;
const CLUSTER_MIN: u32 = 32 << 10;
const CLUSTER_MAX: u32 = 64 << 20;

/// A name of 16 bytes.
pub type Id = [u8; 16];
/// No name.
pub const NO_ID: Id = [0; 16];

/// What is wrong with a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// It does not begin with the magic.
    Magic,
    /// It is of another version.
    Version(u32),
    /// It needs what is not known here.
    Features(u64),
    /// The header is not what was written.
    HeaderSum,
    /// A field of the header makes no sense.
    Field(&'static str),
    /// The head of a record is not what was written.
    HeadSum,
    /// There is no such record.
    Kind(u32),
    /// A record is not of a part of the disk.
    Place,
    /// Records are not in the order of the disk.
    Order,
    /// A record that this backup may not have.
    Unexpected,
    /// The length of what a record stores is not possible.
    Stored,
    /// What a record stores is not what was written.
    DataSum,
    /// The compressed data is damaged.
    Compressed,
    /// The end tells of other totals.
    Totals,
    /// The whole is not what was written.
    Digest,
    /// It goes on behind its end.
    Longer,
    /// It ends too early.
    Shorter,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Magic => "the magic is missing",
            Self::Version(n) => return write!(f, "it is of version {n} of the format"),
            Self::Features(bits) => return write!(f, "it needs unknown features {bits:#x}"),
            Self::HeaderSum => "the checksum of the header is wrong",
            Self::Field(name) => return write!(f, "the {name} in the header makes no sense"),
            Self::HeadSum => "the checksum of a record's head is wrong",
            Self::Kind(kind) => return write!(f, "there is no record of kind {kind}"),
            Self::Place => "a record is outside of the disk",
            Self::Order => "the records are out of order",
            Self::Unexpected => "a record is of a kind that must not be there",
            Self::Stored => "the length of a record is not possible",
            Self::DataSum => "the checksum of the data is wrong",
            Self::Compressed => "the compressed data cannot be read",
            Self::Totals => "the totals are wrong",
            Self::Digest => "the checksum of the whole is wrong",
            Self::Longer => "it goes on behind its end",
            Self::Shorter => "it ends too early",
        };
        f.write_str(text)
    }
}

/// What a backup is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What a reader must know: `FEATURE_*`.
    pub features: u64,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Cluster size of the images.
    pub cluster_bytes: u32,
    /// Its name.
    pub id: Id,
    /// The backup that it builds on; none if it is full.
    pub parent: Option<Id>,
    /// The full backup at the beginning of its chain; its own name if it is that.
    pub base: Id,
    /// The checkpoint that tells what was written since; none if there is none.
    pub checkpoint: Option<Id>,
    /// When the disk was so, in seconds since 1970 (UTC).
    pub time: u64,
}

impl Header {
    /// As it is in the file.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut to = [0; HEADER_BYTES];
        let kind = match self.parent {
            None => KIND_FULL,
            Some(_) => KIND_INCREMENTAL,
        };
        to[..16].copy_from_slice(&MAGIC);
        put_u32(&mut to, 16, VERSION);
        put_u32(&mut to, 20, HEADER_BYTES as u32);
        put_u64(&mut to, 24, self.features);
        put_u64(&mut to, 32, self.disk_bytes);
        put_u32(&mut to, 40, self.cluster_bytes);
        put_u32(&mut to, 44, kind);
        to[48..64].copy_from_slice(&self.id);
        to[64..80].copy_from_slice(&self.parent.unwrap_or(NO_ID));
        to[80..96].copy_from_slice(&self.base);
        to[96..112].copy_from_slice(&self.checkpoint.unwrap_or(NO_ID));
        put_u64(&mut to, 112, self.time);
        let sum = crc32c::crc32c(&to[..HEADER_SUM]);
        put_u32(&mut to, HEADER_SUM, sum);
        to
    }

    /// Reads it.
    pub fn parse(from: &[u8; HEADER_BYTES]) -> Result<Self, Problem> {
        if from[..16] != MAGIC {
            return Err(Problem::Magic);
        }
        let version = u32_at(from, 16);
        if version != VERSION {
            return Err(Problem::Version(version));
        }
        if u32_at(from, HEADER_SUM) != crc32c::crc32c(&from[..HEADER_SUM]) {
            return Err(Problem::HeaderSum);
        }
        let features = u64_at(from, 24);
        if features & !FEATURES != 0 {
            return Err(Problem::Features(features & !FEATURES));
        }
        let header = Self {
            features,
            disk_bytes: u64_at(from, 32),
            cluster_bytes: u32_at(from, 40),
            id: id_at(from, 48),
            parent: Some(id_at(from, 64)).filter(|id| *id != NO_ID),
            base: id_at(from, 80),
            checkpoint: Some(id_at(from, 96)).filter(|id| *id != NO_ID),
            time: u64_at(from, 112),
        };
        let is_full = match u32_at(from, 44) {
            KIND_FULL => true,
            KIND_INCREMENTAL => false,
            _ => return Err(Problem::Field("kind")),
        };
        let size = header.disk_bytes;
        let cluster = header.cluster_bytes;
        let is_cluster =
            cluster.is_power_of_two() && (CLUSTER_MIN..=CLUSTER_MAX).contains(&cluster);
        let is_base = header.id == header.base;
        for (is_good, name) in [
            (u32_at(from, 20) == HEADER_BYTES as u32, "length"),
            (
                size != 0 && size % SECTOR == 0 && size < 1 << 63,
                "size of the disk",
            ),
            (is_cluster, "cluster size"),
            (header.id != NO_ID && header.base != NO_ID, "name"),
            (is_full == header.parent.is_none(), "parent"),
            (
                is_full == is_base && header.parent != Some(header.id),
                "base",
            ),
            (
                from[120..HEADER_SUM].iter().all(|b| *b == 0),
                "reserved part",
            ),
        ] {
            if !is_good {
                return Err(Problem::Field(name));
            }
        }
        Ok(header)
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The bytes follow.
    Data,
    /// The bytes follow, compressed with zstd.
    Zstd,
    /// Zeros.
    Zeros,
    /// The end.
    End,
}

/// The head of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Bytes that follow in the file.
    pub stored: u32,
    /// First byte of the disk.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// CRC32C of the bytes of the disk, or of what follows at the end.
    pub sum: u32,
}

impl Head {
    /// As it is in the file.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let kind = match self.kind {
            Kind::Data => 1,
            Kind::Zstd => 2,
            Kind::Zeros => 3,
            Kind::End => 4,
        };
        let mut to = [0; HEAD_BYTES];
        put_u32(&mut to, 0, kind);
        put_u32(&mut to, 4, self.stored);
        put_u64(&mut to, 8, self.start);
        put_u64(&mut to, 16, self.len);
        put_u32(&mut to, 24, self.sum);
        let sum = crc32c::crc32c(&to[..HEAD_SUM]);
        put_u32(&mut to, HEAD_SUM, sum);
        to
    }

    /// Reads it. Of a record that it lets pass, no more than [`DATA_MAX`] bytes follow.
    pub fn parse(from: &[u8; HEAD_BYTES], header: &Header) -> Result<Self, Problem> {
        if u32_at(from, HEAD_SUM) != crc32c::crc32c(&from[..HEAD_SUM]) {
            return Err(Problem::HeadSum);
        }
        let kind = match u32_at(from, 0) {
            1 => Kind::Data,
            2 if header.features & FEATURE_ZSTD != 0 => Kind::Zstd,
            3 if header.parent.is_some() => Kind::Zeros,
            4 => Kind::End,
            2 | 3 => return Err(Problem::Unexpected),
            other => return Err(Problem::Kind(other)),
        };
        let head = Self {
            kind,
            stored: u32_at(from, 4),
            start: u64_at(from, 8),
            len: u64_at(from, 16),
            sum: u32_at(from, 24),
        };
        let is_stored = match kind {
            Kind::Data => u64::from(head.stored) == head.len,
            Kind::Zstd => head.stored != 0 && u64::from(head.stored) < head.len,
            Kind::Zeros => head.stored == 0 && head.sum == 0,
            Kind::End => head.stored as usize == END_BYTES,
        };
        let is_placed = match kind {
            Kind::End => head.start == 0 && head.len == 0,
            Kind::Data | Kind::Zstd | Kind::Zeros => {
                let end = head.start.checked_add(head.len);
                head.len != 0
                    && head.start % SECTOR == 0
                    && head.len % SECTOR == 0
                    && end.is_some_and(|end| end <= header.disk_bytes)
            }
        };
        let is_short = kind == Kind::Zeros || head.len <= DATA_MAX.into();
        match (is_placed, is_stored && is_short) {
            (false, _) => Err(Problem::Place),
            (true, false) => Err(Problem::Stored),
            (true, true) => Ok(head),
        }
    }
}

/// What a backup has, as its end tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Records before the end.
    pub records: u64,
    /// Bytes of the disk in data records.
    pub data: u64,
    /// Bytes of the disk in records of zeros.
    pub zeros: u64,
    /// Bytes of the file before the end record.
    pub length: u64,
}

impl Totals {
    /// Notes a record.
    pub fn note(&mut self, head: &Head) {
        self.records += 1;
        self.length += HEAD_BYTES as u64 + u64::from(head.stored);
        match head.kind {
            Kind::Data | Kind::Zstd => self.data += head.len,
            Kind::Zeros => self.zeros += head.len,
            Kind::End => {}
        }
    }

    /// What follows the head of the end record.
    pub fn encode(&self, digest: &[u8; 32]) -> [u8; END_BYTES] {
        let mut to = [0; END_BYTES];
        put_u64(&mut to, 0, self.records);
        put_u64(&mut to, 8, self.data);
        put_u64(&mut to, 16, self.zeros);
        put_u64(&mut to, 24, self.length);
        to[32..].copy_from_slice(digest);
        to
    }

    /// Compares them with what the file says.
    pub fn compare(&self, digest: &[u8; 32], said: &[u8; END_BYTES]) -> Result<(), Problem> {
        if said[..32] != self.encode(digest)[..32] {
            return Err(Problem::Totals);
        }
        if said[32..] != digest[..] {
            return Err(Problem::Digest);
        }
        Ok(())
    }
}

fn put_u32(to: &mut [u8], at: usize, value: u32) {
    to[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(to: &mut [u8], at: usize, value: u64) {
    to[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The array at a constant place of a constant-sized array.
fn array<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[at..at + N]);
    bytes
}

fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(from, at))
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(from, at))
}

fn id_at(from: &[u8], at: usize) -> Id {
    array(from, at)
}

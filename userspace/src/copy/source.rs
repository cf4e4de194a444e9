// SPDX-License-Identifier: GPL-2.0
//! The images that are copied, read in pieces. That of a device in use is read past the page cache,
//! as the kernel writes it.

use super::wire::{FileInfo, Format, PIECE_MAX};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{lseek, Whence};
use ploop_pure::layout::ploop1::{Header, Mark, RawHeader, Version, HEADER_BYTES};
use ploop_pure::units::SECTOR_BYTES;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zerocopy::{FromBytes, IntoBytes};

/// What reads past the page cache are aligned to; that of any disk.
const ALIGN: u64 = 4096;
/// What is looked at whether it is zero.
const GRAIN: usize = 64 << 10;

/// The whole of what is copied.
pub struct Source {
    /// The images, the base first.
    pub files: Vec<SourceFile>,
    /// The descriptor, if it is copied too.
    pub descriptor: Option<String>,
    /// It becomes a directory.
    pub is_directory: bool,
}

/// An image that is copied.
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// What is known of it.
    pub info: FileInfo,
    file: File,
}

/// How an image is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It does not change.
    AtRest,
    /// A device writes to it.
    Live,
}

/// What a part of a file is.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// Zeros.
    Zero,
    /// Nothing.
    Hole,
}

/// Memory that reads past the page cache can go to.
pub struct Buffer {
    bytes: Vec<u8>,
    at: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        let align = ALIGN as usize;
        let bytes = vec![0; PIECE_MAX + 3 * align];
        let at = bytes.as_ptr().align_offset(align);
        Self { bytes, at }
    }
}

impl SourceFile {
    /// Opens the image `path`, which is called `name` in the copy.
    pub fn open(path: &Path, name: &str, guid: [u8; 16], is_raw: bool, how: How) -> Result<Self> {
        let image = Image::open(path, Access::Read)?;
        let len_bytes = image.len_bytes()?;
        let header = if is_raw {
            None
        } else {
            Some(image.good_header()?.0)
        };
        let at = path.display();
        if how == How::AtRest && header.is_some_and(|h| h.mark == Mark::InUse) {
            let what = format!("{at} is marked as in use: it was not closed cleanly");
            return Err(Error::new(Code::Damaged, what)
                .hint(format!("'ploopctl check --repair {at}' mends it")));
        }
        let meta = image.file().metadata();
        let meta = meta.map_err(|e| image.error(Code::Stat, "stat", e))?;
        let info = FileInfo {
            name: name.to_owned(),
            guid,
            format: match header.map(|h| h.version) {
                None => Format::Raw,
                Some(Version::V1) => Format::Ploop1(1),
                Some(Version::V2) => Format::Ploop1(2),
            },
            cluster_sectors: header.map_or(0, |h| h.cluster.sectors()),
            size_sectors: header.map_or(len_bytes / SECTOR_BYTES, |h| h.size_sectors),
            len_bytes,
            mtime_ns: meta
                .mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(meta.mtime_nsec()),
            is_top: false,
        };
        let file = match how {
            How::AtRest => File::open(path),
            How::Live => open_direct(path),
        };
        let file = file.map_err(|e| Error::io(Code::Open, format!("cannot open {at}"), e))?;
        Ok(Self {
            path: path.to_owned(),
            info,
            file,
        })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length now, also of a block device, of which metadata has none.
    pub fn len_bytes(&self) -> Result<u64> {
        let end = lseek(&self.file, 0, Whence::SeekEnd);
        let end = end.and_then(|end| u64::try_from(end).map_err(|_| Errno::EOVERFLOW));
        end.map_err(|e| {
            let what = format!("cannot find the end of {}", self.path.display());
            Error::io(Code::Stat, what, e)
        })
    }

    /// Reads a range of at most [`PIECE_MAX`] bytes; what is past the end of the file is a hole.
    pub fn read<'b>(&self, range: &Range<u64>, buf: &'b mut Buffer) -> Result<Piece<'b>> {
        if self.is_hole(range) {
            return Ok(Piece::Hole);
        }
        // Wider, as reads past the page cache must be.
        let start = range.start / ALIGN * ALIGN;
        let end = range.end.div_ceil(ALIGN) * ALIGN;
        let want = (end - start) as usize;
        let Buffer { bytes, at } = buf;
        let Some(bytes) = bytes.get_mut(*at..*at + want) else {
            return Err(Error::new(Code::System, "a piece is too long to be read"));
        };
        let mut got = 0;
        while got < want {
            match self.file.read_at(&mut bytes[got..], start + got as u64) {
                Ok(0) => break,
                Ok(n) => {
                    got += n;
                    // Only the end of the file ends a read amid a block.
                    if n as u64 % ALIGN != 0 {
                        self.must_end_at(start + got as u64)?;
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let at = self.path.display();
                    let what = format!("cannot read {at} at byte {}", start + got as u64);
                    return Err(Error::io(Code::Read, what, e));
                }
            }
        }
        bytes[got..].fill(0);
        let skip = (range.start - start) as usize;
        let piece = &bytes[skip..skip + (range.end - range.start) as usize];
        Ok(if is_zero(piece) {
            Piece::Zero
        } else {
            Piece::Data(piece)
        })
    }

    /// Nothing of the file may be behind byte `end`.
    fn must_end_at(&self, end: u64) -> Result<()> {
        if end < self.len_bytes()? {
            let at = self.path.display();
            let what = format!("cannot read {at} at byte {end}: the file system gave a part only");
            return Err(Error::new(Code::Read, what));
        }
        Ok(())
    }

    /// Whether nothing is allocated there. A file system that cannot tell has no holes.
    fn is_hole(&self, range: &Range<u64>) -> bool {
        let Ok(from) = libc::off_t::try_from(range.start) else {
            return true;
        };
        match lseek(&self.file, from, Whence::SeekData) {
            Ok(at) => u64::try_from(at).is_ok_and(|at| at >= range.end),
            Err(e) => e == Errno::ENXIO,
        }
    }

    /// The first page of the image as it is to be in the copy: closed. `None` for a raw one.
    pub fn closed_page(&self, buf: &mut Buffer) -> Result<Option<Vec<u8>>> {
        if self.info.format == Format::Raw {
            return Ok(None);
        }
        let Piece::Data(page) = self.read(&(0..ALIGN), buf)? else {
            let what = format!("{} has no header any more", self.path.display());
            return Err(Error::new(Code::NotAnImage, what));
        };
        let mut page = page.to_vec();
        let not_an_image = |what: String| {
            let what = format!(
                "{} is not a valid ploop1 image: {what}",
                self.path.display()
            );
            Error::new(Code::NotAnImage, what)
        };
        let raw = RawHeader::read_from_bytes(&page[..HEADER_BYTES])
            .map_err(|_| not_an_image("it has no header".into()))?;
        let header = Header::parse(&raw).map_err(|p| not_an_image(p.to_string()))?;
        let closed = header.closed(false).encode();
        page[..HEADER_BYTES].copy_from_slice(closed.as_bytes());
        Ok(Some(page))
    }
}

fn open_direct(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let open = options.read(true).custom_flags(libc::O_DIRECT).open(path);
    match open {
        // Then the kernel writes through the page cache, too.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        open => open,
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// The parts of `bytes` that are zeros, and those that are not, in turn: whether, and where.
pub fn runs(bytes: &[u8]) -> Vec<(bool, Range<usize>)> {
    let mut runs: Vec<(bool, Range<usize>)> = Vec::new();
    let mut at = 0;
    for grain in bytes.chunks(GRAIN) {
        let (is_zero, end) = (is_zero(grain), at + grain.len());
        match runs.last_mut() {
            Some((last, range)) if *last == is_zero => range.end = end,
            Some(_) | None => runs.push((is_zero, at..end)),
        }
        at = end;
    }
    runs
}

// SPDX-License-Identifier: GPL-2.0
//! An image file: opening it, reading its header and BAT, and the full check.
//!
//! What is wrong with an image is judged by `ploop_pure::check`. Nothing here keeps the BAT: it
//! is read in pieces, and a scan holds one bit a slot.

pub mod create;
pub mod mend;
pub mod repair;

use crate::error::{Code, Error, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::libc;
use nix::unistd::{lseek, Whence};
use ploop_pure::check::{BatScan, Length};
use ploop_pure::layout::extension::{self, Item};
use ploop_pure::layout::ploop1::{
    Header, Mark, RawHeader, FLAG_CONVERTING, HEADER_BYTES, MAGIC_V1, MAGIC_V2,
};
use ploop_pure::problem::Problem;
use ploop_pure::repair::{judge, Extension, Findings, Tally};
use ploop_pure::units::{Cluster, ImageCluster, INDEX_PAGE_BYTES};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

/// Index pages read at once: 1 MiB.
const PAGES_AT_ONCE: u32 = 256;
/// Problems kept for the report; more are only counted. 10^5 of them take 2 MiB.
const PROBLEMS_MAX: usize = 100_000;
/// How long somebody's lease on an image is waited for: kernels take it away after 45 seconds.
const LEASE_WAIT: Duration = Duration::from_secs(50);

/// What an image file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device.
    Block,
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// An open image file.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    kind: Kind,
}

/// A ploop1 image as a check found it.
#[derive(Debug)]
pub struct Report {
    /// What a repair plan follows from.
    pub findings: Findings,
    /// What is wrong; of the image first, then of its entries.
    pub problems: Vec<Problem>,
    /// Problems not kept in `problems`.
    pub nr_omitted: u64,
    /// Dirty bitmaps of a valid extension: id and granularity in sectors.
    pub bitmaps: Vec<([u8; 16], u32)>,
    /// Slots below the end that nothing names.
    pub nr_leaked: u32,
}

/// The sink of a scan: gets every entry that is not a hole.
pub type Sink<'a> =
    dyn FnMut(Cluster, std::result::Result<ImageCluster, Problem>) -> Result<()> + 'a;

impl Image {
    /// Opens an image. Anything but a regular file or a block device is refused before it is
    /// touched.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let at = path.display();
        let meta = fs::metadata(path).map_err(|e| open_error(path, access, e))?;
        kind_of(path, &meta.file_type())?;
        let file = open_patiently(path, access).map_err(|e| open_error(path, access, e))?;
        let meta = file
            .metadata()
            .map_err(|e| Error::io(Code::Stat, format!("cannot stat {at}"), e))?;
        let kind = kind_of(path, &meta.file_type())?;
        // The kernel may look at the flags of the file it is handed.
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))
            .map_err(|e| Error::io(Code::Open, format!("cannot open {at}"), e))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            kind,
        })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> Result<u64> {
        let len = match self.kind {
            Kind::File => self.file.metadata().map(|m| m.len()),
            Kind::Block => (&self.file).seek(SeekFrom::End(0)),
        };
        len.map_err(|e| self.error(Code::Stat, "find the length of", e))
    }

    /// How many names the file has.
    pub fn links(&self) -> Result<u64> {
        let meta = self.file.metadata();
        meta.map(|m| m.nlink())
            .map_err(|e| self.error(Code::Stat, "stat", e))
    }

    pub(crate) fn error(&self, code: Code, what: &str, e: impl Into<io::Error>) -> Error {
        Error::io(code, format!("cannot {what} {}", self.path.display()), e)
    }

    /// Makes the file this long.
    pub(crate) fn set_len(&self, len_bytes: u64) -> Result<()> {
        let done = self.file.set_len(len_bytes);
        done.map_err(|e| self.error(Code::Truncate, "set the length of", e))
    }

    /// Makes what was written durable.
    pub(crate) fn sync(&self) -> Result<()> {
        let done = self.file.sync_all();
        done.map_err(|e| self.error(Code::Fsync, "write", e))
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| {
            let what = format!("cannot write {} at byte {offset}", self.path.display());
            Error::io(Code::Write, what, e)
        })
    }

    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| {
            let what = format!("cannot read {} at byte {offset}", self.path.display());
            Error::io(Code::Read, what, e)
        })
    }

    /// Whether it begins with the magic of a ploop1 image.
    pub fn has_magic(&self) -> Result<bool> {
        let mut magic = [0; 16];
        if self.len_bytes()? < magic.len() as u64 {
            return Ok(false);
        }
        self.read_at(&mut magic, 0)?;
        Ok([MAGIC_V1, MAGIC_V2].contains(&magic))
    }

    /// Whether an image that lies above others has anything in it. If not it makes no difference to
    /// what is read: what was written to it and flushed, it would name. Nor does a mark.
    pub fn has_data(&self) -> Result<bool> {
        let report = self.check()?.map_err(|p| self.not_an_image(p))?;
        let is_harmless = |p: &Problem| {
            matches!(
                p,
                Problem::InUse | Problem::EmptyFlag | Problem::TornTail { .. }
            )
        };
        Ok(report.findings.usage.nr_used > 0 || !report.problems.iter().all(is_harmless))
    }

    /// Its header and length, or what is wrong with them.
    pub fn header(&self) -> Result<std::result::Result<(Header, Length, u64), Problem>> {
        let len_bytes = self.len_bytes()?;
        if len_bytes < HEADER_BYTES as u64 {
            return Ok(Err(Problem::Truncated {
                need: HEADER_BYTES as u64,
                have: len_bytes,
            }));
        }
        let mut raw = [0; HEADER_BYTES];
        self.read_at(&mut raw, 0)?;
        let raw = RawHeader::read_from_bytes(&raw)
            .map_err(|_| self.error(Code::Read, "read the header of", Errno::EIO))?;
        Ok(Header::parse(&raw).and_then(|header| {
            let length = Length::judge(&header, len_bytes)?;
            Ok((header, length, len_bytes))
        }))
    }

    /// The same for commands that can do nothing with a bad one.
    pub fn good_header(&self) -> Result<(Header, Length, u64)> {
        self.header()?.map_err(|p| self.not_an_image(p))
    }

    /// The refusal of an image because of `problem`.
    pub fn not_an_image(&self, problem: Problem) -> Error {
        let what = format!(
            "{} is not a valid ploop1 image: {problem}",
            self.path.display()
        );
        let is_converting = |flags| flags & FLAG_CONVERTING != 0;
        match problem {
            Problem::Flags {
                flags,
                mark: Mark::InUse,
            } if is_converting(flags) => Error::new(Code::Busy, what),
            _ => Error::new(Code::NotAnImage, what),
        }
    }

    /// Judges every entry. The BAT is read in pieces.
    pub fn scan(&self, header: &Header, length: Length, sink: &mut Sink<'_>) -> Result<BatScan> {
        let mut scan = BatScan::new(*header, length).map_err(|_| {
            let need = BatScan::memory_bytes(header, length);
            let what = format!(
                "{} has too many clusters to be checked: {need} bytes of memory are needed",
                self.path.display()
            );
            Error::new(Code::Memory, what)
        })?;
        let page_bytes = INDEX_PAGE_BYTES as usize;
        let mut buf = vec![0; page_bytes * PAGES_AT_ONCE.min(header.nr_pages()) as usize];
        let mut page = 0;
        while page < header.nr_pages() {
            let nr = PAGES_AT_ONCE.min(header.nr_pages() - page);
            let buf = &mut buf[..nr as usize * page_bytes];
            self.read_at(buf, u64::from(page) * INDEX_PAGE_BYTES)?;
            for (bytes, page) in buf.chunks_exact(page_bytes).zip(page..) {
                let slots = <[U32]>::ref_from_bytes(bytes)
                    .map_err(|_| self.error(Code::Read, "read the BAT of", Errno::EIO))?;
                scan.page(page, slots, &mut *sink)?;
            }
            page += nr;
        }
        Ok(scan)
    }

    /// Checks a ploop1 image from end to end.
    pub fn check(&self) -> Result<std::result::Result<Report, Problem>> {
        let (header, length, len_bytes) = match self.header()? {
            Ok(header) => header,
            Err(problem) => return Ok(Err(problem)),
        };
        let mut tally = Tally::default();
        let mut problems = Vec::new();
        let mut nr_omitted = 0;
        let mut scan = self.scan(&header, length, &mut |cluster, entry| {
            let entry = judge(&header, cluster, entry);
            tally.note(&header, entry);
            match entry {
                Err(problem) if problems.len() < PROBLEMS_MAX => problems.push(problem),
                Err(_) => nr_omitted += 1,
                Ok(_) => {}
            }
            Ok(())
        })?;
        if tally.nr_past_disk > 0 {
            // What entries past the end of the disk name is not in use.
            scan = self.scan(&header.without_surplus(), length, &mut |_, _| Ok(()))?;
        }
        let extension = self.extension(&header, length, &scan)?;
        let usage = scan.usage();
        let taken = |at: ImageCluster| scan.is_used(at) || extension.slots.contains_slot(at);
        let leaks = self.leaks(&header, usage.end, taken)?;
        let end = ImageCluster(usage.end);
        let findings = Findings {
            header,
            len_bytes,
            length,
            usage,
            tally,
            nr_leaked_data: leaks.nr_data,
            nr_extension_slots: extension.slots.below(end),
            extension: extension.state,
        };
        problems.splice(0..0, findings.problems());
        Ok(Ok(Report {
            findings,
            problems,
            nr_omitted,
            bitmaps: extension.bitmaps,
            nr_leaked: leaks.nr,
        }))
    }

    /// Reads the format extension, if the header says that there is a valid one.
    fn extension(&self, header: &Header, length: Length, scan: &BatScan) -> Result<FoundExtension> {
        let mut found = FoundExtension::default();
        if header.ext_offset == 0 {
            return Ok(found);
        }
        found.state = Extension::Invalid;
        let is_free = |at: &ImageCluster| at.0 < length.clusters && !scan.is_used(*at);
        let Some(at) = header.slot_at(header.ext_offset).filter(is_free) else {
            return Ok(found);
        };
        if header.mark != Mark::ClosedV21 {
            return Ok(found);
        }
        // At most 64 MiB.
        let mut bytes = vec![0; header.cluster.bytes() as usize];
        self.read_at(&mut bytes, header.cluster.offset(at))?;
        let digest = md5::compute(&bytes[extension::DIGEST_FROM..]).0;
        let (mut slots, mut bitmaps, mut is_known) = (Vec::new(), Vec::new(), true);
        let read = extension::read(header, &bytes, digest, |item| match item {
            Item::Bitmap { id, granularity } => bitmaps.push((id, granularity)),
            Item::Unknown { .. } => is_known = false,
            Item::Slot(_) | Item::Part(_) => slots.extend(item.slot()),
        });
        slots.sort_unstable();
        let is_own = slots.windows(2).all(|w| w[0] < w[1]) && slots.iter().all(is_free);
        if read.is_ok() && is_own {
            let end = slots.last().map(|at| at.0 + 1).filter(|_| is_known);
            found = FoundExtension {
                state: Extension::Valid { end },
                slots: Slots(slots),
                bitmaps,
            };
        }
        Ok(found)
    }

    /// Counts the slots below `end` that are not taken.
    fn leaks(
        &self,
        header: &Header,
        end: u32,
        taken: impl Fn(ImageCluster) -> bool,
    ) -> Result<Leaks> {
        let mut leaks = Leaks::default();
        let mut data = DataFinder::new(self);
        for at in (header.first_data.0..end).map(ImageCluster) {
            if taken(at) {
                continue;
            }
            leaks.nr += 1;
            let start = header.cluster.offset(at);
            if data.has_data(start, start + header.cluster.bytes()) {
                leaks.nr_data += 1;
            }
        }
        Ok(leaks)
    }
}

#[derive(Debug, Default)]
struct Leaks {
    nr: u32,
    nr_data: u32,
}

#[derive(Debug)]
struct FoundExtension {
    state: Extension,
    slots: Slots,
    bitmaps: Vec<([u8; 16], u32)>,
}

impl Default for FoundExtension {
    fn default() -> Self {
        Self {
            state: Extension::None,
            slots: Slots(Vec::new()),
            bitmaps: Vec::new(),
        }
    }
}

/// Slots in ascending order.
#[derive(Debug)]
struct Slots(Vec<ImageCluster>);

impl Slots {
    fn contains_slot(&self, at: ImageCluster) -> bool {
        self.0.binary_search(&at).is_ok()
    }

    fn below(&self, end: ImageCluster) -> u32 {
        // At most one for each 8 bytes of a cluster.
        self.0.partition_point(|at| *at < end) as u32
    }
}

/// Tells allocated parts of a file from holes, asked in ascending order.
struct DataFinder<'a> {
    image: &'a Image,
    /// Where data begins again; found for an earlier question.
    next: Option<u64>,
}

impl<'a> DataFinder<'a> {
    fn new(image: &'a Image) -> Self {
        Self { image, next: None }
    }

    /// Whether bytes `start` to `end` may hold anything but a hole.
    fn has_data(&mut self, start: u64, end: u64) -> bool {
        if self.next.is_none_or(|next| next < start) {
            let from = libc::off_t::try_from(start).unwrap_or(libc::off_t::MAX);
            self.next = Some(match lseek(&self.image.file, from, Whence::SeekData) {
                Ok(at) => u64::try_from(at).unwrap_or(u64::MAX),
                // No data from here on.
                Err(Errno::ENXIO) => u64::MAX,
                // The file system cannot tell.
                Err(_) => start,
            });
        }
        self.next.is_some_and(|next| next < end)
    }
}

fn kind_of(path: &Path, kind: &fs::FileType) -> Result<Kind> {
    let what = if kind.is_file() {
        return Ok(Kind::File);
    } else if kind.is_block_device() {
        return Ok(Kind::Block);
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "not a file"
    };
    let message = format!("{} is {what}, not an image", path.display());
    Err(Error::new(Code::Open, message).hint("give the path of an image file or block device"))
}

/// Opens a file. A FIFO put there meanwhile does not block; a lease on the file, which an NFS server
/// takes for its clients, is waited for.
fn open_patiently(path: &Path, access: Access) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(access == Access::Write)
        .custom_flags(libc::O_NONBLOCK);
    let end = Instant::now() + LEASE_WAIT;
    loop {
        match options.open(path) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

fn open_error(path: &Path, access: Access, e: io::Error) -> Error {
    let errno = e.raw_os_error().map(Errno::from_raw);
    let how = match access {
        Access::Read => "open",
        Access::Write => "open for writing",
    };
    let error = Error::io(Code::Open, format!("cannot {how} {}", path.display()), e);
    match (errno, access) {
        (Some(Errno::EROFS), Access::Write) => {
            error.hint("it is on a read-only file system: attach it read-only with -r")
        }
        (Some(Errno::EACCES | Errno::EPERM), Access::Write) => {
            error.hint("attach it read-only with -r, or look at its permissions and attributes")
        }
        (Some(Errno::ELOOP), _) => error.hint("its symbolic links lead in a circle"),
        (Some(Errno::ENOENT), _) => error.hint("'ploopctl create' makes a new image"),
        (Some(Errno::ETXTBSY), _) => error.hint("it is in use as swap space or a program"),
        _ => error,
    }
}

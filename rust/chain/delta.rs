// SPDX-License-Identifier: GPL-2.0
//! One delta: an image file, its format and its mark.
//!
//! Everything here sleeps and none of it runs while the device serves requests, except
//! [`Delta::write_index`], whose callers are serialised by the engine's commit.

mod info;

pub(crate) use self::info::Info;
use crate::{
    error::{errno, is_no_space, Shown},
    format::{
        ploop1::{Expect, Ploop1},
        raw::Raw,
        Format,
    },
    io::{
        lock::{ImageLock, Images},
        with_memory, Io,
    },
    sys::{
        self,
        file::{Access, Kind},
        pages::{PageBuf, PAGE_BYTES},
        prelude::*,
    },
};
use core::ops::Range;
use ploop_pure::{
    abi,
    chain::{self, Member},
    check::{BatScan, Length, Usage},
    layout::ploop1::Header,
    problem::Problem,
    units::{Cluster, ImageCluster, INDEX_PAGE_BYTES, SECTOR_BYTES},
};

/// Index pages read at once.
const READ_PAGES: usize = 32;
/// Clusters of a raw image between two looks at whether the caller is to die.
const SCAN_STEP: u32 = 1 << 16;

/// How an image is to be opened; what ADD_DELTA says.
#[derive(Clone, Copy)]
pub(crate) struct OpenArgs {
    /// `abi::FORMAT_*`.
    pub(crate) format: u32,
    /// For reading or for writing too.
    pub(crate) access: Access,
    /// What the image must look like.
    pub(crate) expect: Expect,
}

/// A delta of a device.
pub(crate) struct Delta {
    io: Arc<Io>,
    format: Format,
    args: OpenArgs,
    /// It may be written. Changed, once, under the device's control lock only.
    is_writable: Atomic<bool>,
    /// The in-use mark on disk is ours. Changed under the device's control lock only.
    is_marked: Atomic<bool>,
    /// No entry was used when the delta was opened, or closed last.
    is_empty: Atomic<bool>,
    /// Where the format extension is that it had when [`Self::mark_top`] marked it, and that holds as
    /// long as nothing has been written since; 0 for none.
    extension: Atomic<u32>,
    /// It could not be closed cleanly: it is left as it is until it has been opened anew.
    is_spoiled: Atomic<bool>,
    info: Arc<Info>,
    lock: Arc<ImageLock>,
}

impl Delta {
    /// Locks and judges an open image; writes nothing.
    pub(crate) fn open(io: Io, args: OpenArgs, images: &Arc<Images>, device: u32) -> Result<Self> {
        let is_block = io.as_file().kind() == Kind::Block;
        if is_block && args.access == Access::ReadWrite && args.format == abi::FORMAT_PLOOP1 {
            pr_err!("ploop{device}: a ploop1 image on a block device can only be read: it cannot grow\n");
            return Err(EINVAL);
        }
        let lock = images.lock(io.as_file(), args.access, device)?;
        Self::judge(io, args, Arc::new(lock, GFP_KERNEL)?, device)
    }

    /// Judges an image that is locked.
    fn judge(io: Io, args: OpenArgs, lock: Arc<ImageLock>, device: u32) -> Result<Self> {
        let format = Self::parse(&io, args, device)?;
        let info = Info::new(&io, &format, args.access)?;
        let delta = Self {
            io: Arc::new(io, GFP_KERNEL)?,
            format,
            args,
            is_writable: Atomic::new(args.access == Access::ReadWrite),
            is_marked: Atomic::new(false),
            is_empty: Atomic::new(false),
            extension: Atomic::new(0),
            is_spoiled: Atomic::new(false),
            info: Arc::new(info, GFP_KERNEL)?,
            lock,
        };
        if let Format::Ploop1(_) = delta.format {
            let usage = delta.scan_index(device, |_, _| Ok(()))?;
            delta.is_empty.store(usage.nr_used == 0, Relaxed);
        }
        Ok(delta)
    }

    /// Opens the image of this delta, which is only read, anew: somebody has written it.
    pub(crate) fn reopen(&self, device: u32) -> Result<Self> {
        let io = self.io.reopen(Access::Read)?;
        // Its own open file has the same locks; both only read.
        self.lock.reclaim(io.as_file());
        let args = OpenArgs {
            access: Access::Read,
            ..self.args
        };
        Self::judge(io, args, self.lock.clone(), device)
    }

    /// Opens the image of this delta, which is only read, for writing too. EBUSY if somebody else
    /// has it. Until [`Self::writer_closed`] this delta's reads go on.
    pub(crate) fn open_writer(&self, device: u32) -> Result<Self> {
        self.io.release();
        let io = match self.io.reopen(Access::ReadWrite) {
            // Another device has it open, which denies writers.
            Err(e) if e == ETXTBSY => return Err(EBUSY),
            io => io?,
        };
        self.lock.upgrade(self.io.as_file(), io.as_file())?;
        let args = OpenArgs {
            access: Access::ReadWrite,
            expect: Expect {
                accept_in_use: false,
                ..self.args.expect
            },
            ..self.args
        };
        Self::judge(io, args, self.lock.clone(), device).inspect_err(|_| self.writer_closed())
    }

    /// The delta of [`Self::open_writer`] writes no more.
    pub(crate) fn writer_closed(&self) {
        self.lock.reclaim(self.io.as_file());
    }

    fn parse(io: &Io, args: OpenArgs, device: u32) -> Result<Format> {
        let len = io.len()?;
        match args.format {
            abi::FORMAT_RAW => Raw::new(len, args.expect.cluster_log)
                .map(Format::Raw)
                .inspect_err(|_| pr_err!("ploop{device}: raw image: file length {len} or cluster size is not usable\n")),
            abi::FORMAT_PLOOP1 => {
                let mut buf = PageBuf::new(1)?;
                io.read(0, &mut buf, 0..1)?;
                let page = buf.page(0).ok_or(EINVAL)?;
                Ploop1::parse(page, len, args.expect)
                    .map(Format::Ploop1)
                    .map_err(|problem| refuse(device, problem))
            }
            _ => Err(EINVAL),
        }
    }

    /// The format.
    pub(crate) fn format(&self) -> &Format {
        &self.format
    }

    /// The io.
    pub(crate) fn io(&self) -> &Io {
        &self.io
    }

    /// What sysfs shows.
    pub(crate) fn info(&self) -> &Arc<Info> {
        &self.info
    }

    /// Whether the delta may be written.
    pub(crate) fn is_writable(&self) -> bool {
        self.is_writable.load(Relaxed)
    }

    /// From here on the delta, whose mark is cleared, is only read; others may read it too.
    /// Returns what sysfs shows of it then.
    pub(crate) fn seal(&self) -> Result<Arc<Info>> {
        self.is_writable.store(false, Relaxed);
        if sys::proc::is_wanted() {
            // libploop writes to lower images of running devices.
            self.io.release();
        }
        self.lock.downgrade(self.io.as_file());
        Info::new(&self.io, &self.format, Access::Read).and_then(|i| Ok(Arc::new(i, GFP_KERNEL)?))
    }

    /// The delta, if it is marked, could not be closed cleanly.
    pub(crate) fn spoil_marked(&self) {
        if self.is_marked.load(Relaxed) {
            self.is_spoiled.store(true, Relaxed);
        }
    }

    /// Whether the delta could not be closed cleanly.
    pub(crate) fn is_spoiled(&self) -> bool {
        self.is_spoiled.load(Relaxed)
    }

    /// Of a delta below the top: whether a snapshot or merge that failed has left it with an index on
    /// disk that lacks what it had in memory.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.is_writable() || self.is_spoiled()
    }

    /// Gives `sink` all clusters that it has, with their slots. Returns one past the highest slot.
    pub(crate) fn scan(
        &self,
        device: u32,
        mut sink: impl FnMut(Cluster, Range<u32>) -> Result,
    ) -> Result<u32> {
        match &self.format {
            Format::Ploop1(_) => Ok(self.scan_index(device, sink)?.end),
            Format::Raw(raw) => {
                let nr = raw.nr_clusters();
                for first in (0..nr).step_by(SCAN_STEP as usize) {
                    if sys::is_killed() {
                        return Err(EINTR);
                    }
                    let end = first.saturating_add(SCAN_STEP);
                    sink(Cluster(first), first..end.min(nr))?;
                }
                Ok(nr)
            }
        }
    }

    /// What matters of this delta to its neighbours.
    pub(crate) fn member(&self) -> Member {
        Member {
            kind: match &self.format {
                Format::Raw(_) => chain::Kind::Raw,
                Format::Ploop1(f) => chain::Kind::Ploop1(f.header().version),
            },
            cluster: self.format.cluster(),
            size_sectors: self.format.size_sectors(),
            is_writable: self.is_writable(),
        }
    }

    /// Reads the whole index and judges every entry. `sink` gets all clusters of the disk that are
    /// mapped, those that have slots in a row at once: entries behind its end are of a disk that was
    /// larger once, or was to be. The first bad entry ends it with EINVAL and one line in the log; a
    /// killed caller with EINTR.
    pub(crate) fn scan_index(
        &self,
        device: u32,
        mut sink: impl FnMut(Cluster, Range<u32>) -> Result,
    ) -> Result<Usage> {
        let Format::Ploop1(format) = &self.format else {
            return Err(EINVAL);
        };
        let header = *format.header();
        let length = Length::judge(&header, self.io.len()?).map_err(|p| refuse(device, p))?;
        super::check_memory(BatScan::memory_bytes(&header, length), device)?;
        let mut scan = BatScan::new(header, length).map_err(errno)?;
        let mut buf = PageBuf::new(READ_PAGES)?;
        let (nr_pages, end) = (header.nr_pages(), header.disk_clusters());
        let mut first = 0;
        while first < nr_pages {
            if sys::is_killed() {
                return Err(EINTR);
            }
            let nr = (nr_pages - first).min(READ_PAGES as u32) as usize;
            let pos = u64::from(first) * INDEX_PAGE_BYTES;
            if self.io.read(pos, &mut buf, 0..nr)? != nr * PAGE_BYTES {
                return Err(EIO);
            }
            for (page_no, idx) in (first..).zip(0..nr) {
                let slots = Ploop1::slots(buf.page(idx).ok_or(EINVAL)?)?;
                scan.runs(page_no, slots, |run| {
                    let at = run.first.map_err(|problem| refuse(device, problem))?;
                    match run.nr.min(end.saturating_sub(run.cluster.0)) {
                        0 => Ok(()),
                        nr => sink(run.cluster, at.0..at.0.saturating_add(nr)),
                    }
                })?;
            }
            first += nr as u32;
        }
        Ok(scan.usage())
    }

    /// Marks a writable ploop1 image in use, durably, before its first change (ordering rule 6).
    /// EINVAL if it is not the image any more that was opened.
    pub(crate) fn mark(&self, device: u32) -> Result {
        self.mark_with(device, false)
    }

    /// The same of what is to become or to go on as the top of a device: its format extension is kept
    /// as long as nothing is written. See [`Self::drop_extension`].
    pub(crate) fn mark_top(&self, device: u32) -> Result {
        self.mark_with(device, true)
    }

    fn mark_with(&self, device: u32, keeps_extension: bool) -> Result {
        if self.is_spoiled() {
            return Err(EIO);
        }
        if self.is_marked.load(Relaxed) || !self.is_writable() {
            return Ok(());
        }
        let now = Self::parse(&self.io, self.args, device)?;
        let mut buf = PageBuf::new(1)?; // Before what spoils it if it fails.
        match (&now, &self.format) {
            (Format::Ploop1(now), Format::Ploop1(then)) if now.is_same_layout(then) => {
                let kept = now.header().valid_extension().filter(|_| keeps_extension);
                self.extension.store(kept.map_or(0, |at| at.0), Relaxed);
                if kept.is_none() && now.header().ext_offset != 0 {
                    pr_notice!(
                        "ploop{device}: the image's format extension (dirty bitmap) is dropped\n"
                    );
                }
                self.read_first(&mut buf)?;
                self.is_marked.store(true, Relaxed);
                let written = self.put_header(&now.header().opened(), &mut buf);
                if written.is_err_and(is_no_space) {
                    self.is_marked.store(false, Relaxed);
                    return written;
                }
                // Whatever becomes of that, the mark may be on disk, or not. So it is not tried again,
                // and nothing is written to an image that may not be marked.
                written
                    .and_then(|()| self.io.sync())
                    .inspect_err(|_| self.spoil_marked())?;
                self.drop_surplus(now, &mut buf).inspect_err(|e| {
                    // Nothing is wrong with it if the caller was killed: what was dropped is nobody's.
                    if *e != EINTR || self.unmark_unused().is_err() {
                        self.spoil_marked();
                    }
                })?;
            }
            (Format::Raw(now), Format::Raw(then)) if now.size_sectors() == then.size_sectors() => {}
            (Format::Raw(_) | Format::Ploop1(_), Format::Raw(_) | Format::Ploop1(_)) => {
                pr_err!("ploop{device}: the image was changed while it was stopped\n");
                return Err(EINVAL);
            }
        }
        self.is_marked.store(true, Relaxed);
        Ok(())
    }

    /// Clears, durably, the entries behind the end of the disk: nobody reads what they name, their
    /// slots are free from here on, and a disk that grows must not find them. Of an image that is
    /// marked and has no users yet.
    fn drop_surplus(&self, format: &Ploop1, buf: &mut PageBuf) -> Result {
        let mut dropped = false;
        for page_no in format.header().surplus_pages() {
            if sys::is_killed() {
                return Err(EINTR);
            }
            let pos = u64::from(page_no) * INDEX_PAGE_BYTES;
            if with_memory(|| self.io.read(pos, buf, 0..1))? != PAGE_BYTES {
                return Err(EIO);
            }
            if format.clear_surplus(page_no, buf.page_mut(0).ok_or(EINVAL)?)? {
                self.io.write(pos, buf, 0..1)?;
                dropped = true;
            }
        }
        match dropped {
            true => self.io.sync(),
            false => Ok(()),
        }
    }

    /// Whether no entry was used when the delta was opened, or closed last.
    pub(crate) fn is_empty(&self) -> bool {
        self.is_empty.load(Relaxed)
    }

    /// Clears the mark. The caller has made data, index and length durable before; nothing may
    /// have failed (ordering rule 6).
    pub(crate) fn unmark(&self, is_empty: bool) -> Result {
        self.unmark_with(is_empty, None)
    }

    /// The same, with a format extension that is durable.
    pub(crate) fn unmark_with(&self, is_empty: bool, extension: Option<ImageCluster>) -> Result {
        if !self.is_marked.load(Relaxed) {
            return Ok(());
        }
        match &self.format {
            Format::Ploop1(format) => {
                let closed = format.header().opened().closed(is_empty);
                let closed = match extension {
                    Some(at) => closed.with_extension(at),
                    None => closed,
                };
                self.write_header(closed, &mut PageBuf::new(1)?)?;
            }
            Format::Raw(_) => self.io.sync()?,
        }
        self.is_marked.store(false, Relaxed);
        self.is_empty.store(is_empty, Relaxed);
        Ok(())
    }

    /// Closes a delta that was never started, or not since it was closed: no entry has changed.
    pub(crate) fn unmark_unused(&self) -> Result {
        self.unmark_with(self.is_empty.load(Relaxed), self.kept_extension())
    }

    /// Where the format extension is that still holds.
    pub(super) fn kept_extension(&self) -> Option<ImageCluster> {
        Some(ImageCluster(self.extension.load(Relaxed))).filter(|at| at.0 != 0)
    }

    /// The image is written from here on, which its format extension does not outlive.
    pub(crate) fn drop_extension(&self) {
        self.extension.store(0, Relaxed);
    }

    /// The same image as another format says it is: larger. It takes this one's place.
    fn with_format(&self, format: Format) -> Result<Self> {
        let copy = |flag: &Atomic<bool>| Atomic::new(flag.load(Relaxed));
        Ok(Self {
            io: self.io.clone(),
            format,
            args: self.args,
            is_writable: copy(&self.is_writable),
            is_marked: copy(&self.is_marked),
            is_empty: copy(&self.is_empty),
            extension: Atomic::new(self.extension.load(Relaxed)),
            is_spoiled: copy(&self.is_spoiled),
            info: self.info.clone(),
            lock: self.lock.clone(),
        })
    }

    /// The delta for a disk of `size_sectors`; what that takes of the file is up to the caller.
    /// EFBIG if the format cannot.
    pub(crate) fn resized(&self, size_sectors: u64) -> Result<Self> {
        let format = match &self.format {
            Format::Ploop1(format) => {
                let header = format.header().grown(size_sectors);
                Format::Ploop1(format.with_header(header.map_err(|_| EFBIG)?))
            }
            Format::Raw(raw) => {
                let len = size_sectors.checked_mul(SECTOR_BYTES).ok_or(EFBIG)?;
                Format::Raw(Raw::new(len, raw.cluster().log_sectors())?)
            }
        };
        self.with_format(format)
    }

    /// Slots that may hold data and that the index of a disk of `size_sectors` would need.
    pub(crate) fn in_the_way(&self, size_sectors: u64) -> Result<Range<ImageCluster>> {
        let first = |format: &Format| match format {
            Format::Ploop1(f) => f.header().first_data,
            Format::Raw(_) => ImageCluster(0),
        };
        let old = first(&self.format);
        let new = match self.format.size_sectors() < size_sectors {
            true => first(&self.resized(size_sectors)?.format),
            false => old,
        };
        Ok(old..new)
    }

    /// The delta, which nobody writes, made fit for a disk of `size_sectors`, if it is smaller. What
    /// is in the way must have been moved, durably. Unless a write or sync fails, a failure leaves an
    /// image of the old size.
    pub(crate) fn fit(&self, size_sectors: u64) -> Result<Option<Arc<Self>>> {
        if self.format.size_sectors() >= size_sectors {
            return Ok(None);
        }
        let new = Arc::new(self.resized(size_sectors)?, GFP_KERNEL)?;
        match (&self.format, &new.format) {
            (Format::Ploop1(old), Format::Ploop1(format)) => {
                let start = u64::from(old.header().nr_pages()) * INDEX_PAGE_BYTES;
                let end = format.header().zero_end(old.header());
                self.zero_index_tail(old, start..end)?;
                new.write_header(format.header().opened(), &mut PageBuf::new(1)?)?;
            }
            (Format::Raw(_), Format::Raw(_)) => {
                let len = size_sectors.checked_mul(SECTOR_BYTES).ok_or(EFBIG)?;
                // Of one that somebody has cut it would hide that data is gone.
                if self.io.len()? < self.format.size_sectors().saturating_mul(SECTOR_BYTES) {
                    return Err(EIO);
                }
                self.io.lengthen(len)?;
                self.io.sync()?;
            }
            (Format::Raw(_) | Format::Ploop1(_), Format::Raw(_) | Format::Ploop1(_)) => {
                return Err(EINVAL)
            }
        }
        Ok(Some(new))
    }

    /// Makes zero, durably, what no entry says between the last entry and the end of `rest`,
    /// which follows the last index page: entries may be there next.
    pub(crate) fn zero_index_tail(&self, format: &Ploop1, rest: Range<u64>) -> Result {
        let mut buf = PageBuf::new(1)?;
        let last = format.header().nr_pages() - 1;
        let pos = u64::from(last) * INDEX_PAGE_BYTES;
        if self.io.read(pos, &mut buf, 0..1)? != PAGE_BYTES {
            return Err(EIO);
        }
        format.clear_surplus(last, buf.page_mut(0).ok_or(EINVAL)?)?;
        self.io.write(pos, &buf, 0..1)?;
        self.zero_range(rest)?;
        self.io.sync()
    }

    /// Makes whole pages of the file read as zeros.
    pub(crate) fn zero_range(&self, range: Range<u64>) -> Result {
        if range.is_empty() {
            return Ok(());
        }
        match self.io.zero(range.clone()) {
            Err(e) if Errno::OpNotSupp.is(e) => {
                let buf = PageBuf::new(READ_PAGES)?;
                let mut pos = range.start;
                while pos < range.end {
                    let left = (range.end - pos).div_ceil(INDEX_PAGE_BYTES);
                    let nr = left.min(READ_PAGES as u64);
                    self.io.write(pos, &buf, 0..nr as usize)?;
                    pos += nr * INDEX_PAGE_BYTES;
                }
                Ok(())
            }
            other => other,
        }
    }

    /// Writes the header, leaving the entries of its page as they are on disk, and syncs; by way of
    /// `buf`, a page. Only while nothing writes the index.
    fn write_header(&self, header: Header, buf: &mut PageBuf) -> Result {
        self.read_first(buf)?;
        self.put_header(&header, buf)?;
        self.io.sync()
    }

    fn read_first(&self, buf: &mut PageBuf) -> Result {
        match self.io.read(0, buf, 0..1)? {
            PAGE_BYTES => Ok(()),
            _ => Err(EIO),
        }
    }

    /// Writes the first page, in `buf`, with another header.
    fn put_header(&self, header: &Header, buf: &mut PageBuf) -> Result {
        Ploop1::put_header(buf.page_mut(0).ok_or(EINVAL)?, header);
        self.io.write(0, buf, 0..1)
    }

    /// Composes index page `page_no` in page `idx` of `buf`; `lookup` gives the slot of each
    /// cluster that this delta's index names.
    pub(crate) fn encode_index(
        &self,
        page_no: u32,
        buf: &mut PageBuf,
        idx: usize,
        lookup: impl Fn(Cluster) -> Option<ImageCluster>,
    ) -> Result {
        match &self.format {
            Format::Ploop1(format) => {
                let page = buf.page_mut(idx).ok_or(EINVAL)?;
                format.encode_page(page_no, page, lookup)
            }
            // No index.
            Format::Raw(_) => Ok(()),
        }
    }

    /// Pages of the index; none of a raw delta.
    pub(crate) fn nr_index_pages(&self) -> u32 {
        match &self.format {
            Format::Ploop1(format) => format.header().nr_pages(),
            Format::Raw(_) => 0,
        }
    }

    /// Writes neighbouring index pages, from `page_no` on, from the pages `range` of `buf`.
    pub(crate) fn write_index(&self, page_no: u32, buf: &PageBuf, range: Range<usize>) -> Result {
        let pos = u64::from(page_no) * INDEX_PAGE_BYTES;
        self.io.write(pos, buf, range)
    }
}

/// The one log line of an image that is refused, and its errno.
fn refuse(device: u32, problem: Problem) -> Error {
    pr_err!("ploop{device}: image refused: {}\n", Shown(problem));
    errno(problem.into())
}

// SPDX-License-Identifier: GPL-2.0
//! What was written is noted here: in the image file of the top, for the write tracker, and on the
//! disk, for checkpoints.
//!
//! A write is noted after it has landed and before the guest is told. All memory is had when the
//! tracker or a checkpoint starts, so nothing is ever lost. Nobody waits: see [`Guarded`].
//!
//! Locks: `points` and the write tracker's reader are leaves but for the epoch, which is waited for
//! under them. Requests take neither.

use crate::{
    chain::{
        check_at_once,
        checkpoints::{Checkpoint, Stored},
    },
    sys::{
        blocks::Syncs,
        epoch::{Epoch, Guarded},
        prelude::*,
    },
};
use core::ops::Range;
use ploop_pure::{
    abi,
    track::{Answer, Grid, Reader, Words},
    units::SECTOR_BYTES,
};

/// Bits that requests set.
pub(crate) struct Bitmap {
    grid: Grid,
    words: KVVec<Atomic<u64>>,
}

impl Bitmap {
    /// All clear.
    pub(crate) fn new(grid: Grid) -> Result<Self> {
        check_at_once(bytes_of(grid))?;
        let nr = usize::try_from(grid.nr_words()).map_err(|_| ENOMEM)?;
        let mut words = KVVec::with_capacity(nr, GFP_KERNEL)?;
        for _ in 0..nr {
            words.push(Atomic::new(0), GFP_KERNEL)?;
        }
        Ok(Self { grid, words })
    }

    /// What the bits stand for.
    pub(crate) fn grid(&self) -> Grid {
        self.grid
    }

    fn mark(&self, bytes: &Range<u64>) {
        self.grid.mark(self, bytes);
    }

    fn clear(&self) {
        for word in &self.words {
            word.store(0, Relaxed);
        }
    }

    /// Bytes of granules that were written.
    pub(crate) fn dirty(&self) -> u64 {
        self.grid
            .count(self)
            .saturating_mul(self.grid.granularity())
    }

    /// Takes over what `old`, of a smaller disk and the same granularity, has noted.
    fn merge(&self, old: &Self) {
        for (idx, word) in old.words.iter().enumerate() {
            match word.load(Relaxed) {
                0 => {}
                ones => self.set(idx, ones),
            }
        }
    }
}

/// Bytes that the bits of a grid take.
pub(crate) fn bytes_of(grid: Grid) -> u64 {
    grid.nr_words().saturating_mul(size_of::<u64>() as u64)
}

impl Words for Bitmap {
    fn get(&self, idx: usize) -> u64 {
        self.words.get(idx).map_or(0, |word| word.load(Acquire))
    }

    fn set(&self, idx: usize, mask: u64) {
        if let Some(word) = self.words.get(idx) {
            change(word, |old| old | mask);
        }
    }

    fn take(&self, idx: usize, mask: u64) -> u64 {
        match self.words.get(idx) {
            Some(word) => change(word, |old| old & !mask) & mask,
            None => 0,
        }
    }
}

/// Exchanges a word for what `f` makes of it; returns what it was.
fn change(word: &Atomic<u64>, f: impl Fn(u64) -> u64) -> u64 {
    let mut old = word.load(Relaxed);
    loop {
        match word.cmpxchg(old, f(old), Full) {
            Ok(_) => return old,
            Err(now) => old = now,
        }
    }
}

/// The write tracker's notes.
struct Image {
    bitmap: Bitmap,
    /// Writes from this byte on need not be noted.
    end: Atomic<u64>,
}

/// A checkpoint.
pub(crate) struct Point {
    pub(crate) id: [u8; 16],
    pub(crate) bitmap: Bitmap,
    is_recording: Atomic<bool>,
}

impl Point {
    /// Whether it has started.
    pub(crate) fn is_recording(&self) -> bool {
        self.is_recording.load(Relaxed)
    }
}

impl Checkpoint for Point {
    fn id(&self) -> [u8; 16] {
        self.id
    }

    fn granularity(&self) -> u64 {
        self.bitmap.grid.granularity()
    }

    fn word(&self, idx: u64) -> u64 {
        usize::try_from(idx).map_or(0, |idx| self.bitmap.get(idx))
    }
}

/// The checkpoints there are.
pub(crate) type Points = KVec<Arc<Point>>;

/// The write tracker's reader, and where its notes are.
struct Tracker {
    image: Arc<Image>,
    reader: Reader,
}

/// What a device notes.
#[pin_data]
pub(crate) struct Tracks {
    image: Guarded<Image>,
    noted: Guarded<Points>,
    #[pin]
    tracker: Mutex<Option<KBox<Tracker>>>,
    #[pin]
    points: Mutex<Points>,
    /// Writes of requests that went through a file system and have ended.
    by_file: Atomic<u64>,
    /// Writes of requests that sync the file too.
    pub(super) fua: Syncs,
}

impl Tracks {
    /// Nothing is noted. Requests enter `epoch`.
    pub(crate) fn new(epoch: &Arc<Epoch>) -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                image: Guarded::new(epoch.clone()),
                noted: Guarded::new(epoch.clone()),
                tracker <- new_mutex!(None),
                points <- new_mutex!(KVec::new()),
                by_file: Atomic::new(0),
                fua: Syncs::new(),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Whether anybody wants to be told of what is written. Any context.
    #[inline]
    pub(super) fn is_noting(&self) -> bool {
        self.image.is_some() || self.noted.is_some()
    }

    /// Bytes of the top's image file were written. Any context.
    pub(super) fn image_written(&self, bytes: &Range<u64>) {
        self.image.with(|image| {
            if bytes.start < image.end.load(Acquire) {
                image.bitmap.mark(bytes);
            }
        });
    }

    /// A request has written through the file system, perhaps. Any context.
    pub(super) fn file_written(&self) {
        self.by_file.fetch_add(1, Release);
    }

    /// How many have.
    pub(super) fn nr_by_file(&self) -> u64 {
        self.by_file.load(Acquire)
    }

    /// What bytes of the disk hold has changed. Any context.
    pub(super) fn disk_written(&self, bytes: &Range<u64>) {
        self.noted.with(|points| {
            for point in points.iter().filter(|p| p.is_recording()) {
                point.bitmap.mark(bytes);
            }
        });
    }

    /// Whether the write tracker runs.
    pub(crate) fn is_tracking(&self) -> bool {
        self.image.is_some()
    }

    /// Starts the write tracker. EBUSY if it runs.
    pub(crate) fn start_tracker(&self, grid: Grid) -> Result {
        let mut tracker = self.tracker.lock();
        if tracker.is_some() {
            return Err(EBUSY);
        }
        let image = Image {
            bitmap: Bitmap::new(grid)?,
            end: Atomic::new(0),
        };
        let image = Arc::new(image, GFP_KERNEL)?;
        let new = Tracker {
            image: image.clone(),
            reader: Reader::default(),
        };
        *tracker = Some(KBox::new(new, GFP_KERNEL)?);
        self.image.set(Some(image));
        Ok(())
    }

    /// TRACK_SETPOS. EINVAL if the tracker does not run, or `end` is behind what was said before.
    pub(crate) fn set_tracked(&self, end: u64) -> Result {
        let mut tracker = self.tracker.lock();
        let tracker = tracker.as_deref_mut().ok_or(EINVAL)?;
        let Tracker { image, reader } = tracker;
        let is_reset = reader.set_end(end).ok_or(EINVAL)?;
        // Before the caller reads what it has announced.
        image.end.xchg(end, Full);
        if is_reset {
            image.bitmap.clear();
        }
        Ok(())
    }

    /// TRACK_READ of a file of which so many bytes are in use. EINVAL if the tracker does not run.
    pub(crate) fn read_tracker(&self, in_use: impl Fn() -> u64) -> Result<Answer> {
        let mut tracker = self.tracker.lock();
        let tracker = tracker.as_deref_mut().ok_or(EINVAL)?;
        let Tracker { image, reader } = tracker;
        Ok(reader.read(image.bitmap.grid, &image.bitmap, in_use))
    }

    /// TRACK_STOP: EBUSY if something was noted that was not read.
    pub(crate) fn stop_tracker(&self) -> Result {
        let mut tracker = self.tracker.lock();
        if tracker
            .as_ref()
            .is_some_and(|t| t.image.bitmap.dirty() != 0)
        {
            return Err(EBUSY);
        }
        self.image.set(None);
        *tracker = None;
        Ok(())
    }

    /// TRACK_ABORT: whether it ran.
    pub(crate) fn abort_tracker(&self) -> bool {
        let mut tracker = self.tracker.lock();
        self.image.set(None);
        tracker.take().is_some()
    }

    /// Starts a checkpoint, or with `at_snapshot` lets the next snapshot start it. EEXIST; EMFILE if
    /// there are too many.
    pub(crate) fn add_point(&self, id: [u8; 16], grid: Grid, at_snapshot: bool) -> Result {
        let mut points = self.points.lock();
        if points.iter().any(|p| p.id == id) {
            return Err(EEXIST);
        }
        if points.len() >= abi::CHECKPOINTS_MAX {
            return Err(EMFILE);
        }
        let point = Point {
            id,
            bitmap: Bitmap::new(grid)?,
            is_recording: Atomic::new(!at_snapshot),
        };
        let mut new = copied(&points)?;
        new.push(Arc::new(point, GFP_KERNEL)?, GFP_KERNEL)?;
        self.publish(&mut points, new)
    }

    /// Drops a checkpoint. ENOENT.
    pub(crate) fn drop_point(&self, id: [u8; 16]) -> Result {
        let mut points = self.points.lock();
        let mut new = copied(&points)?;
        new.retain(|p| p.id != id);
        if new.len() == points.len() {
            return Err(ENOENT);
        }
        self.publish(&mut points, new)
    }

    fn publish(&self, points: &mut Points, new: Points) -> Result {
        let noted = match new.is_empty() {
            true => None,
            false => Some(Arc::new(copied(&new)?, GFP_KERNEL)?),
        };
        self.noted.set(noted);
        *points = new;
        Ok(())
    }

    /// The checkpoint that comes as number `idx`.
    pub(crate) fn point_at(&self, idx: usize) -> Option<Arc<Point>> {
        self.points.lock().get(idx).cloned()
    }

    /// The checkpoint of that name.
    pub(crate) fn point(&self, id: [u8; 16]) -> Option<Arc<Point>> {
        self.points.lock().iter().find(|p| p.id == id).cloned()
    }

    /// The snapshot is taken: checkpoints that wait for it start. With the queue frozen.
    pub(crate) fn snapshot_taken(&self) {
        self.noted.with(|points| {
            for point in points.iter() {
                point.is_recording.store(true, Relaxed);
            }
        });
    }

    /// Bytes of memory that the checkpoints take on a disk of `bytes`.
    pub(crate) fn memory_for(&self, bytes: u64) -> u64 {
        let points = self.points.lock();
        let need = points.iter().map(|p| {
            let log = p.bitmap.grid.granularity().trailing_zeros();
            bytes_of(Grid::new(log, bytes))
        });
        need.fold(0, u64::saturating_add)
    }

    /// Makes room for a disk of `bytes`, before anybody can write behind its old end.
    pub(crate) fn grow_points(&self, bytes: u64) -> Result {
        let mut points = self.points.lock();
        let mut new = KVec::with_capacity(points.len(), GFP_KERNEL)?;
        for old in points.iter() {
            let log = old.bitmap.grid.granularity().trailing_zeros();
            let point = Point {
                id: old.id,
                bitmap: Bitmap::new(Grid::new(log, bytes))?,
                is_recording: Atomic::new(old.is_recording()),
            };
            new.push(Arc::new(point, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        let old = copied(&points)?;
        self.publish(&mut points, new)?;
        // From here on nobody notes anything there any more.
        for (new, old) in points.iter().zip(&old) {
            new.bitmap.merge(&old.bitmap);
        }
        Ok(())
    }

    /// Checkpoints of a disk of `bytes` that starts, from where it stopped.
    pub(crate) fn resume(&self, stored: KVec<Stored>, bytes: u64) -> Result {
        let mut new = KVec::with_capacity(stored.len(), GFP_KERNEL)?;
        for old in stored {
            let granularity = u64::from(old.granularity) * SECTOR_BYTES;
            let bitmap = Bitmap::new(Grid::new(granularity.trailing_zeros(), bytes))?;
            for (idx, ones) in old.words.iter().enumerate() {
                bitmap.set(idx, *ones);
            }
            let point = Point {
                id: old.id,
                bitmap,
                is_recording: Atomic::new(true),
            };
            new.push(Arc::new(point, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        self.publish(&mut self.points.lock(), new)
    }

    /// The device has stopped: the checkpoints there were. Nothing is noted any more.
    pub(crate) fn end(&self) -> Points {
        self.abort_tracker();
        self.fua.begin_anew();
        let mut points = self.points.lock();
        self.noted.set(None);
        core::mem::take(&mut *points)
    }
}

fn copied(points: &Points) -> Result<Points> {
    let mut new = KVec::with_capacity(points.len() + 1, GFP_KERNEL)?;
    for point in points {
        new.push(point.clone(), GFP_KERNEL)?;
    }
    Ok(new)
}

// SPDX-License-Identifier: GPL-2.0
//! Checkpoints of a device that rests: dirty bitmaps in the format extension of its top's image.
//!
//! They are written after all else when the image is closed, and hold only as long as its header
//! says so, which the mark of the next opening ends. So after a crash there are none.

use super::{check_at_once, check_memory, delta::Delta};
use crate::{
    format::Format,
    sys::{
        md5::Md5,
        pages::{PageBuf, PAGE_BYTES},
        prelude::*,
    },
};
use ploop_pure::{
    abi,
    layout::{
        extension::{self, Item, Part, Shape, DIGEST_FROM},
        ploop1::Header,
    },
    units::{ImageCluster, SECTOR_BYTES},
};
use zerocopy::{little_endian::U64, FromBytes};

/// Pages read or written at once.
const PAGES: usize = 32;

/// A checkpoint that is to be stored.
pub(crate) trait Checkpoint {
    /// Its name.
    fn id(&self) -> [u8; 16];
    /// Bytes that a bit stands for.
    fn granularity(&self) -> u64;
    /// Bits from `64 * idx` on.
    fn word(&self, idx: u64) -> u64;
}

/// A checkpoint that was stored.
pub(crate) struct Stored {
    pub(crate) id: [u8; 16],
    /// Sectors that a bit stands for: what CHECKPOINT_START accepts.
    pub(crate) granularity: u32,
    parts: KVVec<Part>,
    /// The bits.
    pub(crate) words: KVVec<u64>,
}

/// What the extension of an image has.
#[derive(Default)]
struct Found {
    points: KVec<Stored>,
    /// Parts that come belong to none of them.
    is_other: bool,
}

impl Found {
    fn add(&mut self, item: Item) -> Result {
        match item {
            Item::Bitmap { id, granularity } => {
                let bytes = u64::from(granularity) * SECTOR_BYTES;
                let bounds = u64::from(abi::GRANULARITY_MIN)..=u64::from(abi::GRANULARITY_MAX);
                self.is_other = !bounds.contains(&bytes)
                    || self.points.len() >= abi::CHECKPOINTS_MAX
                    || self.points.iter().any(|p| p.id == id);
                if !self.is_other {
                    let (parts, words) = (KVVec::new(), KVVec::new());
                    let new = Stored {
                        id,
                        granularity,
                        parts,
                        words,
                    };
                    self.points.push(new, GFP_KERNEL)?;
                }
            }
            Item::Part(part) if !self.is_other => {
                let point = self.points.last_mut().ok_or(EINVAL)?;
                point.parts.push(part, GFP_KERNEL)?;
            }
            Item::Part(_) | Item::Slot(_) | Item::Unknown { .. } => {}
        }
        Ok(())
    }
}

impl Delta {
    /// The checkpoints that the image had when it was marked, if nothing was written since. None of an
    /// extension that is not valid: no reason to refuse the image.
    pub(crate) fn stored_checkpoints(&self, device: u32) -> KVec<Stored> {
        let (Format::Ploop1(format), Some(at)) = (self.format(), self.kept_extension()) else {
            return KVec::new();
        };
        let header = format.header().with_extension(at);
        let found = self.read_extension(&header, at, device);
        found.unwrap_or_else(|e| {
            pr_notice!(
                "ploop{device}: the image's format extension cannot be read (errno {})\n",
                e.to_errno()
            );
            KVec::new()
        })
    }

    fn read_extension(
        &self,
        header: &Header,
        at: ImageCluster,
        device: u32,
    ) -> Result<KVec<Stored>> {
        let cluster = header.cluster;
        check_memory(cluster.bytes(), device)?;
        let mut bytes = KVVec::with_capacity(cluster.bytes() as usize, GFP_KERNEL)?;
        self.read_cluster(header, at, cluster.bytes(), |page| {
            Ok(bytes.extend_from_slice(page, GFP_KERNEL)?)
        })?;
        let mut digest = Md5::new();
        digest.update(bytes.get(DIGEST_FROM..).ok_or(EINVAL)?);
        let (mut found, mut added) = (Found::default(), Ok(()));
        extension::read(header, &bytes, digest.finish(), |item| {
            if added.is_ok() {
                added = found.add(item);
            }
        })
        .map_err(|extension::Invalid| EINVAL)?;
        added?;
        drop(bytes);
        // Of all of them: a small file can ask for a lot.
        let words = found.points.iter().map(|point| {
            let shape = Shape::new(header, point.granularity);
            shape.nr_words().saturating_add(point.parts.len() as u64)
        });
        let words = words.fold(0, u64::saturating_add);
        check_memory(words.saturating_mul(8), device)?;
        for point in &mut found.points {
            self.read_bits(header, point)?;
        }
        Ok(found.points)
    }

    fn read_bits(&self, header: &Header, point: &mut Stored) -> Result {
        let shape = Shape::new(header, point.granularity);
        if shape.nr_parts() != point.parts.len() as u64 {
            return Err(EINVAL);
        }
        let words = &mut point.words;
        check_at_once(shape.nr_words().saturating_mul(8))?;
        words.reserve(shape.nr_words() as usize, GFP_KERNEL)?;
        for (nr, part) in (0..).zip(&point.parts) {
            let range = shape.words(nr);
            match *part {
                Part::Clear => words.resize(range.end as usize, 0, GFP_KERNEL)?,
                Part::Set => words.resize(range.end as usize, u64::MAX, GFP_KERNEL)?,
                Part::At(at) => {
                    let (mut idx, bytes) = (range.start, (range.end - range.start) * 8);
                    self.read_cluster(header, at, bytes, |page| {
                        let page = <[U64]>::ref_from_bytes(page).map_err(|_| EINVAL)?;
                        for word in page {
                            if idx < range.end {
                                words.push(word.get(), GFP_KERNEL)?;
                                idx += 1;
                            }
                        }
                        Ok(())
                    })?;
                }
            }
        }
        // A disk that grows must not find bits behind its end.
        if let Some(last) = words.last_mut() {
            *last &= shape.mask(shape.nr_words() - 1);
        }
        Ok(())
    }

    /// Gives `sink` the pages of the first `bytes` bytes of a cluster.
    fn read_cluster(
        &self,
        header: &Header,
        at: ImageCluster,
        bytes: u64,
        mut sink: impl FnMut(&[u8; PAGE_BYTES]) -> Result,
    ) -> Result {
        let mut buf = PageBuf::new(PAGES)?;
        let (mut pos, mut left) = (
            header.cluster.offset(at),
            bytes.div_ceil(PAGE_BYTES as u64) as usize,
        );
        while left > 0 {
            let nr = left.min(PAGES);
            if self.io().read(pos, &mut buf, 0..nr)? != nr * PAGE_BYTES {
                return Err(EINVAL);
            }
            for idx in 0..nr {
                sink(buf.page(idx).ok_or(EINVAL)?)?;
            }
            pos += (nr * PAGE_BYTES) as u64;
            left -= nr;
        }
        Ok(())
    }

    /// Stores checkpoints behind what an image that is being closed has, durably; where, for
    /// [`Delta::unmark_with`]. Without them the image is closed all the same: whoever wants the next
    /// backup is told that it has to be a full one.
    pub(crate) fn store_checkpoints<'a, C: Checkpoint + 'a>(
        &self,
        points: impl Iterator<Item = &'a C>,
        device: u32,
    ) -> Option<ImageCluster> {
        let Format::Ploop1(format) = self.format() else {
            return None;
        };
        let mut points = points.peekable();
        points.peek()?;
        let len = self.io().len().ok()?;
        let stored = self.write_extension(format.header(), len, points, device);
        if let Err(e) = stored {
            pr_warn!(
                "ploop{device}: no checkpoints are kept in the image (errno {})\n",
                e.to_errno()
            );
            // What is left of them is cut off at the latest when the image is opened again.
            let _ = self.io().cut(len);
        }
        stored.ok()
    }

    fn write_extension<'a, C: Checkpoint + 'a>(
        &self,
        header: &Header,
        len: u64,
        points: impl Iterator<Item = &'a C>,
        device: u32,
    ) -> Result<ImageCluster> {
        let cluster = header.cluster;
        let slot = |nr: u64| Ok::<_, Error>(ImageCluster(u32::try_from(nr).map_err(|_| EFBIG)?));
        let first = len.div_ceil(cluster.bytes());
        let mut next = first + 1;
        let mut content = KVVec::new();
        let mut buf = PageBuf::new(PAGES)?;
        for point in points {
            let granularity = u32::try_from(point.granularity() / SECTOR_BYTES);
            let shape = Shape::new(header, granularity.map_err(|_| EINVAL)?);
            let end = DIGEST_FROM as u64 + content.len() as u64 + shape.feature_bytes();
            // The end of the list is as long as a head.
            if end + DIGEST_FROM as u64 > cluster.bytes() {
                pr_warn!("ploop{device}: a checkpoint is too fine to be kept in an image with such clusters\n");
                continue;
            }
            let part = |nr| {
                let part = shape.part(nr, slot(next)?, |idx| point.word(idx));
                if let Part::At(at) = part {
                    self.write_bits(header, at, shape, nr, point, &mut buf)?;
                    next += 1;
                }
                Ok::<_, Error>(part)
            };
            shape.write(point.id(), part, |bytes| {
                Ok(content.extend_from_slice(bytes, GFP_KERNEL)?)
            })?;
        }
        self.io().lengthen(next * cluster.bytes())?;
        let mut digest = Md5::new();
        digest.update(&content);
        let mut rest = cluster.bytes() as usize - DIGEST_FROM - content.len();
        while rest > 0 {
            let nr = rest.min(PAGE_BYTES);
            digest.update([0; PAGE_BYTES].get(..nr).ok_or(EINVAL)?);
            rest -= nr;
        }
        let head = extension::head(digest.finish());
        let mut pos = first * cluster.bytes();
        let mut bytes = Iterator::chain(head.iter(), &content).copied().peekable();
        while bytes.peek().is_some() {
            let page = buf.page_mut(0).ok_or(EINVAL)?;
            page.fill_with(|| bytes.next().unwrap_or(0));
            self.io().write(pos, &buf, 0..1)?;
            pos += PAGE_BYTES as u64;
        }
        self.io().sync()?;
        slot(first)
    }

    /// Writes a part of a bitmap, a whole cluster.
    fn write_bits(
        &self,
        header: &Header,
        at: ImageCluster,
        shape: Shape,
        part: u64,
        point: &impl Checkpoint,
        buf: &mut PageBuf,
    ) -> Result {
        let mut idx = shape.words(part).start;
        let mut pos = header.cluster.offset(at);
        let mut left = (header.cluster.bytes() / PAGE_BYTES as u64) as usize;
        while left > 0 {
            let nr = left.min(PAGES);
            for page in 0..nr {
                let page = buf.page_mut(page).ok_or(EINVAL)?;
                let words = <[U64]>::mut_from_bytes(page).map_err(|_| EINVAL)?;
                for word in words {
                    // Behind the last one the mask is empty.
                    *word = (point.word(idx) & shape.mask(idx)).into();
                    idx += 1;
                }
            }
            self.io().write(pos, buf, 0..nr)?;
            pos += (nr * PAGE_BYTES) as u64;
            left -= nr;
        }
        Ok(())
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Converting an image, or a chain of images, into a new one. The new image appears complete and
//! durable, or not at all; the old ones are only read.

use super::exec::runs;
use super::index::Index;
use super::{open, readable, sound, Format, Go, Progress};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use crate::size::human;
use nix::errno::Errno;
use nix::libc::off_t;
use nix::unistd::{lseek, Whence};
use ploop_pure::chain::{admit, Kind, Member};
use ploop_pure::layout::ploop1::{Header, Version, ENTRY_BYTES, HEADER_BYTES};
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster, SECTOR_BYTES};
use std::fs::{self, File};
use std::os::unix::fs::{fchown, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// Bytes read at once; divides or is a multiple of every cluster size.
const READ_BYTES: u64 = 1 << 20;
/// BAT entries kept before they are written: 1 MiB.
const ENTRIES_AT_ONCE: u32 = 1 << 18;

/// What is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A raw image.
    Raw(Space),
    /// A ploop1 image.
    Ploop1 {
        /// Its version.
        version: Version,
        /// Its cluster size, or that of the old one.
        cluster: Option<ClusterSize>,
        /// With [`Space::Full`] every cluster has a slot.
        space: Space,
    },
}

/// Makes `out`, which must not exist, of the disk that `images` are: a chain, base first, whose base
/// is of format `base`.
pub fn convert(
    images: &[PathBuf],
    base: Format,
    out: &Path,
    target: Target,
    progress: &mut dyn Progress,
) -> Result<()> {
    let opened = images.iter().map(|path| open(path, Access::Read));
    let opened: Vec<Image> = opened.collect::<Result<_>>()?;
    let locks = opened
        .iter()
        .map(|image| ImageLock::take(image.file(), image.path(), Use::Read));
    let _locks: Vec<ImageLock<'_>> = locks.collect::<Result<_>>()?;
    make(
        &mut Chain::new(&opened, base, State::Closed)?,
        out,
        target,
        progress,
    )
}

/// Puts a converted image in the place of `path`, which must not be part of a chain. There is space
/// for both needed meanwhile.
pub fn replace(
    path: &Path,
    format: Format,
    target: Target,
    progress: &mut dyn Progress,
) -> Result<()> {
    let path = &fs::canonicalize(path)
        .map_err(|e| Error::io(Code::Open, format!("cannot open {}", path.display()), e))?;
    let images = [open(path, Access::Write)?];
    let [image] = &images;
    let _lock = ImageLock::take(image.file(), path, Use::Write)?;
    let mut chain = Chain::new(&images, format, State::Closed)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.converted"));
    // Left behind by one that was killed: whoever converts the image has its locks.
    let _ = fs::remove_file(&new);
    make(&mut chain, &new, target, progress)?;
    let renamed = keep_owner(image, &new).and_then(|()| fs::rename(&new, path));
    if let Err(e) = renamed {
        let _ = fs::remove_file(&new);
        let what = format!(
            "cannot put the new image in the place of {}",
            path.display()
        );
        return Err(Error::io(Code::Create, what, e));
    }
    create::sync_dir(create::dir_of(path))
}

/// Gives the file `new` the owner and mode of `image`.
fn keep_owner(image: &Image, new: &Path) -> std::io::Result<()> {
    let (meta, file) = (image.file().metadata()?, File::open(new)?);
    let is_same = file.metadata()?;
    if (is_same.uid(), is_same.gid()) != (meta.uid(), meta.gid()) {
        fchown(&file, Some(meta.uid()), Some(meta.gid()))?;
    }
    file.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    file.sync_all()
}

fn make(
    chain: &mut Chain<'_>,
    out: &Path,
    target: Target,
    progress: &mut dyn Progress,
) -> Result<()> {
    let (cluster, size) = (chain.cluster, chain.size_bytes);
    let made = fill(out, target, cluster, size, |sink| {
        chain.walk(progress, sink)
    });
    progress.end();
    made
}

/// Who takes the bytes of a disk, by their place, in ascending order.
pub type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<()> + 'a;

/// Makes the image `out` of a disk of `size_bytes`, with clusters of `cluster` unless `target` says
/// otherwise. `walk` gives all of the disk that is not zeros to its sink.
pub fn fill(
    out: &Path,
    target: Target,
    cluster: ClusterSize,
    size_bytes: u64,
    walk: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    match target {
        Target::Raw(space) => create::make(out, |file| {
            create::lay_out_raw(file, size_bytes, space).map_err(|f| f.told(out))?;
            walk(&mut |start, bytes| write(out, file, bytes, start))
        }),
        Target::Ploop1 {
            version,
            cluster: other,
            space,
        } => {
            let header = header(out, version, other.unwrap_or(cluster), size_bytes)?;
            let end = create::end_of_full(out, &header)?;
            create::make(out, |file| {
                create::lay_out_ploop1(file, &header, end, space).map_err(|f| f.told(out))?;
                let mut new = Writer::new(out, file, header, space);
                walk(&mut |start, bytes| new.put(start, bytes))?;
                new.finish()
            })
        }
    }
}

fn header(out: &Path, version: Version, cluster: ClusterSize, size_bytes: u64) -> Result<Header> {
    Header::new(version, cluster, size_bytes / SECTOR_BYTES).map_err(|problem| {
        let what = format!(
            "{} cannot be a ploop1 version {} image of {} with {} clusters: {problem}",
            out.display(),
            version.number(),
            human(size_bytes),
            human(cluster.bytes()),
        );
        Error::new(Code::Param, what).hint(match version {
            Version::V1 => "version 1 ends at 2 TiB: use version 2",
            Version::V2 => "use larger clusters (-b)",
        })
    })
}

fn write(out: &Path, file: &File, bytes: &[u8], offset: u64) -> Result<()> {
    file.write_all_at(bytes, offset).map_err(|e| {
        let what = format!("cannot write {} at byte {offset}", out.display());
        Error::io(Code::Write, what, e)
    })
}

/// How the images are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody has them: each must be sound.
    Closed,
    /// A device only reads them: what it can read is good enough.
    Attached,
}

/// A delta that is read.
enum Delta<'a> {
    Raw(&'a Image),
    Ploop1(&'a Image, Index<'a>),
}

/// The disk that is read.
pub struct Chain<'a> {
    /// Top first.
    deltas: Vec<Delta<'a>>,
    cluster: ClusterSize,
    size_bytes: u64,
}

impl<'a> Chain<'a> {
    /// Of images, base first. The locks are up to the caller.
    pub fn new(images: &'a [Image], base: Format, state: State) -> Result<Self> {
        let (mut deltas, mut members) = (Vec::new(), Vec::<Member>::new());
        for (level, image) in images.iter().enumerate() {
            let is_raw = level == 0 && base == Format::Raw;
            let (delta, member) = if is_raw {
                raw(image, images.get(1))?
            } else {
                ploop1(image, level, state)?
            };
            if let Some(below) = members.last() {
                admit(level, below, &member).map_err(|misfit| {
                    let (at, on) = (image.path().display(), images[level - 1].path().display());
                    let what = format!("{at} does not fit on {on}: {misfit}");
                    Error::new(Code::Param, what).hint("the images are given base first")
                })?;
            }
            deltas.insert(0, delta);
            members.push(member);
        }
        let top = members
            .last()
            .ok_or_else(|| Error::new(Code::Param, "no image was given to convert"))?;
        Ok(Self {
            deltas,
            cluster: top.cluster,
            size_bytes: top.size_sectors * SECTOR_BYTES,
        })
    }

    /// Gives all of the disk that is not zeros to `sink`, by place and bytes.
    fn walk(&mut self, progress: &mut dyn Progress, sink: &mut Sink<'_>) -> Result<()> {
        progress.begin("converting", self.size_bytes);
        let mut buf = vec![0; READ_BYTES as usize];
        let mut at = 0;
        while at < self.size_bytes {
            if progress.go() != Go::On {
                let what = "interrupted: no new image was made";
                return Err(Error::new(Code::Aborted, what));
            }
            // All that is read at once begins and ends with a part of a cluster.
            let next = self.next_data(at)?.min(self.size_bytes);
            let next = (next - next % self.part_bytes()).max(at);
            progress.advance(next - at);
            at = next;
            let nr = (READ_BYTES - at % READ_BYTES).min(self.size_bytes - at);
            let bytes = &mut buf[..nr as usize];
            self.read(at, bytes)?;
            let mut run_at = at;
            for run in runs(bytes) {
                if run.iter().any(|b| *b != 0) {
                    sink(run_at, run)?;
                }
                run_at += run.len() as u64;
            }
            progress.advance(nr);
            at += nr;
        }
        Ok(())
    }

    fn part_bytes(&self) -> u64 {
        self.cluster.bytes().min(READ_BYTES)
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Cluster size of the top.
    pub fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// The first byte from `from` on that some delta has; the end of the disk, or behind it, if none.
    pub fn next_data(&mut self, from: u64) -> Result<u64> {
        let mut next = u64::MAX;
        for delta in &mut self.deltas {
            next = next.min(delta.next_data(from, self.cluster)?);
        }
        Ok(next.max(from))
    }

    /// Reads bytes of the disk.
    pub fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            // A piece is in one cluster.
            let left = (self.part_bytes() - at % self.part_bytes()) as usize;
            let (part, after) = rest.split_at_mut(left.min(rest.len()));
            let mut is_found = false;
            for delta in &mut self.deltas {
                is_found = delta.read(at, part, self.cluster)?;
                if is_found {
                    break;
                }
            }
            if !is_found {
                part.fill(0);
            }
            at += part.len() as u64;
            rest = after;
        }
        Ok(())
    }
}

fn raw<'a>(image: &'a Image, above: Option<&Image>) -> Result<(Delta<'a>, Member)> {
    let len = image.len_bytes()?;
    if len == 0 || len % SECTOR_BYTES != 0 {
        let at = image.path().display();
        let what = format!("{at} has {len} bytes: no disk is that long");
        return Err(Error::new(Code::NotAnImage, what));
    }
    // It has no cluster size of its own and takes that of the image above.
    let cluster = match above {
        Some(above) => above.good_header()?.0.cluster,
        None => ClusterSize::DEFAULT,
    };
    let member = Member {
        kind: Kind::Raw,
        cluster,
        size_sectors: len / SECTOR_BYTES,
        is_writable: false,
    };
    Ok((Delta::Raw(image), member))
}

fn ploop1(image: &Image, level: usize, state: State) -> Result<(Delta<'_>, Member)> {
    if !image.has_magic()? {
        let at = image.path().display();
        let what = format!("{at} is not a ploop1 image: its magic is missing");
        return Err(Error::new(Code::NotAnImage, what).hint(if level == 0 {
            "if it is a raw image, say so with --from raw; raw is never guessed"
        } else {
            "only the first image, the base, can be raw"
        }));
    }
    let report = match state {
        State::Closed => sound(image)?,
        State::Attached => readable(image)?,
    };
    let header = report.findings.header;
    // One that is attached may have entries behind the end of its disk, which nothing shows.
    let shown = header.without_surplus();
    let member = Member {
        kind: Kind::Ploop1(header.version),
        cluster: header.cluster,
        size_sectors: header.size_sectors,
        is_writable: false,
    };
    Ok((Delta::Ploop1(image, Index::new(image, shown)), member))
}

impl Delta<'_> {
    fn next_data(&mut self, from: u64, cluster: ClusterSize) -> Result<u64> {
        match self {
            Self::Ploop1(_, index) => {
                let Some((first, _)) = cluster.split(from) else {
                    return Ok(u64::MAX);
                };
                let next = index.next(first)?;
                Ok(next.map_or(u64::MAX, |(c, _)| cluster.guest_offset(c)))
            }
            Self::Raw(image) => {
                let offset = off_t::try_from(from).unwrap_or(off_t::MAX);
                match lseek(image.file(), offset, Whence::SeekData) {
                    Ok(at) => Ok(u64::try_from(at).unwrap_or(u64::MAX)),
                    // No data from here on.
                    Err(Errno::ENXIO) => Ok(u64::MAX),
                    // The file system cannot tell.
                    Err(_) => Ok(from),
                }
            }
        }
    }

    /// Reads bytes that are in one cluster, if this delta has them.
    fn read(&mut self, at: u64, bytes: &mut [u8], size: ClusterSize) -> Result<bool> {
        match self {
            Self::Ploop1(image, index) => {
                let Some((cluster, within)) = size.split(at) else {
                    return Ok(false);
                };
                let Some(slot) = index.get(cluster)? else {
                    return Ok(false);
                };
                image.read_at(bytes, size.offset(slot) + u64::from(within))?;
                Ok(true)
            }
            Self::Raw(image) => {
                // It may be smaller than those above.
                let left = image.len_bytes()?.saturating_sub(at);
                let nr = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
                let (has, lacks) = bytes.split_at_mut(nr);
                image.read_at(has, at)?;
                lacks.fill(0);
                Ok(true)
            }
        }
    }
}

/// A new ploop1 image, written in the order of its disk.
struct Writer<'a> {
    path: &'a Path,
    file: &'a File,
    header: Header,
    space: Space,
    /// First slot not in use.
    head: u32,
    /// The cluster written last.
    last: Option<Cluster>,
    /// Entries not written yet, and whose they are.
    entries: Vec<u8>,
    first: u32,
}

impl<'a> Writer<'a> {
    fn new(path: &'a Path, file: &'a File, header: Header, space: Space) -> Self {
        Self {
            path,
            file,
            header,
            space,
            head: header.first_data.0,
            last: None,
            entries: Vec::new(),
            first: 0,
        }
    }

    /// Writes bytes of the disk. Each call goes on behind the one before.
    fn put(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        let size = self.header.cluster;
        let (mut at, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let Some((cluster, within)) = size.split(at) else {
                return Ok(());
            };
            let left = usize::try_from(size.bytes() - u64::from(within)).unwrap_or(usize::MAX);
            let (part, after) = rest.split_at(left.min(rest.len()));
            let slot = self.slot(cluster)?;
            let offset = size.offset(slot) + u64::from(within);
            write(self.path, self.file, part, offset)?;
            at += part.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn slot(&mut self, cluster: Cluster) -> Result<ImageCluster> {
        if self.space == Space::Full {
            // All of it was checked to fit, and is in the BAT already.
            return Ok(ImageCluster(self.header.first_data.0 + cluster.0));
        }
        if self.last != Some(cluster) {
            self.last = Some(cluster);
            self.enter(cluster, ImageCluster(self.head))?;
            self.head += 1;
        }
        Ok(ImageCluster(self.head - 1))
    }

    fn enter(&mut self, cluster: Cluster, at: ImageCluster) -> Result<()> {
        if self.entries.is_empty() || cluster.0 - self.first >= ENTRIES_AT_ONCE {
            self.write_entries()?;
            self.first = cluster.0;
        }
        let place = (cluster.0 - self.first) as usize * ENTRY_BYTES as usize;
        self.entries.resize(place, 0);
        let entry = self.header.encode_entry(at);
        self.entries.extend(entry.to_le_bytes());
        Ok(())
    }

    fn write_entries(&mut self) -> Result<()> {
        let offset = HEADER_BYTES as u64 + u64::from(self.first) * ENTRY_BYTES;
        write(self.path, self.file, &self.entries, offset)?;
        self.entries.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.write_entries()?;
        let is_full = self.space == Space::Full;
        if !is_full {
            // The last cluster may have been written in part.
            let len = self.header.cluster.offset(ImageCluster(self.head));
            self.file.set_len(len).map_err(|e| {
                let what = format!("cannot set the length of {}", self.path.display());
                Error::io(Code::Truncate, what, e)
            })?;
        }
        let is_empty = !is_full && self.head == self.header.first_data.0;
        let header = self.header.closed(is_empty);
        write(self.path, self.file, header.encode().as_bytes(), 0)
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The image files of a disk: whether they are there and are what the descriptor says.

use super::{dir_join, Opened};
use crate::descriptor::guid::Guid;
use crate::descriptor::model::{ImageEntry, Record};
use crate::descriptor::{store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::image::{mend, Access, Image, Kind};
use crate::locks::{ImageLock, Use};
use ploop_pure::chain::{self, Member as Fit, Misfit};
use ploop_pure::layout::ploop1::{Header, Mark, Version};
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A delta with its file.
#[derive(Debug, Clone)]
pub struct Member {
    /// Name of the delta.
    pub guid: Guid,
    /// Its file.
    pub path: PathBuf,
    /// Header, unless it is raw.
    pub header: Option<Header>,
    /// Size of the disk in it.
    pub size_sectors: u64,
    /// What the file is now.
    pub record: Record,
    identity: (u64, u64),
    /// Names that the file has.
    links: u64,
}

impl Member {
    /// Looks at the file of a delta.
    pub fn read(path: &Path, guid: Guid, is_raw: bool) -> Result<Self> {
        let image = Image::open(path, Access::Read)?;
        let meta = image
            .file()
            .metadata()
            .map_err(|e| Error::io(Code::Stat, format!("cannot stat {}", path.display()), e))?;
        let len_bytes = image.len_bytes()?;
        let header = if is_raw {
            None
        } else {
            if image.kind() == Kind::Block || !image.has_magic()? {
                let what = format!(
                    "{} is not a ploop1 image: its magic is missing",
                    path.display()
                );
                return Err(Error::new(Code::NotAnImage, what));
            }
            Some(image.good_header()?.0)
        };
        Ok(Self {
            guid,
            path: path.to_owned(),
            header,
            size_sectors: header.map_or(len_bytes / SECTOR_BYTES, |h| h.size_sectors),
            record: Record {
                len_bytes,
                ino: meta.ino(),
                mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
            },
            identity: (meta.dev(), meta.ino()),
            links: meta.nlink(),
        })
    }

    /// Marked as in use: attached, or not closed cleanly.
    pub fn is_marked(&self) -> bool {
        self.header.is_some_and(|h| h.mark == Mark::InUse)
    }

    /// The version of what can be on top of it.
    pub fn version(&self) -> Version {
        self.header.map_or(Version::V2, |h| h.version)
    }

    /// The same with another size.
    pub(super) fn resized(&self, size_sectors: u64) -> Self {
        Self {
            size_sectors,
            ..self.clone()
        }
    }

    /// Whether it can build on `below`.
    pub fn must_fit_on(
        &self,
        below: &Self,
        cluster: ClusterSize,
    ) -> std::result::Result<(), Misfit> {
        chain::admit(1, &below.fit(cluster), &self.fit(cluster))
    }

    /// Whether an image with this header can build on it.
    pub fn must_be_built_on(
        &self,
        header: Header,
        cluster: ClusterSize,
    ) -> std::result::Result<(), Misfit> {
        let above = Fit {
            kind: chain::Kind::Ploop1(header.version),
            cluster: header.cluster,
            size_sectors: header.size_sectors,
            is_writable: true,
        };
        chain::admit(1, &self.fit(cluster), &above)
    }

    /// Refuses to let it be changed if the file has other names: other disks build on it, perhaps,
    /// as clones do.
    pub fn must_be_ours(&self) -> Result<()> {
        must_be_ours(&self.path, self.links)
    }

    fn fit(&self, cluster: ClusterSize) -> Fit {
        Fit {
            kind: self
                .header
                .map_or(chain::Kind::Raw, |h| chain::Kind::Ploop1(h.version)),
            cluster: self.header.map_or(cluster, |h| h.cluster),
            size_sectors: self.size_sectors,
            is_writable: false,
        }
    }
}

/// What is wrong with the files of a disk.
#[derive(Debug, Default)]
pub struct Problems {
    /// They contradict the descriptor, or each other.
    pub wrong: Vec<String>,
    /// A lower image is not what it was when it was closed.
    pub changed: Vec<String>,
}

/// Refuses to let the image `path`, whose file has so many names, be changed: disks build on it by
/// another one, perhaps, as clones do.
pub fn must_be_ours(path: &Path, links: u64) -> Result<()> {
    if links < 2 {
        return Ok(());
    }
    let what = format!(
        "{} is not changed: the file has {links} names (hard links), and disks that build on it by another \
         one would be damaged",
        path.display()
    );
    Err(Error::new(Code::InUse, what)
        .hint("'ploopctl convert' makes one image of a disk that shares its base with others"))
}

impl Opened {
    /// The file of a delta, if that is where it may be: in the directory of the descriptor.
    pub fn file(&self, image: &ImageEntry) -> Result<PathBuf> {
        own_file(&self.path, image)
    }

    /// The same of the image whose file the descriptor calls `name`.
    pub(super) fn file_named(&self, name: &str) -> Result<PathBuf> {
        let mut images = self.descriptor.disk().images.iter();
        let image = images.find(|i| i.file == name).ok_or_else(|| {
            let what = format!("{} does not name {name}", self.path.display());
            Error::new(Code::Descriptor, what)
        })?;
        self.file(image)
    }

    /// The delta `guid` with its file.
    pub fn member(&self, guid: Guid) -> Result<Member> {
        let image = self.descriptor.image(guid);
        let is_raw = self.is_raw(guid);
        Member::read(&self.file(image)?, guid, is_raw)
    }

    /// All deltas whose files can be looked at, and what is wrong with the others. Nobody can do
    /// without those that the top builds on, or itself.
    pub fn present(&self) -> Result<(Vec<Member>, Vec<String>)> {
        let disk = self.descriptor.disk();
        let needed = disk.chain(disk.top).unwrap_or_default();
        let (mut members, mut absent) = (Vec::new(), Vec::new());
        for image in &disk.images {
            match self.member(image.guid) {
                Ok(member) => members.push(member),
                Err(e) if needed.contains(&image.guid) => return Err(e),
                Err(e) => absent.push(format!(
                    "{}; left out, as the disk does not need it: 'ploopctl snapshot delete --uuid {}' removes it",
                    e.without_hint(),
                    image.guid
                )),
            }
        }
        Ok((members, absent))
    }

    pub(super) fn is_raw(&self, guid: Guid) -> bool {
        is_raw(&self.descriptor, guid)
    }

    /// The deltas from the base to `guid`, if they are what they should be. A lower one that
    /// changed since it was closed is let pass only with `force`.
    pub fn members(&self, guid: Guid, force: bool) -> Result<Vec<Member>> {
        let chain = self.descriptor.disk().chain(guid).unwrap_or_default();
        // What is wrong with another branch is in nobody's way.
        let (members, problems) = inspect(&self.path, &self.descriptor, Which::These(&chain));
        if let Some(first) = problems.wrong.first() {
            let what = format!("{} does not fit its images: {first}", self.path.display());
            return Err(Error::new(Code::Descriptor, what)
                .hint("'ploopctl descriptor validate' lists all that is wrong"));
        }
        if let (Some(first), false) = (problems.changed.first(), force) {
            let what = format!("a lower image changed since it was closed: {first}");
            return Err(Error::new(Code::Descriptor, what).hint(
                "what builds on it may be damaged by that. If the change was meant, or it is a copy, \
                 'ploopctl attach --force' of the disk takes it as it is",
            ));
        }
        Ok(chain
            .iter()
            .filter_map(|g| members.get(g).cloned())
            .collect())
    }

    /// Repairs the image of the top, which is to be built upon, if a crash left it in need of
    /// that; only what loses nothing. The lock keeps others from writing to it.
    pub(super) fn mend_top<'a>(
        &self,
        top: &Member,
        image: &'a Image,
    ) -> Result<(ImageLock<'a>, Vec<String>)> {
        let lock = ImageLock::take(image.file(), &top.path, Use::Write)?;
        let mended = match top.header {
            Some(_) => mend::lossless(image)?,
            None => Vec::new(),
        };
        Ok((lock, mended))
    }

    /// A name for a new image, in the directory of the descriptor.
    pub(super) fn new_file(&self) -> Result<String> {
        let base = self
            .descriptor
            .disk()
            .base()
            .map_or("root.hds", |b| b.file.as_str());
        let stem = match base.rsplit_once('.') {
            Some((stem, guid)) if guid.parse::<Guid>().is_ok() => stem,
            Some(_) | None => base,
        };
        let guid =
            Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?;
        Ok(format!("{stem}.{guid}"))
    }

    /// The file `name` of an operation, if it is there to be removed. One outside the directory of
    /// the descriptor is another disk's, whose descriptor was copied with the names in it; one that
    /// is also an image under another name stays.
    pub(super) fn removable(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = self.other_file(name);
        let failed = |e| Error::io(Code::Open, format!("cannot look at {}", path.display()), e);
        let real = match fs::canonicalize(&path) {
            Ok(real) => real,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let dir = fs::canonicalize(store::dir_of(&self.path)).map_err(failed)?;
        if !real.starts_with(&dir) {
            let what = format!(
                "{} is to be removed, but is not in the directory of the descriptor, {}",
                real.display(),
                dir.display()
            );
            return Err(Error::new(Code::Descriptor, what).hint(
                "it may be of the disk that this one is a copy of: correct the names in the descriptor",
            ));
        }
        let images = self.descriptor.disk().images.iter();
        let mut others = images.filter(|i| i.file != name);
        if others.any(|i| fs::canonicalize(dir_join(&self.path, i)).is_ok_and(|f| f == real)) {
            let what = format!("{name} is to be removed, but is another image of the disk, too");
            return Err(Error::new(Code::Descriptor, what));
        }
        Ok(Some(path))
    }

    /// The path of a file that the descriptor does not have, or not any more.
    pub(super) fn other_file(&self, file: &str) -> PathBuf {
        store::dir_of(&self.path).join(file)
    }
}

fn is_raw(descriptor: &Descriptor, guid: Guid) -> bool {
    let disk = descriptor.disk();
    disk.is_raw && disk.base().is_some_and(|b| b.guid == guid)
}

/// The file of a delta of the descriptor `path`; one outside its directory is refused.
fn own_file(path: &Path, image: &ImageEntry) -> Result<PathBuf> {
    let file = dir_join(path, image);
    let at = file.display();
    let failed = |e| {
        let what = format!("the image {at} of {} cannot be found", image.guid);
        Error::io(Code::Open, what, e)
            .hint("restore it from a backup, or see 'ploopctl descriptor validate'")
    };
    let real = fs::canonicalize(&file).map_err(failed)?;
    let dir = fs::canonicalize(store::dir_of(path)).map_err(failed)?;
    if !real.starts_with(&dir) {
        let what = format!(
            "the image {} of {} is not in the directory of the descriptor, {}",
            real.display(),
            image.guid,
            dir.display()
        );
        return Err(
            Error::new(Code::Descriptor, what).hint("move it there, or attach the images by name")
        );
    }
    Ok(real)
}

/// Which images are looked at.
#[derive(Debug, Clone, Copy)]
pub enum Which<'a> {
    /// All.
    All,
    /// Those of these deltas.
    These(&'a [Guid]),
}

impl Which<'_> {
    fn has(self, guid: Guid) -> bool {
        match self {
            Self::All => true,
            Self::These(guids) => guids.contains(&guid),
        }
    }
}

/// Reads images and compares them with the descriptor and each other.
pub fn inspect(
    path: &Path,
    descriptor: &Descriptor,
    which: Which<'_>,
) -> (BTreeMap<Guid, Member>, Problems) {
    let disk = descriptor.disk();
    let mut members = BTreeMap::new();
    let mut found = Problems::default();
    let mut identities: BTreeMap<(u64, u64), &str> = BTreeMap::new();
    for image in disk.images.iter().filter(|i| which.has(i.guid)) {
        let read = own_file(path, image)
            .and_then(|file| Member::read(&file, image.guid, is_raw(descriptor, image.guid)));
        let member = match read {
            Ok(member) => member,
            Err(e) => {
                found.wrong.push(e.without_hint());
                continue;
            }
        };
        if let Some(other) = identities.insert(member.identity, &image.file) {
            let what = format!("{other} and {} are one and the same file", image.file);
            found.wrong.push(what);
        }
        if let Some(header) = member.header.filter(|h| h.cluster != disk.cluster) {
            found.wrong.push(format!(
                "{} has clusters of {} sectors, the descriptor says {}",
                image.file,
                header.cluster.sectors(),
                disk.cluster.sectors()
            ));
        }
        if image.guid != disk.top {
            found.changed.extend(
                image
                    .record
                    .and_then(|r| difference(image, r, member.record)),
            );
        }
        members.insert(image.guid, member);
    }
    if found.wrong.is_empty() {
        fits(descriptor, &members, &mut found.wrong);
    }
    (members, found)
}

fn difference(image: &ImageEntry, then: Record, now: Record) -> Option<String> {
    if then.len_bytes != now.len_bytes {
        let what = format!(
            "{} has {} bytes, it had {}",
            image.file, now.len_bytes, then.len_bytes
        );
        return Some(what);
    }
    (!then.is_same_state(now)).then(|| {
        let seconds = (now.mtime_ns - then.mtime_ns) / 1_000_000_000;
        let inode = if then.ino == now.ino {
            ""
        } else {
            ", and is another file"
        };
        format!(
            "{} was written to {seconds} s after it was closed{inode}",
            image.file
        )
    })
}

/// Whether each delta fits on its parent, and the size of the top is that of the disk.
fn fits(descriptor: &Descriptor, members: &BTreeMap<Guid, Member>, wrong: &mut Vec<String>) {
    let disk = descriptor.disk();
    for shot in &disk.shots {
        let (Some(below), Some(member)) = (members.get(&shot.parent), members.get(&shot.guid))
        else {
            continue;
        };
        if let Err(misfit) = member.must_fit_on(below, disk.cluster) {
            let (file, on) = (
                &descriptor.image(shot.guid).file,
                &descriptor.image(shot.parent).file,
            );
            wrong.push(format!("{file} does not fit on {on}: {misfit}"));
        }
    }
    let Some(top) = members.get(&disk.top) else {
        return;
    };
    // Old tools round the size in the header up to whole clusters.
    let rounded = disk
        .size_sectors
        .next_multiple_of(disk.cluster.sectors().into());
    if top.size_sectors != disk.size_sectors && top.size_sectors != rounded {
        wrong.push(format!(
            "the top, {}, is a disk of {} sectors, the descriptor says {}; 'ploopctl recover' takes the image's word",
            descriptor.top().file,
            top.size_sectors,
            disk.size_sectors
        ));
    }
}

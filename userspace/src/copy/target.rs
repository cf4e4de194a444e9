// SPDX-License-Identifier: GPL-2.0
//! The files that become the copy: under a temporary name beside the final one until everything is
//! there and durable, removed if it does not come to that.

use super::wire::{FileInfo, Format, Part, PIECE_MAX};
use crate::descriptor::{self, store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use nix::errno::Errno;
use nix::fcntl::{fallocate, renameat2, FallocateFlags, Flock, FlockArg, RenameFlags, AT_FDCWD};
use nix::libc;
use ploop_pure::layout::ploop1::{Header, HEADER_BYTES};
use ploop_pure::units::{ImageCluster, INDEX_PAGE_BYTES, SECTOR_BYTES};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// Behind the final name while it is not complete: nobody else calls a file so, as what a killed
/// receiver has left is removed.
pub const SUFFIX: &str = ".ploopctl-partial";

/// A copy that is being made; removed when dropped before [`Target::publish`].
pub struct Target {
    path: PathBuf,
    partial: PathBuf,
    is_directory: bool,
    files: Vec<TargetFile>,
    descriptor: Option<String>,
    is_published: bool,
    /// Says that somebody works on the partial copy.
    _lock: Option<Flock<File>>,
}

struct TargetFile {
    path: PathBuf,
    file: File,
    info: FileInfo,
    len_bytes: u64,
    /// Nothing was written from there on: it is zeros.
    fresh_from: u64,
}

/// The refusal of a name that is taken.
fn exists(path: &Path) -> Error {
    let what = format!("{} exists already and is left as it is", path.display());
    Error::new(Code::Create, what).hint("choose another name, or remove it first")
}

impl Target {
    /// Begins a copy at `path`, which must not exist. What a killed receiver has left is removed.
    pub fn begin(path: &Path, is_directory: bool) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        if path.file_name().is_none() {
            let what = format!("{} does not end in a name", path.display());
            return Err(Error::new(Code::Param, what));
        }
        let partial = store::beside(path, SUFFIX);
        remove_left(&partial)?;
        let failed = |e: io::Error| {
            let what = format!("cannot create {}", partial.display());
            let is_absent = e.kind() == io::ErrorKind::NotFound;
            let error = Error::io(Code::Create, what, e);
            if is_absent {
                error.hint("its directory does not exist")
            } else {
                error
            }
        };
        if is_directory {
            DirBuilder::new()
                .mode(0o700)
                .create(&partial)
                .map_err(failed)?;
        } else {
            create(&partial).map_err(failed)?;
        }
        let file = File::open(&partial).map_err(failed)?;
        // Another receiver may have come between, and have it.
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Some(lock),
            Err((_, Errno::EWOULDBLOCK)) => return Err(somebody_elses(&partial)),
            // A file system without locks.
            Err(_) => None,
        };
        // From here on it is removed.
        Ok(Self {
            path: path.to_owned(),
            partial,
            is_directory,
            files: Vec::new(),
            descriptor: None,
            is_published: false,
            _lock: lock,
        })
    }

    /// The next file.
    pub fn add(&mut self, info: FileInfo) -> Result<()> {
        let path = if self.is_directory {
            check_name(&info.name)?;
            self.partial.join(&info.name)
        } else {
            self.partial.clone()
        };
        let open = if self.is_directory {
            create(&path)
        } else {
            OpenOptions::new().read(true).write(true).open(&path)
        };
        let file = open
            .map_err(|e| Error::io(Code::Create, format!("cannot create {}", path.display()), e))?;
        let len_bytes = info.len_bytes;
        self.files.push(TargetFile {
            path,
            file,
            info,
            len_bytes: 0,
            fresh_from: 0,
        });
        self.length(self.files.len() as u32 - 1, len_bytes)
    }

    fn file(&mut self, file: u32) -> Result<&mut TargetFile> {
        let found = self.files.get_mut(file as usize);
        found.ok_or_else(|| super::wire::damaged(format!("there is no file {file}")))
    }

    /// The file, if the part lies within it.
    fn within(&mut self, part: Part) -> Result<&mut TargetFile> {
        let file = self.file(part.file)?;
        match part.offset.checked_add(part.len) {
            Some(end) if end <= file.len_bytes => Ok(file),
            Some(_) | None => Err(super::wire::damaged("a piece lies outside of its file")),
        }
    }

    /// Gives a file this length.
    pub fn length(&mut self, file: u32, len_bytes: u64) -> Result<()> {
        let file = self.file(file)?;
        file.file.set_len(len_bytes).map_err(|e| {
            let what = format!(
                "cannot give {} a length of {len_bytes}",
                file.path.display()
            );
            full(Error::io(Code::Truncate, what, e))
        })?;
        file.len_bytes = len_bytes;
        file.fresh_from = file.fresh_from.min(len_bytes);
        Ok(())
    }

    /// Puts bytes into a file.
    pub fn write(&mut self, part: Part, bytes: &[u8]) -> Result<()> {
        self.within(part)?.write(part.offset, bytes)
    }

    /// Makes a part of a file zeros that take space.
    pub fn zero(&mut self, part: Part) -> Result<()> {
        self.within(part)?
            .clear(part, FallocateFlags::FALLOC_FL_ZERO_RANGE)
    }

    /// Makes a part of a file a hole, or zeros where there are none.
    pub fn hole(&mut self, part: Part) -> Result<()> {
        let file = self.within(part)?;
        if part.offset >= file.fresh_from {
            return Ok(());
        }
        file.clear(part, FallocateFlags::FALLOC_FL_PUNCH_HOLE)
    }

    /// Takes the descriptor.
    pub fn describe(&mut self, text: String) {
        self.descriptor = Some(text);
    }

    /// Makes everything so far durable.
    pub fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(|f| {
            f.file.sync_all().map_err(|e| {
                full(Error::io(
                    Code::Fsync,
                    format!("cannot write {}", f.path.display()),
                    e,
                ))
            })
        })
    }

    /// The same for a stream that does not say what its image is. Nothing was sent of zeros at the
    /// end: the file is made as long as its table says.
    pub fn publish_found(mut self) -> Result<()> {
        let file = self.file(0)?;
        let image = Image::open(&file.path, Access::Read)?;
        if image.has_magic()? {
            let raw = image.header()?.map_err(|p| image.not_an_image(p))?;
            let header = raw.0;
            let need = named_end(&image, &header)?;
            file.info = FileInfo {
                format: Format::Ploop1(header.version.number()),
                cluster_sectors: header.cluster.sectors(),
                size_sectors: header.size_sectors,
                ..file.info.clone()
            };
            if need > file.len_bytes {
                self.length(0, need)?;
            }
        }
        self.publish()
    }

    /// Judges what came, and gives it its final name.
    pub fn publish(mut self) -> Result<()> {
        for file in &self.files {
            file.judge()?;
        }
        if let Some(text) = &self.descriptor {
            let at = self.partial.join(descriptor::NAME);
            let said = Descriptor::parse(&at, text)?;
            for image in &said.disk().images {
                if !self.files.iter().any(|f| f.info.name == image.file) {
                    let what = format!("the descriptor names {}, which did not come", image.file);
                    return Err(Error::new(Code::Protocol, what));
                }
            }
            store::write(&at, text)?;
        }
        for file in self.files.iter().filter(|f| !f.info.is_top) {
            // The descriptor has a record of it.
            let since = Duration::from_nanos(u64::try_from(file.info.mtime_ns).unwrap_or(0));
            let _ = file.file.set_modified(UNIX_EPOCH + since);
        }
        self.sync()?;
        if self.is_directory {
            store::sync_dir(&self.partial.join(descriptor::NAME))?;
        }
        self.rename()?;
        self.is_published = true;
        let path = self.path.display();
        store::sync_dir(&self.path).map_err(|e| {
            let what = format!(
                "{path} is there, but may be gone if the host crashes now: {}",
                e.without_hint()
            );
            Error::new(e.code(), what)
                .hint("the sender takes the copy for failed: do not use both disks")
        })
    }

    fn rename(&self) -> Result<()> {
        let (from, to) = (self.partial.as_path(), self.path.as_path());
        let failed = |e: io::Error| {
            let what = format!("cannot rename {} to {}", from.display(), to.display());
            Error::io(Code::Rename, what, e)
        };
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => Err(exists(to)),
            // A file system that cannot refuse by itself.
            Err(Errno::EINVAL | Errno::ENOSYS) if to.symlink_metadata().is_ok() => Err(exists(to)),
            Err(Errno::EINVAL | Errno::ENOSYS) => fs::rename(from, to).map_err(failed),
            Err(e) => Err(failed(e.into())),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.is_published {
            let _ = if self.is_directory {
                remove_flat(&self.partial)
            } else {
                fs::remove_file(&self.partial)
            };
        }
    }
}

impl TargetFile {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|e| {
            let what = format!("cannot write {} at byte {offset}", self.path.display());
            full(Error::io(Code::Write, what, e))
        })?;
        self.fresh_from = self
            .fresh_from
            .max(offset.saturating_add(bytes.len() as u64));
        Ok(())
    }

    fn clear(&mut self, part: Part, how: FallocateFlags) -> Result<()> {
        if part.len == 0 {
            return Ok(());
        }
        let too_far = |_| super::wire::damaged("a piece lies beyond any file");
        let start = libc::off_t::try_from(part.offset).map_err(too_far)?;
        let len = libc::off_t::try_from(part.len).map_err(too_far)?;
        match fallocate(
            &self.file,
            how | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            start,
            len,
        ) {
            Ok(()) => {
                self.fresh_from = self.fresh_from.max(part.offset.saturating_add(part.len));
                Ok(())
            }
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                let zeros = vec![0; PIECE_MAX.min(part.len as usize)];
                let mut at = part.offset;
                let end = part.offset.saturating_add(part.len);
                while at < end {
                    let step = zeros.len().min((end - at) as usize);
                    self.write(at, &zeros[..step])?;
                    at += step as u64;
                }
                Ok(())
            }
            Err(e) => {
                let what = format!("cannot write zeros to {}", self.path.display());
                Err(full(Error::io(Code::Allocate, what, e)))
            }
        }
    }

    /// What came must be what was announced, and an image without damage.
    fn judge(&self) -> Result<()> {
        let not_as_said = || {
            let what = "the image that came is not the one that was announced";
            Error::new(Code::Protocol, what)
        };
        let Format::Ploop1(version) = self.info.format else {
            // OpenVZ's streams do not say how large it is.
            let said = self.info.size_sectors;
            return match said == 0 || self.len_bytes / SECTOR_BYTES == said {
                true => Ok(()),
                false => Err(not_as_said()),
            };
        };
        let image = Image::open(&self.path, Access::Read)?;
        let report = image.check()?.map_err(|p| image.not_an_image(p))?;
        let header = &report.findings.header;
        let is_it = header.version.number() == version
            && header.cluster.sectors() == self.info.cluster_sectors
            && header.size_sectors == self.info.size_sectors;
        if !is_it {
            return Err(not_as_said());
        }
        if report.findings.cure().is_some() {
            let first = report
                .problems
                .first()
                .map_or("damaged".to_owned(), |p| p.to_string());
            let what = format!("the image that came is not sound: {first}");
            return Err(Error::new(Code::Damaged, what)
                .hint("is the image of the sender sound? 'ploopctl check' tells"));
        }
        Ok(())
    }
}

/// Where the last slot ends that the table names, as far as a sound one can reach.
fn named_end(image: &Image, header: &Header) -> Result<u64> {
    let mut last = header.first_data.0;
    let most = header.first_data.0.saturating_add(header.nr_entries);
    let most = most.min(header.slots_max());
    let mut page = [0; INDEX_PAGE_BYTES as usize];
    for nr in 0..header.nr_pages() {
        image.read_at(&mut page, u64::from(nr) * INDEX_PAGE_BYTES)?;
        let skip = if nr == 0 { HEADER_BYTES } else { 0 };
        for entry in page[skip..].chunks_exact(4) {
            let entry = super::wire::le32(entry, 0);
            if let Ok(Some(at)) = header.decode_entry(entry) {
                last = last.max(at.0.saturating_add(1));
            }
        }
    }
    Ok(header.cluster.offset(ImageCluster(last.min(most))))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Only what can be nothing but a file in this directory.
fn check_name(name: &str) -> Result<()> {
    let is_plain = !name.contains(['/', '\0', '\n']) && !["", ".", ".."].contains(&name);
    if !is_plain || name.starts_with(descriptor::NAME) {
        return Err(super::wire::damaged(format!(
            "no file can be called '{name}'"
        )));
    }
    Ok(())
}

fn somebody_elses(partial: &Path) -> Error {
    let what = format!(
        "{} exists: somebody is making the same copy",
        partial.display()
    );
    Error::new(Code::InUse, what).hint("wait for it, or choose another name")
}

/// Removes what a receiver left that was killed: a file, or a directory with nothing but files.
fn remove_left(partial: &Path) -> Result<()> {
    let Ok(meta) = partial.symlink_metadata() else {
        return Ok(());
    };
    let at = partial.display();
    let failed = |e| {
        let error = Error::io(Code::Unlink, format!("cannot remove {at}"), e);
        error.hint("is it what an earlier copy has left? If so, remove it")
    };
    if !meta.is_dir() && !meta.is_file() {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(partial);
    let file = open.map_err(|e| Error::io(Code::Open, format!("cannot open {at}"), e))?;
    let _lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => return Err(somebody_elses(partial)),
        locked => locked,
    };
    if meta.is_dir() {
        remove_flat(partial).map_err(failed)
    } else {
        fs::remove_file(partial).map_err(failed)
    }
}

/// Removes a directory, unless there is another in it.
fn remove_flat(dir: &Path) -> io::Result<()> {
    let entries: Vec<_> = fs::read_dir(dir)?.collect::<io::Result<_>>()?;
    for entry in &entries {
        if entry.file_type()?.is_dir() {
            return Err(Errno::ENOTEMPTY.into());
        }
    }
    for entry in &entries {
        fs::remove_file(entry.path())?;
    }
    fs::remove_dir(dir)
}

fn full(e: Error) -> Error {
    if e.is_no_space() {
        return e.hint("there is no space left where the copy goes; what came of it is removed");
    }
    e
}

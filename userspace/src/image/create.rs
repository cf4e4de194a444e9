// SPDX-License-Identifier: GPL-2.0
//! New image files. One appears under its name complete and durable, or not at all: it is written
//! without a name where the file system can do that, else under a hidden one.

use crate::error::{Code, Error, Result};
use crate::signals::Quiet;
use nix::errno::Errno;
use nix::fcntl::{fallocate, FallocateFlags, AT_FDCWD};
use nix::libc;
use nix::unistd::linkat;
use ploop_pure::layout::ploop1::{Header, Version, HEADER_BYTES};
use ploop_pure::units::{ClusterSize, ImageCluster};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// BAT entries written at once: 1 MiB.
const ENTRIES_AT_ONCE: u64 = 1 << 18;

/// Whether the space of a new image is allocated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// As it is written.
    Thin,
    /// All of it.
    Full,
}

/// Makes a raw image of `size_bytes`.
pub fn raw(path: &Path, size_bytes: u64, space: Space) -> Result<()> {
    make(path, |file| {
        lay_out_raw(file, size_bytes, space).map_err(|f| f.told(path))
    })
}

/// Gives a new raw image its length.
pub(crate) fn lay_out_raw(file: &File, size_bytes: u64, space: Space) -> Step {
    match space {
        Space::Thin => lengthen(file, size_bytes),
        Space::Full => allocate(file, size_bytes),
    }
}

/// Makes a ploop1 image with this header, which is that of an empty one.
pub fn ploop1(path: &Path, header: Header, space: Space) -> Result<()> {
    let end = end_of_full(path, &header)?;
    make(path, |file| {
        let written = match space {
            Space::Thin => header,
            Space::Full => header.closed(false),
        };
        lay_out_ploop1(file, &header, end, space)
            .and_then(|()| write(file, written.encode().as_bytes(), 0))
            .map_err(|f| f.told(path))
    })
}

/// Gives a new ploop1 image its space, all but the header; `end` is that of [`end_of_full`].
pub(crate) fn lay_out_ploop1(file: &File, header: &Header, end: u32, space: Space) -> Step {
    let cluster = header.cluster;
    let data = cluster.offset(header.first_data);
    match space {
        // The BAT is allocated, so that writing it later does not need space. Where that cannot
        // be done it is sparse.
        Space::Thin => match allocate(file, data) {
            Err(e) if is_unsupported(&e) => lengthen(file, data),
            done => done,
        },
        Space::Full => {
            allocate(file, cluster.offset(ImageCluster(end)))?;
            write_full_bat(file, header)
        }
    }
}

/// One past the last slot of the image when every cluster has one. Entries must be able to name
/// it: else the last clusters of the disk could never be written.
pub(crate) fn end_of_full(path: &Path, header: &Header) -> Result<u32> {
    let end = header.first_data.0.checked_add(header.nr_entries);
    end.filter(|end| *end <= header.slots_max()).ok_or_else(|| {
        let at = path.display();
        let what = format!("{at} could never be filled: its entries cannot name so many clusters");
        Error::new(Code::Param, what).hint(match header.version {
            Version::V1 => "leave room for the table below 2 TiB, or use version 2",
            Version::V2 => "use larger clusters (-b) or a smaller size",
        })
    })
}

/// A cluster size from bytes.
pub fn cluster_size(bytes: u64) -> Result<ClusterSize> {
    let log = bytes.is_power_of_two().then(|| bytes.trailing_zeros());
    log.and_then(|log| ClusterSize::from_log(log.checked_sub(9)?))
        .ok_or_else(|| {
            let what = format!("a cluster size of {bytes} bytes is not possible");
            Error::new(Code::Param, what).hint("use a power of two from 32K to 64M; 1M is usual")
        })
}

fn write_full_bat(file: &File, header: &Header) -> Step {
    let (mut next, end) = (0, u64::from(header.nr_entries));
    while next < end {
        let chunk = next..end.min(next + ENTRIES_AT_ONCE);
        let mut bytes = Vec::with_capacity((chunk.end - chunk.start) as usize * 4);
        for cluster in chunk.clone() {
            // Below `nr_entries`, and the sum was checked.
            let at = ImageCluster(header.first_data.0 + cluster as u32);
            bytes.extend(header.encode_entry(at).to_le_bytes());
        }
        write(file, &bytes, HEADER_BYTES as u64 + next * 4)?;
        next = chunk.end;
    }
    Ok(())
}

/// A step that failed: its code, what it did, and why.
#[derive(Debug)]
pub(crate) struct Failure(Code, &'static str, io::Error);
type Step = std::result::Result<(), Failure>;

impl Failure {
    /// As the error about the new image `path`.
    pub(crate) fn told(self, path: &Path) -> Error {
        let what = format!("cannot {} {}", self.1, path.display());
        Error::io(self.0, what, self.2)
    }
}

fn is_unsupported(f: &Failure) -> bool {
    matches!(
        f.2.raw_os_error().map(Errno::from_raw),
        Some(Errno::EOPNOTSUPP | Errno::ENOSYS)
    )
}

fn lengthen(file: &File, len: u64) -> Step {
    file.set_len(len)
        .map_err(|e| Failure(Code::Truncate, "set the length of", e))
}

fn allocate(file: &File, len: u64) -> Step {
    allocate_from(file, 0, len)
        .map_err(|e| Failure(Code::Allocate, "allocate the space of", e.into()))
}

/// Allocates the space from byte `start` to `end` of a file, and lengthens it.
pub(crate) fn allocate_from(file: &File, start: u64, end: u64) -> nix::Result<()> {
    let len = libc::off_t::try_from(end.saturating_sub(start)).map_err(|_| Errno::EFBIG)?;
    let start = libc::off_t::try_from(start).map_err(|_| Errno::EFBIG)?;
    fallocate(file, FallocateFlags::empty(), start, len)
}

fn write(file: &File, bytes: &[u8], offset: u64) -> Step {
    file.write_all_at(bytes, offset)
        .map_err(|e| Failure(Code::Write, "write", e))
}

/// Makes the file `path` by `fill`.
pub(crate) fn make(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let at = path.display();
    if path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    let name = path.file_name().ok_or_else(|| {
        Error::new(
            Code::Param,
            format!("{at} does not end in the name of a file"),
        )
    })?;
    let dir = dir_of(path);
    let nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(dir);
    let complete = |file: &File| -> Result<()> {
        fill(file)?;
        file.sync_all()
            .map_err(|e| Error::io(Code::Fsync, format!("cannot write {at}"), e))
    };
    match nameless {
        Ok(file) => {
            complete(&file)?;
            let own = format!("/proc/self/fd/{}", file.as_raw_fd());
            let flag = nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW;
            linkat(AT_FDCWD, own.as_str(), AT_FDCWD, path, flag).map_err(|e| naming(path, e))?;
        }
        Err(e) if lacks_tmpfile(&e) => {
            let _quiet = Quiet::begin();
            let hidden = Hidden::new(dir, name).map_err(|e| creating(path, e))?;
            complete(&hidden.file)?;
            hidden.publish(path)?;
        }
        Err(e) => return Err(creating(path, e)),
    }
    // The name must be durable too: what is told as a failure leaves no file.
    sync_dir(dir).inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(Code::Fsync, format!("cannot sync {}", dir.display()), e))
}

/// The directory that a path is in.
pub(crate) fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

pub(crate) fn exists(path: &Path) -> Error {
    Error::new(
        Code::Create,
        format!("{} exists already and is left as it is", path.display()),
    )
    .hint("choose another name, or remove it first")
}

fn creating(path: &Path, e: io::Error) -> Error {
    let is_absent = e.kind() == io::ErrorKind::NotFound;
    let error = Error::io(Code::Create, format!("cannot create {}", path.display()), e);
    if is_absent {
        error.hint("its directory does not exist")
    } else {
        error
    }
}

fn naming(path: &Path, e: Errno) -> Error {
    match e {
        Errno::EEXIST => exists(path),
        e => creating(path, e.into()),
    }
}

/// EISDIR is the answer of kernels, and EINVAL of some file systems, that do not know O_TMPFILE.
fn lacks_tmpfile(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error().map(Errno::from_raw),
        Some(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOSYS)
    )
}

/// A file under a hidden name, removed when dropped unless it was published.
struct Hidden {
    file: File,
    path: Option<PathBuf>,
}

impl Hidden {
    fn new(dir: &Path, name: &std::ffi::OsStr) -> io::Result<Self> {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let path = dir.join(hidden);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self {
            file,
            path: Some(path),
        })
    }

    /// Gives it its name, which must not exist: by a link, or where there are none, by renaming.
    fn publish(mut self, path: &Path) -> Result<()> {
        let Some(hidden) = &self.path else {
            return Ok(());
        };
        match fs::hard_link(hidden, path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
            Err(_) => {
                let flag = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
                nix::fcntl::renameat2(AT_FDCWD, hidden, AT_FDCWD, path, flag)
                    .map_err(|e| naming(path, e))?;
                self.path = None;
                Ok(())
            }
        }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The way of file systems without O_TMPFILE.
    #[test]
    fn a_hidden_file_is_published_or_removed() {
        let dir = std::env::temp_dir().join(format!("ploopctl-hidden-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("image");
        let names = || fs::read_dir(&dir).unwrap().count();
        drop(Hidden::new(&dir, "image".as_ref()).unwrap());
        assert_eq!(names(), 0);
        let hidden = Hidden::new(&dir, "image".as_ref()).unwrap();
        hidden.file.write_all_at(b"x", 0).unwrap();
        hidden.publish(&path).unwrap();
        assert_eq!(
            (names(), fs::read(&path).unwrap().as_slice()),
            (1, &b"x"[..])
        );
        let again = Hidden::new(&dir, "image".as_ref()).unwrap();
        assert_eq!(again.publish(&path).unwrap_err().code(), Code::Create);
        assert_eq!(names(), 1);
        fs::remove_dir_all(&dir).unwrap();
    }
}

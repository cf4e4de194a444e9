// SPDX-License-Identifier: GPL-2.0
//! The locks of a descriptor, those of both generations of OpenVZ's tools: an exclusive flock on
//! `DiskDescriptor.xml.lck`, and byte locks on the image of the base.
//!
//! They are taken in that order, before the descriptor is read. On the base everybody takes a read
//! lock on the byte and looks, before and after, whether anybody else has one; of two at once
//! both may see the other, so they let go and try again. The bytes are apart from QEMU's, and the
//! locks belong to the open file, not the process.

use crate::error::{Code, Error, Result};
use crate::locks;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, Flock, FlockArg};
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Byte of the base that everybody holds who works on the disk.
const SHORT: i64 = 205;
/// Byte of the base for work that takes long; nobody waits for it.
const LONG: i64 = 305;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// How long to wait for others.
#[derive(Debug, Clone, Copy)]
pub struct Patience(pub Duration);

/// The exclusive lock of the file beside the descriptor.
#[derive(Debug)]
pub struct FileLock(#[allow(dead_code)] Option<Flock<File>>);

impl FileLock {
    /// Takes the lock of the descriptor `path`. `None` inside where there is no writing.
    pub fn take(path: &Path, patience: Patience) -> Result<Self> {
        let at = super::store::beside(path, ".lck");
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&at);
        let mut file = match open {
            Ok(file) => file,
            // Nobody can change a disk there.
            Err(e) if e.raw_os_error() == Some(libc::EROFS) => return Ok(Self(None)),
            Err(e) => {
                let what = format!("cannot open the lock file {}", at.display());
                let error = Error::io(Code::Lock, what, e);
                return Err(error
                    .hint("does the directory of the descriptor exist, and may you write to it?"));
            }
        };
        let mut wait = Wait::new(patience);
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self(Some(lock))),
                Err((again, Errno::EAGAIN | Errno::EINTR)) => file = again,
                Err((_, e)) => {
                    return Err(Error::io(
                        Code::Lock,
                        format!("cannot lock {}", at.display()),
                        e,
                    ));
                }
            }
            if !wait.pause() {
                return Err(wait.over(path, locks::find_holder(&file)));
            }
        }
    }
}

/// The byte locks of the base.
#[derive(Debug)]
pub struct BaseLock(Option<File>);

impl BaseLock {
    /// Whether there was nothing to lock.
    pub fn is_nothing(&self) -> bool {
        self.0.is_none()
    }

    /// Takes them on the base `image` of the descriptor `path`. A file system without such locks
    /// is as good as one without other users. A base that other disks have, too, nobody changes, and
    /// who works on one of them must not keep others from the rest.
    pub fn take(path: &Path, image: &Path, is_long: bool, patience: Patience) -> Result<Self> {
        let Some(file) = own_file(path, image) else {
            return Ok(Self(None));
        };
        let mut wait = Wait::new(patience);
        while !take_byte(&file, SHORT).map_err(|e| failed(image, e))? {
            if !wait.pause() {
                return Err(wait.over(path, locks::find_holder(&file)));
            }
        }
        if is_long && !take_byte(&file, LONG).map_err(|e| failed(image, e))? {
            let holder = locks::find_holder(&file).map_or(String::new(), |h| format!(" by {h}"));
            let what = format!("a long operation on {} is going on{holder}", path.display());
            return Err(Error::new(Code::LockTimeout, what).hint("try again when it is over"));
        }
        Ok(Self(Some(file)))
    }
}

/// The base `image` of the descriptor `path`, if it is a file in its directory with no other name. What
/// is anything else is not touched, and refused later; so is what may not be read.
fn own_file(path: &Path, image: &Path) -> Option<File> {
    let dir = fs::canonicalize(super::store::dir_of(path)).ok()?;
    let real = fs::canonicalize(image).ok()?;
    if !real.starts_with(dir) || !fs::metadata(&real).ok()?.is_file() {
        return None;
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(real)
        .ok()?;
    let meta = file.metadata().ok()?;
    (meta.is_file() && meta.nlink() == 1).then_some(file)
}

fn failed(image: &Path, e: Errno) -> Error {
    Error::io(Code::Lock, format!("cannot lock {}", image.display()), e)
}

/// Whether we have the byte now, alone.
fn take_byte(file: &File, byte: i64) -> nix::Result<bool> {
    let set = |kind| match fcntl(file, FcntlArg::F_OFD_SETLK(&locks::range(kind, byte, 1))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(e),
    };
    let is_free = || {
        let mut lock = locks::range(libc::F_WRLCK, byte, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok::<_, Errno>(i32::from(lock.l_type) == libc::F_UNLCK)
    };
    let take = || Ok(is_free()? && set(libc::F_RDLCK)? && is_free()?);
    match take() {
        Ok(true) => Ok(true),
        Ok(false) => {
            set(libc::F_UNLCK)?;
            Ok(false)
        }
        Err(e) if locks::is_unsupported(e) => Ok(true),
        Err(e) => Err(e),
    }
}

struct Wait {
    patience: Patience,
    end: Instant,
    next: Duration,
}

impl Wait {
    fn new(patience: Patience) -> Self {
        Self {
            patience,
            end: Instant::now() + patience.0,
            next: FIRST_PAUSE,
        }
    }

    /// Waits a little; no if it was long enough.
    fn pause(&mut self) -> bool {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        // Two that hindered each other come back at different times.
        let spread = Duration::from_millis(u64::from(std::process::id() % 16));
        sleep((self.next + spread).min(left));
        self.next = LONGEST_PAUSE.min(self.next * 2);
        true
    }

    fn over(&self, path: &Path, holder: Option<String>) -> Error {
        let holder = holder.unwrap_or_else(|| "another program".to_owned());
        let seconds = self.patience.0.as_secs();
        let what = format!("{} is locked by {holder}", path.display());
        Error::new(Code::LockTimeout, what).hint(format!(
            "it was waited for {}; --wait SECONDS waits longer",
            crate::output::count(seconds, "second")
        ))
    }
}

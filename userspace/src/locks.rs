// SPDX-License-Identifier: GPL-2.0
//! Locks: QEMU's protocol on an image file, and the file that makes attach and detach take turns.
//!
//! A user of an image says what it does by read locks on single bytes: on `100 + p` that it
//! exercises permission `p`, on `200 + p` that it bears no other exercising it. Everybody takes
//! its own locks first and then looks for contradicting ones, so that of two at once at least
//! one notices. The kernel module does the same on an open file of its own.

use crate::error::{Code, Error, Result};
use crate::output;
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, Flock, FlockArg};
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

const HOLD: i64 = 100;
const DENY: i64 = 200;
/// QEMU's BLK_PERM_CONSISTENT_READ.
const READ: i64 = 0;
/// QEMU's BLK_PERM_WRITE.
const WRITE: i64 = 1;
/// QEMU's BLK_PERM_RESIZE.
const RESIZE: i64 = 3;
/// All permissions: bytes 100 to 107 and 200 to 207.
const PERMS: i64 = 8;

/// What an image is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reading; no one may write.
    Read,
    /// Writing; no one else may write.
    Write,
}

impl Use {
    fn holds(self) -> &'static [i64] {
        match self {
            Self::Read => &[READ],
            Self::Write => &[READ, WRITE, RESIZE],
        }
    }

    fn denies(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// Locks held through an open image file, released when dropped.
#[derive(Debug)]
pub struct ImageLock<'a>(BorrowedFd<'a>);

impl<'a> ImageLock<'a> {
    /// Takes the locks for `usage` of the image `path`, open as `file`, or says who is in the
    /// way. A file system without such locks is as good as one without other users.
    pub fn take(file: &'a File, path: &Path, usage: Use) -> Result<Self> {
        let lock = Self(file.as_fd());
        let own = usage.holds().iter().map(|p| HOLD + p);
        for byte in own.chain(usage.denies().iter().map(|p| DENY + p)) {
            match lock.set(libc::F_RDLCK, byte, 1) {
                Ok(()) => {}
                Err(e) if is_unsupported(e) => return Ok(lock),
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(in_use(file, path, None)),
                Err(e) => {
                    let what = format!("cannot lock {}", path.display());
                    return Err(Error::io(Code::Lock, what, e));
                }
            }
        }
        let against = usage.holds().iter().map(|p| DENY + p);
        for byte in against.chain(usage.denies().iter().map(|p| HOLD + p)) {
            match lock.conflict(byte) {
                Ok(None) => {}
                Ok(Some(pid)) => return Err(in_use(file, path, pid)),
                Err(e) if is_unsupported(e) => return Ok(lock),
                Err(e) => {
                    let what = format!("cannot query the locks of {}", path.display());
                    return Err(Error::io(Code::Lock, what, e));
                }
            }
        }
        Ok(lock)
    }

    fn set(&self, kind: i32, start: i64, len: i64) -> nix::Result<()> {
        fcntl(self.0, FcntlArg::F_OFD_SETLK(&range(kind, start, len))).map(drop)
    }

    /// Whether another open file holds `byte`, and the process if that is known.
    fn conflict(&self, byte: i64) -> nix::Result<Option<Option<i32>>> {
        let mut lock = range(libc::F_WRLCK, byte, 1);
        fcntl(self.0, FcntlArg::F_OFD_GETLK(&mut lock))?;
        let is_free = i32::from(lock.l_type) == libc::F_UNLCK;
        Ok((!is_free).then(|| Some(lock.l_pid).filter(|pid| *pid > 0)))
    }
}

impl Drop for ImageLock<'_> {
    fn drop(&mut self) {
        // Failing to release what is ours is not possible, nor of interest: closing does it too.
        let _ = self.set(libc::F_UNLCK, HOLD, PERMS);
        let _ = self.set(libc::F_UNLCK, DENY, PERMS);
    }
}

/// The lock of `len` bytes from `start`.
pub fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        // F_RDLCK, F_WRLCK, F_UNLCK and SEEK_SET are 0 to 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// Whether the file system has no such locks.
pub fn is_unsupported(e: Errno) -> bool {
    matches!(
        e,
        Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS
    )
}

fn in_use(file: &File, path: &Path, pid: Option<i32>) -> Error {
    let holder = pid.map(process).or_else(|| find_holder(file));
    let holder = holder.map_or(String::new(), |h| format!(", {h}"));
    let what = format!(
        "{} is in use by another program (QEMU lock){holder}",
        path.display()
    );
    Error::new(Code::InUse, what).hint("end that program or detach the image there first")
}

/// `process 12 (name)`.
pub fn process(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim_end()),
        Err(_) => format!("process {pid}"),
    }
}

/// The other process that has this file open with locks on it, as far as /proc tells.
pub fn find_holder(file: &File) -> Option<String> {
    let meta = file.metadata().ok()?;
    let own = std::process::id();
    for pid in pids().filter(|p| u32::try_from(*p) != Ok(own)) {
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for fd in fds.flatten() {
            let same = fs::metadata(fd.path())
                .is_ok_and(|m| m.ino() == meta.ino() && m.dev() == meta.dev());
            let info = Path::new("/proc").join(pid.to_string()).join("fdinfo");
            if same
                && fs::read_to_string(info.join(fd.file_name()))
                    .is_ok_and(|text| text.lines().any(|l| l.starts_with("lock:")))
            {
                return Some(process(pid));
            }
        }
    }
    None
}

/// The processes there are.
pub fn pids() -> impl Iterator<Item = i32> {
    let dirs = fs::read_dir("/proc").into_iter().flatten().flatten();
    dirs.filter_map(|d| d.file_name().to_str()?.parse().ok())
}

/// How long a turn of somebody else is waited for.
const TURN_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const TURN_PAUSE: Duration = Duration::from_millis(50);

/// Makes the commands that change devices take turns; released when dropped.
#[derive(Debug)]
pub struct Turn {
    /// `None` where /run cannot be written: then the user has to take care.
    _lock: Option<Flock<File>>,
}

impl Turn {
    /// Waits for the turn; but not for somebody who has had it for long, as with an image that does not
    /// answer: what must not be done twice has locks of its own.
    pub fn take() -> Result<Self> {
        let path = Path::new("/run/ploopctl.lock");
        let open = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path);
        let Ok(mut file) = open else {
            return Ok(Self { _lock: None });
        };
        let give_up = Instant::now() + TURN_PATIENCE;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { _lock: Some(lock) }),
                Err((_, Errno::EAGAIN)) if Instant::now() >= give_up => {
                    output::note(
                        "note: another ploopctl is at work since a minute; going on beside it",
                    );
                    return Ok(Self { _lock: None });
                }
                Err((again, Errno::EAGAIN)) => {
                    sleep(TURN_PAUSE);
                    file = again;
                }
                Err((again, Errno::EINTR)) => file = again,
                Err((_, e)) => {
                    let what = format!("cannot lock {}", path.display());
                    return Err(Error::io(Code::Lock, what, e));
                }
            }
        }
    }
}

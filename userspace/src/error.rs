// SPDX-License-Identifier: GPL-2.0
//! The one error of the tool: what was asked and what is wrong, what to do, and the exit code.

use std::fmt;
use std::io;

/// Exit codes: stable, and those of OpenVZ's ploop. This enum is the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// An image cannot be created; it may exist already.
    Create = 1,
    /// A device or the control device cannot be opened.
    DeviceOpen = 2,
    /// The kernel refused an operation.
    DeviceIoctl = 3,
    /// An image cannot be opened.
    Open = 4,
    /// Out of memory.
    Memory = 5,
    /// Reading an image failed.
    Read = 6,
    /// Writing an image, or the answer, failed.
    Write = 7,
    /// What sysfs says cannot be read or understood.
    Sysfs = 9,
    /// Not a valid image, or one that cannot be repaired.
    NotAnImage = 11,
    /// Another system call failed.
    System = 12,
    /// A stream between two machines is damaged, cut or foreign, or the other side gave up.
    Protocol = 13,
    /// A device does not get quiet.
    Loops = 14,
    /// The length or kind of a file cannot be found out.
    Stat = 15,
    /// Data cannot be made durable.
    Fsync = 16,
    /// The device is in use: mounted, held or open. Of an image: marked in use amid a conversion.
    Busy = 17,
    /// A lock cannot be taken.
    Lock = 18,
    /// A file cannot be lengthened or cut.
    Truncate = 19,
    /// Space cannot be allocated.
    Allocate = 20,
    /// A file system cannot be mounted.
    Mount = 21,
    /// A file system cannot be unmounted.
    Umount = 22,
    /// Somebody else keeps a lock for too long.
    LockTimeout = 23,
    /// A file cannot be renamed.
    Rename = 28,
    /// The user ended it; what was done is sound.
    Aborted = 29,
    /// A file cannot be removed.
    Unlink = 35,
    /// The image is in use by a device or another program.
    InUse = 37,
    /// An argument makes no sense.
    Param = 38,
    /// Not a valid descriptor, or not what its images are.
    Descriptor = 39,
    /// The device or image is not attached.
    NotAttached = 40,
    /// The image is damaged and can be repaired; of a file system: it is damaged.
    Damaged = 41,
    /// There is no such snapshot.
    NoSnapshot = 43,
    /// What was written since a backup is not known: the next one has to be full.
    NoCheckpoint = 45,
}

impl Code {
    /// All codes with their meaning, as `--help` shows them.
    pub const ALL: [(Self, &'static str); 31] = [
        (Self::Create, "image cannot be created, or exists already"),
        (
            Self::DeviceOpen,
            "device or /dev/ploop-control cannot be opened",
        ),
        (Self::DeviceIoctl, "the kernel refused an operation"),
        (Self::Open, "image cannot be opened"),
        (Self::Memory, "out of memory"),
        (Self::Read, "reading failed"),
        (Self::Write, "writing failed"),
        (Self::Sysfs, "sysfs cannot be read"),
        (Self::NotAnImage, "not a valid image, or beyond repair"),
        (Self::System, "another system call failed"),
        (
            Self::Protocol,
            "stream is damaged, cut or foreign, or the other side gave up",
        ),
        (Self::Loops, "device is still written to"),
        (Self::Stat, "length or kind of a file cannot be found out"),
        (Self::Fsync, "fsync failed"),
        (
            Self::Busy,
            "device is mounted, held or open; image is amid a conversion",
        ),
        (Self::Lock, "a lock cannot be taken"),
        (Self::Truncate, "a file cannot be lengthened or cut"),
        (Self::Allocate, "space cannot be allocated"),
        (Self::Mount, "a file system cannot be mounted"),
        (Self::Umount, "a file system cannot be unmounted"),
        (Self::LockTimeout, "somebody else works on the disk"),
        (Self::Rename, "a file cannot be renamed"),
        (
            Self::Aborted,
            "interrupted; the same command again does the rest",
        ),
        (Self::Unlink, "a file cannot be removed"),
        (
            Self::InUse,
            "image is in use by a device or another program",
        ),
        (Self::Param, "bad argument"),
        (
            Self::Descriptor,
            "not a valid descriptor, or not what its images are",
        ),
        (Self::NotAttached, "device or image is not attached"),
        (
            Self::Damaged,
            "image is damaged, 'ploopctl check' says how; file system is damaged",
        ),
        (Self::NoSnapshot, "there is no such snapshot"),
        (
            Self::NoCheckpoint,
            "there is no such checkpoint: the next backup has to be full",
        ),
    ];
}

/// A failure, told to a person.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    source: Option<io::Error>,
    hint: Option<String>,
}

/// Short for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What was asked and what is wrong with it.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            source: None,
            hint: None,
        }
    }

    /// A system call failed while doing what `message` says.
    pub fn io(code: Code, message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(code, message)
        }
    }

    /// What to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What it says, without what to do.
    pub fn without_hint(&self) -> String {
        match &self.source {
            Some(source) => format!("{}: {}", self.message, describe(source)),
            None => self.message.clone(),
        }
    }

    /// The same, where there is nothing better to be said yet.
    pub fn or_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Whether a file system or a limit of it was full.
    pub fn is_no_space(&self) -> bool {
        let errno = self.source.as_ref().and_then(io::Error::raw_os_error);
        use nix::errno::Errno;
        errno
            .map(Errno::from_raw)
            .is_some_and(|e| matches!(e, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG))
    }

    /// The exit code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Whether the reader of our output went away, which is no failure worth a message.
    pub fn is_broken_pipe(&self) -> bool {
        let kind = self.source.as_ref().map(io::Error::kind);
        self.code == Code::Write && kind == Some(io::ErrorKind::BrokenPipe)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {}", describe(source))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

/// The system's words without Rust's "(os error N)".
fn describe(e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(n) => nix::errno::Errno::from_raw(n).desc().to_owned(),
        None => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let e = Error::io(Code::Open, "open /x", nix::errno::Errno::ENOENT).hint("create it");
        assert_eq!(
            e.to_string(),
            "open /x: No such file or directory\n  create it"
        );
    }

    #[test]
    fn codes_are_listed_once_and_in_order() {
        let n: Vec<u8> = Code::ALL.iter().map(|(c, _)| *c as u8).collect();
        assert!(n.windows(2).all(|w| w[0] < w[1]));
    }
}

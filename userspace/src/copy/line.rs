// SPDX-License-Identifier: GPL-2.0
//! The connection: reads and writes that end when the user asks for it, and when the other side is
//! silent for too long. A file system may be frozen meanwhile.

use crate::error::{Code, Error};
use crate::signals::Requests;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{send, MsgFlags};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;
use std::time::Duration;

/// As much as a pipe that has room takes without waiting (PIPE_BUF).
const PIPE_STEP: usize = 4096;

/// One end of a connection.
pub struct Line {
    file: File,
    kind: Kind,
    requests: Rc<RefCell<Requests>>,
    /// Longest silence; `None` for any.
    patience: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Socket,
    Pipe,
    Other,
}

impl Line {
    /// Of an open file.
    pub fn new(
        file: File,
        requests: &Rc<RefCell<Requests>>,
        patience: Option<Duration>,
    ) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let kind = match (kind.is_socket(), kind.is_fifo()) {
            (true, _) => Kind::Socket,
            (false, true) => Kind::Pipe,
            (false, false) => Kind::Other,
        };
        Ok(Self {
            file,
            kind,
            requests: Rc::clone(requests),
            patience,
        })
    }

    /// Waits until the file is ready.
    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        let mut requests = self.requests.borrow_mut();
        if requests.is_end_asked() {
            return Err(Errno::ECANCELED.into());
        }
        let timeout = match self.patience.map(PollTimeout::try_from) {
            Some(Ok(timeout)) => timeout,
            Some(Err(_)) | None => PollTimeout::NONE,
        };
        let ready = {
            let own = PollFd::new(self.file.as_fd(), flags);
            let signal = requests.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let mut fds: Vec<_> = std::iter::once(own).chain(signal).collect();
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(Errno::ETIMEDOUT.into()),
                Err(Errno::EINTR) => 0,
                Err(e) => return Err(e.into()),
                Ok(n) => n,
            }
        };
        if ready > 0 && requests.is_end_asked() {
            return Err(Errno::ECANCELED.into());
        }
        Ok(())
    }
}

impl Read for Line {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLIN)?;
        // EINTR, or EAGAIN after a signal that was none of ours, is tried again by the caller.
        self.file.read(buf)
    }
}

impl Write for Line {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::POLLOUT)?;
        match self.kind {
            Kind::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                match send(self.file.as_raw_fd(), buf, flags) {
                    Err(Errno::EAGAIN) => Err(io::ErrorKind::Interrupted.into()),
                    sent => Ok(sent?),
                }
            }
            Kind::Pipe => self.file.write(&buf[..buf.len().min(PIPE_STEP)]),
            Kind::Other => self.file.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The error of a connection that failed.
pub fn failed(code: Code, what: &str, e: io::Error) -> Error {
    match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECANCELED) => Error::new(Code::Aborted, "the copy was ended early, as asked"),
        Some(Errno::ETIMEDOUT) => {
            Error::new(Code::Protocol, "the other side is silent for too long")
                .hint("--timeout SECONDS waits longer")
        }
        _ => Error::io(code, what, e),
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Does what the machines of `ploop_pure::offline` say.

use super::index::Index;
use super::{Go, Progress};
use crate::error::{Code, Error, Result};
use crate::image::Image;
use nix::errno::Errno;
use nix::fcntl::{fallocate, FallocateFlags};
use nix::libc::off_t;
use ploop_pure::offline::{Action, Event, Found, Machine};
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster};
use zerocopy::IntoBytes;

/// Bytes read at once, unless clusters are smaller.
const READ_BYTES: u64 = 1 << 20;
/// Zeros are looked for in pieces of this, which divides every cluster size.
const PIECE_BYTES: usize = 32 << 10;
static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All is done.
    Done,
    /// It was asked to end before.
    Stopped,
}

/// The images of an operation.
pub struct Exec<'a> {
    /// The image that is changed.
    pub image: &'a Image,
    /// Its index; a raw one has none.
    pub index: Option<Index<'a>>,
    /// In a merge, the upper delta and its index.
    pub upper: Option<(&'a Image, Index<'a>)>,
    /// Their cluster size.
    pub cluster: ClusterSize,
}

impl Exec<'_> {
    /// Runs `machine` to its end. The error of a copy that failed comes after the machine has
    /// closed the image.
    pub fn run(
        &mut self,
        machine: &mut dyn Machine,
        progress: &mut dyn Progress,
    ) -> Result<Ending> {
        let mut failure = None;
        let mut event = Event::Ok;
        loop {
            match progress.go() {
                Go::On => {}
                Go::Stop => machine.stop(),
                Go::Die => return Err(Error::new(Code::Aborted, "ended at once, as asked")),
            }
            let action = machine.next(event);
            event = match action {
                Action::Done => return failure.map_or(Ok(Ending::Done), Err),
                Action::Stopped => return failure.map_or(Ok(Ending::Stopped), Err),
                Action::Fail => return Err(failure.unwrap_or_else(|| self.changed())),
                Action::WriteHeader(_)
                | Action::Sync
                | Action::SetLen { .. }
                | Action::Find { .. }
                | Action::Test { .. }
                | Action::Copy { .. }
                | Action::Zero { .. }
                | Action::Publish { .. }
                | Action::WriteIndex => match self.act(action, progress) {
                    Ok(event) => event,
                    Err(e) => {
                        failure.get_or_insert(e);
                        Event::Failed
                    }
                },
            };
        }
    }

    fn changed(&self) -> Error {
        let what = format!("{} has changed meanwhile", self.image.path().display());
        Error::new(Code::Damaged, what)
    }

    fn act(&mut self, action: Action, progress: &mut dyn Progress) -> Result<Event> {
        match action {
            Action::WriteHeader(header) => {
                self.image.write_at(header.encode().as_bytes(), 0)?;
                if let Some(index) = &mut self.index {
                    index.set_header(header);
                }
            }
            Action::Sync => self.image.sync()?,
            Action::SetLen { len_bytes } => self.image.set_len(len_bytes)?,
            Action::Find { from } => return self.find(from),
            Action::Test { at } => {
                let is_zero = self.is_zero(at)?;
                progress.advance(self.cluster.bytes());
                return Ok(if is_zero { Event::Zeros } else { Event::Data });
            }
            Action::Copy { from, to } => {
                self.copy(from, to)?;
                progress.advance(self.cluster.bytes());
            }
            Action::Zero { start, end } => self.zero(start, end, Keep::Space)?,
            Action::Publish { cluster, at } => {
                if let Some(index) = &mut self.index {
                    index.set(cluster, at)?;
                }
            }
            Action::WriteIndex => {
                if let Some(index) = &mut self.index {
                    index.write()?;
                }
            }
            Action::Done | Action::Stopped | Action::Fail => {}
        }
        Ok(Event::Ok)
    }

    fn find(&mut self, from: Cluster) -> Result<Event> {
        let found = match (&mut self.upper, &mut self.index) {
            (Some((_, upper)), lower) => match upper.next(from)? {
                Some((cluster, at)) => {
                    let below = match lower {
                        Some(lower) => lower.get(cluster)?,
                        None => None,
                    };
                    Some(Found { cluster, at, below })
                }
                None => None,
            },
            (None, Some(index)) => index.next(from)?.map(|(cluster, at)| Found {
                cluster,
                at,
                below: None,
            }),
            (None, None) => None,
        };
        Ok(found.map_or(Event::End, Event::Found))
    }

    /// Calls `each` for the parts of a slot of `image`, with the bytes and where they are in it.
    fn parts(
        &self,
        image: &Image,
        at: ImageCluster,
        mut each: impl FnMut(&[u8], u64) -> Result<bool>,
    ) -> Result<()> {
        let part = READ_BYTES.min(self.cluster.bytes());
        let mut buf = vec![0; part as usize];
        for nr in 0..self.cluster.bytes() / part {
            image.read_at(&mut buf, self.cluster.offset(at) + nr * part)?;
            if !each(&buf, nr * part)? {
                break;
            }
        }
        Ok(())
    }

    fn is_zero(&self, at: ImageCluster) -> Result<bool> {
        let mut is_zero = true;
        self.parts(self.image, at, |bytes, _| {
            is_zero = bytes.chunks(PIECE_BYTES).all(|p| p == ZEROS);
            Ok(is_zero)
        })?;
        Ok(is_zero)
    }

    /// Copies a cluster; where it is zero, the copy takes no space.
    fn copy(&self, from: ImageCluster, to: ImageCluster) -> Result<()> {
        let source = self.upper.as_ref().map_or(self.image, |(upper, _)| upper);
        let start = self.cluster.offset(to);
        self.parts(source, from, |bytes, within| {
            let mut at = start + within;
            for run in runs(bytes) {
                let end = at + run.len() as u64;
                if run[..PIECE_BYTES] == ZEROS {
                    self.zero(at, end, Keep::Nothing)?;
                } else {
                    self.image.write_at(run, at)?;
                }
                at = end;
            }
            Ok(true)
        })
    }

    fn zero(&self, start: u64, end: u64, keep: Keep) -> Result<()> {
        let mode = match keep {
            Keep::Space => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            Keep::Nothing => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        } | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let range = (off_t::try_from(start), off_t::try_from(end - start));
        if let (Ok(at), Ok(len)) = range {
            match fallocate(self.image.file(), mode, at, len) {
                Ok(()) => return Ok(()),
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
                Err(e) => return Err(self.image.error(Code::Allocate, "clear a part of", e)),
            }
        }
        let mut at = start;
        while at < end {
            let nr = (end - at).min(PIECE_BYTES as u64);
            self.image.write_at(&ZEROS[..nr as usize], at)?;
            at += nr;
        }
        Ok(())
    }
}

/// What is left of a place that is made zero.
#[derive(Clone, Copy)]
enum Keep {
    /// Its space: it will be written again.
    Space,
    /// Nothing.
    Nothing,
}

/// Cuts `bytes` into runs of pieces that are all zeros or all not.
pub fn runs(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_zero = |piece: &[u8]| piece == &ZEROS[..piece.len()];
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let first = is_zero(rest.chunks(PIECE_BYTES).next()?);
        let pieces = rest.chunks(PIECE_BYTES);
        let len = pieces
            .take_while(|p| is_zero(p) == first)
            .map(<[u8]>::len)
            .sum();
        let (run, after) = rest.split_at(len);
        rest = after;
        Some(run)
    })
}

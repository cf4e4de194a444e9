// SPDX-License-Identifier: GPL-2.0
//! The stream of OpenVZ's `ploop copy` up to 1.12: packets of a marker, a size, a position in the
//! image file, and bytes. It says nothing about itself; only the top travels. Little-endian here.

use super::target::Target;
use super::wire::{self, le32, le64, FileInfo, Format, Part, PIECE_MAX};
use super::{Event, Sink, Watch};
use crate::error::{Code, Error, Result};
use std::io::{Read, Write};
use std::path::Path;

/// First bytes of a packet.
pub const MARKER: u32 = 0x4cc0_ac3d;
const PACKET_BYTES: usize = 16;
/// Size of a packet that asks to make everything durable.
const SYNC_BYTES: usize = 4;
/// Longest packet: the largest cluster.
pub(super) const SIZE_MAX: usize = 64 << 20;
const ANSWER: &[u8] = b"SUCCESS\n";

/// The one file that comes.
pub(super) fn begin(path: &Path) -> Result<Target> {
    let mut target = Target::begin(path, false)?;
    target.add(FileInfo {
        name: "image".to_owned(),
        guid: [0; 16],
        format: Format::Raw,
        cluster_sectors: 0,
        size_sectors: 0,
        len_bytes: 0,
        mtime_ns: 0,
        is_top: true,
    })?;
    Ok(target)
}

/// Puts `size` bytes that come at `offset` into the file, in pieces.
pub(super) fn take(
    from: &mut dyn Read,
    target: &mut Target,
    len_bytes: &mut u64,
    offset: u64,
    size: usize,
    mut see: impl FnMut(&[u8]),
) -> Result<()> {
    let end = offset
        .checked_add(size as u64)
        .filter(|end| i64::try_from(*end).is_ok());
    let end = end.ok_or_else(|| wire::damaged("a packet lies beyond any file"))?;
    let mut piece = vec![0; size.min(PIECE_MAX)];
    let mut at = offset;
    while at < end {
        let step = piece.len().min((end - at) as usize);
        from.read_exact(&mut piece[..step])
            .map_err(wire::read_failed)?;
        see(&piece[..step]);
        if at + step as u64 > *len_bytes {
            *len_bytes = at + step as u64;
            target.length(0, *len_bytes)?;
        }
        let part = Part {
            file: 0,
            offset: at,
            len: step as u64,
        };
        target.write(part, &piece[..step])?;
        at += step as u64;
    }
    Ok(())
}

/// Receives one.
pub fn receive(
    from: &mut dyn Read,
    mut back: Option<&mut dyn Write>,
    path: &Path,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut target = begin(path)?;
    watch.event(&Event::Begin {
        files: 1,
        bytes: 0,
        live: false,
    });
    let (mut len_bytes, mut bytes) = (0, 0);
    loop {
        let mut packet = [0; PACKET_BYTES];
        from.read_exact(&mut packet).map_err(wire::read_failed)?;
        if le32(&packet, 0) != MARKER {
            return Err(wire::damaged("a packet does not begin with its marker"));
        }
        let size = le32(&packet, 4) as usize;
        if size == 0 {
            break;
        }
        if size > SIZE_MAX {
            return Err(wire::damaged("a packet is too long"));
        }
        take(
            from,
            &mut target,
            &mut len_bytes,
            le64(&packet, 8),
            size,
            |_| {},
        )?;
        bytes += size as u64;
        if size == SYNC_BYTES {
            target.sync()?;
            if let Some(back) = &mut back {
                let told = back.write_all(ANSWER).and_then(|()| back.flush());
                told.map_err(|e| Error::io(Code::Protocol, "cannot answer the sender", e))?;
            }
        }
    }
    target.publish_found()?;
    watch.event(&Event::End {
        bytes,
        downtime_ms: 0,
    });
    Ok(())
}

/// Sends one. The receiver cannot say anything, and what is not sent may be anything there: all is
/// sent.
pub struct Sender<W> {
    to: W,
    sent: u64,
    head: [u8; SYNC_BYTES],
}

impl<W: Write> Sender<W> {
    /// To `to`.
    pub fn new(to: W) -> Self {
        Self {
            to,
            sent: 0,
            head: [0; SYNC_BYTES],
        }
    }

    fn packet(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let size = u32::try_from(bytes.len()).map_err(|_| wire::damaged("a piece is too long"))?;
        let mut packet = MARKER.to_le_bytes().to_vec();
        packet.extend(size.to_le_bytes());
        packet.extend(offset.to_le_bytes());
        let to = &mut self.to;
        let done = to
            .write_all(&packet)
            .and_then(|()| to.write_all(bytes))
            .and_then(|()| to.flush());
        done.map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => Error::new(
                Code::Protocol,
                "the receiver went away before the copy was complete",
            ),
            _ => super::line::failed(Code::Write, "cannot write the stream", e),
        })?;
        self.sent += (packet.len() + bytes.len()) as u64;
        Ok(())
    }
}

impl<W: Write> Sink for Sender<W> {
    fn data(&mut self, part: Part, bytes: &[u8]) -> Result<()> {
        if part.offset == 0 {
            if let Some(head) = bytes.first_chunk() {
                self.head = *head;
            }
        }
        self.packet(part.offset, bytes)
    }

    fn zero(&mut self, part: Part) -> Result<()> {
        let zeros = vec![0; PIECE_MAX];
        let (mut at, end) = (part.offset, part.offset.saturating_add(part.len));
        while at < end {
            let step = zeros.len().min((end - at) as usize);
            self.packet(at, &zeros[..step])?;
            at += step as u64;
        }
        Ok(())
    }

    fn hole(&mut self, part: Part) -> Result<()> {
        self.zero(part)
    }

    /// The file is as long as what is written to it.
    fn length(&mut self, _: u32, _: u64) -> Result<()> {
        Ok(())
    }

    fn round(&mut self, _: u32, _: u64) -> Result<()> {
        Ok(())
    }

    /// Old receivers just write the first bytes of the image once more.
    fn sync(&mut self) -> Result<()> {
        let head = self.head;
        self.packet(0, &head)
    }

    fn end(&mut self) -> Result<()> {
        self.packet(0, &[])
    }

    /// What ends without the last packet is taken for failed.
    fn abort(&mut self, _: &str) {}

    fn sent_bytes(&self) -> u64 {
        self.sent
    }
}

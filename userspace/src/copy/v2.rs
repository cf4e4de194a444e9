// SPDX-License-Identifier: GPL-2.0
//! The stream of OpenVZ's `ploop copy` from 2015 on: packets of 24 bytes, with an MD5 of the data if
//! that was agreed on, and an answer to each but the asynchronous ones. Only received, of images, not
//! of devices. Little-endian here.

use super::wire::{self, le32, le64};
use super::{v1, Event, Watch};
use crate::error::{Code, Error, Result};
use std::io::{Read, Write};
use std::path::Path;

/// First bytes of a packet.
pub const MARKER: u32 = 0x4cc0_ac3e;
const PACKET_BYTES: usize = 24;
const DATA: u32 = 0;
const COMMAND: u32 = 1;
const DATA_ASYNC: u32 = 2;
const SYNC: u32 = 0;
const FINISH: u32 = 1;
/// Feature: data has an MD5.
const MD5: u64 = 1;
/// What an answer says that something went wrong: OpenVZ's status for a protocol that is not kept.
const FAILED: i32 = 13;

/// Receives one. The sender waits for answers, so there must be a way back.
pub fn receive(
    from: &mut dyn Read,
    back: Option<&mut dyn Write>,
    path: &Path,
    watch: &mut dyn Watch,
) -> Result<()> {
    let back = back.ok_or_else(|| {
        let what = "a stream of OpenVZ's version 2 needs a way back to its sender";
        Error::new(Code::Protocol, what).hint("connect standard input to a socket")
    })?;
    let done = run(from, back, path, watch);
    if done.is_err() {
        // The sender may be gone.
        let _ = answer(back, FAILED);
    }
    done
}

fn answer(back: &mut dyn Write, what: i32) -> Result<()> {
    let told = back
        .write_all(&what.to_le_bytes())
        .and_then(|()| back.flush());
    told.map_err(|e| Error::io(Code::Protocol, "cannot answer the sender", e))
}

fn run(
    from: &mut dyn Read,
    back: &mut dyn Write,
    path: &Path,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut target = v1::begin(path)?;
    watch.event(&Event::Begin {
        files: 1,
        bytes: 0,
        live: false,
    });
    let (mut len_bytes, mut bytes, mut has_md5) = (0, 0, false);
    loop {
        let mut packet = [0; PACKET_BYTES];
        from.read_exact(&mut packet).map_err(wire::read_failed)?;
        if le32(&packet, 0) != MARKER {
            return Err(wire::damaged("a packet does not begin with its marker"));
        }
        let (kind, size) = (le32(&packet, 4), le32(&packet, 8) as usize);
        let offset = le64(&packet, 16);
        let mut digest = [0; 16];
        if has_md5 {
            from.read_exact(&mut digest).map_err(wire::read_failed)?;
        }
        if size > v1::SIZE_MAX {
            return Err(wire::damaged("a packet is too long"));
        }
        let mut sum = md5::Context::new();
        match kind {
            DATA | DATA_ASYNC => {
                let see = |piece: &[u8]| sum.consume(piece);
                v1::take(from, &mut target, &mut len_bytes, offset, size, see)?;
                must_match(has_md5, sum, digest)?;
                bytes += size as u64;
                if kind == DATA {
                    answer(back, 0)?;
                }
            }
            COMMAND => {
                let mut command = [0; 4];
                let Some(command) = command.get_mut(..size) else {
                    return Err(devices());
                };
                from.read_exact(command).map_err(wire::read_failed)?;
                sum.consume(&*command);
                must_match(has_md5, sum, digest)?;
                match (size, le32(command, 0)) {
                    (4, SYNC) => {
                        target.sync()?;
                        has_md5 |= offset & MD5 != 0;
                        // The features that are agreed on, negated.
                        answer(back, -((offset & MD5) as i32))?;
                    }
                    (0, _) | (4, FINISH) => break,
                    _ => return Err(devices()),
                }
            }
            _ => return Err(devices()),
        }
    }
    target.publish_found()?;
    answer(back, 0)?;
    watch.event(&Event::End {
        bytes,
        downtime_ms: 0,
    });
    Ok(())
}

fn must_match(has_md5: bool, sum: md5::Context, digest: [u8; 16]) -> Result<()> {
    if has_md5 && sum.finalize().0 != digest {
        return Err(wire::damaged("the MD5 of a packet is wrong"));
    }
    Ok(())
}

fn devices() -> Error {
    let what = "the sender copies a device, not an image: that is not supported";
    Error::new(Code::Protocol, what).hint("copy the images with OpenVZ 7 or older, or as files")
}

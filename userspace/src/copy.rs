// SPDX-License-Identifier: GPL-2.0
//! Copying a disk to another place, also while it is written to.
//!
//! ```text
//! send -> live (tracker, freezing), source (images that are read); stream, v1 (where it goes) -> wire
//! receive -> target (files that become the copy), v1, v2 -> wire     answer: the way back
//! line (connections that can be ended) below all
//! ```
//!
//! The stream is described in `docs/copy-stream.md`. The sender tells a [`Sink`] what the files hold;
//! whether that goes out as our stream or as OpenVZ's is up to the sink. What becomes of the copy is
//! up to the receiver: it has its final name when everything is there and durable, or not at all.

pub mod answer;
pub mod line;
pub mod live;
pub mod receive;
pub mod send;
pub mod source;
pub mod stream;
pub mod target;
pub mod v1;
pub mod v2;
pub mod wire;

#[cfg(test)]
mod tests;

use crate::error::Result;
use serde::Serialize;

/// Where the content of the files goes.
pub trait Sink {
    /// Bytes of a file.
    fn data(&mut self, part: wire::Part, bytes: &[u8]) -> Result<()>;
    /// These bytes are zeros, whatever was sent before.
    fn zero(&mut self, part: wire::Part) -> Result<()>;
    /// The same, and there need not be anything.
    fn hole(&mut self, part: wire::Part) -> Result<()>;
    /// The file has this length now.
    fn length(&mut self, file: u32, len_bytes: u64) -> Result<()>;
    /// A round begins; the one before had so many bytes.
    fn round(&mut self, round: u32, dirty: u64) -> Result<()>;
    /// Everything so far is to be durable.
    fn sync(&mut self) -> Result<()>;
    /// The copy is complete. Returns when the receiver has it, if it can say so.
    fn end(&mut self) -> Result<()>;
    /// The copy is given up. The receiver is told, if it can be.
    fn abort(&mut self, why: &str);
    /// Bytes that were sent.
    fn sent_bytes(&self) -> u64;
}

/// What happens while a disk is copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// It begins.
    Begin {
        /// Files to copy.
        files: u32,
        /// Their length.
        bytes: u64,
        /// The disk is in use.
        live: bool,
    },
    /// So far.
    Progress {
        /// 0 for lower images, 1 for the first pass over the top, then rounds.
        round: u32,
        /// Bytes of the files that were gone through.
        done: u64,
        /// Of these.
        total: u64,
        /// Bytes sent.
        sent: u64,
        /// Bytes a second.
        rate: u64,
    },
    /// A round is over.
    Round {
        /// Its number.
        round: u32,
        /// Bytes that had been written to meanwhile.
        dirty: u64,
        /// How long the disk would stand still if that were the last, in milliseconds.
        downtime_ms: u64,
    },
    /// The disk stands still.
    Frozen {
        /// Rounds before.
        rounds: u32,
    },
    /// It is over.
    End {
        /// Bytes sent or received.
        bytes: u64,
        /// For how long the disk stood still, in milliseconds.
        downtime_ms: u64,
    },
}

/// Who is told what happens.
pub trait Watch {
    /// This happened.
    fn event(&mut self, event: &Event);

    /// The disk goes on. Since [`Event::Frozen`] nothing may have been written that it could hold up.
    fn thawed(&mut self) {}

    /// Whether the user wants it to end.
    fn is_end_asked(&mut self) -> bool {
        false
    }
}

/// Nobody.
pub struct Silent;

impl Watch for Silent {
    fn event(&mut self, _: &Event) {}
}

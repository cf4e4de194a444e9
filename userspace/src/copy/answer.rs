// SPDX-License-Identifier: GPL-2.0
//! The bytes of the way back: what the receiver answers, as in `docs/copy-stream.md`.

use super::wire::{self, le32, le64};
use crate::error::{Code, Error, Result};
use std::io::{self, Read, Write};

/// Length of the head of an answer.
pub const ANSWER_BYTES: usize = 32;
const MAGIC: u32 = u32::from_le_bytes(*b"PCA1");

/// What the receiver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Records below that number are in the files.
    Applied,
    /// They are durable.
    Durable,
    /// The copy has its final name.
    Done,
    /// The receiver gives up; the text says why.
    Failed,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What it says.
    pub kind: Kind,
    /// How many records it is about.
    pub records: u64,
    /// Why, for [`Kind::Failed`].
    pub text: String,
}

impl Answer {
    /// One without a text.
    pub fn new(kind: Kind, records: u64) -> Self {
        Self {
            kind,
            records,
            text: String::new(),
        }
    }

    /// Writes it.
    pub fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let kind: u32 = match self.kind {
            Kind::Applied => 1,
            Kind::Durable => 2,
            Kind::Done => 3,
            Kind::Failed => 4,
        };
        let text = self.text.as_bytes();
        let text = &text[..text.len().min(wire::TEXT_MAX)];
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(self.records.to_le_bytes());
        // At most TEXT_MAX.
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(crc32c::crc32c(text).to_le_bytes());
        bytes.extend([0; 4]);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(text);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads one.
    pub fn read(from: &mut dyn Read) -> Result<Self> {
        let lost = |e: io::Error| match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Error::new(
                Code::Protocol,
                "the receiver went away before it confirmed the copy",
            )
            .hint("what it said is on its side"),
            _ => super::line::failed(Code::Read, "cannot read the receiver's answer", e),
        };
        let wrong = || {
            Error::new(Code::Protocol, "what the receiver answers is no answer")
                .hint("does the command on the other side print something else?")
        };
        let mut head = [0; ANSWER_BYTES];
        from.read_exact(&mut head).map_err(lost)?;
        let is_sound = le32(&head, 0) == MAGIC && crc32c::crc32c(&head[..28]) == le32(&head, 28);
        let len = le32(&head, 16) as usize;
        if !is_sound || len > wire::TEXT_MAX {
            return Err(wrong());
        }
        let kind = match le32(&head, 4) {
            1 => Kind::Applied,
            2 => Kind::Durable,
            3 => Kind::Done,
            4 => Kind::Failed,
            _ => return Err(wrong()),
        };
        let mut text = vec![0; len];
        from.read_exact(&mut text).map_err(lost)?;
        if crc32c::crc32c(&text) != le32(&head, 20) {
            return Err(wrong());
        }
        Ok(Self {
            kind,
            records: le64(&head, 8),
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_they_were_written_or_refused() {
        let answer = Answer {
            kind: Kind::Failed,
            records: 7,
            text: "full".into(),
        };
        let mut bytes = Vec::new();
        answer.write(&mut bytes).unwrap();
        assert_eq!(Answer::read(&mut bytes.as_slice()).unwrap(), answer);
        for i in 0..bytes.len() {
            assert!(Answer::read(&mut &bytes[..i]).is_err());
            let mut bad = bytes.clone();
            bad[i] ^= 1;
            assert!(Answer::read(&mut bad.as_slice()).is_err(), "{i}");
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The names of deltas.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

/// A GUID, written as `{5fbaabe3-6958-40ff-92a7-860e329aab41}`. Case does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid([u8; 16]);

impl Guid {
    /// Of the delta that is written to.
    pub const TOP: Self = Self([
        0x5f, 0xba, 0xab, 0xe3, 0x69, 0x58, 0x40, 0xff, 0x92, 0xa7, 0x86, 0x0e, 0x32, 0x9a, 0xab,
        0x41,
    ]);
    /// Parent of the base: none.
    pub const NULL: Self = Self([0; 16]);

    /// A new one that nobody else has.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        // Version 4, variant 1.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// From 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// As 16 bytes.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&i) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        f.write_str("}")
    }
}

impl FromStr for Guid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not a UUID such as {}", Self::TOP);
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}').ok_or_else(bad)?,
            None => text,
        };
        let dashes = [8, 13, 18, 23];
        if inner.len() != 36 || dashes.iter().any(|i| inner.as_bytes()[*i] != b'-') {
            return Err(bad());
        }
        let digits: Vec<u8> = inner.bytes().filter(|b| *b != b'-').collect();
        let mut bytes = [0; 16];
        if digits.len() != 32 {
            return Err(bad());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).ok_or_else(bad);
            // Two digits of 16 fit.
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Guid {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Guid {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_read_with_and_without_braces_in_any_case() {
        let text = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
        assert_eq!(Guid::TOP.to_string(), text);
        for form in [text, &text[1..37], &text.to_uppercase()] {
            assert_eq!(form.parse(), Ok(Guid::TOP), "{form}");
        }
        for bad in [
            "",
            "{}",
            &text[1..],
            &text[..37],
            "{5fbaabe3-6958-40ff-92a7-860e329aabxy}",
            "é",
        ] {
            assert!(bad.parse::<Guid>().is_err(), "{bad}");
        }
        assert_ne!(Guid::random().unwrap(), Guid::random().unwrap());
    }
}

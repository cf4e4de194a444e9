// SPDX-License-Identifier: GPL-2.0
//! Which module this is, and whether module and tool get on with each other.

use super::{INTERFACE, INTERFACE_OLDEST, VERSION};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

const NAME_BYTES: usize = 32;

/// Argument of `CTL_VERSION`; all but `size` is zero, then out. 64 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Version {
    /// Size of this structure, 64.
    pub size: u32,
    /// Zero.
    pub flags: u32,
    /// Out: [`INTERFACE`] of the module.
    pub interface: u32,
    /// Out: [`INTERFACE_OLDEST`] of the module.
    pub oldest: u32,
    /// Out: [`VERSION`] of the module, ends with a zero byte.
    pub name: [u8; NAME_BYTES],
    /// Zero.
    pub reserved: [u64; 2],
}

/// What keeps module and tool from working together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mismatch {
    /// The other is too old for this one.
    TooOld,
    /// This one is too old for the other.
    TooNew,
}

impl Version {
    /// Asks.
    pub const fn read() -> Self {
        Self {
            size: 64,
            flags: 0,
            interface: 0,
            oldest: 0,
            name: [0; NAME_BYTES],
            reserved: [0; 2],
        }
    }

    /// Of this code.
    pub fn ours() -> Self {
        let mut this = Self {
            interface: INTERFACE,
            oldest: INTERFACE_OLDEST,
            ..Self::read()
        };
        for (to, from) in this.name.iter_mut().zip(VERSION.bytes()) {
            *to = from;
        }
        this
    }

    /// The version as text, as far as it is one.
    pub fn name(&self) -> &str {
        let len = self.name.iter().position(|b| *b == 0);
        let name = self.name.get(..len.unwrap_or(NAME_BYTES)).unwrap_or(&[]);
        core::str::from_utf8(name).unwrap_or("?")
    }

    /// Whether the other, which this is of, and this code have an interface in common.
    pub fn agree(&self) -> Result<(), Mismatch> {
        if self.interface < INTERFACE_OLDEST {
            Err(Mismatch::TooOld)
        } else if INTERFACE < self.oldest {
            Err(Mismatch::TooNew)
        } else {
            Ok(())
        }
    }
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Version>() == 64);
    assert!(offset_of!(Version, name) == 16);
    assert!(INTERFACE_OLDEST <= INTERFACE);
    assert!(VERSION.len() < NAME_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_with_an_interface_in_common_agree() {
        let other = |oldest, interface| Version {
            interface,
            oldest,
            ..Version::read()
        };
        assert_eq!(Version::ours().agree(), Ok(()));
        // It knows more, and still serves us.
        assert_eq!(other(INTERFACE, INTERFACE + 7).agree(), Ok(()));
        let newer = other(INTERFACE + 1, INTERFACE + 1);
        assert_eq!(newer.agree(), Err(Mismatch::TooNew));
        let older = other(0, INTERFACE_OLDEST - 1);
        assert_eq!(older.agree(), Err(Mismatch::TooOld));
    }

    #[test]
    fn a_name_ends_with_a_zero_byte_or_its_field() {
        assert_eq!(Version::ours().name(), VERSION);
        let mut odd = Version::read();
        assert_eq!(odd.name(), "");
        odd.name = [b'9'; NAME_BYTES];
        assert_eq!(odd.name().len(), NAME_BYTES);
        odd.name[3] = 0xff;
        assert_eq!(odd.name(), "?");
    }
}

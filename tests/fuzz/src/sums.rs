// SPDX-License-Identifier: GPL-2.0
//! Puts checksums right, so that what they guard is reached.

use ploopctl::backup::wire as backup;
use ploopctl::copy::wire as copy;

/// Longest file that a stream may make: no more is to be found in a longer one.
const LEN_MAX: u64 = 8 << 20;

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Keeps a length of 8 bytes below [`LEN_MAX`].
fn shorten(bytes: &mut [u8], at: usize) {
    let mut len = [0; 8];
    len.copy_from_slice(&bytes[at..at + 8]);
    let len = u64::from_le_bytes(len) % LEN_MAX;
    bytes[at..at + 8].copy_from_slice(&len.to_le_bytes());
}

/// Makes a stream of `bytes`: header, then records as long as there are heads.
pub fn of_stream(bytes: &mut [u8]) {
    if bytes.len() < copy::HEADER_BYTES {
        return;
    }
    bytes[..8].copy_from_slice(&copy::MAGIC);
    let sum = crc32c::crc32c(&bytes[..60]);
    put(bytes, 60, sum);
    let mut at = copy::HEADER_BYTES;
    let mut nr: u64 = 0;
    while bytes.len() - at >= copy::HEAD_BYTES {
        let (head, rest) = bytes[at..].split_at_mut(copy::HEAD_BYTES);
        head[..4].copy_from_slice(b"PCR1");
        head[8..16].copy_from_slice(&nr.to_le_bytes());
        let len = (get(head, 20) as usize).min(rest.len());
        put(head, 20, len as u32);
        shorten(head, 24);
        shorten(head, 32);
        put(head, 40, crc32c::crc32c(&rest[..len]));
        let sum = crc32c::crc32c(&head[..44]);
        put(head, 44, sum);
        at += copy::HEAD_BYTES + len;
        nr += 1;
    }
}

/// Makes a backup of `bytes`.
pub fn of_backup(bytes: &mut [u8]) {
    if bytes.len() < backup::HEADER_BYTES {
        return;
    }
    let sum = crc32c::crc32c(&bytes[..backup::HEADER_BYTES - 4]);
    put(bytes, backup::HEADER_BYTES - 4, sum);
    let mut at = backup::HEADER_BYTES;
    while bytes.len() - at >= backup::HEAD_BYTES {
        let (head, rest) = bytes[at..].split_at_mut(backup::HEAD_BYTES);
        let len = (get(head, 4) as usize).min(rest.len());
        put(head, 4, len as u32);
        put(head, 24, crc32c::crc32c(&rest[..len]));
        let sum = crc32c::crc32c(&head[..backup::HEAD_BYTES - 4]);
        put(head, backup::HEAD_BYTES - 4, sum);
        at += backup::HEAD_BYTES + len;
    }
}

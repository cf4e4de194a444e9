// SPDX-License-Identifier: GPL-2.0
//! What is mounted, as the kernel tells it. Paths are bytes: one that is not Unicode hides nothing.

use crate::error::{Code, Error, Result};
use crate::locks;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

const PATH: &str = "/proc/self/mountinfo";

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Number of its file system, `MAJOR:MINOR`.
    pub number: String,
    /// Where it is.
    pub at: PathBuf,
    /// What it says it is of.
    pub source: PathBuf,
}

/// All that this process can see, those that cover others behind them.
pub fn mounts() -> Result<Vec<Mount>> {
    let text =
        fs::read(PATH).map_err(|e| Error::io(Code::System, format!("cannot read {PATH}"), e))?;
    Ok(parse(&text))
}

/// What is mounted in other mount namespaces, those of containers and of services: each with a process
/// that is in it. Those of no process are not found, nor those that we may not look into.
pub fn elsewhere() -> Vec<(i32, Vec<Mount>)> {
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen: BTreeSet<PathBuf> = space("self").into_iter().collect();
    let mut found = Vec::new();
    for pid in locks::pids() {
        let Some(space) = space(&pid.to_string()).filter(|space| !seen.contains(space)) else {
            continue;
        };
        // Of one that has ended meanwhile another may be there.
        if let Ok(text) = fs::read(format!("/proc/{pid}/mountinfo")) {
            seen.insert(space);
            found.push((pid, parse(&text)));
        }
    }
    found
}

/// A line is `36 35 182:33 / /mnt rw,noatime shared:1 - ext4 /dev/ploop2p1 rw`.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    Some(Mount {
        number: String::from_utf8(fields.get(2)?.to_vec()).ok()?,
        at: unescape(fields.get(4).filter(|_| dash > 4)?),
        source: unescape(fields.get(dash + 2)?),
    })
}

/// A path as it is: there a blank is `\040` and the like.
pub fn unescape(text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, others)) = rest.split_first() {
        let byte = match others.get(..3) {
            Some(digits) if *first == b'\\' => octal(digits),
            Some(_) | None => None,
        };
        path.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &others[3..] } else { others };
    }
    PathBuf::from(OsString::from_vec(path))
}

fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok()?;
    // A sign would be taken for a part of the number.
    let is_number = text.bytes().all(|b| b.is_ascii_digit());
    u8::from_str_radix(text, 8).ok().filter(|_| is_number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    #[test]
    fn mounts_are_read() {
        let text = b"30 1 254:3 / /mnt/a\\040b\\134040 rw - ext4 /dev/mapper/x rw\n\
            nonsense\n\
            31 1 0:50 / /x\xff\\012 rw shared:1 master:2 - btrfs /dev/null rw\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].at, Path::new("/mnt/a b\\040"));
        assert_eq!(found[0].number, "254:3");
        assert_eq!(found[0].source, Path::new("/dev/mapper/x"));
        assert_eq!(found[1].at.as_os_str().as_bytes(), b"/x\xff\n");
        assert_eq!(unescape(b"\\+12\\777\\0"), Path::new("\\+12\\777\\0"));
        assert!(!mounts().unwrap().is_empty());
        // Whatever there is, it is not ours.
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        for (process, _) in elsewhere() {
            let other = fs::read_link(format!("/proc/{process}/ns/mnt"));
            assert!(other.map_or(true, |other| other != own), "{process}");
        }
    }
}

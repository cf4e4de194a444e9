// SPDX-License-Identifier: GPL-2.0
//! Files that are there as they were or as they are to be, never in between.

use crate::error::{Code, Error, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Longest file that is read: 255 images take 80 KiB.
const LEN_MAX: u64 = 4 << 20;

/// `path` with `suffix` behind its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

/// The directory of `path`.
pub fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Reads a descriptor.
pub fn read(path: &Path) -> Result<String> {
    read_up_to(path, LEN_MAX)
}

/// Reads a text file of at most `len_max` bytes.
pub fn read_up_to(path: &Path, len_max: u64) -> Result<String> {
    let at = path.display();
    let mut text = String::new();
    let file = File::open(path).map_err(|e| {
        let is_absent = e.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io(Code::Open, format!("cannot open {at}"), e);
        if is_absent {
            error.hint("'ploopctl descriptor restore DIR' makes a descriptor for the images of a directory")
        } else {
            error
        }
    })?;
    let len = file
        .take(len_max + 1)
        .read_to_string(&mut text)
        .map_err(|e| Error::io(Code::Read, format!("cannot read {at}"), e))?;
    if len as u64 > len_max {
        let what = format!("{at} is not a valid descriptor: it is longer than {len_max} bytes");
        return Err(Error::new(Code::Descriptor, what));
    }
    Ok(text)
}

/// Puts `text` into the file `path`, durably. Owner and mode of the file that was there stay.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let temporary = beside(path, ".tmp");
    let failed = |what: &str, code: Code, e| {
        Error::io(code, format!("cannot {what} {}", temporary.display()), e)
    };
    // What a killed tool left. We hold the lock.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(|e| failed("create", Code::Create, e))?;
    let fill = |file: &mut File| -> std::io::Result<()> {
        if let Ok(before) = fs::metadata(path) {
            // Not permitted to everybody; then the file is ours.
            let _ = std::os::unix::fs::fchown(&*file, Some(before.uid()), Some(before.gid()));
            file.set_permissions(fs::Permissions::from_mode(before.mode() & 0o7777))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    let filled = fill(&mut file).map_err(|e| failed("write", Code::Write, e));
    let renamed = filled.and_then(|()| {
        let what = format!(
            "cannot rename {} to {}",
            temporary.display(),
            path.display()
        );
        fs::rename(&temporary, path).map_err(|e| Error::io(Code::Rename, what, e))
    });
    if let Err(e) = renamed {
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    sync_dir(path)
}

/// Removes the file `path`, durably; one that is not there is removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(
            Code::Unlink,
            format!("cannot remove {}", path.display()),
            e,
        )),
    }
}

/// Makes the names in the directory of `path` durable.
pub fn sync_dir(path: &Path) -> Result<()> {
    let dir = dir_of(path);
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(Code::Fsync, format!("cannot sync {}", dir.display()), e))
}

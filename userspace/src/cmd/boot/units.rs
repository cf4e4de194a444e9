// SPDX-License-Identifier: GPL-2.0
//! The generator: what `ploop@.service` must know of each disk of `/etc/ploop.conf`.
//!
//! For a disk called `web` that is
//!
//! * a drop-in of `ploop@web.service`, which orders it between the file system that holds the image
//!   and those who use `/dev/disk/by-ploop/web`;
//! * a link by which that device needs the unit, so that an entry of fstab is enough to have the disk
//!   attached, and fails at once if it cannot be;
//! * a link by which `ploop.target` wants it, unless it is `noauto`.

use crate::conf::{self, Entry};
use crate::error::{Code, Error, Result};
use crate::output;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The template, from the directories of generated units.
const TEMPLATE: &str = "/usr/lib/systemd/system/ploop@.service";

/// Links in one path, as the kernel follows them.
const MAX_LINKS: u32 = 40;

/// Makes the units of `conf` below `dir`. A bad line is told and costs that line only.
pub fn make(conf: &Path, dir: &Path) -> Result<()> {
    let (entries, errors) = conf::load(conf)?;
    for e in errors {
        output::note(&format!("ploopctl: {e}"));
    }
    for entry in &entries {
        unit(conf, entry, dir).map_err(|e| {
            let what = format!(
                "cannot make the units of {} in {}",
                entry.name,
                dir.display()
            );
            Error::io(Code::Write, what, e)
        })?;
    }
    Ok(())
}

fn unit(conf: &Path, entry: &Entry, dir: &Path) -> io::Result<()> {
    let unit = format!("ploop@{}.service", entry.name);
    let node = Path::new("/dev/disk/by-ploop").join(&entry.name);
    let device = escape(&node);
    let text = format!(
        "# Made from {}, line {}.\n[Unit]\n{}\nWants=blockdev@{device}.target\nBefore=blockdev@{device}.target\n",
        conf.display(),
        entry.line,
        needs(&entry.path),
    );
    let drop_in = dir.join(format!("{unit}.d"));
    fs::create_dir_all(&drop_in)?;
    fs::write(drop_in.join("50-ploop-conf.conf"), text)?;
    link(dir, &format!("{device}.device.requires"), &unit)?;
    if !entry.options.no_auto {
        link(dir, "ploop.target.wants", &unit)?;
    }
    Ok(())
}

fn link(dir: &Path, whose: &str, unit: &str) -> io::Result<()> {
    fs::create_dir_all(dir.join(whose))?;
    symlink(TEMPLATE, dir.join(whose).join(unit))
}

/// What must be there before the image: its file system, also where links lead to it from another one,
/// or the block device that it is.
fn needs(path: &Path) -> String {
    let real = behind_links(path);
    // Names of devices are links that udev makes, and units of systemd.
    if path.starts_with("/dev") || real == path {
        return needs_of_one(path);
    }
    format!("{}\n{}", needs_of_one(path), needs_of_one(&real))
}

fn needs_of_one(path: &Path) -> String {
    if path.starts_with("/dev") {
        let device = escape(path);
        return format!("Requires={device}.device\nAfter={device}.device");
    }
    let quoted = path.to_string_lossy();
    let quoted = quoted
        .replace('%', "%%")
        .replace('\\', "\\\\")
        .replace('"', "\\\"");
    format!("RequiresMountsFor=\"{quoted}\"")
}

/// Where an absolute path leads, as far as is known while what it leads to is not mounted.
fn behind_links(path: &Path) -> PathBuf {
    let parts = |path: &Path| -> Vec<OsString> {
        let parts = path.components().rev();
        parts.map(|part| part.as_os_str().into()).collect()
    };
    let mut real = PathBuf::new();
    let mut left = parts(path);
    let mut links = 0;
    while let Some(part) = left.pop() {
        if part == ".." {
            real.pop();
            continue;
        }
        // The root takes the place of all that was before it.
        real.push(part);
        if links < MAX_LINKS {
            if let Ok(target) = fs::read_link(&real) {
                links += 1;
                real.pop();
                left.extend(parts(&target));
            }
        }
    }
    real
}

/// A path as part of a unit's name, as `systemd-escape --path` has it.
fn escape(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_prefix(b"/").unwrap_or(bytes);
    let mut text = String::new();
    for (i, &byte) in bytes.iter().enumerate() {
        match byte {
            b'/' => text.push('-'),
            b'.' if i > 0 => text.push('.'),
            b':' | b'_' => text.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => text.push(char::from(byte)),
            _ => text += &format!("\\x{byte:02x}"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_escaped_as_systemd_does() {
        for (path, want) in [
            (
                "/dev/disk/by-ploop/my-web",
                r"dev-disk-by\x2dploop-my\x2dweb",
            ),
            ("/dev/a b", r"dev-a\x20b"),
            ("/.x/y.z", r"\x2ex-y.z"),
        ] {
            assert_eq!(escape(Path::new(path)), want);
        }
    }

    #[test]
    fn links_are_followed_also_to_what_is_not_mounted() {
        let dir = std::env::temp_dir().join(format!("ploopctl-links-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("etc")).unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        symlink("/none/vz", dir.join("vz")).unwrap();
        symlink("../vz/./more/..", dir.join("etc/up")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        symlink("/dev/sdz", dir.join("disk")).unwrap();
        for (path, want) in [
            ("etc/a.img", dir.join("etc/a.img")),
            ("vz/a.img", "/none/vz/a.img".into()),
            ("etc/up/a.img", "/none/vz/a.img".into()),
            ("loop/a.img", dir.join("loop/a.img")),
        ] {
            assert_eq!(behind_links(&dir.join(path)), want);
        }
        let path = dir.join("vz/a.img");
        let want = format!(
            "RequiresMountsFor=\"{}\"\nRequiresMountsFor=\"/none/vz/a.img\"",
            path.display()
        );
        assert_eq!(needs(&path), want);
        assert!(
            needs(&dir.join("disk")).ends_with("\nRequires=dev-sdz.device\nAfter=dev-sdz.device")
        );
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn each_disk_gets_its_place_in_the_order() {
        let dir = std::env::temp_dir().join(format!("ploopctl-units-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let conf = dir.join("conf");
        let lines = "my-web /vz/100%\\040\"x\"\nbad\nraw /dev/sd-a noauto,format=raw\n";
        fs::write(&conf, lines).unwrap();
        let out = dir.join("units");
        make(&conf, &out).unwrap();
        let web =
            fs::read_to_string(out.join("ploop@my-web.service.d/50-ploop-conf.conf")).unwrap();
        assert!(
            web.contains("\nRequiresMountsFor=\"/vz/100%% \\\"x\\\"\"\n"),
            "{web}"
        );
        let target = r"blockdev@dev-disk-by\x2dploop-my\x2dweb.target";
        assert!(web.contains(&format!("\nBefore={target}\n")), "{web}");
        assert!(web.contains(&format!("\nWants={target}\n")), "{web}");
        let raw = fs::read_to_string(out.join("ploop@raw.service.d/50-ploop-conf.conf")).unwrap();
        assert!(raw.contains("\nRequires=dev-sd\\x2da.device\n"), "{raw}");
        let wanted = |unit: &str| out.join("ploop.target.wants").join(unit).is_symlink();
        assert!(wanted("ploop@my-web.service"));
        assert!(!wanted("ploop@raw.service"));
        for (device, unit) in [
            (r"dev-disk-by\x2dploop-my\x2dweb", "ploop@my-web.service"),
            (r"dev-disk-by\x2dploop-raw", "ploop@raw.service"),
        ] {
            let link = out.join(format!("{device}.device.requires")).join(unit);
            assert_eq!(fs::read_link(link).unwrap(), Path::new(TEMPLATE));
        }
        assert_eq!(fs::read_dir(&out).unwrap().count(), 5);
        fs::remove_dir_all(&dir).unwrap();
    }
}

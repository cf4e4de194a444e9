// SPDX-License-Identifier: GPL-2.0
//! Making and unmaking devices: the calls of `dev` with their patience, their undoing and their
//! words. Shared by attach and detach, which hold the [`Turn`](crate::locks::Turn) meanwhile.

use crate::dev::{Control, Device};
use crate::error::{Code, Error, Result};
use crate::locks;
use crate::mountinfo::{self, Mount};
use crate::operate::OLDER;
use crate::sysfs::Sysfs;
use nix::errno::Errno;
use nix::unistd::geteuid;
use ploop_pure::abi::{Mismatch, Version, INTERFACE, VERSION};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a node may take to appear below /dev.
const NODE_PATIENCE: Duration = Duration::from_secs(5);
/// How long udev, blkid and the like may keep a device open.
const BUSY_PATIENCE: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Opens the control device to make devices: of a module that gets on with this tool.
pub fn open() -> Result<Control> {
    let control = open_any()?;
    agree(control.version())?;
    Ok(control)
}

/// Whether this tool gets on with a module that gave this answer.
fn agree(answer: nix::Result<Version>) -> Result<()> {
    let module = match answer {
        Ok(module) => module,
        Err(Errno::ENOTTY) => {
            let what =
                format!("the loaded module does not tell its version; this ploopctl is {VERSION}");
            return Err(Error::new(Code::DeviceIoctl, what).hint(OLDER));
        }
        Err(e) => {
            let what = "cannot ask the loaded module for its version";
            return Err(Error::io(Code::DeviceIoctl, what, e));
        }
    };
    let hint = match module.agree() {
        Ok(()) => return Ok(()),
        Err(Mismatch::TooOld) => OLDER,
        Err(Mismatch::TooNew) => {
            "this ploopctl is older than the loaded module: upgrade the package ploopctl"
        }
    };
    let (name, interface) = (module.name(), module.interface);
    let what = format!(
        "the loaded module {name} (interface {interface}) does not get on with \
         this ploopctl {VERSION} (interface {INTERFACE})"
    );
    Err(Error::new(Code::DeviceIoctl, what).hint(hint))
}

/// The version of the loaded module, if there is one and we may ask it.
pub fn module_version() -> Option<String> {
    let module = Control::open().ok()?.version().ok()?;
    let (name, interface) = (module.name(), module.interface);
    Some(format!("module {name} (interface {interface})"))
}

/// Opens the control device, loading the module if it is not there. Whatever the version of the
/// module, devices can be unmade by it.
pub fn open_any() -> Result<Control> {
    let mut refusal = None;
    let opened = match Control::open() {
        Err(e) if is_absent(&e) => {
            refusal = load_module();
            Control::open()
        }
        opened => opened,
    };
    opened.map_err(|e| {
        let path = Control::path();
        let error = Error::io(
            Code::DeviceOpen,
            format!("cannot open {}", path.display()),
            e,
        );
        if is_denied(&error) || refusal.is_some() && !geteuid().is_root() {
            return error.hint("only root may attach and detach: run it with sudo");
        }
        error.hint(refusal.map_or_else(
            || {
                "the ploop kernel module is loaded, but its node is missing: is udev running?"
                    .into()
            },
            |said| module_hint(&said),
        ))
    })
}

/// What to do if the module could not be loaded, by what modprobe said of it.
fn module_hint(said: &str) -> String {
    // In the words of the C library, for EKEYREJECTED, ENOKEY, and EPERM, which lockdown answers.
    const UNSIGNED: [&str; 3] = [
        "Key was rejected",
        "Required key not available",
        "Operation not permitted",
    ];
    let advice = if said.contains("not found") {
        "; install ploop-modules for this kernel ('uname -r'), or ploop-dkms"
    } else if said.contains("Exec format error") {
        "; it was built for another kernel than this ('uname -r')"
    } else if UNSIGNED.iter().any(|words| said.contains(words)) {
        "; under Secure Boot it has to be signed with a key that this machine trusts ('mokutil --list-enrolled')"
    } else {
        "; 'dmesg' may say more"
    };
    format!("the ploop kernel module cannot be loaded: {said}{advice}")
}

fn is_absent(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO)
    )
}

fn is_denied(e: &Error) -> bool {
    let source = std::error::Error::source(e).and_then(|s| s.downcast_ref::<io::Error>());
    source.is_some_and(|s| s.kind() == io::ErrorKind::PermissionDenied)
}

/// Loads the module. Returns what modprobe said if it could not.
fn load_module() -> Option<String> {
    for program in ["/sbin/modprobe", "modprobe"] {
        let run = Command::new(program)
            .arg("ploop")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output();
        match run {
            Ok(run) if run.status.success() => return None,
            Ok(run) => return Some(last_words(&run.stderr)),
            Err(_) => {}
        }
    }
    Some("there is no modprobe".into())
}

/// The last line of what modprobe said, without its name.
fn last_words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().rfind(|line| !line.trim().is_empty());
    let line = line.unwrap_or("modprobe failed and says nothing").trim();
    let line = line.strip_prefix("modprobe: ").unwrap_or(line);
    let line = ["FATAL: ", "ERROR: "]
        .iter()
        .find_map(|level| line.strip_prefix(level))
        .unwrap_or(line);
    line.trim_end_matches('.').into()
}

/// Opens the node of device `index`, waiting for it to appear.
pub fn open_node(index: u32) -> Result<Device> {
    let give_up = Instant::now() + NODE_PATIENCE;
    loop {
        match Device::open(index) {
            Ok(device) => return Ok(device),
            Err(e) if is_absent(&e) && Instant::now() < give_up => sleep(FIRST_PAUSE),
            Err(e) => {
                let path = Device::path(index);
                let what = format!("cannot open {}", path.display());
                return Err(Error::io(Code::DeviceOpen, what, e)
                    .hint("is /dev a devtmpfs, or is udev running?"));
            }
        }
    }
}

/// Repeats `call` while it answers EBUSY, until patience ends.
pub fn while_busy(mut call: impl FnMut() -> std::result::Result<(), Errno>) -> nix::Result<()> {
    let give_up = Instant::now() + BUSY_PATIENCE;
    let mut pause = FIRST_PAUSE;
    loop {
        match call() {
            Err(Errno::EBUSY) if Instant::now() < give_up => sleep(pause),
            Err(Errno::EINTR) => {}
            done => return done,
        }
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// Removes the device from the system; one that is gone is removed.
pub fn remove(control: &Control, index: u32) -> nix::Result<()> {
    match while_busy(|| control.remove(index)) {
        Err(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => Ok(()),
        done => done,
    }
}

/// Waits until nobody has the stopped device `index` open, as udev has for a moment. No if
/// somebody keeps it, or it runs or is gone.
pub fn falls_idle(sysfs: &Sysfs, index: u32) -> Result<bool> {
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        match sysfs.device(index)? {
            Some(d) if d.running => return Ok(false),
            Some(d) if d.open_count == 0 => return Ok(true),
            Some(_) if Instant::now() < give_up => sleep(FIRST_PAUSE * 5),
            Some(_) | None => return Ok(false),
        }
    }
}

/// A device that is being made; unmade when dropped before [`Making::finish`].
pub struct Making<'a> {
    control: &'a Control,
    index: u32,
    device: Option<Device>,
    is_finished: bool,
}

impl<'a> Making<'a> {
    /// Adds a device.
    pub fn begin(control: &'a Control, wanted: Option<u32>) -> Result<Self> {
        let index = control.add(wanted).map_err(|e| add_error(wanted, e))?;
        let mut making = Self {
            control,
            index,
            device: None,
            is_finished: false,
        };
        making.device = Some(open_node(index)?);
        Ok(making)
    }

    /// N of its ploopN.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The open device.
    pub fn device(&self) -> Result<&Device> {
        self.device
            .as_ref()
            .ok_or_else(|| Error::new(Code::System, "the device is not open"))
    }

    /// Keeps the device.
    pub fn finish(mut self) {
        self.is_finished = true;
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        // Best effort: the next attach clears what is left.
        if let Some(device) = self.device.take() {
            let _ = device.clear();
        }
        let _ = remove(self.control, self.index);
    }
}

fn add_error(wanted: Option<u32>, e: Errno) -> Error {
    let name = wanted.map_or("a device".to_owned(), |n| format!("ploop{n}"));
    let what = format!("cannot add {name}");
    match (e, wanted) {
        (Errno::ERANGE | Errno::ENOSPC, None) => {
            Error::new(Code::Busy, "cannot add a device: all numbers are taken")
        }
        (Errno::EEXIST | Errno::EBUSY, Some(n)) => Error::new(
            Code::Busy,
            format!("cannot add ploop{n}: it exists already"),
        )
        .hint("leave out -n to take an unused one; 'ploopctl list' shows those in use"),
        (Errno::EINVAL | Errno::ERANGE, Some(n)) => {
            let max = ploop_pure::abi::DEVICES_MAX - 1;
            Error::new(Code::Param, format!("cannot add ploop{n}: no such number"))
                .hint(format!("devices are numbered from 0 to {max}"))
        }
        (Errno::EPERM, _) => {
            Error::io(Code::DeviceIoctl, what, e).hint("only root may attach: run it with sudo")
        }
        _ => Error::io(Code::DeviceIoctl, what, e).hint("'dmesg' may say more"),
    }
}

/// Says who uses device `index`, as far as it can be found out; ourselves not counted.
pub fn users(sysfs: &Sysfs, index: u32) -> Vec<String> {
    // They are named for a message only.
    let mut users = settled_users(sysfs, index).unwrap_or_default();
    let own = std::process::id();
    for pid in locks::pids().filter(|p| u32::try_from(*p) != Ok(own)) {
        let fds = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut fds = fds.into_iter().flatten().flatten();
        if fds.any(|fd| is_of_disk(&fd.path(), index)) {
            users.push(format!("open in {}", locks::process(pid)));
        }
    }
    users
}

/// Those who stay until somebody sends them away: mount points, swap, devices stacked on it.
pub fn settled_users(sysfs: &Sysfs, index: u32) -> Result<Vec<String>> {
    let mut users = mounts(index)?;
    let holders = sysfs.holders(index);
    users.extend(holders.iter().map(|h| format!("held by /dev/{h}")));
    Ok(users)
}

fn is_of_disk(path: &std::path::Path, index: u32) -> bool {
    fs::metadata(path).is_ok_and(|m| {
        m.file_type().is_block_device() && crate::dev::disk_of(m.rdev()) == Some(index)
    })
}

/// Mount points and swap.
fn mounts(index: u32) -> Result<Vec<String>> {
    let mounts = mountinfo::mounts()?;
    let mut found: Vec<String> = mounts
        .iter()
        .filter(|mount| is_of(mount, index))
        .map(|mount| format!("mounted at {}", mount.at.display()))
        .collect();
    if found.is_empty() {
        // What is mounted here is there in many namespaces, too, and goes from all.
        found.extend(mounts_elsewhere(index));
    }
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    let swaps = swaps.split(|b| *b == b'\n').skip(1);
    let swaps = swaps.filter_map(|l| Some(mountinfo::unescape(l.split(|b| *b == b' ').next()?)));
    let swaps = swaps.filter(|path| is_of_disk(path, index));
    found.extend(swaps.map(|path| format!("swap space on {}", path.display())));
    Ok(found)
}

fn mounts_elsewhere(index: u32) -> Vec<String> {
    let mut found = Vec::new();
    for (pid, mounts) in mountinfo::elsewhere() {
        let of_disk = mounts.iter().filter(|mount| is_of(mount, index));
        found.extend(of_disk.map(|mount| {
            let (at, who) = (mount.at.display(), locks::process(pid));
            format!("mounted at {at} in the mount namespace of {who}")
        }));
    }
    found
}

/// Device N of what is mounted at `path`, by the name of its source: for file systems with numbers
/// of their own.
pub fn mounted_at(path: &std::path::Path) -> Option<u32> {
    let path = fs::canonicalize(path).ok()?;
    let mounts = mountinfo::mounts().ok()?;
    // The last one covers those before it.
    let mount = mounts.iter().rfind(|mount| mount.at == path)?;
    super::index_by_name(&mount.source)
}

/// Whether a mount is of device `index` or a partition of it, by number or, for file systems with
/// numbers of their own, by the name of the source.
fn is_of(mount: &Mount, index: u32) -> bool {
    let by_name = mount.source.is_absolute() && super::index_by_name(&mount.source) == Some(index);
    let number = mount.number.split_once(':');
    let rdev = number.and_then(|(major, minor)| {
        Some(nix::sys::stat::makedev(
            major.parse().ok()?,
            minor.parse().ok()?,
        ))
    });
    by_name || rdev.is_some_and(|rdev| crate::dev::disk_of(rdev) == Some(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_name() {
        let of = |number: &str, source: &str, index| {
            let mount = Mount {
                number: number.to_owned(),
                at: "/mnt".into(),
                source: source.into(),
            };
            is_of(&mount, index)
        };
        assert!(of("182:33", "/dev/x", 2));
        assert!(!of("182:33", "/dev/x", 3));
        // btrfs
        assert!(of("0:50", "/dev/ploop2p1", 2));
        assert!(!of("0:50", "ploop2p1", 2));
        assert!(!of("nonsense", "", 2));
    }

    #[test]
    fn it_is_said_which_to_upgrade() {
        assert!(agree(Ok(Version::ours())).is_ok());
        let newer = Version {
            interface: INTERFACE + 2,
            oldest: INTERFACE + 1,
            ..Version::ours()
        };
        let said = agree(Ok(newer)).unwrap_err().to_string();
        assert!(said.contains("upgrade the package ploopctl"), "{said}");
        let older = Version {
            interface: 0,
            ..Version::ours()
        };
        for older in [Ok(older), Err(Errno::ENOTTY)] {
            let said = agree(older).unwrap_err().to_string();
            assert!(said.contains("older than this ploopctl"), "{said}");
        }
    }

    #[test]
    fn a_module_that_is_refused_is_explained() {
        for (stderr, words) in [
            (
                "modprobe: FATAL: Module ploop not found in directory /lib/modules/1\n",
                "loaded: Module ploop not found in directory /lib/modules/1; install",
            ),
            (
                "modprobe: ERROR: could not insert 'ploop': Exec format error\n",
                "another kernel",
            ),
            (
                "modprobe: ERROR: could not insert 'ploop': Key was rejected by service\n\n",
                "'ploop': Key was rejected by service; under Secure Boot",
            ),
            (
                "modprobe: ERROR: could not insert 'ploop': Operation not permitted",
                "Secure Boot",
            ),
            ("", "says nothing"),
        ] {
            let hint = module_hint(&last_words(stderr.as_bytes()));
            assert!(hint.contains(words), "{hint}");
        }
    }

    #[test]
    fn patience_ends() {
        let begin = Instant::now();
        assert_eq!(while_busy(|| Err(Errno::EBUSY)), Err(Errno::EBUSY));
        assert!(begin.elapsed() >= BUSY_PATIENCE);
        assert_eq!(while_busy(|| Err(Errno::EINVAL)), Err(Errno::EINVAL));
        let mut n = 0;
        let third = || {
            n += 1;
            if n < 3 {
                Err(Errno::EBUSY)
            } else {
                Ok(())
            }
        };
        assert_eq!(while_busy(third), Ok(()));
    }
}

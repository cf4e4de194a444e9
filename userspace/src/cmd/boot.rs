// SPDX-License-Identifier: GPL-2.0
//! `ploopctl boot`: the disks of `/etc/ploop.conf` when a host starts and goes down.
//!
//! A device of a disk has the disk's name for a cookie: so it is found again.

mod units;

use super::backup::interim;
use super::{attach, attached, detach};
use crate::cli::{AttachArgs, BootCommand, DetachArgs, WaitArgs};
use crate::conf::{self, Entry};
use crate::error::{Code, Error, Result};
use crate::operate;
use crate::output;
use crate::sysfs::{Device, Sysfs};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a host that goes down waits for the users of a disk, whom systemd ends meanwhile. Less
/// than the unit's `TimeoutStopSec`.
const USERS_PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(250);

/// Runs the command.
pub fn run(command: &BootCommand) -> Result<()> {
    let conf = Path::new(conf::PATH);
    match command {
        BootCommand::Attach(args) => attach_entry(&conf::entry(conf, &args.name)?),
        BootCommand::Detach(args) => detach_named(&args.name),
        BootCommand::Shutdown(args) => {
            match (host(), args.last) {
                // systemd does not answer any more where nothing else runs.
                (Host::GoesDown | Host::Silent, true) => detach_all(),
                (Host::GoesDown, false) => devices().iter().for_each(release),
                (Host::IsUp, _) | (Host::Silent, false) => {
                    output::note("note: the host does not go down: nothing is done");
                }
            }
            Ok(())
        }
        BootCommand::Units(args) => units::make(conf, &args.dir),
    }
}

fn attach_entry(entry: &Entry) -> Result<()> {
    if let Some(device) = named(&entry.name)? {
        let (name, at) = (&entry.name, device.device.display());
        // Its unit could not be stopped before, or was forgotten.
        if attached::device(&entry.path).is_ok_and(|d| d.index == device.index) {
            output::note(&format!("note: {name} is attached already, as {at}"));
            return Ok(());
        }
        let what = format!("the name {name} is taken by {at}, which has another image");
        return Err(Error::new(Code::InUse, what).hint(format!("'ploopctl info {at}' shows it")));
    }
    let options = entry.options.clone();
    // What a backup left that a crash ended is a part of the disk.
    let above = match options.read_only {
        true => Vec::new(),
        false => interim::above(&entry.path),
    };
    let mut images = vec![entry.path.clone()];
    if let [above] = above.as_slice() {
        output::note(&format!(
            "note: {} is attached with {}, to which it was written while a backup ran: 'ploopctl merge' \
             makes one of them",
            entry.name,
            above.display()
        ));
        images.push(above.clone());
    }
    let attached = attach::run(&AttachArgs {
        read_only: options.read_only,
        no_repair: options.no_repair,
        device: options.device,
        format: options.format,
        cluster: options.cluster,
        cookie: Some(entry.name.clone()),
        images,
        ..AttachArgs::default()
    });
    if attached.is_err() {
        output::note(&format!(
            "{}, line {}: {} is not attached",
            conf::PATH,
            entry.line,
            entry.name
        ));
    }
    attached
}

/// The device of the disk called `name`.
fn named(name: &str) -> Result<Option<Device>> {
    let devices = Sysfs::default().devices()?;
    let mut running = devices.into_iter().filter(|d| d.running);
    Ok(running.find(|d| d.cookie == name))
}

fn detach_named(name: &str) -> Result<()> {
    let Some(device) = named(name)? else {
        output::note(&format!("note: {name} is not attached"));
        return Ok(());
    };
    let force = host() == Host::GoesDown;
    if force {
        release(&device);
    }
    let give_up = Instant::now() + USERS_PATIENCE;
    loop {
        match detach_device(&device, force) {
            Err(e) if force && e.code() == Code::Busy && Instant::now() < give_up => {
                unmount(&device);
                sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// Unmounts what is mounted from the device and not in use any more: systemd tries that once, and its
/// users may have ended since.
fn unmount(device: &Device) {
    for (name, _) in Sysfs::default().parts(device.index) {
        // What is not mounted is no failure, and one that is busy is tried again.
        let _ = Command::new("umount")
            .args(["--quiet", "--all-targets"])
            .arg(Path::new("/dev").join(name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn detach_device(device: &Device, force: bool) -> Result<()> {
    detach::run(&DetachArgs {
        force,
        wait: match force {
            true => WaitArgs::none(),
            false => WaitArgs::default(),
        },
        target: device.device.clone(),
    })
}

/// What waits on a device without limit ends with an error: its file systems can be unmounted.
fn release(device: &Device) {
    if !device.running {
        return;
    }
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        output::note(&format!("note: {what} {}: {e}", device.device.display()));
    };
    if let Err(e) = Sysfs::default().set_on_full(device.index, detach::FAIL) {
        failed("cannot let writes fail that wait on", &e);
    }
    if let Err(e) = operate::cancel(device) {
        failed("cannot end what is done on", &e);
    }
}

/// Detaches whatever is left, as long as that gets on: a device may be on a disk that is one, too.
fn detach_all() {
    devices().iter().for_each(release);
    let mut before = usize::MAX;
    loop {
        let left = devices();
        let last = left.len() >= before;
        for device in &left {
            match detach_device(device, true) {
                Err(e) if last => output::note(&format!("ploopctl: {e}")),
                Err(_) | Ok(()) => {}
            }
        }
        if last || left.is_empty() {
            return;
        }
        before = left.len();
    }
}

/// All devices; what cannot be read is none, as the host goes down all the same.
fn devices() -> Vec<Device> {
    Sysfs::default().devices().unwrap_or_else(|e| {
        output::note(&format!("ploopctl: {e}"));
        Vec::new()
    })
}

/// What systemd says of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    IsUp,
    GoesDown,
    /// Nothing: it is not there, or not any more.
    Silent,
}

fn host() -> Host {
    let state = Command::new("systemctl")
        .arg("is-system-running")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    match state.as_ref().map(|o| o.stdout.trim_ascii()) {
        Ok(b"stopping") => Host::GoesDown,
        Ok(b"" | b"offline" | b"unknown") | Err(_) => Host::Silent,
        Ok(_) => Host::IsUp,
    }
}

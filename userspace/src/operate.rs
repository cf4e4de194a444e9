// SPDX-License-Identifier: GPL-2.0
//! The long operations of the kernel: begun, followed to their end, steered. They belong to the
//! device, and go on when the tool does not.

use crate::dev;
use crate::error::{Code, Error, Result};
use crate::offline::{Go, Progress};
use crate::progress::Shown;
use crate::sysfs::Device;
use nix::errno::Errno;
use ploop_pure::abi::{self, OpStart, OpStatus};
use std::thread::sleep;
use std::time::Duration;

/// Between two looks at how far an operation is.
const PAUSE: Duration = Duration::from_millis(200);

/// What to do about a module that does not know what it is asked.
pub const OLDER: &str = "the loaded module is older than this ploopctl: detach all devices, then \
                         'rmmod ploop && modprobe ploop' loads the one that is installed";

/// What a device is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Merge a level into the one below.
    Merge {
        /// The upper one of the two.
        level: u32,
    },
    /// Make the disk larger.
    Grow {
        /// Its new size.
        sectors: u64,
    },
    /// Make the image of the top shorter.
    Compact,
}

impl Operation {
    fn start(self) -> OpStart {
        match self {
            Self::Merge { level } => OpStart::new(abi::OP_MERGE, level, 0),
            Self::Grow { sectors } => OpStart::new(abi::OP_GROW, 0, sectors),
            Self::Compact => OpStart::new(abi::OP_COMPACT, 0, 0),
        }
    }
}

/// What a request to end does to the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtEnd {
    /// It ends, too, early and cleanly.
    Cancel,
    /// It goes on.
    Leave,
}

/// The name of an operation, `None` if there is none.
pub fn name(op: u32) -> Option<&'static str> {
    match op {
        abi::OP_MERGE => Some("merge"),
        abi::OP_GROW => Some("grow"),
        abi::OP_COMPACT => Some("compact"),
        abi::OP_NONE => None,
        _ => Some("unknown"),
    }
}

/// How many of `total` bytes are done, in percent.
pub fn percent(done: u64, total: u64) -> u64 {
    match u128::from(total) {
        0 => 0,
        total => u64::try_from(u128::from(done) * 100 / total).map_or(100, |n| n.min(100)),
    }
}

/// Opens the node of `device` for control.
pub fn open(device: &Device) -> Result<dev::Device> {
    dev::Device::open(device.index).map_err(|e| {
        let what = format!("cannot open {}", device.device.display());
        Error::io(Code::DeviceOpen, what, e).hint("only root may: run it with sudo")
    })
}

/// The refusal of a call.
pub fn refused(device: &Device, what: &str, e: Errno) -> Error {
    let at = device.device.display();
    let error = Error::io(
        Code::DeviceIoctl,
        format!("the kernel refused to {what} {at}"),
        e,
    );
    match e {
        Errno::EBUSY => error.hint(
            "another operation is going on, see 'ploopctl op status', or somebody holds the image",
        ),
        Errno::ENOTTY => error.hint(OLDER),
        Errno::EPERM => error.hint("only root may: run it with sudo"),
        _ => error.hint("'dmesg' may say more"),
    }
}

/// How far the operation of `device` is, or how the last one ended.
pub fn status(device: &Device) -> Result<OpStatus> {
    let status = open(device)?.op_status();
    status.map_err(|e| refused(device, "tell the progress of", e))
}

/// The same if one is running. A module without long operations has none, and who may not ask is
/// told nothing.
pub fn running(device: &Device) -> Option<OpStatus> {
    let status = dev::Device::open(device.index).ok()?.op_status().ok()?;
    (status.state == abi::OP_RUNNING).then_some(status)
}

/// Waits until no operation runs on `device`.
pub fn settle(device: &Device) -> Result<()> {
    let node = open(device)?;
    while node.op_status().is_ok_and(|s| s.state == abi::OP_RUNNING) {
        sleep(PAUSE);
    }
    Ok(())
}

/// Asks the operation of `device` to end early and waits for that; whether there was one.
pub fn cancel(device: &Device) -> Result<bool> {
    let node = open(device)?;
    let is_running = node.op_status().is_ok_and(|s| s.state == abi::OP_RUNNING);
    if is_running {
        node.op_cancel()
            .map_err(|e| refused(device, "end the operation of", e))?;
    }
    Ok(is_running)
}

/// Limits the operation of `device` to so many bytes a second; 0 is no limit.
pub fn limit(device: &Device, rate: u64) -> Result<()> {
    let node = open(device)?;
    let status = node.op_status();
    let status = status.map_err(|e| refused(device, "tell the progress of", e))?;
    if status.state != abi::OP_RUNNING {
        let what = format!("{} does nothing that takes long", device.device.display());
        return Err(Error::new(Code::Param, what)
            .hint("a limit ends with its operation; --rate begins one with it"));
    }
    node.op_rate(rate)
        .map_err(|e| refused(device, "limit the operation of", e))
}

/// Runs an operation to its end, or goes on waiting for it if it runs already. At most `rate` bytes a
/// second are copied, unless that is 0. Ctrl-C ends it early and cleanly.
pub fn run(device: &Device, operation: Operation, rate: u64) -> Result<OpStatus> {
    let node = open(device)?;
    let start = OpStart {
        rate,
        ..operation.start()
    };
    let serial = match node.op_start(&start) {
        Ok(serial) => serial,
        Err(Errno::EBUSY) => adopt(device, &node, &start)?,
        Err(e) => return Err(refused(device, "begin", e)),
    };
    follow(device, &node, serial, AtEnd::Cancel)
}

/// Waits for the end of the operation of `device`; Ctrl-C ends the waiting alone. What ended before
/// is told at once.
pub fn wait(device: &Device) -> Result<Option<OpStatus>> {
    let node = open(device)?;
    let status = node
        .op_status()
        .map_err(|e| refused(device, "tell the progress of", e))?;
    if status.op == abi::OP_NONE {
        return Ok(None);
    }
    follow(device, &node, status.serial, AtEnd::Leave).map(Some)
}

fn follow(device: &Device, node: &dev::Device, serial: u64, at_end: AtEnd) -> Result<OpStatus> {
    let mut shown = Shown::new();
    let mut told = None;
    let mut is_cancelled = false;
    let mut what = String::new();
    let status = loop {
        let status = node
            .op_status()
            .map_err(|e| refused(device, "tell the progress of", e))?;
        if what.is_empty() {
            what = describe(device, &status);
        }
        if status.serial != serial || status.state != abi::OP_RUNNING {
            break status;
        }
        tell(&mut shown, &what, &mut told, &status);
        if !is_cancelled && shown.go() != Go::On {
            if at_end == AtEnd::Leave {
                shown.end();
                let what = format!("{what}: not waited for any more, it goes on");
                return Err(Error::new(Code::Aborted, what));
            }
            is_cancelled = true;
            // Nothing to cancel: it is over.
            let _ = node.op_cancel();
            continue;
        }
        sleep(PAUSE);
    };
    shown.end();
    if status.serial != serial {
        let what = format!("{what}: another operation began before its end was seen");
        return Err(Error::new(Code::Busy, what));
    }
    match Errno::from_raw(status.result.saturating_neg()) {
        _ if status.result == 0 => Ok(status),
        Errno::ECANCELED | Errno::EINTR => Err(Error::new(
            Code::Aborted,
            format!("{what}: ended early, as asked"),
        )),
        e => {
            Err(Error::io(Code::DeviceIoctl, format!("{what} failed"), e)
                .hint("'dmesg' may say more"))
        }
    }
}

fn describe(device: &Device, status: &OpStatus) -> String {
    let at = device.device.display();
    match status.op {
        abi::OP_MERGE if status.level != abi::LEVEL_TOP => {
            format!("merging level {} of {at}", status.level)
        }
        abi::OP_MERGE => format!("merging the top of {at}"),
        abi::OP_GROW => format!("growing {at}"),
        abi::OP_COMPACT => format!("compacting {at}"),
        _ => format!("the operation of {at}"),
    }
}

/// Shows how far it is; `told` is how far it was, once the total is known.
fn tell(shown: &mut Shown, what: &str, told: &mut Option<u64>, status: &OpStatus) {
    if status.total == 0 {
        return;
    }
    let before = *told.get_or_insert_with(|| {
        shown.begin(what, status.total);
        0
    });
    shown.advance(status.done.saturating_sub(before));
    *told = Some(status.done.max(before));
}

/// The number of the operation that keeps ours from beginning, if it is the same.
fn adopt(device: &Device, node: &dev::Device, start: &OpStart) -> Result<u64> {
    let busy = || refused(device, "begin", Errno::EBUSY);
    let status = node.op_status().map_err(|_| busy())?;
    let top = device.top().map_or(0, |t| t.level);
    let level = |l: u32| if l == abi::LEVEL_TOP { top } else { l };
    let is_same = status.op == start.op && level(status.level) == level(start.level);
    if status.state == abi::OP_RUNNING && is_same {
        return Ok(status.serial);
    }
    Err(busy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_end_at_a_hundred() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(1, 3), 33);
        assert_eq!(percent(u64::MAX, 1), 100);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl op`: what a device does for long, looked at and steered.

use super::attached;
use crate::cli::{OpArgs, OpCommand, OpRateArgs, OpTargetArgs};
use crate::error::{Code, Error, Result};
use crate::operate;
use crate::output;
use crate::size::human;
use crate::sysfs::Device;
use nix::errno::Errno;
use ploop_pure::abi::{self, OpStatus};
use serde::Serialize;
use std::path::Path;

/// Runs the command.
pub fn run(command: &OpCommand) -> Result<()> {
    match command {
        OpCommand::Status(args) => status(args),
        OpCommand::Wait(args) => wait(args),
        OpCommand::Cancel(args) => cancel(args),
        OpCommand::Rate(args) => rate(args),
    }
}

/// An operation as JSON shows it, here and in `info`.
#[derive(Serialize)]
pub struct Shown {
    /// `merge`, `grow`, `compact`; `null` if there was none so far.
    operation: Option<&'static str>,
    running: bool,
    /// Of a merge, the upper level.
    level: Option<u32>,
    /// Why the last one ended early.
    error: Option<&'static str>,
    serial: u64,
    done: u64,
    total: u64,
    /// Bytes a second; 0 is no limit.
    rate: u64,
    /// Bytes by which the image file became shorter.
    freed: u64,
}

impl Shown {
    /// What `status` says.
    pub fn new(status: &OpStatus) -> Self {
        let is_level = status.op == abi::OP_MERGE && status.level != abi::LEVEL_TOP;
        Self {
            operation: operate::name(status.op),
            running: status.state == abi::OP_RUNNING,
            level: is_level.then_some(status.level),
            error: (status.result != 0)
                .then(|| Errno::from_raw(status.result.saturating_neg()).desc()),
            serial: status.serial,
            done: status.done,
            total: status.total,
            rate: status.rate,
            freed: status.freed,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let Some(name) = self.operation else {
            return "none so far".to_owned();
        };
        let level = self
            .level
            .map_or(String::new(), |n| format!(" of level {n}"));
        let limit = match self.rate {
            0 => String::new(),
            rate => format!(", at most {} a second", human(rate)),
        };
        match (self.running, self.error) {
            (true, _) => {
                let percent = operate::percent(self.done, self.total);
                let (done, total) = (human(self.done), human(self.total));
                format!("{name}{level}, {percent}%, {done} of {total}{limit}")
            }
            (false, Some(error)) => format!("none; the last, a {name}{level}, ended: {error}"),
            (false, None) => format!("none; the last, a {name}{level}, is done"),
        }
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(serialize_with = "output::path")]
    device: &'a Path,
    #[serde(flatten)]
    shown: Shown,
}

fn status(args: &OpArgs) -> Result<()> {
    let device = attached::device(&args.target.target)?;
    let shown = Shown::new(&operate::status(&device)?);
    if args.json {
        return output::json(&Answer {
            device: &device.device,
            shown,
        });
    }
    say(&device, &shown.describe())
}

fn wait(args: &OpTargetArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    match operate::wait(&device)? {
        Some(status) => say(&device, &Shown::new(&status).describe()),
        None => say(&device, "none so far"),
    }
}

fn cancel(args: &OpTargetArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    let was_running = operate::cancel(&device)?;
    let status = operate::status(&device)?;
    let shown = Shown::new(&status);
    if was_running && status.result == 0 {
        let what = format!("{}: {}", device.device.display(), shown.describe());
        return Err(Error::new(Code::System, what).hint("it was over before it could be ended"));
    }
    say(&device, &shown.describe())
}

fn rate(args: &OpRateArgs) -> Result<()> {
    let device = attached::device(&args.target.target)?;
    operate::limit(&device, args.rate)?;
    say(&device, &Shown::new(&operate::status(&device)?).describe())
}

fn say(device: &Device, what: &str) -> Result<()> {
    output::text(&format!("{}: {what}\n", device.device.display()))
}

/// What a device does for long, and how it is about space: lines of `info`.
pub fn describe(d: &Device) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    if d.maintenance != "off" {
        let status = operate::running(d).map(|s| Shown::new(&s).describe());
        lines.push(("operation", status.unwrap_or_else(|| d.maintenance.clone())));
    }
    let space = match d.space.as_str() {
        "low" => "low: the image will soon find none to grow".to_owned(),
        "full" => format!(
            "none left: writes wait; make some, or 'echo fail >/sys/block/ploop{}/ptune/on_full' \
             lets them fail",
            d.index
        ),
        _ => return lines,
    };
    lines.push(("space", space));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: OpStatus) -> String {
        Shown::new(&status).describe()
    }

    #[test]
    fn an_operation_is_described() {
        let none = OpStatus::read();
        assert_eq!(said(none), "none so far");
        let running = OpStatus {
            op: abi::OP_MERGE,
            state: abi::OP_RUNNING,
            level: 2,
            done: 1 << 20,
            total: 4 << 20,
            rate: 1 << 20,
            ..none
        };
        assert_eq!(
            said(running),
            "merge of level 2, 25%, 1 MiB of 4 MiB, at most 1 MiB a second"
        );
        let ended = OpStatus {
            state: abi::OP_IDLE,
            result: -(Errno::ENOSPC as i32),
            ..running
        };
        assert_eq!(
            said(ended),
            "none; the last, a merge of level 2, ended: No space left on device"
        );
    }
}

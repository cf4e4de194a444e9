// SPDX-License-Identifier: GPL-2.0
//! Talks to the module directly, past the tool: devices added, attached and detached by ioctl.

use crate::cli::{parse, Failure, Outcome, Words};
use crate::dev::{Arg, Guarded};
use ploop_pure::abi;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use zerocopy::{FromBytes, IntoBytes};

/// Opens the control device.
pub fn control() -> io::Result<File> {
    let path = format!("/dev/{}", abi::CONTROL_NAME);
    OpenOptions::new().read(true).write(true).open(path)
}

/// A device added for a test; removed when dropped, if it lets itself.
pub struct Device {
    /// N of ploopN.
    pub index: i32,
    /// The control device.
    pub control: File,
    /// The disk, open for reading.
    pub disk: Option<File>,
    /// Where arguments are put.
    pub memory: Guarded,
}

impl Device {
    /// Adds a device.
    pub fn add() -> io::Result<Self> {
        let (control, mut memory) = (control()?, Guarded::new()?);
        let arg = abi::DeviceArg::new(-1);
        let (_, out) = memory.ioctl(&control, abi::CTL_ADD, Arg::Bytes(arg.as_bytes()))?;
        let index = i32::from_ne_bytes(std::array::from_fn(|i| out[8 + i]));
        let mut device = Self {
            index,
            control,
            disk: None,
            memory,
        };
        device.disk = Some(File::open(device.path())?);
        Ok(device)
    }

    /// The device that exists as `path`.
    pub fn open(path: &str) -> Result<Self, Failure> {
        let index = path.strip_prefix("/dev/ploop").map(parse);
        let Some(Ok(index)) = index else {
            return Err(Failure::Trouble(format!("{path} is not /dev/ploopN")));
        };
        Ok(Self {
            index: index as i32,
            control: control()?,
            disk: Some(File::open(path)?),
            memory: Guarded::new()?,
        })
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/dev/ploop{}", self.index)
    }

    /// Calls an ioctl of the disk.
    pub fn call(&mut self, request: u32, arg: Arg<'_>) -> io::Result<i32> {
        let disk = self.disk.as_ref().ok_or(io::Error::other("closed"))?;
        Ok(self.memory.ioctl(disk, request, arg)?.0)
    }

    /// ADD_DELTA and START.
    pub fn attach(&mut self, delta: &abi::AddDelta) -> io::Result<()> {
        self.attach_chain(std::slice::from_ref(delta))
    }

    /// ADD_DELTA of each, base first, and START.
    pub fn attach_chain(&mut self, deltas: &[abi::AddDelta]) -> io::Result<()> {
        let mut attached = Ok(0);
        for delta in deltas {
            attached = attached.and_then(|_| {
                let arg = Arg::Bytes(delta.as_bytes());
                self.call(abi::ADD_DELTA, arg)
            });
        }
        if let Err(e) = attached.and_then(|_| self.call(abi::START, Arg::Null)) {
            self.call(abi::CLEAR, Arg::Null)?;
            return Err(e);
        }
        Ok(())
    }

    /// STOP and CLEAR, patient with udev, which opens every new disk for a moment.
    pub fn detach(&mut self) -> io::Result<()> {
        patiently(|| self.call(abi::STOP, Arg::Null))?;
        self.call(abi::CLEAR, Arg::Null).map(drop)
    }

    /// Removes the device.
    pub fn remove(mut self) -> io::Result<()> {
        self.disk = None;
        let arg = abi::DeviceArg::new(self.index);
        patiently(|| {
            let arg = Arg::Bytes(arg.as_bytes());
            self.memory.ioctl(&self.control, abi::CTL_REMOVE, arg)
        })
        .map(drop)
    }
}

/// Tries again for some seconds while the answer is EBUSY.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..100 {
        match call() {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            result => return result,
        }
    }
    call()
}

/// The argument of ADD_DELTA for `image`.
pub fn add_delta(image: &File, format: u32, cluster_log: u32, flags: u32) -> abi::AddDelta {
    abi::AddDelta {
        ctl: abi::Ctl {
            format,
            flags,
            cluster_log,
            size: 0,
            chunks: 1,
            level: 0,
            mbz1: 0,
            mbz2: 0,
        },
        chunk: abi::Chunk {
            fd: image.as_raw_fd(),
            io: abi::IO_AUTO,
            flags: 0,
            offset: 0,
            start: 0,
            len: 0,
        },
        cookie: [0; 64],
    }
}

fn format(name: Option<String>) -> Result<u32, Failure> {
    match name.as_deref() {
        None | Some("ploop1") => Ok(abi::FORMAT_PLOOP1),
        Some("raw") => Ok(abi::FORMAT_RAW),
        Some(other) => Err(Failure::Trouble(format!("no format '{other}'"))),
    }
}

/// `attach-raw [--read-only] [--format raw|ploop1] [--cluster-log N] [--flags N]
/// [--above raw|ploop1] [--all-rw] IMAGE...`
pub fn attach_raw(mut words: Words) -> Outcome {
    let (read_only, all_rw) = (words.flag("--read-only"), words.flag("--all-rw"));
    let base_format = format(words.text("--format")?)?;
    let top_format = format(words.text("--above")?)?;
    let cluster_log = words.number("--cluster-log", 11)? as u32;
    let flags = words.number("--flags", 0)? as u32;
    let paths = words.all_operands()?;
    // The files stay open until the device has its own.
    let (mut images, mut deltas) = (Vec::new(), Vec::new());
    for (level, path) in paths.iter().enumerate() {
        let is_read = read_only || (level + 1 < paths.len() && !all_rw);
        let rdonly = if is_read { abi::FLAG_RDONLY } else { 0 };
        let format = if level == 0 { base_format } else { top_format };
        let image = OpenOptions::new().read(true).write(!is_read).open(path)?;
        deltas.push(add_delta(&image, format, cluster_log, flags | rdonly));
        images.push(image);
    }
    let mut device = Device::add()?;
    let name = device.path();
    match device.attach_chain(&deltas) {
        Ok(()) => {
            println!("{name}");
            Ok(())
        }
        Err(e) => {
            device.remove()?;
            Err(Failure::Broken(format!("refused: {e}")))
        }
    }
}

/// `detach-raw DEVICE`
pub fn detach_raw(words: Words) -> Outcome {
    let [path] = words.operands()?;
    let mut device = Device::open(&path)?;
    device.detach()?;
    device.remove()?;
    Ok(())
}

/// `snapshot [--freeze] [--cluster-log N] [--read-only] [--format raw|ploop1] DEVICE IMAGE`
pub fn snapshot(mut words: Words) -> Outcome {
    let flags = if words.flag("--freeze") {
        abi::FLAG_FS_SYNC
    } else {
        0
    };
    let is_read = words.flag("--read-only");
    let format = format(words.text("--format")?)?;
    let log = words.number("--cluster-log", 11)? as u32;
    let [path, image] = words.operands()?;
    let image = OpenOptions::new().read(true).write(!is_read).open(image)?;
    let arg = add_delta(&image, format, log, flags);
    let bytes = &arg.as_bytes()[..size_of::<abi::Ctl>() + size_of::<abi::Chunk>()];
    let done = Device::open(&path)?.call(abi::SNAPSHOT, Arg::Bytes(bytes));
    done.map(drop)
        .map_err(|e| Failure::Broken(format!("refused: {e}")))
}

/// `op [--rate N] [--start] DEVICE merge LEVEL|top` or `... grow SECTORS` or `... compact`
///
/// With `--start` it is only started: it goes on by itself.
pub fn op(mut words: Words) -> Outcome {
    let rate = words.number("--rate", 0)?;
    let only_start = words.flag("--start");
    let words = words.all_operands()?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (path, op) = match words[..] {
        [path, "merge", "top"] => (path, (abi::OP_MERGE, abi::LEVEL_TOP, 0)),
        [path, "merge", level] => (path, (abi::OP_MERGE, parse(level)? as u32, 0)),
        [path, "grow", sectors] => (path, (abi::OP_GROW, 0, parse(sectors)?)),
        [path, "compact"] => (path, (abi::OP_COMPACT, 0, 0)),
        _ => return Err(Failure::Trouble(format!("no operation {words:?}"))),
    };
    let mut device = Device::open(path)?;
    let mut arg = abi::OpStart::new(op.0, op.1, op.2);
    arg.rate = rate;
    device
        .call(abi::OP_START, Arg::Bytes(arg.as_bytes()))
        .map_err(|e| Failure::Broken(format!("refused: {e}")))?;
    if only_start {
        return Ok(());
    }
    ended(&device_status(&mut device, abi::OP_WAIT)?)
}

/// What OP_STATUS or OP_WAIT say.
fn device_status(device: &mut Device, request: u32) -> Result<abi::OpStatus, Failure> {
    let disk = File::open(device.path())?;
    let arg = abi::OpStatus::read();
    let arg = Arg::Bytes(arg.as_bytes());
    let (_, out) = device.memory.ioctl(&disk, request, arg)?;
    abi::OpStatus::read_from_prefix(&out)
        .map(|(status, _)| status)
        .map_err(|_| Failure::Trouble("no status".into()))
}

fn ended(status: &abi::OpStatus) -> Outcome {
    match status.result {
        0 => Ok(()),
        e => Err(Failure::Broken(format!(
            "ended with errno {}",
            e.unsigned_abs()
        ))),
    }
}

/// `op-wait DEVICE`: until no operation runs; fails as it did.
pub fn op_wait(words: Words) -> Outcome {
    let [path] = words.operands()?;
    ended(&device_status(&mut Device::open(&path)?, abi::OP_WAIT)?)
}

/// `op-status DEVICE`: prints `running|idle RESULT DONE TOTAL FREED`.
pub fn op_status(words: Words) -> Outcome {
    let [path] = words.operands()?;
    let s = device_status(&mut Device::open(&path)?, abi::OP_STATUS)?;
    let state = match s.state {
        abi::OP_RUNNING => "running",
        _ => "idle",
    };
    let result = s.result.unsigned_abs();
    println!("{state} {result} {} {} {}", s.done, s.total, s.freed);
    Ok(())
}

/// `op-cancel DEVICE`: asks the operation to end early.
pub fn op_cancel(words: Words) -> Outcome {
    let [path] = words.operands()?;
    Device::open(&path)?.call(abi::OP_CANCEL, Arg::Null)?;
    Ok(())
}

/// `op-rate DEVICE BYTES`: the most bytes a second; 0 for no limit.
pub fn op_rate(words: Words) -> Outcome {
    let [path, rate] = words.operands()?;
    let rate = parse(&rate)?;
    Device::open(&path)?.call(abi::OP_RATE, Arg::Bytes(rate.as_bytes()))?;
    Ok(())
}

/// `sync DEVICE`: SYNC.
pub fn sync(words: Words) -> Outcome {
    let [path] = words.operands()?;
    Device::open(&path)?.call(abi::SYNC, Arg::Null)?;
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl attach`: judge the image, mend what loses nothing, and hand it to the kernel.
//!
//! The turn is held from the first look to the end, so that another attach or detach cannot come
//! between. While the image is checked, QEMU's locks are held on it; they are released just
//! before the kernel takes its own, which checks once more and refuses what changed meanwhile.

use super::control::{self, Making};
use crate::cli::{AttachArgs, AttachFormat};
use crate::dev::{self, Control, Delta};
use crate::error::{Code, Error, Result};
use crate::image::create::cluster_size;
use crate::image::{repair, Access, Image, Kind, Report};
use crate::locks::{ImageLock, Turn, Use};
use crate::output;
use crate::signals::Quiet;
use crate::sysfs::Sysfs;
use nix::errno::Errno;
use ploop_pure::abi;
use ploop_pure::check::{Cure, Problem};
use ploop_pure::layout::ploop1::Mark;
use ploop_pure::repair::{Plan, Scope};
use ploop_pure::units::ClusterSize;
use serde::Serialize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

#[derive(Serialize)]
struct Answer {
    device: PathBuf,
    index: u32,
    #[serde(serialize_with = "output::path")]
    image: PathBuf,
    format: &'static str,
    read_only: bool,
    /// Steps of the repair that was made.
    repaired: Vec<String>,
}

/// What the kernel is to be told about an image that was found good.
struct Judged {
    format: u32,
    flags: u32,
    cluster: ClusterSize,
    repaired: Vec<String>,
}

/// Runs the command.
pub fn run(args: &AttachArgs) -> Result<()> {
    check_args(args)?;
    let _turn = Turn::take()?;
    let access = if args.read_only {
        Access::Read
    } else {
        Access::Write
    };
    let sysfs = Sysfs::default();
    clear_leftovers(&sysfs, &args.image)?;
    // Many may read an image, as long as nobody writes it.
    let both_read = |d: &crate::sysfs::Device| {
        let delta = d.delta_of(&args.image);
        args.read_only && delta.is_some_and(|delta| delta.read_only)
    };
    let holders = sysfs.find_image(&args.image)?;
    if let Some(device) = holders.iter().find(|d| !both_read(d)) {
        return Err(attached(&args.image, device));
    }
    let image = Image::open(&args.image, access)?;
    let judged = match format(args, &image)? {
        abi::FORMAT_RAW => judge_raw(args, &image)?,
        _ => judge_ploop1(args, &image)?,
    };
    let index = {
        let _quiet = Quiet::begin();
        hand_over(args, &image, &judged)?
    };
    let device = dev::Device::path(index);
    if !args.json {
        return output::text(&format!("{}\n", device.display()));
    }
    output::json(&Answer {
        device,
        index,
        image: args.image.clone(),
        format: format_name(judged.format),
        read_only: args.read_only,
        repaired: judged.repaired,
    })
}

fn check_args(args: &AttachArgs) -> Result<()> {
    if args.cluster.is_some() && args.format != AttachFormat::Raw {
        let what = "-b is for -f raw: a ploop1 image has its own cluster size";
        return Err(Error::new(Code::Param, what));
    }
    let bad_cookie = |c: &String| c.len() > abi::COOKIE_LEN_MAX || c.contains(['\0', '\n']);
    if args.cookie.as_ref().is_some_and(bad_cookie) {
        let what = format!(
            "a cookie is one line of at most {} bytes",
            abi::COOKIE_LEN_MAX
        );
        return Err(Error::new(Code::Param, what));
    }
    if args.device.is_some_and(|n| n >= abi::DEVICES_MAX) {
        let what = format!("devices are numbered from 0 to {}", abi::DEVICES_MAX - 1);
        return Err(Error::new(Code::Param, what));
    }
    Ok(())
}

fn format_name(format: u32) -> &'static str {
    if format == abi::FORMAT_RAW {
        "raw"
    } else {
        "ploop1"
    }
}

fn attached(path: &Path, device: &crate::sysfs::Device) -> Error {
    let node = device.device.display();
    let what = format!("{} is attached already, as {node}", path.display());
    Error::new(Code::InUse, what).hint(format!("'ploopctl detach {node}' detaches it"))
}

/// Which format to attach as. Raw is never guessed: a guest could write the head of another
/// format onto its disk, or a damaged image look like a disk.
fn format(args: &AttachArgs, image: &Image) -> Result<u32> {
    let at = args.image.display();
    let has_magic = image.has_magic()?;
    match (args.format, image.kind()) {
        (AttachFormat::Raw, Kind::File | Kind::Block) => {
            if has_magic {
                output::note(&format!(
                    "note: {at} looks like a ploop1 image, and is attached as raw as asked"
                ));
            }
            Ok(abi::FORMAT_RAW)
        }
        (AttachFormat::Auto | AttachFormat::Ploop1, Kind::Block) => {
            let what = format!("{at} is a block device, which can only be attached as raw");
            Err(Error::new(Code::Param, what).hint("add -f raw"))
        }
        (AttachFormat::Ploop1, Kind::File) => Ok(abi::FORMAT_PLOOP1),
        (AttachFormat::Auto, Kind::File) if has_magic => Ok(abi::FORMAT_PLOOP1),
        (AttachFormat::Auto, Kind::File) => {
            let what = format!("{at} is not a ploop1 image: its magic is missing");
            Err(Error::new(Code::NotAnImage, what)
                .hint("if it is a raw image, say so with -f raw; raw is never guessed"))
        }
    }
}

fn judge_raw(args: &AttachArgs, image: &Image) -> Result<Judged> {
    let cluster = match args.cluster {
        Some(bytes) => cluster_size(bytes)?,
        None => ClusterSize::DEFAULT,
    };
    if image.len_bytes()? < 512 {
        let what = format!("{} is smaller than a sector", args.image.display());
        return Err(Error::new(Code::NotAnImage, what));
    }
    // Locks taken and given back: they tell who else is there.
    ImageLock::take(image.file(), &args.image, usage(args))?;
    Ok(Judged {
        format: abi::FORMAT_RAW,
        flags: rdonly(args),
        cluster,
        repaired: Vec::new(),
    })
}

fn usage(args: &AttachArgs) -> Use {
    if args.read_only {
        Use::Read
    } else {
        Use::Write
    }
}

fn rdonly(args: &AttachArgs) -> u32 {
    if args.read_only {
        abi::FLAG_RDONLY
    } else {
        0
    }
}

fn judge_ploop1(args: &AttachArgs, image: &Image) -> Result<Judged> {
    let _lock = ImageLock::take(image.file(), &args.image, usage(args))?;
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    let header = report.findings.header;
    let mut flags = rdonly(args);
    let mut repaired = Vec::new();
    if let Some(plan) = Plan::new(&report.findings, Scope::Needed) {
        if plan.cure() != Cure::Lossless {
            return Err(lossy(&args.image, &report));
        }
        if args.read_only {
            // The kernel takes these two as they are; a torn cluster in use it cannot read.
            if report.findings.tally.nr_torn > 0 {
                return Err(needs_repair(&args.image, &report, "attach it without -r"));
            }
            flags |= abi::FLAG_ACCEPT_INUSE;
        } else if args.no_repair {
            let hint = "leave out --no-repair: the repair loses nothing";
            return Err(needs_repair(&args.image, &report, hint));
        } else {
            repaired = mend(image, &report, &plan)?;
        }
    } else if !args.read_only && header.mark == Mark::ClosedV21 && header.ext_offset != 0 {
        output::note(&format!(
            "note: the format extension (dirty bitmap) of {} is dropped by writing to the image",
            args.image.display()
        ));
    }
    Ok(Judged {
        format: abi::FORMAT_PLOOP1,
        flags,
        cluster: header.cluster,
        repaired,
    })
}

fn mend(image: &Image, report: &Report, plan: &Plan) -> Result<Vec<String>> {
    repair::apply(image, &report.findings.header, plan)?;
    // Believe the repair only when a second look does.
    let after = image.check()?.map_err(|p| image.not_an_image(p))?;
    if Plan::new(&after.findings, Scope::Needed).is_some() {
        return Err(lossy(image.path(), &after));
    }
    let steps: Vec<String> = plan.steps().map(|s| s.to_string()).collect();
    for step in &steps {
        output::note(&format!("repaired: {step}"));
    }
    Ok(steps)
}

fn first_problem(report: &Report) -> String {
    let is_worst = |p: &&Problem| Some(p.cure()) == report.findings.cure();
    let worst = report.problems.iter().find(is_worst);
    let more = match report.problems.len() as u64 + report.nr_omitted {
        0 | 1 => String::new(),
        n => format!(", and {}", output::count(n - 1, "more problem")),
    };
    worst.map_or(String::new(), |p| format!("{p}{more}"))
}

fn lossy(path: &Path, report: &Report) -> Error {
    let at = path.display();
    let what = format!("{at} is damaged: {}", first_problem(report));
    Error::new(Code::Damaged, what).hint(format!(
        "mending it loses data, so that is not done by itself: see 'ploopctl check {at}', \
         then run 'ploopctl check --repair {at}'"
    ))
}

fn needs_repair(path: &Path, report: &Report, hint: &str) -> Error {
    let problem = first_problem(report);
    let what = format!("{} needs a repair: {problem}", path.display());
    Error::new(Code::Damaged, what).hint(hint)
}

/// Removes what killed tools left: a stopped device with this image, and devices without any.
fn clear_leftovers(sysfs: &Sysfs, path: &Path) -> Result<()> {
    for device in sysfs.devices()? {
        let index = device.index;
        if device.running {
            continue;
        }
        if device.deltas.is_empty() {
            if device.open_count == 0 {
                // Somebody may be about to use it: then it is busy, and stays.
                let _ = control::open()?.remove(index);
            }
        } else if device.delta_of(path).is_some() && control::falls_idle(sysfs, index)? {
            let _quiet = Quiet::begin();
            // A failure shows as an image that is attached already.
            let _ = control::open_node(index)?.clear();
            let _ = control::remove(&control::open()?, index);
        }
    }
    Ok(())
}

fn hand_over(args: &AttachArgs, image: &Image, judged: &Judged) -> Result<u32> {
    let control: Control = control::open()?;
    let making = Making::begin(&control, args.device)?;
    let device = making.device()?;
    device
        .add_delta(Delta {
            image: image.file().as_fd(),
            format: judged.format,
            flags: judged.flags,
            cluster_log: judged.cluster.log_sectors(),
            cookie: args.cookie.as_deref(),
        })
        .map_err(|e| refused(&args.image, "attach", e))?;
    device
        .start()
        .map_err(|e| refused(&args.image, "start", e))?;
    let index = making.index();
    making.finish();
    Ok(index)
}

fn refused(path: &Path, what: &str, e: Errno) -> Error {
    let what = format!("the kernel refused to {what} {}", path.display());
    let (code, hint) = match e {
        Errno::EBUSY | Errno::ETXTBSY => (
            Code::InUse,
            "it is in use: attached, locked by another program, or being written to",
        ),
        Errno::EPERM | Errno::EACCES => (
            Code::DeviceIoctl,
            "only root may attach, and only with an image it may open",
        ),
        Errno::EROFS => (Code::Open, "its file system is read-only: use -r"),
        Errno::EINVAL => (
            Code::DeviceIoctl,
            "the image was found good here; 'dmesg' says what the kernel does not accept",
        ),
        Errno::ENOMEM => (Code::Memory, "'dmesg' says how much its map needs"),
        Errno::ENOTTY => (
            Code::DeviceIoctl,
            "the loaded module is another than this tool is for",
        ),
        _ => (Code::DeviceIoctl, "'dmesg' may say more"),
    };
    Error::io(code, what, e).hint(hint)
}

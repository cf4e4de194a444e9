// SPDX-License-Identifier: GPL-2.0
//! `ploopctl attach`: judge the images, mend what loses nothing, and hand them to the kernel.
//!
//! Several images are a chain, base first: all but the last are only read. What a crash in a merge
//! left in one of them is mended first, unless somebody else reads it or it cannot be written.
//! Those of a disk are named by its descriptor.
//!
//! The turn is held from the first look to the end, so that another attach or detach cannot come
//! between. While an image is checked, QEMU's locks are held on it; they are released before the
//! kernel takes its own, which checks once more and refuses what changed meanwhile.

mod hand_over;

use super::{attached, control};
use crate::cli::{AttachArgs, AttachFormat};
use crate::descriptor::guid::Guid;
use crate::descriptor::named_by;
use crate::dev;
use crate::disk::{self, Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::cluster_size;
use crate::image::{mend, Access, Image, Kind, Report};
use crate::locks::{ImageLock, Turn, Use};
use crate::output;
use crate::signals::Quiet;
use crate::sysfs::Sysfs;
use ploop_pure::abi;
use ploop_pure::chain::{self, Member};
use ploop_pure::layout::ploop1::Mark;
use ploop_pure::problem::Cure;
use ploop_pure::repair::{Plan, Scope};
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};
use serde::Serialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Serialize)]
struct Answer<'a> {
    device: PathBuf,
    index: u32,
    /// The one that is written to: the last.
    #[serde(serialize_with = "output::path")]
    image: &'a Path,
    /// All of them, the base first.
    #[serde(serialize_with = "output::paths")]
    images: &'a [PathBuf],
    format: &'static str,
    read_only: bool,
    /// Steps of the repair that was made.
    repaired: Vec<String>,
}

/// One of the images, and where it is to be.
struct Candidate<'a> {
    args: &'a AttachArgs,
    path: &'a Path,
    level: usize,
    access: Access,
}

/// What the kernel is to be told about an image that was found good.
struct Judged {
    image: Image,
    format: u32,
    flags: u32,
    member: Member,
    repaired: Vec<String>,
}

/// What was attached.
pub struct Attached {
    /// N of its ploopN.
    pub index: u32,
    /// The top.
    top: Judged,
    /// Steps of the repairs that were made; of a lower image with its path.
    repaired: Vec<String>,
}

/// Runs the command.
pub fn run(args: &AttachArgs) -> Result<()> {
    let descriptors = args.images.iter().filter(|p| named_by(p).is_some()).count();
    let live = Live::default();
    // The locks of a disk are held to the end.
    let (mut disk, args) = match (args.images.as_slice(), descriptors) {
        (_, 0) if args.snapshot.is_some() || args.force => {
            let what = "--snapshot and --force are for disks with a descriptor";
            return Err(Error::new(Code::Param, what));
        }
        (_, 0) if args.read_only => (None, args.clone()),
        (images, 0) => {
            let disk = attached::disk_of_top(images, &live, &args.wait)?;
            (disk, args.clone())
        }
        ([given], _) => {
            let disk = super::disk::open(given, &live, Work::Short, &args.wait)?;
            let args = args_of(&disk, args)?;
            (Some(disk), args)
        }
        _ => {
            let what = "a descriptor names all images of its disk: give it alone";
            return Err(Error::new(Code::Param, what));
        }
    };
    let before = match &disk {
        Some(disk) if !args.read_only => disk.members(disk.descriptor().disk().top, args.force)?,
        Some(_) | None => Vec::new(),
    };
    let attached = images(&args)?;
    if let Some(Err(e)) = disk.as_mut().map(|disk| record(disk, &before, args.force)) {
        // It is attached all the same.
        output::note(&format!("note: {e}"));
    }
    let device = dev::Device::path(attached.index);
    if !args.json {
        return output::text(&format!("{}\n", device.display()));
    }
    output::json(&Answer {
        device,
        index: attached.index,
        image: attached.top.image.path(),
        images: &args.images,
        format: format_name(attached.top.format),
        read_only: args.read_only,
        repaired: attached.repaired,
    })
}

/// Writes down what lower images, which were as `before`, are now that we may have mended them. What
/// somebody else changed and was forced was meant.
fn record(disk: &mut Opened, before: &[disk::Member], force: bool) -> Result<()> {
    for member in before {
        disk.changed_by_us(member)?;
    }
    if force {
        let chain: Vec<_> = before.iter().map(|m| m.guid).collect();
        disk.accept(&chain)?;
    }
    Ok(())
}

/// The arguments that attach `disk`, or a snapshot of it.
pub fn args_of(disk: &Opened, args: &AttachArgs) -> Result<AttachArgs> {
    if args.format != AttachFormat::Auto || args.cluster.is_some() {
        let what = "-f and -b are not for a disk: its descriptor says what they would";
        return Err(Error::new(Code::Param, what));
    }
    let guid = args.snapshot.unwrap_or(disk.descriptor().disk().top);
    disk.must_be_whole(guid)?;
    args_of_delta(disk, guid, args)
}

/// The same of any delta, also one that is being removed: `fscheck` marks its own as soon as it is
/// made.
pub fn args_of_delta(disk: &Opened, guid: Guid, args: &AttachArgs) -> Result<AttachArgs> {
    let members = disk.members(guid, args.force)?;
    let is_raw = members.first().is_some_and(|m| m.header.is_none());
    let (format, cluster) = if is_raw {
        let cluster = disk.descriptor().disk().cluster.bytes();
        (AttachFormat::Raw, Some(cluster))
    } else {
        (AttachFormat::Ploop1, None)
    };
    Ok(AttachArgs {
        format,
        cluster,
        images: members.into_iter().map(|m| m.path).collect(),
        ..args.clone()
    })
}

/// Attaches images.
pub fn images(args: &AttachArgs) -> Result<Attached> {
    check_args(args)?;
    let _turn = Turn::take()?;
    let candidates = candidates(args);
    let sysfs = Sysfs::default();
    clear_leftovers(&sysfs, &args.images, args.device)?;
    // Once for all: there may be many images, and many devices that have many.
    let devices = sysfs.devices_of(&args.images)?;
    let mut free = Vec::new();
    for c in &candidates {
        free.push(c.must_be_free(&devices)?);
    }
    let mut judged: Vec<Judged> = Vec::new();
    // If one may be mended, all are looked at: what is refused must leave the others as they are.
    let trust = candidates.iter().all(Candidate::is_closed);
    for (c, is_free) in candidates.iter().zip(free) {
        let next = c.judge(judged.last(), is_free, trust)?;
        judged.push(next);
    }
    let index = {
        let _quiet = Quiet::begin();
        hand_over::start(args, &judged)?
    };
    match judged.pop() {
        Some(mut top) => {
            let of_lower = judged.iter().flat_map(|below| {
                let at = below.image.path().display();
                below
                    .repaired
                    .iter()
                    .map(move |step| format!("{at}: {step}"))
            });
            let mut repaired: Vec<_> = of_lower.collect();
            repaired.append(&mut top.repaired);
            Ok(Attached {
                index,
                top,
                repaired,
            })
        }
        None => Err(Error::new(Code::Param, "no image was given")),
    }
}

/// The images, base first: all but the last are only read.
fn candidates(args: &AttachArgs) -> Vec<Candidate<'_>> {
    let last = args.images.len().saturating_sub(1);
    let with_level = args.images.iter().enumerate();
    with_level
        .map(|(level, path)| Candidate {
            args,
            path,
            level,
            access: if level < last || args.read_only {
                Access::Read
            } else {
                Access::Write
            },
        })
        .collect()
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
    if args.images.len() > chain::DELTAS_MAX {
        let what = format!("a chain has at most {} images", chain::DELTAS_MAX);
        return Err(Error::new(Code::Param, what));
    }
    for (i, path) in args.images.iter().enumerate() {
        if args.images[..i].iter().any(|other| is_same(other, path)) {
            let what = format!("{} is given twice", path.display());
            return Err(Error::new(Code::Param, what));
        }
    }
    if args.device.is_some_and(|n| n >= abi::DEVICES_MAX) {
        let what = format!("devices are numbered from 0 to {}", abi::DEVICES_MAX - 1);
        return Err(Error::new(Code::Param, what));
    }
    Ok(())
}

/// Whether two paths are of one file.
fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        // What cannot be looked at is said when it is opened.
        _ => false,
    }
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

impl Candidate<'_> {
    fn at(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    fn is_read(&self) -> bool {
        self.access == Access::Read
    }

    fn usage(&self) -> Use {
        match self.access {
            Access::Read => Use::Read,
            Access::Write => Use::Write,
        }
    }

    fn rdonly(&self) -> u32 {
        match self.access {
            Access::Read => abi::FLAG_RDONLY,
            Access::Write => 0,
        }
    }

    /// Many may read an image, as long as nobody writes it. Whether no device does either.
    fn must_be_free(&self, devices: &[crate::sysfs::Device]) -> Result<bool> {
        let mut is_free = true;
        for device in devices {
            match device.delta_of(self.path) {
                Some(delta) if !self.is_read() || !delta.read_only => {
                    return Err(attached(self.path, device));
                }
                Some(_) => is_free = false,
                None => {}
            }
        }
        Ok(is_free)
    }

    /// Whether it is sound and fits on `below`; mended if that may be. No device has it if
    /// `is_free`.
    fn judge(&self, below: Option<&Judged>, is_free: bool, trust: bool) -> Result<Judged> {
        let image = Image::open(self.path, self.access)?;
        if !self.is_read() && image.links()? > 1 {
            output::note(&format!(
                "note: {} has other names (hard links): clones that build on it by one of them will be refused",
                self.at()
            ));
        }
        match self.format(&image)? {
            abi::FORMAT_RAW => self.judge_raw(image),
            _ => self.judge_ploop1(image, below, (!trust).then_some(is_free)),
        }
    }

    /// Which format to attach as. Raw is never guessed: a guest could write the head of another
    /// format onto its disk, or a damaged image look like a disk. Above the base it cannot be.
    fn format(&self, image: &Image) -> Result<u32> {
        let at = self.at();
        let has_magic = image.has_magic()?;
        if self.level > 0 {
            return match (has_magic, image.kind()) {
                (true, Kind::File) => Ok(abi::FORMAT_PLOOP1),
                (_, Kind::Block) => {
                    let what = format!("{at} is a block device, which can only be the base");
                    Err(Error::new(Code::Param, what))
                }
                (false, Kind::File) => {
                    let what = format!("{at} is not a ploop1 image: its magic is missing");
                    let hint = "only the first image, the base, can be raw";
                    Err(Error::new(Code::NotAnImage, what).hint(hint))
                }
            };
        }
        match (self.args.format, image.kind()) {
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

    fn judge_raw(&self, image: Image) -> Result<Judged> {
        let cluster = match (self.args.cluster, self.args.images.get(1)) {
            (Some(bytes), _) => cluster_size(bytes)?,
            // It has none of its own, so it takes that of the image above.
            (None, Some(above)) => {
                let above = Image::open(above, Access::Read)?;
                above.good_header()?.0.cluster
            }
            (None, None) => ClusterSize::DEFAULT,
        };
        let size_sectors = image.len_bytes()? / SECTOR_BYTES;
        if size_sectors == 0 {
            let what = format!("{} is smaller than a sector", self.at());
            return Err(Error::new(Code::NotAnImage, what));
        }
        // Locks taken and given back: they tell who else is there.
        ImageLock::take(image.file(), self.path, self.usage())?;
        Ok(Judged {
            image,
            format: abi::FORMAT_RAW,
            flags: self.rdonly(),
            member: Member {
                kind: chain::Kind::Raw,
                cluster,
                size_sectors,
                is_writable: !self.is_read(),
            },
            repaired: Vec::new(),
        })
    }

    /// Whether it was closed and is whole, as far as its header tells: then only entries can be wrong,
    /// and none can be mended without loss. The kernel judges each of them itself; what is wrong is
    /// looked up if it refuses one.
    fn is_closed(&self) -> bool {
        if self.level == 0 && self.args.format == AttachFormat::Raw {
            return true;
        }
        let image = Image::open(self.path, Access::Read);
        let header = image.and_then(|image| image.good_header());
        header.is_ok_and(|(header, length, _)| {
            header.mark == Mark::Closed && header.ext_offset == 0 && !length.torn
        })
    }

    /// With `look`, which says whether no device has the image, its entries are judged here.
    fn judge_ploop1(
        &self,
        image: Image,
        below: Option<&Judged>,
        look: Option<bool>,
    ) -> Result<Judged> {
        let lock = ImageLock::take(image.file(), self.path, self.usage())?;
        let (header, _, _) = image.good_header()?;
        let member = Member {
            kind: chain::Kind::Ploop1(header.version),
            cluster: header.cluster,
            size_sectors: header.size_sectors,
            is_writable: !self.is_read(),
        };
        // Before it is mended: what is refused stays as it is.
        if let Some(below) = below {
            self.must_fit(below, &member)?;
        }
        let (flags, repaired) = match look {
            Some(is_free) => self.look_and_mend(&image, lock, is_free)?,
            None => {
                drop(lock);
                (0, Vec::new())
            }
        };
        Ok(Judged {
            image,
            format: abi::FORMAT_PLOOP1,
            flags: self.rdonly() | flags,
            member,
            repaired,
        })
    }

    /// Judges every entry, and mends what is needed and may be. Returns what the kernel is to be told of
    /// the image, and the steps.
    fn look_and_mend(
        &self,
        image: &Image,
        lock: ImageLock<'_>,
        is_free: bool,
    ) -> Result<(u32, Vec<String>)> {
        let report = image.check()?.map_err(|p| image.not_an_image(p))?;
        let header = report.findings.header;
        let mut repaired = Vec::new();
        let plan = Plan::new(&report.findings, Scope::Needed);
        match &plan {
            Some(plan) if plan.cure() != Cure::Lossless => {
                return Err(mend::lossy(self.path, &report));
            }
            Some(_) if !self.is_read() && self.args.no_repair => {
                let hint = "leave out --no-repair: the repair loses nothing";
                return Err(needs_repair(self.path, &report, hint));
            }
            Some(plan) if !self.is_read() => repaired = mend::carry_out(image, &report, plan)?,
            None if !self.is_read() && header.mark == Mark::ClosedV21 && header.ext_offset != 0 => {
                output::note(&format!(
                    "note: {} has dirty bitmaps; those that go on are what 'ploopctl checkpoint list' \
                     shows, the others are lost when it is written to",
                    self.at()
                ));
            }
            _ => {}
        }
        drop(lock);
        if self.is_read() && plan.is_some() {
            if is_free && !self.args.read_only && !self.args.no_repair {
                repaired = self.mend_lower()?;
            }
            if repaired.is_empty() {
                return Ok((self.take_as_it_is(&report)?, repaired));
            }
        }
        Ok((0, repaired))
    }

    /// The flag by which the kernel takes an image that was not closed. A torn cluster in use it
    /// cannot read.
    fn take_as_it_is(&self, report: &Report) -> Result<u32> {
        if report.findings.tally.nr_torn == 0 {
            return Ok(abi::FLAG_ACCEPT_INUSE);
        }
        let hint = "attach it alone without -r, or run 'ploopctl check --repair'; of a disk, \
                    'ploopctl recover'";
        Err(needs_repair(self.path, report, hint))
    }

    /// Mends what a crash in a merge left in an image that will only be read, and tells the steps:
    /// none where somebody else has it or it cannot be written.
    fn mend_lower(&self) -> Result<Vec<String>> {
        let Ok(image) = Image::open(self.path, Access::Write) else {
            return Ok(Vec::new());
        };
        let Ok(_lock) = ImageLock::take(image.file(), self.path, Use::Write) else {
            return Ok(Vec::new());
        };
        mend::lossless(&image)
    }

    fn must_fit(&self, below: &Judged, member: &Member) -> Result<()> {
        chain::admit(self.level, &below.member, member).map_err(|misfit| {
            let below = below.image.path().display();
            let what = format!("{} does not fit on {below}: {misfit}", self.at());
            Error::new(Code::Param, what).hint("give the images in their order, the base first")
        })
    }
}

fn needs_repair(path: &Path, report: &Report, hint: &str) -> Error {
    let problem = mend::first_problem(report);
    let what = format!("{} needs a repair: {problem}", path.display());
    Error::new(Code::Damaged, what).hint(hint)
}

/// Removes what killed tools left: stopped devices with one of the images, and devices without any. That
/// of the wanted number may have been made just now by opening its node: udev looks at it for a moment.
fn clear_leftovers(sysfs: &Sysfs, paths: &[PathBuf], wanted: Option<u32>) -> Result<()> {
    for index in sysfs.indexes()? {
        if sysfs.is_running(index) {
            continue;
        }
        let Some(device) = sysfs.device(index)?.filter(|d| !d.running) else {
            continue;
        };
        if device.deltas.is_empty() {
            let is_unused = match wanted == Some(index) {
                true => control::falls_idle(sysfs, index)?,
                false => device.open_count == 0,
            };
            if is_unused {
                // Somebody may be about to use it: then it is busy, and stays.
                let _ = control::open_any()?.remove(index);
            }
        } else if paths.iter().any(|path| device.delta_of(path).is_some())
            && control::falls_idle(sysfs, index)?
        {
            let _quiet = Quiet::begin();
            // A failure shows as an image that is attached already.
            let _ = control::open_node(index)?.clear();
            let _ = control::remove(&control::open_any()?, index);
        }
    }
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl clone`: an empty image, or a disk, on a base that many share. The base is only read.
//!
//! The turn is held from the first look to the end, so that nothing is attached in between, as are
//! the locks of a disk that is the base.

use super::attached;
use crate::cli::{AttachFormat, CloneArgs};
use crate::descriptor::guid::Guid;
use crate::descriptor::lock::{FileLock, Patience};
use crate::descriptor::{self, edit, named_by, store, Descriptor};
use crate::disk::{Live, Member, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, cluster_size, Space};
use crate::image::{mend, Access, Image};
use crate::locks::{ImageLock, Turn, Use};
use crate::sysfs::{Device, Sysfs};
use nix::errno::Errno;
use ploop_pure::chain::DELTAS_MAX;
use ploop_pure::layout::ploop1::Header;
use ploop_pure::repair::{Plan, Scope};
use ploop_pure::units::ClusterSize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is built upon: the base first.
struct Below {
    members: Vec<Member>,
    cluster: ClusterSize,
    is_disk: bool,
    /// Held to the end.
    _disk: Option<Opened>,
}

/// Runs the command.
pub fn run(args: &CloneArgs) -> Result<()> {
    let Some((new, bases)) = args.paths.split_last() else {
        return Err(Error::new(Code::Param, "no base was given"));
    };
    let below = match bases {
        [disk] if named_by(disk).is_some() => of_disk(args, disk)?,
        _ => of_images(args, bases)?,
    };
    let _turn = Turn::take()?;
    let paths: Vec<_> = below.members.iter().map(|m| &m.path).collect();
    let devices = Sysfs::default().devices_of(&paths)?;
    for member in &below.members {
        must_be_at_rest(member, &devices)?;
    }
    let header = below.header(new)?;
    if below.is_disk || args.descriptor {
        return make_disk(new, &below, header);
    }
    create::ploop1(new, header, Space::Thin)
}

/// A disk, or a snapshot of it.
fn of_disk(args: &CloneArgs, given: &Path) -> Result<Below> {
    if args.format != AttachFormat::Auto || args.cluster.is_some() {
        let what = "-f and -b are not for a disk: its descriptor says what they would";
        return Err(Error::new(Code::Param, what));
    }
    let disk = super::disk::open(given, &Live::default(), Work::Short, &args.wait)?;
    let guid = args.snapshot.unwrap_or(disk.descriptor().disk().top);
    disk.must_be_whole(guid)?;
    Ok(Below {
        members: disk.members(guid, false)?,
        cluster: disk.descriptor().disk().cluster,
        is_disk: true,
        _disk: Some(disk),
    })
}

fn of_images(args: &CloneArgs, bases: &[PathBuf]) -> Result<Below> {
    if let Some(disk) = bases.iter().find(|b| named_by(b).is_some()) {
        let what = format!("{} is a disk: give it alone", disk.display());
        return Err(Error::new(Code::Param, what));
    }
    if args.snapshot.is_some() {
        let what = "--snapshot is for a disk with a descriptor";
        return Err(Error::new(Code::Param, what));
    }
    let is_raw = args.format == AttachFormat::Raw;
    if args.cluster.is_some() && !is_raw {
        let what = "-b is for -f raw: a ploop1 image has its own cluster size";
        return Err(Error::new(Code::Param, what));
    }
    attached::must_be_whole(bases)?;
    let mut members = Vec::new();
    for (level, path) in bases.iter().enumerate() {
        let guid = random()?;
        // Without links: what is linked to is what is shared.
        let path = fs::canonicalize(path)
            .map_err(|e| Error::io(Code::Open, format!("cannot open {}", path.display()), e))?;
        members.push(Member::read(&path, guid, is_raw && level == 0)?);
    }
    let of_image = members.iter().find_map(|m| Some(m.header?.cluster));
    let cluster = match (of_image, args.cluster) {
        (Some(cluster), _) => cluster,
        (None, Some(bytes)) => cluster_size(bytes)?,
        (None, None) => ClusterSize::DEFAULT,
    };
    Ok(Below {
        members,
        cluster,
        is_disk: false,
        _disk: None,
    })
}

fn random() -> Result<Guid> {
    Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))
}

/// Nobody may write to it now, and it must have been closed cleanly: nobody mends it later.
fn must_be_at_rest(member: &Member, devices: &[Device]) -> Result<()> {
    let path = &member.path;
    let at = path.display();
    let mut deltas = devices.iter().filter_map(|d| Some((d, d.delta_of(path)?)));
    if let Some((device, _)) = deltas.find(|(_, delta)| !delta.read_only) {
        let node = device.device.display();
        let what = format!("{at} is written to, by {node}");
        return Err(Error::new(Code::InUse, what).hint(
            "detach it; of a disk in use, make a snapshot and clone that: 'ploopctl snapshot create', \
             'ploopctl clone --snapshot UUID'",
        ));
    }
    let image = Image::open(path, Access::Read)?;
    let _lock = ImageLock::take(image.file(), path, Use::Read)?;
    if member.header.is_none() {
        return Ok(());
    }
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    if Plan::new(&report.findings, Scope::Needed).is_none() {
        return Ok(());
    }
    let what = format!("{at} needs a repair: {}", mend::first_problem(&report));
    Err(Error::new(Code::Damaged, what).hint(format!(
        "a base is only read, so do that before: 'ploopctl check --repair {at}'"
    )))
}

impl Below {
    /// Header of an empty image on top, `new`, if there can be one.
    fn header(&self, new: &Path) -> Result<Header> {
        let misfit = |above: &Path, below: &Member, why: &dyn std::fmt::Display| {
            let (above, below) = (above.display(), below.path.display());
            let what = format!("{above} does not fit on {below}: {why}");
            Error::new(Code::Param, what).hint("give the images in their order, the base first")
        };
        for pair in self.members.windows(2) {
            let [below, above] = pair else { continue };
            above
                .must_fit_on(below, self.cluster)
                .map_err(|e| misfit(&above.path, below, &e))?;
        }
        let Some(last) = self.members.last() else {
            return Err(Error::new(Code::Param, "no base was given"));
        };
        if self.members.len() >= DELTAS_MAX {
            let what = format!("a chain has at most {DELTAS_MAX} images");
            return Err(Error::new(Code::Param, what));
        }
        let header = Header::new(last.version(), self.cluster, last.size_sectors);
        let header = header.map_err(|p| {
            let what = format!("an image such as {} is not possible: {p}", new.display());
            Error::new(Code::Create, what)
        })?;
        last.must_be_built_on(header, self.cluster)
            .map_err(|e| misfit(new, last, &e))?;
        Ok(header)
    }

    fn is_raw(&self) -> bool {
        self.members.first().is_some_and(|m| m.header.is_none())
    }
}

/// A directory with links to the images of the base, an empty top, and a descriptor, which is last:
/// without it there is no disk.
fn make_disk(dir: &Path, below: &Below, header: Header) -> Result<()> {
    let failed = |e| Error::io(Code::Create, format!("cannot make {}", dir.display()), e);
    fs::create_dir(dir).map_err(failed)?;
    let made = fs::canonicalize(dir)
        .map_err(failed)
        .and_then(|whole| fill_disk(&whole, below, header));
    if made.is_err() {
        // It is ours: nobody has anything else in it.
        let _ = fs::remove_dir_all(dir);
    }
    made?;
    // The name of the directory, too.
    store::sync_dir(&fs::canonicalize(dir).map_err(failed)?)
}

fn fill_disk(dir: &Path, below: &Below, header: Header) -> Result<()> {
    let path = dir.join(descriptor::NAME);
    let _lock = FileLock::take(&path, Patience(Duration::ZERO))?;
    let mut named = Vec::new();
    for (level, member) in below.members.iter().enumerate() {
        // The name of a top is for what is written to.
        let guid = if member.guid == Guid::TOP {
            random()?
        } else {
            member.guid
        };
        let name = match level {
            0 => "root.hds".to_owned(),
            _ => format!("root.hds.{guid}"),
        };
        link(&member.path, &dir.join(&name))?;
        named.push((guid, name, member.record));
    }
    let top = format!("root.hds.{}", random()?);
    create::ploop1(&dir.join(&top), header, Space::Thin)?;
    let (is_raw, cluster) = (below.is_raw(), below.cluster.sectors());
    let text = edit::new_text(header.size_sectors, cluster, is_raw, false, "root.hds");
    let base = Descriptor::parse(&path, &text)?;
    let whole = base.changed(&path, |e| {
        let mut parent = Guid::NULL;
        for (guid, name, record) in &named {
            if parent == Guid::NULL {
                e.rename(Guid::TOP, *guid);
            } else {
                e.add(*guid, parent, is_raw, name);
            }
            e.set_record(*guid, Some(*record));
            parent = *guid;
        }
        e.add(Guid::TOP, parent, is_raw, &top);
        e.set_top(Guid::TOP);
    })?;
    store::write(&path, &whole.text())
}

fn link(image: &Path, name: &Path) -> Result<()> {
    fs::hard_link(image, name).map_err(|e| {
        let from = image.display();
        let what = format!("cannot link {from} to {}", name.display());
        let errno = e.raw_os_error().map(Errno::from_raw);
        let error = Error::io(Code::Create, what, e);
        match errno {
            Some(Errno::EXDEV) => error.hint(
                "a disk has its base as a hard link, so it has to be on the same file system",
            ),
            Some(Errno::EMLINK) => error.hint("the file system allows no more links of a file"),
            _ => error,
        }
    })
}

// SPDX-License-Identifier: GPL-2.0
//! Making a descriptor anew for images that have lost it.
//!
//! Images do not say what they build on. Without being told, a base alone is believed, or one with one
//! image on it, told by their names; for more a likely order is proposed and nothing is done.

use crate::descriptor::guid::Guid;
use crate::descriptor::{edit, store, Descriptor};
use crate::error::{Code, Error, Result};
use crate::image::create::cluster_size;
use crate::image::{Access, Image};
use ploop_pure::layout::ploop1::Header;
use ploop_pure::units::{ClusterSize, SECTOR_BYTES};
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// An image that was found.
#[derive(Debug)]
struct Candidate {
    name: String,
    header: Option<Header>,
    len_bytes: u64,
    changed: Option<SystemTime>,
}

/// What the new descriptor is made from.
pub struct Request<'a> {
    /// Where it is to be.
    pub path: &'a Path,
    /// The images, base first, if they are given.
    pub images: &'a [PathBuf],
    /// The base is raw.
    pub is_raw: bool,
    /// Cluster size in bytes of a raw image that is alone.
    pub cluster: Option<u64>,
}

/// The text of a descriptor, and the names of its images, base first.
pub fn rebuild(request: &Request<'_>) -> Result<(String, Vec<String>)> {
    let dir = store::dir_of(request.path);
    let chain = if request.images.is_empty() {
        order(dir, find(dir, request.is_raw)?)?
    } else {
        let given = request.images.iter().enumerate();
        given
            .map(|(level, path)| take(dir, path, request.is_raw && level == 0))
            .collect::<Result<_>>()?
    };
    let (Some(base), Some(top)) = (chain.first(), chain.last()) else {
        let what = format!("there is no ploop1 image in {}", dir.display());
        return Err(
            Error::new(Code::Param, what).hint("a raw base must be named: give it with -f raw")
        );
    };
    let cluster = match (chain.iter().find_map(|c| c.header), request.cluster) {
        (Some(header), _) => header.cluster,
        (None, Some(bytes)) => cluster_size(bytes)?,
        (None, None) => ClusterSize::DEFAULT,
    };
    let size = |c: &Candidate| {
        c.header
            .map_or(c.len_bytes / SECTOR_BYTES, |h| h.size_sectors)
    };
    let is_raw = base.header.is_none();
    let text = edit::new_text(size(top), cluster.sectors(), is_raw, false, &base.name);
    let mut descriptor = Descriptor::parse(request.path, &text)?;
    for next in &chain[1..] {
        let guid =
            Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?;
        descriptor = descriptor.changed(request.path, |e| {
            e.rename(Guid::TOP, guid);
            e.add(Guid::TOP, guid, is_raw, &next.name);
            e.set_top(Guid::TOP);
        })?;
    }
    let (_, problems) = super::files::inspect(request.path, &descriptor, super::files::Which::All);
    if let Some(first) = problems.wrong.first() {
        let what = format!("the images do not make a disk: {first}");
        return Err(
            Error::new(Code::Param, what).hint("give the images in their order, the base first")
        );
    }
    Ok((
        descriptor.text(),
        chain.into_iter().map(|c| c.name).collect(),
    ))
}

fn candidate(name: String, meta: &Metadata, header: Option<Header>) -> Candidate {
    Candidate {
        name,
        header,
        len_bytes: meta.len(),
        changed: meta.modified().ok(),
    }
}

fn take(dir: &Path, path: &Path, is_raw: bool) -> Result<Candidate> {
    let image = Image::open(path, Access::Read)?;
    let stat = |e| Error::io(Code::Stat, format!("cannot stat {}", path.display()), e);
    let meta = image.file().metadata().map_err(stat)?;
    let real = fs::canonicalize(path).map_err(stat)?;
    let dir = fs::canonicalize(dir).map_err(stat)?;
    let Some(name) = real.strip_prefix(&dir).ok().and_then(Path::to_str) else {
        let what = format!(
            "{} is not in the directory of the descriptor, {}",
            path.display(),
            dir.display()
        );
        return Err(Error::new(Code::Param, what));
    };
    let header = if is_raw {
        None
    } else {
        Some(image.good_header()?.0)
    };
    Ok(candidate(name.to_owned(), &meta, header))
}

/// The images in the directory `dir`. Raw ones cannot be recognized.
fn find(dir: &Path, is_raw: bool) -> Result<Vec<Candidate>> {
    if is_raw {
        let what = "raw images cannot be recognized: name all images, the base first";
        return Err(Error::new(Code::Param, what));
    }
    let failed = |e| Error::io(Code::Open, format!("cannot read {}", dir.display()), e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_file = entry.file_type().is_ok_and(|t| t.is_file());
        let (true, Ok(name)) = (is_file, entry.file_name().into_string()) else {
            continue;
        };
        let path = entry.path();
        let image = Image::open(&path, Access::Read)?;
        if image.has_magic()? {
            found.push(take(dir, &path, false)?);
        } else if name.ends_with(".hds") {
            let what = format!(
                "{} is no ploop1 image; it may be a raw base",
                path.display()
            );
            return Err(Error::new(Code::Param, what)
                .hint("name the images, the base first, with -f raw if the base is raw"));
        }
    }
    Ok(found)
}

/// The order, if there is no doubt. Three images may be a chain, or two that build on the third:
/// nothing in them tells.
fn order(dir: &Path, mut found: Vec<Candidate>) -> Result<Vec<Candidate>> {
    let has_own_guid = |c: &Candidate| {
        c.name
            .rsplit_once('.')
            .is_some_and(|(_, g)| g.parse::<Guid>().is_ok())
    };
    found.sort_by(|a, b| {
        let key = |c: &Candidate| (has_own_guid(c), c.changed, c.header.map(|h| h.size_sectors));
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    let is_plain_base = found.iter().filter(|c| !has_own_guid(c)).count() == 1;
    if found.is_empty() || (found.len() < 3 && is_plain_base) {
        return Ok(found);
    }
    let names: Vec<_> = found
        .iter()
        .map(|c| dir.join(&c.name).display().to_string())
        .collect();
    if let [only] = found.as_slice() {
        let what = format!(
            "{} is named like a delta that builds on another image, which is not there",
            names[0]
        );
        return Err(Error::new(Code::Param, what).hint(format!(
            "alone it is not the disk. If there never was another: ploopctl descriptor restore {} {}",
            dir.display(),
            dir.join(&only.name).display()
        )));
    }
    let what = format!(
        "there are {} images in {}, and nothing in them tells how they build on each other",
        found.len(),
        dir.display()
    );
    Err(Error::new(Code::Param, what).hint(format!(
        "name those of one chain, the base first. By their times it may be: ploopctl descriptor restore {} {}",
        dir.display(),
        names.join(" ")
    )))
}

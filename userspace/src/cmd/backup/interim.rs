// SPDX-License-Identifier: GPL-2.0
//! The image that a device without a descriptor writes to while it is backed up: `IMAGE.backup-UUID`
//! beside its top, or a link of that name if it is elsewhere. After a crash the two together are the
//! disk, and whoever would write to the lower one alone is kept from it.

use crate::descriptor::guid::Guid;
use crate::descriptor::store;
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use crate::output;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const INFIX: &str = ".backup-";

/// A name for the one above `top`: beside it, or in `dir`.
pub fn name(top: &Path, dir: Option<&Path>) -> Result<PathBuf> {
    let is_node = fs::metadata(top).is_ok_and(|m| !m.is_file());
    let dir = match dir {
        Some(dir) => dir.to_owned(),
        None if is_node => {
            let what = format!(
                "{} is a block device, beside which no image can be",
                top.display()
            );
            return Err(Error::new(Code::Param, what).hint(
                "give a directory with some space for what is written meanwhile: --temporary DIR",
            ));
        }
        None => store::dir_of(top).to_owned(),
    };
    let guid =
        Guid::random().map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?;
    let mut name = OsString::from(top.file_name().unwrap_or_default());
    name.push(format!("{INFIX}{guid}"));
    Ok(dir.join(name))
}

/// Where the link to `image` would be, beside `top`.
fn link(top: &Path, image: &Path) -> Option<PathBuf> {
    let dir = fs::canonicalize(store::dir_of(top)).ok()?;
    let is_beside = fs::canonicalize(store::dir_of(image)).is_ok_and(|d| d == dir);
    let is_file = fs::metadata(top).is_ok_and(|m| m.is_file());
    (is_file && !is_beside).then_some(dir.join(image.file_name()?))
}

/// Makes `image`, which exists, known beside `top`. Where that cannot be, it is said.
pub fn leave_link(top: &Path, image: &Path) {
    let Some(link) = link(top, image) else {
        return;
    };
    let made = fs::canonicalize(image).and_then(|real| std::os::unix::fs::symlink(real, &link));
    let made = made.map_err(|e| format!("cannot make {}: {e}", link.display()));
    if let Err(e) = made.and_then(|()| store::sync_dir(&link).map_err(|e| e.to_string())) {
        output::note(&format!(
            "note: {e}; if the host crashes now, attach {} with {}",
            top.display(),
            image.display()
        ));
    }
}

/// Removes `image`, which is merged or was never written to, and the link to it.
pub fn remove(top: &Path, image: &Path) -> std::io::Result<()> {
    fs::remove_file(image)?;
    if let Some(link) = link(top, image).filter(|l| l.is_symlink()) {
        // One that leads nowhere is said by who finds it.
        let _ = fs::remove_file(link);
    }
    Ok(())
}

/// Those above `image` that hold something, or cannot be read.
pub fn above(image: &Path) -> Vec<PathBuf> {
    let Some(image) = fs::canonicalize(image).ok().filter(|i| i.is_file()) else {
        // What cannot be opened is said by who opens it.
        return Vec::new();
    };
    let mut prefix = image.file_name().unwrap_or_default().to_owned();
    prefix.push(INFIX);
    let is_above = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().as_bytes();
        let rest = name.strip_prefix(prefix.as_bytes());
        rest.and_then(|r| std::str::from_utf8(r).ok())
            .is_some_and(|r| r.parse::<Guid>().is_ok())
    };
    let entries = fs::read_dir(store::dir_of(&image)).into_iter().flatten();
    let mut found: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    // Nothing is in one that was merged, or that the crash came before it was written to.
    let has_data = |path: &Path| Image::open(path, Access::Read)?.has_data();
    found.retain(|path| is_above(path) && has_data(path).unwrap_or(true));
    found.sort();
    found
}

/// Refuses `images`, base first, of which the last is not all of its disk.
pub fn must_be_given(images: &[PathBuf]) -> Result<()> {
    must_be_all(images, |_| true)
}

/// The same, heeding those images above the last that are `counted`.
fn must_be_all(images: &[PathBuf], counted: impl Fn(&Path) -> bool) -> Result<()> {
    let Some(last) = images.last() else {
        return Ok(());
    };
    let mut above = above(last);
    above.retain(|path| counted(path));
    let Some(first) = above.first() else {
        return Ok(());
    };
    let (at, image) = (last.display(), first.display());
    let given: Vec<_> = images.iter().map(|p| p.display().to_string()).collect();
    let given = given.join(" ");
    let all: Vec<_> = above.iter().map(|p| p.display().to_string()).collect();
    let what = format!(
        "{at} is not all of its disk: what was written while a backup ran is in {}",
        all.join(", ")
    );
    Err(Error::new(Code::Param, what).hint(format!(
        "'ploopctl attach {given} {image}' attaches it with that, then 'ploopctl merge' that device makes them one; \
         if what is in {image} is not wanted, remove it"
    )))
}

/// Refuses to merge `upper` into `lower` where a backup left another image above the one or the other: it
/// builds on what they are now.
pub fn must_be_uppermost(lower: &Path, upper: &Path) -> Result<()> {
    must_be_given(&[lower.to_owned(), upper.to_owned()])?;
    must_be_all(&[lower.to_owned()], |path| {
        let same = (fs::canonicalize(path), fs::canonicalize(upper));
        !matches!(same, (Ok(a), Ok(b)) if a == b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::create::{self, Space};
    use ploop_pure::layout::ploop1::{Header, Version};
    use ploop_pure::units::ClusterSize;

    #[test]
    fn what_is_above_an_image_is_found() {
        let dir = std::env::temp_dir().join(format!("ploopctl-interim-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("elsewhere")).unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        let new = |path: &Path| {
            let header = Header::new(Version::V2, ClusterSize::DEFAULT, 1 << 12).unwrap();
            create::ploop1(path, header, Space::Thin).unwrap();
        };
        let (image, other) = (dir.join("a.img"), dir.join("b.img"));
        new(&image);
        new(&other);
        let given = [image.clone()];
        let (near, far) = (
            name(&image, None).unwrap(),
            name(&image, Some(&dir.join("elsewhere"))).unwrap(),
        );
        new(&near);
        // Empty as yet.
        must_be_given(&given).unwrap();
        // An entry: the first slot.
        let fill = |path: &Path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            let cluster = ClusterSize::DEFAULT.bytes();
            std::os::unix::fs::FileExt::write_all_at(&file, &1_u32.to_le_bytes(), 64).unwrap();
            file.set_len(2 * cluster).unwrap();
        };
        fill(&near);
        assert_eq!(above(&image), [near.clone()]);
        let error = must_be_given(&given).unwrap_err();
        assert_eq!(error.code(), Code::Param);
        assert!(error.to_string().contains(near.to_str().unwrap()));
        must_be_given(&[image.clone(), near.clone()]).unwrap();
        must_be_given(&[other]).unwrap();
        remove(&image, &near).unwrap();
        must_be_given(&given).unwrap();
        // By its link; one that leads nowhere cannot be looked at.
        new(&far);
        leave_link(&image, &far);
        must_be_given(&given).unwrap();
        fill(&far);
        must_be_given(&given).unwrap_err();
        fs::rename(&far, dir.join("away")).unwrap();
        must_be_given(&given).unwrap_err();
        fs::rename(dir.join("away"), &far).unwrap();
        remove(&image, &far).unwrap();
        assert_eq!(above(&image), [] as [PathBuf; 0]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 3);
        // Not one of those.
        fs::write(dir.join("a.img.backup-old"), "x").unwrap();
        must_be_given(&given).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
}

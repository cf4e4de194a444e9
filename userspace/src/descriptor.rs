// SPDX-License-Identifier: GPL-2.0
//! `DiskDescriptor.xml`: which images a disk consists of and how they build on each other.
//!
//! ```text
//! store, lock (the file)    edit -> model -> guid
//!                           edit, model -> xml (a tree that keeps what it does not know)
//! ```
//!
//! A [`Descriptor`] is sound in itself: what it says does not contradict itself. Whether its
//! images are there and are what it says is for [`disk`](crate::disk), as is every change.

pub mod edit;
pub mod guid;
pub mod lock;
pub mod model;
pub mod store;
mod xml;

#[cfg(test)]
mod tests;

use crate::error::{Code, Error, Result};
use edit::Edit;
use guid::Guid;
use model::{Disk, ImageEntry};
use std::path::{Path, PathBuf};
use xml::Document;

/// Its usual name.
pub const NAME: &str = "DiskDescriptor.xml";

/// A sound descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    document: Document,
    disk: Disk,
}

/// The path of the descriptor that a command was given: a file `….xml`, or a directory, whatever
/// its name, with a [`NAME`] in it. `None` if it was given something else. What is beside the file
/// is beside it where it really is, so links are followed.
pub fn named_by(path: &Path) -> Option<PathBuf> {
    let is_xml = |p: &Path| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("xml"));
    let found = if path.is_dir() {
        let inside = path.join(NAME);
        inside.symlink_metadata().ok().map(|_| inside)
    } else {
        is_xml(path).then(|| path.to_owned())
    };
    found.map(|path| std::fs::canonicalize(&path).unwrap_or(path))
}

impl Descriptor {
    /// Reads one; what is wrong with it is told about `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let (document, disk) = read(text).map_err(|what| invalid(path, &what))?;
        let problems = disk.problems();
        if let Some(first) = problems.first() {
            let more = match problems.len() {
                1 => String::new(),
                n => format!(
                    ", and {}",
                    crate::output::count(n as u64 - 1, "more problem")
                ),
            };
            return Err(invalid(path, &format!("{first}{more}")));
        }
        Ok(Self { document, disk })
    }

    /// What it says.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The file.
    pub fn text(&self) -> String {
        self.document.text()
    }

    /// The text that it is after `change`, which is sound again.
    pub fn changed(&self, path: &Path, change: impl FnOnce(&mut Edit)) -> Result<Self> {
        let mut edit = Edit::new(&self.document, &self.disk);
        change(&mut edit);
        Self::parse(path, &edit.finish())
    }

    /// The image of the top.
    pub fn top(&self) -> &ImageEntry {
        self.image(self.disk.top)
    }

    /// The image of a delta that it has.
    pub fn image(&self, guid: Guid) -> &ImageEntry {
        let found = self.disk.image(guid);
        // Sound: there is at least one image, and callers ask for what they found in it.
        found.unwrap_or(&self.disk.images[0])
    }

    /// The images from the base to `guid`, which is one of its deltas.
    pub fn chain(&self, guid: Guid) -> Vec<&ImageEntry> {
        let chain = self.disk.chain(guid).unwrap_or_default();
        chain.into_iter().map(|g| self.image(g)).collect()
    }
}

/// All that is wrong with a descriptor.
pub fn problems(text: &str) -> Vec<String> {
    match read(text) {
        Ok((_, disk)) => disk.problems(),
        Err(what) => vec![what],
    }
}

fn read(text: &str) -> std::result::Result<(Document, Disk), String> {
    let document = Document::parse(text)?;
    let disk = Disk::read(&document.root)?;
    Ok((document, disk))
}

fn invalid(path: &Path, what: &str) -> Error {
    let what = format!("{} is not a valid descriptor: {what}", path.display());
    Error::new(Code::Descriptor, what)
        .hint("'ploopctl descriptor validate' lists all that is wrong with it")
}

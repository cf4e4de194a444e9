// SPDX-License-Identifier: GPL-2.0
//! Merging a delta into the one below it.
//!
//! The lower image is written to and so its snapshot ceases to be one by itself as soon as that
//! begins. It is marked as temporary first, as OpenVZ's tools do: whatever happens, what builds on
//! it is intact, and the merge can be begun again.

use super::intent::{Intent, Operation};
use super::outside::Outside;
use super::Opened;
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::sysfs::Device;
use std::path::Path;

impl Opened {
    /// Merges `child` into its parent, which nothing else builds on. The parent's file stays, under
    /// the name of the child.
    pub(super) fn merge_into(
        &mut self,
        outside: &dyn Outside,
        parent: Guid,
        child: Guid,
    ) -> Result<()> {
        let disk = self.descriptor.disk().clone();
        if disk.children(parent).nth(1).is_some() {
            let what = format!("several deltas build on {parent}: none can be merged into it");
            return Err(Error::new(Code::Param, what).hint("'ploopctl snapshot tree' shows them"));
        }
        let users = self.users(outside)?;
        // A device that writes was let have them. Else the merge would make a change for good that may
        // have damaged what builds on it, and forget it.
        let force = !users.writers.is_empty();
        self.members(disk.top, force)?;
        self.members(child, force)?;
        let (lower, upper) = (self.member(parent)?, self.member(child)?);
        lower.must_be_ours()?;
        let of_both =
            |d: &&Device| d.delta_of(&lower.path).is_some() || d.delta_of(&upper.path).is_some();
        if let Some(device) = users.readers.iter().find(of_both) {
            let node = device.device.display();
            return Err(super::in_use(&lower.path, device).hint(format!(
                "a snapshot that is mounted or attached read-only cannot change: unmount it first, or \
                 detach it by 'ploopctl detach {node}'"
            )));
        }
        if let Some(device) = self.top_writer(&users)? {
            must_have_neither_or_both(&device, &lower.path, &upper.path)?;
        }
        let (lower_file, upper_file) = (
            self.descriptor.image(parent).file.clone(),
            self.descriptor.image(child).file.clone(),
        );
        let marked = self.descriptor.changed(&self.path, |e| {
            e.set_temporary(parent, true);
            e.set_record(parent, None);
        })?;
        let grandparent = disk.shot(parent).map_or(Guid::NULL, |s| s.parent);
        let after = marked.changed(&self.path, |e| {
            e.remove(parent);
            e.set_parent(child, grandparent);
            e.set_file(child, &lower_file);
            e.set_record(child, None);
        })?;
        let operation = Operation::Merge {
            uuid: parent,
            child,
            lower: lower_file,
            upper: upper_file,
            marked: marked.text(),
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        intent.store(&self.path)?;
        outside.step("intent");
        self.store(&marked.text())?;
        outside.step("marked");
        let ended = self.recover_quietly(outside);
        if let Err(e) = ended {
            if self.descriptor.text() != marked.text() {
                return Err(e.hint(format!(
                    "{child} is merged, but its former image is left; 'ploopctl recover {}' goes on",
                    self.path.display()
                )));
            }
            // It stays marked and can be begun again; until then it is in nobody's way.
            Intent::remove(&self.path)?;
            return Err(e.hint(format!(
                "the snapshot {parent} is half merged and stays marked as being removed; the disk and the \
                 other snapshots are intact. 'ploopctl recover {}' goes on with it",
                self.path.display()
            )));
        }
        Ok(())
    }

    fn recover_quietly(&mut self, outside: &dyn Outside) -> Result<()> {
        let nr = self.mended.len();
        let result = self.recover(outside);
        self.mended.truncate(nr);
        result
    }

    /// Merges `child`, the top if none is given, into its parent.
    pub fn merge(&mut self, outside: &dyn Outside, child: Option<Guid>) -> Result<()> {
        let child = child.unwrap_or(self.descriptor.disk().top);
        self.must_exist(child)?;
        let parent = self
            .descriptor
            .disk()
            .shot(child)
            .map_or(Guid::NULL, |s| s.parent);
        if parent == Guid::NULL {
            let what = format!("{child} is the base: there is nothing below it");
            return Err(Error::new(Code::Param, what));
        }
        self.merge_into(outside, parent, child)
    }

    /// Merges the chain of the top down to one image.
    pub fn merge_all(&mut self, outside: &dyn Outside) -> Result<()> {
        loop {
            let disk = self.descriptor.disk();
            let chain = disk.chain(disk.top).unwrap_or_default();
            // From the top down: what was merged once is merged again, but a lower image is changed
            // only when its turn comes.
            match chain.as_slice() {
                [.., parent, child] => {
                    let (parent, child) = (*parent, *child);
                    self.merge_into(outside, parent, child)?;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Marks a snapshot as one that is to go.
    pub fn mark_temporary(&mut self, guid: Guid) -> Result<()> {
        let after = self
            .descriptor
            .changed(&self.path, |e| e.set_temporary(guid, true))?;
        self.store(&after.text())
    }

    /// Goes on with removing the snapshots that are marked as temporary, those that can be. The
    /// names of those that are gone are returned.
    pub fn remove_temporary(&mut self, outside: &dyn Outside) -> Result<Vec<Guid>> {
        let mut removed = Vec::new();
        loop {
            let disk = self.descriptor.disk();
            let next = disk
                .shots
                .iter()
                .find(|s| s.is_temporary && disk.children(s.guid).count() < 2);
            let Some(next) = next.map(|s| s.guid) else {
                return Ok(removed);
            };
            self.delete_one(outside, next)?;
            removed.push(next);
        }
    }
}

/// A device that has one of the two was attached by name, or has let go of the other: what it
/// shows is not what the merge would make.
pub(super) fn must_have_neither_or_both(device: &Device, lower: &Path, upper: &Path) -> Result<()> {
    let hint = "its images were not attached by this descriptor: detach it";
    match (device.delta_of(lower), device.delta_of(upper)) {
        (None, None) => Ok(()),
        (Some(below), Some(above)) if below.level + 1 == above.level => Ok(()),
        (Some(_), _) => Err(super::in_use(lower, device).hint(hint)),
        (None, Some(_)) => Err(super::in_use(upper, device).hint(hint)),
    }
}

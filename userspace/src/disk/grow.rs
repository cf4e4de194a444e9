// SPDX-License-Identifier: GPL-2.0
//! Making a disk larger, the image of its top first, then the descriptor; and its images shorter.

use super::intent::{Intent, Operation};
use super::outside::{Base, Outside};
use super::recover::Verdict;
use super::{Member, Opened};
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::output;
use ploop_pure::units::SECTOR_BYTES;
use std::path::PathBuf;

impl Opened {
    /// Gives the disk `sectors`; whether it had another size before.
    pub fn grow(&mut self, outside: &dyn Outside, sectors: u64) -> Result<bool> {
        let disk = self.descriptor.disk().clone();
        if sectors == disk.size_sectors {
            return Ok(false);
        }
        if sectors < disk.size_sectors {
            let what = format!(
                "{} has {} sectors and cannot become smaller",
                self.path.display(),
                disk.size_sectors
            );
            return Err(Error::new(Code::Param, what));
        }
        self.members(disk.top, true)?;
        let top = self.member(disk.top)?;
        top.must_be_ours()?;
        self.may_grow(&top, sectors)?;
        let writer = self.writer(&self.users(outside)?)?;
        let after = self
            .descriptor
            .changed(&self.path, |e| e.set_size(sectors))?;
        let intent = Intent::new(
            Operation::Grow { sectors },
            self.descriptor.text(),
            after.text(),
        );
        self.carry_out(outside, &intent, |_| {
            match &writer {
                Some(device) => outside.grow(device, sectors)?,
                None => {
                    let kind = if top.header.is_none() {
                        Base::Raw
                    } else {
                        Base::Ploop1
                    };
                    outside.grow_file(&top.path, kind, sectors)?;
                }
            }
            outside.step("grown");
            Ok(())
        })?;
        Ok(true)
    }

    /// The larger top must fit on its parent: what ends inside a cluster cannot be built upon by
    /// what is larger, and such a disk would not be attached any more.
    fn may_grow(&self, top: &Member, sectors: u64) -> Result<()> {
        let disk = self.descriptor.disk();
        let parent = disk.shot(disk.top).map_or(Guid::NULL, |s| s.parent);
        if parent == Guid::NULL {
            return Ok(());
        }
        let below = self.member(parent)?;
        let larger = top.resized(sectors);
        larger.must_fit_on(&below, disk.cluster).map_err(|misfit| {
            let what = format!(
                "{} cannot have {sectors} sectors: {misfit}",
                self.path.display()
            );
            Error::new(Code::Param, what)
                .hint("'ploopctl snapshot merge --all' makes one image of it, which can grow")
        })
    }

    /// Makes images shorter by what they do not use: that of the top if the disk is attached, else
    /// all. Their names and by how many bytes. Ended anywhere, it can be begun again.
    pub fn compact(&mut self, outside: &dyn Outside) -> Result<Vec<(PathBuf, u64)>> {
        let users = self.users(outside)?;
        if let Some(device) = self.writer(&users)? {
            let freed = outside.compact(&device)?;
            return Ok(vec![(self.file(self.descriptor.top())?, freed)]);
        }
        let disk = self.descriptor.disk().clone();
        self.members(disk.top, false)?;
        let (members, absent) = self.present()?;
        for what in &absent {
            output::note(what);
        }
        let mut done = Vec::new();
        for member in members.into_iter().filter(|m| m.header.is_some()) {
            if let Err(e) = member.must_be_ours() {
                output::note(&format!("note: {}", e.without_hint()));
                continue;
            }
            self.must_be_unused(&member.path, &outside.devices()?)?;
            self.about_to_change(&member)?;
            let freed = outside.compact_file(&member.path)?;
            done.push((member.path, freed));
        }
        self.record_lower()?;
        Ok(done)
    }

    /// Whether the device or, without one, the image of the top has the new size.
    pub(super) fn judge_grown(&self, outside: &dyn Outside, sectors: u64) -> Result<Verdict> {
        let writer = self.top_writer(&self.users(outside)?)?;
        let size = match &writer {
            Some(device) => {
                outside.settle(device)?;
                let now = self.top_writer(&self.users(outside)?)?;
                now.map_or(0, |d| d.size / SECTOR_BYTES)
            }
            None => self.member(self.descriptor.disk().top)?.size_sectors,
        };
        Ok(if size == sectors {
            Verdict::Complete
        } else {
            Verdict::Undo
        })
    }
}

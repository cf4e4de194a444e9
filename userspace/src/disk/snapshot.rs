// SPDX-License-Identifier: GPL-2.0
//! Making snapshots, going back to them, removing them.

use super::intent::{Intent, Operation};
use super::outside::{Freeze, NewDelta, Outside};
use super::{in_use, Member, Opened, Users};
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use crate::sysfs::Device;
use ploop_pure::chain::DELTAS_MAX;
use ploop_pure::layout::ploop1::Header;

/// How a snapshot was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Nothing built on it: its file is gone.
    Dropped,
    /// What built on it was merged into it.
    Merged,
    /// Several deltas build on it: it is gone when only one does.
    Marked,
}

impl Opened {
    /// The snapshot `guid`, or the refusal.
    pub fn must_exist(&self, guid: Guid) -> Result<()> {
        if self.descriptor.disk().shot(guid).is_some() {
            return Ok(());
        }
        let what = format!("there is no snapshot {guid} of {}", self.path.display());
        Err(Error::new(Code::NoSnapshot, what)
            .hint("'ploopctl snapshot list' shows those there are"))
    }

    /// The snapshot `guid` if it is there and whole. One that is being removed may have a part of
    /// what came later in it.
    pub fn must_be_whole(&self, guid: Guid) -> Result<()> {
        self.must_exist(guid)?;
        if !self
            .descriptor
            .disk()
            .shot(guid)
            .is_some_and(|s| s.is_temporary)
        {
            return Ok(());
        }
        Err(self.is_going(guid))
    }

    /// The refusal of a snapshot that is being removed.
    fn is_going(&self, guid: Guid) -> Error {
        let what = format!("the snapshot {guid} is being removed");
        let hint = match self.descriptor.disk().children(guid).nth(1) {
            Some(_) => "several deltas build on it: it goes when one of them is left",
            None => "'ploopctl recover' completes that",
        };
        Error::new(Code::Param, what).hint(hint)
    }

    /// The device that writes to the top, or nobody. One that only reads the top is in the way.
    pub fn writer(&self, users: &Users) -> Result<Option<Device>> {
        let top = self.file(self.descriptor.top())?;
        if let Some(device) = users.readers.iter().find(|d| d.delta_of(&top).is_some()) {
            return Err(in_use(&top, device).hint("it is attached read-only: detach it first"));
        }
        self.top_writer(users)
    }

    /// The same, whoever reads. One that writes to another image of the disk is in the way: what
    /// it writes is not known to what builds on that.
    pub fn top_writer(&self, users: &Users) -> Result<Option<Device>> {
        let top = self.file(self.descriptor.top())?;
        let is_of_top = |d: &Device| d.top().is_some_and(|t| d.delta_of(&top) == Some(t));
        let stray = users.writers.iter().find(|d| !is_of_top(d));
        let Some(device) = stray.or(users.writers.first()) else {
            return Ok(None);
        };
        if stray.is_some() {
            let image = device
                .top()
                .map(|t| t.image.display().to_string())
                .unwrap_or_default();
            let what = format!(
                "{} writes to {image}, which is not the top of {}",
                device.device.display(),
                self.path.display()
            );
            return Err(Error::new(Code::InUse, what)
                .hint("detach it; its images were not attached by this descriptor"));
        }
        if !device.running {
            return Err(in_use(&top, device).hint(format!(
                "it was left stopped by a tool that was killed: 'ploopctl detach {}' removes it",
                device.device.display()
            )));
        }
        Ok(Some(device.clone()))
    }

    /// Nobody may have the top.
    pub(super) fn must_be_detached(&self, users: &Users, what: &str) -> Result<()> {
        let top = self.file(self.descriptor.top())?;
        let reader = users.readers.iter().find(|d| d.delta_of(&top).is_some());
        match users.writers.first().or(reader) {
            Some(device) => {
                let node = device.device.display();
                let what = format!("{} is attached as {node}; {what}", self.path.display());
                Err(Error::new(Code::Param, what)
                    .hint(format!("'ploopctl detach {node}' detaches it")))
            }
            None => Ok(()),
        }
    }

    /// An empty image that fits on `below`, for a disk of `size_sectors`.
    fn make_empty(&self, file: &str, below: &Member, size_sectors: u64) -> Result<()> {
        let path = self.other_file(file);
        let cluster = self.descriptor.disk().cluster;
        let header = Header::new(below.version(), cluster, size_sectors).map_err(|p| {
            Error::new(
                Code::Create,
                format!("an image such as {} is not possible: {p}", path.display()),
            )
        })?;
        create::ploop1(&path, header, Space::Thin)
    }

    /// Freezes what is written so far under the name `uuid`, or one of our choice. What is written
    /// from then on goes to a new image.
    pub fn snapshot(
        &mut self,
        outside: &dyn Outside,
        uuid: Option<Guid>,
        freeze: Freeze,
    ) -> Result<Guid> {
        let disk = self.descriptor.disk().clone();
        let uuid = match uuid {
            Some(uuid) => uuid,
            None => Guid::random()
                .map_err(|e| Error::io(Code::System, "cannot get random numbers", e))?,
        };
        if disk.shot(uuid).is_some() || [Guid::TOP, Guid::NULL].contains(&uuid) {
            let what = format!("the name {uuid} is taken in {}", self.path.display());
            return Err(Error::new(Code::Param, what).hint("leave out --uuid, and one is made up"));
        }
        let chain = self.members(disk.top, true)?;
        if chain.len() >= DELTAS_MAX {
            let what = format!("{} has {DELTAS_MAX} deltas already", self.path.display());
            return Err(
                Error::new(Code::Param, what).hint("'ploopctl snapshot delete' removes snapshots")
            );
        }
        let top = self.member(disk.top)?;
        let writer = self.writer(&self.users(outside)?)?;
        if top.size_sectors % u64::from(disk.cluster.sectors()) != 0 && top.header.is_none() {
            let what = format!(
                "{} ends inside a cluster and cannot be built upon",
                top.path.display()
            );
            return Err(Error::new(Code::Param, what));
        }
        let image = Image::open(
            &top.path,
            if writer.is_some() {
                Access::Read
            } else {
                Access::Write
            },
        )?;
        let _lock = match &writer {
            Some(_) => None,
            None => Some(self.mend_top(&top, &image)?),
        };
        let new = self.new_file()?;
        // What the kernel froze may still be written when the call is over.
        let record = match &writer {
            Some(_) => None,
            None => Some(self.member(disk.top)?.record),
        };
        let after = self.descriptor.changed(&self.path, |e| {
            e.rename(disk.top, uuid);
            e.set_record(uuid, record);
            e.add(Guid::TOP, uuid, disk.is_raw, &new);
            e.set_top(Guid::TOP);
        })?;
        let operation = Operation::Snapshot {
            uuid,
            new: new.clone(),
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        self.carry_out(outside, &intent, |me| {
            me.make_empty(&new, &top, top.size_sectors)?;
            outside.step("created");
            match &writer {
                Some(device) => {
                    let delta = NewDelta {
                        path: &me.other_file(&new),
                        cluster_log: disk.cluster.log_sectors(),
                        is_raw: false,
                    };
                    outside.snapshot(device, delta, freeze)?;
                    outside.step("switched");
                    Ok(())
                }
                // It takes effect with the descriptor.
                None => me.store(&intent.after),
            }
        })?;
        Ok(uuid)
    }

    /// Throws away what was written since, and goes on from the snapshot `uuid`.
    pub fn switch(&mut self, outside: &dyn Outside, uuid: Guid, force: bool) -> Result<()> {
        let disk = self.descriptor.disk().clone();
        self.must_be_whole(uuid)?;
        if uuid == disk.top {
            let what = format!("{uuid} is the top: that is where the disk is");
            return Err(Error::new(Code::Param, what));
        }
        self.must_be_detached(
            &self.users(outside)?,
            "a disk cannot go back while it is in use",
        )?;
        let chain = self.members(uuid, force)?;
        let Some(target) = chain.last() else {
            return Err(Error::new(
                Code::NoSnapshot,
                format!("there is no snapshot {uuid}"),
            ));
        };
        let old = self.descriptor.top().file.clone();
        let held = self.member(disk.top)?;
        let image = Image::open(&held.path, Access::Write)?;
        let _lock = hold(&image)?;
        let new = self.new_file()?;
        let after = self.descriptor.changed(&self.path, |e| {
            e.remove(disk.top);
            e.add(Guid::TOP, uuid, disk.is_raw, &new);
            e.set_top(Guid::TOP);
            e.set_size(target.size_sectors);
        })?;
        let operation = Operation::Switch {
            uuid,
            new: new.clone(),
            old,
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        self.carry_out(outside, &intent, |me| {
            me.make_empty(&new, target, target.size_sectors)?;
            outside.step("created");
            me.store(&intent.after)?;
            outside.step("stored");
            Ok(())
        })
    }

    /// Removes the snapshot `uuid`. The contents of all others, and of the disk, stay. Of the top
    /// it throws away what was written, and its parent becomes the top.
    /// What it built on goes, too, if that only waited for this.
    pub fn delete(&mut self, outside: &dyn Outside, uuid: Guid) -> Result<Removal> {
        let parent = self.descriptor.disk().shot(uuid).map(|s| s.parent);
        let removal = self.delete_one(outside, uuid)?;
        if let Some(parent) = parent.filter(|_| removal != Removal::Marked) {
            self.delete_waiting(outside, parent).map_err(|e| {
                e.hint(format!(
                    "{uuid} is removed, but {parent} below it, which was to go with it, is not"
                ))
            })?;
        }
        Ok(removal)
    }

    /// Removes `uuid` if it is marked and one delta is left that builds on it.
    fn delete_waiting(&mut self, outside: &dyn Outside, uuid: Guid) -> Result<()> {
        let disk = self.descriptor.disk();
        let is_waiting =
            disk.shot(uuid).is_some_and(|s| s.is_temporary) && disk.children(uuid).nth(1).is_none();
        if is_waiting {
            self.delete(outside, uuid)?;
        }
        Ok(())
    }

    pub(super) fn delete_one(&mut self, outside: &dyn Outside, uuid: Guid) -> Result<Removal> {
        self.must_exist(uuid)?;
        let disk = self.descriptor.disk().clone();
        let children: Vec<Guid> = disk.children(uuid).map(|s| s.guid).collect();
        match children.as_slice() {
            [] if uuid == disk.top => self.throw_away(outside).map(|()| Removal::Dropped),
            [] => self.drop_leaf(outside, uuid).map(|()| Removal::Dropped),
            [child] => self
                .merge_into(outside, uuid, *child)
                .map(|()| Removal::Merged),
            _ => self.mark_temporary(uuid).map(|()| Removal::Marked),
        }
    }

    fn drop_leaf(&mut self, outside: &dyn Outside, uuid: Guid) -> Result<()> {
        let image = self.descriptor.image(uuid).clone();
        // One that is lost is no reason to keep its delta.
        let file = self.removable(&image.file)?;
        let held = match &file {
            Some(path) => {
                self.must_be_unused(path, &outside.devices()?)?;
                Some(Image::open(path, Access::Read)?)
            }
            None => None,
        };
        let _lock = held.as_ref().map(hold).transpose()?;
        let after = self.descriptor.changed(&self.path, |e| e.remove(uuid))?;
        let operation = Operation::Delete {
            uuid,
            old: image.file,
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        self.end_with(outside, intent)
    }

    fn throw_away(&mut self, outside: &dyn Outside) -> Result<()> {
        let disk = self.descriptor.disk().clone();
        let parent = disk.shot(disk.top).map_or(Guid::NULL, |s| s.parent);
        if parent == Guid::NULL {
            let what = format!(
                "{} has no snapshot: there is nothing to go back to",
                self.path.display()
            );
            return Err(Error::new(Code::Param, what));
        }
        if disk.shot(parent).is_some_and(|s| s.is_temporary) {
            return Err(self.is_going(parent));
        }
        if disk.children(parent).nth(1).is_some() {
            let what =
                format!("other deltas build on {parent} below the top, so it cannot be written to");
            return Err(Error::new(Code::Param, what).hint(format!(
                "'ploopctl snapshot switch --uuid {parent}' throws away what was written since"
            )));
        }
        self.must_be_detached(&self.users(outside)?, "what is in use is not thrown away")?;
        let below = self.member(parent)?;
        below.must_be_ours()?;
        self.must_be_unused(&below.path, &outside.devices()?)?;
        let both = [
            Image::open(&self.file(self.descriptor.top())?, Access::Read)?,
            Image::open(&below.path, Access::Read)?,
        ];
        let _locks = [hold(&both[0])?, hold(&both[1])?];
        let after = self.descriptor.changed(&self.path, |e| {
            e.remove(disk.top);
            e.rename(parent, Guid::TOP);
            e.set_record(Guid::TOP, None);
            e.set_top(Guid::TOP);
            e.set_size(below.size_sectors);
        })?;
        let operation = Operation::Delete {
            uuid: disk.top,
            old: self.descriptor.top().file.clone(),
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        self.end_with(outside, intent)
    }

    /// An operation that takes effect with the descriptor.
    pub(super) fn end_with(&mut self, outside: &dyn Outside, intent: Intent) -> Result<()> {
        self.carry_out(outside, &intent, |me| {
            me.store(&intent.after)?;
            outside.step("stored");
            Ok(())
        })
    }
}

/// Keeps everybody else from an image that goes, or that is to be written to.
fn hold(image: &Image) -> Result<ImageLock<'_>> {
    ImageLock::take(image.file(), image.path(), Use::Write)
}

// SPDX-License-Identifier: GPL-2.0
//! How an operation ends: completed or undone. The operation itself ends this way too, so that
//! what is rare is done by what is used every day.
//!
//! The descriptor's text tells how far it came: it is that of *before*, or that of *after*, or, for
//! a merge, the *marked* one. With *before*, the kernel may have done its part already. A running
//! device is asked; without one the new image tells: what holds data is kept.

use super::files::Member;
use super::intent::{Intent, Operation};
use super::merge::must_have_neither_or_both;
use super::outside::{Base, Outside};
use super::Opened;
use crate::descriptor::store;
use crate::error::{Code, Error, Result};
use crate::image::{mend, Access, Image};
use crate::locks::{ImageLock, Use};
use crate::output;
use crate::sysfs::Device;
use ploop_pure::layout::ploop1::Mark;
use std::path::Path;

/// What is to become of an unfinished operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// What is left is done.
    Complete,
    /// What was done is taken back.
    Undo,
}

impl Opened {
    /// Completes or undoes what is unfinished.
    pub(super) fn recover(&mut self, outside: &dyn Outside) -> Result<()> {
        let Some(intent) = Intent::load(&self.path)? else {
            return Ok(());
        };
        let what = &intent.operation;
        let done = match self.end(outside, &intent)? {
            Verdict::Complete => "completed",
            Verdict::Undo => "undone",
        };
        self.mended
            .push(format!("found an unfinished {what}: {done}"));
        Ok(())
    }

    /// Records `intent` and does `work`, up to the point from which it is completed; then ends it.
    /// If the work fails it is undone or, if the kernel did its part, completed all the same.
    pub(super) fn carry_out(
        &mut self,
        outside: &dyn Outside,
        intent: &Intent,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        intent.store(&self.path)?;
        outside.step("intent");
        let worked = work(self);
        match (worked, self.end(outside, intent)) {
            (Ok(()), Ok(Verdict::Complete)) => Ok(()),
            (Ok(()), Ok(Verdict::Undo)) => {
                let what = format!("the {} did not take effect", intent.operation);
                Err(Error::new(Code::System, what))
            }
            (Err(e), Ok(Verdict::Undo)) => Err(e),
            (Err(e), Ok(Verdict::Complete)) => {
                Err(e.hint(format!("all the same, the {} is made", intent.operation)))
            }
            (Ok(()), Err(e)) => Err(e),
            (Err(e), Err(end)) => Err(e.hint(format!(
                "and the {} could be neither completed nor undone: {}; run 'ploopctl recover {}'",
                intent.operation,
                end.without_hint(),
                self.path.display()
            ))),
        }
    }

    fn end(&mut self, outside: &dyn Outside, intent: &Intent) -> Result<Verdict> {
        let verdict = self.judge(outside, intent)?;
        match verdict {
            Verdict::Complete => self.complete(outside, intent)?,
            Verdict::Undo => self.undo(outside, intent)?,
        }
        Intent::remove(&self.path)?;
        outside.step("ended");
        Ok(verdict)
    }

    fn judge(&self, outside: &dyn Outside, intent: &Intent) -> Result<Verdict> {
        let text = self.descriptor.text();
        if text == intent.after {
            return Ok(Verdict::Complete);
        }
        if let Operation::Merge { marked, .. } = &intent.operation {
            if &text == marked {
                return Ok(Verdict::Complete);
            }
        }
        if text != intent.before {
            let what = format!(
                "{} was changed by another program while a {} was unfinished",
                self.path.display(),
                intent.operation
            );
            return Err(Error::new(Code::Descriptor, what).hint(format!(
                "compare it with {}{}: 'before' and 'after' there are what it was and was to be. Put \
                 one of them in place, then run 'ploopctl recover'",
                self.path.display(),
                super::intent::SUFFIX
            )));
        }
        match &intent.operation {
            Operation::Snapshot { new, .. } => self.judge_new(outside, new),
            Operation::Replace {
                uuid,
                old,
                new,
                asked,
            } => self.judge_replaced(outside, *uuid, (old, new), *asked),
            Operation::Grow { sectors } => self.judge_grown(outside, *sectors),
            // These take effect with the descriptor.
            Operation::Switch { .. } | Operation::Delete { .. } | Operation::Merge { .. } => {
                Ok(Verdict::Undo)
            }
        }
    }

    /// Whether the kernel took the new top `new`.
    fn judge_new(&self, outside: &dyn Outside, new: &str) -> Result<Verdict> {
        let path = self.other_file(new);
        if path.symlink_metadata().is_err() {
            return Ok(Verdict::Undo);
        }
        let devices = outside.devices()?;
        if devices.iter().any(|d| d.delta_of(&path).is_some()) {
            return Ok(Verdict::Complete);
        }
        if !self.has_data(new)? {
            return Ok(Verdict::Undo);
        }
        // It was taken, then detached; whoever writes past it was attached by name.
        match self.users(outside)?.writers.first() {
            Some(device) => Err(super::in_use(&self.path, device)),
            None => Ok(Verdict::Complete),
        }
    }

    /// Whether there is anything in a new top, or one that the kernel has merged. If not it may go. The
    /// mark says less: the kernel sets it before it switches, and goes on writing to the old top if
    /// it then does not.
    fn has_data(&self, file: &str) -> Result<bool> {
        Image::open(&self.other_file(file), Access::Read)?.has_data()
    }

    /// Whether a ploop1 image is in use, or was in a crash.
    pub(super) fn is_marked(&self, file: &str) -> Result<bool> {
        let image = Image::open(&self.other_file(file), Access::Read)?;
        Ok(image.has_magic()? && image.good_header()?.0.mark == Mark::InUse)
    }

    /// Does what is left to do. Begun again, it goes on.
    fn complete(&mut self, outside: &dyn Outside, intent: &Intent) -> Result<()> {
        let text = self.descriptor.text();
        if text != intent.after {
            if let Operation::Merge { lower, upper, .. } = &intent.operation {
                self.merge_data(outside, lower, upper)?;
                outside.step("merged");
            }
            self.store(&intent.after)?;
            outside.step("stored");
        } else {
            // It is there, and has to be durable before what it does not name is removed.
            store::sync_dir(&self.path)?;
        }
        match &intent.operation {
            Operation::Switch { old, .. } | Operation::Delete { old, .. } => {
                self.drop_file(outside, old)?
            }
            Operation::Merge { upper, .. } => self.drop_file(outside, upper)?,
            Operation::Snapshot { .. } | Operation::Replace { .. } | Operation::Grow { .. } => {}
        }
        Ok(())
    }

    fn undo(&mut self, outside: &dyn Outside, intent: &Intent) -> Result<()> {
        match &intent.operation {
            Operation::Snapshot { new, .. } | Operation::Switch { new, .. } => {
                self.drop_file(outside, new)
            }
            Operation::Delete { .. }
            | Operation::Merge { .. }
            | Operation::Replace { .. }
            | Operation::Grow { .. } => Ok(()),
        }
    }

    /// Removes a file that the descriptor does not name any more, or not yet.
    fn drop_file(&self, outside: &dyn Outside, file: &str) -> Result<()> {
        if self.descriptor.disk().images.iter().any(|i| i.file == file) {
            let what = format!("{file} is to be removed, but the descriptor has it");
            return Err(Error::new(Code::Descriptor, what));
        }
        if let Some(path) = self.removable(file)? {
            self.must_be_unused(&path, &outside.devices()?)?;
            store::remove(&path)?;
        }
        outside.step("removed");
        Ok(())
    }

    /// The part of a merge that moves data: by the kernel if it has the two, else by us.
    fn merge_data(&self, outside: &dyn Outside, lower: &str, upper: &str) -> Result<()> {
        let disk = self.descriptor.disk();
        let is_raw = disk.is_raw && disk.base().is_some_and(|b| b.file == lower);
        let kind = if is_raw { Base::Raw } else { Base::Ploop1 };
        let is_top = self.descriptor.top().file == upper;
        // An intent is believed no more than a descriptor.
        let (lower, upper) = (self.file_named(lower)?, self.file_named(upper)?);
        // What a command began that was killed may end at any moment, and then a level is another one.
        for device in &self.users(outside)?.writers {
            outside.settle(device)?;
        }
        let users = self.users(outside)?;
        let has = |device: &&Device, path: &Path| device.delta_of(path).is_some();
        // One that reads the lower one alone would see it change.
        let mut readers = users.readers.iter();
        if let Some(device) = readers.find(|d| has(d, &lower) || has(d, &upper)) {
            return Err(super::in_use(&lower, device));
        }
        for device in &users.writers {
            match (has(&device, &lower), device.delta_of(&upper)) {
                (true, None) => return self.must_be_merged(device, &lower, &upper, is_top),
                (true, Some(delta)) => {
                    must_have_neither_or_both(device, &lower, &upper)?;
                    return outside.merge(device, delta.level);
                }
                (false, Some(_)) => return Err(super::in_use(&upper, device)),
                (false, None) => {}
            }
        }
        if upper.symlink_metadata().is_err() {
            let what = format!("{}, which is to be merged, is not there", upper.display());
            return Err(Error::new(Code::Open, what));
        }
        // A crash may have left it marked.
        let image = Image::open(&upper, Access::Write)?;
        let lock = ImageLock::take(image.file(), &upper, Use::Write)?;
        mend::lossless(&image)?;
        drop(lock);
        outside.merge_files(&lower, kind, &upper)
    }

    /// `device` has the lower image and not the upper one: it has let go of it when it was merged,
    /// or never had it. Of a merged top nothing is left; the device of a merged lower delta goes on
    /// with the top.
    fn must_be_merged(
        &self,
        device: &Device,
        lower: &Path,
        upper: &Path,
        is_top: bool,
    ) -> Result<()> {
        let top = if is_top {
            lower.to_owned()
        } else {
            self.file(self.descriptor.top())?
        };
        let has_top = device
            .delta_of(&top)
            .is_some_and(|d| Some(d) == device.top());
        if has_top && !(is_top && self.has_data(self.descriptor.top().file.as_str())?) {
            return Ok(());
        }
        let what = format!(
            "{} was not attached with {}",
            device.device.display(),
            upper.display()
        );
        Err(super::in_use(lower, device).hint(format!("{what}: detach it")))
    }
}

impl Opened {
    /// Mends what is left by a crash, beyond what is unfinished: the size of the disk, and marks
    /// of images that nobody has. What was done is returned.
    pub fn mend(&mut self, outside: &dyn Outside) -> Result<Vec<String>> {
        let users = self.users(outside)?;
        let mut mended = Vec::new();
        if users.all().next().is_none() {
            let (members, absent) = self.present()?;
            for what in &absent {
                output::note(what);
            }
            for member in members.into_iter().filter(Member::is_marked) {
                let open = Image::open(&member.path, Access::Write)?;
                let (lock, steps) = self.mend_top(&member, &open)?;
                drop(lock);
                let file = self.descriptor.image(member.guid).file.clone();
                mended.extend(steps.iter().map(|s| format!("{file}: {s}")));
                self.changed_by_us(&member)?;
            }
        }
        let top: Member = self.member(self.descriptor.disk().top)?;
        let disk = self.descriptor.disk();
        let rounded = disk
            .size_sectors
            .next_multiple_of(disk.cluster.sectors().into());
        if ![disk.size_sectors, rounded].contains(&top.size_sectors) {
            let said = disk.size_sectors;
            let after = self
                .descriptor
                .changed(&self.path, |e| e.set_size(top.size_sectors))?;
            self.store(&after.text())?;
            mended.push(format!(
                "the disk has {} sectors, not {said}",
                top.size_sectors
            ));
        }
        Ok(mended)
    }
}

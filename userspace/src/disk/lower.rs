// SPDX-License-Identifier: GPL-2.0
//! What lower images were when they were last closed. A lower image that changes after that takes
//! the ground from under what builds on it, and it cannot be seen in the data.

use super::files::{inspect, Which};
use super::{Member, Opened};
use crate::descriptor::guid::Guid;
use crate::descriptor::model::{ImageEntry, Record};
use crate::error::Result;

impl Opened {
    /// Writes down what those lower images are now of which that is not known. To be called when
    /// nothing writes to them. One that changed since it was recorded stays noticed.
    pub fn record_lower(&mut self) -> Result<()> {
        self.record_if(|image| image.record.is_none())
    }

    /// Takes the lower images of `chain` as they are, also those that changed.
    pub fn accept(&mut self, chain: &[Guid]) -> Result<()> {
        self.record_if(|image| chain.contains(&image.guid))
    }

    fn record_if(&mut self, is_due: impl Fn(&ImageEntry) -> bool) -> Result<()> {
        let (members, _) = inspect(&self.path, &self.descriptor, Which::All);
        let disk = self.descriptor.disk();
        let lower = disk.images.iter().filter(|i| i.guid != disk.top);
        let due: Vec<_> = lower
            .filter(|i| is_due(i))
            .filter_map(|i| Some((i.guid, i.record, members.get(&i.guid)?.record)))
            .filter(|(_, then, now)| *then != Some(*now))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let after = self.descriptor.changed(&self.path, |e| {
            for (guid, _, now) in due {
                e.set_record(guid, Some(now));
            }
        })?;
        self.store(&after.text())
    }

    /// Forgets the record of an image that a command is about to change, for
    /// [`record_lower`](Self::record_lower) to be made anew. That of an image which somebody else
    /// changed before is kept.
    pub(super) fn about_to_change(&mut self, before: &Member) -> Result<()> {
        if self.is_as_recorded(before) {
            self.record(before.guid, None)?;
        }
        Ok(())
    }

    /// Records an image anew which was as `before` until we changed it; not one that somebody
    /// else had changed before that.
    pub fn changed_by_us(&mut self, before: &Member) -> Result<()> {
        if !self.is_as_recorded(before) {
            return Ok(());
        }
        let now = self.member(before.guid)?.record;
        if now != before.record {
            self.record(before.guid, Some(now))?;
        }
        Ok(())
    }

    /// Whether there is a record of an image, and it is true.
    fn is_as_recorded(&self, member: &Member) -> bool {
        let record = self.descriptor.image(member.guid).record;
        record.is_some_and(|r| r.is_same_state(member.record))
    }

    /// Writes down what one image is now, or forgets it.
    pub(super) fn record(&mut self, guid: Guid, record: Option<Record>) -> Result<()> {
        let after = self
            .descriptor
            .changed(&self.path, |e| e.set_record(guid, record))?;
        self.store(&after.text())
    }
}

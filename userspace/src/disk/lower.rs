// SPDX-License-Identifier: GPL-2.0
//! What lower images were when they were last closed. A lower image that changes after that takes
//! the ground from under what builds on it, and it cannot be seen in the data.

use super::files::{inspect, Which};
use super::Opened;
use crate::descriptor::guid::Guid;
use crate::descriptor::model::Record;
use crate::error::Result;

impl Opened {
    /// Writes down what all lower images are now. To be called when nothing writes to them.
    pub fn record_lower(&mut self) -> Result<()> {
        let (members, _) = inspect(&self.path, &self.descriptor, Which::All);
        let disk = self.descriptor.disk();
        let lower = disk.images.iter().filter(|i| i.guid != disk.top);
        let stale: Vec<_> = lower
            .filter_map(|i| Some((i.guid, i.record, members.get(&i.guid)?.record)))
            .filter(|(_, then, now)| *then != Some(*now))
            .collect();
        if stale.is_empty() {
            return Ok(());
        }
        let after = self.descriptor.changed(&self.path, |e| {
            for (guid, _, now) in stale {
                e.set_record(guid, Some(now));
            }
        })?;
        self.store(&after.text())
    }

    /// Writes down what one image is now, or forgets it.
    pub(super) fn record(&mut self, guid: Guid, record: Option<Record>) -> Result<()> {
        let after = self
            .descriptor
            .changed(&self.path, |e| e.set_record(guid, record))?;
        self.store(&after.text())
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Putting another file in the place of a delta's: a copy on a faster disk, say. That it holds the
//! same is the caller's word.

use super::intent::{Intent, Operation};
use super::outside::{NewDelta, Outside};
use super::recover::Verdict;
use super::{Member, Opened};
use crate::descriptor::guid::Guid;
use crate::descriptor::model::Record;
use crate::descriptor::store;
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use std::path::Path;

impl Opened {
    /// Puts the file `new` in the place of that of `guid`. The old one is left where it is.
    pub fn replace(&mut self, outside: &dyn Outside, guid: Guid, new: &Path) -> Result<()> {
        self.must_exist(guid)?;
        let disk = self.descriptor.disk().clone();
        let dir = std::fs::canonicalize(store::dir_of(&self.path)).map_err(|e| {
            Error::io(
                Code::Open,
                format!("cannot open {}", self.path.display()),
                e,
            )
        })?;
        let real = std::fs::canonicalize(new)
            .map_err(|e| Error::io(Code::Open, format!("cannot open {}", new.display()), e))?;
        let name = real.strip_prefix(&dir).ok().and_then(Path::to_str);
        let Some(name) = name.map(str::to_owned) else {
            let what = format!(
                "{} is not in the directory of the descriptor, {}",
                real.display(),
                dir.display()
            );
            return Err(Error::new(Code::Param, what).hint("move it there first"));
        };
        if disk
            .images
            .iter()
            .any(|i| self.file(i).is_ok_and(|f| f == real))
        {
            let what = format!("{} is an image of this disk already", real.display());
            return Err(Error::new(Code::Param, what));
        }
        self.must_be_unused(&real, &outside.devices()?)?;
        let old = self.descriptor.image(guid).file.clone();
        let level = disk.chain(guid).map_or(0, |c| c.len() - 1);
        let is_raw = disk.is_raw && level == 0;
        check(&real, is_raw)?;
        let after = self.descriptor.changed(&self.path, |e| {
            e.set_file(guid, &name);
            e.set_record(guid, None);
        })?;
        // Sizes and cluster sizes, with the new file in its place.
        // What is missing elsewhere is not made worse, or is what is being replaced.
        let mut near: Vec<Guid> = disk.images.iter().map(|i| i.guid).collect();
        near.retain(|g| *g == guid || self.member(*g).is_ok());
        let near = super::files::Which::These(&near);
        let (_, problems) = super::files::inspect(&self.path, &after, near);
        if let Some(first) = problems.wrong.first() {
            let what = format!("{} cannot take the place of {old}: {first}", real.display());
            return Err(Error::new(Code::Param, what));
        }
        let users = self.users(outside)?;
        let old_path = self.other_file(&old);
        if let Some(device) = users
            .readers
            .iter()
            .find(|d| d.delta_of(&old_path).is_some())
        {
            return Err(super::in_use(&old_path, device));
        }
        let operation = Operation::Replace {
            uuid: guid,
            old,
            new: name,
            asked: None,
        };
        let mut intent = Intent::new(operation, self.descriptor.text(), after.text());
        let device = users
            .writers
            .iter()
            .find_map(|d| Some((d, d.delta_of(&old_path)?)));
        let Some((device, delta)) = device else {
            return self.end_with(outside, intent);
        };
        let with = NewDelta {
            path: &real,
            cluster_log: disk.cluster.log_sectors(),
            is_raw,
        };
        if let Operation::Replace { asked, .. } = &mut intent.operation {
            *asked = Some(Member::read(&real, guid, is_raw)?.record);
        }
        self.carry_out(outside, &intent, |_| {
            outside.replace(device, delta.level, with)?;
            outside.step("switched");
            Ok(())
        })
    }

    /// Whether the kernel took `new` for `old`, the image of `guid`. If no device has either, only
    /// what was written to since then is known to be what was attached last: nothing is thrown away
    /// that may be the only one of its kind.
    pub(super) fn judge_replaced(
        &self,
        outside: &dyn Outside,
        guid: Guid,
        (old, new): (&str, &str),
        asked: Option<Record>,
    ) -> Result<Verdict> {
        let (old_path, new_path) = (self.other_file(old), self.other_file(new));
        let devices = outside.devices()?;
        // Who only looks at one of them says nothing.
        let is_had = |path: &Path| {
            let mut writers = devices.iter().filter(|d| !d.read_only);
            writers.any(|d| d.delta_of(path).is_some())
        };
        let Some(asked) = asked else {
            return Ok(Verdict::Undo);
        };
        match (is_had(&old_path), is_had(&new_path)) {
            (false, true) => return Ok(Verdict::Complete),
            (true, false) => return Ok(Verdict::Undo),
            (true, true) => return Err(self.which(old, new)),
            (false, false) => {}
        }
        match (old_path.exists(), new_path.exists()) {
            (false, true) => return Ok(Verdict::Complete),
            (_, false) => return Ok(Verdict::Undo),
            (true, true) => {}
        }
        let is_raw = self.is_raw(guid);
        let now = Member::read(&new_path, guid, is_raw)?;
        if guid != self.descriptor.disk().top {
            // Nobody wrote to either: they hold the same.
            return Ok(Verdict::Complete);
        }
        match (is_raw, now.record.is_same_state(asked)) {
            // The kernel marks a new top, durably, before it switches.
            (false, true) if !now.is_marked() => Ok(Verdict::Undo),
            // A crash can lose the time of what was written.
            (true, true) => Err(self.which(old, new)),
            (true, false) => Ok(Verdict::Complete),
            // The old one is closed behind the switch. If that failed it is still marked.
            (false, _) if !self.is_marked(old)? => Ok(Verdict::Complete),
            (false, _) => Err(self.which(old, new)),
        }
    }

    /// The refusal to choose.
    fn which(&self, old: &str, new: &str) -> Error {
        let at = self.path.display();
        let what = format!(
            "the replacement of {old} by {new} in {at} was interrupted, and nothing tells which of the two \
             was written to last"
        );
        let suffix = super::intent::SUFFIX;
        Error::new(Code::Descriptor, what).hint(format!(
            "attach each read-only by its name, and look. To keep {old}, remove {at}{suffix}. To keep {new}, \
             put 'after' of {at}{suffix} in the place of the descriptor, then run 'ploopctl recover {at}'"
        ))
    }

    /// The delta of `level` in the chain of the top.
    pub fn at_level(&self, level: usize) -> Result<Guid> {
        let disk = self.descriptor.disk();
        let chain = disk.chain(disk.top).unwrap_or_default();
        chain.get(level).copied().ok_or_else(|| {
            let what = format!(
                "there is no level {level}: the chain of the top has {}",
                chain.len()
            );
            Error::new(Code::Param, what).hint("levels are numbered from 0, the base")
        })
    }
}

/// The file that is to be taken must be sound as it is, and durable.
fn check(path: &Path, is_raw: bool) -> Result<()> {
    let image = Image::open(path, Access::Read)?;
    // The kernel takes locks of its own when it gets the file.
    let _lock = ImageLock::take(image.file(), path, Use::Read)?;
    // A copy that was just made may be in memory alone, and the old file gone tomorrow.
    image.sync()?;
    store::sync_dir(path)?;
    if is_raw {
        return Ok(());
    }
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    if report.findings.cure().is_some() {
        let what = format!(
            "{} is damaged: {}",
            path.display(),
            crate::image::mend::first_problem(&report)
        );
        return Err(Error::new(Code::Damaged, what).hint("'ploopctl check' says more"));
    }
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! Putting another file in the place of a delta's: a copy on a faster disk, say. That it holds the
//! same is the caller's word.

use super::intent::{Intent, Operation};
use super::outside::{NewDelta, Outside};
use super::Opened;
use crate::descriptor::guid::Guid;
use crate::descriptor::store;
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
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
        let (_, problems) = super::files::inspect(&self.path, &after, super::files::Which::All);
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
        };
        let intent = Intent::new(operation, self.descriptor.text(), after.text());
        let device = users.writers.into_iter().find(|d| d.delta_of(&old_path).is_some());
        self.carry_out(outside, &intent, |me| {
            let Some(delta) = device
                .as_ref()
                .and_then(|d| Some((d, d.delta_of(&old_path)?)))
            else {
                return me.store(&intent.after);
            };
            let with = NewDelta {
                path: &real,
                cluster_log: disk.cluster.log_sectors(),
                is_raw,
            };
            outside.replace(delta.0, delta.1.level, with)?;
            outside.step("switched");
            Ok(())
        })
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

/// The file that is to be taken must be sound as it is.
fn check(path: &Path, is_raw: bool) -> Result<()> {
    let image = Image::open(path, Access::Read)?;
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

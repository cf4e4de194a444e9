// SPDX-License-Identifier: GPL-2.0
//! `ploopctl descriptor`.

use super::disk;
use crate::cli::{AttachFormat, DescriptorCommand, RestoreArgs, SnapshotListArgs};
use crate::descriptor::lock::FileLock;
use crate::descriptor::{self, store, Descriptor};
use crate::disk::files::{inspect, Which};
use crate::disk::intent::Intent;
use crate::disk::restore::{rebuild, Request};
use crate::error::{Code, Error, Result};
use crate::output::{self, count};
use serde::Serialize;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Runs the command.
pub fn run(command: &DescriptorCommand) -> Result<()> {
    match command {
        DescriptorCommand::Validate(args) => validate(args),
        DescriptorCommand::Restore(args) => restore(args),
    }
}

#[derive(Serialize)]
struct Verdict<'a> {
    #[serde(serialize_with = "output::path")]
    descriptor: &'a Path,
    valid: bool,
    problems: &'a [String],
    /// Lower images that changed since they were closed.
    changed: &'a [String],
    /// An operation is going on or was interrupted.
    unfinished: bool,
}

fn validate(args: &SnapshotListArgs) -> Result<()> {
    let path = disk::path(&args.disk)?;
    let text = store::read(&path)?;
    let mut problems = descriptor::problems(&text);
    let mut changed = Vec::new();
    if problems.is_empty() {
        let (_, found) = inspect(&path, &Descriptor::parse(&path, &text)?, Which::All);
        problems = found.wrong;
        changed = found.changed;
    }
    let unfinished = Intent::is_there(&path);
    let valid = problems.is_empty() && changed.is_empty();
    if args.json {
        output::json(&Verdict {
            descriptor: &path,
            valid,
            problems: &problems,
            changed: &changed,
            unfinished,
        })?;
    } else {
        let mut text = String::new();
        for problem in &problems {
            text += &format!("problem: {problem}\n");
        }
        for image in &changed {
            text += &format!("problem: a lower image changed since it was closed: {image}\n");
        }
        if unfinished {
            text += &format!(
                "An operation is going on, or was interrupted: 'ploopctl recover {}' ends it.\n",
                path.display()
            );
        }
        if valid {
            text += "No problem found.\n";
        }
        output::text(&text)?;
    }
    if valid {
        return Ok(());
    }
    let nr = problems.len() + changed.len();
    let what = format!("{} has {}", path.display(), count(nr as u64, "problem"));
    Err(Error::new(Code::Descriptor, what))
}

fn restore(args: &RestoreArgs) -> Result<()> {
    let dir = std::fs::canonicalize(&args.dir)
        .map_err(|e| Error::io(Code::Open, format!("cannot open {}", args.dir.display()), e))?;
    let path = dir.join(descriptor::NAME);
    let _lock = FileLock::take(&path, args.wait.patience())?;
    let is_there = path.symlink_metadata().is_ok();
    if is_there && !args.force {
        let what = format!("{} exists already and is left as it is", path.display());
        return Err(Error::new(Code::Create, what).hint(
            "'ploopctl descriptor validate' judges it; --force puts a new one in its place",
        ));
    }
    if Intent::is_there(&path) {
        let what = format!("an operation on {} was interrupted", path.display());
        return Err(Error::new(Code::Descriptor, what).hint(format!(
            "{}{} holds the descriptor as it was and was to be: put one of them in place and run 'ploopctl recover', \
             or remove that file, too",
            path.display(),
            crate::disk::intent::SUFFIX
        )));
    }
    let request = Request {
        path: &path,
        images: &args.images,
        is_raw: args.format == AttachFormat::Raw,
        cluster: args.cluster,
    };
    let (text, names) = rebuild(&request)?;
    if is_there {
        keep_old(&path)?;
    }
    store::write(&path, &text)?;
    let mut said = format!("{}\n", path.display());
    for (level, name) in names.iter().enumerate() {
        said += &format!("  {level} {name}\n");
    }
    output::text(&said)
}

/// Gives the descriptor, whatever is in it, one more name, for what takes its place.
fn keep_old(path: &Path) -> Result<()> {
    let old = store::beside(path, ".old");
    store::remove(&old)?;
    let failed = |e| Error::io(Code::Create, format!("cannot make {}", old.display()), e);
    // A symbolic link is kept as one.
    match fs::read_link(path) {
        Ok(to) => symlink(to, &old),
        // Where there are none, another file.
        Err(_) => fs::hard_link(path, &old).or_else(|_| fs::copy(path, &old).map(drop)),
    }
    .map_err(failed)
}

// SPDX-License-Identifier: GPL-2.0
//! Backups that build on each other, and the disk that they hold together.

use super::read::{Part, Reader};
use super::wire::{Header, Id};
use super::{go_on, wire};
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::offline::Progress;
use std::io::Read;
use std::path::Path;

/// The order in which backups build on each other: each index but the first is of one whose parent
/// is before it. Whether the first is full is for the caller to see.
pub fn arrange(files: &[(&Path, Header)]) -> Result<Vec<usize>> {
    let bad = |what: String| Err(Error::new(Code::Param, what));
    for (i, (path, header)) in files.iter().enumerate() {
        for (other, before) in &files[..i] {
            if before.id == header.id {
                return bad(format!(
                    "{} and {} are the same backup",
                    other.display(),
                    path.display()
                ));
            }
        }
    }
    let is_given = |id: Id| files.iter().any(|(_, h)| h.id == id);
    let is_first = |h: &Header| h.parent.is_none_or(|parent| !is_given(parent));
    let firsts: Vec<usize> = (0..files.len())
        .filter(|i| is_first(&files[*i].1))
        .collect();
    let mut order = match firsts.as_slice() {
        [first] => vec![*first],
        [one, other, ..] => {
            let (one, other) = (files[*one].0.display(), files[*other].0.display());
            let error = Error::new(
                Code::Param,
                format!("{one} and {other} do not belong to one chain, or one between is missing"),
            );
            return Err(error.hint("'ploopctl backup verify FILE' shows what a backup builds on"));
        }
        [] => return bad("these backups build on each other in a circle".into()),
    };
    while let Some((last_path, last)) = order.last().map(|i| &files[*i]) {
        let builds = |i: &usize| files[*i].1.parent == Some(last.id);
        let children: Vec<usize> = (0..files.len()).filter(builds).collect();
        match children.as_slice() {
            [] => break,
            [child] => {
                let (path, header) = &files[*child];
                if let Some(what) = misfit(last, header) {
                    let (path, on) = (path.display(), last_path.display());
                    return bad(format!("{path} does not fit on {on}: {what}"));
                }
                order.push(*child);
            }
            [one, other, ..] => {
                return bad(format!(
                    "{} and {} both build on {}: leave one out",
                    files[*one].0.display(),
                    files[*other].0.display(),
                    last_path.display()
                ))
            }
        }
    }
    // A circle beside the chain.
    if order.len() != files.len() {
        return bad("some of these backups do not belong to the chain".into());
    }
    Ok(order)
}

fn misfit(below: &Header, above: &Header) -> Option<&'static str> {
    if below.base != above.base {
        Some("it is of another chain")
    } else if below.disk_bytes != above.disk_bytes {
        Some("the disk is of another size")
    } else {
        None
    }
}

/// A full backup must be the first.
pub fn must_be_full(path: &Path, header: &Header) -> Result<()> {
    let Some(parent) = header.parent else {
        return Ok(());
    };
    let what = format!(
        "{} is incremental, and what it builds on is missing: the backup {}",
        path.display(),
        Guid::from_bytes(parent)
    );
    Err(Error::new(Code::Param, what).hint("give all backups from the full one on"))
}

/// Reads a backup to its end.
pub fn read_through<R: Read>(reader: &mut Reader<R>, progress: &mut dyn Progress) -> Result<()> {
    let mut told = 0;
    while reader.read_part()?.is_some() {
        go_on(progress, "not all was verified")?;
        let now = reader.totals().length;
        progress.advance(now - told);
        told = now;
    }
    progress.advance(reader.totals().length - told);
    Ok(())
}

/// Where records of a newer backup hide those of the older ones.
struct Cursor<'a, R> {
    reader: &'a mut Reader<R>,
    part: Option<Part>,
}

impl<R: Read> Cursor<'_, R> {
    /// Goes on to the first part that ends behind `at`; those before are read and checked, too.
    fn seek(&mut self, at: u64) -> Result<()> {
        while self.part.is_some_and(|p| p.end <= at) {
            self.part = self.reader.read_part()?;
        }
        Ok(())
    }
}

/// Gives all of the disk that is not zeros to `sink`, in ascending order, by place and bytes. The
/// backups are a chain, the full one first; all are read to their ends.
pub fn walk<R: Read>(
    readers: &mut [Reader<R>],
    progress: &mut dyn Progress,
    sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut cursors = Vec::new();
    for reader in readers.iter_mut().rev() {
        let part = reader.read_part()?;
        cursors.push(Cursor { reader, part });
    }
    let mut at = 0;
    loop {
        go_on(progress, "no image was made")?;
        // The newest first: it is what is found before any other.
        let mut end = u64::MAX;
        let mut found = None;
        for (i, cursor) in cursors.iter_mut().enumerate() {
            cursor.seek(at)?;
            match cursor.part {
                Some(p) if p.start <= at => {
                    found = found.or(Some((i, p)));
                    end = end.min(p.end);
                }
                Some(p) => end = end.min(p.start),
                None => {}
            }
        }
        if end == u64::MAX {
            return Ok(());
        }
        if let Some((i, part)) = found.filter(|(_, p)| !p.is_zero) {
            // Within a record of at most DATA_MAX bytes.
            let within = (at - part.start) as usize..(end - part.start) as usize;
            debug_assert!(part.end - part.start <= u64::from(wire::DATA_MAX));
            if let Some(bytes) = cursors[i].reader.data().get(within) {
                sink(at, bytes)?;
            }
        }
        progress.advance(end - at);
        at = end;
    }
}

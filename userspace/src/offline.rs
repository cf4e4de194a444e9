// SPDX-License-Identifier: GPL-2.0
//! Work on image files that no device holds: merge, grow, compact, convert.
//!
//! What is done in which order is decided in `ploop_pure::offline`; [`exec`] does it. While one of
//! these runs, the image it changes has QEMU's locks and the in-use mark. Ended by the user, it
//! leaves a closed image; killed or struck by a power cut, one that is marked, which loses nothing
//! when the same call, or `check --repair`, mends it first.

mod compact;
mod convert;
mod exec;
mod grow;
mod index;
mod merge;

pub use compact::{compact, Compacted};
pub use convert::{convert, fill, replace, Chain, Sink, State, Target};
pub use exec::runs;
pub use grow::{grow, grow_raw};
pub use merge::{merge, Merged};
pub use ploop_pure::offline::compact::Zeros;

use crate::error::{Code, Error, Result};
use crate::image::{repair, Access, Image, Kind, Report};
use crate::sysfs::Sysfs;
use ploop_pure::problem::Cure;
use ploop_pure::repair::{Extension, Plan, Scope};
use std::path::Path;

/// Whether an operation goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// Yes.
    On,
    /// No: it ends cleanly as soon as it can.
    Stop,
    /// It ends at once, as if it were killed. For tests.
    Die,
}

/// Who is told how far an operation is, and asked whether it goes on.
pub trait Progress {
    /// A part begins that takes time: what is done, to how many bytes.
    fn begin(&mut self, what: &str, total_bytes: u64);
    /// So many bytes more of it are done.
    fn advance(&mut self, bytes: u64);
    /// The part has ended.
    fn end(&mut self);
    /// Something to know.
    fn note(&mut self, text: &str);
    /// Asked before every step.
    fn go(&mut self) -> Go;
}

/// The format of an image that may be a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// ploop1, of either version.
    Ploop1,
    /// The disk byte for byte. Never guessed: a guest can write the head of any format.
    Raw,
}

/// Opens an image file that no device holds. The locks are up to the caller.
fn open(path: &Path, access: Access) -> Result<Image> {
    let at = path.display();
    if let Some(device) = Sysfs::default().find_image(path)?.first() {
        let what = format!("{at} is attached as {}", device.device.display());
        return Err(Error::new(Code::InUse, what).hint("detach it first"));
    }
    let image = Image::open(path, access)?;
    if image.kind() == Kind::Block {
        let what = format!("{at} is a block device, not an image file");
        return Err(Error::new(Code::NotAnImage, what));
    }
    Ok(image)
}

/// A ploop1 image that is only read: nothing may be wrong with it.
fn sound(image: &Image) -> Result<Report> {
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    match report.findings.cure() {
        None => Ok(report),
        Some(_) => Err(damaged(image, &report)),
    }
}

/// The same, but for what only a repair before writing would mend.
fn readable(image: &Image) -> Result<Report> {
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    match report.findings.cure() {
        None => Ok(report),
        Some(Cure::Lossless) if report.findings.tally.nr_torn == 0 => Ok(report),
        Some(_) => Err(damaged(image, &report)),
    }
}

/// A ploop1 image that is to be changed: what can be mended without loss is mended first.
fn mended(image: &Image, progress: &mut dyn Progress) -> Result<Report> {
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    let report = match report.findings.cure() {
        None => report,
        Some(Cure::Lossless) => {
            mend(image, &report, progress)?;
            sound(image)?
        }
        Some(Cure::Lossy | Cure::None) => return Err(damaged(image, &report)),
    };
    if matches!(report.findings.extension, Extension::Valid { .. }) {
        let at = image.path().display();
        progress.note(&format!(
            "note: {at}: the dirty bitmap is dropped, as the image changes"
        ));
    }
    Ok(report)
}

fn mend(image: &Image, report: &Report, progress: &mut dyn Progress) -> Result<()> {
    let Some(plan) = Plan::new(&report.findings, Scope::All) else {
        return Ok(());
    };
    for step in plan.steps() {
        progress.note(&format!("note: {}: {step}", image.path().display()));
    }
    repair::apply(image, &report.findings.header, &plan)
}

/// Gives back what an operation that was ended has copied in vain.
fn tidy(image: &Image) -> Result<()> {
    let report = sound(image)?;
    match Plan::new(&report.findings, Scope::All) {
        Some(plan) => repair::apply(image, &report.findings.header, &plan),
        None => Ok(()),
    }
}

fn damaged(image: &Image, report: &Report) -> Error {
    let at = image.path().display();
    let first = report.problems.first();
    let what = match first {
        Some(problem) => format!("{at} is damaged: {problem}"),
        None => format!("{at} is damaged"),
    };
    let hint = format!("'ploopctl check --repair {at}' mends it");
    Error::new(Code::Damaged, what).hint(hint)
}

// SPDX-License-Identifier: GPL-2.0
//! Merging an upper delta into the one below it.

use super::exec::{Ending, Exec};
use super::index::Index;
use super::{grow, mended, open, sound, tidy, Format, Progress};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image, Report};
use crate::locks::{ImageLock, Use};
use crate::size::human;
use ploop_pure::chain::{Kind, Member, Misfit};
use ploop_pure::layout::ploop1::Header;
use ploop_pure::offline::merge::{judge, Merge, Refusal};
use ploop_pure::units::{Cluster, SECTOR_BYTES};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a merge did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Clusters of the upper delta, all of which are in the lower one now.
    pub nr_clusters: u32,
    /// Their size.
    pub cluster_bytes: u64,
    /// The lower delta was smaller and has the size of the upper one now.
    pub has_grown: bool,
}

/// Merges the image `upper` into `lower`, which is the next lower delta and of `format`. The upper
/// one is not changed: it still hides the lower one, so that what the two read is the same at any
/// time, and it is the caller's to drop it. Interrupted, the same call does the rest.
pub fn merge(
    lower: &Path,
    format: Format,
    upper: &Path,
    progress: &mut dyn Progress,
) -> Result<Merged> {
    let top = open(upper, Access::Read)?;
    let bottom = open(lower, Access::Write)?;
    must_differ(&bottom, &top)?;
    must_be_ploop1(&top, "a raw image can only be the lower one")?;
    let _read = ImageLock::take(top.file(), upper, Use::Read)?;
    let _write = ImageLock::take(bottom.file(), lower, Use::Write)?;
    let above = sound(&top)?;
    let job = Job {
        lower: &bottom,
        upper: &top,
        header: above.findings.header,
        nr: above.findings.usage.nr_used,
    };
    match format {
        Format::Raw => job.merge_raw(progress),
        Format::Ploop1 => {
            let hint = "if it is a raw image, say so with -f raw; raw is never guessed";
            must_be_ploop1(&bottom, hint)?;
            job.merge_ploop1(progress)
        }
    }
}

fn must_differ(lower: &Image, upper: &Image) -> Result<()> {
    let id = |image: &Image| {
        let meta = image.file().metadata();
        meta.map(|m| (m.dev(), m.ino()))
            .map_err(|e| image.error(Code::Stat, "stat", e))
    };
    if id(lower)? == id(upper)? {
        let (lower, upper) = (lower.path().display(), upper.path().display());
        let what = format!("{lower} and {upper} are the same image");
        return Err(Error::new(Code::Param, what));
    }
    Ok(())
}

fn must_be_ploop1(image: &Image, hint: &str) -> Result<()> {
    if image.has_magic()? {
        return Ok(());
    }
    let at = image.path().display();
    let what = format!("{at} is not a ploop1 image: its magic is missing");
    Err(Error::new(Code::NotAnImage, what).hint(hint))
}

struct Job<'a> {
    lower: &'a Image,
    upper: &'a Image,
    /// Of the upper delta.
    header: Header,
    /// Its clusters.
    nr: u32,
}

impl Job<'_> {
    fn merge_raw(&self, progress: &mut dyn Progress) -> Result<Merged> {
        let size_bytes = self.lower.len_bytes()?;
        self.judge(Kind::Raw, size_bytes / SECTOR_BYTES, &self.header)?;
        if size_bytes % SECTOR_BYTES != 0 {
            let at = self.lower.path().display();
            let what = format!("{at} has {size_bytes} bytes, not a multiple of 512");
            return Err(Error::new(Code::NotAnImage, what));
        }
        let mut machine = Merge::into_raw(&self.header);
        let mut exec = self.exec(None);
        self.run(&mut exec, &mut machine, progress)?;
        Ok(self.merged(size_bytes < self.header.size_bytes()))
    }

    fn merge_ploop1(&self, progress: &mut dyn Progress) -> Result<Merged> {
        // Judged before anything is mended or grown: a refusal changes nothing.
        let (header, ..) = self.lower.good_header()?;
        self.judge(Kind::Ploop1(header.version), header.size_sectors, &header)?;
        let mut below = mended(self.lower, progress)?;
        let nr_new = self.count_new(&below)?;
        let has_grown = header.size_sectors < self.header.size_sectors;
        if has_grown {
            self.machine(&below, nr_new)?;
            grow::grow_held(self.lower, &below, self.header.size_sectors, progress)?;
            below = sound(self.lower)?;
        }
        let mut machine = self.machine(&below, nr_new)?;
        let index = Index::new(self.lower, below.findings.header);
        let mut exec = self.exec(Some(index));
        let result = self.run(&mut exec, &mut machine, progress);
        if let Err(e) = result {
            // Best effort: what is left behind only takes space.
            let _ = tidy(self.lower);
            return Err(e);
        }
        Ok(self.merged(has_grown))
    }

    fn run(
        &self,
        exec: &mut Exec<'_>,
        machine: &mut Merge,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let bytes = u64::from(self.nr) << self.header.cluster.log_bytes();
        progress.begin("merging", bytes);
        let ending = exec.run(machine, progress);
        progress.end();
        let again = "nothing is lost: keep both, and the same command again does the rest";
        self.finish(ending.map_err(|e| e.or_hint(again))?)
    }

    fn exec<'b>(&'b self, index: Option<Index<'b>>) -> Exec<'b> {
        Exec {
            image: self.lower,
            index,
            upper: Some((self.upper, Index::new(self.upper, self.header))),
            cluster: self.header.cluster,
        }
    }

    fn machine(&self, below: &Report, nr_new: u32) -> Result<Merge> {
        let found = &below.findings;
        Merge::into_ploop1(&found.header, found.usage, nr_new).map_err(|r| self.refused(r))
    }

    /// Clusters that the upper delta has and the lower one has not.
    fn count_new(&self, below: &Report) -> Result<u32> {
        let mut upper = Index::new(self.upper, self.header);
        let mut lower = Index::new(self.lower, below.findings.header);
        let (mut nr, mut from) = (0, Cluster(0));
        while let Some((cluster, _)) = upper.next(from)? {
            nr += u32::from(lower.get(cluster)?.is_none());
            from = Cluster(cluster.0 + 1);
        }
        Ok(nr)
    }

    fn judge(&self, kind: Kind, size_sectors: u64, below: &Header) -> Result<()> {
        let lower = Member {
            kind,
            cluster: below.cluster,
            size_sectors,
            is_writable: false,
        };
        let upper = Member {
            kind: Kind::Ploop1(self.header.version),
            cluster: self.header.cluster,
            size_sectors: self.header.size_sectors,
            is_writable: false,
        };
        judge(&lower, &upper).map_err(|r| self.refused(r))
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let (lower, upper) = (self.lower.path().display(), self.upper.path().display());
        let what = format!("{upper} cannot be merged into {lower}: {refusal}");
        let error = Error::new(Code::Param, what);
        match refusal {
            Refusal::Misfit(Misfit::Smaller { .. }) => error.hint(
                "the lower image, which is merged into, comes first; a lower one is never larger",
            ),
            Refusal::Slots { .. } => error.hint(format!("'ploopctl compact {lower}' may help")),
            Refusal::Misfit(_) => error.hint("these two are not neighbours of one chain"),
            Refusal::Uneven { .. } => {
                error.hint("'ploopctl convert' makes one raw image of the two")
            }
        }
    }

    fn finish(&self, ending: Ending) -> Result<()> {
        match ending {
            Ending::Done => Ok(()),
            Ending::Stopped => {
                let what = format!(
                    "interrupted: a part of {} is merged; keep it where it is",
                    self.upper.path().display()
                );
                Err(Error::new(Code::Aborted, what).hint("the same command again does the rest"))
            }
        }
    }

    fn merged(&self, has_grown: bool) -> Merged {
        Merged {
            nr_clusters: self.nr,
            cluster_bytes: self.header.cluster.bytes(),
            has_grown,
        }
    }
}

impl Merged {
    /// In words.
    pub fn describe(&self, lower: &Path, upper: &Path) -> String {
        let bytes = u64::from(self.nr_clusters) * self.cluster_bytes;
        format!(
            "Merged {} of {} into {}. {1} is not needed any more; it was not changed.\n",
            human(bytes),
            upper.display(),
            lower.display(),
        )
    }
}

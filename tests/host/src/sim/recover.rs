// SPDX-License-Identifier: GPL-2.0
//! What `ploopctl attach` does to images that a power cut has left: the repair that loses nothing,
//! on model disks, with the power cut again between any two of its actions. Whatever is found then
//! reads as before, and can be repaired in its turn.

use super::blocks::{header_words, Blocks};
use super::disk::Image;
use super::engine::File;
use super::judge::{contents, found, Found};
use super::{Config, Fault, Tried};
use crate::rng::Rng;
use ploop_pure::layout::ploop1::{Header, Mark, HEADER_SLOTS};
use ploop_pure::problem::Cure;
use ploop_pure::repair::{Plan, Scope, Step};

/// Power cuts during a repair that are followed by a repair, in percent.
const AGAIN_PERCENT: u64 = 10;

/// A repair of a chain.
pub struct Recovery<'a> {
    /// The workload.
    pub cfg: &'a Config,
    /// Contents of index sectors; they get those of the headers that are written.
    pub blocks: &'a mut Blocks,
    /// Decides what the power cuts leave.
    pub rng: &'a mut Rng,
    /// Counts them.
    pub tried: &'a mut Tried,
}

impl Recovery<'_> {
    /// Repairs `chain`, which a power cut left, and cuts the power meanwhile. Returns it as it is
    /// then: closed, with nothing for a check to find.
    pub fn recover(&mut self, chain: &[Found]) -> Result<Vec<Found>, String> {
        self.repaired(chain, true)
            .map_err(|what| format!("in the repair: {what}"))
    }

    fn repaired(&mut self, chain: &[Found], again: bool) -> Result<Vec<Found>, String> {
        self.tried.recoveries += 1;
        let want = contents(self.cfg, chain);
        let file = |f: &Found| File {
            header: f.header,
            ..self.cfg.reopened(f.clone())
        };
        let mut files: Vec<_> = chain.iter().map(file).collect();
        for (n, f) in chain.iter().enumerate() {
            let Some(plan) = plan_of(f) else {
                continue;
            };
            if plan.cure() == Cure::Lossy {
                return Err(format!("image {n} cannot be repaired without loss"));
            }
            for step in plan.steps() {
                self.step(&mut files, n, step, &plan)?;
                let covered = files[n].disk.sync_start();
                self.cut(&files, &want, again)?;
                // The header comes last.
                let is_last = matches!(step, Step::Close { .. });
                if is_last || self.cfg.fault != Fault::RepairUnsynced {
                    files[n].disk.sync_end(covered);
                }
                self.cut(&files, &want, again)?;
            }
        }
        let done = self.cut(&files, &want, false)?;
        for f in &done {
            if f.header.mark == Mark::InUse || plan_of(f).is_some() {
                return Err(format!("image {} is not clean after it", f.id));
            }
        }
        Ok(done)
    }

    fn step(
        &mut self,
        files: &mut [File],
        n: usize,
        step: Step,
        plan: &Plan,
    ) -> Result<(), String> {
        let disk = &mut files[n].disk;
        let op = match step {
            Step::Extend { len_bytes, .. } | Step::Truncate { len_bytes, .. } => {
                disk.set_len((len_bytes / 512) as usize)
            }
            Step::Close { .. } => {
                let closed = with_header(disk.live(), &plan.closed(), self.blocks)?;
                let op = disk.write(0, &closed.sectors[..1]);
                files[n].closed.push(closed);
                op
            }
            Step::Mark
            | Step::Zero { .. }
            | Step::Forget { .. }
            | Step::Copy { .. }
            | Step::Move { .. }
            | Step::Punch { .. } => return Err(format!("image {n} needs more than that: {step}")),
        };
        files[n].disk.complete(op);
        Ok(())
    }

    /// Cuts the power; what is found reads as before, and now and then is repaired `again`.
    fn cut(&mut self, files: &[File], want: &[u32], again: bool) -> Result<Vec<Found>, String> {
        self.tried.steps += 1;
        self.tried.states += 1;
        let mut chain = Vec::new();
        for file in files {
            chain.push(found(self.cfg, file, self.blocks, self.rng)?);
        }
        if contents(self.cfg, &chain) != want {
            return Err("the disk does not read as before".into());
        }
        if again && self.rng.chance(AGAIN_PERCENT) {
            let nr = self.blocks.nr();
            self.repaired(&chain, false)?;
            self.blocks.truncate(nr);
        }
        Ok(chain)
    }
}

/// What has to be done; nothing to a raw image.
fn plan_of(f: &Found) -> Option<Plan> {
    Plan::new(f.findings.as_ref()?, Scope::Needed)
}

/// The image with another header.
fn with_header(image: &Image, header: &Header, blocks: &mut Blocks) -> Result<Image, String> {
    let mut image = image.clone();
    let words = blocks.get(image.get(0));
    let mut words = words.ok_or("data stands where the header is")?;
    words[..HEADER_SLOTS as usize].copy_from_slice(&header_words(header));
    image.sectors[0] = blocks.stamp(words);
    Ok(image)
}

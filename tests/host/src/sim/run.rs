// SPDX-License-Identifier: GPL-2.0
//! A run of the simulator: attach, work, crash and attach again, and in the end detach.

use super::blocks::{header_words, Blocks};
use super::disk::{Covered, OpId};
use super::engine::{Engine, File};
use super::guest::Guest;
use super::judge::{self, Found};
use super::{Config, Fault};
use crate::rng::Rng;
use ploop_pure::layout::ploop1::{Mark, HEADER_SLOTS};

/// How much was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    /// Actions.
    pub steps: u64,
    /// Chains judged after a power cut.
    pub states: u64,
    /// Operations on the chain that ended.
    pub ops: u64,
}

struct Run<'a> {
    cfg: &'a Config,
    rng: Rng,
    tried: Tried,
}

/// Runs `cfg` with `seed`: attach, work, crash and attach again twice, work, detach.
pub fn run(cfg: &Config, seed: u64) -> Result<Tried, String> {
    let mut run = Run {
        cfg,
        rng: Rng::new(seed),
        tried: Tried::default(),
    };
    let lives = run.lives();
    lives.map_err(|what| format!("seed {seed}, after {:?}: {what}", run.tried))?;
    Ok(run.tried)
}

impl Run<'_> {
    fn lives(&mut self) -> Result<(), String> {
        let mut blocks = Blocks::default();
        let mut files = vec![self.cfg.created(0, &mut blocks)];
        let mut guest = self.reread(&[]);
        let mut unused = (1, 1);
        for life in 0..3 {
            let mut e = Engine::new(self.cfg, files, guest, blocks, unused);
            self.mark(&mut e)?;
            let until = match life {
                2 => u64::MAX,
                _ => self.rng.below(900),
            };
            self.work(&mut e, until)?;
            if life == 2 {
                return match e.is_poisoned {
                    true => Ok(()),
                    false => self.close(&mut e),
                };
            }
            // The lights go out; the images judged last are attached again.
            let found = self.cut(&e)?;
            unused = (e.next_stamp, e.next_id);
            blocks = e.blocks;
            guest = self.reread(&found);
            files = self.repaired(found, &mut blocks);
        }
        Ok(())
    }

    /// The repair of attach: cut the tail, which may hold data that no entry names; clear the
    /// marks of lower deltas.
    fn repaired(&self, found: Vec<Found>, blocks: &mut Blocks) -> Vec<File> {
        let top = found.len() - 1;
        let file = |(n, f): (usize, Found)| {
            let (mut image, mut header) = (f.image, f.header);
            image.len = f.end as usize * self.cfg.cluster_sectors();
            image.sectors.truncate(image.len);
            if n < top {
                header = header.closed(f.places.iter().all(Option::is_none));
                let mut words = blocks.get(image.get(0)).expect("a header");
                words[..HEADER_SLOTS as usize].copy_from_slice(&header_words(&header));
                image.sectors[0] = blocks.stamp(words);
            }
            self.cfg.opened(f.id, image, header, f.places)
        };
        found.into_iter().enumerate().map(file).collect()
    }

    /// A guest that reads the chain as found.
    fn reread(&self, chain: &[Found]) -> Guest {
        let nr = self.cfg.cluster_sectors();
        let sectors = 0..self.cfg.nr_clusters * nr;
        let read: Vec<_> = sectors
            .map(|s| judge::read(self.cfg, chain, s / nr, s % nr))
            .collect();
        Guest::new(nr, &read)
    }

    /// Marks the top in use.
    fn mark(&mut self, e: &mut Engine<'_>) -> Result<(), String> {
        let op = e.write_mark();
        self.finish(e, op, self.cfg.fault != Fault::MarkUnsynced)
    }

    /// Completes a write or change of length of the top, then syncs.
    fn finish(&mut self, e: &mut Engine<'_>, op: OpId, sync: bool) -> Result<(), String> {
        self.cuts(e)?;
        e.files[e.top].disk.complete(op);
        self.cuts(e)?;
        if sync {
            let covered: Covered = e.files[e.top].disk.sync_start();
            self.cuts(e)?;
            e.files[e.top].disk.sync_end(covered);
        }
        self.cuts(e)
    }

    fn work(&mut self, e: &mut Engine<'_>, until: u64) -> Result<(), String> {
        for _ in 0..until.min(100_000) {
            if !e.step(&mut self.rng)? {
                break;
            }
            self.cuts(e)?;
            if e.is_poisoned {
                // Nothing new begins, but a commit may be on its way.
                while e.is_committing() {
                    e.commit(&mut self.rng)?;
                    self.cuts(e)?;
                }
                break;
            }
        }
        self.tried.ops += u64::from(e.ops_done);
        Ok(())
    }

    /// A clean close: index, then the tail cut off, then the mark.
    fn close(&mut self, e: &mut Engine<'_>) -> Result<(), String> {
        let early = self.cfg.fault == Fault::MarkClearedEarly;
        while !early && !e.is_clean() {
            e.commit(&mut self.rng)?;
            self.cuts(e)?;
            if e.is_poisoned {
                return Ok(());
            }
        }
        let len = e.alloc.cut() as usize * self.cfg.cluster_sectors();
        let op = e.files[e.top].disk.set_len(len);
        self.finish(e, op, !early)?;
        let op = e.write_unmark();
        self.finish(e, op, true)?;
        e.guest.promise_all();
        let found = self.cut(e)?;
        if found.iter().any(|f| f.header.mark != Mark::Closed) {
            return Err("an image is marked in use after a clean close".into());
        }
        Ok(())
    }

    fn cuts(&mut self, e: &Engine<'_>) -> Result<(), String> {
        self.tried.steps += 1;
        for _ in 0..self.cfg.cuts {
            self.cut(e)?;
        }
        Ok(())
    }

    fn cut(&mut self, e: &Engine<'_>) -> Result<Vec<Found>, String> {
        self.tried.states += 1;
        judge::cut(self.cfg, e, &mut self.rng)
    }
}

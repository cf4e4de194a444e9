// SPDX-License-Identifier: GPL-2.0
//! A run of the simulator: attach, work, crash or detach, and attach again, twice, with the power
//! cut after every action.
//!
//! All that happens follows from a [`Plot`]: for each step who makes it, and a number from which it
//! draws what it does and what the power cuts after it leave. A seed makes a plot; a part of a plot
//! is one too, which is how a failure is made short ([`super::story`]).

use super::blocks::Blocks;
use super::disk::{Covered, OpId};
use super::engine::{Engine, File};
use super::guest::Guest;
use super::judge::{self, Found};
use super::recover::Recovery;
use super::{Config, Fault};
use crate::rng::Rng;
use ploop_pure::layout::ploop1::Mark;
use std::ops::AddAssign;

/// Steps after which a life surely hangs.
const STEPS_MAX: u64 = 100_000;

/// How much was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    /// Cut points: actions after which the power was cut.
    pub steps: u64,
    /// Chains judged after a power cut, one or more for each cut point.
    pub states: u64,
    /// Chains repaired after it, with more cuts meanwhile.
    pub recoveries: u64,
    /// Operations on the chain that ended.
    pub ops: u64,
}

impl AddAssign for Tried {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.states += other.states;
        self.recoveries += other.recoveries;
        self.ops += other.ops;
    }
}

/// How the time between two attaches ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A power cut, after so many steps at the latest.
    Crash(u64),
    /// What runs comes to its end, then a detach.
    Detach,
}

/// One step, and the power cuts after it.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    seed: u64,
    /// Who makes it; if that one cannot, it is left out. Anybody, until it was made once.
    actor: Option<u64>,
    /// What it is about: a request, or the actor.
    pub subject: u64,
}

/// What happens between two attaches.
#[derive(Debug, Clone)]
pub struct Life {
    /// The steps; those that were drawn are added, those that were left out are not there any more.
    pub steps: Vec<Step>,
    /// Draws more steps.
    pub drawn: Option<Rng>,
    /// The end.
    pub end: End,
}

/// Everything that happens in a run.
#[derive(Debug, Clone)]
pub struct Plot(pub Vec<Life>);

impl Plot {
    /// The plot of a seed: two lives that end somehow, and one that ends with a detach.
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let life = |nr| {
            let until = rng.below(900);
            let end = match nr < 2 && !rng.chance(20) {
                true => End::Crash(until),
                false => End::Detach,
            };
            Life {
                steps: Vec::new(),
                drawn: Some(Rng::new(rng.bits())),
                end,
            }
        };
        Self((0..3).map(life).collect())
    }
}

/// Runs `cfg` with `seed`.
pub fn run(cfg: &Config, seed: u64) -> Result<Tried, String> {
    let mut tried = Tried::default();
    let ended = play(cfg, &mut Plot::new(seed), &mut tried, None);
    ended.map_err(|what| format!("seed {seed}, after {tried:?}: {what}"))?;
    Ok(tried)
}

/// Runs `cfg` as `plot` says, which gets the steps that it draws; after a failure it ends with the
/// step that failed. What happens is added to `story`.
pub fn play(
    cfg: &Config,
    plot: &mut Plot,
    tried: &mut Tried,
    story: Option<&mut Vec<String>>,
) -> Result<(), String> {
    let mut run = Run {
        cfg,
        rng: Rng::new(0),
        tried: Tried::default(),
        story: story.is_some().then(Vec::new),
        nr: 0,
    };
    let result = run.lives(plot);
    if result.is_err() {
        plot.0.truncate(run.nr + 1);
        plot.0[run.nr].drawn = None;
    }
    *tried += run.tried;
    if let (Some(to), Some(told)) = (story, &mut run.story) {
        to.append(told);
    }
    result
}

struct Run<'a> {
    cfg: &'a Config,
    /// Decides what a power cut leaves.
    rng: Rng,
    tried: Tried,
    story: Option<Vec<String>>,
    /// Which life it is.
    nr: usize,
}

impl Run<'_> {
    fn lives(&mut self, plot: &mut Plot) -> Result<(), String> {
        let mut blocks = Blocks::default();
        let mut files = vec![match self.cfg.raw {
            true => self.cfg.raw_image(&mut blocks),
            false => self.cfg.created(0, self.cfg.nr_entries, &mut blocks),
        }];
        let mut guest = self.reread(&[]);
        let mut unused = (1, 1);
        for (nr, life) in plot.0.iter_mut().enumerate() {
            self.nr = nr;
            self.rng = Rng::new(nr as u64);
            let mut e = Engine::new(self.cfg, files, guest, blocks, unused);
            e.story = self.story.take();
            e.tell(|| format!("attach number {}", nr + 1));
            let ended = self.life(&mut e, life);
            self.story = e.story.take();
            let found = ended?;
            unused = (e.next_stamp, e.next_id);
            blocks = e.blocks;
            let found = self.recovered(&found, &mut blocks)?;
            guest = self.reread(&found);
            files = found.into_iter().map(|f| self.cfg.reopened(f)).collect();
        }
        Ok(())
    }

    /// Attach, work and the end: what is found after it.
    fn life(&mut self, e: &mut Engine<'_>, life: &mut Life) -> Result<Vec<Found>, String> {
        self.mark(e)?;
        self.work(e, life)?;
        self.rng = Rng::new(!(self.nr as u64));
        if life.end == End::Detach {
            e.tell(|| "detach".into());
            self.drain(e)?;
            if !e.is_poisoned {
                return self.close(e);
            }
        }
        // The lights go out; the images judged last are attached again.
        e.tell(|| "the power is cut".into());
        self.cut(e)
    }

    /// The repair that attach makes.
    fn recovered(&mut self, found: &[Found], blocks: &mut Blocks) -> Result<Vec<Found>, String> {
        let (cfg, rng, tried) = (self.cfg, &mut self.rng, &mut self.tried);
        let mut recovery = Recovery {
            cfg,
            blocks,
            rng,
            tried,
        };
        recovery.recover(found)
    }

    /// A guest that reads the chain as found.
    fn reread(&self, chain: &[Found]) -> Guest {
        Guest::new(
            self.cfg.cluster_sectors(),
            &judge::contents(self.cfg, chain),
        )
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

    fn work(&mut self, e: &mut Engine<'_>, life: &mut Life) -> Result<(), String> {
        let until = match life.end {
            End::Crash(until) => until,
            End::Detach => STEPS_MAX,
        };
        let mut told = std::mem::take(&mut life.steps).into_iter();
        for _ in 0..until {
            let drawn = |rng: &mut Rng| Step {
                seed: rng.bits(),
                actor: None,
                subject: 0,
            };
            let Some(mut step) = told.next().or_else(|| life.drawn.as_mut().map(drawn)) else {
                break;
            };
            self.rng = Rng::new(!step.seed);
            let made = self.step(e, &mut Rng::new(step.seed), step.actor);
            if made == Ok(false) && step.actor.is_some() {
                continue;
            }
            (step.actor, step.subject) = (Some(e.actor), e.subject);
            life.steps.push(step);
            if !made? || e.is_poisoned {
                break;
            }
        }
        self.tried.ops += u64::from(e.ops_done);
        Ok(())
    }

    /// One step, and the power cuts after it. False if there is nothing to do.
    fn step(
        &mut self,
        e: &mut Engine<'_>,
        rng: &mut Rng,
        actor: Option<u64>,
    ) -> Result<bool, String> {
        if !e.step(rng, actor)? {
            return Ok(false);
        }
        self.cuts(e)?;
        if e.is_poisoned {
            // Nothing new begins, but a commit may be on its way.
            while e.is_committing() {
                e.commit(rng)?;
                self.cuts(e)?;
            }
        }
        Ok(true)
    }

    /// What has begun comes to its end; nothing new begins.
    fn drain(&mut self, e: &mut Engine<'_>) -> Result<(), String> {
        e.take_no_more();
        let mut rng = Rng::new(self.nr as u64);
        for _ in 0..STEPS_MAX {
            if e.is_poisoned || !self.step(e, &mut rng, None)? {
                return Ok(());
            }
        }
        Err("the requests do not come to an end".into())
    }

    /// A clean close: index, then the tail cut off, then the mark.
    fn close(&mut self, e: &mut Engine<'_>) -> Result<Vec<Found>, String> {
        let early = self.cfg.fault == Fault::MarkClearedEarly;
        let mut rng = Rng::new(self.nr as u64);
        while !early && !e.is_clean() {
            e.commit(&mut rng)?;
            self.cuts(e)?;
            if e.is_poisoned {
                return self.cut(e);
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
        Ok(found)
    }

    fn cuts(&mut self, e: &mut Engine<'_>) -> Result<(), String> {
        self.tried.steps += 1;
        for _ in 0..self.cfg.cuts {
            let found = self.cut(e)?;
            if self.rng.chance(self.cfg.recover_percent) {
                let nr = e.blocks.nr();
                self.recovered(&found, &mut e.blocks)?;
                e.blocks.truncate(nr);
            }
        }
        Ok(())
    }

    fn cut(&mut self, e: &Engine<'_>) -> Result<Vec<Found>, String> {
        self.tried.states += 1;
        let mut before = self.rng.clone();
        judge::cut(self.cfg, e, &mut self.rng).map_err(|what| {
            if e.story.is_none() {
                return what;
            }
            let loss = |f: &File| format!("\n  file {}: {}", f.id, f.disk.loss(&mut before));
            let losses: String = e.files.iter().map(loss).collect();
            format!("{what}; of what was not durable{losses}")
        })
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Failures made short: of the workload and the plot of a run that fails, as much as possible is
//! left out while it still fails, and what is left is told.

use super::run::{play, End, Life, Plot, Tried};
use super::Config;
use std::collections::BTreeSet;

/// States judged on the way, after which it is good enough.
const STATES_MAX: u64 = 1_500_000;
/// Power cuts after each action, so that a shorter plot fails as well.
const CUTS: u32 = 6;

/// A failure, as short as it could be made.
#[derive(Debug, Clone)]
pub struct Story {
    /// Steps between attaches that are left.
    pub nr_steps: usize,
    /// What happens, and what is wrong then.
    pub lines: Vec<String>,
    /// The workload that is left.
    pub cfg: Config,
}

impl std::fmt::Display for Story {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "the shortest story, of {} steps, with {:?}:",
            self.nr_steps, self.cfg
        )?;
        self.lines
            .iter()
            .try_for_each(|line| writeln!(f, "  {line}"))
    }
}

struct Shrinker {
    cfg: Config,
    plot: Plot,
    tried: Tried,
}

/// Makes the failure of `cfg` with `seed` short; `None` if that does not fail.
pub fn shortest(cfg: &Config, seed: u64) -> Option<Story> {
    let mut plot = Plot::new(seed);
    let mut tried = Tried::default();
    play(cfg, &mut plot, &mut tried, None).err()?;
    let cfg = cfg.clone();
    let mut s = Shrinker { cfg, plot, tried };
    let cuts = CUTS.max(s.cfg.cuts);
    s.try_with(|cfg, _| cfg.cuts = cuts);
    loop {
        let size = (s.nr_steps(), s.cfg.nr_clusters);
        s.leave_lives_out();
        s.leave_subjects_out();
        s.leave_steps_out();
        s.leave_workload_out();
        if size == (s.nr_steps(), s.cfg.nr_clusters) || s.is_tired() {
            break;
        }
    }
    let mut lines = Vec::new();
    let what = play(&s.cfg, &mut s.plot, &mut s.tried, Some(&mut lines)).err()?;
    lines.push(format!("then: {what}"));
    Some(Story {
        nr_steps: s.nr_steps(),
        lines,
        cfg: s.cfg,
    })
}

impl Shrinker {
    fn nr_steps(&self) -> usize {
        self.plot.0.iter().map(|life| life.steps.len()).sum()
    }

    fn is_tired(&self) -> bool {
        self.tried.states > STATES_MAX
    }

    /// Changes workload and plot, if it fails then too. Returns whether it does.
    fn try_with(&mut self, change: impl FnOnce(&mut Config, &mut Vec<Life>)) -> bool {
        let (mut cfg, mut plot) = (self.cfg.clone(), self.plot.clone());
        change(&mut cfg, &mut plot.0);
        let fails = !self.is_tired() && play(&cfg, &mut plot, &mut self.tried, None).is_err();
        if fails {
            (self.cfg, self.plot) = (cfg, plot);
        }
        fails
    }

    fn leave_lives_out(&mut self) {
        if let Some(last) = self.plot.0.len().checked_sub(1) {
            // Without what a detach lets come to its end.
            self.try_with(|_, lives| lives[last].end = End::Crash(u64::MAX));
        }
        for nr in (0..self.plot.0.len()).rev() {
            if self.plot.0.len() > 1 {
                self.try_with(|_, lives| drop(lives.remove(nr)));
            }
        }
    }

    /// Leaves out all steps of a request, or of somebody else.
    fn leave_subjects_out(&mut self) {
        for nr in (0..self.plot.0.len()).rev() {
            let steps = self.plot.0.get(nr).map(|life| life.steps.iter());
            let subjects = steps.into_iter().flatten().map(|s| s.subject);
            for subject in subjects.collect::<BTreeSet<_>>() {
                self.try_with(|_, lives| {
                    if let Some(life) = lives.get_mut(nr) {
                        life.steps.retain(|s| s.subject != subject);
                    }
                });
            }
        }
    }

    /// Leaves out runs of steps, long ones first.
    fn leave_steps_out(&mut self) {
        for life in (0..self.plot.0.len()).rev() {
            let mut nr = self.plot.0[life].steps.len().div_ceil(2);
            while nr > 0 {
                let mut end = self.plot.0.get(life).map_or(0, |l| l.steps.len());
                while end > 0 {
                    let first = end.saturating_sub(nr);
                    self.try_with(|_, lives| drop(lives[life].steps.drain(first..end)));
                    // A failure may come earlier now.
                    let left = self.plot.0.get(life).map_or(0, |l| l.steps.len());
                    end = first.min(left);
                }
                nr /= 2;
            }
        }
    }

    /// A simpler workload of the same kind.
    fn leave_workload_out(&mut self) {
        let simpler: [fn(&mut Config); 10] = [
            |c| c.below = false,
            |c| c.in_flight = c.in_flight.min(2),
            |c| c.nr_clusters = c.nr_clusters.min(1),
            |c| c.nr_clusters = c.nr_clusters.min(2),
            |c| c.nr_clusters = c.nr_clusters.min(4),
            |c| c.read_percent = 0,
            |c| c.zero_percent = 0,
            |c| c.fail_percent = 0,
            |c| c.sync_fail_percent = 0,
            |c| c.recover_percent = 0,
        ];
        for change in simpler {
            self.try_with(|cfg, _| change(cfg));
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The steps of a snapshot: the top of a running device becomes a lower delta.
//!
//! All slow work comes before the queue is held; it is held for the copy of the last index pages
//! and the switch only. The old top is finished after the switch, and nothing is promised to be
//! durable before that is done: every FLUSH and FUA waits for it (ordering rule 7). A failure
//! before the switch leaves the old top as it was.

/// What has to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Mark the new top in use, durably.
    MarkNew,
    /// Commit the old top, so that little is left to be done later.
    CommitOld,
    /// Hold the queue, copy the dirty index pages of the old top, make the new delta the top and
    /// FLUSH and FUA wait, and let the queue go on: [`Event::Ok`] when switched.
    Switch,
    /// Make data and index of the old top durable, and cut its file.
    FinishOld,
    /// Clear the mark of the old top.
    UnmarkOld,
    /// FLUSH and FUA need not wait any more: it is done.
    Done,
    /// Clear the mark of the new delta and forget it: nothing has changed.
    Undo,
    /// The switch is made but the old top could not be finished: no write is taken any more, and
    /// both images keep their marks.
    Poison,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The last action succeeded.
    Ok,
    /// The last action failed.
    Failed,
}

/// One snapshot.
#[derive(Debug)]
pub struct Snapshot {
    doing: Action,
}

impl Snapshot {
    /// A new snapshot and its first action.
    pub fn start() -> (Self, Action) {
        let doing = Action::MarkNew;
        (Self { doing }, doing)
    }

    /// The action that follows `event`; the last one again after the end.
    pub fn next(&mut self, event: Event) -> Action {
        self.doing = match (self.doing, event) {
            (Action::MarkNew, Event::Ok) => Action::CommitOld,
            (Action::CommitOld, Event::Ok) => Action::Switch,
            (Action::MarkNew | Action::CommitOld | Action::Switch, Event::Failed) => Action::Undo,
            (Action::Switch, Event::Ok) if mutant!("snapshot_unfinished") => Action::Done,
            (Action::Switch, Event::Ok) => Action::FinishOld,
            (Action::FinishOld, Event::Ok) => Action::UnmarkOld,
            (Action::UnmarkOld, Event::Ok) => Action::Done,
            (Action::FinishOld, Event::Failed) if mutant!("unmark_unfinished") => Action::UnmarkOld,
            (Action::FinishOld | Action::UnmarkOld, Event::Failed) => Action::Poison,
            (end @ (Action::Done | Action::Undo | Action::Poison), _) => end,
        };
        self.doing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Action; 5] = [
        Action::MarkNew,
        Action::CommitOld,
        Action::Switch,
        Action::FinishOld,
        Action::UnmarkOld,
    ];

    #[test]
    fn every_step_in_order() {
        let (mut s, mut action) = Snapshot::start();
        for step in STEPS {
            assert_eq!(action, step);
            action = s.next(Event::Ok);
        }
        assert_eq!(action, Action::Done);
        assert_eq!(s.next(Event::Failed), Action::Done);
    }

    #[test]
    fn before_the_switch_failure_undoes_and_after_it_poisons() {
        for fails_at in 0..STEPS.len() {
            let (mut s, _) = Snapshot::start();
            for _ in 0..fails_at {
                s.next(Event::Ok);
            }
            let want = if fails_at < 3 {
                Action::Undo
            } else {
                Action::Poison
            };
            assert_eq!(s.next(Event::Failed), want);
        }
    }
}

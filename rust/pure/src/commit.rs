// SPDX-License-Identifier: GPL-2.0
//! How a FLUSH, and everything else that needs the index durable, is carried out.
//!
//! The order is ordering rule 1: index pages are copied, *then* the data is synced, *then* the
//! copies are written, *then* the file is synced again. A copy holds only entries whose data had
//! been written before it was taken, so the data sync covers all of them; an entry published
//! later leaves its page dirty for the next commit. Rule 3: nobody is told that a FLUSH is done
//! before the last sync has succeeded.
//!
//! While the top is being merged into the delta below, that one is the *destination*, whose index
//! is written, and the old top is the *source*. Then two more steps follow: the source's index is
//! written without the entries that the destination has now, and synced (rule 8). So a FLUSH ends
//! only when nothing in the source hides what was written since.

/// What the engine has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Move a batch of dirty pages, from this cursor on, into flight and copy them.
    Copy {
        /// For [`DirtyPages::take_batch`](crate::index::DirtyPages::take_batch).
        cursor: u32,
    },
    /// Make everything written to the image so far durable.
    SyncData,
    /// Write the copies to their places.
    WriteIndex,
    /// Make the copies durable; then settle the batch, unless entries are dropped too.
    SyncIndex,
    /// Write the copies of the source's pages to their places.
    WriteDrops,
    /// Make those durable, then settle the batch.
    SyncDrops,
    /// All that was published before the commit began is durable.
    Done,
    /// Settle the batch as failed, poison the delta and report the error.
    Fail,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The batch is copied.
    Copied {
        /// Pages in it.
        nr: usize,
        /// Where the next batch begins, if there may be one.
        next: Option<u32>,
    },
    /// The last action succeeded.
    Ok,
    /// The last action failed.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Copying,
    SyncingData { nr: usize, next: Option<u32> },
    Writing { next: Option<u32> },
    SyncingIndex { next: Option<u32> },
    WritingDrops { next: Option<u32> },
    SyncingDrops { next: Option<u32> },
    Ended,
}

/// One commit.
#[derive(Debug)]
pub struct Commit {
    state: State,
    /// The entries that the destination has now are dropped from the source.
    drops: bool,
}

impl Commit {
    /// A new commit and its first action; `drops` during a merge of the top.
    pub fn start(drops: bool) -> (Self, Action) {
        let state = State::Copying;
        (Self { state, drops }, Action::Copy { cursor: 0 })
    }

    /// A commit of `nr` pages that are copied already, and of no others.
    pub fn of_copies(nr: usize, drops: bool) -> (Self, Action) {
        let (mut commit, _) = Self::start(drops);
        let action = commit.next(Event::Copied { nr, next: None });
        (commit, action)
    }

    /// What follows when all pages of a batch are durable.
    fn after_batch(next: Option<u32>) -> (State, Action) {
        match next {
            None => (State::Ended, Action::Done),
            Some(cursor) => (State::Copying, Action::Copy { cursor }),
        }
    }

    /// The action that follows `event`. After `Done` or `Fail` there is only `Fail`.
    pub fn next(&mut self, event: Event) -> Action {
        let (state, action) = match (self.state, event) {
            (State::Copying, Event::Copied { nr, next }) if mutant!("index_before_data") => {
                if nr == 0 {
                    (State::SyncingData { nr, next }, Action::SyncData)
                } else {
                    (State::Writing { next }, Action::WriteIndex)
                }
            }
            (State::Copying, Event::Copied { nr, next }) => {
                (State::SyncingData { nr, next }, Action::SyncData)
            }
            (State::SyncingData { nr: 0, .. }, Event::Ok) => (State::Ended, Action::Done),
            (State::SyncingData { next, .. }, Event::Ok)
                if self.drops && mutant!("drop_before_index") =>
            {
                (State::WritingDrops { next }, Action::WriteDrops)
            }
            (State::SyncingData { next, .. }, Event::Ok) => {
                (State::Writing { next }, Action::WriteIndex)
            }
            (State::Writing { next }, Event::Ok) => {
                (State::SyncingIndex { next }, Action::SyncIndex)
            }
            (State::SyncingIndex { next }, Event::Ok)
                if self.drops && !mutant!("drop_before_index") =>
            {
                (State::WritingDrops { next }, Action::WriteDrops)
            }
            (State::SyncingIndex { next }, Event::Ok) => Self::after_batch(next),
            (State::WritingDrops { next }, Event::Ok) => {
                (State::SyncingDrops { next }, Action::SyncDrops)
            }
            (State::SyncingDrops { next }, Event::Ok) if mutant!("drop_before_index") => {
                (State::Writing { next }, Action::WriteIndex)
            }
            (State::SyncingDrops { next }, Event::Ok) => Self::after_batch(next),
            (
                State::Copying
                | State::SyncingData { .. }
                | State::Writing { .. }
                | State::SyncingIndex { .. }
                | State::WritingDrops { .. }
                | State::SyncingDrops { .. }
                | State::Ended,
                Event::Copied { .. } | Event::Ok | Event::Failed,
            ) => (State::Ended, Action::Fail),
        };
        self.state = state;
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_synced_before_the_index_is_written() {
        let (mut c, a) = Commit::start(false);
        assert_eq!(a, Action::Copy { cursor: 0 });
        assert_eq!(
            c.next(Event::Copied {
                nr: 64,
                next: Some(70)
            }),
            Action::SyncData
        );
        assert_eq!(c.next(Event::Ok), Action::WriteIndex);
        assert_eq!(c.next(Event::Ok), Action::SyncIndex);
        assert_eq!(c.next(Event::Ok), Action::Copy { cursor: 70 });
        assert_eq!(
            c.next(Event::Copied { nr: 0, next: None }),
            Action::SyncData
        );
        assert_eq!(c.next(Event::Ok), Action::Done);
        assert_eq!(c.next(Event::Ok), Action::Fail);
    }

    #[test]
    fn entries_are_dropped_last() {
        let (mut c, _) = Commit::start(true);
        c.next(Event::Copied { nr: 1, next: None });
        let want = [
            Action::WriteIndex,
            Action::SyncIndex,
            Action::WriteDrops,
            Action::SyncDrops,
            Action::Done,
        ];
        for action in want {
            assert_eq!(c.next(Event::Ok), action);
        }
    }

    #[test]
    fn copies_made_before_are_committed() {
        let (mut c, action) = Commit::of_copies(0, false);
        assert_eq!(
            (action, c.next(Event::Ok)),
            (Action::SyncData, Action::Done)
        );
    }

    #[test]
    fn any_failure_fails_the_commit() {
        for oks in 0..3 {
            let (mut c, _) = Commit::start(false);
            c.next(Event::Copied { nr: 1, next: None });
            for _ in 0..oks {
                c.next(Event::Ok);
            }
            assert_eq!(c.next(Event::Failed), Action::Fail);
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The states of a device and which control call is admitted in which.

use crate::abi;

/// State of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No delta.
    Empty,
    /// Has deltas; capacity 0.
    Stopped {
        /// How many.
        nr_deltas: usize,
    },
    /// Serves requests.
    Running {
        /// How many.
        nr_deltas: usize,
    },
}

/// A long operation: one at a time on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A delta goes into the one below.
    Merge,
    /// The disk becomes larger.
    Grow,
    /// The last slots of the top move into free ones.
    Compact,
}

impl Op {
    /// The operation of a number of the ABI.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            abi::OP_MERGE => Some(Self::Merge),
            abi::OP_GROW => Some(Self::Grow),
            abi::OP_COMPACT => Some(Self::Compact),
            _ => None,
        }
    }

    /// Its number in the ABI.
    pub fn number(self) -> u32 {
        match self {
            Self::Merge => abi::OP_MERGE,
            Self::Grow => abi::OP_GROW,
            Self::Compact => abi::OP_COMPACT,
        }
    }

    /// Its name, as in sysfs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Merge => "merge",
            Self::Grow => "grow",
            Self::Compact => "compact",
        }
    }
}

/// A control call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// ADD_DELTA.
    AddDelta,
    /// DEL_DELTA of a level.
    DelDelta(u32),
    /// START.
    Start,
    /// STOP.
    Stop {
        /// Openers of the disk and its partitions, the caller included.
        openers: u32,
    },
    /// CLEAR.
    Clear,
    /// SYNC.
    Sync,
    /// SNAPSHOT.
    Snapshot,
    /// Anything that changes a running device: REPLACE_DELTA, OP_START and the like.
    Change,
    /// FREEZE and THAW.
    Freeze,
    /// Removal of the device itself.
    Remove {
        /// Openers of the disk and its partitions.
        openers: u32,
    },
}

/// Why a call is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// EBUSY.
    Busy,
    /// ENOENT.
    NotFound,
    /// EINVAL.
    Invalid,
}

/// Whether `call` is admitted in `state`. The answers are OpenVZ's, in its order of checks.
pub fn admit(state: State, call: Call) -> Result<(), Refusal> {
    match (call, state) {
        (Call::AddDelta, State::Empty | State::Stopped { .. }) => Ok(()),
        (Call::AddDelta, State::Running { .. }) => Err(Refusal::Busy),
        (Call::DelDelta(_), State::Empty) => Err(Refusal::NotFound),
        (Call::DelDelta(0), State::Running { .. }) => Err(Refusal::Busy),
        (Call::DelDelta(level), State::Stopped { nr_deltas } | State::Running { nr_deltas }) => {
            let level = usize::try_from(level).unwrap_or(usize::MAX);
            let is_running = matches!(state, State::Running { .. });
            match nr_deltas.checked_sub(1) {
                Some(top) if level < top => Ok(()),
                // Requests go there.
                Some(top) if level == top && is_running => Err(Refusal::Busy),
                Some(top) if level == top => Ok(()),
                Some(_) | None => Err(Refusal::NotFound),
            }
        }
        (Call::Start, State::Stopped { .. }) => Ok(()),
        (Call::Start, State::Empty) => Err(Refusal::NotFound),
        (Call::Start, State::Running { .. }) => Err(Refusal::Busy),
        (Call::Stop { openers }, State::Running { .. }) if openers <= 1 => Ok(()),
        (Call::Stop { .. }, State::Running { .. }) => Err(Refusal::Busy),
        (Call::Stop { .. }, State::Empty | State::Stopped { .. }) => Err(Refusal::Invalid),
        (Call::Clear, State::Empty | State::Stopped { .. }) => Ok(()),
        (Call::Clear, State::Running { .. }) => Err(Refusal::Busy),
        (Call::Sync, State::Empty) => Err(Refusal::NotFound),
        (Call::Sync, State::Stopped { .. } | State::Running { .. }) => Ok(()),
        (Call::Snapshot | Call::Change, State::Empty) => Err(Refusal::NotFound),
        (Call::Snapshot, State::Stopped { .. } | State::Running { .. }) => Ok(()),
        (Call::Change | Call::Freeze, State::Running { .. }) => Ok(()),
        (Call::Change, State::Stopped { .. }) => Err(Refusal::Invalid),
        (Call::Freeze, State::Empty | State::Stopped { .. }) => Err(Refusal::Invalid),
        (Call::Remove { openers: 0 }, State::Empty) => Ok(()),
        (Call::Remove { .. }, State::Empty | State::Stopped { .. } | State::Running { .. }) => {
            Err(Refusal::Busy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_states_are_refused() {
        let three = State::Running { nr_deltas: 3 };
        let (stopped, running) = (
            State::Stopped { nr_deltas: 1 },
            State::Running { nr_deltas: 1 },
        );
        for (state, call, want) in [
            (State::Empty, Call::Start, Err(Refusal::NotFound)),
            (State::Empty, Call::Clear, Ok(())),
            (State::Empty, Call::DelDelta(0), Err(Refusal::NotFound)),
            (State::Empty, Call::Sync, Err(Refusal::NotFound)),
            (State::Empty, Call::Remove { openers: 0 }, Ok(())),
            (
                State::Empty,
                Call::Remove { openers: 1 },
                Err(Refusal::Busy),
            ),
            (stopped, Call::DelDelta(0), Ok(())),
            (stopped, Call::DelDelta(1), Err(Refusal::NotFound)),
            (stopped, Call::Stop { openers: 1 }, Err(Refusal::Invalid)),
            (stopped, Call::Remove { openers: 0 }, Err(Refusal::Busy)),
            (running, Call::AddDelta, Err(Refusal::Busy)),
            (running, Call::Start, Err(Refusal::Busy)),
            (running, Call::Stop { openers: 1 }, Ok(())),
            (running, Call::Stop { openers: 2 }, Err(Refusal::Busy)),
            (running, Call::Clear, Err(Refusal::Busy)),
            (running, Call::DelDelta(0), Err(Refusal::Busy)),
            (three, Call::DelDelta(0), Err(Refusal::Busy)),
            (three, Call::DelDelta(1), Ok(())),
            (three, Call::DelDelta(2), Err(Refusal::Busy)),
            (three, Call::DelDelta(3), Err(Refusal::NotFound)),
            (State::Empty, Call::Snapshot, Err(Refusal::NotFound)),
            (stopped, Call::Change, Err(Refusal::Invalid)),
            (running, Call::Change, Ok(())),
            (stopped, Call::Freeze, Err(Refusal::Invalid)),
        ] {
            assert_eq!(admit(state, call), want, "{state:?} {call:?}");
        }
    }
}

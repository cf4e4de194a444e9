// SPDX-License-Identifier: GPL-2.0
//! Host tests of what ploop decides, and the parts of `plooptest`, the helper of the guest tests.
//!
//! [`sim`] runs the state machines of `ploop_pure` on a model disk and cuts the power between any
//! two actions; `tests/` holds the property tests.

pub mod cli;
pub mod rng;
pub mod sim;

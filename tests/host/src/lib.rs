// SPDX-License-Identifier: GPL-2.0
//! Host tests of what ploop decides, and the parts of `plooptest`, the helper of the guest tests.
//!
//! [`sim`] runs the state machines of `ploop_pure` on a model disk and cuts the power between any
//! two actions; `tests/` holds the property tests. The other modules are the subcommands of
//! `plooptest`, which runs inside the test machine. Only [`dev`] may use `unsafe`.

pub mod cli;
pub mod dev;
pub mod device;
pub mod fuzz;
pub mod ioctls;
pub mod load;
pub mod model;
pub mod mutate;
pub mod replay;
pub mod rng;
pub mod seq;
pub mod sim;
pub mod track;

// SPDX-License-Identifier: GPL-2.0
//! Which mutant this is, for host tests that try all of them with one build.

extern crate std;
use std::{env, string::String, sync::OnceLock};

/// Whether `PLOOP_MUTANT` names this one.
pub(crate) fn is_chosen(name: &str) -> bool {
    static CHOSEN: OnceLock<String> = OnceLock::new();
    CHOSEN.get_or_init(|| env::var("PLOOP_MUTANT").unwrap_or_default()) == name
}

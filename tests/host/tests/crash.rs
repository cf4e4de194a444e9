// SPDX-License-Identifier: GPL-2.0
//! Power cuts after every action of the write path, and proof that the simulator would notice.
//!
//! `PLOOP_SEED=N` begins with another seed; a failure prints the seed of the run that failed.

use ploop_pure::layout::ploop1::Version;
use plooptest::sim::{run, Config, Fault, Tried};

fn first_seed() -> u64 {
    std::env::var("PLOOP_SEED").map_or(1, |s| s.parse().expect("PLOOP_SEED is a number"))
}

/// Runs `nr` seeds of `cfg`.
fn runs(cfg: &Config, nr: u64) -> Result<Tried, String> {
    let first = first_seed();
    let mut all = Tried::default();
    for seed in first..first + nr {
        let tried = run(cfg, seed)?;
        all.steps += tried.steps;
        all.states += tried.states;
    }
    println!("{all:?} in seeds {first} to {}", first + nr - 1);
    Ok(all)
}

#[track_caller]
fn sound(cfg: &Config, nr: u64, states_min: u64) {
    match runs(cfg, nr) {
        Ok(all) => assert!(all.states >= states_min, "only {all:?}"),
        Err(what) => panic!("{what}\nwith {cfg:?}"),
    }
}

#[track_caller]
fn noticed(fault: Fault, change: impl FnOnce(&mut Config)) {
    let mut cfg = Config {
        fault,
        ..Config::usual()
    };
    change(&mut cfg);
    match runs(&cfg, 300) {
        Ok(all) => panic!("{fault:?} was not noticed in {all:?}"),
        Err(what) => println!("{fault:?}: {what}"),
    }
}

#[test]
fn no_power_cut_breaks_a_promise() {
    sound(&Config::usual(), 150, 100_000);
}

/// A chain of one: whatever is not in the image reads as zeros.
#[test]
fn nothing_below() {
    let cfg = Config {
        below: false,
        ..Config::usual()
    };
    sound(&cfg, 60, 40_000);
}

#[test]
fn version_1_on_a_4k_disk() {
    let cfg = Config {
        version: Version::V1,
        piece_sectors: 8,
        ..Config::usual()
    };
    sound(&cfg, 60, 40_000);
}

#[test]
fn failed_writes_and_a_full_image() {
    let cfg = Config {
        slots_max: 14,
        fail_percent: 20,
        ..Config::usual()
    };
    sound(&cfg, 80, 40_000);
}

#[test]
fn failed_syncs_poison() {
    let cfg = Config {
        sync_fail_percent: 15,
        ..Config::usual()
    };
    sound(&cfg, 100, 20_000);
}

/// More dirty pages than a commit writes as one batch.
#[test]
fn an_index_of_many_pages() {
    let cfg = Config {
        nr_entries: 80 * 1024,
        nr_clusters: 80,
        requests: 300,
        in_flight: 8,
        flush_percent: 1,
        fua_percent: 1,
        cuts: 1,
        ..Config::usual()
    };
    sound(&cfg, 6, 5_000);
}

#[test]
fn an_ignored_flush_is_noticed() {
    noticed(Fault::FlushIgnored, |c| c.fua_percent = 0);
}

#[test]
fn a_late_copy_is_noticed() {
    noticed(Fault::CopyLate, |_| ());
}

#[test]
fn an_unclean_slot_is_noticed() {
    noticed(Fault::ReuseUnclean, |c| {
        c.slots_max = 14;
        c.fail_percent = 20;
    });
}

#[test]
fn a_forgotten_length_is_noticed() {
    noticed(Fault::LengthForgotten, |_| ());
}

#[test]
fn an_unsynced_mark_is_noticed() {
    noticed(Fault::MarkUnsynced, |_| ());
}

#[test]
fn a_mark_cleared_early_is_noticed() {
    noticed(Fault::MarkClearedEarly, |_| ());
}

#[test]
fn a_copy_after_the_publication_is_noticed() {
    noticed(Fault::PublishBeforeCopy, |_| ());
}

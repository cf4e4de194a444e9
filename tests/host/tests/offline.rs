// SPDX-License-Identifier: GPL-2.0
//! Power cuts after every action of merge, grow and compact, each begun again afterwards.
//!
//! `PLOOP_SEED=N` begins with another seed; a failure prints the seed of the run that failed.

use ploop_pure::layout::ploop1::Version;
use plooptest::sim::offline::{run, Config, Op};
use plooptest::sim::Tried;

#[track_caller]
fn sound(cfg: &Config, nr: u64, states_min: u64) {
    let first = std::env::var("PLOOP_SEED").map_or(1, |s| s.parse().expect("a number"));
    let mut all = Tried::default();
    for seed in first..first + nr {
        match run(cfg, seed) {
            Ok(tried) => {
                all.steps += tried.steps;
                all.states += tried.states;
            }
            Err(what) => panic!("{what}\nwith {cfg:?}"),
        }
    }
    println!("{all:?}");
    assert!(all.states >= states_min, "only {all:?}");
}

#[test]
fn a_merge_may_be_cut_anywhere() {
    sound(&Config::usual(Op::Merge), 120, 20_000);
}

#[test]
fn a_merge_into_a_raw_image_may_be_cut_anywhere() {
    sound(&Config::usual(Op::MergeRaw), 60, 5_000);
}

#[test]
fn growing_may_be_cut_anywhere() {
    sound(&Config::usual(Op::Grow), 120, 10_000);
}

#[test]
fn compacting_may_be_cut_anywhere() {
    sound(&Config::usual(Op::Compact), 120, 10_000);
}

#[test]
fn dropping_zeros_may_be_cut_anywhere() {
    sound(&Config::usual(Op::Drop), 120, 10_000);
}

#[test]
fn version_1_on_a_4k_disk() {
    for op in Op::ALL {
        let cfg = Config {
            version: Version::V1,
            piece_sectors: 8,
            ..Config::usual(op)
        };
        sound(&cfg, 30, 2_000);
    }
}

/// More clusters and index pages than are written as one batch.
#[test]
fn many_index_pages() {
    for op in [Op::Merge, Op::Compact, Op::Drop] {
        let cfg = Config {
            clusters: 300,
            cuts: 1,
            ..Config::usual(op)
        };
        sound(&cfg, 2, 400);
    }
}

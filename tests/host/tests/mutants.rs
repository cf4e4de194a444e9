// SPDX-License-Identifier: GPL-2.0
//! The simulator must fail when a machine of `ploop_pure` breaks an ordering rule: it is built once
//! with `--cfg mutant="chosen"`, and each test chooses one and expects a broken promise.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The `plooptest` in which a mutant can be chosen, built in a directory of its own.
fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mutants");
        let version = Command::new(env!("CARGO")).arg("-vV").output();
        let version = String::from_utf8(version.expect("cargo").stdout).expect("text");
        let host = version.lines().find_map(|l| l.strip_prefix("host: "));
        let host = host.expect("a host");
        // With --target the flag does not reach build scripts and macros.
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--locked"])
            .args(["--bin", "plooptest", "--target", host])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "--cfg mutant=\"chosen\"")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status();
        assert!(status.expect("cargo runs").success());
        target.join(host).join("debug/plooptest")
    })
}

/// Simulates with the mutant.
fn simulate(mutant: &str, seeds: &str) -> std::process::Output {
    Command::new(program())
        .args(["simulate", "--seeds", seeds])
        .env("PLOOP_MUTANT", mutant)
        .output()
        .expect("it was built")
}

#[track_caller]
fn is_noticed(mutant: &str) {
    let output = simulate(mutant, "60");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("BROKEN: seed"),
        "{mutant} was not noticed: {}\n{said}\n{errors}",
        output.status
    );
    println!("{mutant}: {said}");
}

#[test]
fn index_before_data_is_noticed() {
    is_noticed("index_before_data");
}

#[test]
fn publish_before_data_is_noticed() {
    is_noticed("publish_before_data");
}

#[test]
fn ignore_fua_is_noticed() {
    is_noticed("ignore_fua");
}

#[test]
fn skip_flush_is_noticed() {
    is_noticed("skip_flush");
}

#[test]
fn flush_device_only_is_noticed() {
    is_noticed("flush_device_only");
}

#[test]
fn skip_copy_is_noticed() {
    is_noticed("skip_copy");
}

#[test]
fn merge_index_first_is_noticed() {
    is_noticed("merge_index_first");
}

#[test]
fn relocate_index_first_is_noticed() {
    is_noticed("relocate_index_first");
}

#[test]
fn grow_header_first_is_noticed() {
    is_noticed("grow_header_first");
}

#[test]
fn cut_before_index_is_noticed() {
    is_noticed("cut_before_index");
}

#[test]
fn reuse_before_commit_is_noticed() {
    is_noticed("reuse_before_commit");
}

#[test]
fn unmap_over_lower_is_noticed() {
    is_noticed("unmap_over_lower");
}

#[test]
fn snapshot_unfinished_is_noticed() {
    is_noticed("snapshot_unfinished");
}

#[test]
fn drop_before_index_is_noticed() {
    is_noticed("drop_before_index");
}

#[test]
fn fua_of_dirty_entry_is_noticed() {
    is_noticed("fua_of_dirty_entry");
}

#[test]
fn publish_failed_copy_is_noticed() {
    is_noticed("publish_failed_copy");
}

#[test]
fn unmark_unfinished_is_noticed() {
    is_noticed("unmark_unfinished");
}

/// The same command without a mutant finds nothing.
#[test]
fn the_real_machines_pass() {
    let output = simulate("none", "3");
    assert!(output.status.success(), "{output:?}");
}

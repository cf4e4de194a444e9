// SPDX-License-Identifier: GPL-2.0
//! `check --repair`: what it mends, what it keeps, and what qemu-img says afterwards.

#![allow(missing_docs)]

mod common;
use common::{
    disk, entry, get_u32, has_qemu, len, on, put, put_u32, qemu_check, set_len, small, small_disk,
    Scratch, CLOSED_V21, IN_USE, MARK,
};
use std::fs;
use std::path::Path;

const CLUSTER: u64 = 1 << 16;

/// Repairs, and has everybody judge the result.
fn repair(image: &Path, steps: &[&str], want: &[u8]) {
    let run = on(image, &["check", "--repair"]).expect(0);
    for step in steps {
        assert!(run.out.contains(step), "no {step:?} in {}", run.out);
    }
    assert!(run.out.ends_with("Repaired.\n"), "{}", run.out);
    on(image, &["check"]).expect(0);
    let again = on(image, &["check", "--repair", "--json"]).expect(0).json();
    assert_eq!(again["result"], "clean");
    assert_eq!(again["plan"].as_array().unwrap().len(), 0, "{again}");
    assert_eq!(get_u32(image, MARK), 0);
    if has_qemu() {
        qemu_check(image);
        assert!(disk(image) == want, "the disk is not as it should be");
    }
}

#[test]
fn a_mark_is_cleared() {
    let scratch = Scratch::new("repair-mark");
    let image = small(&scratch, "image");
    put_u32(&image, MARK, IN_USE);
    repair(&image, &["clear the in-use mark"], &small_disk());
}

#[test]
fn a_torn_cluster_in_use_is_completed() {
    let scratch = Scratch::new("repair-torn");
    let image = small(&scratch, "image");
    set_len(&image, 5 * CLUSTER - 4096);
    let mut want = small_disk();
    want[(4 * CLUSTER - 4096) as usize..(4 * CLUSTER) as usize].fill(0);
    repair(&image, &["extend the file from 323584 to 327680"], &want);
}

#[test]
fn an_unused_tail_is_cut() {
    let scratch = Scratch::new("repair-tail");
    for extra in [1, CLUSTER, 3 * CLUSTER + 512] {
        let image = small(&scratch, "image");
        set_len(&image, 5 * CLUSTER + extra);
        repair(&image, &["cut the unused end"], &small_disk());
        assert_eq!(len(&image), 5 * CLUSTER);
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn bad_entries_become_holes() {
    let scratch = Scratch::new("repair-zero");
    let image = small(&scratch, "image");
    put_u32(&image, entry(6), 1000);
    put_u32(&image, entry(15), u32::MAX);
    let steps = ["zero 2 BAT entries", "lost"];
    repair(&image, &steps, &small_disk());
}

#[test]
fn a_duplicate_gets_its_own_copy() {
    let scratch = Scratch::new("repair-duplicate");
    let image = small(&scratch, "image");
    put_u32(&image, entry(9), 2);
    put_u32(&image, entry(12), 2);
    // Past the end now, but not once the copies are made.
    put_u32(&image, entry(13), 5);
    let mut want = small_disk();
    for n in [9, 12] {
        want[n << 16..(n + 1) << 16].fill(2);
    }
    repair(&image, &["copy 2 clusters", "cannot be known"], &want);
    assert_eq!(len(&image), 7 * CLUSTER);
}

/// Copies that do not fit do not stay behind; the file-size limit stands in for a full disk.
#[test]
fn copies_that_do_not_fit_are_dropped() {
    let scratch = Scratch::new("repair-full");
    let image = small(&scratch, "image");
    for n in 4..16 {
        put_u32(&image, entry(n), 2);
    }
    let script = "trap '' XFSZ; ulimit -f 640; exec \"$@\"";
    let output = std::process::Command::new("bash")
        .args(["-c", script, "bash", env!("CARGO_BIN_EXE_ploopctl")])
        .args(["check", "--repair"])
        .arg(&image)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(len(&image), 5 * CLUSTER);
    // With room, the same once more.
    let mut want = small_disk();
    want[4 << 16..].fill(2);
    repair(&image, &["copy 12 clusters"], &want);
}

#[test]
fn leaked_clusters_give_back_their_space() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new("repair-leak");
    let image = small(&scratch, "image");
    put_u32(&image, entry(1), 0);
    let answer = on(&image, &["check", "--json"]).expect(0).json();
    assert_eq!(
        (&answer["leaked_clusters"], &answer["used_clusters"]),
        (&1.into(), &3.into())
    );
    let before = fs::metadata(&image).unwrap().blocks();
    let mut want = small_disk();
    want[CLUSTER as usize..2 * CLUSTER as usize].fill(0);
    repair(&image, &["give back the space of 1 clusters"], &want);
    assert!(fs::metadata(&image).unwrap().blocks() < before);
    assert_eq!(len(&image), 5 * CLUSTER);
}

#[test]
fn everything_at_once() {
    let scratch = Scratch::new("repair-all");
    let image = small(&scratch, "image");
    put_u32(&image, MARK, IN_USE);
    put_u32(&image, entry(5), 77);
    put_u32(&image, entry(6), 4);
    put_u32(&image, entry(7), 5);
    set_len(&image, 5 * CLUSTER + 100);
    let mut want = small_disk();
    want[6 << 16..7 << 16].fill(4);
    let answer = on(&image, &["check", "--json"]).expect(41).json();
    assert_eq!(answer["problems"].as_array().unwrap().len(), 5, "{answer}");
    let run = on(&image, &["check", "--repair", "--json"])
        .expect(0)
        .json();
    assert_eq!(run["result"], "repaired");
    on(&image, &["check"]).expect(0);
    if has_qemu() {
        qemu_check(&image);
        assert!(disk(&image) == want);
    }
}

/// Gives an image an extension with one bitmap at the end of the file.
fn extend(image: &Path) {
    let at = len(image);
    let mut cluster = vec![0; CLUSTER as usize];
    cluster[..8].copy_from_slice(&0xAB23_4CEF_23DC_EA87u64.to_le_bytes());
    let mut body = Vec::new();
    body.extend(0x2038_5FAE_252C_B34Au64.to_le_bytes());
    body.extend(0u64.to_le_bytes());
    body.extend((32u32 + 8).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    body.extend((1u64 << 11).to_le_bytes());
    body.extend([0xab; 16]);
    body.extend(128u32.to_le_bytes());
    body.extend(1u32.to_le_bytes());
    body.extend((at / 512 + 128).to_le_bytes());
    cluster[24..24 + body.len()].copy_from_slice(&body);
    let digest = md5::compute(&cluster[24..]).0;
    cluster[8..24].copy_from_slice(&digest);
    put(image, at, &cluster);
    put(image, at + CLUSTER, &vec![0xff; CLUSTER as usize]);
    put(image, 56, &(at / 512).to_le_bytes());
    put_u32(image, MARK, CLOSED_V21);
}

#[test]
fn a_valid_extension_is_kept() {
    let scratch = Scratch::new("repair-extension");
    let image = small(&scratch, "image");
    extend(&image);
    let before = fs::read(&image).unwrap();
    let answer = on(&image, &["check", "--repair", "--json"])
        .expect(0)
        .json();
    assert_eq!(
        (&answer["result"], &answer["extension"]),
        (&"clean".into(), &"valid".into())
    );
    assert_eq!(
        (&answer["leaked_clusters"], &answer["tail_bytes"]),
        (&0.into(), &0.into())
    );
    assert_eq!(fs::read(&image).unwrap(), before);
    let info = on(&image, &["info", "--json"]).expect(0).json();
    assert_eq!(info["bitmaps"][0]["granularity"], 65536);
    assert_eq!(
        info["bitmaps"][0]["id"],
        "abababab-abab-abab-abab-abababababab"
    );
    if has_qemu() {
        // The judge, too, finds it valid: it refuses a bad one when it reads.
        assert!(disk(&image) == small_disk());
    }
    // A tail behind it goes, the extension stays.
    set_len(&image, 7 * CLUSTER + 9);
    on(&image, &["check", "--repair"]).expect(0);
    assert_eq!(fs::read(&image).unwrap(), before);
}

#[test]
fn an_extension_that_does_not_hold_is_dropped() {
    type Damage = fn(&Path);
    let damages: [Damage; 5] = [
        |p| put_u32(p, MARK, 0),
        |p| put_u32(p, MARK, IN_USE),
        |p| put(p, 5 * CLUSTER + 100, b"x"),
        |p| put_u32(p, 56, 1000),
        |p| put_u32(p, entry(10), 6),
    ];
    let scratch = Scratch::new("repair-bad-extension");
    for (n, damage) in damages.into_iter().enumerate() {
        let image = small(&scratch, "image");
        extend(&image);
        damage(&image);
        let answer = on(&image, &["check", "--json"]).expect(41).json();
        assert_eq!(answer["extension"], "invalid", "{n}");
        let mut want = small_disk();
        if n == 4 {
            want[10 << 16..11 << 16].fill(0xff);
        }
        repair(&image, &["drop the format extension"], &want);
        assert_eq!(get_u32(&image, 56), 0);
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_repair_that_changes_data_drops_the_extension() {
    let scratch = Scratch::new("repair-stale-extension");
    let image = small(&scratch, "image");
    extend(&image);
    put_u32(&image, entry(10), 1000);
    repair(
        &image,
        &["zero 1 BAT", "drop the format extension"],
        &small_disk(),
    );
    assert_eq!((get_u32(&image, 56), len(&image)), (0, 5 * CLUSTER));
}

/// A disk shorter than its table, and what the table still holds for the part that is gone.
#[test]
fn entries_past_the_disk_are_zeroed() {
    let scratch = Scratch::new("repair-past-disk");
    let image = small(&scratch, "image");
    // Cluster 0 and a sector of cluster 1.
    put(&image, 36, &129u64.to_le_bytes());
    put_u32(&image, entry(2), 4);
    put_u32(&image, entry(3), 0);
    put_u32(&image, entry(1), 3);
    put_u32(&image, entry(15), 2);
    let answer = on(&image, &["check", "--json"]).expect(41).json();
    let kinds = |n: usize| {
        (
            &answer["problems"][n]["kind"],
            &answer["problems"][n]["cure"],
        )
    };
    let (kind, cure) = ("entry-past-disk".into(), "lossless".into());
    assert_eq!((kinds(0), kinds(1)), ((&kind, &cure), (&kind, &cure)));
    assert_eq!(
        (&answer["used_clusters"], &answer["leaked_clusters"]),
        (&2.into(), &1.into())
    );
    let mut want = small_disk();
    want[CLUSTER as usize..2 * CLUSTER as usize].fill(3);
    want.truncate(129 * 512);
    let steps = ["zero 2 BAT entries of clusters past", "space of 1 clusters"];
    repair(&image, &steps, &want);
    assert_eq!(len(&image), 4 * CLUSTER);
}

/// QEMU leaves the flag on images of others that it writes to.
#[test]
fn the_empty_flag_is_cleared() {
    let scratch = Scratch::new("repair-empty");
    let image = small(&scratch, "image");
    put_u32(&image, 52, 1);
    let answer = on(&image, &["check", "--json"]).expect(0).json();
    assert_eq!(answer["result"], "clean");
    assert_eq!(answer["problems"][0]["kind"], "empty-flag");
    assert_eq!(on(&image, &["info", "--json"]).json()["damaged"], false);
    repair(&image, &["clear the empty flag"], &small_disk());
    assert_eq!(get_u32(&image, 52), 0);
    // On an image with an extension that holds, nothing else changes.
    extend(&image);
    let before = fs::read(&image).unwrap();
    put_u32(&image, 52, 1);
    on(&image, &["check", "--repair"]).expect(0);
    assert_eq!(fs::read(&image).unwrap(), before);
}

/// A BAT of many pages is mended piece by piece.
#[test]
fn a_large_bat_is_mended() {
    let scratch = Scratch::new("repair-large");
    let image = scratch.create("image", &["-s", "1T", "-b", "64K"]);
    let last = (1 << 24) - 1;
    for cluster in [0, 1007, 1008, 300_000, last] {
        put_u32(&image, entry(cluster), u32::MAX);
    }
    let answer = on(&image, &["check", "--json"]).expect(41).json();
    assert_eq!(answer["problems"].as_array().unwrap().len(), 5);
    assert_eq!(answer["problems"][4]["cluster"], last);
    on(&image, &["check", "--repair"]).expect(0);
    on(&image, &["check"]).expect(0);
}

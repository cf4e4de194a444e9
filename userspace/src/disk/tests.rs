// SPDX-License-Identifier: GPL-2.0
//! Every operation, ended after every step: by a kill, after which the device goes on, or by a power
//! cut. The next command must find all data, and leave nothing behind.

mod fake;
mod kept;

use super::outside::Freeze;
use super::*;
use crate::descriptor::guid::Guid;
use crate::descriptor::{edit, NAME};
use fake::{Content, Fake, CLUSTERS};
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, Ordering};

const fn guid(n: u8) -> Guid {
    Guid::from_bytes([n; 16])
}

const A: Guid = guid(0xa);
const B: Guid = guid(0xb);
const C: Guid = guid(0xc);
const PATIENCE: Patience = Patience(std::time::Duration::ZERO);

/// A disk in a directory of its own, its kernel, and what the guest has written.
struct Rig {
    dir: PathBuf,
    path: PathBuf,
    fake: Fake,
    guest: Content,
    /// Files that may be left behind.
    left: Vec<PathBuf>,
}

impl Rig {
    /// With the snapshots A and B below the top, and C beside B if `forked`.
    fn new(forked: bool) -> Self {
        static NR: AtomicU32 = AtomicU32::new(0);
        let nr = NR.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ploopctl-disk-{}-{nr}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let dir = fs::canonicalize(dir).unwrap();
        let path = dir.join(NAME);
        fake::create(&dir.join("root.hds"));
        let text = edit::new_text(fake::SECTORS, 64, false, false, "root.hds");
        store::write(&path, &text).unwrap();
        let mut rig = Self {
            fake: Fake::new(&dir),
            dir,
            path,
            guest: [0; CLUSTERS],
            left: Vec::new(),
        };
        rig.write(0, 1);
        rig.write(1, 2);
        rig.take(A);
        rig.write(1, 3);
        rig.write(2, 4);
        rig.take(B);
        if forked {
            rig.open().switch(&rig.fake, A, false).unwrap();
            rig.guest = rig.view(A);
            rig.write(3, 5);
            rig.take(C);
        }
        rig.write(0, 6);
        rig.write(4, 7);
        rig
    }

    fn open(&self) -> Opened {
        Opened::open(&self.path, &self.fake, Work::Long, PATIENCE).unwrap()
    }

    fn take(&self, uuid: Guid) {
        self.open()
            .snapshot(&self.fake, Some(uuid), Freeze::Yes)
            .unwrap();
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor::parse(&self.path, &store::read(&self.path).unwrap()).unwrap()
    }

    fn files(&self, guid: Guid) -> Vec<PathBuf> {
        let descriptor = self.descriptor();
        let files = descriptor
            .chain(guid)
            .into_iter()
            .map(|i| self.dir.join(&i.file));
        files.collect()
    }

    fn view(&self, guid: Guid) -> Content {
        fake::read(&self.files(guid))
    }

    /// What each delta shows, but for those that are being removed.
    fn views(&self) -> BTreeMap<Guid, Content> {
        let descriptor = self.descriptor();
        let shots = descriptor.disk().shots.iter().filter(|s| !s.is_temporary);
        shots.map(|s| (s.guid, self.view(s.guid))).collect()
    }

    fn attach(&self) {
        self.fake.attach(self.files(self.descriptor().disk().top));
    }

    /// The guest writes: to the device if there is one.
    fn write(&mut self, cluster: usize, value: u8) {
        let top = self
            .fake
            .top()
            .or_else(|| self.files(self.descriptor().disk().top).pop());
        fake::write(&top.unwrap(), cluster, value);
        self.guest[cluster] = value;
    }

    /// The disk is as the descriptor says.
    fn is_tidy(&self) {
        self.has_no_litter();
        let (_, problems) = files::inspect(&self.path, &self.descriptor(), files::Which::All);
        assert!(problems.wrong.is_empty(), "{problems:?}");
        assert!(problems.changed.is_empty(), "{problems:?}");
    }

    /// Nothing is in the directory that the descriptor does not name.
    fn has_no_litter(&self) {
        let descriptor = self.descriptor();
        let mut want: Vec<_> = descriptor
            .disk()
            .images
            .iter()
            .map(|i| i.file.clone())
            .collect();
        want.extend([NAME.to_owned(), format!("{NAME}.lck"), "sys".to_owned()]);
        want.sort();
        let names = fs::read_dir(&self.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name());
        let mut have: Vec<_> = names.map(|n| n.into_string().unwrap()).collect();
        let is_left = |n: &String| self.left.contains(&self.dir.join(n)) && !want.contains(n);
        have.retain(|n| !is_left(n));
        have.sort();
        want.retain(|n| n != "sys" || have.contains(n));
        assert_eq!(have, want);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// What ends a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The device, if there is one, goes on, and the guest writes to it.
    Kill,
    PowerCut,
    /// The guest writes on after the kill, then the power is cut.
    KillThenPowerCut,
}

struct Case {
    forked: bool,
    online: bool,
    operation: fn(&mut Opened, &Fake) -> Result<()>,
    /// What the top shows may be what this shows afterwards.
    rolls_back_to: Option<Guid>,
    /// The file that is replaced stays.
    keeps_old: bool,
    steps_min: usize,
}

fn everywhere(case: &Case) {
    for end in [End::Kill, End::PowerCut, End::KillThenPowerCut] {
        let mut nr = 0;
        while !ends_well(case, end, nr) {
            nr += 1;
        }
        assert!(nr >= case.steps_min, "{nr} steps");
    }
}

/// Ends the operation after `nr` steps and looks what the next command makes of it. Yes if it came
/// to its end before.
fn ends_well(case: &Case, end: End, nr: usize) -> bool {
    let mut rig = Rig::new(case.forked);
    if case.online {
        rig.attach();
    }
    let before = rig.views();
    if case.keeps_old {
        rig.left = rig.files(Guid::TOP);
        rig.left.push(rig.dir.join("spare.hds"));
    }
    rig.fake.stop_after(Some(nr));
    let run = || {
        let mut opened = rig.open();
        (case.operation)(&mut opened, &rig.fake).unwrap();
    };
    let is_over = catch_unwind(AssertUnwindSafe(run)).is_ok();
    let is_unfinished = !is_over && rig.fake.was_unfinished();
    rig.fake.stop_after(None);
    if end != End::PowerCut && case.online {
        rig.write(5, 8);
        rig.write(1, 9);
    }
    if end != End::Kill {
        rig.fake.power_cut();
    }
    let opened = rig.open();
    assert_eq!(opened.mended().len(), usize::from(is_unfinished));
    drop(opened);
    assert!(!intent::Intent::is_there(&rig.path));
    rig.is_tidy();
    let top = rig.descriptor().disk().top;
    for (guid, view) in rig.views() {
        let what = format!("{end:?} after step {nr}: {guid}");
        if guid == top {
            let back = case.rolls_back_to.map(|g| before[&g]);
            assert!(view == rig.guest || Some(view) == back, "{what}: {view:?}");
            assert!(!is_over || back.is_none_or(|b| view == b), "{what}");
        } else if let Some(then) = before.get(&guid) {
            assert_eq!(view, *then, "{what}");
        } else {
            // A snapshot that was made: as the top was.
            assert_eq!(view, before[&Guid::TOP], "{what}");
        }
    }
    if end == End::Kill && case.online {
        assert_eq!(rig.fake.chain(), rig.files(top), "{end:?} after step {nr}");
    }
    // And it works on.
    rig.take(guid(0x77));
    is_over
}

#[test]
fn a_snapshot_of_a_detached_disk() {
    everywhere(&Case {
        forked: true,
        online: false,
        operation: |d, f| d.snapshot(f, None, Freeze::Yes).map(drop),
        rolls_back_to: None,
        keeps_old: false,
        steps_min: 3,
    });
}

#[test]
fn a_snapshot_of_an_attached_disk() {
    everywhere(&Case {
        forked: false,
        online: true,
        operation: |d, f| d.snapshot(f, Some(C), Freeze::Yes).map(drop),
        rolls_back_to: None,
        keeps_old: false,
        steps_min: 4,
    });
}

#[test]
fn going_back() {
    everywhere(&Case {
        forked: true,
        online: false,
        operation: |d, f| d.switch(f, B, false),
        rolls_back_to: Some(B),
        keeps_old: false,
        steps_min: 4,
    });
}

#[test]
fn throwing_the_top_away() {
    everywhere(&Case {
        forked: false,
        online: false,
        operation: |d, f| d.delete(f, Guid::TOP).map(drop),
        rolls_back_to: Some(B),
        keeps_old: false,
        steps_min: 4,
    });
}

#[test]
fn removing_a_leaf_while_attached() {
    everywhere(&Case {
        forked: true,
        online: true,
        operation: |d, f| {
            assert_eq!(d.delete(f, B)?, Removal::Dropped);
            Ok(())
        },
        rolls_back_to: None,
        keeps_old: false,
        steps_min: 4,
    });
}

#[test]
fn merging_a_detached_disk() {
    for uuid in [A, B] {
        everywhere(&Case {
            forked: false,
            online: false,
            operation: if uuid == A {
                |d, f| d.delete(f, A).map(drop)
            } else {
                |d, f| d.merge(f, None)
            },
            rolls_back_to: None,
            keeps_old: false,
            steps_min: 6,
        });
    }
}

#[test]
fn merging_an_attached_disk() {
    for uuid in [A, B] {
        everywhere(&Case {
            forked: false,
            online: true,
            operation: if uuid == A {
                |d, f| d.delete(f, A).map(drop)
            } else {
                |d, f| d.merge(f, None)
            },
            rolls_back_to: None,
            keeps_old: false,
            steps_min: 6,
        });
    }
}

/// A merge goes on when its tool is killed, and may end while the next command looks: the numbers of
/// the levels are others then.
#[test]
fn a_merge_that_goes_on_is_waited_for() {
    let mut nr_tried = 0;
    for nr in 1.. {
        let rig = Rig::new(false);
        rig.attach();
        let (before, text) = (rig.views(), store::read(&rig.path).unwrap());
        rig.fake.stop_after(Some(nr));
        let run = || rig.open().delete(&rig.fake, A).map(drop).unwrap();
        let is_over = catch_unwind(AssertUnwindSafe(run)).is_ok();
        rig.fake.stop_after(None);
        if is_over {
            break;
        }
        // Marked, and not merged yet.
        if store::read(&rig.path).unwrap() == text || rig.fake.chain().len() < 3 {
            continue;
        }
        nr_tried += 1;
        rig.fake.goes_on_merging(1);
        drop(rig.open());
        assert_eq!(rig.fake.chain(), rig.files(Guid::TOP), "after step {nr}");
        assert_eq!(rig.view(B), before[&B], "after step {nr}");
        assert_eq!(rig.view(Guid::TOP), rig.guest, "after step {nr}");
        rig.is_tidy();
    }
    assert!(nr_tried > 0);
}

#[test]
fn merging_all() {
    for online in [false, true] {
        everywhere(&Case {
            forked: false,
            online,
            operation: |d, f| d.merge_all(f),
            rolls_back_to: None,
            keeps_old: false,
            steps_min: 12,
        });
    }
}

#[test]
fn growing() {
    for online in [false, true] {
        everywhere(&Case {
            forked: true,
            online,
            operation: |d, f| {
                let was = d.descriptor().disk().size_sectors;
                assert!(d.grow(f, was - 1).is_err());
                assert!(!d.grow(f, was)?);
                assert!(d.grow(f, was * 4)?);
                assert_eq!(d.descriptor().disk().size_sectors, was * 4);
                Ok(())
            },
            rolls_back_to: None,
            keeps_old: false,
            steps_min: 5,
        });
    }
}

#[test]
fn replacing_an_image() {
    for online in [false, true] {
        everywhere(&Case {
            forked: false,
            online,
            operation: |d, f| replace(d, f, Guid::TOP),
            rolls_back_to: None,
            keeps_old: true,
            steps_min: 2,
        });
        everywhere(&Case {
            forked: false,
            online,
            operation: |d, f| replace(d, f, A),
            rolls_back_to: None,
            keeps_old: true,
            steps_min: 2,
        });
    }
}

/// By a copy that is some seconds old.
fn replace(disk: &mut Opened, fake: &Fake, guid: Guid) -> Result<()> {
    let file = disk.file(disk.descriptor().image(guid))?;
    let spare = file.with_file_name("spare.hds");
    fs::copy(file, &spare).unwrap();
    fake::close(&spare);
    touch(&spare, -9);
    disk.replace(fake, guid, &spare)
}

/// Written to that many seconds from now.
fn touch(path: &Path, seconds: i64) {
    let by = std::time::Duration::from_secs(seconds.unsigned_abs());
    let now = std::time::SystemTime::now();
    let time = if seconds < 0 { now - by } else { now + by };
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn what_the_kernel_refuses_is_undone() {
    let rig = Rig::new(false);
    rig.attach();
    let (before, text) = (rig.views(), store::read(&rig.path).unwrap());
    rig.fake.refuse();
    let mut opened = rig.open();
    assert!(opened.snapshot(&rig.fake, None, Freeze::Yes).is_err());
    assert_eq!(store::read(&rig.path).unwrap(), text);
    // A merge stays marked, and harms nobody.
    let e = opened.delete(&rig.fake, A).unwrap_err();
    assert!(e.to_string().contains("recover"), "{e}");
    drop(opened);
    rig.is_tidy();
    let after = rig.views();
    assert_eq!(after.keys().copied().collect::<Vec<_>>(), [B, Guid::TOP]);
    assert!(after.iter().all(|(g, v)| before[g] == *v));
    rig.fake.allow();
    let mut opened = rig.open();
    assert_eq!(opened.remove_temporary(&rig.fake).unwrap(), [A]);
    drop(opened);
    rig.is_tidy();
    assert_eq!(rig.views(), after);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let rig = Rig::new(true);
    let fake = &rig.fake;
    let text = store::read(&rig.path).unwrap();
    let refuse = |code: Code, words: &str, what: &dyn Fn(&mut Opened) -> Result<()>| {
        let e = what(&mut rig.open()).expect_err(words);
        assert_eq!(e.code(), code, "{e}");
        assert!(e.to_string().contains(words), "{e} lacks {words}");
        assert_eq!(store::read(&rig.path).unwrap(), text);
        rig.is_tidy();
    };
    let nobody = guid(0x99);
    refuse(Code::NoSnapshot, "no snapshot", &|d| {
        d.delete(fake, nobody).map(drop)
    });
    refuse(Code::NoSnapshot, "no snapshot", &|d| {
        d.switch(fake, nobody, false)
    });
    refuse(Code::Param, "is taken", &|d| {
        d.snapshot(fake, Some(A), Freeze::No).map(drop)
    });
    refuse(Code::Param, "is taken", &|d| {
        d.snapshot(fake, Some(Guid::NULL), Freeze::No).map(drop)
    });
    refuse(Code::Param, "is the top", &|d| {
        d.switch(fake, Guid::TOP, false)
    });
    refuse(Code::Param, "is the base", &|d| d.merge(fake, Some(A)));
    refuse(Code::Param, "several deltas build on", &|d| {
        d.merge(fake, Some(B))
    });
    rig.attach();
    refuse(Code::Param, "is attached as /dev/ploop0", &|d| {
        d.switch(fake, B, false)
    });
    refuse(Code::Param, "is attached as /dev/ploop0", &|d| {
        d.delete(fake, Guid::TOP).map(drop)
    });
    fake.attach_read_only(rig.files(C));
    refuse(Code::InUse, "is attached", &|d| d.delete(fake, C).map(drop));
    // Somebody attached it past the descriptor.
    fake.attach(rig.files(B));
    let e = rig.open().snapshot(fake, None, Freeze::Yes).unwrap_err();
    assert!(e.to_string().contains("not the top"), "{e}");
    fake.power_cut();
    let base = rig.dir.join("root.hds");
    fs::rename(&base, rig.dir.join("elsewhere")).unwrap();
    let e = rig
        .open()
        .snapshot(fake, None, Freeze::Yes)
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("root.hds") && e.contains("cannot be found"),
        "{e}"
    );
}

#[test]
fn a_lower_image_that_changed_is_noticed() {
    let rig = Rig::new(false);
    let mut opened = rig.open();
    opened.record_lower().unwrap();
    assert_eq!(opened.members(Guid::TOP, false).unwrap().len(), 3);
    touch(&rig.dir.join("root.hds"), 9);
    let e = opened.members(Guid::TOP, false).unwrap_err();
    assert_eq!(e.code(), Code::Descriptor);
    assert!(
        e.to_string().contains("root.hds was written to") && e.to_string().contains("--force"),
        "{e}"
    );
    assert_eq!(opened.members(Guid::TOP, true).unwrap().len(), 3);
    // A merge would make it part of the disk for good, and forget it.
    for merged in [opened.merge(&rig.fake, None), opened.merge_all(&rig.fake)] {
        assert_eq!(merged.unwrap_err().code(), Code::Descriptor);
    }
    assert!(opened.delete(&rig.fake, A).is_err());
    // Nothing but the word of somebody makes it good.
    opened.record_lower().unwrap();
    assert!(opened.compact(&rig.fake).is_err());
    fake::open(&rig.dir.join("root.hds"));
    assert!(!opened.mend(&rig.fake).unwrap().is_empty());
    assert!(opened.members(Guid::TOP, false).is_err());
    opened.accept(&[A]).unwrap();
    assert!(opened.members(Guid::TOP, false).is_ok());
    // What we change ourselves is no such change.
    let before = opened.member(A).unwrap();
    touch(&before.path, 99);
    opened.changed_by_us(&before).unwrap();
    assert!(opened.members(Guid::TOP, false).is_ok());
    assert!(opened.compact(&rig.fake).is_ok());
    assert!(opened.members(Guid::TOP, false).is_ok());
}

#[test]
fn the_second_waits_and_is_told_who_is_in_the_way() {
    let rig = Rig::new(false);
    let first = rig.open();
    let short = Patience(std::time::Duration::from_millis(300));
    let begin = std::time::Instant::now();
    let Err(e) = Opened::open(&rig.path, &rig.fake, Work::Short, short) else {
        panic!("two at once");
    };
    assert_eq!(e.code(), Code::LockTimeout);
    assert!(begin.elapsed() >= short.0);
    drop(first);
    // One of the newer generation, which locks the base alone.
    let base = rig.dir.join("root.hds");
    let other = BaseLock::take(&rig.path, &base, false, PATIENCE).unwrap();
    let e = Opened::open(&rig.path, &rig.fake, Work::Short, short)
        .map(drop)
        .unwrap_err();
    assert_eq!(e.code(), Code::LockTimeout);
    // A base that several disks have is changed by none of them, and keeps none waiting.
    fs::hard_link(&base, rig.dir.join("other-name")).unwrap();
    drop(Opened::open(&rig.path, &rig.fake, Work::Short, short).unwrap());
    fs::remove_file(rig.dir.join("other-name")).unwrap();
    drop(other);
    // What is no file of the disk is not even opened.
    let device = Path::new("/dev/null");
    let locked = BaseLock::take(&rig.path, device, false, PATIENCE).unwrap();
    assert!(locked.is_nothing());
    let waiting = std::thread::scope(|s| {
        let first = rig.open();
        let second = s.spawn(|| {
            let long = Patience(std::time::Duration::from_secs(20));
            Opened::open(&rig.path, &Fake::new(&rig.dir), Work::Short, long).is_ok()
        });
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(first);
        second.join().unwrap()
    });
    assert!(waiting);
}

#[test]
fn a_descriptor_changed_by_others_meanwhile_is_left_alone() {
    let rig = Rig::new(false);
    rig.fake.stop_after(Some(1));
    let run = || rig.open().snapshot(&rig.fake, None, Freeze::Yes).map(drop);
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    rig.fake.stop_after(None);
    let text = store::read(&rig.path).unwrap() + "<!-- by hand -->\n";
    fs::write(&rig.path, &text).unwrap();
    let e = Opened::open(&rig.path, &rig.fake, Work::Short, PATIENCE)
        .map(drop)
        .unwrap_err();
    assert!(e.to_string().contains("changed by another program"), "{e}");
    assert_eq!(fs::read_to_string(&rig.path).unwrap(), text);
}

/// The same with the real work on files, and a top that is larger than what it is merged into.
#[test]
fn real_files_are_merged_and_grown() {
    let live = Live::default();
    for whole in [false, true] {
        let mut rig = Rig::new(false);
        let larger = fake::SECTORS * 64;
        assert!(rig.open().grow(&live, larger).unwrap());
        rig.write(6, 9);
        let before = rig.views();
        if whole {
            rig.open().merge_all(&live).unwrap();
            assert_eq!(rig.views().len(), 1);
        } else {
            assert_eq!(rig.open().delete(&live, A).unwrap(), Removal::Merged);
            assert_eq!(rig.view(B), before[&B]);
        }
        assert_eq!(rig.view(Guid::TOP), rig.guest);
        assert_eq!(rig.descriptor().disk().size_sectors, larger);
        rig.is_tidy();
    }
}

#[test]
fn a_crashed_disk_is_merged() {
    let rig = Rig::new(false);
    rig.attach();
    rig.fake.power_cut();
    let live = Live::default();
    rig.open().merge_all(&live).unwrap();
    assert_eq!(rig.view(Guid::TOP), rig.guest);
    rig.is_tidy();
}

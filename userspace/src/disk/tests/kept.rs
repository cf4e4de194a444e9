// SPDX-License-Identifier: GPL-2.0
//! What must never be thrown away: data that only one file has, and files of other disks.

use super::*;
use crate::disk::intent::{Intent, Operation};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};

/// Ends `operation` after so many steps.
fn ended(rig: &Rig, nr: usize, operation: impl Fn(&mut Opened) -> Result<()>) {
    rig.fake.stop_after(Some(nr));
    let run = || operation(&mut rig.open()).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    rig.fake.stop_after(None);
}

#[track_caller]
fn refused(rig: &Rig) -> Error {
    let opened = Opened::open(&rig.path, &rig.fake, Work::Long, PATIENCE);
    opened.map(drop).expect_err("opened")
}

/// The lower image was attached alone, by name. That device lacked the upper one, which counted as
/// merged, and it was removed with all that was in it.
#[test]
fn a_merge_past_the_device_of_a_lower_image_is_refused() {
    type Merge = fn(&mut Opened, &Fake) -> Result<()>;
    let merges: [(Guid, Merge); 4] = [
        (A, |d, f| d.delete(f, A).map(drop)),
        (B, |d, f| d.merge(f, None)),
        (A, |d, f| d.merge_all(f)),
        (B, |d, f| d.merge_all(f)),
    ];
    for (lower, merge) in merges {
        let rig = Rig::new(false);
        let (before, text) = (rig.views(), store::read(&rig.path).unwrap());
        rig.fake.attach(rig.files(lower));
        let e = merge(&mut rig.open(), &rig.fake).unwrap_err();
        assert_eq!(e.code(), Code::InUse, "{e}");
        assert_eq!(store::read(&rig.path).unwrap(), text);
        assert_eq!(rig.views(), before);
        rig.has_no_litter();
    }
    // The same while a merge is unfinished.
    for child in [B, Guid::TOP] {
        let rig = Rig::new(false);
        let lower = if child == B { A } else { B };
        ended(&rig, 1, |d| d.merge(&rig.fake, Some(child)));
        rig.fake.attach(rig.files(lower));
        let e = refused(&rig);
        assert_eq!(e.code(), Code::InUse, "{e}");
        assert!(rig.files(child).iter().all(|f| f.exists()));
        assert_eq!(rig.view(Guid::TOP), rig.guest);
        rig.fake.detach();
        assert_eq!(rig.open().mended().len(), 1);
        assert_eq!(rig.view(Guid::TOP), rig.guest);
        rig.has_no_litter();
    }
}

/// The kernel had taken the new top, and it was written to; then the disk was detached, and a lower
/// image attached alone. That device did not have the new top, which was removed.
#[test]
fn a_new_top_with_data_is_never_undone() {
    let mut rig = Rig::new(false);
    rig.attach();
    let below = rig.files(B);
    ended(&rig, 3, |d| {
        d.snapshot(&rig.fake, Some(C), Freeze::No).map(drop)
    });
    rig.write(5, 8);
    rig.fake.detach();
    rig.fake.attach(below);
    assert_eq!(refused(&rig).code(), Code::InUse);
    rig.fake.detach();
    assert_eq!(rig.open().mended().len(), 1);
    assert_eq!(rig.view(Guid::TOP), rig.guest);
    rig.has_no_litter();
}

/// A copy of a disk with absolute names: its leaf is the leaf of the original.
#[test]
fn files_of_other_disks_stay() {
    let (rig, original) = (Rig::new(true), Rig::new(true));
    let text = store::read(&rig.path).unwrap();
    let own = rig.descriptor().image(B).file.clone();
    let foreign = original.files(B).pop().unwrap();
    let named = |name: &str| fs::write(&rig.path, text.replace(&own, name)).unwrap();
    let refused_leaf = |name: &str, file: &Path| {
        named(name);
        let e = rig.open().delete(&rig.fake, B).unwrap_err();
        assert_eq!(e.code(), Code::Descriptor, "{e}");
        assert!(file.exists() && !Intent::is_there(&rig.path));
    };
    refused_leaf(foreign.to_str().unwrap(), &foreign);
    let up = format!(
        "../{}/root.hds",
        original.dir.file_name().unwrap().to_str().unwrap()
    );
    refused_leaf(&up, &original.dir.join("root.hds"));
    // Nor the base, under another name.
    refused_leaf("./root.hds", &rig.dir.join("root.hds"));
    // An intent is believed no more than a descriptor.
    named(&own);
    for old in [foreign.to_str().unwrap(), &up, "./root.hds"] {
        let operation = Operation::Delete {
            uuid: B,
            old: old.to_owned(),
        };
        Intent::new(operation, String::new(), text.clone())
            .store(&rig.path)
            .unwrap();
        assert_eq!(refused(&rig).code(), Code::Descriptor);
    }
    // Nor of a merge: nothing is moved into what is not of the disk.
    let top = rig.files(Guid::TOP).pop().unwrap();
    let top = top.file_name().unwrap().to_str().unwrap().to_owned();
    let before = fs::read(&foreign).unwrap();
    for lower in [foreign.to_str().unwrap(), &up, "./root.hds"] {
        let operation = Operation::Merge {
            uuid: A,
            child: Guid::TOP,
            lower: lower.to_owned(),
            upper: top.clone(),
            marked: text.clone(),
        };
        Intent::new(operation, String::new(), String::new())
            .store(&rig.path)
            .unwrap();
        assert_eq!(refused(&rig).code(), Code::Descriptor);
    }
    assert_eq!(fs::read(&foreign).unwrap(), before);
    Intent::remove(&rig.path).unwrap();
    assert!(foreign.exists());
    original.is_tidy();
    // One that is lost already does not keep its delta.
    fs::remove_file(rig.dir.join(&own)).unwrap();
    assert_eq!(rig.open().delete(&rig.fake, B).unwrap(), Removal::Dropped);
    rig.is_tidy();
}

/// The tool was killed after the kernel had taken the new top. What told the two apart was the mark,
/// which is gone when the device was detached cleanly.
#[test]
fn a_replacement_that_was_made_is_not_undone() {
    let killed = || {
        let mut rig = Rig::new(false);
        rig.attach();
        rig.left = rig.files(Guid::TOP);
        rig.left.push(rig.dir.join("spare.hds"));
        ended(&rig, 1, |d| replace(d, &rig.fake, Guid::TOP));
        rig.write(5, 8);
        rig
    };
    let rig = killed();
    rig.fake.detach();
    assert_eq!(rig.open().mended().len(), 1);
    assert_eq!(rig.view(Guid::TOP), rig.guest);
    rig.is_tidy();

    // The old one could not be closed: both are marked.
    let rig = killed();
    let old = rig.files(Guid::TOP).pop().unwrap();
    fake::open(&old);
    rig.fake.power_cut();
    let text = store::read(&rig.path).unwrap();
    let said = refused(&rig).to_string();
    let name = old.file_name().unwrap().to_str().unwrap();
    assert!(said.contains("spare.hds") && said.contains(name), "{said}");
    // Looking at them is no answer.
    rig.fake.attach_read_only(vec![old]);
    assert_eq!(refused(&rig).code(), Code::Descriptor);
    rig.fake.power_cut();
    assert_eq!(store::read(&rig.path).unwrap(), text);
    let intent = Intent::load(&rig.path).unwrap().unwrap();
    store::write(&rig.path, &intent.after).unwrap();
    assert_eq!(rig.open().mended().len(), 1);
    assert_eq!(rig.view(Guid::TOP), rig.guest);
}

/// A raw image has no mark.
#[test]
fn a_raw_image_that_was_replaced_is_not_guessed() {
    let rig = Rig::new(false);
    let text = edit::new_text(fake::SECTORS, 64, true, false, "raw");
    let descriptor = Descriptor::parse(&rig.path, &text).unwrap();
    let new = rig.dir.join("new");
    for path in [rig.dir.join("raw"), new.clone()] {
        fs::write(&path, [1; (fake::SECTORS * 512) as usize]).unwrap();
    }
    touch(&new, -9);
    let after = descriptor
        .changed(&rig.path, |e| e.set_file(Guid::TOP, "new"))
        .unwrap();
    let asked = Member::read(&new, Guid::TOP, true).unwrap().record;
    let operation = |asked| Operation::Replace {
        uuid: Guid::TOP,
        old: "raw".into(),
        new: "new".into(),
        asked,
    };
    let intent = |asked| Intent::new(operation(asked), text.clone(), after.text());
    store::write(&rig.path, &text).unwrap();
    intent(Some(asked)).store(&rig.path).unwrap();
    assert!(refused(&rig).to_string().contains("which of the two"));
    // The kernel was not asked yet.
    intent(None).store(&rig.path).unwrap();
    assert_eq!(rig.open().descriptor().top().file, "raw");
    intent(Some(asked)).store(&rig.path).unwrap();
    touch(&new, 0);
    assert_eq!(rig.open().descriptor().top().file, "new");
}

#[test]
fn what_a_virtual_machine_has_is_not_removed() {
    let rig = Rig::new(true);
    let held = |path: &Path, usage: Use, what: &dyn Fn(&mut Opened) -> Result<()>| {
        let image = Image::open(path, Access::Read).unwrap();
        let lock = ImageLock::take(image.file(), path, usage).unwrap();
        let e = what(&mut rig.open()).unwrap_err();
        assert_eq!(e.code(), Code::InUse, "{e}");
        assert!(path.exists() && !Intent::is_there(&rig.path));
        drop(lock);
    };
    let leaf = rig.files(B).pop().unwrap();
    held(&leaf, Use::Read, &|d| d.delete(&rig.fake, B).map(drop));
    let top = rig.files(Guid::TOP);
    for path in &top[1..] {
        held(path, Use::Read, &|d| {
            d.delete(&rig.fake, Guid::TOP).map(drop)
        });
    }
    let spare = rig.dir.join("spare.hds");
    fs::copy(&top[2], &spare).unwrap();
    held(&spare, Use::Write, &|d| {
        d.replace(&rig.fake, Guid::TOP, &spare)
    });
    fs::remove_file(spare).unwrap();
    rig.open().delete(&rig.fake, Guid::TOP).unwrap();
    rig.open().delete(&rig.fake, B).unwrap();
    rig.is_tidy();
}

/// The intent was removed after any error, also one behind the point of no return: the upper file
/// was left for good.
#[test]
fn a_merge_that_cannot_remove_its_file_stays_unfinished() {
    let rig = Rig::new(false);
    let upper = rig.files(Guid::TOP);
    rig.fake.meanwhile("stored", upper.clone());
    let e = rig.open().merge(&rig.fake, None).unwrap_err();
    assert!(e.to_string().contains("is merged"), "{e}");
    assert!(Intent::is_there(&rig.path));
    assert_eq!(rig.view(Guid::TOP), rig.guest);
    rig.fake.power_cut();
    assert_eq!(rig.open().mended().len(), 1);
    assert!(!upper[2].exists());
    rig.is_tidy();
}

/// A descriptor of the greatest length made an intent that was refused for its own.
#[test]
fn an_intent_may_hold_the_longest_descriptors() {
    let rig = Rig::new(false);
    let long = "\t\"\n".repeat((4 << 20) / 3);
    let operation = Operation::Merge {
        uuid: A,
        child: B,
        lower: "a".into(),
        upper: "b".into(),
        marked: long.clone(),
    };
    let intent = Intent::new(operation, long.clone(), long);
    intent.store(&rig.path).unwrap();
    assert_eq!(Intent::load(&rig.path).unwrap(), Some(intent));
}

/// Growing it made a disk that could not be attached any more.
#[test]
fn a_snapshot_that_ends_inside_a_cluster_is_not_outgrown() {
    let rig = Rig::new(false);
    let live = Live::default();
    let odd = fake::SECTORS + 1;
    assert!(rig.open().grow(&live, odd).unwrap());
    rig.take(C);
    let text = store::read(&rig.path).unwrap();
    let e = rig.open().grow(&live, odd + 63).unwrap_err();
    assert_eq!(e.code(), Code::Param, "{e}");
    assert!(
        e.to_string().contains("multiple of the cluster size"),
        "{e}"
    );
    assert_eq!(store::read(&rig.path).unwrap(), text);
    rig.is_tidy();
    rig.open().merge_all(&live).unwrap();
    assert!(rig.open().grow(&live, odd + 63).unwrap());
    assert_eq!(rig.view(Guid::TOP), rig.guest);
    rig.is_tidy();
}

// SPDX-License-Identifier: GPL-2.0
//! Descriptors that are good, bad and changed.

use super::*;
use proptest::prelude::*;

fn guid(n: u8) -> Guid {
    Guid::from_bytes([n; 16])
}

fn image(guid: Guid, kind: &str, file: &str) -> String {
    format!("<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>\n")
}

fn shot(guid: Guid, parent: Guid) -> String {
    format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>\n")
}

fn text(root: &str, images: &str, shots: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?>\n<{root}>\n<Disk_Parameters><Disk_size>4096</Disk_size></Disk_Parameters>\n\
         <StorageData><Storage><Start>0</Start><End>4096</End><Blocksize>128</Blocksize>\n{images}\
         </Storage></StorageData>\n<Snapshots><TopGUID>{}</TopGUID>\n{shots}</Snapshots>\n\
         <Unknown a='b'><!-- kept --></Unknown></{root}>\n",
        Guid::TOP
    )
}

/// A chain of two with a second branch on the base.
fn tree() -> (String, String) {
    let images = image(guid(1), "Compressed", "root.hds")
        + &image(guid(2), "Compressed", "root.hds.2")
        + &image(Guid::TOP, "Compressed", "root.hds.3");
    let shots = shot(guid(1), Guid::NULL) + &shot(guid(2), guid(1)) + &shot(Guid::TOP, guid(1));
    (images, shots)
}

fn parse(text: &str) -> Result<Descriptor> {
    Descriptor::parse(Path::new("DiskDescriptor.xml"), text)
}

#[test]
fn both_names_are_read_and_kept() {
    let (images, shots) = tree();
    for root in model::ROOTS {
        let text = text(root, &images, &shots);
        let descriptor = parse(&text).unwrap();
        assert_eq!(descriptor.text(), text);
        let files: Vec<_> = descriptor
            .chain(Guid::TOP)
            .iter()
            .map(|i| i.file.as_str())
            .collect();
        assert_eq!(files, ["root.hds", "root.hds.3"]);
        let changed = descriptor
            .changed(Path::new("x"), |e| {
                e.rename(Guid::TOP, guid(3));
                e.add(Guid::TOP, guid(3), false, "root.hds.4");
                e.set_top(Guid::TOP);
            })
            .unwrap();
        assert!(changed
            .text()
            .contains("<Unknown a='b'><!-- kept --></Unknown>"));
        assert!(changed.text().contains(root));
        assert_eq!(
            changed.disk().chain(Guid::TOP).unwrap(),
            [guid(1), guid(3), Guid::TOP]
        );
        let back = changed
            .changed(Path::new("x"), |e| {
                e.remove(Guid::TOP);
                e.rename(guid(3), Guid::TOP);
                e.set_top(Guid::TOP);
            })
            .unwrap();
        assert_eq!(back.text(), text);
    }
}

#[test]
fn every_contradiction_is_named() {
    let (images, shots) = tree();
    let good = text("Parallels_disk_image", &images, &shots);
    let refuse = |text: &str, words: &str| {
        parse(text).expect_err(words);
        let said = problems(text);
        assert!(
            said.iter().any(|s| s.contains(words)),
            "{said:?} lacks {words:?}"
        );
    };
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    let g = |n| guid(n).to_string();
    refuse(
        &good.replace("Parallels_disk_image", "html"),
        "the root element is <html>",
    );
    refuse(
        &with("<Disk_size>4096", "<Disk_size>x"),
        "'x', not a number",
    );
    refuse(
        &with("<End>4096", "<End>8192"),
        "to 8192, but the disk has 4096",
    );
    refuse(
        &with("<Blocksize>128", "<Blocksize>100"),
        "a cluster (<Blocksize>) of 100 sectors",
    );
    refuse(
        &with("<Blocksize>128", "<Blocksize>32"),
        "power of two from 64",
    );
    refuse(&with("<Type>Compressed", "<Type>qcow2"), "'qcow2'");
    refuse(
        &with("<File>root.hds.2", "<File>root.hds"),
        "both in the file root.hds",
    );
    refuse(&with("<File>root.hds.2", "<File>"), "has no file");
    refuse(
        &with(&image(guid(2), "Compressed", "root.hds.2"), ""),
        "has no image",
    );
    refuse(&with(&shot(guid(2), guid(1)), ""), "has no <Shot>");
    refuse(
        &with(&shot(guid(2), guid(1)), &shot(guid(1), guid(1))),
        "two <Shot>",
    );
    refuse(
        &with(&shot(guid(2), guid(1)), &shot(guid(2), Guid::NULL)),
        "several bases",
    );
    refuse(
        &with(&shot(guid(2), guid(1)), &shot(guid(2), guid(7))),
        "does not exist",
    );
    refuse(
        &with(&shot(guid(2), guid(1)), &shot(guid(2), guid(2))),
        "circle",
    );
    refuse(
        &with(&shot(guid(1), Guid::NULL), &shot(guid(1), guid(2))),
        "no delta is the base",
    );
    refuse(
        &with(&shot(guid(2), guid(1)), &shot(guid(2), Guid::TOP)),
        "builds on the top",
    );
    refuse(
        &with(
            &format!("<TopGUID>{}", Guid::TOP),
            &format!("<TopGUID>{}", g(9)),
        ),
        "does not exist",
    );
    refuse(
        &with(&format!("<ParentGUID>{}", g(1)), "<ParentGUID>x"),
        "is not a UUID",
    );
    refuse(&with("</Storage>", "</Storage><Storage/>"), "split");
    refuse(
        &with(
            "<StorageData>",
            "<StorageData><Volume><Parent>/x</Parent></Volume>",
        ),
        "builds on another disk",
    );
    let mark = shot(guid(2), guid(1)).replace("</Shot>", "<TemporaryZero/></Shot>");
    refuse(&with(&shot(guid(2), guid(1)), &mark), "half done");
    let mark = shot(Guid::TOP, guid(1)).replace("</Shot>", "<Temporary/></Shot>");
    refuse(
        &with(&shot(Guid::TOP, guid(1)), &mark),
        "marked as temporary",
    );
    let plain = with("<Type>Compressed", "<Type>Plain")
        .replace("<Start>", "<Preallocated>1</Preallocated><Start>");
    refuse(&plain, "preallocated and raw");
    refuse(&good[..good.len() / 2], "");
}

#[test]
fn a_disk_of_one_image_needs_no_list() {
    let all = text(
        "Parallels_disk_image",
        &image(guid(4), "Plain", "root.hds"),
        "",
    );
    let from = all.find("<Snapshots>").unwrap();
    let to = all.find("<Unknown").unwrap();
    let short = format!("{}{}", &all[..from], &all[to..]);
    let descriptor = parse(&short).unwrap();
    assert_eq!(descriptor.disk().top, guid(4));
    assert!(descriptor.disk().is_raw);
    let changed = descriptor
        .changed(Path::new("x"), |e| e.add(Guid::TOP, guid(4), true, "b"))
        .and_then(|d| d.changed(Path::new("x"), |e| e.set_top(Guid::TOP)));
    // The first of the two changes makes a top that something builds on.
    assert!(changed.is_err());
}

#[test]
fn a_new_disk_is_sound() {
    for is_raw in [false, true] {
        let text = edit::new_text(8192, 2048, is_raw, true, "root & co.hds");
        let descriptor = parse(&text).unwrap();
        assert_eq!(descriptor.top().file, "root & co.hds");
        assert_eq!(descriptor.disk().is_raw, is_raw);
        assert_eq!(descriptor.text(), text);
    }
}

#[test]
fn a_record_is_written_and_read() {
    let text = edit::new_text(8192, 2048, false, false, "root.hds");
    let record = model::Record {
        len_bytes: 7,
        ino: 8,
        mtime_ns: -9,
    };
    let descriptor = parse(&text).unwrap();
    let with = descriptor
        .changed(Path::new("x"), |e| e.set_record(Guid::TOP, Some(record)))
        .unwrap();
    assert_eq!(with.top().record, Some(record));
    let without = with
        .changed(Path::new("x"), |e| e.set_record(Guid::TOP, None))
        .unwrap();
    assert_eq!(without.text(), text);
}

proptest! {
    /// Anything at all is read or refused, and what is read is written as it was.
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        if let Ok(document) = Document::parse(&text) {
            prop_assert_eq!(document.text(), text);
        }
    }

    /// The same for what looks like a descriptor.
    #[test]
    fn a_changed_descriptor_is_read_or_refused(at in 0usize..1000, with in "[<>/a-z\"& ]{0,3}") {
        let (images, shots) = tree();
        let mut text = text("Parallels_disk_image", &images, &shots);
        let at = at % text.len();
        text.replace_range(at..at + 1, &with);
        if let Ok(descriptor) = parse(&text) {
            prop_assert_eq!(descriptor.text(), text);
        }
    }

    /// Random trees: snapshots and switches keep it sound, and removing them in any order leads
    /// back.
    #[test]
    fn random_changes_stay_sound(steps in proptest::collection::vec(any::<u8>(), 1..40)) {
        let mut d = parse(&edit::new_text(8192, 2048, false, false, "root.hds")).unwrap();
        for (n, step) in (1u8..).zip(steps) {
            let before = d.disk().clone();
            d = if step % 2 == 0 {
                d.changed(Path::new("x"), |e| {
                    e.rename(before.top, guid(n));
                    e.add(Guid::TOP, guid(n), false, &format!("root.hds.{n}"));
                    e.set_top(Guid::TOP);
                }).unwrap()
            } else {
                let on = before.shots[usize::from(step) % before.shots.len()].guid;
                if on == before.top {
                    continue;
                }
                d.changed(Path::new("x"), |e| {
                    e.remove(before.top);
                    e.add(Guid::TOP, on, false, &format!("root.hds.{n}"));
                }).unwrap()
            };
            prop_assert_eq!(parse(&d.text()).unwrap(), d.clone());
            prop_assert_eq!(d.disk().images.len(), d.disk().shots.len());
        }
    }
}

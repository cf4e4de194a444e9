// SPDX-License-Identifier: GPL-2.0
//! sysfs as the module shows it, rebuilt in a directory.

use super::*;

struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ploopctl-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn device(&self, index: u32, running: bool, top: u32) {
        let dir = format!("block/ploop{index}");
        for (name, value) in [
            ("size", "2048"),
            ("ro", "0"),
            ("pstate/running", if running { "1" } else { "0" }),
            ("pstate/top", &top.to_string()),
            ("pstate/block_size", "2048"),
            ("pstate/fmt_version", "2"),
            ("pstate/cookie", "a name"),
            ("pstate/open_count", "3"),
            ("pstate/aborted", "0"),
        ] {
            self.write(&format!("{dir}/{name}"), &format!("{value}\n"));
        }
    }

    fn delta(&self, index: u32, image: &Path, info: &str) {
        let dir = format!("block/ploop{index}/pdelta/0");
        let image = format!("{}\n", image.display());
        for (name, value) in [
            ("image", image.as_str()),
            ("image_info", info),
            ("format", "ploop1\n"),
            ("io", "direct\n"),
            ("ro", "0\n"),
        ] {
            self.write(&format!("{dir}/{name}"), value);
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn info(path: &Path) -> String {
    let m = fs::metadata(path).unwrap();
    let (major, minor) = (
        nix::sys::stat::major(m.dev()),
        nix::sys::stat::minor(m.dev()),
    );
    format!("ino:{}\nsdev:{major}:{minor}\n", m.ino())
}

#[test]
fn devices_are_read_and_images_found() {
    let tree = Tree::new("sysfs");
    let image = tree.0.join("image");
    fs::write(&image, "").unwrap();
    tree.device(10, true, 0);
    // Found by inode whatever the name.
    tree.delta(10, Path::new("/elsewhere"), &info(&image));
    tree.device(2, false, NO_TOP);
    tree.write("block/sda/size", "1\n");
    let sysfs = Sysfs::at(&tree.0);
    let devices = sysfs.devices().unwrap();
    let got: Vec<_> = devices.iter().map(|d| (d.index, d.state())).collect();
    assert_eq!(got, [(2, "empty"), (10, "running")]);
    let found = sysfs.find_image(&image).unwrap();
    let [d] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!((d.index, d.size, d.cluster_size), (10, 1 << 20, 1 << 20));
    assert_eq!((d.cookie.as_str(), d.open_count), ("a name", 3));
    assert_eq!(sysfs.find_image(&tree.0).unwrap(), []);
    // Of those that have another image not much is read; what 2 has cannot be told.
    tree.device(11, true, 0);
    tree.delta(11, Path::new("/other"), "ino:1\nsdev:1:2\n");
    let near = |paths: &[&Path]| -> Vec<u32> {
        let devices = sysfs.devices_of(paths).unwrap();
        devices.iter().map(|d| d.index).collect()
    };
    assert_eq!(near(&[&image]), [2, 10]);
    // Of what is not there, or a block device, it cannot be told.
    assert_eq!(near(&[&image, Path::new("/nowhere")]), [2, 10, 11]);
    assert!(sysfs.is_running(11) && !sysfs.is_running(2) && !sysfs.is_running(5));
    assert_eq!(sysfs.device(77).unwrap(), None);
}

#[test]
fn counters_are_read() {
    let tree = Tree::new("sysfs-counters");
    tree.device(1, true, 0);
    let stat = "  1 2 3 4  5 6 7 8  9 10 11  12 13 14 15  16 17\n";
    tree.write("block/ploop1/stat", stat);
    tree.write("block/ploop1/pstate/map_pages", "3\n");
    tree.write("block/ploop1/pstate/commits", "7\n");
    let sysfs = Sysfs::at(&tree.0);
    let (counters, gauges) = sysfs.counters(1).unwrap();
    let want = Counters {
        reads: 1,
        read_bytes: 3 * 512,
        read_ms: 4,
        writes: 5,
        write_bytes: 7 * 512,
        write_ms: 8,
        busy_ms: 10,
        discards: 12,
        discard_bytes: 14 * 512,
        discard_ms: 15,
        flushes: 16,
        flush_ms: 17,
        commits: 7,
        ..Counters::default()
    };
    assert_eq!(counters, want);
    assert_eq!((gauges.in_flight, gauges.map_bytes), (9, 3 * 4096));
    tree.write("block/ploop1/stat", "1 2 x\n");
    assert!(sysfs.counters(1).is_err());
    assert!(sysfs.counters(2).is_err());
}

#[test]
fn an_image_is_found_where_device_numbers_differ_or_the_file_is_gone() {
    let tree = Tree::new("sysfs-names");
    let image = fs::canonicalize(&tree.0).unwrap().join("image");
    fs::write(&image, "").unwrap();
    tree.device(1, true, 0);
    let ino = fs::metadata(&image).unwrap().ino();
    tree.delta(1, &image, &format!("ino:{ino}\nsdev:0:99\n"));
    let sysfs = Sysfs::at(&tree.0);
    assert_eq!(sysfs.find_image(&image).unwrap().len(), 1);
    fs::remove_file(&image).unwrap();
    assert_eq!(sysfs.find_image(&image).unwrap().len(), 1);
    let gone = format!("{} (deleted)", image.display());
    tree.delta(1, Path::new(&gone), "ino:1\nsdev:0:99\n");
    assert_eq!(sysfs.find_image(&image).unwrap().len(), 1);
}

/// Names are bytes: one that is no UTF-8 must not hide the device, nor all others.
#[test]
fn names_may_be_any_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let tree = Tree::new("sysfs-bytes");
    tree.device(3, true, 0);
    tree.delta(3, Path::new("/x"), "ino:1\nsdev:0:99\n");
    let dir = tree.0.join("block/ploop3");
    fs::write(dir.join("pdelta/0/image"), b"/a\xff\n").unwrap();
    fs::write(dir.join("pstate/cookie"), b"c\xff\n").unwrap();
    let devices = Sysfs::at(&tree.0).devices().unwrap();
    let image = &devices[0].top().unwrap().image;
    assert_eq!(image.as_os_str().as_bytes(), b"/a\xff");
    assert_eq!(devices[0].cookie, "c\u{fffd}");
    let json = serde_json::to_value(&devices[0]).unwrap();
    assert_eq!(json["deltas"][0]["image"], "/a\u{fffd}");
}

/// The kernel shows bytes that are no UTF-8 as `\xNN`: such images were said to have been removed.
#[test]
fn a_path_is_what_the_kernel_shows_of_it() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let tree = Tree::new("sysfs-escaped");
    let image = tree.0.join(OsStr::from_bytes(b"gr\xfc\xdfe"));
    let itself = tree.0.join(r"a\xfcb");
    tree.device(1, true, 0);
    let shown = tree.0.join(r"gr\xfc\xdfe");
    for (image, shown) in [(&image, &shown), (&itself, &itself)] {
        fs::write(image, "").unwrap();
        tree.delta(1, shown, &info(image));
        let device = Sysfs::at(&tree.0).device(1).unwrap().unwrap();
        assert_eq!(device.top().unwrap().reachable().unwrap(), image);
        assert!(device.delta_of(image).is_some());
    }
    // What leads nowhere is shown as the kernel does.
    fs::remove_file(&image).unwrap();
    tree.delta(1, &shown, "ino:1\nsdev:0:99\n");
    let device = Sysfs::at(&tree.0).device(1).unwrap().unwrap();
    assert_eq!(device.top().unwrap().image, shown);
}

#[test]
fn another_file_of_the_name_is_not_the_image() {
    let tree = Tree::new("sysfs-replaced");
    let image = tree.0.join("image");
    fs::write(&image, "").unwrap();
    tree.device(1, true, 0);
    tree.delta(1, &image, &info(&image));
    let device = || Sysfs::at(&tree.0).device(1).unwrap().unwrap();
    assert_eq!(device().top().unwrap().reachable().unwrap(), image);
    tree.delta(1, &image, "ino:1\nsdev:0:99\n");
    let e = device().top().unwrap().reachable().unwrap_err();
    assert_eq!(e.code(), Code::Open);
}

#[test]
fn nonsense_is_an_error_that_names_the_place() {
    let tree = Tree::new("sysfs-bad");
    tree.device(1, true, 0);
    tree.delta(1, Path::new("/x"), "what?\n");
    let e = Sysfs::at(&tree.0).devices().unwrap_err();
    assert_eq!(e.code(), Code::Sysfs);
    assert!(e.to_string().contains("what?"), "{e}");
}

#[test]
fn holders_of_partitions_count() {
    let tree = Tree::new("sysfs-holders");
    tree.device(1, true, NO_TOP);
    tree.write("block/ploop1/ploop1p2/holders/dm-0", "");
    tree.write("block/ploop1/holders/md5", "");
    let mut holders = Sysfs::at(&tree.0).holders(1);
    holders.sort();
    assert_eq!(holders, ["dm-0", "md5"]);
}

// SPDX-License-Identifier: GPL-2.0
//! A kernel that is a list of files, and images of a few clusters that hold one byte each, again and
//! again.

use crate::descriptor::store;
use crate::disk::outside::{Base, Freeze, NewDelta, Outside};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use crate::image::{Access, Image};
use crate::sysfs::{Device, Sysfs};
use ploop_pure::layout::ploop1::{Header, Version, HEADER_BYTES};
use ploop_pure::units::{ClusterSize, ImageCluster};
use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// Clusters of the disk.
pub const CLUSTERS: usize = 8;
/// Its size.
pub const SECTORS: u64 = 64 * CLUSTERS as u64;

/// What a disk shows, a byte for each cluster.
pub type Content = [u8; CLUSTERS];

pub struct Fake {
    dir: PathBuf,
    chain: RefCell<Vec<PathBuf>>,
    is_read_only: Cell<bool>,
    is_refusing: Cell<bool>,
    stop_after: Cell<Option<usize>>,
    nr_steps: Cell<usize>,
    has_ended: Cell<bool>,
    /// What is attached read-only behind the tool's back, after the step of this name.
    meanwhile: RefCell<Option<(&'static str, Vec<PathBuf>)>>,
    /// The level that is being merged without a tool.
    merging: Cell<Option<u32>>,
}

/// An empty image.
pub fn create(path: &Path) {
    let cluster = ClusterSize::from_sectors(64).unwrap();
    let header = Header::new(Version::V2, cluster, SECTORS).unwrap();
    create::ploop1(path, header, Space::Thin).unwrap();
}

fn header(path: &Path) -> (Image, Header) {
    let image = Image::open(path, Access::Write).unwrap();
    let header = image.good_header().unwrap().0;
    (image, header)
}

fn entry(image: &Image, header: &Header, cluster: usize) -> Option<ImageCluster> {
    let mut bytes = [0; 4];
    let at = HEADER_BYTES as u64 + cluster as u64 * 4;
    image.file().read_exact_at(&mut bytes, at).unwrap();
    header.decode_entry(u32::from_le_bytes(bytes)).unwrap()
}

fn set_entry(image: &Image, cluster: usize, value: u32) {
    let at = HEADER_BYTES as u64 + cluster as u64 * 4;
    image.file().write_all_at(&value.to_le_bytes(), at).unwrap();
}

/// Writes a cluster, in place or to a new slot.
pub fn write(path: &Path, cluster: usize, value: u8) {
    let (image, header) = header(path);
    let bytes = header.cluster.bytes();
    let slot = entry(&image, &header, cluster).unwrap_or_else(|| {
        let end = image.len_bytes().unwrap().div_ceil(bytes);
        let slot = ImageCluster(u32::try_from(end).unwrap().max(header.first_data.0));
        image
            .file()
            .set_len((u64::from(slot.0) + 1) * bytes)
            .unwrap();
        set_entry(&image, cluster, header.encode_entry(slot));
        slot
    });
    let data = vec![value; bytes as usize];
    image
        .file()
        .write_all_at(&data, header.cluster.offset(slot))
        .unwrap();
    // As the kernel leaves it.
    let plain = header.not_empty();
    image
        .file()
        .write_all_at(plain.encode().as_bytes(), 0)
        .unwrap();
}

/// What a chain shows.
pub fn read(chain: &[PathBuf]) -> Content {
    let mut content = [0; CLUSTERS];
    for path in chain {
        let (image, header) = header(path);
        for (cluster, shown) in content.iter_mut().enumerate() {
            if let Some(slot) = entry(&image, &header, cluster) {
                let mut byte = [0];
                let at = header.cluster.offset(slot);
                image.file().read_exact_at(&mut byte, at).unwrap();
                *shown = byte[0];
            }
        }
    }
    content
}

/// Sets the mark.
pub fn open(path: &Path) {
    let (image, header) = header(path);
    image
        .file()
        .write_all_at(header.opened().encode().as_bytes(), 0)
        .unwrap();
}

/// Clears the mark.
pub fn close(path: &Path) {
    let (image, header) = header(path);
    image
        .file()
        .write_all_at(header.closed(false).encode().as_bytes(), 0)
        .unwrap();
}

impl Fake {
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            chain: RefCell::default(),
            is_read_only: Cell::new(false),
            is_refusing: Cell::new(false),
            stop_after: Cell::new(None),
            nr_steps: Cell::new(0),
            has_ended: Cell::new(false),
            meanwhile: RefCell::default(),
            merging: Cell::new(None),
        }
    }

    /// The merge of `level` goes on without its tool, and ends when the next is asked for or waited for.
    pub fn goes_on_merging(&self, level: u32) {
        self.merging.set(Some(level));
    }

    pub fn meanwhile(&self, step: &'static str, chain: Vec<PathBuf>) {
        *self.meanwhile.borrow_mut() = Some((step, chain));
    }

    /// Cleanly, by something else than the disk's own tool.
    pub fn detach(&self) {
        close(&self.top().unwrap());
        self.chain.borrow_mut().clear();
    }

    pub fn attach(&self, chain: Vec<PathBuf>) {
        self.is_read_only.set(false);
        open(chain.last().unwrap());
        *self.chain.borrow_mut() = chain;
    }

    pub fn attach_read_only(&self, chain: Vec<PathBuf>) {
        self.is_read_only.set(true);
        *self.chain.borrow_mut() = chain;
    }

    pub fn chain(&self) -> Vec<PathBuf> {
        self.chain.borrow().clone()
    }

    pub fn top(&self) -> Option<PathBuf> {
        self.chain.borrow().last().cloned()
    }

    pub fn power_cut(&self) {
        self.chain.borrow_mut().clear();
    }

    pub fn refuse(&self) {
        self.is_refusing.set(true);
    }

    pub fn allow(&self) {
        self.is_refusing.set(false);
    }

    /// Ends the tool after so many steps from now.
    pub fn stop_after(&self, nr: Option<usize>) {
        self.stop_after.set(nr);
        self.nr_steps.set(0);
        if nr.is_some() {
            self.has_ended.set(false);
        }
    }

    /// Whether the last operation was stopped before its intent was removed.
    pub fn was_unfinished(&self) -> bool {
        !self.has_ended.get()
    }

    fn may(&self) -> Result<()> {
        if self.is_refusing.get() {
            return Err(Error::new(Code::DeviceIoctl, "refused"));
        }
        Ok(())
    }

    /// Moves the clusters of `upper` down, one a step.
    fn move_down(&self, lower: &Path, upper: &Path, drops: bool) {
        for cluster in 0..CLUSTERS {
            let (image, header) = header(upper);
            if entry(&image, &header, cluster).is_none() {
                continue;
            }
            let value = read(&[upper.to_owned()])[cluster];
            write(lower, cluster, value);
            if drops {
                set_entry(&image, cluster, 0);
            }
            self.step("cluster");
        }
    }

    fn show(&self) {
        let dir = self.dir.join("sys/block/ploop0");
        let _ = fs::remove_dir_all(self.dir.join("sys"));
        let chain = self.chain.borrow();
        let Some(top) = chain.len().checked_sub(1) else {
            return;
        };
        let put = |name: String, text: &str| {
            let path = dir.join(name);
            fs::create_dir_all(store::dir_of(&path)).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        let size = header(chain.last().unwrap()).1.size_sectors.to_string();
        let ro = if self.is_read_only.get() { "1" } else { "0" };
        for (name, text) in [
            ("size", size.as_str()),
            ("ro", ro),
            ("pstate/running", "1"),
            ("pstate/top", &top.to_string()),
            ("pstate/block_size", "64"),
            ("pstate/fmt_version", "2"),
            ("pstate/cookie", ""),
            ("pstate/open_count", "0"),
            ("pstate/aborted", "0"),
        ] {
            put(name.to_owned(), text);
        }
        for (level, path) in chain.iter().enumerate() {
            // Gone while attached cannot be: whoever removed it is wrong.
            let meta = fs::metadata(path).unwrap();
            let (major, minor) = (
                nix::sys::stat::major(meta.dev()),
                nix::sys::stat::minor(meta.dev()),
            );
            let info = format!("ino:{}\nsdev:{major}:{minor}", meta.ino());
            let is_written = level == top && !self.is_read_only.get();
            for (name, text) in [
                ("image", path.to_str().unwrap()),
                ("image_info", &info),
                ("format", "ploop1"),
                ("io", "direct"),
                ("ro", if is_written { "0" } else { "1" }),
            ] {
                put(format!("pdelta/{level}/{name}"), text);
            }
        }
    }
}

impl Outside for Fake {
    fn devices(&self) -> Result<Vec<Device>> {
        self.show();
        Sysfs::at(self.dir.join("sys")).devices()
    }

    fn snapshot(&self, _: &Device, top: NewDelta<'_>, _: Freeze) -> Result<()> {
        self.may()?;
        open(top.path);
        self.step("new top is marked");
        let old = self.top().unwrap();
        self.chain.borrow_mut().push(top.path.to_owned());
        self.step("kernel has switched");
        close(&old);
        Ok(())
    }

    fn merge(&self, device: &Device, level: u32) -> Result<()> {
        self.settle(device)?;
        self.may()?;
        let level = level as usize;
        let chain = self.chain();
        let (lower, upper) = (&chain[level - 1], &chain[level]);
        let is_top = level + 1 == chain.len();
        open(lower);
        self.move_down(lower, upper, true);
        self.chain.borrow_mut().remove(level);
        if is_top {
            close(upper);
        } else {
            close(lower);
        }
        self.step("kernel has merged");
        Ok(())
    }

    fn replace(&self, _: &Device, level: u32, with: NewDelta<'_>) -> Result<()> {
        self.may()?;
        let (level, chain) = (level as usize, self.chain());
        let is_written = level + 1 == chain.len();
        if is_written {
            open(with.path);
        }
        self.chain.borrow_mut()[level] = with.path.to_owned();
        if is_written {
            close(&chain[level]);
        }
        self.step("kernel has replaced");
        Ok(())
    }

    fn merge_files(&self, lower: &Path, _: Base, upper: &Path) -> Result<()> {
        self.may()?;
        self.move_down(lower, upper, false);
        Ok(())
    }

    fn grow(&self, _: &Device, sectors: u64) -> Result<()> {
        let top = self.top().unwrap();
        self.grow_file(&top, Base::Ploop1, sectors)
    }

    fn grow_file(&self, path: &Path, _: Base, sectors: u64) -> Result<()> {
        self.may()?;
        self.step("growing");
        let (image, header) = header(path);
        let cluster = header.cluster;
        let mut larger = Header::new(header.version, cluster, sectors).unwrap();
        larger.mark = header.mark;
        assert_eq!(larger.first_data, header.first_data);
        image
            .file()
            .write_all_at(larger.encode().as_bytes(), 0)
            .unwrap();
        self.step("the image has grown");
        Ok(())
    }

    fn compact(&self, _: &Device) -> Result<u64> {
        self.may().map(|()| 1)
    }

    fn compact_file(&self, _: &Path) -> Result<u64> {
        self.may().map(|()| 1)
    }

    fn settle(&self, device: &Device) -> Result<()> {
        match self.merging.take() {
            Some(level) => self.merge(device, level),
            None => Ok(()),
        }
    }

    fn step(&self, name: &str) {
        self.has_ended.set(name == "ended");
        let due = self.meanwhile.borrow_mut().take_if(|(at, _)| *at == name);
        if let Some((_, chain)) = due {
            self.attach_read_only(chain);
        }
        let nr = self.nr_steps.get() + 1;
        self.nr_steps.set(nr);
        if self.stop_after.get().is_some_and(|stop| nr > stop) {
            std::panic::resume_unwind(Box::new("stopped"));
        }
    }
}

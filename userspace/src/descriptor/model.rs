// SPDX-License-Identifier: GPL-2.0
//! What a descriptor says: the images of a disk and how they build on each other. Read from the
//! tree of [`xml`](super::xml), never written back: changes are made in the tree.

use super::guid::Guid;
use super::xml::Element;
use ploop_pure::chain::DELTAS_MAX;
use ploop_pure::units::ClusterSize;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What an image was when it was last closed: a lower image does not change after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Length in bytes.
    pub len_bytes: u64,
    /// Inode number.
    pub ino: u64,
    /// Time of the last change, in nanoseconds since 1970.
    #[serde(with = "as_text")]
    pub mtime_ns: i128,
}

/// JSON has no numbers of that size.
mod as_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(number: &i128, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(number)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<i128, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Record {
    /// Whether nobody wrote between the two: a copy that kept its time is no change.
    pub fn is_same_state(self, other: Self) -> bool {
        (self.len_bytes, self.mtime_ns) == (other.len_bytes, other.mtime_ns)
    }
}

/// An image file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageEntry {
    /// Name of the delta that it holds.
    pub guid: Guid,
    /// Marked as raw; in a disk with a raw base all are.
    pub is_plain: bool,
    /// The file as the descriptor names it.
    pub file: String,
    /// What it was when it was last closed, if that is known.
    pub record: Option<Record>,
}

/// A delta's place in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shot {
    /// Its name.
    pub guid: Guid,
    /// The delta it builds on; [`Guid::NULL`] for the base.
    pub parent: Guid,
    /// To be merged away when nobody uses it.
    pub is_temporary: bool,
}

/// A disk with all its deltas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Size in sectors.
    pub size_sectors: u64,
    /// Cluster size.
    pub cluster: ClusterSize,
    /// The base is raw.
    pub is_raw: bool,
    /// Its images are allocated in full.
    pub is_preallocated: bool,
    /// The images, in the order of the file.
    pub images: Vec<ImageEntry>,
    /// The deltas, in the order of the file.
    pub shots: Vec<Shot>,
    /// The delta that is written to.
    pub top: Guid,
}

impl Disk {
    /// Reads it. An error is something missing or no value at all; what the values are worth is
    /// told by [`Disk::problems`].
    pub fn read(root: &Element) -> Result<Self, String> {
        if !ROOTS.contains(&root.name()) {
            return Err(format!(
                "the root element is <{}>, not <{}> or <{}>",
                root.name(),
                ROOTS[0],
                ROOTS[1]
            ));
        }
        let parameters = child(root, "Disk_Parameters")?;
        let size_sectors = number(parameters, "Disk_size")?;
        let data = child(root, "StorageData")?;
        if data
            .first("Volume")
            .is_some_and(|v| v.first("Parent").is_some())
        {
            return Err(
                "it is a volume that builds on another disk, which is not supported".into(),
            );
        }
        let mut storages = data.all("Storage");
        let storage = storages.next().ok_or("<StorageData> has no <Storage>")?;
        if storages.next().is_some() {
            return Err("it has several <Storage>: a disk that is split is not supported".into());
        }
        let (start, end) = (number(storage, "Start")?, number(storage, "End")?);
        if (start, end) != (0, size_sectors) {
            return Err(format!(
                "<Storage> is from sector {start} to {end}, but the disk has {size_sectors} sectors"
            ));
        }
        let sectors = number(storage, "Blocksize")?;
        let cluster = u32::try_from(sectors)
            .ok()
            .and_then(ClusterSize::from_sectors);
        let cluster = cluster.ok_or_else(|| {
            format!("a cluster (<Blocksize>) of {sectors} sectors is not a power of two from 64 to 131072")
        })?;
        let images: Vec<_> = storage.all("Image").map(image).collect::<Result<_, _>>()?;
        let (shots, top) = shots(root, &images)?;
        Ok(Self {
            size_sectors,
            cluster,
            is_raw: images.iter().any(|i| i.is_plain),
            is_preallocated: storage
                .first("Preallocated")
                .is_some_and(|p| p.text() == "1"),
            images,
            shots,
            top,
        })
    }

    /// Everything that contradicts itself, named.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.image_problems(&mut found);
        self.shot_problems(&mut found);
        if found.is_empty() {
            // Of a sound list only.
            self.tree_problems(&mut found);
        }
        found
    }

    fn image_problems(&self, found: &mut Vec<String>) {
        if self.size_sectors == 0 {
            found.push("the disk has no sectors".into());
        }
        if self.images.is_empty() {
            found.push("there is no image".into());
        }
        if self.images.len() > DELTAS_MAX {
            found.push(format!(
                "there are {} images, more than {DELTAS_MAX}",
                self.images.len()
            ));
        }
        let (mut guids, mut files) = (BTreeSet::new(), BTreeMap::new());
        for image in &self.images {
            let (guid, file) = (image.guid, &image.file);
            if !guids.insert(guid) {
                found.push(format!("there are two images {guid}"));
            }
            if let Some(other) = files.insert(file.as_str(), guid) {
                found.push(format!(
                    "the images {other} and {guid} are both in the file {file}"
                ));
            }
            if file.is_empty() {
                found.push(format!("the image {guid} has no file"));
            }
            if file.contains(['\n', '\0']) {
                found.push(format!(
                    "the file name of the image {guid} is not one line of text"
                ));
            }
            if !self.shots.iter().any(|s| s.guid == guid) {
                found.push(format!("the image {guid} ({file}) has no <Shot>"));
            }
        }
        if self.is_preallocated && self.is_raw {
            found.push("it is marked as preallocated and raw at once".into());
        }
    }

    fn shot_problems(&self, found: &mut Vec<String>) {
        let mut guids = BTreeSet::new();
        for shot in &self.shots {
            let guid = shot.guid;
            if guid == Guid::NULL {
                found.push("a <Shot> has the name of no delta".into());
            }
            if !guids.insert(guid) {
                found.push(format!("there are two <Shot> {guid}"));
            }
            if !self.images.iter().any(|i| i.guid == guid) {
                found.push(format!("the <Shot> {guid} has no image"));
            }
        }
        for shot in self.shots.iter().filter(|s| s.parent != Guid::NULL) {
            if !guids.contains(&shot.parent) {
                found.push(format!(
                    "the parent {} of {} does not exist",
                    shot.parent, shot.guid
                ));
            }
        }
        let bases = self.shots.iter().filter(|s| s.parent == Guid::NULL);
        let bases: Vec<_> = bases.map(|s| s.guid.to_string()).collect();
        match bases.len() {
            0 => found.push("no delta is the base: each has a parent".into()),
            1 => {}
            _ => found.push(format!("there are several bases: {}", bases.join(", "))),
        }
    }

    fn tree_problems(&self, found: &mut Vec<String>) {
        for shot in &self.shots {
            if self.chain(shot.guid).is_none() {
                found.push(format!("the parents of {} go round in a circle", shot.guid));
            }
        }
        let Some(top) = self.shot(self.top) else {
            found.push(format!("the top {} does not exist", self.top));
            return;
        };
        if top.is_temporary {
            found.push(format!("the top {} is marked as temporary", self.top));
        }
        if let Some(child) = self.children(self.top).next() {
            found.push(format!(
                "{} builds on the top {}, which is written to",
                child.guid, self.top
            ));
        }
    }

    /// The delta `guid`.
    pub fn shot(&self, guid: Guid) -> Option<&Shot> {
        self.shots.iter().find(|s| s.guid == guid)
    }

    /// The image of the delta `guid`.
    pub fn image(&self, guid: Guid) -> Option<&ImageEntry> {
        self.images.iter().find(|i| i.guid == guid)
    }

    /// The deltas that build on `guid`.
    pub fn children(&self, guid: Guid) -> impl Iterator<Item = &Shot> {
        self.shots.iter().filter(move |s| s.parent == guid)
    }

    /// The names of the deltas from the base to `guid`; `None` if that does not lead to a base.
    pub fn chain(&self, guid: Guid) -> Option<Vec<Guid>> {
        let mut chain = Vec::new();
        let mut next = guid;
        while next != Guid::NULL {
            if chain.len() > self.shots.len() {
                return None;
            }
            chain.push(next);
            next = self.shot(next)?.parent;
        }
        chain.reverse();
        Some(chain)
    }

    /// The base.
    pub fn base(&self) -> Option<&ImageEntry> {
        let base = self.shots.iter().find(|s| s.parent == Guid::NULL)?;
        self.image(base.guid)
    }
}

/// Names of the root element: OpenVZ's old and new one.
pub const ROOTS: [&str; 2] = ["Parallels_disk_image", "Virtuozzo_disk_image"];
/// Our own element inside `Image`; others skip it.
pub const RECORD: &str = "PloopctlClosed";
/// Marks of a merge that newer versions of OpenVZ have left half done.
const HALF_DONE: [&str; 2] = ["TemporaryZero", "TemporaryZeroSwap"];

fn child<'a>(of: &'a Element, name: &str) -> Result<&'a Element, String> {
    of.first(name)
        .ok_or_else(|| format!("<{}> has no <{name}>", of.name()))
}

fn number(of: &Element, name: &str) -> Result<u64, String> {
    let text = child(of, name)?.text();
    text.parse()
        .map_err(|_| format!("<{name}> is '{text}', not a number"))
}

fn guid(of: &Element, name: &str) -> Result<Guid, String> {
    let text = child(of, name)?.text();
    text.parse().map_err(|e| format!("<{name}>: {e}"))
}

fn image(of: &Element) -> Result<ImageEntry, String> {
    let kind = child(of, "Type")?.text();
    let is_plain = match kind.as_str() {
        "Plain" => true,
        "Compressed" => false,
        _ => {
            return Err(format!(
                "the <Type> of an image is '{kind}', not Compressed or Plain"
            ))
        }
    };
    Ok(ImageEntry {
        guid: guid(of, "GUID")?,
        is_plain,
        file: child(of, "File")?.text(),
        record: of.first(RECORD).and_then(record),
    })
}

/// One that is not understood is none.
fn record(of: &Element) -> Option<Record> {
    Some(Record {
        len_bytes: of.attribute("bytes")?.parse().ok()?,
        ino: of.attribute("inode")?.parse().ok()?,
        mtime_ns: of.attribute("mtime")?.parse().ok()?,
    })
}

/// The deltas and the top. A disk of one image need not list its delta.
fn shots(root: &Element, images: &[ImageEntry]) -> Result<(Vec<Shot>, Guid), String> {
    let list = root.first("Snapshots");
    let mut shots = Vec::new();
    for shot in list.into_iter().flat_map(|l| l.all("Shot")) {
        let name = guid(shot, "GUID")?;
        if let Some(mark) = HALF_DONE.iter().find(|m| shot.first(m).is_some()) {
            return Err(format!(
                "{name} is marked <{mark}>: a merge by OpenVZ is half done and must be completed there"
            ));
        }
        shots.push(Shot {
            guid: name,
            parent: guid(shot, "ParentGUID")?,
            is_temporary: shot.first("Temporary").is_some(),
        });
    }
    if let ([], [only]) = (shots.as_slice(), images) {
        shots.push(Shot {
            guid: only.guid,
            parent: Guid::NULL,
            is_temporary: false,
        });
    }
    let top = match list.filter(|l| l.first("TopGUID").is_some()) {
        Some(list) => guid(list, "TopGUID")?,
        // As old as that, or made by something else.
        None => match shots.as_slice() {
            [only] => only.guid,
            _ if shots.iter().any(|s| s.guid == Guid::TOP) => Guid::TOP,
            _ => return Err("it does not say which delta is the top: <TopGUID> is missing".into()),
        },
    };
    Ok((shots, top))
}

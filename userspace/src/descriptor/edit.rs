// SPDX-License-Identifier: GPL-2.0
//! Changes of a descriptor, made in its tree, so that what we do not know stays where it is.

use super::guid::Guid;
use super::model::{Disk, Record, RECORD, ROOTS};
use super::xml::{Document, Element};

/// Depth of `Storage` and of `Snapshots`, for the layout of what is added.
const STORAGE_DEPTH: usize = 2;
const SNAPSHOTS_DEPTH: usize = 1;

/// The text of a descriptor of a new disk with one image.
pub fn new_text(
    size_sectors: u64,
    cluster_sectors: u32,
    is_raw: bool,
    is_full: bool,
    file: &str,
) -> String {
    let text = |name: &str, text: String| Element::with_text(name, &text);
    // Nobody uses the geometry; these are what old tools write.
    let (heads, sectors) = (16, 32);
    let parameters = vec![
        text("Disk_size", size_sectors.to_string()),
        text("Cylinders", (size_sectors / (heads * sectors)).to_string()),
        text("Heads", heads.to_string()),
        text("Sectors", sectors.to_string()),
        text("Padding", "0".into()),
    ];
    let mut storage = vec![
        text("Start", "0".into()),
        text("End", size_sectors.to_string()),
        text("Blocksize", cluster_sectors.to_string()),
    ];
    if is_full && !is_raw {
        storage.push(text("Preallocated", "1".into()));
    }
    storage.push(image(Guid::TOP, is_raw, file));
    let snapshots = vec![
        text("TopGUID", Guid::TOP.to_string()),
        shot(Guid::TOP, Guid::NULL),
    ];
    let root = Element::with_elements(
        ROOTS[0],
        0,
        vec![
            Element::with_elements("Disk_Parameters", 1, parameters),
            Element::with_elements(
                "StorageData",
                1,
                vec![Element::with_elements("Storage", STORAGE_DEPTH, storage)],
            ),
            Element::with_elements("Snapshots", SNAPSHOTS_DEPTH, snapshots),
        ],
    );
    let head = "<?xml version=\"1.0\"?>\n";
    match Document::parse(&format!("{head}<{0}></{0}>\n", ROOTS[0])) {
        Ok(mut document) => {
            document.root = root.with_start(&format!("<{} Version=\"1.0\">", ROOTS[0]));
            document.text()
        }
        Err(_) => String::new(),
    }
}

fn image(guid: Guid, is_plain: bool, file: &str) -> Element {
    let elements = vec![
        Element::with_text("GUID", &guid.to_string()),
        Element::with_text("Type", if is_plain { "Plain" } else { "Compressed" }),
        Element::with_text("File", file),
    ];
    Element::with_elements("Image", STORAGE_DEPTH + 1, elements)
}

fn shot(guid: Guid, parent: Guid) -> Element {
    let elements = vec![
        Element::with_text("GUID", &guid.to_string()),
        Element::with_text("ParentGUID", &parent.to_string()),
    ];
    Element::with_elements("Shot", SNAPSHOTS_DEPTH + 1, elements)
}

/// Whether `element` is about the delta `guid`.
fn is_of(element: &Element, guid: Guid) -> bool {
    element
        .first("GUID")
        .is_some_and(|g| g.text().parse() == Ok(guid))
}

/// A descriptor that is being changed.
pub struct Edit {
    document: Document,
}

impl Edit {
    /// Begins with what there is. `disk` is what it says: a delta that it need not list is listed
    /// from now on.
    pub fn new(document: &Document, disk: &Disk) -> Self {
        let mut edit = Self {
            document: document.clone(),
        };
        let root = &mut edit.document.root;
        if root.first("Snapshots").is_none() {
            root.add(
                Element::with_elements("Snapshots", SNAPSHOTS_DEPTH, Vec::new()),
                0,
            );
        }
        let list = edit.snapshots();
        let has_shots = list.is_some_and(|l| l.all("Shot").next().is_some());
        if !has_shots {
            for listed in &disk.shots {
                edit.add_shot(listed.guid, listed.parent);
            }
        }
        edit.set_top(disk.top);
        edit
    }

    /// What it has become.
    pub fn finish(self) -> String {
        self.document.text()
    }

    fn storage(&mut self) -> Option<&mut Element> {
        self.document
            .root
            .first_mut("StorageData")?
            .first_mut("Storage")
    }

    fn snapshots(&mut self) -> Option<&mut Element> {
        self.document.root.first_mut("Snapshots")
    }

    fn images(&mut self) -> impl Iterator<Item = &mut Element> {
        self.storage().into_iter().flat_map(|s| s.all_mut("Image"))
    }

    fn shots(&mut self) -> impl Iterator<Item = &mut Element> {
        self.snapshots().into_iter().flat_map(|s| s.all_mut("Shot"))
    }

    fn image_of(&mut self, guid: Guid) -> Option<&mut Element> {
        self.images().find(|i| is_of(i, guid))
    }

    fn shot_of(&mut self, guid: Guid) -> Option<&mut Element> {
        self.shots().find(|s| is_of(s, guid))
    }

    /// Says which delta is the top.
    pub fn set_top(&mut self, guid: Guid) {
        let Some(list) = self.snapshots() else {
            return;
        };
        let has_it = list
            .first("TopGUID")
            .is_some_and(|t| t.text().parse() == Ok(guid));
        if !has_it {
            list.set("TopGUID", &guid.to_string(), SNAPSHOTS_DEPTH);
        }
    }

    /// Gives the delta `from` another name, wherever it is named.
    pub fn rename(&mut self, from: Guid, to: Guid) {
        let text = to.to_string();
        let both = [self.image_of(from).is_some(), self.shot_of(from).is_some()];
        debug_assert_eq!(both, [true, true]);
        if let Some(name) = self.image_of(from).and_then(|i| i.first_mut("GUID")) {
            name.set_text(&text);
        }
        if let Some(name) = self.shot_of(from).and_then(|s| s.first_mut("GUID")) {
            name.set_text(&text);
        }
        for shot in self.shots() {
            if let Some(parent) = shot
                .first_mut("ParentGUID")
                .filter(|p| p.text().parse() == Ok(from))
            {
                parent.set_text(&text);
            }
        }
        let list = self.snapshots().and_then(|l| l.first_mut("TopGUID"));
        if let Some(top) = list.filter(|t| t.text().parse() == Ok(from)) {
            top.set_text(&text);
        }
    }

    /// Adds a delta with its image.
    pub fn add(&mut self, guid: Guid, parent: Guid, is_plain: bool, file: &str) {
        if let Some(storage) = self.storage() {
            storage.add(image(guid, is_plain, file), STORAGE_DEPTH);
        }
        self.add_shot(guid, parent);
    }

    fn add_shot(&mut self, guid: Guid, parent: Guid) {
        if let Some(list) = self.snapshots() {
            list.add(shot(guid, parent), SNAPSHOTS_DEPTH);
        }
    }

    /// Removes a delta with its image.
    pub fn remove(&mut self, guid: Guid) {
        if let Some(storage) = self.storage() {
            storage.remove("Image", |i| is_of(i, guid));
        }
        if let Some(list) = self.snapshots() {
            list.remove("Shot", |s| is_of(s, guid));
        }
    }

    /// Makes a delta build on another one.
    pub fn set_parent(&mut self, guid: Guid, parent: Guid) {
        if let Some(shot) = self.shot_of(guid) {
            shot.set("ParentGUID", &parent.to_string(), SNAPSHOTS_DEPTH + 1);
        }
    }

    /// Names another file for a delta.
    pub fn set_file(&mut self, guid: Guid, file: &str) {
        if let Some(image) = self.image_of(guid) {
            image.set("File", file, STORAGE_DEPTH + 1);
        }
    }

    /// Marks a delta as one to be merged away, or not.
    pub fn set_temporary(&mut self, guid: Guid, is_temporary: bool) {
        let Some(shot) = self.shot_of(guid) else {
            return;
        };
        match (shot.first("Temporary").is_some(), is_temporary) {
            (false, true) => shot.add(Element::empty("Temporary", ""), SNAPSHOTS_DEPTH + 1),
            (true, false) => shot.remove("Temporary", |_| true),
            (true, true) | (false, false) => {}
        }
    }

    /// Says what the image of a delta was when it was closed, or forgets it.
    pub fn set_record(&mut self, guid: Guid, record: Option<Record>) {
        let Some(image) = self.image_of(guid) else {
            return;
        };
        image.remove(RECORD, |_| true);
        if let Some(r) = record {
            let attributes = format!(
                "bytes=\"{}\" inode=\"{}\" mtime=\"{}\"",
                r.len_bytes, r.ino, r.mtime_ns
            );
            image.add(Element::empty(RECORD, &attributes), STORAGE_DEPTH + 1);
        }
    }

    /// Gives the disk another size.
    pub fn set_size(&mut self, size_sectors: u64) {
        let text = size_sectors.to_string();
        if let Some(parameters) = self.document.root.first_mut("Disk_Parameters") {
            parameters.set("Disk_size", &text, 1);
        }
        if let Some(storage) = self.storage() {
            storage.set("End", &text, STORAGE_DEPTH);
        }
    }
}

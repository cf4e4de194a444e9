// SPDX-License-Identifier: GPL-2.0
//! The intent: a file beside the descriptor that is there while an operation is unfinished. It
//! says what the descriptor was, what it is to be, and which files come and go.

use crate::descriptor::guid::Guid;
use crate::descriptor::model::Record;
use crate::descriptor::store;
use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// What is put behind the name of the descriptor.
pub const SUFFIX: &str = ".intent";
const SCHEMA: u32 = 1;
/// Longest intent: three descriptors, with their quotes and line ends escaped.
const LEN_MAX: u64 = 64 << 20;

/// An operation that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Version of this structure.
    schema: u32,
    /// What is being done.
    #[serde(flatten)]
    pub operation: Operation,
    /// The descriptor before it.
    pub before: String,
    /// The descriptor after it.
    pub after: String,
}

/// What is being done. Files are named as in the descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "kebab-case")]
pub enum Operation {
    /// The top is frozen as `uuid`, and `new` is the top from then on.
    Snapshot {
        /// Name of what is frozen.
        uuid: Guid,
        /// File that is made.
        new: String,
    },
    /// The top is thrown away, and `new` on `uuid` is the top from then on.
    Switch {
        /// Name of the snapshot.
        uuid: Guid,
        /// File that is made.
        new: String,
        /// File that is removed.
        old: String,
    },
    /// A delta that nothing builds on is removed.
    Delete {
        /// Its name.
        uuid: Guid,
        /// Its file.
        old: String,
    },
    /// A delta is merged into the one below, `uuid`, which ceases to be one by itself.
    Merge {
        /// Name of the lower one.
        uuid: Guid,
        /// Name of the upper one, which stays.
        child: Guid,
        /// File of the lower one, which stays.
        lower: String,
        /// File of the upper one, which is removed.
        upper: String,
        /// The descriptor while data is moved: the lower one is marked as temporary.
        marked: String,
    },
    /// The disk becomes larger.
    Grow {
        /// Its new size.
        sectors: u64,
    },
    /// Another file takes the place of that of `uuid`. Both stay.
    Replace {
        /// Name of the delta.
        uuid: Guid,
        /// The file that was there.
        old: String,
        /// The file that is to be there.
        new: String,
        /// What that was when the kernel was asked to take it; before that, nothing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        asked: Option<Record>,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot { uuid, .. } => write!(f, "snapshot {uuid}"),
            Self::Switch { uuid, .. } => write!(f, "switch to snapshot {uuid}"),
            Self::Delete { uuid, .. } => write!(f, "removal of {uuid}"),
            Self::Merge { uuid, child, .. } => write!(f, "merge of {child} into {uuid}"),
            Self::Grow { sectors } => write!(f, "growing to {sectors} sectors"),
            Self::Replace { uuid, .. } => write!(f, "replacement of the image of {uuid}"),
        }
    }
}

impl Intent {
    /// An intent.
    pub fn new(operation: Operation, before: String, after: String) -> Self {
        Self {
            schema: SCHEMA,
            operation,
            before,
            after,
        }
    }

    fn path(descriptor: &Path) -> PathBuf {
        store::beside(descriptor, SUFFIX)
    }

    /// Whether something is unfinished, without the locks.
    pub fn is_there(descriptor: &Path) -> bool {
        Self::path(descriptor).symlink_metadata().is_ok()
    }

    /// What is unfinished.
    pub fn load(descriptor: &Path) -> Result<Option<Self>> {
        if !Self::is_there(descriptor) {
            return Ok(None);
        }
        let path = Self::path(descriptor);
        let text = store::read_up_to(&path, LEN_MAX)?;
        let intent: Self =
            serde_json::from_str(&text).map_err(|e| unknown(&path, &e.to_string()))?;
        if intent.schema != SCHEMA {
            return Err(unknown(&path, &format!("its schema is {}", intent.schema)));
        }
        Ok(Some(intent))
    }

    /// Writes it, durably.
    pub fn store(&self, descriptor: &Path) -> Result<()> {
        let path = Self::path(descriptor);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::io(Code::System, "cannot write JSON", std::io::Error::from(e)))?;
        store::write(&path, &(text + "\n"))
    }

    /// Removes it, durably.
    pub fn remove(descriptor: &Path) -> Result<()> {
        store::remove(&Self::path(descriptor))
    }
}

fn unknown(path: &Path, why: &str) -> Error {
    let what = format!(
        "{} says that an operation is unfinished, but cannot be understood: {why}",
        path.display()
    );
    Error::new(Code::Descriptor, what).hint("was it written by a newer ploopctl? Use that one")
}

// SPDX-License-Identifier: GPL-2.0
//! What to do about a damaged image, and in which order.
//!
//! A check fills in [`Findings`]; [`Plan::new`] turns them into steps. Every step is made durable
//! before the next one begins, which is what makes a crash between any two harmless: copies are
//! durable before entries name them, entries before the clusters that they no longer name are given
//! back, and the in-use mark is set before the first entry changes and cleared last. Run again
//! after a crash, the plan is a shorter one to the same end.
//!
//! What happens to a single entry is decided by a [`Fixer`] while the BAT is scanned once more:
//! no list of bad entries is kept, however many there are. Given the same image, it decides the
//! same each time, so zeroing, copying and moving may be three scans.

use crate::check::{Length, Usage};
use crate::layout::ploop1::{Header, Mark, FLAG_EMPTY};
use crate::problem::{Cure, Problem};
use crate::units::{Cluster, ImageCluster};
use core::fmt;

/// What a scan says of the entry of `cluster`, or that it belongs to no cluster of the disk. That
/// is for a repair only: the kernel takes such an entry as it is.
pub fn judge(
    header: &Header,
    cluster: Cluster,
    entry: Result<ImageCluster, Problem>,
) -> Result<ImageCluster, Problem> {
    let end = header.disk_clusters();
    match entry {
        Ok(_) if cluster.0 >= end => Err(Problem::EntryPastDisk {
            cluster: cluster.0,
            end,
        }),
        Ok(_) | Err(_) => entry,
    }
}

/// How many entries of each kind a scan found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Entries that name a slot of their own, wholly inside the file.
    pub nr_good: u32,
    /// Entries that name the slot which the file holds only in part: one at most.
    pub nr_torn: u32,
    /// Entries that name nothing usable.
    pub nr_invalid: u32,
    /// Entries of the disk that name a slot which an earlier entry names.
    pub nr_duplicate: u32,
    /// Entries past the end of the disk that name a slot of their own. They are in `nr_torn` too
    /// where the file holds only a part of it.
    pub nr_past_disk: u32,
}

impl Tally {
    /// Counts one result of [`judge`].
    pub fn note(&mut self, header: &Header, entry: Result<ImageCluster, Problem>) {
        let end = header.disk_clusters();
        match entry {
            Ok(_) => self.nr_good += 1,
            Err(Problem::EntryPastDisk { .. }) => self.nr_past_disk += 1,
            Err(Problem::EntryTorn { cluster, .. }) => {
                self.nr_torn += 1;
                self.nr_past_disk += u32::from(cluster >= end);
            }
            Err(Problem::EntryDuplicate { cluster, .. }) if cluster < end => self.nr_duplicate += 1,
            Err(_) => self.nr_invalid += 1,
        }
    }
}

/// What is known about the format extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// There is none.
    None,
    /// The header names one that does not hold.
    Invalid,
    /// It holds, and its clusters are the data's neighbours.
    Valid {
        /// One past its highest slot; `None` if it has features that are not known.
        end: Option<u32>,
    },
}

/// What a check found out about an image whose header and length are acceptable.
#[derive(Debug, Clone, Copy)]
pub struct Findings {
    /// The header.
    pub header: Header,
    /// Length of the file in bytes.
    pub len_bytes: u64,
    /// The same, judged.
    pub length: Length,
    /// Of the entries that belong to the disk.
    pub usage: Usage,
    /// Of the scan.
    pub tally: Tally,
    /// The format extension.
    pub extension: Extension,
    /// Slots below `usage.end` that neither an entry nor a valid extension names but that hold
    /// data.
    pub nr_leaked_data: u32,
    /// Slots below `usage.end` that a valid extension names.
    pub nr_extension_slots: u32,
}

impl Findings {
    /// The problems of the image as a whole; those of entries come from the scan.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let in_use = (self.header.mark == Mark::InUse).then_some(Problem::InUse);
        let torn = self.length.torn.then_some(Problem::TornTail {
            len: self.len_bytes,
        });
        let ext = (self.extension == Extension::Invalid).then_some(Problem::Extension {
            sector: self.header.ext_offset,
        });
        let empty = self.is_called_empty().then_some(Problem::EmptyFlag);
        let of_image = in_use.into_iter().chain(torn).chain(ext);
        of_image.chain(empty)
    }

    /// Whether the header says so, but there is data.
    fn is_called_empty(&self) -> bool {
        self.header.flags & FLAG_EMPTY != 0 && self.usage.nr_used > 0
    }

    /// What mending all damage costs; `None` if there is none. The empty flag on an image with data
    /// is no damage: QEMU leaves it there when it writes to an image of ours.
    pub fn cure(&self) -> Option<Cure> {
        if self.tally.nr_invalid > 0 || self.tally.nr_duplicate > 0 {
            return Some(Cure::Lossy);
        }
        let entries = self.tally.nr_torn + self.tally.nr_past_disk;
        let lossless = entries > 0 || self.problems().any(|p| p != Problem::EmptyFlag);
        lossless.then_some(Cure::Lossless)
    }

    /// One past the highest slot that an entry of the disk or a valid extension names; `None` if that
    /// cannot be known.
    pub fn end(&self) -> Option<u32> {
        match self.extension {
            Extension::None | Extension::Invalid => Some(self.usage.end),
            Extension::Valid { end } => Some(end?.max(self.usage.end)),
        }
    }

    /// Bytes of the file after the last slot in use.
    pub fn tail_bytes(&self) -> u64 {
        let end = self.end().map(ImageCluster);
        end.map_or(0, |e| {
            self.len_bytes.saturating_sub(self.header.cluster.offset(e))
        })
    }
}

/// How far a repair goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What stands in the way of using the image, and the tail while at it.
    Needed,
    /// Also what only takes space: the tail of a clean image, leaked clusters.
    All,
}

/// What is to be done with one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fix {
    /// The entry becomes a hole.
    Zero,
    /// The same, and nobody could read what it names.
    Forget,
    /// The entry gets a copy of the data it shares.
    Copy {
        /// The slot it names.
        from: ImageCluster,
        /// The slot it shall name.
        to: ImageCluster,
    },
}

/// Decides about entries in the order of the scan.
#[derive(Debug, Clone, Copy)]
pub struct Fixer {
    next: u32,
    limit: u32,
    disk_end: u32,
}

impl Fixer {
    /// What to do about `problem`, which [`judge`] found; `None` if its entry stays as it is.
    pub fn fix(&mut self, problem: Problem) -> Option<Fix> {
        match problem {
            Problem::EntryDuplicate { cluster, at }
                if cluster < self.disk_end && self.next < self.limit =>
            {
                self.next += 1;
                Some(Fix::Copy {
                    from: ImageCluster(at),
                    to: ImageCluster(self.next - 1),
                })
            }
            Problem::EntryDuplicate { .. }
            | Problem::EntryMisaligned { .. }
            | Problem::EntryInHeader { .. }
            | Problem::EntryPastEnd { .. } => Some(Fix::Zero),
            Problem::EntryPastDisk { .. } => Some(Fix::Forget),
            Problem::Truncated { .. }
            | Problem::Magic
            | Problem::DiskType { .. }
            | Problem::ClusterSize { .. }
            | Problem::SizeZero
            | Problem::SizeLimit { .. }
            | Problem::SizeOverBat { .. }
            | Problem::FirstBlock { .. }
            | Problem::InUseValue { .. }
            | Problem::Flags { .. }
            | Problem::InUse
            | Problem::EmptyFlag
            | Problem::TornTail { .. }
            | Problem::EntryTorn { .. }
            | Problem::Extension { .. } => None,
        }
    }
}

/// One step of a repair; durable before the next begins. Displayed, it says what is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Mark the image in use and drop the extension: entries are about to change.
    Mark,
    /// Lengthen the file to this many bytes, by zeros.
    Extend {
        /// New length.
        len_bytes: u64,
        /// Length before.
        from_bytes: u64,
    },
    /// Make holes of the entries that name nothing usable. This comes before anything lengthens
    /// the file beyond its own clusters: an entry past its end may then name foreign data.
    Zero {
        /// How many.
        nr: u32,
    },
    /// Make holes of the entries past the end of the disk. No data of the disk changes, and each
    /// entry is mended by itself: this needs no mark. Their slots may be overwritten afterwards.
    Forget {
        /// How many.
        nr: u32,
    },
    /// Copy each cluster that two entries name, for the second.
    Copy {
        /// How many.
        nr: u32,
        /// Slot of the first copy.
        first: ImageCluster,
    },
    /// Point the second entry of each such pair to its copy.
    Move {
        /// How many.
        nr: u32,
    },
    /// Cut the file to this many bytes.
    Truncate {
        /// New length.
        len_bytes: u64,
        /// Length before.
        from_bytes: u64,
    },
    /// Give back the space of slots below the end that nothing names.
    Punch {
        /// How many hold data.
        nr: u32,
    },
    /// Write the header of a closed image.
    Close {
        /// The in-use mark is cleared.
        clears_mark: bool,
        /// The flag that no data was ever written is cleared.
        clears_flag: bool,
        /// An extension that does not hold is dropped.
        drops_extension: bool,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Mark => write!(f, "mark the image in use while entries change"),
            Self::Extend {
                len_bytes,
                from_bytes,
            } => write!(
                f,
                "extend the file from {from_bytes} to {len_bytes} bytes, completing its last cluster with zeros"
            ),
            Self::Copy { nr, first } => write!(
                f,
                "copy {nr} clusters that two entries name, from image cluster {} on; which of the two \
                 entries is right cannot be known, one of them may show wrong data",
                first.0
            ),
            Self::Zero { nr } => write!(
                f,
                "zero {nr} BAT entries that name nothing usable; what they held is lost"
            ),
            Self::Forget { nr } => write!(
                f,
                "zero {nr} BAT entries of clusters past the end of the disk"
            ),
            Self::Move { nr } => write!(f, "point {nr} BAT entries to their copies"),
            Self::Truncate {
                len_bytes,
                from_bytes,
            } => write!(
                f,
                "cut the unused end of the file, from {from_bytes} to {len_bytes} bytes"
            ),
            Self::Punch { nr } => write!(f, "give back the space of {nr} clusters that no entry names"),
            Self::Close {
                clears_mark,
                clears_flag,
                drops_extension,
            } => {
                let what = match (clears_mark, drops_extension) {
                    (true, true) => "clear the in-use mark and drop the format extension",
                    (true, false) => "clear the in-use mark",
                    (false, true) => "drop the format extension, which is not valid",
                    (false, false) => "write the header",
                };
                let flag = if clears_flag { "; clear the empty flag" } else { "" };
                write!(f, "{what}{flag}")
            }
        }
    }
}

/// Most steps of a plan.
const STEPS_MAX: usize = 9;

/// What the steps follow from.
struct Need {
    nr_copies: u32,
    nr_zeroed: u32,
    changes_entries: bool,
    is_marked: bool,
    clears_flag: bool,
    drops_extension: bool,
    /// One past the highest slot that stays in use, copies not counted; `None` if not known.
    end: Option<u32>,
}

impl Need {
    fn new(found: &Findings, fixer: Fixer) -> Self {
        let tally = found.tally;
        let room = fixer.limit.saturating_sub(fixer.next);
        let nr_copies = tally.nr_duplicate.min(room);
        let nr_zeroed = tally.nr_invalid + (tally.nr_duplicate - nr_copies);
        let changes_entries = nr_copies > 0 || nr_zeroed > 0;
        let is_marked = found.header.mark == Mark::InUse;
        // Data that changes makes a dirty bitmap stale.
        let drops_extension = found.header.ext_offset != 0
            && (found.extension == Extension::Invalid || is_marked || changes_entries);
        Self {
            nr_copies,
            nr_zeroed,
            changes_entries,
            is_marked,
            clears_flag: found.is_called_empty(),
            drops_extension,
            end: if drops_extension {
                Some(found.usage.end)
            } else {
                found.end()
            },
        }
    }

    fn steps(&self, found: &Findings, scope: Scope) -> [Option<Step>; STEPS_MAX] {
        let cluster = found.header.cluster;
        let mut len_bytes = found.len_bytes;
        let mut steps = [None; STEPS_MAX];
        let [mark, extend, zero, forget, copy, moves, truncate, punch, close] = &mut steps;
        *mark = (self.changes_entries && !self.is_marked).then_some(Step::Mark);
        if found.tally.nr_torn > 0 || (found.length.torn && self.end.is_none()) {
            let whole = cluster.ceil(len_bytes) << cluster.log_bytes();
            *extend = Some(Step::Extend {
                len_bytes: whole,
                from_bytes: len_bytes,
            });
            len_bytes = whole;
        }
        let nr = self.nr_zeroed;
        *zero = (nr > 0).then_some(Step::Zero { nr });
        let nr = found.tally.nr_past_disk;
        *forget = (nr > 0).then_some(Step::Forget { nr });
        if self.nr_copies > 0 {
            let nr = self.nr_copies;
            let first = ImageCluster(found.usage.end);
            *copy = Some(Step::Copy { nr, first });
            *moves = Some(Step::Move { nr });
        }
        if let Some(end) = self.end {
            // `nr_copies` keeps the sum below the limit.
            let end = cluster.offset(ImageCluster(end + self.nr_copies));
            *truncate = (len_bytes > end).then_some(Step::Truncate {
                len_bytes: end,
                from_bytes: len_bytes,
            });
            let freed = if self.drops_extension {
                found.nr_extension_slots
            } else {
                0
            };
            let nr = found.nr_leaked_data + freed;
            *punch = (scope == Scope::All && nr > 0).then_some(Step::Punch { nr });
        }
        *close = (self.closes() || self.clears_flag).then_some(Step::Close {
            clears_mark: self.is_marked || self.changes_entries,
            clears_flag: self.clears_flag,
            drops_extension: self.drops_extension,
        });
        steps
    }

    /// Whether mark or extension change.
    fn closes(&self) -> bool {
        self.is_marked || self.changes_entries || self.drops_extension
    }
}

/// The steps of a repair, in order.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    steps: [Option<Step>; STEPS_MAX],
    cure: Cure,
    fixer: Fixer,
    marked: Header,
    closed: Header,
}

impl Plan {
    /// What to do about an image; `None` if nothing.
    pub fn new(found: &Findings, scope: Scope) -> Option<Self> {
        let header = found.header;
        let fixer = Fixer {
            next: found.usage.end,
            limit: header.slots_max(),
            disk_end: header.disk_clusters(),
        };
        let need = Need::new(found, fixer);
        if scope == Scope::Needed && !need.is_marked && !found.length.torn && !need.changes_entries
        {
            return None;
        }
        let steps = need.steps(found, scope);
        let is_empty = found.usage.nr_used == 0 && need.nr_copies == 0;
        steps.iter().any(Option::is_some).then_some(Self {
            steps,
            cure: if need.changes_entries {
                Cure::Lossy
            } else {
                Cure::Lossless
            },
            fixer,
            marked: header.opened(),
            closed: if need.closes() {
                header.opened().closed(is_empty)
            } else {
                header.not_empty()
            },
        })
    }

    /// The steps, in order.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().flatten().copied()
    }

    /// Whether anything is lost.
    pub fn cure(&self) -> Cure {
        self.cure
    }

    /// A new judge of entries, for one scan.
    pub fn fixer(&self) -> Fixer {
        self.fixer
    }

    /// The header that [`Step::Mark`] writes.
    pub fn marked(&self) -> Header {
        self.marked
    }

    /// The header that [`Step::Close`] writes.
    pub fn closed(&self) -> Header {
        self.closed
    }
}

#[cfg(test)]
mod tests;

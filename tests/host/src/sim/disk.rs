// SPDX-License-Identifier: GPL-2.0
//! The model of an image file on a disk with a volatile cache.
//!
//! A sector's content is a [`Stamp`]. After a power cut, each write, punched hole and change of the
//! length that no completed sync covers is there, or not, or in part: any pieces of a write, any
//! length between the old one and the new one. What happened to one says nothing about another,
//! so they reach the disk in any order.

use crate::rng::Rng;
use std::fmt;

/// What a sector holds; 0 is zeros.
pub type Stamp = u32;

/// Sectors and length of a file, as found after a power cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Every sector up to the length, and perhaps more that do not count.
    pub sectors: Vec<Stamp>,
    /// Length in sectors.
    pub len: usize,
}

impl Image {
    /// A sector; zeros past the end.
    pub fn get(&self, sector: usize) -> Stamp {
        if sector < self.len {
            self.sectors.get(sector).copied().unwrap_or(0)
        } else {
            0
        }
    }

    fn set(&mut self, sector: usize, stamp: Stamp) {
        if sector >= self.sectors.len() {
            self.sectors.resize(sector + 1, 0);
        }
        self.sectors[sector] = stamp;
    }

    fn set_len(&mut self, len: usize) {
        let keep = len.min(self.len).min(self.sectors.len());
        self.sectors[keep..].fill(0);
        self.len = len;
    }
}

/// Names a write or a change of length from its submission on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpId(u64);

/// How a power cut treats what is not durable.
#[derive(Debug, Clone, Copy)]
enum Mood {
    /// Each piece is kept in so many of 100 cases.
    Pieces(u64),
    /// Each operation is kept in so many of 100 cases, else lost; some are torn.
    Operations(u64),
    /// The operation of this number is lost, all others are kept.
    AllBut(usize),
    /// The other way round.
    Only(usize),
}

/// What a power cut does to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Lost,
    Torn,
}

/// What a power cut leaves of a change.
#[derive(Debug, Clone, Copy)]
enum Left {
    All,
    Nothing,
    /// Of a change of the length: this length.
    Length(usize),
}

/// Names what a sync covers: everything completed before the sync started.
#[derive(Debug, Clone, Copy)]
pub struct Covered(OpId);

#[derive(Debug, Clone)]
enum Change {
    Piece { first: usize, stamps: Vec<Stamp> },
    Length(usize),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Piece { first, stamps } if stamps.iter().all(|s| *s == 0) => {
                write!(f, "zeros at {first}+{}", stamps.len())
            }
            Self::Piece { first, stamps } => write!(f, "{} at {first}+{}", stamps[0], stamps.len()),
            Self::Length(len) => write!(f, "length {len}"),
        }
    }
}

#[derive(Debug, Clone)]
struct Pending {
    op: OpId,
    /// Past the file system, to sectors that the file has: a flush of the device covers it.
    is_straight: bool,
    change: Change,
    /// Completed; the number is its place in the order of completions.
    done: Option<OpId>,
}

/// The file.
#[derive(Debug, Clone)]
pub struct Disk {
    piece_sectors: usize,
    durable: Image,
    /// What a reader sees now.
    live: Image,
    pending: Vec<Pending>,
    clock: u64,
    /// Changes by way of the file system that have ended.
    pub changes: u64,
    /// A sync does not cover changes of length: a fault to be noticed.
    pub forgets_length: bool,
}

impl Disk {
    /// A disk that holds `image` durably and keeps or loses `piece_sectors` at once.
    pub fn new(image: Image, piece_sectors: usize) -> Self {
        Self {
            piece_sectors,
            live: image.clone(),
            durable: image,
            pending: Vec::new(),
            clock: 0,
            changes: 0,
            forgets_length: false,
        }
    }

    fn tick(&mut self) -> OpId {
        self.clock += 1;
        OpId(self.clock)
    }

    /// Starts a write of `stamps` at sector `first`.
    pub fn write(&mut self, first: usize, stamps: &[Stamp]) -> OpId {
        let op = self.tick();
        self.write_more(op, first, stamps)
    }

    /// The same past the file system.
    pub fn write_straight(&mut self, first: usize, stamps: &[Stamp]) -> OpId {
        let op = self.write(first, stamps);
        for p in self.pending.iter_mut().filter(|p| p.op == op) {
            p.is_straight = true;
        }
        op
    }

    /// Adds another place to the write `op`.
    pub fn write_more(&mut self, op: OpId, first: usize, stamps: &[Stamp]) -> OpId {
        let mut at = first;
        let mut rest = stamps;
        while !rest.is_empty() {
            let nr = (self.piece_sectors - at % self.piece_sectors).min(rest.len());
            self.pending.push(Pending {
                op,
                is_straight: false,
                change: Change::Piece {
                    first: at,
                    stamps: rest[..nr].to_vec(),
                },
                done: None,
            });
            at += nr;
            rest = &rest[nr..];
        }
        op
    }

    /// Starts a change of the length.
    pub fn set_len(&mut self, len: usize) -> OpId {
        let op = self.tick();
        self.pending.push(Pending {
            op,
            is_straight: false,
            change: Change::Length(len),
            done: None,
        });
        op
    }

    /// `op` completes: readers see it, a later sync covers it.
    pub fn complete(&mut self, op: OpId) {
        let now = self.tick();
        let (mut ours, rest): (Vec<_>, Vec<_>) = self.pending.drain(..).partition(|p| p.op == op);
        self.pending = rest;
        for p in &mut ours {
            p.done = Some(now);
            apply(&mut self.live, &p.change);
        }
        self.changes += u64::from(!ours.iter().all(|p| p.is_straight));
        // Of two that race, the one that completes last is what stays.
        self.pending.append(&mut ours);
    }

    /// `op` completes and is durable, as after RWF_DSYNC. Older pieces of its sectors that are
    /// still in the cache are superseded with it.
    pub fn complete_durably(&mut self, op: OpId) {
        self.complete(op);
        let (ours, mut rest): (Vec<_>, Vec<_>) = self.pending.drain(..).partition(|p| p.op == op);
        for p in &ours {
            apply(&mut self.durable, &p.change);
            rest.retain(|old| !covers(&p.change, &old.change));
        }
        self.pending = rest;
    }

    /// `op` fails: some of its pieces reached the disk's cache.
    pub fn fail(&mut self, op: OpId, rng: &mut Rng) {
        self.pending.retain(|p| p.op != op || rng.chance(50));
        self.complete(op);
    }

    /// A sync starts.
    pub fn sync_start(&mut self) -> Covered {
        Covered(self.tick())
    }

    /// The sync has succeeded.
    pub fn sync_end(&mut self, covered: Covered) {
        let (durable, forgets) = (&mut self.durable, self.forgets_length);
        self.pending.retain(|p| {
            let is_covered = p.done.is_some_and(|at| at < covered.0);
            if !is_covered || (forgets && matches!(p.change, Change::Length(_))) {
                return true;
            }
            apply(durable, &p.change);
            false
        });
    }

    /// A flush of the device that started with `covered` has succeeded: what was written straight before
    /// is durable, and supersedes what is still in the cache of the same sectors.
    pub fn flush_end(&mut self, covered: Covered) {
        let is_covered = |p: &Pending| p.done.is_some_and(|at| at < covered.0);
        let all = self.pending.drain(..);
        let (flushed, mut rest): (Vec<_>, Vec<_>) =
            all.partition(|p| p.is_straight && is_covered(p));
        for p in &flushed {
            apply(&mut self.durable, &p.change);
            rest.retain(|old| {
                !(old.done.is_some_and(|at| Some(at) < p.done) && covers(&p.change, &old.change))
            });
        }
        self.pending = rest;
    }

    /// The sync has failed: what it covered is durable in part, and the rest of it is gone.
    pub fn sync_fail(&mut self, covered: Covered, rng: &mut Rng) {
        let durable = &mut self.durable;
        self.pending.retain(|p| {
            let is_covered = p.done.is_some_and(|at| at < covered.0);
            if is_covered && rng.chance(50) {
                apply(durable, &p.change);
            }
            !is_covered
        });
    }

    /// Cuts the power: fills `out` with what may be found after it.
    pub fn crash(&self, rng: &mut Rng, out: &mut Image) {
        self.crash_telling(rng, out, |_, _| ());
    }

    /// What [`Self::crash`] would lose and leave with the same `rng`, in words.
    pub fn loss(&self, rng: &mut Rng) -> String {
        let (mut kept, mut lost) = (Vec::new(), Vec::new());
        let mut out = self.durable.clone();
        self.crash_telling(rng, &mut out, |change, left| match left {
            Left::All => join(&mut kept, change.clone()),
            Left::Length(len) => join(&mut kept, Change::Length(len)),
            Left::Nothing => join(&mut lost, change.clone()),
        });
        let words = |all: &[Change]| {
            let all: Vec<_> = all.iter().map(Change::to_string).collect();
            all.join(", ")
        };
        format!("lost [{}], kept [{}]", words(&lost), words(&kept))
    }

    fn crash_telling(&self, rng: &mut Rng, out: &mut Image, mut tell: impl FnMut(&Change, Left)) {
        out.sectors.clone_from(&self.durable.sectors);
        out.len = self.durable.len;
        let nr = self.pending.len().max(1);
        let mood = match rng.below(20) {
            0..=11 => Mood::Pieces([0, 20, 50, 80, 100][rng.pick(5)]),
            12..=15 => Mood::Operations([20, 50, 80][rng.pick(3)]),
            16 | 17 => Mood::AllBut(rng.pick(nr)),
            _ => Mood::Only(rng.pick(nr)),
        };
        let chosen = match mood {
            Mood::AllBut(i) | Mood::Only(i) => self.pending.get(i).map(|p| p.op),
            Mood::Pieces(_) | Mood::Operations(_) => None,
        };
        let mut last = (OpId(0), Fate::Lost);
        for p in &self.pending {
            // The pieces of an operation follow each other.
            if p.op != last.0 {
                let fate = match mood {
                    Mood::Pieces(_) => Fate::Torn,
                    Mood::Operations(_) if rng.chance(20) => Fate::Torn,
                    Mood::Operations(keep) if rng.chance(keep) => Fate::Kept,
                    Mood::AllBut(_) if Some(p.op) != chosen => Fate::Kept,
                    Mood::Only(_) if Some(p.op) == chosen => Fate::Kept,
                    Mood::Operations(_) | Mood::AllBut(_) | Mood::Only(_) => Fate::Lost,
                };
                last = (p.op, fate);
            }
            let keep = match (last.1, mood) {
                (Fate::Kept, _) => 100,
                (Fate::Lost, _) => 0,
                (Fate::Torn, Mood::Pieces(keep)) => keep,
                (Fate::Torn, _) => 50,
            };
            let left = match &p.change {
                _ if !rng.chance(keep) => Left::Nothing,
                Change::Length(to) if last.1 == Fate::Torn && *to != out.len && rng.chance(30) => {
                    let (low, high) = (out.len.min(*to), out.len.max(*to));
                    Left::Length(low + rng.pick(high - low))
                }
                Change::Length(_) | Change::Piece { .. } => Left::All,
            };
            match left {
                Left::All => apply(out, &p.change),
                Left::Length(len) => out.set_len(len),
                Left::Nothing => {}
            }
            tell(&p.change, left);
        }
    }

    /// What a reader sees now.
    pub fn live(&self) -> &Image {
        &self.live
    }
}

/// Adds `change`, to the last one if it is one of neighbours with the same content.
fn join(all: &mut Vec<Change>, change: Change) {
    if let (
        Some(Change::Piece { first, stamps }),
        Change::Piece {
            first: next,
            stamps: more,
        },
    ) = (all.last_mut(), &change)
    {
        if *first + stamps.len() == *next && stamps.first() == more.first() {
            stamps.extend(more);
            return;
        }
    }
    all.push(change);
}

/// Whether `new` writes every sector that `old` does. Pieces are cut at the same places.
fn covers(new: &Change, old: &Change) -> bool {
    match (new, old) {
        (
            Change::Piece { first, stamps },
            Change::Piece {
                first: old_first,
                stamps: old_stamps,
            },
        ) => first <= old_first && old_first + old_stamps.len() <= first + stamps.len(),
        (Change::Piece { .. } | Change::Length(_), Change::Piece { .. } | Change::Length(_)) => {
            false
        }
    }
}

fn apply(image: &mut Image, change: &Change) {
    match change {
        Change::Piece { first, stamps } => {
            for (i, stamp) in stamps.iter().enumerate() {
                image.set(first + i, *stamp);
            }
        }
        Change::Length(len) => image.set_len(*len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        let image = Image {
            sectors: vec![0; 16],
            len: 16,
        };
        Disk::new(image, 1)
    }

    fn outcomes(disk: &Disk, sector: usize) -> Vec<Stamp> {
        let (mut rng, mut seen) = (Rng::new(1), Vec::new());
        let mut out = disk.live().clone();
        for _ in 0..200 {
            disk.crash(&mut rng, &mut out);
            seen.push(out.get(sector));
        }
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn unsynced_writes_may_be_lost_and_synced_ones_not() {
        let mut d = disk();
        let a = d.write(3, &[7]);
        assert_eq!(outcomes(&d, 3), [0, 7]);
        let early = d.sync_start();
        d.complete(a);
        d.sync_end(early);
        assert_eq!(outcomes(&d, 3), [0, 7]);
        let late = d.sync_start();
        d.sync_end(late);
        assert_eq!(outcomes(&d, 3), [7]);
        let b = d.write(3, &[8]);
        d.complete_durably(b);
        assert_eq!(outcomes(&d, 3), [8]);
    }

    #[test]
    fn a_flush_of_the_device_covers_what_was_written_straight() {
        let mut d = disk();
        let by_file = d.write(3, &[7]);
        d.complete(by_file);
        assert_eq!(d.changes, 1);
        for (sector, stamp) in [(3, 8), (4, 9)] {
            let op = d.write_straight(sector, &[stamp]);
            d.complete(op);
        }
        let late = d.write_straight(5, &[6]);
        let (flush, other) = (d.sync_start(), d.write(6, &[5]));
        d.complete(other);
        d.complete(late);
        d.flush_end(flush);
        assert_eq!(
            (d.changes, outcomes(&d, 3), outcomes(&d, 4)),
            (2, vec![8], vec![9])
        );
        assert_eq!((outcomes(&d, 5), outcomes(&d, 6)), (vec![0, 6], vec![0, 5]));
    }

    #[test]
    fn operations_are_kept_lost_and_torn_each_by_itself() {
        let mut d = disk();
        let ops = [d.write(0, &[1, 1]), d.write(4, &[2, 2]), d.set_len(32)];
        for op in ops {
            d.complete(op);
        }
        let (mut rng, mut seen) = (Rng::new(1), std::collections::BTreeSet::new());
        let mut out = d.live().clone();
        for _ in 0..4000 {
            d.crash(&mut rng, &mut out);
            let len = (out.len - 16) / 8;
            seen.insert(
                [0, 1, 4, 5]
                    .map(|s| out.get(s))
                    .map(|s| s > 0)
                    .map(u8::from),
            );
            seen.insert([9, 9, 9, len.min(9) as u8]);
        }
        // 16 combinations of four sectors; lengths old, new and between.
        assert_eq!(seen.len(), 16 + 3);
    }

    #[test]
    fn sectors_past_a_lost_length_are_not_there() {
        let mut d = disk();
        let l = d.set_len(32);
        d.complete(l);
        let w = d.write(20, &[9]);
        d.complete(w);
        assert_eq!(outcomes(&d, 20), [0, 9]);
        assert_eq!(d.live().get(20), 9);
    }
}

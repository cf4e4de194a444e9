// SPDX-License-Identifier: GPL-2.0
//! The model of an image file on a disk with a volatile cache.
//!
//! A sector's content is a [`Stamp`]. A write is cut into pieces; each piece that no completed
//! sync covers may be there after a power cut or not, whatever happened to the others, and so may
//! a change of the file's length.

use crate::rng::Rng;

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

/// Names what a sync covers: everything completed before the sync started.
#[derive(Debug, Clone, Copy)]
pub struct Covered(OpId);

#[derive(Debug, Clone)]
enum Change {
    Piece { first: usize, stamps: Vec<Stamp> },
    Length(usize),
}

#[derive(Debug, Clone)]
struct Pending {
    op: OpId,
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

    /// Adds another place to the write `op`.
    pub fn write_more(&mut self, op: OpId, first: usize, stamps: &[Stamp]) -> OpId {
        let mut at = first;
        let mut rest = stamps;
        while !rest.is_empty() {
            let nr = (self.piece_sectors - at % self.piece_sectors).min(rest.len());
            self.pending.push(Pending {
                op,
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
        out.sectors.clone_from(&self.durable.sectors);
        out.len = self.durable.len;
        let keep = [0, 20, 50, 80, 100][rng.pick(5)];
        for p in &self.pending {
            if rng.chance(keep) {
                apply(out, &p.change);
            }
        }
    }

    /// What a reader sees now.
    pub fn live(&self) -> &Image {
        &self.live
    }
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

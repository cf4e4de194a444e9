// SPDX-License-Identifier: GPL-2.0
//! Allocation of slots in the image file of the top delta.
//!
//! Slots that came back are handed out lowest first, then ascending ones from `head`, so long as
//! they lie inside the file, which is grown ahead in steps.
//!
//! A slot comes back through these sets, which are ordering rule 4:
//!
//! ```text
//! used --release--> pending --commit begins--> committing --commit is durable--> freed
//! used --give_back (no entry ever named it)-----------------------------------> freed
//! freed --next_freed--> being made zero, durably --cleaned--> clean --take--> used
//! ```

use crate::mem::Vector;
use crate::slots::SlotSet;
use crate::units::{ClusterSize, ImageCluster};
use crate::Error;
use core::ops::Range;

/// Answer of [`Alloc::take`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// The slot is the caller's; it reads as zeros.
    Slot(ImageCluster),
    /// The file has to be grown, or slots that came back made free, first.
    NeedSpace,
    /// No entry can name another slot, or the limit of [`Alloc::set_max`] is reached.
    Full,
}

/// Growth of the file in one step: at least this, in bytes, and a cluster, once it is as long.
pub const STEP_BYTES_MIN: u64 = 8 << 20;
/// A shorter file doubles, but grows by this at least, or by some clusters: of hundreds of clones, each with little
/// of its own, none is to take much more.
const STEP_BYTES_FIRST: u64 = 1 << 20;
/// Clusters that a file grows by at least, up to [`STEP_BYTES_MIN`].
const STEP_CLUSTERS_FIRST: u64 = 4;
/// Growth of the file in one step: at most this, in bytes, or a cluster.
pub const STEP_BYTES_MAX: u64 = 128 << 20;

/// Memory for [`Alloc::expand`].
#[derive(Debug, Default)]
pub struct Room([Vector<u64>; 4]);

impl Room {
    /// For a file of `nr` slots.
    pub fn new(nr: u32) -> Result<Self, Error> {
        let room = || SlotSet::room(nr);
        Ok(Self([room()?, room()?, room()?, room()?]))
    }
}

/// The free slots of an image file.
#[derive(Debug)]
pub struct Alloc {
    cluster: ClusterSize,
    /// No slot below this one is handed out.
    floor: ImageCluster,
    /// First slot that neither is in use nor was since the file was opened.
    head: u32,
    /// Slots inside the file.
    limit: u32,
    /// Slots that entries can name, or fewer if the user says so.
    max: u32,
    /// Released; the change of the index is in memory only.
    pending: SlotSet,
    /// Released; the change of the index is being made durable.
    committing: SlotSet,
    /// No durable entry names them; they may hold data.
    freed: SlotSet,
    /// Of those, how many are being made zero at this moment.
    nr_cleaning: u32,
    /// Free, and read as zeros.
    clean: SlotSet,
    /// The file was cut, and no slot was asked for since: it need not grow ahead.
    is_cut: bool,
}

impl Alloc {
    /// For a file of `limit` clusters whose slots from `head` on were never used and read as
    /// zeros, in a format that can name `max` slots.
    ///
    /// Memory is had here and by [`Room::new`]: the other calls are made under a spin lock.
    pub fn new(cluster: ClusterSize, head: u32, limit: u32, max: u32) -> Result<Self, Error> {
        let limit = limit.min(max);
        let set = || SlotSet::new(limit);
        Ok(Self {
            cluster,
            floor: ImageCluster(0),
            head,
            limit,
            max,
            pending: set()?,
            committing: set()?,
            freed: set()?,
            nr_cleaning: 0,
            clean: set()?,
            is_cut: false,
        })
    }

    /// Takes the lowest free slot.
    pub fn take(&mut self) -> Take {
        self.is_cut = false;
        if let Some(at) = self.clean.pop_lowest(self.floor) {
            return Take::Slot(at);
        }
        self.head = self.head.max(self.floor.0);
        if self.head < self.limit.min(self.max) {
            self.head += 1;
            return Take::Slot(ImageCluster(self.head - 1));
        }
        let comes_back = self.nr_cleaning > 0
            || [&self.pending, &self.committing, &self.freed]
                .iter()
                .any(|s| !s.is_empty());
        if self.limit < self.max || comes_back {
            Take::NeedSpace
        } else {
            Take::Full
        }
    }

    /// Takes the lowest clean slot below `below`, for what is to be moved down.
    pub fn take_below(&mut self, below: ImageCluster) -> Option<ImageCluster> {
        let at = self.clean.lowest(self.floor).filter(|at| *at < below)?;
        self.clean.remove(at);
        Some(at)
    }

    /// Takes back a slot that no entry ever named: its write failed.
    pub fn give_back(&mut self, at: ImageCluster) {
        if at >= self.floor {
            self.freed.insert(at);
        }
    }

    /// Takes back all slots of `range` but those in `used`, none of which an entry names.
    pub fn give_back_unused(&mut self, range: Range<u32>, used: &SlotSet) {
        self.freed
            .insert_gaps(range.start.max(self.floor.0)..range.end, used);
    }

    /// Takes back a slot whose entry in memory has just changed.
    pub fn release(&mut self, at: ImageCluster) {
        if at < self.floor {
            return;
        }
        if mutant!("reuse_before_commit") {
            self.freed.insert(at);
        } else {
            self.pending.insert(at);
        }
    }

    /// How many slots wait to be made zero.
    pub fn nr_freed(&self) -> u32 {
        self.freed.len()
    }

    /// Whether slots wait to be made zero.
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty()
    }

    /// Whether [`Self::take`] has one.
    pub fn has_slot(&self) -> bool {
        !self.clean.is_empty() || self.head.max(self.floor.0) < self.limit.min(self.max)
    }

    /// Whether slots wait for a commit.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// A commit begins: it will make every change of the index made so far durable.
    pub fn commit_begins(&mut self) {
        if self.committing.is_empty() {
            core::mem::swap(&mut self.pending, &mut self.committing);
        } else {
            self.committing.absorb(&mut self.pending);
        }
    }

    /// That commit has ended. Returns whether slots can be cleaned now.
    pub fn commit_ended(&mut self, durable: bool) -> bool {
        let to = if durable {
            &mut self.freed
        } else {
            &mut self.pending
        };
        to.absorb(&mut self.committing);
        !self.freed.is_empty()
    }

    /// Slots, at most `max` neighbours, to be made zero, durably, and then given to
    /// [`Self::cleaned`] or [`Self::lost`].
    pub fn next_freed(&mut self, max: u32) -> Option<Range<u32>> {
        let run = self.freed.pop_run(max)?;
        self.nr_cleaning += run.end - run.start;
        Some(run)
    }

    /// Slots of [`Self::next_freed`] could not be cleaned now, but may be later.
    pub fn not_cleaned(&mut self, run: Range<u32>) {
        self.nr_cleaning = self.nr_cleaning.saturating_sub(run.end - run.start);
        self.freed.insert_all(run.start.max(self.floor.0)..run.end);
    }

    /// Slots of [`Self::next_freed`] read as zeros, durably.
    pub fn cleaned(&mut self, run: Range<u32>) {
        self.nr_cleaning = self.nr_cleaning.saturating_sub(run.end - run.start);
        let none = SlotSet::default();
        self.clean
            .insert_gaps(run.start.max(self.floor.0)..run.end, &none);
    }

    /// Slots of [`Self::next_freed`] could not be made zero: they are left until the image is
    /// opened anew.
    pub fn lost(&mut self, run: Range<u32>) {
        self.nr_cleaning = self.nr_cleaning.saturating_sub(run.end - run.start);
    }

    /// The file should be grown before long.
    pub fn is_low(&self) -> bool {
        let left = u64::from(self.limit.saturating_sub(self.head)) + u64::from(self.clean.len());
        !self.is_cut && self.limit < self.max && left * 2 < self.step()
    }

    /// Clusters the file should have after growing by a step; `None` at the format's limit.
    pub fn target(&self) -> Option<u32> {
        self.target_of(self.step())
    }

    /// The same for the smallest growth of one cluster, for when space is short.
    pub fn target_min(&self) -> Option<u32> {
        self.target_of(1)
    }

    fn target_of(&self, step: u64) -> Option<u32> {
        if self.limit >= self.max {
            return None;
        }
        let to = u64::from(self.limit) + step;
        Some(u32::try_from(to).map_or(self.max, |t| t.min(self.max)))
    }

    /// An eighth of the file, within bounds, in clusters.
    fn step(&self) -> u64 {
        let len = self.cluster.offset(ImageCluster(self.limit));
        let first = STEP_BYTES_FIRST.max(STEP_CLUSTERS_FIRST * self.cluster.bytes());
        let least = len.clamp(first.min(STEP_BYTES_MIN), STEP_BYTES_MIN);
        self.cluster.ceil((len / 8).clamp(least, STEP_BYTES_MAX))
    }

    /// Bytes of the sets of a file of `nr` slots.
    pub fn memory_bytes(nr: u32) -> u64 {
        4 * (u64::from(nr).div_ceil(8))
    }

    /// Clusters up to which there is room.
    pub fn bound(&self) -> u32 {
        u32::try_from(self.clean.bound()).unwrap_or(u32::MAX)
    }

    /// For how many clusters to make room when the file is to have `target`; `None` if there is
    /// room. More than that, so that it is not often.
    pub fn room_wanted(&self, target: u32) -> Option<u32> {
        let more = target.saturating_add(target / 2).min(self.max.max(target));
        (target > self.bound()).then_some(more)
    }

    /// Takes `room` for its memory; what it had before is left there, to be freed by the caller.
    pub fn expand(&mut self, room: &mut Room) {
        let sets = [
            &mut self.pending,
            &mut self.committing,
            &mut self.freed,
            &mut self.clean,
        ];
        for (set, room) in sets.into_iter().zip(&mut room.0) {
            set.exchange(room);
        }
    }

    /// The file now has `limit` clusters, for which [`Self::expand`] has made room.
    pub fn grown(&mut self, limit: u32) {
        self.limit = self.limit.max(limit.min(self.max).min(self.bound()));
    }

    /// No slot below `floor` is handed out, or taken back, from here on.
    pub fn set_floor(&mut self, floor: ImageCluster) {
        self.floor = floor;
        for set in [
            &mut self.pending,
            &mut self.committing,
            &mut self.freed,
            &mut self.clean,
        ] {
            while let Some(at) = set.lowest(ImageCluster(0)).filter(|at| *at < floor) {
                set.remove(at);
            }
        }
    }

    /// Slots handed out so far, and free ones between them: what the file holds.
    pub fn used(&self) -> u32 {
        let free = [&self.pending, &self.committing, &self.freed, &self.clean];
        let free: u32 = free.iter().map(|s| s.len()).sum();
        self.head.saturating_sub(free + self.nr_cleaning)
    }

    /// At most `max` slots are used from here on; those in use stay.
    pub fn set_max(&mut self, max: u32) {
        self.max = max;
    }

    /// Gives up the free slots at the end: the file can be cut to what is returned, in clusters.
    /// Slots whose release is not durable count as in use, and what is below the floor stays if the
    /// file reaches it: it is a part of the index, whether slots above were handed out or not.
    pub fn cut(&mut self) -> u32 {
        if self.limit >= self.floor.0 {
            self.head = self.head.max(self.floor.0);
        }
        while let Some(last) = self.head.checked_sub(1).map(ImageCluster) {
            if last < self.floor || !(self.clean.remove(last) || self.freed.remove(last)) {
                break;
            }
            self.head = last.0;
        }
        self.limit = self.head;
        self.is_cut = true;
        self.head
    }

    /// The file could not be cut after [`Self::cut`]: it is as long as it was. What was free may
    /// hold data.
    pub fn uncut(&mut self, head: u32, limit: u32) {
        for at in (self.head..head).map(ImageCluster) {
            self.give_back(at);
        }
        self.head = self.head.max(head);
        self.limit = self.limit.max(limit);
        self.is_cut = false;
    }

    /// Most slots that are used from here on.
    pub fn max(&self) -> u32 {
        self.max
    }

    /// Whether the next slot is one that a commit makes free, or that is being cleaned, and nothing
    /// else can be done for one but to wait for that.
    pub fn is_waiting(&self) -> bool {
        let comes = self.nr_cleaning > 0 || !self.committing.is_empty();
        let can_do = !self.pending.is_empty() || !self.freed.is_empty() || self.limit < self.max;
        comes && !can_do && !self.has_slot()
    }

    /// First slot never handed out.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Clusters inside the file.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Slots below [`Self::head`] that are free and read as zeros.
    pub fn nr_clean(&self) -> u32 {
        self.clean.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grow(a: &mut Alloc, limit: u32) {
        a.expand(&mut Room::new(limit).unwrap());
        a.grown(limit);
    }

    #[test]
    fn ascending_until_the_end_of_the_file() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 4, 100).unwrap();
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        assert_eq!(a.take(), Take::Slot(ImageCluster(3)));
        assert_eq!(a.take(), Take::NeedSpace);
        assert_eq!((a.target(), a.target_min()), (Some(8), Some(5)));
        grow(&mut a, 12);
        assert_eq!(a.take(), Take::Slot(ImageCluster(4)));
    }

    #[test]
    fn the_format_limits() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 3, 3).unwrap();
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        assert_eq!(
            (a.take(), a.target(), a.is_low()),
            (Take::Full, None, false)
        );
        a.give_back(ImageCluster(2));
        assert_eq!(a.take(), Take::NeedSpace);
        assert_eq!(a.next_freed(9), Some(2..3));
        assert_eq!(a.take(), Take::NeedSpace);
        a.cleaned(2..3);
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        a.give_back(ImageCluster(2));
        let run = a.next_freed(9).unwrap();
        a.lost(run);
        assert_eq!(a.take(), Take::Full);
    }

    #[test]
    fn the_user_limits_below_the_end_of_the_file() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 100, 1000).unwrap();
        a.set_max(4);
        assert_eq!(a.take(), Take::Slot(ImageCluster(2)));
        assert!(a.has_slot());
        assert_eq!(a.take(), Take::Slot(ImageCluster(3)));
        assert_eq!((a.has_slot(), a.take()), (false, Take::Full));
        assert_eq!((a.is_low(), a.target()), (false, None));
        a.set_max(1000);
        assert_eq!(a.take(), Take::Slot(ImageCluster(4)));
    }

    #[test]
    fn a_released_slot_waits_for_the_commit() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 10, 20, 20).unwrap();
        a.release(ImageCluster(5));
        a.commit_begins();
        a.release(ImageCluster(6));
        assert_eq!(a.next_freed(9), None);
        assert!(!a.commit_ended(false));
        a.commit_begins();
        assert!(a.commit_ended(true));
        assert_eq!(a.next_freed(9), Some(5..7));
        assert_eq!(a.take(), Take::Slot(ImageCluster(10)));
        a.cleaned(5..7);
        assert_eq!(a.take(), Take::Slot(ImageCluster(5)));
        assert_eq!(a.take_below(ImageCluster(6)), None);
        assert_eq!(a.take_below(ImageCluster(7)), Some(ImageCluster(6)));
    }

    /// Who wanted a slot then asked again and again.
    #[test]
    fn what_a_commit_makes_free_is_waited_for() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 2, 2).unwrap();
        a.release(ImageCluster(1));
        assert_eq!((a.take(), a.is_waiting()), (Take::NeedSpace, false));
        a.commit_begins();
        assert_eq!((a.take(), a.is_waiting()), (Take::NeedSpace, true));
        a.commit_ended(true);
        assert!(!a.is_waiting());
        let run = a.next_freed(9).unwrap();
        assert_eq!((a.take(), a.is_waiting()), (Take::NeedSpace, true));
        a.not_cleaned(run);
        assert_eq!((a.nr_freed(), a.take()), (1, Take::NeedSpace));
        let run = a.next_freed(9).unwrap();
        a.cleaned(run);
        assert!(!a.is_waiting() && a.has_slot());
        // One that can grow need not wait.
        let mut a = Alloc::new(ClusterSize::DEFAULT, 2, 2, 3).unwrap();
        a.release(ImageCluster(1));
        a.commit_begins();
        assert!(!a.is_waiting());
    }

    #[test]
    fn the_end_is_cut_and_the_floor_kept() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 10, 20, 20).unwrap();
        for at in [7, 9] {
            a.give_back(ImageCluster(at));
        }
        assert_eq!(a.cut(), 9);
        assert_eq!((a.head(), a.limit()), (9, 9));
        a.give_back(ImageCluster(8));
        assert_eq!(a.cut(), 7);
        a.uncut(9, 20);
        assert_eq!((a.head(), a.limit(), a.next_freed(9)), (9, 20, Some(7..9)));
        a.cleaned(7..9);
        assert_eq!(a.cut(), 7);
        a.set_floor(ImageCluster(12));
        grow(&mut a, 20);
        assert_eq!(a.take(), Take::Slot(ImageCluster(12)));
    }

    #[test]
    fn a_file_that_was_cut_grows_when_somebody_asks() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 3, 4, 1000).unwrap();
        assert!(a.is_low());
        assert_eq!(a.cut(), 3);
        assert!(!a.is_low());
        assert_eq!(a.take(), Take::NeedSpace);
        assert!(a.is_low());
    }

    #[test]
    fn the_index_of_an_empty_image_is_not_cut() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 1, 1, 20).unwrap();
        a.set_floor(ImageCluster(3));
        assert_eq!(a.cut(), 1);
        grow(&mut a, 5);
        assert_eq!((a.cut(), a.head(), a.limit()), (3, 3, 3));
    }

    #[test]
    fn gaps_come_back_and_room_is_made_ahead() {
        let mut a = Alloc::new(ClusterSize::DEFAULT, 300, 300, 1000).unwrap();
        let mut used = SlotSet::new(300).unwrap();
        for at in [5, 130, 299] {
            used.insert(ImageCluster(at));
        }
        a.give_back_unused(3..300, &used);
        assert!(a.has_freed() && !a.has_slot());
        let runs: std::vec::Vec<_> = core::iter::from_fn(|| a.next_freed(100)).collect();
        assert_eq!(runs, [3..5, 6..106, 106..130, 131..231, 231..299]);
        for run in runs {
            a.cleaned(run);
        }
        assert_eq!((a.used(), a.nr_clean(), a.has_slot()), (3 + 3, 294, true));
        assert_eq!((a.bound(), a.room_wanted(320)), (320, None));
        assert_eq!(a.room_wanted(321), Some(481));
        assert_eq!(a.room_wanted(900), Some(1000));
    }

    #[test]
    fn steps_are_bounded() {
        for log in ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX {
            let c = ClusterSize::from_log(log).unwrap();
            for limit in [1, 1000, 1 << 22] {
                let a = Alloc::new(c, 1, limit, u32::MAX).unwrap();
                let step = c.bytes() * u64::from(a.target().unwrap() - limit);
                let len = c.offset(ImageCluster(limit));
                assert!(step <= STEP_BYTES_MAX.max(c.bytes()));
                assert!(step >= STEP_BYTES_MIN.min(len) && step >= STEP_BYTES_FIRST);
                // What has little is not given much.
                assert!(step <= (len / 8 + c.bytes()).max(STEP_BYTES_MIN));
                assert!(limit > 1 || step <= STEP_BYTES_FIRST.max(4 * c.bytes()));
            }
        }
    }
}

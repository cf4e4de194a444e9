// SPDX-License-Identifier: GPL-2.0
//! Property tests of what discards and changes of the chain rely on: sets of slots, the way of a
//! released slot, the pace of an operation, larger headers and dirty pages.

use ploop_pure::alloc::{Alloc, Take};
use ploop_pure::discard::{decide, Action, Wish};
use ploop_pure::flow::Coverage;
use ploop_pure::index::DirtyPages;
use ploop_pure::layout::ploop1::{bat_clusters, Header, Version, PAGE_SLOTS};
use ploop_pure::map::Place;
use ploop_pure::rate::Pace;
use ploop_pure::slots::SlotSet;
use ploop_pure::units::{ClusterSize, ImageCluster, Level};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeSet;

/// A call to a set of slots.
#[derive(Debug, Clone)]
enum Call {
    Insert(u32),
    Remove(u32),
    PopLowest(u32),
    PopRun(u32),
    Absorb(Vec<u32>),
    Expand(u32),
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => (0u32..400).prop_map(Call::Insert),
        2 => (0u32..400).prop_map(Call::Remove),
        2 => (0u32..400).prop_map(Call::PopLowest),
        2 => (0u32..9).prop_map(Call::PopRun),
        1 => vec(0u32..64, 0..9).prop_map(Call::Absorb),
        1 => (0u32..400).prop_map(Call::Expand),
    ]
}

fn place() -> impl Strategy<Value = Place> {
    let slot = |(level, at)| Place::Slot {
        level: Level(level),
        at: ImageCluster(at),
    };
    prop_oneof![Just(Place::Hole), (0u8..4, any::<u32>()).prop_map(slot)]
}

fn cluster() -> impl Strategy<Value = ClusterSize> {
    (ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX)
        .prop_map(|log| ClusterSize::from_log(log).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_slot_set_agrees_with_the_model(nr in 64u32..300, calls in vec(call(), 0..80)) {
        let mut set = SlotSet::new(nr).unwrap();
        let mut model = BTreeSet::new();
        for call in calls {
            let bound = set.bound();
            match call {
                Call::Insert(at) => {
                    let is_new = u64::from(at) < bound && model.insert(at);
                    prop_assert_eq!(set.insert(ImageCluster(at)), is_new);
                }
                Call::Remove(at) => {
                    prop_assert_eq!(set.remove(ImageCluster(at)), model.remove(&at));
                }
                Call::PopLowest(from) => {
                    let lowest = model.range(from..).next().copied();
                    prop_assert_eq!(set.lowest(ImageCluster(from)), lowest.map(ImageCluster));
                    prop_assert_eq!(set.pop_lowest(ImageCluster(from)), lowest.map(ImageCluster));
                    lowest.map(|at| model.remove(&at));
                }
                Call::PopRun(max) => {
                    let first = model.first().copied();
                    let run = first.map(|first| {
                        let mut end = first + 1;
                        while end - first < max && model.contains(&end) {
                            end += 1;
                        }
                        first..end
                    });
                    prop_assert_eq!(set.pop_run(max), run.clone());
                    model.retain(|at| run.as_ref().is_none_or(|r| !r.contains(at)));
                }
                Call::Absorb(slots) => {
                    let mut other = SlotSet::new(64).unwrap();
                    for at in slots {
                        other.insert(ImageCluster(at));
                        model.insert(at);
                    }
                    set.absorb(&mut other);
                    prop_assert!(other.is_empty());
                }
                Call::Expand(nr) => {
                    let mut room = SlotSet::room(nr).unwrap();
                    set.exchange(&mut room);
                    prop_assert_eq!(set.bound(), bound.max(u64::from(nr.next_multiple_of(64))));
                    prop_assert!(room.len() as u64 * 64 <= bound);
                }
            }
            prop_assert_eq!(set.len() as usize, model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert_eq!(set.lowest(ImageCluster(0)).map(|at| at.0), model.first().copied());
            for at in 0..400 {
                prop_assert_eq!(set.contains(ImageCluster(at)), model.contains(&at));
            }
        }
    }

    /// Ordering rule 4: between its release and its next use a slot sees a commit that began after
    /// the release end well, and is made clean.
    #[test]
    fn a_released_slot_is_used_again_after_a_commit_only(
        calls in vec((0u8..7, any::<u32>()), 0..300),
    ) {
        let nr = 40;
        let mut alloc = Alloc::new(ClusterSize::DEFAULT, 2, nr, nr).unwrap();
        let (mut used, mut released) = (Vec::new(), BTreeSet::new());
        let (mut durable, mut clean) = (BTreeSet::new(), BTreeSet::new());
        let mut commit: Option<BTreeSet<u32>> = None;
        let mut run = None;
        for (call, n) in calls {
            match call {
                0 | 1 => if let Take::Slot(at) = alloc.take() {
                    prop_assert!(!released.contains(&at.0) && !durable.contains(&at.0));
                    // The lowest one there is.
                    prop_assert!(clean.first().is_none_or(|lowest| *lowest == at.0));
                    clean.remove(&at.0);
                    used.push(at);
                },
                2 if !used.is_empty() => {
                    let at = used.swap_remove(n as usize % used.len());
                    released.insert(at.0);
                    alloc.release(at);
                    prop_assert!(alloc.has_pending());
                }
                3 if commit.is_none() => {
                    commit = Some(released.clone());
                    alloc.commit_begins();
                }
                4 => if let Some(covered) = commit.take() {
                    let ok = n % 4 != 0;
                    prop_assert_eq!(alloc.commit_ended(ok), (ok && !covered.is_empty()) || !durable.is_empty());
                    if ok {
                        released.retain(|at| !covered.contains(at));
                        durable.extend(covered);
                    }
                },
                5 if run.is_none() => if let Some(next) = alloc.next_freed(1 + n % 4) {
                    for at in next.clone() {
                        prop_assert!(durable.contains(&at));
                    }
                    durable.retain(|at| !next.contains(at));
                    run = Some(next);
                },
                _ => if let Some(run) = run.take() {
                    if n % 5 == 0 {
                        alloc.lost(run);
                    } else {
                        clean.extend(run.clone());
                        alloc.cleaned(run);
                    }
                },
            }
            prop_assert_eq!(alloc.nr_clean() as usize, clean.len());
        }
    }

    #[test]
    fn a_pace_keeps_the_rate(
        rate in prop_oneof![1u64..100, 1000u64..1 << 30],
        start in 0u64..1 << 40,
        steps in vec((0u64..1 << 27, prop_oneof![3 => Just(0u64), 1 => 0u64..5000]), 1..60),
    ) {
        let (mut pace, mut now, mut done) = (Pace::default(), start, 0u128);
        for (bytes, idle) in steps {
            now += idle;
            now += pace.did(bytes, rate, now);
            done += u128::from(bytes);
            let may = u128::from(now - start + 1) * u128::from(rate);
            prop_assert!(done * 1000 <= may, "{done} bytes in {} ms", now - start);
        }
    }

    #[test]
    fn a_pace_takes_any_number(steps in vec((any::<u64>(), any::<u64>(), any::<u64>(), 0u32..64), 0..20)) {
        let mut pace = Pace::default();
        for (bytes, rate, now, shift) in steps {
            let wait = pace.did(bytes, rate >> shift, now);
            prop_assert!(rate >> shift != 0 || wait == 0);
        }
    }

    #[test]
    fn a_resized_header_is_sound(
        version in select(vec![Version::V1, Version::V2]),
        cluster in cluster(),
        size in 1u64..1 << 50,
        more in 0u64..1 << 50,
        shifts in (0u32..50, 0u32..50),
    ) {
        let size = (size >> shifts.0).max(1);
        let Ok(old) = Header::new(version, cluster, size) else { return Ok(()) };
        let to = size + (more >> shifts.1);
        let fresh = Header::new(version, cluster, to);
        let Ok(new) = old.grown(to) else {
            prop_assert!(fresh.is_err());
            return Ok(());
        };
        prop_assert_eq!(Header::parse(&new.encode()), Ok(new));
        prop_assert_eq!(new.size_sectors, to);
        prop_assert!(new.nr_entries >= old.nr_entries && new.first_data >= old.first_data);
        prop_assert!(u128::from(to) <= u128::from(new.nr_entries) * u128::from(cluster.sectors()));
        prop_assert!(new.first_data.0 >= bat_clusters(cluster, new.nr_entries));
        prop_assert_eq!((new.mark, new.version, new.cluster), (old.mark, old.version, old.cluster));
        // No more than a new image of that size takes.
        let fresh = fresh.unwrap();
        prop_assert_eq!((new.nr_entries, new.first_data), (fresh.nr_entries, fresh.first_data));
        // A disk of the same size has the same header.
        prop_assert_eq!(old.grown(size), Ok(old));
        prop_assert_eq!(old.opened().grown(to).map(|h| h.mark), Ok(old.opened().mark));
    }

    #[test]
    fn more_dirty_pages_change_nothing(
        nr in 1u32..300,
        more in 0u32..300,
        marks in vec(any::<u32>(), 0..40),
        taken: bool,
    ) {
        let (mut d, mut model) = (DirtyPages::new(nr).unwrap(), BTreeSet::new());
        for page in &marks {
            d.mark(page % nr);
            model.insert(page % nr);
        }
        if taken {
            // What is in flight stays there.
            d.take_batch(0);
        }
        d.extend(more).unwrap();
        let now = nr.max(more);
        for page in 0..now {
            prop_assert_eq!(d.is_durable(page), !model.contains(&page));
        }
        d.settle(false);
        d.mark(now - 1);
        model.insert(now - 1);
        prop_assert_eq!(d.nr_dirty(), model.len());
        let (mut cursor, mut seen) = (Some(0), BTreeSet::new());
        while let Some(from) = cursor {
            cursor = d.take_batch(from);
            seen.extend(d.batch().iter().copied());
            d.settle(true);
        }
        prop_assert_eq!(seen, model);
        prop_assert!(d.is_clean() && now.div_ceil(64) * 64 <= PAGE_SLOTS);
    }

    /// Ordering rule 11, and that what is asked for comes out.
    #[test]
    fn a_discard_over_a_lower_delta_never_unmaps(
        place in place(), top in 0u8..4, is_whole: bool, keeps_space: bool, is_base: bool,
    ) {
        let coverage = if is_whole { Coverage::Whole } else { Coverage::Part };
        let top = Level(top);
        let wish = Wish { coverage, keeps_space };
        match (decide(place, wish, top, is_base), place) {
            (Action::Nothing, _) => prop_assert_eq!(place, Place::Hole),
            (Action::Unmap { at }, Place::Slot { level, at: was }) => {
                prop_assert!(is_base && is_whole && !keeps_space);
                prop_assert_eq!((level, at), (top, was));
            }
            (Action::Unmap { .. } | Action::Zero, Place::Hole) => prop_assert!(false, "of a hole"),
            (Action::Zero, Place::Slot { level, .. }) => {
                prop_assert!(!is_base || !is_whole || keeps_space || level != top);
            }
        }
    }
}

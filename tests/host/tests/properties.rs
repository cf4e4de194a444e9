// SPDX-License-Identifier: GPL-2.0
//! Property tests of `ploop_pure` against models that are too simple to be wrong.

use ploop_pure::alloc::{Alloc, Room, Take};
use ploop_pure::check::{BatScan, Length};
use ploop_pure::extent::{Run, Runs};
use ploop_pure::index::{DirtyPages, BATCH_MAX};
use ploop_pure::layout::ploop1::{
    Header, Mark, RawHeader, Version, ENTRIES_MAX, HEADER_BYTES, HEADER_SLOTS, PAGE_SLOTS,
};
use ploop_pure::lifecycle::{admit, Call, State};
use ploop_pure::offline::grow::{Census, Grow, Plan};
use ploop_pure::offline::merge::Merge;
use ploop_pure::offline::{Action, Event, Found, Machine};
use ploop_pure::problem::{Cure, Problem};
use ploop_pure::units::{Cluster, ClusterSize, ImageCluster};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeSet;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

fn version() -> impl Strategy<Value = Version> {
    select(vec![Version::V1, Version::V2])
}

fn cluster() -> impl Strategy<Value = ClusterSize> {
    (ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX)
        .prop_map(|log| ClusterSize::from_log(log).unwrap())
}

/// A header that may be made, with a size over the whole range.
fn header() -> impl Strategy<Value = Header> {
    (version(), cluster(), 1u64..1 << 50, 0u32..50)
        .prop_filter_map("too large", |(v, c, size, shift)| {
            Header::new(v, c, (size >> shift).max(1)).ok()
        })
}

/// Bytes that look like a header in most fields, so that every check is reached.
fn almost_header() -> impl Strategy<Value = [u8; HEADER_BYTES]> {
    let edge = select(vec![
        0u32,
        1,
        2,
        63,
        64,
        2048,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX - 15,
        u32::MAX - 1,
        u32::MAX,
    ]);
    let changes = vec((4usize..16, prop_oneof![edge, any::<u32>()]), 0..4);
    (header(), changes).prop_map(|(header, changes)| {
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(header.encode().as_bytes());
        for (word, value) in changes {
            bytes[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    })
}

fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Problem> {
    Header::parse(&RawHeader::read_from_bytes(bytes).unwrap())
}

/// Whatever was accepted keeps the promises that everything below relies on.
fn accepted(h: &Header) {
    assert!(h.nr_entries >= 1 && h.nr_entries <= ENTRIES_MAX);
    let covered = u128::from(h.nr_entries) * u128::from(h.cluster.sectors());
    assert!(h.size_sectors >= 1 && u128::from(h.size_sectors) <= covered);
    assert!(h.size_sectors <= i64::MAX as u64 / 512);
    assert!(h.index_bytes() <= h.cluster.offset(h.first_data));
    assert!(u64::from(h.nr_pages()) * u64::from(PAGE_SLOTS) >= u64::from(h.nr_entries) + 16);
    assert!(h.slots_max() >= 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers_round_trip(h in header(), is_empty: bool) {
        accepted(&h);
        prop_assert_eq!(Header::parse(&h.encode()), Ok(h));
        let opened = h.opened();
        prop_assert_eq!(Header::parse(&opened.encode()).unwrap().mark, Mark::InUse);
        let closed = opened.closed(is_empty);
        prop_assert_eq!(Header::parse(&closed.encode()).unwrap().mark, Mark::Closed);
    }

    #[test]
    fn damaged_headers_are_refused_or_sane(bytes in almost_header()) {
        if let Ok(h) = parse(&bytes) {
            accepted(&h);
            prop_assert_eq!(parse(&h.encode().as_bytes().try_into().unwrap()), Ok(h));
        }
    }

    #[test]
    fn random_headers_do_no_harm(bytes in any::<[[u8; 32]; 2]>(), len: u64) {
        let mut all = [0; HEADER_BYTES];
        all[..32].copy_from_slice(&bytes[0]);
        all[32..].copy_from_slice(&bytes[1]);
        if let Ok(h) = parse(&all) {
            accepted(&h);
            let _ = Length::judge(&h, len);
        }
    }

    #[test]
    fn entries_round_trip(h in header(), at in 1..u32::MAX, entry: u32) {
        let at = ImageCluster(at % h.slots_max().max(2));
        if at.0 != 0 && at.0 < h.slots_max() {
            prop_assert_eq!(h.decode_entry(h.encode_entry(at)), Ok(Some(at)));
        }
        if let Ok(Some(at)) = h.decode_entry(entry) {
            prop_assert_eq!(h.encode_entry(at), entry);
        }
    }

    #[test]
    fn lengths_are_judged(h in header(), len: u64, shift in 0u32..64) {
        let len = len >> shift;
        match Length::judge(&h, len) {
            Err(Problem::Truncated { need, have }) => prop_assert!(have == len && len < need),
            Err(p) => prop_assert!(false, "{}", p),
            Ok(l) => {
                prop_assert!(l.clusters >= h.first_data.0.min(h.slots_max()));
                prop_assert!(h.cluster.offset(ImageCluster(l.clusters)) <= len);
                prop_assert_eq!(l.torn, len % h.cluster.bytes() != 0);
            }
        }
    }
}

/// An image of 3 index pages whose entries are near the interesting values: cluster, entry, and how many
/// follow it.
fn bat() -> impl Strategy<Value = (Version, Vec<(u32, u32, u32)>, u32, bool)> {
    let entry = prop_oneof![0u32..12, 0u32..300, Just(u32::MAX), any::<u32>()];
    let following = prop_oneof![3 => Just(0u32), 1 => 0u32..200];
    let entries = vec((0u32..2500, entry, following), 0..40);
    (version(), entries, 1u32..200, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_bat_scan_agrees_with_the_model((version, entries, nr_slots, torn) in bat()) {
        let cluster = ClusterSize::from_log(ClusterSize::LOG_MIN).unwrap();
        let header = Header::new(version, cluster, 2500 * 64).unwrap();
        let first = header.first_data.0;
        let len = cluster.offset(ImageCluster(first + nr_slots)) + u64::from(torn) * 512;
        let length = Length::judge(&header, len).unwrap();
        let mut slots = vec![U32::ZERO; 3 * PAGE_SLOTS as usize];
        let unit = if version == Version::V1 { 64 } else { 1 };
        for (c, e, following) in &entries {
            // Version 1 counts sectors; most of them should be aligned.
            let e = if *e < 300 { *e * unit } else { *e };
            for n in 0..=*following {
                if let Some(slot) = slots.get_mut((c + n + HEADER_SLOTS) as usize) {
                    *slot = U32::new(e.wrapping_add(n * unit));
                }
            }
        }
        let mut scan = BatScan::new(header, length).unwrap();
        let mut out = Vec::new();
        for (page, slots) in slots.chunks(PAGE_SLOTS as usize).enumerate() {
            scan.page::<()>(page as u32, slots, |c, r| { out.push((c, r)); Ok(()) }).unwrap();
        }
        // The model.
        let (mut seen, mut want, mut end) = (BTreeSet::new(), Vec::new(), first);
        for c in 0..header.nr_entries {
            let e = slots[(c + HEADER_SLOTS) as usize].get();
            if e == 0 { continue; }
            let last = first + nr_slots;
            let r = if e % unit != 0 { Err("misaligned") }
                else if e / unit < first { Err("in header") }
                else if e / unit > last || (e / unit == last && !torn) { Err("past end") }
                else if !seen.insert(e / unit) { Err("duplicate") }
                else {
                    end = end.max(e / unit + 1);
                    if e / unit == last { Err("torn") } else { Ok(ImageCluster(e / unit)) }
                };
            want.push((Cluster(c), r));
        }
        let named = out.into_iter().map(|(c, r)| (c, r.map_err(|p| {
            assert!(!p.to_string().is_empty());
            match p {
                Problem::EntryMisaligned { .. } => "misaligned",
                Problem::EntryInHeader { .. } => "in header",
                Problem::EntryPastEnd { .. } => "past end",
                Problem::EntryDuplicate { .. } => "duplicate",
                Problem::EntryTorn { .. } => { assert_eq!(p.cure(), Cure::Lossless); "torn" }
                _ => "something else",
            }
        })));
        prop_assert_eq!(named.collect::<Vec<_>>(), want);
        prop_assert_eq!(scan.usage().end, end);
        prop_assert_eq!(scan.usage().nr_used as usize, seen.len());
        for at in 0..first + nr_slots + 2 {
            prop_assert_eq!(scan.is_used(ImageCluster(at)), seen.contains(&at));
        }
    }

    #[test]
    fn no_slot_is_handed_out_twice(
        log in ClusterSize::LOG_MIN..=ClusterSize::LOG_MAX,
        room in 0u32..40,
        max in 1u32..600,
        calls in vec(0u8..8, 0..400),
    ) {
        let cluster = ClusterSize::from_log(log).unwrap();
        let (head, max) = (3, 3 + max);
        let mut len = (head + room).min(max);
        let mut alloc = Alloc::new(cluster, head, len, max).unwrap();
        let (mut mine, mut gave_back) = (BTreeSet::new(), Vec::new());
        for call in calls {
            match call {
                0..=2 => match alloc.take() {
                    Take::Slot(at) => {
                        prop_assert!((head..len).contains(&at.0), "{at:?} is outside the file");
                        prop_assert!(!gave_back.contains(&at), "{at:?} was not cleaned");
                        prop_assert!(mine.insert(at.0), "{at:?} twice");
                    }
                    Take::NeedSpace => {
                        alloc.commit_begins();
                        alloc.commit_ended(true);
                        match alloc.next_freed(3) {
                            Some(run) => {
                                prop_assert!(run.clone().all(|at| gave_back.contains(&ImageCluster(at))));
                                gave_back.retain(|g| !run.contains(&g.0));
                                alloc.cleaned(run);
                            }
                            None => {
                                let to = alloc.target().unwrap();
                                prop_assert!(to > len && to <= max);
                                prop_assert_eq!(alloc.target_min(), Some(len + 1));
                                len = to;
                                alloc.expand(&mut Room::new(to).unwrap());
                                alloc.grown(to);
                            }
                        }
                    }
                    Take::Full => {
                        prop_assert_eq!((len, alloc.target()), (max, None));
                        prop_assert!(gave_back.is_empty());
                    }
                },
                3 => if let Some(at) = mine.pop_first() {
                    gave_back.push(ImageCluster(at));
                    alloc.give_back(ImageCluster(at));
                },
                4 => if alloc.is_low() {
                    len = alloc.target().unwrap();
                    alloc.expand(&mut Room::new(len).unwrap());
                    alloc.grown(len);
                },
                5 => if let Some(at) = mine.pop_last() {
                    gave_back.push(ImageCluster(at));
                    alloc.release(ImageCluster(at));
                },
                6 => {
                    let used = |m: &BTreeSet<u32>| m.last().map_or(head, |l| l + 1);
                    let cut = alloc.cut();
                    prop_assert!(cut >= used(&mine).min(alloc.head()));
                    gave_back.retain(|g| g.0 < cut);
                    len = cut;
                }
                _ => if let Some(run) = alloc.next_freed(2) {
                    gave_back.retain(|g| !run.contains(&g.0));
                    alloc.cleaned(run);
                },
            }
            prop_assert_eq!(alloc.limit(), len);
            prop_assert!(alloc.head() <= len && mine.iter().all(|m| *m < alloc.head()));
        }
    }

    #[test]
    fn dirty_pages_agree_with_the_model(
        nr_pages in 1u32..300,
        calls in vec((0u8..8, any::<u32>()), 0..200),
    ) {
        let mut d = DirtyPages::new(nr_pages).unwrap();
        let (mut dirty, mut flying) = (BTreeSet::new(), BTreeSet::new());
        for (call, n) in calls {
            match call {
                0..=4 => { d.mark(n % nr_pages); dirty.insert(n % nr_pages); }
                5 | 6 if flying.is_empty() => {
                    let cursor = n % nr_pages;
                    let next = d.take_batch(cursor);
                    flying = dirty.range(cursor..).take(BATCH_MAX).copied().collect();
                    dirty.retain(|p| !flying.contains(p));
                    prop_assert_eq!(d.batch(), flying.iter().copied().collect::<Vec<_>>());
                    match next {
                        None => prop_assert!(dirty.range(cursor..).next().is_none()),
                        Some(next) => prop_assert!(dirty.range(cursor..next).next().is_none()),
                    }
                }
                _ => {
                    let durable = n % 3 != 0;
                    d.settle(durable);
                    if !durable { dirty.extend(flying.iter()); }
                    flying.clear();
                }
            }
            prop_assert_eq!(d.is_clean(), dirty.is_empty() && flying.is_empty());
            for p in 0..nr_pages {
                prop_assert_eq!(d.is_durable(p), !dirty.contains(&p) && !flying.contains(&p));
            }
        }
    }

    #[test]
    fn runs_say_the_same_as_their_entries(entries in vec(prop_oneof![Just(None), (0u32..8).prop_map(Some), Just(Some(u32::MAX))], 0..60)) {
        let (mut runs, mut out) = (Runs::default(), Vec::new());
        for (c, at) in entries.iter().enumerate() {
            out.extend(runs.push(c as u32, *at));
        }
        out.extend(runs.finish());
        let mut again = Vec::new();
        for Run { cluster, at, len } in &out {
            prop_assert!(*len > 0);
            prop_assert_eq!(*cluster as usize, again.len());
            for i in 0..*len {
                again.push(at.map(|at| at + i));
            }
        }
        prop_assert_eq!(&again, &entries);
        // As few as possible.
        for pair in out.windows(2) {
            let joins = match (pair[0].at, pair[1].at) {
                (Some(a), Some(b)) => u64::from(a) + u64::from(pair[0].len) == u64::from(b),
                (None, None) => true,
                _ => false,
            };
            prop_assert!(!joins, "{:?} should be one", pair);
        }
    }

    #[test]
    fn every_call_has_an_answer_in_every_state(nr_deltas in 1usize..3, openers in 0u32..4, level in 0u32..4) {
        let states = [State::Empty, State::Stopped { nr_deltas }, State::Running { nr_deltas }];
        let calls = [
            Call::AddDelta, Call::DelDelta(level), Call::Start, Call::Stop { openers },
            Call::Clear, Call::Sync, Call::Remove { openers },
        ];
        for state in states {
            for call in calls {
                let is_running = matches!(state, State::Running { .. });
                let answer = admit(state, call);
                // What changes the chain or drops the device is never admitted while it runs.
                let changes = matches!(call, Call::AddDelta | Call::Clear | Call::Start | Call::Remove { .. });
                prop_assert!(!(changes && is_running && answer.is_ok()));
                let is_stop = matches!(call, Call::Stop { .. });
                prop_assert!(!(is_stop && answer.is_ok() && !(is_running && openers <= 1)));
                let is_remove = matches!(call, Call::Remove { .. });
                prop_assert!(!(is_remove && answer.is_ok() && (openers > 0 || state != State::Empty)));
            }
        }
    }
}

/// What an executor that is wrong in every way may answer.
fn any_event() -> impl Strategy<Value = Event> {
    let found = (any::<u32>(), any::<u32>(), any::<Option<u32>>());
    let found = found.prop_map(|(cluster, at, below)| {
        Event::Found(Found {
            cluster: Cluster(cluster),
            at: ImageCluster(at),
            below: below.map(ImageCluster),
        })
    });
    prop_oneof![
        3 => Just(Event::Ok),
        3 => found,
        1 => select(vec![Event::End, Event::Zeros, Event::Data, Event::Failed]),
    ]
}

fn usage(header: &Header, used: u32) -> ploop_pure::check::Usage {
    let nr_used = used % 5;
    ploop_pure::check::Usage {
        nr_used,
        end: header.first_data.0.saturating_add(nr_used),
    }
}

/// Header writes of a machine: the first marks, and none but the last closes.
fn marks(machine: &mut dyn Machine, events: &[Event]) {
    let mut closed = false;
    for event in std::iter::once(&Event::Ok).chain(events) {
        match machine.next(*event) {
            Action::WriteHeader(header) => {
                assert!(!closed, "a header after the last one");
                closed = header.mark == Mark::Closed;
            }
            Action::Copy { .. }
            | Action::Zero { .. }
            | Action::SetLen { .. }
            | Action::Publish { .. }
            | Action::WriteIndex => assert!(!closed, "a change after the image was closed"),
            Action::Sync
            | Action::Find { .. }
            | Action::Test { .. }
            | Action::Done
            | Action::Stopped
            | Action::Fail => {}
        }
    }
}

proptest! {
    /// A grown header is a good one, and larger.
    #[test]
    fn grown_headers_are_sound(h in header(), more in 1u64..1 << 50, shift in 0u32..50) {
        let size = h.size_sectors.saturating_add((more >> shift).max(1));
        if let Ok(Some(plan)) = Plan::new(&h, size) {
            let new = plan.header();
            prop_assert_eq!(Header::parse(&new.encode()), Ok(new));
            prop_assert_eq!(new.size_sectors, size);
            prop_assert!(new.nr_entries >= h.nr_entries && new.first_data >= h.first_data);
            let slots = u64::from(new.first_data.0) + u64::from(new.nr_entries);
            prop_assert!(slots <= u64::from(new.slots_max()));
        }
        prop_assert!(Plan::new(&h, h.size_sectors).unwrap().is_none());
        if h.size_sectors > 1 {
            prop_assert!(Plan::new(&h, h.size_sectors - 1).is_err());
        }
    }

    /// No answer makes a machine panic, or change an image that it has closed.
    #[test]
    fn machines_bear_any_executor(
        h in header(),
        used in any::<u32>(),
        nr in 0u32..20,
        events in vec(any_event(), 0..60),
    ) {
        let usage = usage(&h, used);
        if let Ok(mut merge) = Merge::into_ploop1(&h, usage, nr) {
            marks(&mut merge, &events);
        }
        marks(&mut Merge::into_raw(&h), &events);
        if let Ok(Some(plan)) = Plan::new(&h, h.size_sectors.saturating_mul(3)) {
            let last = Some(h.first_data);
            let census = Census { usage, nr_in_the_way: nr, last };
            if let Ok(mut grow) = Grow::new(plan, census) {
                marks(&mut grow, &events);
            }
        }
    }
}

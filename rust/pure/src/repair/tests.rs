// SPDX-License-Identifier: GPL-2.0
//! The planner against a model image: a plan mends, changes no good entry, and may be cut short
//! after any step.

use super::*;
use crate::check::BatScan;
use crate::layout::ploop1::Version;
use crate::units::ClusterSize;
use std::collections::BTreeMap;
use std::vec::Vec;
use zerocopy::little_endian::U32;

const CLUSTERS: u32 = 12;

#[derive(Debug, Clone, PartialEq)]
struct Model {
    header: Header,
    len: u64,
    bat: Vec<u32>,
    /// What each slot holds; absent for zeros.
    data: BTreeMap<u32, u32>,
    extension: Extension,
}

type Entries = Vec<(u32, Result<ImageCluster, Problem>)>;

fn scan(m: &Model) -> (Findings, Entries) {
    let length = Length::judge(&m.header, m.len).unwrap();
    let mut scan = BatScan::new(m.header, length).unwrap();
    let mut slots = [U32::ZERO; 1024];
    for (s, e) in slots[16..].iter_mut().zip(&m.bat) {
        *s = U32::new(*e);
    }
    let mut out = Vec::new();
    let mut tally = Tally::default();
    scan.page::<()>(0, &slots, |c, r| {
        let r = judge(&m.header, c, r);
        tally.note(&m.header, r);
        out.push((c.0, r));
        Ok(())
    })
    .unwrap();
    if tally.nr_past_disk > 0 {
        scan = BatScan::new(m.header.without_surplus(), length).unwrap();
        scan.page::<()>(0, &slots, |_, _| Ok(())).unwrap();
    }
    let first = m.header.first_data.0;
    let leaked = m
        .data
        .keys()
        .filter(|s| (first..scan.usage().end).contains(*s) && !scan.is_used(ImageCluster(**s)));
    let extension = match (m.header.mark, m.header.ext_offset) {
        (_, 0) => Extension::None,
        (Mark::ClosedV21, _) => m.extension,
        (Mark::Closed | Mark::InUse, _) => Extension::Invalid,
    };
    let nr = leaked.count() as u32;
    let (nr_leaked_data, nr_extension_slots) = match extension {
        Extension::Valid { end: Some(_) } => (0, nr),
        Extension::None | Extension::Invalid | Extension::Valid { end: None } => (nr, 0),
    };
    let found = Findings {
        header: m.header,
        len_bytes: m.len,
        length,
        usage: scan.usage(),
        tally,
        extension,
        nr_leaked_data,
        nr_extension_slots,
    };
    (found, out)
}

fn cluster_bytes(m: &Model) -> u64 {
    m.header.cluster.bytes()
}

fn apply(m: &mut Model, plan: &Plan, step: Step) {
    match step {
        Step::Mark => m.header = plan.marked(),
        Step::Extend { len_bytes, .. } => {
            assert!(len_bytes >= m.len);
            m.len = len_bytes;
        }
        Step::Zero { .. } | Step::Forget { .. } | Step::Copy { .. } | Step::Move { .. } => {
            let mut fixer = plan.fixer();
            for (cluster, r) in scan(m).1 {
                let Some(fix) = r.err().and_then(|p| fixer.fix(p)) else {
                    continue;
                };
                match (step, fix) {
                    (Step::Copy { .. }, Fix::Copy { from, to }) => {
                        m.data.remove(&to.0);
                        if let Some(tag) = m.data.get(&from.0).copied() {
                            m.data.insert(to.0, tag);
                        }
                        m.len = m.len.max((u64::from(to.0) + 1) * cluster_bytes(m));
                    }
                    (Step::Zero { .. }, Fix::Zero) | (Step::Forget { .. }, Fix::Forget) => {
                        m.bat[cluster as usize] = 0
                    }
                    (Step::Move { .. }, Fix::Copy { to, .. }) => {
                        m.bat[cluster as usize] = m.header.encode_entry(to)
                    }
                    _ => {}
                }
            }
        }
        Step::Truncate { len_bytes, .. } => {
            assert!(len_bytes < m.len);
            m.len = len_bytes;
            let end = (len_bytes / cluster_bytes(m)) as u32;
            m.data.retain(|slot, _| *slot < end);
        }
        Step::Punch { .. } => {
            let named = m.bat.clone();
            let header = m.header;
            m.data
                .retain(|slot, _| named.contains(&header.encode_entry(ImageCluster(*slot))));
        }
        Step::Close { .. } => m.header = plan.closed(),
    }
}

/// What the guest reads from each cluster whose entry is good.
fn guest(m: &Model) -> BTreeMap<u32, Option<u32>> {
    let good = |(c, r): (u32, Result<ImageCluster, Problem>)| {
        let at = r.ok()?;
        Some((c, m.data.get(&at.0).copied()))
    };
    scan(m).1.into_iter().filter_map(good).collect()
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

fn random(rng: &mut Rng) -> Model {
    let version = [Version::V1, Version::V2][rng.below(2) as usize];
    let cluster = ClusterSize::from_log(6 + rng.below(3) as u32).unwrap();
    let size = u64::from(CLUSTERS * cluster.sectors());
    let mut header = Header::new(version, cluster, size).unwrap();
    let clusters = 1 + rng.below(16);
    let torn = if rng.below(3) == 0 {
        rng.below(cluster.bytes())
    } else {
        0
    };
    let mut bat = Vec::new();
    for _ in 0..CLUSTERS {
        bat.push(match rng.below(10) {
            0 => rng.below(1 << 32) as u32,
            1..=4 => 0,
            _ => header.encode_entry(ImageCluster(rng.below(clusters + 2) as u32)),
        });
    }
    if rng.below(3) == 0 {
        header.size_sectors -= rng.below(u64::from(5 * cluster.sectors()));
    }
    if rng.below(3) > 0 {
        header = header.not_empty();
    }
    header.mark = [Mark::Closed, Mark::ClosedV21, Mark::InUse][rng.below(3) as usize];
    let mut extension = Extension::None;
    if rng.below(3) == 0 {
        header.ext_offset = u64::from(cluster.sectors()) * clusters.max(2);
        extension = match rng.below(3) {
            0 => Extension::Invalid,
            1 => Extension::Valid {
                end: Some(clusters as u32),
            },
            _ => Extension::Valid { end: None },
        };
    }
    Model {
        header,
        len: clusters * cluster.bytes() + torn,
        bat,
        data: (1..clusters as u32).map(|s| (s, s + 100)).collect(),
        extension,
    }
}

#[test]
fn a_plan_mends_and_changes_no_good_entry() {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let mut nr_plans = 0;
    for _ in 0..20_000 {
        let before = random(&mut rng);
        let good = guest(&before);
        for scope in [Scope::Needed, Scope::All] {
            let (found, entries) = scan(&before);
            let Some(plan) = Plan::new(&found, scope) else {
                // These do not stand in the way.
                let is_soft = |e: &Result<_, _>| matches!(e, Err(Problem::EntryPastDisk { .. }));
                assert!(entries.iter().all(|e| e.1.is_ok() || is_soft(&e.1)));
                let is_image_soft =
                    |p: Problem| matches!(p, Problem::Extension { .. } | Problem::EmptyFlag);
                assert!(found.problems().all(is_image_soft));
                assert!(scope == Scope::Needed || found.cure().is_none());
                continue;
            };
            nr_plans += 1;
            let mut m = before.clone();
            plan.steps().for_each(|s| apply(&mut m, &plan, s));
            let (after, entries) = scan(&m);
            assert!(entries.iter().all(|e| e.1.is_ok()), "{before:?} {m:?}");
            assert_eq!(after.cure(), None, "{before:?} {m:?}");
            assert!(Plan::new(&after, Scope::Needed).is_none());
            if scope == Scope::All {
                assert!(Plan::new(&after, scope).is_none(), "{before:?} {m:?}");
            }
            let now = guest(&m);
            for (c, data) in &good {
                assert_eq!(now.get(c), Some(data), "{before:?} {m:?}");
                assert_eq!(m.bat[*c as usize], before.bat[*c as usize]);
            }
            // A duplicate reads the same as its twin.
            let end = before.header.disk_clusters();
            for (c, r) in scan(&before).1 {
                if c >= end {
                    assert_eq!(m.bat[c as usize], 0);
                } else if let Err(Problem::EntryDuplicate { at, .. }) = r {
                    let twin = before.data.get(&at).copied();
                    assert_eq!(now.get(&c), Some(&twin));
                }
            }
            let is_lossy = |r: &Result<_, Problem>| r.is_err_and(|p| p.cure() == Cure::Lossy);
            let lossy = scan(&before).1.iter().any(|(_, r)| is_lossy(r));
            assert_eq!(plan.cure() == Cure::Lossy, lossy);
        }
    }
    assert!(nr_plans > 10_000);
}

#[test]
fn a_plan_cut_short_is_finished_by_the_next() {
    let mut rng = Rng(77);
    for _ in 0..5_000 {
        let before = random(&mut rng);
        let good = guest(&before);
        let (found, _) = scan(&before);
        let Some(plan) = Plan::new(&found, Scope::All) else {
            continue;
        };
        for cut in 0..=plan.steps().count() {
            let mut m = before.clone();
            plan.steps().take(cut).for_each(|s| apply(&mut m, &plan, s));
            let now = guest(&m);
            assert!(good.iter().all(|(c, d)| now.get(c) == Some(d)));
            if let Some(rest) = Plan::new(&scan(&m).0, Scope::All) {
                rest.steps().for_each(|s| apply(&mut m, &rest, s));
            }
            assert_eq!(scan(&m).0.cure(), None);
            let now = guest(&m);
            assert!(good.iter().all(|(c, d)| now.get(c) == Some(d)));
        }
    }
}

/// A valid extension survives what does not change data, and only that.
#[test]
fn a_valid_extension_is_kept() {
    let cluster = ClusterSize::DEFAULT;
    let mut header = Header::new(Version::V2, cluster, 2048 * 10).unwrap();
    header.mark = Mark::ClosedV21;
    header.flags = 0;
    header.ext_offset = 2048 * 3;
    let mut m = Model {
        header,
        len: cluster.bytes() * 4,
        bat: std::vec![1, 0, 2],
        data: BTreeMap::new(),
        extension: Extension::Valid { end: Some(4) },
    };
    assert!(Plan::new(&scan(&m).0, Scope::All).is_none());
    m.len += 7;
    let plan = Plan::new(&scan(&m).0, Scope::All).unwrap();
    let cut = Step::Truncate {
        len_bytes: cluster.bytes() * 4,
        from_bytes: cluster.bytes() * 4 + 7,
    };
    assert_eq!(plan.steps().collect::<Vec<_>>(), [cut]);
    m.bat[1] = 99;
    let plan = Plan::new(&scan(&m).0, Scope::All).unwrap();
    plan.steps().for_each(|s| apply(&mut m, &plan, s));
    assert_eq!((m.header.ext_offset, m.len), (0, cluster.bytes() * 3));
}

/// What nobody could read is no reason to drop the extension, and neither is the flag.
#[test]
fn what_is_past_the_disk_is_forgotten() {
    let cluster = ClusterSize::DEFAULT;
    let mut header = Header::new(Version::V2, cluster, 2048 * 10).unwrap();
    header.mark = Mark::ClosedV21;
    header.ext_offset = 2048 * 3;
    header.size_sectors = 2048 + 1;
    let before = Model {
        header,
        len: cluster.bytes() * 6,
        bat: std::vec![1, 2, 5, 4],
        data: (1..6).map(|s| (s, s)).collect(),
        extension: Extension::Valid { end: Some(4) },
    };
    let (found, _) = scan(&before);
    assert_eq!((found.tally.nr_past_disk, found.usage.end), (2, 3));
    assert!(found.problems().eq([Problem::EmptyFlag]));
    assert_eq!(found.cure(), Some(Cure::Lossless));
    assert!(Plan::new(&found, Scope::Needed).is_none());
    let plan = Plan::new(&found, Scope::All).unwrap();
    let steps = [
        Step::Forget { nr: 2 },
        Step::Truncate {
            len_bytes: cluster.bytes() * 4,
            from_bytes: cluster.bytes() * 6,
        },
        Step::Close {
            clears_mark: false,
            clears_flag: true,
            drops_extension: false,
        },
    ];
    assert!(plan.steps().eq(steps) && plan.cure() == Cure::Lossless);
    let mut m = before.clone();
    plan.steps().for_each(|s| apply(&mut m, &plan, s));
    assert_eq!(m.header, header.not_empty());
    let (after, _) = scan(&m);
    assert!(after.cure().is_none() && after.problems().next().is_none());
    assert!(guest(&m) == guest(&before));
}

// SPDX-License-Identifier: GPL-2.0
//! What is found after a power cut, and whether it may be so.

use super::blocks::{Blocks, PAGE_SECTORS, WORDS};
use super::disk::{Image, Stamp};
use super::engine::{Engine, File, Places};
use super::guest::Slot;
use super::Config;
use crate::rng::Rng;
use ploop_pure::check::{BatScan, Length};
use ploop_pure::layout::ploop1::{Header, Mark, RawHeader, HEADER_BYTES};
use ploop_pure::problem::Problem;
use ploop_pure::repair::{self, Extension, Findings, Tally};
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

/// An image as judged after a power cut.
#[derive(Clone)]
pub struct Found {
    /// Number of the file.
    pub id: u32,
    /// What the file holds.
    pub image: Image,
    /// Its header.
    pub header: Header,
    /// Slot of each cluster of the workload.
    pub places: Places,
    /// What the check found out; none is made of a raw image.
    pub findings: Option<Findings>,
}

/// Cuts the power and judges what is found: the chain, base first.
pub fn cut(cfg: &Config, e: &Engine<'_>, rng: &mut Rng) -> Result<Vec<Found>, String> {
    let mut chain = Vec::new();
    for file in &e.files {
        chain.push(found(cfg, file, &e.blocks, rng)?);
    }
    judge(cfg, e, &chain)?;
    if let Some((at, file)) = &e.taken_out {
        // Who lists the chain may not have heard of it.
        let mut longer = chain.clone();
        longer.insert(*at, found(cfg, file, &e.blocks, rng)?);
        judge(cfg, e, &longer).map_err(|what| format!("with the source: {what}"))?;
        if rng.chance(50) {
            chain = longer;
        }
    }
    if let Some(file) = &e.outside {
        let outside = found(cfg, file, &e.blocks, rng)?;
        if outside.places.iter().any(Option::is_some) {
            return Err("an image that is not in the chain holds a cluster".into());
        }
    }
    let Some((_, lower)) = chain.split_last() else {
        return Ok(chain);
    };
    if e.old_is_enough {
        judge(cfg, e, lower).map_err(|what| format!("the old top alone: {what}"))?;
        // Whoever was not told that the snapshot is done may go on without it.
        if rng.chance(50) {
            chain.pop();
        }
    } else if let Some(sealed) = &e.sealed {
        for (n, want) in sealed.iter().enumerate() {
            let (cluster, s) = (n / cfg.cluster_sectors(), n % cfg.cluster_sectors());
            let have = read(cfg, lower, cluster, s);
            if have != *want {
                return Err(format!(
                    "cluster {cluster} sector {s} of the snapshot reads {have}, was {want}"
                ));
            }
        }
    }
    Ok(chain)
}

/// Every promise to the guest is held by this chain.
fn judge(cfg: &Config, e: &Engine<'_>, chain: &[Found]) -> Result<(), String> {
    for cluster in 0..cfg.nr_clusters {
        let slot = holder(chain, cluster).map(|(_, slot)| slot);
        e.guest
            .judge(cluster, slot, |s| read(cfg, chain, cluster, s))?;
    }
    Ok(())
}

/// The highest image that has the cluster, and its slot there.
fn holder(chain: &[Found], cluster: usize) -> Option<(&Found, Slot)> {
    let has = |f: &Found| f.places[cluster].map(|at| (f.id, at.0));
    chain.iter().rev().find_map(|f| Some((f, has(f)?)))
}

/// What a reader finds in all sectors.
pub fn contents(cfg: &Config, chain: &[Found]) -> Vec<Stamp> {
    let nr = cfg.cluster_sectors();
    let sectors = 0..cfg.nr_clusters * nr;
    sectors.map(|s| read(cfg, chain, s / nr, s % nr)).collect()
}

/// What a reader of a chain finds in a sector of a cluster.
pub fn read(cfg: &Config, chain: &[Found], cluster: usize, s: usize) -> Stamp {
    match holder(chain, cluster) {
        Some((found, (_, at))) => found.image.get(at as usize * cfg.cluster_sectors() + s),
        None => cfg.read_below(cluster, s),
    }
}

/// Cuts the power of one file, and judges it by itself.
pub fn found(cfg: &Config, file: &File, blocks: &Blocks, rng: &mut Rng) -> Result<Found, String> {
    let mut image = Image {
        sectors: Vec::new(),
        len: 0,
    };
    file.disk.crash(rng, &mut image);
    if file.is_raw {
        return Ok(Found {
            id: file.id,
            image,
            header: file.header,
            places: cfg.own_slots(),
            findings: None,
        });
    }
    let header = header_of(&image, blocks)?;
    if header.mark != Mark::InUse && !file.closed.iter().any(|c| same(c, &image, blocks)) {
        return Err("a changed image is not marked in use".into());
    }
    let (places, findings) = scan(cfg, &image, header, blocks)?;
    Ok(Found {
        id: file.id,
        image,
        header,
        places,
        findings: Some(findings),
    })
}

/// The project's own check must have nothing to say but what costs nothing to mend.
fn scan(
    cfg: &Config,
    image: &Image,
    header: Header,
    blocks: &Blocks,
) -> Result<(Places, Findings), String> {
    let problem = |p: Problem| format!("after the power cut: {p}");
    let len_bytes = image.len as u64 * 512;
    let length = Length::judge(&header, len_bytes).map_err(problem)?;
    let mut scan = BatScan::new(header, length).map_err(|e| format!("{e:?}"))?;
    let mut places = vec![None; cfg.nr_clusters];
    let mut tally = Tally::default();
    for page in 0..header.nr_pages() {
        let first = page as usize * PAGE_SECTORS;
        if (first..first + PAGE_SECTORS).all(|s| image.get(s) == 0) {
            continue;
        }
        let mut slots = [U32::ZERO; PAGE_SECTORS * WORDS];
        for (s, block) in slots.chunks_exact_mut(WORDS).enumerate() {
            let stamp = image.get(first + s);
            let words = blocks.get(stamp).ok_or("data stands where the index is")?;
            for (slot, word) in block.iter_mut().zip(words) {
                *slot = U32::new(word);
            }
        }
        scan.page(page, &slots, |cluster, place| {
            let judged = repair::judge(&header, cluster, place);
            tally.note(&header, judged);
            let place = judged.map_err(problem)?;
            let i = (0..places.len()).find(|i| cfg.cluster(*i) == cluster);
            let i = i.ok_or(format!("{cluster:?} is mapped but was never written"))?;
            places[i] = Some(place);
            Ok::<(), String>(())
        })?;
    }
    let findings = Findings {
        header,
        len_bytes,
        length,
        usage: scan.usage(),
        tally,
        extension: Extension::None,
        nr_leaked_data: 0,
        nr_extension_slots: 0,
    };
    Ok((places, findings))
}

/// The header of an image.
pub(super) fn header_of(image: &Image, blocks: &Blocks) -> Result<Header, String> {
    let words = blocks
        .get(image.get(0))
        .ok_or("data stands where the header is")?;
    let mut bytes = [0; HEADER_BYTES];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let raw = RawHeader::read_from_bytes(&bytes).map_err(|e| format!("{e:?}"))?;
    Header::parse(&raw).map_err(|p| format!("after the power cut: {p}"))
}

/// Whether two images have the same bytes; page 0, written with the header, is compared by content.
pub(super) fn same(a: &Image, b: &Image, blocks: &Blocks) -> bool {
    let is_same = |s: usize, x: Stamp, y: Stamp| {
        x == y || (s < PAGE_SECTORS && x != 0 && y != 0 && blocks.get(x) == blocks.get(y))
    };
    a.len == b.len && (0..a.len).all(|s| is_same(s, a.get(s), b.get(s)))
}

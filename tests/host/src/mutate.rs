// SPDX-License-Identifier: GPL-2.0
//! Damages images in many ways, and shows that the module refuses or serves each of them as
//! `ploop_pure` judges it, without harm.

use crate::cli::{parse, Failure, Outcome, Words};
use crate::dev::Buffer;
use crate::device::{add_delta, Device};
use crate::rng::Rng;
use ploop_pure::abi;
use ploop_pure::check::{BatScan, Length};
use ploop_pure::layout::ploop1::{
    Header, Mark, RawHeader, CLOSED_V21, HEADER_BYTES, HEADER_SLOTS, IN_USE, MAGIC_V1, MAGIC_V2,
    PAGE_SLOTS,
};
use ploop_pure::problem::Problem;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use zerocopy::little_endian::U32;
use zerocopy::FromBytes;

fn put(image: &mut [u8], word: usize, value: u32) {
    if let Some(bytes) = image.get_mut(word * 4..word * 4 + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

fn word(image: &[u8], at: usize) -> u32 {
    let bytes = image.get(at * 4..at * 4 + 4);
    bytes.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Values that are special for a field that holds `old`.
fn edge(rng: &mut Rng, old: u32) -> u32 {
    let edges = [
        0,
        1,
        2,
        old.wrapping_add(1),
        old.wrapping_sub(1),
        old.wrapping_mul(2),
        old / 2,
        63,
        64,
        2048,
        1 << 17,
        1 << 18,
        i32::MAX as u32,
        1 << 31,
        u32::MAX - 15,
        u32::MAX,
        IN_USE,
        CLOSED_V21,
    ];
    match rng.below(5) {
        0 => rng.bits() as u32,
        _ => edges[rng.pick(edges.len())],
    }
}

/// Damages `image` in one to three ways.
pub fn damage(rng: &mut Rng, image: &mut Vec<u8>) {
    for _ in 0..=rng.below(3) {
        damage_once(rng, image);
    }
}

fn damage_once(rng: &mut Rng, image: &mut Vec<u8>) {
    if image.len() < HEADER_BYTES {
        return;
    }
    let nr_entries = word(image, 8).clamp(1, 4096) as usize;
    let entry = HEADER_SLOTS as usize + rng.pick(nr_entries);
    match rng.below(12) {
        0..=2 => {
            let field = rng.pick(HEADER_SLOTS as usize);
            let value = edge(rng, word(image, field));
            put(image, field, value);
        }
        3 => image[rng.pick(HEADER_BYTES)] ^= 1 << rng.below(8),
        4 => {
            let magic = if image[..16] == MAGIC_V1 {
                MAGIC_V2
            } else {
                MAGIC_V1
            };
            image[..16].copy_from_slice(&magic);
        }
        5 | 6 => {
            let value = edge(rng, word(image, entry));
            put(image, entry, value);
        }
        7 => {
            let other = HEADER_SLOTS as usize + rng.pick(nr_entries);
            let value = word(image, other);
            put(image, entry, value);
        }
        8 => {
            let len = (nr_entries * 4).min(image.len() - HEADER_BYTES);
            let at = HEADER_BYTES + rng.pick(len.max(1));
            let end = (at + 1 + rng.pick(64)).min(image.len());
            rng.fill(&mut image[at..end]);
        }
        9 => image.truncate(rng.pick(image.len())),
        10 => image.truncate(image.len() - rng.pick(40_000).min(image.len())),
        _ => image.resize(image.len() + rng.pick(40_000), 0x5a),
    }
}

/// `mutate --seed S IN OUT`
pub fn mutate(mut words: Words) -> Outcome {
    let seed = parse(&words.needed("--seed")?)?;
    let [from, to] = words.operands()?;
    let mut image = std::fs::read(from)?;
    damage(&mut Rng::new(seed), &mut image);
    std::fs::write(to, image)?;
    Ok(())
}

/// What `ploop_pure` says of the image: the header if nothing is wrong.
fn judge(image: &[u8]) -> Result<Header, Problem> {
    let have = image.len() as u64;
    let need = HEADER_BYTES as u64;
    let raw = RawHeader::read_from_prefix(image);
    let (raw, _) = raw.map_err(|_| Problem::Truncated { need, have })?;
    let header = Header::parse(&raw)?;
    let length = Length::judge(&header, have)?;
    if header.mark == Mark::InUse {
        return Err(Problem::InUse);
    }
    if length.torn {
        return Err(Problem::TornTail { len: have });
    }
    let mut scan = match BatScan::new(header, length) {
        Ok(scan) => scan,
        Err(_) => return Err(Problem::SizeLimit { size_sectors: 0 }),
    };
    for page in 0..header.nr_pages() {
        let at = page as usize * PAGE_SLOTS as usize;
        let slots: Vec<_> = (at..at + PAGE_SLOTS as usize)
            .map(|i| U32::new(word(image, i)))
            .collect();
        scan.page(page, &slots, |_, place| place.map(drop))?;
    }
    Ok(header)
}

/// `corpus --seed S --count N IMAGE SCRATCH`: damages copies of IMAGE as the file SCRATCH and
/// attaches each past the tool.
pub fn corpus(mut words: Words) -> Outcome {
    let seed = words.number("--seed", 1)?;
    let count = words.number("--count", 200)?;
    let [from, scratch] = words.operands()?;
    let good = std::fs::read(from)?;
    let mut tally = BTreeMap::new();
    let mut device = Device::add()?;
    for seed in seed..seed + count {
        let mut image = good.clone();
        damage(&mut Rng::new(seed), &mut image);
        std::fs::write(&scratch, &image)?;
        let outcome = one(&mut device, Path::new(&scratch), &image)
            .map_err(|what| Failure::Broken(format!("seed {seed}: {what}")))?;
        *tally.entry(outcome).or_insert(0u32) += 1;
    }
    device.remove()?;
    for (outcome, nr) in &tally {
        println!("{nr:5} {outcome}");
    }
    if !tally.contains_key("served") || tally.len() < 2 {
        return Err(Failure::Broken("the corpus is one-sided".into()));
    }
    Ok(())
}

/// Attaches one image, uses it if it is served. The answer names what happened.
fn one(device: &mut Device, path: &Path, image: &[u8]) -> Result<String, String> {
    let io = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    let judged = judge(image);
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(io("open"))?;
    let cluster_log = word(image, 7).checked_ilog2().unwrap_or(0);
    let delta = add_delta(&file, abi::FORMAT_PLOOP1, cluster_log, 0);
    match (device.attach(&delta), judged) {
        (Ok(()), Ok(header)) => {
            let used = using(device, &header);
            device.detach().map_err(io("detach"))?;
            used.map_err(io("using the disk"))?;
            let now = std::fs::read(path).map_err(io("read"))?;
            judge(&now).map_err(|p| format!("was good and is not after use: {p}"))?;
            Ok("served".into())
        }
        (Ok(()), Err(p)) => {
            device.detach().map_err(io("detach"))?;
            Err(format!("served, although {p}"))
        }
        (Err(e), judged) => {
            let now = std::fs::read(path).map_err(io("read"))?;
            if now != image {
                return Err(format!("refused ({e}), but changed"));
            }
            match (judged, e.raw_os_error()) {
                // A map of that size is over the module's limit.
                (Ok(_), Some(libc::ENOMEM)) => Ok("refused for memory".into()),
                (Ok(_), _) => Err(format!("refused ({e}), although nothing is wrong")),
                (Err(Problem::InUse), Some(libc::EBUSY)) => Ok("refused: marked in use".into()),
                (Err(_), Some(libc::EINVAL)) => Ok("refused: invalid".into()),
                (Err(p), _) => Err(format!("refused with '{e}' because {p}")),
            }
        }
    }
}

/// Reads the begin, the end and places between, writes some of them, makes it durable.
fn using(device: &Device, header: &Header) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let mut disk = options.custom_flags(libc::O_DIRECT).open(device.path())?;
    let len = disk.seek(SeekFrom::End(0))? & !4095;
    let mut buffer = Buffer::new(16);
    let step = (len / 24).max(header.cluster.bytes()) & !4095;
    let mut at = 0;
    while at + 65536 <= len {
        disk.read_exact_at(buffer.bytes(), at)?;
        at += step;
    }
    if len >= 65536 {
        disk.read_exact_at(buffer.bytes(), len - 65536)?;
        let mut rng = Rng::new(len);
        for _ in 0..4 {
            let at = rng.below((len - 65536) / 4096 + 1) * 4096;
            rng.fill(&mut buffer.bytes()[..4096]);
            disk.write_all_at(&buffer.bytes()[..4096], at)?;
        }
    }
    disk.sync_all()
}

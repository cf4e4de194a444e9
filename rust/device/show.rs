// SPDX-License-Identifier: GPL-2.0
//! What sysfs shows of a device: `pstate/`, `pdelta/LEVEL/` and `ptune/`, as libploop reads them.

use super::Device;
use crate::{
    engine::Stats,
    sys::{
        gen_disk::DiskRef,
        prelude::*,
        sysfs::{Dir, Files, Output, ShowFiles},
    },
};
use core::fmt::Write;

static STATE_FILES: Files<Device, 1, 14> = Files::new([
    c"aborted",
    c"allocated_clusters",
    c"block_size",
    c"commits",
    c"cookie",
    c"discard_mode",
    c"fmt_version",
    c"freeze_state",
    c"index_pages",
    c"locked",
    c"map_pages",
    c"open_count",
    c"running",
    c"total_bios",
]);
static TOP_FILES: Files<Device, 1, 1> = Files::new([c"top"]);
static TUNE_FILES: Files<Device, 1, 1> = Files::new([c"discard_granularity"]);
static DELTA_FILES: Files<Device, 2, 7> = Files::new([
    c"format",
    c"image",
    c"image_info",
    c"io",
    c"level",
    c"ro",
    c"transparent",
]);

/// The folders of a device. Fields are dropped in this order: children first.
pub(super) struct Folders {
    levels: KVec<Dir<Device, 2>>,
    delta: Option<Dir<Device, 1>>,
    _state: Option<Dir<Device, 1>>,
    _tune: Option<Dir<Device, 1>>,
}

impl Folders {
    /// None.
    pub(super) fn new() -> Self {
        Self {
            levels: KVec::new(),
            delta: None,
            _state: None,
            _tune: None,
        }
    }

    /// Makes those that every device has.
    pub(super) fn add_state(&mut self, disk: DiskRef<'_, Device>) -> Result {
        let state = Dir::of_disk(disk, c"pstate")?;
        state.add(&STATE_FILES)?;
        state.add(&TOP_FILES)?;
        let tune = Dir::of_disk(disk, c"ptune")?;
        tune.add(&TUNE_FILES)?;
        self._state = Some(state);
        self._tune = Some(tune);
        self.delta = Some(Dir::of_disk(disk, c"pdelta")?);
        Ok(())
    }

    /// Makes that of the delta of a level.
    pub(super) fn add_delta(&mut self, level: usize) -> Result {
        let parent = self.delta.as_ref().ok_or(ENODEV)?;
        let name = CString::try_from_fmt(fmt!("{level}"))?;
        let dir = parent.dir(&name)?;
        dir.add(&DELTA_FILES)?;
        Ok(self.levels.push(dir, GFP_KERNEL)?)
    }

    /// Removes those of the deltas from level `keep` on, after their readers.
    pub(super) fn truncate(&mut self, keep: usize) {
        self.levels.truncate(keep);
    }
}

impl ShowFiles for Device {
    fn show(disk: DiskRef<'_, Self>, dir: &CStr, file: &CStr, out: &mut Output<'_>) -> Result {
        match dir.to_bytes() {
            b"pstate" => show_state(disk, file, out),
            b"ptune" => Ok(writeln!(
                out,
                "{}",
                disk.driver().view.lock().cluster_bytes()
            )?),
            level => {
                let level = core::str::from_utf8(level).map_err(|_| EINVAL)?;
                show_delta(disk.driver(), level.parse().map_err(|_| EINVAL)?, file, out)
            }
        }
    }
}

impl super::View {
    fn cluster_bytes(&self) -> u64 {
        u64::from(self.cluster_sectors) << SECTOR_SHIFT
    }
}

fn show_state(disk: DiskRef<'_, Device>, file: &CStr, out: &mut Output<'_>) -> Result {
    let this = disk.driver();
    let view = this.view.lock().clone();
    let engine = view.engine.as_deref();
    let count = |f: fn(&Stats) -> &Atomic<u64>| {
        engine.map_or(0, |e| f(&e.shared().stats).load(Relaxed))
    };
    let number = match file.to_bytes() {
        b"aborted" => engine.is_some_and(|e| e.is_poisoned()).into(),
        b"allocated_clusters" => count(|s| &s.allocated),
        b"block_size" => view.cluster_sectors.into(),
        b"commits" => count(|s| &s.commits),
        b"cookie" => {
            let len = view.cookie.iter().position(|b| *b == 0).unwrap_or(0);
            let text = view.cookie.get(..len).unwrap_or(&[]);
            return show_bytes(text, out);
        }
        b"fmt_version" => view.version.into(),
        b"index_pages" => count(|s| &s.index_pages),
        b"map_pages" => engine.map_or(0, |e| e.chain.nr_map_pages().unsigned_abs()),
        b"open_count" => disk.openers().into(),
        b"running" => engine.is_some().into(),
        b"top" => match this.infos.lock().len() {
            // As OpenVZ shows "no deltas".
            0 => u64::from(u32::MAX),
            nr => nr as u64 - 1,
        },
        b"total_bios" => count(|s| &s.requests),
        b"locked" => this.is_reserved().into(),
        // Always off: no discard mode, no frozen file systems.
        b"discard_mode" | b"freeze_state" => 0,
        _ => return Err(EINVAL),
    };
    Ok(writeln!(out, "{number}")?)
}

fn show_delta(this: &Device, level: usize, file: &CStr, out: &mut Output<'_>) -> Result {
    let info = {
        let infos = this.infos.lock();
        infos.get(level).ok_or(ENOENT)?.clone()
    };
    match file.to_bytes() {
        b"format" => writeln!(out, "{}", info.format)?,
        b"image" => return show_bytes(&info.path, out),
        b"image_info" => {
            let (major, minor) = info.identity.dev;
            writeln!(out, "ino:{}\nsdev:{major}:{minor}", info.identity.ino)?;
        }
        b"io" => writeln!(out, "{}", info.io)?,
        b"level" => writeln!(out, "{level}")?,
        b"ro" => writeln!(out, "{}", u8::from(info.read_only))?,
        // The source of a running merge; none runs.
        b"transparent" => writeln!(out, "0")?,
        _ => return Err(EINVAL),
    }
    Ok(())
}

/// Bytes as they are; a path need not be UTF-8.
fn show_bytes(bytes: &[u8], out: &mut Output<'_>) -> Result {
    for chunk in bytes.utf8_chunks() {
        out.write_str(chunk.valid())?;
        for byte in chunk.invalid() {
            write!(out, "\\x{byte:02x}")?;
        }
    }
    Ok(out.write_str("\n")?)
}

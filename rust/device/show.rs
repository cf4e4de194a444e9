// SPDX-License-Identifier: GPL-2.0
//! What sysfs shows of a device: `pstate/`, `pdelta/LEVEL/` and `ptune/`, as libploop reads them.

use super::Device;
use crate::{
    engine::{
        events::{Event, Space},
        Stats,
    },
    sys::{
        gen_disk::DiskRef,
        prelude::*,
        sysfs::{Dir, Files, Output, ShowFiles},
    },
};
use core::fmt::Write;
use ploop_pure::units::Level;

static STATE_FILES: Files<Device, 1, 20> = Files::new([
    c"aborted",
    c"allocated_clusters",
    c"block_size",
    c"cloned_clusters",
    c"commits",
    c"cookie",
    c"discard_mode",
    c"discarded_clusters",
    c"fmt_version",
    c"freeze_state",
    c"index_pages",
    c"inline_bios",
    c"io_errors",
    c"locked",
    c"maintenance",
    c"map_pages",
    c"open_count",
    c"running",
    c"space",
    c"total_bios",
]);
static TOP_FILES: Files<Device, 1, 1> = Files::new([c"top"]);
/// Who reads it takes an event away from others.
static EVENT_FILES: Files<Device, 1, 1> = Files::secret([c"event"]);
static TUNE_FILES: Files<Device, 1, 1> = Files::new([c"discard_granularity"]);
static KNOB_FILES: Files<Device, 1, 2> = Files::writable([c"low_water", c"on_full"]);
static DELTA_FILES: Files<Device, 2, 8> = Files::new([
    c"format",
    c"image",
    c"image_info",
    c"inline",
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
        state.add(&EVENT_FILES)?;
        let tune = Dir::of_disk(disk, c"ptune")?;
        tune.add(&TUNE_FILES)?;
        tune.add(&KNOB_FILES)?;
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
            b"ptune" => show_knob(disk.driver(), file, out),
            level => {
                let level = core::str::from_utf8(level).map_err(|_| EINVAL)?;
                show_delta(disk.driver(), level.parse().map_err(|_| EINVAL)?, file, out)
            }
        }
    }

    /// Settings are of a running device, until it stops. EINVAL for a stopped one.
    fn store(disk: DiskRef<'_, Self>, _dir: &CStr, file: &CStr, text: &[u8]) -> Result {
        // Held, for the device not to stop meanwhile.
        let view = disk.driver().view.lock();
        let engine = view.engine.as_ref().ok_or(EINVAL)?;
        match (file.to_bytes(), text) {
            (b"on_full", b"wait") => engine.shared().set_fails_when_full(false),
            (b"on_full", b"fail") => {
                engine.shared().set_fails_when_full(true);
                engine.retry_parked();
            }
            (b"low_water", text) => {
                let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
                let bytes = text.parse().map_err(|_| EINVAL)?;
                engine.shared().events.set_low_water(bytes);
            }
            _ => return Err(EINVAL),
        }
        Ok(())
    }
}

fn show_knob(this: &Device, file: &CStr, out: &mut Output<'_>) -> Result {
    let view = this.view.lock().clone();
    let engine = view.engine.as_deref();
    match file.to_bytes() {
        b"discard_granularity" => writeln!(out, "{}", view.cluster_bytes())?,
        b"low_water" => {
            let mark = engine.map_or(0, |e| e.shared().events.low_water());
            writeln!(out, "{mark}")?;
        }
        b"on_full" => {
            let fails = engine.is_some_and(|e| e.shared().fails_when_full());
            writeln!(out, "{}", if fails { "fail" } else { "wait" })?;
        }
        _ => return Err(EINVAL),
    }
    Ok(())
}

impl super::View {
    fn cluster_bytes(&self) -> u64 {
        u64::from(self.cluster_sectors) << SECTOR_SHIFT
    }
}

fn show_state(disk: DiskRef<'_, Device>, file: &CStr, out: &mut Output<'_>) -> Result {
    let this = disk.driver();
    let view = this.view.lock().clone();
    if file == c"event" {
        return show_event(view, out);
    }
    let engine = view.engine.as_deref();
    let count =
        |f: fn(&Stats) -> &Atomic<u64>| engine.map_or(0, |e| f(&e.shared().stats).load(Relaxed));
    let number = match file.to_bytes() {
        b"aborted" => engine.is_some_and(|e| e.is_poisoned()).into(),
        b"allocated_clusters" => count(|s| &s.allocated),
        b"block_size" => view.cluster_sectors.into(),
        b"cloned_clusters" => count(|s| &s.cloned),
        b"commits" => count(|s| &s.commits),
        b"cookie" => {
            let len = view.cookie.iter().position(|b| *b == 0).unwrap_or(0);
            let text = view.cookie.get(..len).unwrap_or(&[]);
            return show_bytes(text, out);
        }
        b"fmt_version" => view.version.into(),
        b"index_pages" => count(|s| &s.index_pages),
        b"inline_bios" => count(|s| &s.inline),
        b"io_errors" => count(|s| &s.errors),
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
        b"discarded_clusters" => count(|s| &s.discarded),
        b"freeze_state" => view.is_frozen.into(),
        b"maintenance" => {
            let name = this.maintenance_name();
            return Ok(writeln!(out, "{name}")?);
        }
        b"space" => {
            let space = engine.map_or(Space::Enough, |e| e.shared().events.space());
            return Ok(writeln!(out, "{}", space.name())?);
        }
        // OpenVZ's "hole" mode: discards are handled at once.
        b"discard_mode" => match view.takes_discards {
            true => 2,
            false => 0,
        },
        _ => return Err(EINVAL),
    };
    Ok(writeln!(out, "{number}")?)
}

/// Waits for an event: for days, perhaps, in which the engine and its images may have to go.
fn show_event(view: super::View, out: &mut Output<'_>) -> Result {
    let shared = view.engine.as_ref().map(|e| e.shared().clone());
    drop(view);
    let event = match shared {
        Some(shared) => shared.events.wait()?.map_or(0, |event| event as u64),
        None => Event::Stopped as u64,
    };
    Ok(writeln!(out, "{event}")?)
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
        b"inline" => {
            let engine = this.view.lock().engine.clone();
            let level = u8::try_from(level).map_err(|_| EINVAL)?;
            let delta = engine.as_ref().and_then(|e| e.chain.delta(Level(level)));
            let is_inline = delta.is_some_and(|d| d.io().is_inline());
            writeln!(out, "{}", u8::from(is_inline))?;
        }
        b"io" => writeln!(out, "{}", info.io)?,
        b"level" => writeln!(out, "{level}")?,
        b"ro" => writeln!(out, "{}", u8::from(info.read_only))?,
        b"transparent" => {
            let engine = this.view.lock().engine.clone();
            let source = engine.as_ref().and_then(|e| Some(e.chain.source()?.0));
            let is_source = source.is_some_and(|s| usize::from(s.0) == level);
            writeln!(out, "{}", u8::from(is_source))?;
        }
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

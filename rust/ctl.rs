// SPDX-License-Identifier: GPL-2.0
//! The table of devices, the control device, and the ioctls of disks.
//!
//! Locks, outermost first: the table's mutex, then a device's control lock. The mutex of removed
//! devices is a leaf.

mod decode;

use crate::{
    device::{ops::Wanted, Device},
    io::lock::Images,
    sys::{
        self,
        gen_disk::{BlockDevice, Call, DiskRef, GenDisk, Numbers},
        misc::{Control, ModulePin},
        prelude::*,
        proc::Reserve,
    },
};
use ploop_pure::{abi, lifecycle::Op};

/// A device in the table.
struct Slot {
    index: u32,
    disk: GenDisk<Device>,
    /// Made by `CTL_ADD`: the module stays until `CTL_REMOVE`.
    _pin: Option<ModulePin>,
}

/// All devices.
#[pin_data]
pub(crate) struct Registry {
    images: Arc<Images>,
    #[pin]
    slots: Mutex<KVec<Slot>>,
    /// Devices removed last, and when.
    #[pin]
    removed: Mutex<KVec<(u32, u64)>>,
}

/// For so long a removed device does not come back by itself: who had looked up its node before,
/// as udev does on every change, must not bring it back by opening it.
const REMOVED_MS: u64 = 5000;
/// Removed devices remembered at the most.
const REMOVED_MAX: usize = 64;

impl Registry {
    /// No devices.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let images = Arc::pin_init(Images::new(), GFP_KERNEL)?;
        Arc::pin_init(
            try_pin_init!(Self {
                images,
                slots <- new_mutex!(KVec::new()),
                removed <- new_mutex!(KVec::new()),
            }? Error),
            GFP_KERNEL,
        )
    }

    /// Removes all devices: the module is being unloaded, so none is open or has deltas.
    pub(crate) fn close(&self) {
        let slots = core::mem::take(&mut *self.slots.lock());
        for slot in slots {
            slot.disk.as_ref().driver().remove_folders();
        }
    }

    /// Adds device `wanted`, or the lowest that does not exist. Without `pin` it is because
    /// somebody opened its node. EEXIST, ERANGE.
    fn add(&self, wanted: Option<u32>, pin: Option<ModulePin>) -> Result<u32> {
        let mut slots = self.slots.lock();
        let exists = |index| slots.iter().any(|s| s.index == index);
        let index = match wanted {
            Some(index) if exists(index) => return Err(EEXIST),
            Some(index) if pin.is_none() && self.is_just_removed(index) => return Err(ENODEV),
            Some(index) => index,
            None => (0..abi::DEVICES_MAX).find(|i| !exists(*i)).ok_or(ERANGE)?,
        };
        if index >= abi::DEVICES_MAX {
            return Err(ERANGE);
        }
        slots.reserve(1, GFP_KERNEL)?;
        let device = Device::new(index, self.images.clone())?;
        let numbers = Numbers {
            major: abi::MAJOR,
            first_minor: index << abi::MINOR_SHIFT,
            minors: abi::MINORS,
            name: "ploop",
            index,
        };
        let disk = GenDisk::add(device.clone(), &numbers)?;
        if let Err(e) = Device::add_folders(disk.as_ref()) {
            device.remove_folders();
            return Err(e);
        }
        slots.push(
            Slot {
                index,
                disk,
                _pin: pin,
            },
            GFP_KERNEL,
        )?;
        Ok(index)
    }

    /// Removes device `index` if it has no deltas and is not open. ENODEV, EBUSY.
    fn remove(&self, index: u32) -> Result {
        let mut slots = self.slots.lock();
        let at = slots.iter().position(|s| s.index == index).ok_or(ENODEV)?;
        let slot = slots.get(at).ok_or(ENODEV)?;
        Device::admit_remove(slot.disk.as_ref())?;
        self.remember_removed(index);
        let slot = slots.remove(at).map_err(|_| ENODEV)?;
        slot.disk.as_ref().driver().remove_folders();
        Ok(())
    }

    fn remember_removed(&self, index: u32) {
        let now = sys::uptime_ms();
        let mut removed = self.removed.lock();
        removed.retain(|(i, at)| *i != index && now.saturating_sub(*at) < REMOVED_MS);
        if removed.len() < REMOVED_MAX {
            // Forgetting one does no harm but an empty device.
            let _ = removed.push((index, now), GFP_KERNEL);
        }
    }

    fn is_just_removed(&self, index: u32) -> bool {
        let now = sys::uptime_ms();
        let removed = self.removed.lock();
        removed
            .iter()
            .any(|(i, at)| *i == index && now.saturating_sub(*at) < REMOVED_MS)
    }
}

impl Control for Registry {
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<c_int> {
        if !sys::is_admin() {
            return Err(EPERM);
        }
        match cmd {
            abi::CTL_ADD => {
                let mut device = decode::device_arg(arg)?;
                let wanted = match device.index {
                    -1 => None,
                    index => Some(u32::try_from(index).map_err(|_| EINVAL)?),
                };
                // Now rather than when the device exists, and perhaps is open, already.
                decode::put(arg, &device)?;
                let index = self.add(wanted, Some(ModulePin::new()?))?;
                device.index = i32::try_from(index).map_err(|_| ERANGE)?;
                decode::put(arg, &device).inspect_err(|_| {
                    // Nobody knows of it.
                    let _ = self.remove(index);
                })?;
                Ok(0)
            }
            abi::CTL_REMOVE => {
                let device = decode::device_arg(arg)?;
                self.remove(u32::try_from(device.index).map_err(|_| EINVAL)?)?;
                Ok(0)
            }
            abi::CTL_VERSION => {
                decode::version(arg)?;
                decode::put(arg, &abi::Version::ours())?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    }

    fn probe(&self, minor: u32) {
        // A failure shows as ENXIO of the open.
        let _ = self.add(Some(minor >> abi::MINOR_SHIFT), None);
    }
}

impl Reserve for Registry {
    /// The minor of an idle device's disk.
    fn reserve(&self) -> Result<u32> {
        let index = self.images.reserve_idle_device(abi::DEVICES_MAX)?;
        Ok(index << abi::MINOR_SHIFT)
    }

    fn give_back(&self, minor: u32) {
        self.images.give_back_device(minor >> abi::MINOR_SHIFT);
    }
}

impl BlockDevice for Device {
    fn ioctl(&self, disk: DiskRef<'_, Self>, call: Call) -> Result<c_int> {
        device_ioctl(self, disk, call)
    }

    fn last_closed(&self) {
        // Whoever copied the image is gone.
        drop_tracker(self);
    }
}

fn device_ioctl(device: &Device, disk: DiskRef<'_, Device>, call: Call) -> Result<c_int> {
    if (call.cmd >> 8) & 0xff != abi::TYPE {
        return Err(ENOTTY);
    }
    if !sys::is_admin() {
        return Err(EPERM);
    }
    match call.cmd {
        abi::ADD_DELTA => {
            let ctl = decode::ctl(call.arg)?;
            device.admit_add()?;
            let flags = abi::FLAG_RDONLY | abi::FLAG_COOKIE | abi::FLAG_ACCEPT_INUSE;
            let (file, args, cookie) = decode::add_delta(call.arg, ctl, flags)?;
            device.add_delta(&file, args, cookie.as_ref())?;
        }
        abi::SNAPSHOT => {
            let ctl = decode::ctl(call.arg)?;
            let (file, args, _) = decode::add_delta(call.arg, ctl, abi::FLAG_FS_SYNC)?;
            let freeze_fs = ctl.flags & abi::FLAG_FS_SYNC != 0;
            Device::snapshot(disk, &file, args, freeze_fs)?;
        }
        abi::DEL_DELTA => Device::del_delta(disk, decode::level(call.arg)?)?,
        abi::START => Device::start(disk)?,
        abi::STOP if call.on_partition => return Err(ENODEV),
        abi::STOP => Device::stop(disk)?,
        abi::CLEAR => device.clear()?,
        abi::SYNC => device.sync()?,
        abi::MERGE => {
            let wanted = Wanted {
                op: Op::Merge,
                level: abi::LEVEL_TOP,
                sectors: 0,
                rate: 0,
            };
            run_op(device, disk, wanted)?;
        }
        abi::GROW => {
            let wanted = Wanted {
                op: Op::Grow,
                level: 0,
                sectors: decode::grow(call.arg, device.cluster_sectors()?)?,
                rate: 0,
            };
            run_op(device, disk, wanted)?;
        }
        abi::REPLACE_DELTA => {
            let ctl = decode::ctl(call.arg)?;
            let flags = abi::FLAG_RDONLY | abi::FLAG_ACCEPT_INUSE;
            let (file, args, _) = decode::add_delta(call.arg, ctl, flags)?;
            Device::replace_delta(disk, ctl.level, &file, args)?;
        }
        abi::TRUNCATE => {
            let (level, file, clusters) = decode::truncate(call.arg)?;
            device.truncate(level, &file, clusters)?;
        }
        abi::UPDATE_INDEX => {
            let (level, maps) = decode::update_index(call.arg)?;
            Device::update_index(disk, level, &maps)?;
        }
        abi::MAX_DELTA_SIZE => device.set_max_delta_size(decode::number(call.arg)?)?,
        abi::DUMP_CACHED_BAT => {
            let (args, mut to) = decode::dump_bat(call.arg)?;
            device.dump_index(args, |entry| {
                decode::put(to, &entry)?;
                to = to.checked_add(size_of::<u32>()).ok_or(EFAULT)?;
                Ok(())
            })?;
        }
        abi::FREEZE => Device::set_frozen(disk, true)?,
        abi::THAW => Device::set_frozen(disk, false)?,
        abi::BALLOON => {
            let mut balloon = decode::balloon(call.arg)?;
            if balloon.inflate != 0 {
                // Discards give space back without it.
                return Err(Errno::OpNotSupp.error());
            }
            (balloon.mntn_type, balloon.level) = device.maintenance()?;
            balloon.alloc_head = 0;
            decode::put(call.arg, &balloon)?;
        }
        // There is no balloon state to do them in.
        abi::FREEBLKS | abi::FBGET | abi::FBFILTER | abi::FBDROP | abi::RELOCBLKS => {
            return Err(EINVAL)
        }
        // Discards are handled at once: there is no mode to enter, leave or wait in.
        abi::DISCARD_INIT => return Err(Errno::OpNotSupp.error()),
        abi::DISCARD_FINI | abi::DISCARD_WAIT => {}
        abi::OP_START => {
            let (mut start, wanted) = decode::op_start(call.arg)?;
            // Now rather than when it runs already.
            decode::put(call.arg, &start)?;
            start.serial = Device::start_op(disk, wanted)?;
            decode::put(call.arg, &start)?;
        }
        abi::OP_STATUS => {
            decode::op_status(call.arg)?;
            decode::put(call.arg, &device.ops().status())?;
        }
        abi::OP_WAIT => {
            decode::op_status(call.arg)?;
            device.ops().wait()?;
            decode::put(call.arg, &device.ops().status())?;
        }
        abi::OP_CANCEL => {
            device.noted().abort_tracker();
            device.ops().cancel();
            device.ops().wait()?;
        }
        abi::OP_RATE => device.ops().set_rate(decode::number(call.arg)?),
        abi::GETDEVICE => {
            let minor = device.lowest_idle()? << abi::MINOR_SHIFT;
            decode::put(call.arg, &abi::GetDevice { minor, mbz: 0 })?;
        }
        _ => track_ioctl(device, call)?,
    }
    Ok(0)
}

fn track_ioctl(device: &Device, call: Call) -> Result {
    let none = abi::TrackExtent { start: 0, end: 0 };
    match call.cmd {
        abi::TRACK_INIT => {
            decode::put(call.arg, &none)?;
            let extent = device.start_tracker()?;
            decode::put(call.arg, &extent).inspect_err(|_| drop_tracker(device))
        }
        abi::TRACK_SETPOS => device.noted().set_tracked(decode::number(call.arg)?),
        abi::TRACK_READ => {
            decode::put(call.arg, &none)?;
            let extent = device.read_tracker()?;
            // Nobody would copy what it stands for.
            decode::put(call.arg, &extent).inspect_err(|_| drop_tracker(device))
        }
        abi::TRACK_STOP => device.noted().stop_tracker(),
        abi::TRACK_ABORT => {
            drop_tracker(device);
            Ok(())
        }
        _ => checkpoint_ioctl(device, call),
    }
}

fn drop_tracker(device: &Device) {
    device.noted().abort_tracker();
}

fn checkpoint_ioctl(device: &Device, call: Call) -> Result {
    match call.cmd {
        abi::CHECKPOINT_START => {
            let (id, log, at_snapshot) = decode::checkpoint_start(call.arg)?;
            device.start_checkpoint(id, log, at_snapshot)
        }
        abi::CHECKPOINT_DROP => device.noted().drop_point(decode::checkpoint(call.arg)?.id),
        abi::CHECKPOINT_LIST => {
            let point = device.checkpoint(decode::checkpoint(call.arg)?.index)?;
            decode::put(call.arg, &point)
        }
        abi::CHECKPOINT_READ => {
            let (head, mut to) = decode::checkpoint_read(call.arg)?;
            let head = device.read_checkpoint(head, |extent| {
                decode::put(to, &extent)?;
                to = to.checked_add(size_of::<abi::Extent>()).ok_or(EFAULT)?;
                Ok(())
            })?;
            decode::put(call.arg, &head)
        }
        _ => Err(ENOTTY),
    }
}

/// Starts a long operation, unless the very same runs already, and waits for its end, as OpenVZ's calls
/// do. EINTR if the caller is killed before; it goes on then.
fn run_op(device: &Device, disk: DiskRef<'_, Device>, wanted: Wanted) -> Result {
    let serial = match device.ops().running_as(&wanted) {
        Some(serial) => serial,
        None => Device::start_op(disk, wanted)?,
    };
    device.ops().wait_for(serial)
}

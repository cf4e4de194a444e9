// SPDX-License-Identifier: GPL-2.0
//! User memory in and out. What comes in is checked here and nowhere else.

use crate::{
    chain::delta::OpenArgs,
    device::ops::Wanted,
    format::ploop1::Expect,
    sys::{
        file::{Access, File},
        prelude::*,
    },
};
use ploop_pure::{abi, lifecycle::Op, units::ClusterSize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A structure at user address `arg`; EFAULT.
fn get<T: FromBytes + IntoBytes>(arg: usize) -> Result<T> {
    let mut value = T::new_zeroed();
    let len = size_of::<T>();
    UserSlice::new(UserPtr::from_addr(arg), len)
        .reader()
        .read_slice(value.as_mut_bytes())?;
    Ok(value)
}

/// Puts a structure to user address `arg`; EFAULT.
pub(super) fn put<T: IntoBytes + Immutable>(arg: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(arg), size_of::<T>())
        .writer()
        .write_slice(value.as_bytes())
}

/// Argument of the control device's calls.
pub(super) fn device_arg(arg: usize) -> Result<abi::DeviceArg> {
    let device: abi::DeviceArg = get(arg)?;
    if device == abi::DeviceArg::new(device.index) {
        Ok(device)
    } else {
        Err(EINVAL)
    }
}

/// Argument of CTL_VERSION.
pub(super) fn version(arg: usize) -> Result {
    let version: abi::Version = get(arg)?;
    if version == abi::Version::read() {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// Argument of OP_START.
pub(super) fn op_start(arg: usize) -> Result<(abi::OpStart, Wanted)> {
    let start: abi::OpStart = get(arg)?;
    let op = Op::from_number(start.op).ok_or(EINVAL)?;
    let clean = abi::OpStart {
        rate: start.rate,
        ..abi::OpStart::new(start.op, start.level, start.sectors)
    };
    let is_fit = match op {
        Op::Merge => start.sectors == 0,
        Op::Grow => start.level == 0,
        Op::Compact => start.level == 0 && start.sectors == 0,
    };
    if start != clean || !is_fit {
        return Err(EINVAL);
    }
    let wanted = Wanted {
        op,
        level: start.level,
        sectors: start.sectors,
        rate: start.rate,
    };
    Ok((start, wanted))
}

/// Argument of OP_STATUS and OP_WAIT.
pub(super) fn op_status(arg: usize) -> Result {
    let status: abi::OpStatus = get(arg)?;
    if status.size == abi::OpStatus::read().size && status.flags == 0 {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// Argument of CHECKPOINT_START: the name, log2 of the granularity in bytes, and whether the next
/// snapshot starts it.
pub(super) fn checkpoint_start(arg: usize) -> Result<([u8; 16], u32, bool)> {
    let point: abi::Checkpoint = get(arg)?;
    let clean = abi::Checkpoint {
        flags: point.flags & abi::CHECKPOINT_AT_SNAPSHOT,
        granularity: point.granularity,
        ..abi::Checkpoint::new(point.id)
    };
    let granularity = match point.granularity {
        0 => abi::GRANULARITY,
        other => other,
    };
    let is_fit = granularity.is_power_of_two()
        && (abi::GRANULARITY_MIN..=abi::GRANULARITY_MAX).contains(&granularity);
    if point != clean || !is_fit || point.id == [0; 16] {
        return Err(EINVAL);
    }
    let at_snapshot = point.flags & abi::CHECKPOINT_AT_SNAPSHOT != 0;
    Ok((point.id, granularity.trailing_zeros(), at_snapshot))
}

/// Argument of CHECKPOINT_DROP and CHECKPOINT_LIST.
pub(super) fn checkpoint(arg: usize) -> Result<abi::Checkpoint> {
    let point: abi::Checkpoint = get(arg)?;
    let clean = abi::Checkpoint {
        index: point.index,
        ..abi::Checkpoint::new(point.id)
    };
    match point == clean {
        true => Ok(point),
        false => Err(EINVAL),
    }
}

/// Argument of CHECKPOINT_READ, and where the extents go.
pub(super) fn checkpoint_read(arg: usize) -> Result<(abi::CheckpointRead, usize)> {
    let head: abi::CheckpointRead = get(arg)?;
    let is_clean = head.size as usize == size_of_val(&head)
        && head.flags == 0
        && head.mbz == 0
        && head.reserved == [0; 2];
    let to = arg.checked_add(size_of_val(&head)).ok_or(EFAULT)?;
    match is_clean {
        true => Ok((head, to)),
        false => Err(EINVAL),
    }
}

/// Argument of TRUNCATE: the level, its image, and how many clusters to keep.
pub(super) fn truncate(arg: usize) -> Result<(u8, File, u32)> {
    let ctl: abi::Truncate = get(arg)?;
    let file = File::from_fd(ctl.fd)?;
    Ok((ctl.level, file, ctl.alloc_head))
}

/// Most clusters of one UPDATE_INDEX.
const MAPS_MAX: u32 = 1 << 16;

/// Argument of UPDATE_INDEX.
pub(super) fn update_index(arg: usize) -> Result<(u8, KVVec<abi::ReverseMap>)> {
    let head: abi::IndexUpdate = get(arg)?;
    if head.n_maps > MAPS_MAX {
        return Err(ENOMEM);
    }
    let mut maps = KVVec::with_capacity(head.n_maps as usize, GFP_KERNEL)?;
    let mut at = arg
        .checked_add(size_of::<abi::IndexUpdate>())
        .ok_or(EFAULT)?;
    for _ in 0..head.n_maps {
        maps.push(get(at)?, GFP_KERNEL)?;
        at = at.checked_add(size_of::<abi::ReverseMap>()).ok_or(EFAULT)?;
    }
    Ok((head.level, maps))
}

/// Argument of GROW for a device with clusters of this size: the new size in sectors.
pub(super) fn grow(arg: usize, cluster_sectors: u32) -> Result<u64> {
    let ctl: abi::Ctl = get(arg)?;
    let cluster = ClusterSize::from_log(ctl.cluster_log).ok_or(EINVAL)?;
    if cluster.sectors() != cluster_sectors || ctl.flags & !abi::FLAG_CLUBLKS != 0 {
        return Err(EINVAL);
    }
    let size = u64::from(ctl.size);
    match ctl.flags & abi::FLAG_CLUBLKS != 0 {
        true => Ok(size << ctl.cluster_log),
        false => Ok(size),
    }
}

/// Argument of BALLOON.
pub(super) fn balloon(arg: usize) -> Result<abi::Balloon> {
    let balloon: abi::Balloon = get(arg)?;
    if balloon.inflate != 0 && balloon.keep_intact != 0 {
        return Err(EINVAL);
    }
    Ok(balloon)
}

/// Head of DUMP_CACHED_BAT's argument, and where the entries go.
pub(super) fn dump_bat(arg: usize) -> Result<(abi::DumpBat, usize)> {
    let to = arg.checked_add(size_of::<abi::DumpBat>()).ok_or(EFAULT)?;
    Ok((get(arg)?, to))
}

/// A u64 argument.
pub(super) fn number(arg: usize) -> Result<u64> {
    get(arg)
}

/// Argument of DEL_DELTA.
pub(super) fn level(arg: usize) -> Result<u32> {
    get(arg)
}

/// Head of ADD_DELTA's argument. More than one chunk is refused before anything else is looked at.
pub(super) fn ctl(arg: usize) -> Result<abi::Ctl> {
    let ctl: abi::Ctl = get(arg)?;
    if ctl.chunks != 1 {
        return Err(EINVAL);
    }
    Ok(ctl)
}

/// Argument of ADD_DELTA, SNAPSHOT or REPLACE_DELTA whose head is `ctl`, of which these flags are
/// known: the caller's open file, how to open it, and a cookie.
pub(super) fn add_delta(
    arg: usize,
    ctl: abi::Ctl,
    flags: u32,
) -> Result<(File, OpenArgs, Option<abi::Cookie>)> {
    if ctl.flags & !flags != 0 || ctl.mbz1 != 0 || ctl.mbz2 != 0 {
        return Err(EINVAL);
    }
    if ClusterSize::from_log(ctl.cluster_log).is_none() {
        return Err(EINVAL);
    }
    if !matches!(ctl.format, abi::FORMAT_RAW | abi::FORMAT_PLOOP1) {
        return Err(EINVAL);
    }
    let at = |offset| arg.checked_add(offset).ok_or(EFAULT);
    let chunk: abi::Chunk = get(at(core::mem::offset_of!(abi::AddDelta, chunk))?)?;
    let known_io = matches!(
        chunk.io,
        abi::IO_AUTO | abi::IO_DIRECT | abi::IO_NFS | abi::IO_KAIO
    );
    if !known_io || chunk.flags != 0 || chunk.offset != 0 || chunk.start != 0 || chunk.len != 0 {
        return Err(EINVAL);
    }
    let cookie = if ctl.flags & abi::FLAG_COOKIE != 0 {
        let mut cookie: abi::Cookie = get(at(core::mem::offset_of!(abi::AddDelta, cookie))?)?;
        cookie[abi::COOKIE_LEN_MAX] = 0;
        Some(cookie)
    } else {
        None
    };
    let access = if ctl.flags & abi::FLAG_RDONLY != 0 {
        Access::Read
    } else {
        Access::ReadWrite
    };
    let accept_in_use = ctl.flags & abi::FLAG_ACCEPT_INUSE != 0;
    if accept_in_use && access != Access::Read {
        return Err(EINVAL);
    }
    let file = File::from_fd(chunk.fd)?;
    if file.access() != Some(access) {
        return Err(EINVAL);
    }
    let args = OpenArgs {
        format: ctl.format,
        access,
        expect: Expect {
            cluster_log: ctl.cluster_log,
            accept_in_use,
        },
    };
    Ok((file, args, cookie))
}

// SPDX-License-Identifier: GPL-2.0
//! Disks: `struct gendisk`, its limits, capacity, openers and ioctls.

use super::{
    bindings, compat, file::File, frozen::QueueFrozen, mq::Driver, sleep_ms, Table, DISKS,
};
use core::{marker::PhantomData, ptr, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, to_result},
    fmt,
    prelude::*,
    static_lock_class,
    str::{CString, NullTerminatedFormatter},
    sync::Arc,
};

/// An ioctl on a disk or one of its partitions.
pub(crate) struct Call {
    /// Number.
    pub(crate) cmd: u32,
    /// Argument, a user pointer for most numbers.
    pub(crate) arg: usize,
    /// It came through a partition's node.
    pub(crate) on_partition: bool,
}

/// A driver whose disks take ioctls.
pub(crate) trait BlockDevice: Driver {
    /// Answers an ioctl; runs in the caller's process and may sleep.
    fn ioctl(&self, disk: DiskRef<'_, Self>, call: Call) -> Result<c_int>;
    /// Nobody has the disk or a partition open any more. Its open lock is held.
    fn last_closed(&self);
}

/// The limits that depend on the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Smallest unit of I/O in bytes, 512 or 4096.
    pub(crate) logical_block: u32,
    /// Alignment of data in memory in bytes, a power of two from 512 up.
    pub(crate) memory_align: u32,
    /// Requests never cross a multiple of this many sectors; 0: they may.
    pub(crate) chunk_sectors: u32,
    /// Preferred I/O in bytes.
    pub(crate) io_opt: u32,
    /// Smallest range in bytes whose space a discard gives back; 0: none can be discarded.
    pub(crate) discard_granularity: u32,
}

/// Most sectors of one request: 1280 KiB, as loop has.
const REQUEST_SECTORS_MAX: u32 = 2560;
/// Most sectors of one discard or write-zeroes request.
const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Milliseconds between two looks at whether waiting for requests is to be given up.
const FREEZE_LOOK_MS: c_uint = 100;
/// Looks before requests are let in again for a moment.
const FREEZE_LOOKS: u32 = 10;
/// Milliseconds for which they are let in.
const FREEZE_PAUSE_MS: u64 = 10;
/// Most segments of one request.
const SEGMENTS_MAX: u16 = 256;

impl Limits {
    /// Those of a disk without image.
    pub(crate) const NONE: Self = Self {
        logical_block: 512,
        memory_align: 512,
        chunk_sectors: 0,
        io_opt: 0,
        discard_granularity: 0,
    };

    fn to_raw(self) -> bindings::queue_limits {
        let discard_sectors = match self.discard_granularity {
            0 => 0,
            _ => DISCARD_SECTORS_MAX,
        };
        bindings::queue_limits {
            logical_block_size: self.logical_block,
            physical_block_size: 4096,
            io_min: 4096,
            io_opt: self.io_opt,
            chunk_sectors: self.chunk_sectors,
            max_hw_sectors: REQUEST_SECTORS_MAX,
            max_segments: SEGMENTS_MAX,
            max_hw_discard_sectors: discard_sectors,
            max_user_discard_sectors: c_uint::MAX,
            max_discard_segments: 1,
            discard_granularity: self.discard_granularity,
            max_write_zeroes_sectors: discard_sectors,
            max_hw_wzeroes_unmap_sectors: discard_sectors,
            max_user_wzeroes_unmap_sectors: c_uint::MAX,
            dma_alignment: self.memory_align.saturating_sub(1),
            features: bindings::BLK_FEAT_WRITE_CACHE
                | bindings::BLK_FEAT_FUA
                | bindings::BLK_FEAT_IO_STAT
                | bindings::BLK_FEAT_NOWAIT,
            ..pin_init::zeroed()
        }
    }
}

/// Numbers and name of a disk.
pub(crate) struct Numbers<'a> {
    /// Block major.
    pub(crate) major: u32,
    /// First minor.
    pub(crate) first_minor: u32,
    /// Minors, partitions included.
    pub(crate) minors: u32,
    /// Name below `/dev`, followed by `index`.
    pub(crate) name: &'a str,
    /// Number of the disk.
    pub(crate) index: u32,
}

/// A disk that exists. Dropping it removes it; its driver lives until the last user is gone.
///
/// # Invariants
///
/// The pointer is a disk that `add` added; its `private_data` and `queuedata` are an `Arc<D>`.
pub(crate) struct GenDisk<D: BlockDevice>(NonNull<bindings::gendisk>, PhantomData<Arc<D>>);

// SAFETY: The C functions used are thread-safe.
unsafe impl<D: BlockDevice> Send for GenDisk<D> {}
// SAFETY: As above.
unsafe impl<D: BlockDevice> Sync for GenDisk<D> {}

impl<D: BlockDevice> GenDisk<D> {
    /// Adds a disk of capacity 0 for `driver`.
    pub(crate) fn add(driver: Arc<D>, numbers: &Numbers<'_>) -> Result<Self> {
        let set = driver.tags().as_ptr();
        let data = Arc::into_raw(driver);
        let mut lim = Limits::NONE.to_raw();
        // SAFETY: The driver's tag set, which lives as long as the disk; valid limits and key.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_mq_alloc_disk(
                set,
                &mut lim,
                data.cast_mut().cast(),
                static_lock_class!().as_ptr(),
            )
        });
        let added = disk.and_then(|disk| {
            // SAFETY: A new disk, whose queue nobody uses yet.
            unsafe { bindings::ploop_queue_lock_classes((*disk).queue) };
            Self::fill(disk, data, numbers).inspect_err(|_| {
                // SAFETY: Never added, so this frees it without calling `free_disk`.
                unsafe { bindings::put_disk(disk) };
            })
        });
        match added {
            Ok(disk) => {
                DISKS.add();
                // INVARIANT: Added with `data`.
                Ok(Self(disk, PhantomData))
            }
            Err(e) => {
                // SAFETY: Nobody took the reference.
                drop(unsafe { Arc::from_raw(data) });
                Err(e)
            }
        }
    }

    fn fill(
        disk: *mut bindings::gendisk,
        data: *const D,
        numbers: &Numbers<'_>,
    ) -> Result<NonNull<bindings::gendisk>> {
        // SAFETY: The disk is only ours until it is added.
        let d = unsafe { &mut *disk };
        d.fops = &Fops::<D>::TABLE.0;
        d.private_data = data.cast_mut().cast();
        d.major = i32::try_from(numbers.major).map_err(|_| EINVAL)?;
        d.first_minor = i32::try_from(numbers.first_minor).map_err(|_| EINVAL)?;
        d.minors = i32::try_from(numbers.minors).map_err(|_| EINVAL)?;
        let mut name = NullTerminatedFormatter::new(&mut d.disk_name).ok_or(EINVAL)?;
        fmt::Write::write_fmt(&mut name, fmt!("{}{}", numbers.name, numbers.index))?;
        // SAFETY: The disk is complete.
        to_result(unsafe { bindings::device_add_disk(ptr::null_mut(), disk, ptr::null_mut()) })?;
        NonNull::new(disk).ok_or(EINVAL)
    }

    /// The disk, for its methods.
    pub(crate) fn as_ref(&self) -> DiskRef<'_, D> {
        DiskRef(self.0, PhantomData)
    }
}

impl<D: BlockDevice> Drop for GenDisk<D> {
    fn drop(&mut self) {
        // SAFETY: Added by the invariant, removed only here.
        unsafe {
            bindings::del_gendisk(self.0.as_ptr());
            bindings::put_disk(self.0.as_ptr());
        }
    }
}

/// A disk that exists for `'a`.
pub(crate) struct DiskRef<'a, D: BlockDevice>(NonNull<bindings::gendisk>, PhantomData<&'a D>);

impl<D: BlockDevice> Clone for DiskRef<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: BlockDevice> Copy for DiskRef<'_, D> {}

impl<'a, D: BlockDevice> DiskRef<'a, D> {
    pub(super) fn as_ptr(self) -> *mut bindings::gendisk {
        self.0.as_ptr()
    }

    /// # Safety
    ///
    /// `kobj` is the folder of a disk of `D` that lives for `'a`.
    pub(super) unsafe fn from_kobj(kobj: *mut bindings::kobject) -> Self {
        // SAFETY: By the contract.
        let disk = unsafe { bindings::ploop_kobj_to_disk(kobj) };
        // SAFETY: By the contract there is a disk.
        Self(unsafe { NonNull::new_unchecked(disk) }, PhantomData)
    }

    /// The driver.
    pub(crate) fn driver(self) -> &'a D {
        // SAFETY: An `Arc<D>` by the invariant of `GenDisk`, alive as long as the disk.
        unsafe { &*(*self.0.as_ptr()).private_data.cast::<D>() }
    }

    /// Openers of the disk and its partitions; stable only under [`Self::open_lock`].
    pub(crate) fn openers(self) -> u32 {
        // SAFETY: A live disk.
        unsafe { bindings::ploop_disk_openers(self.0.as_ptr()) }
    }

    /// Keeps the disk from being opened or closed.
    pub(crate) fn open_lock(self) -> OpenLock<'a, D> {
        // SAFETY: A live disk.
        unsafe { bindings::ploop_disk_open_lock(self.0.as_ptr()) };
        OpenLock(self)
    }

    /// Writes back what the page cache of the disk holds and drops it.
    pub(crate) fn sync_and_invalidate(self) -> Result {
        // SAFETY: A live disk has its whole-disk block device.
        unsafe {
            let bdev = (*self.0.as_ptr()).part0;
            let ret = bindings::sync_blockdev(bdev);
            bindings::invalidate_bdev(bdev);
            to_result(ret)
        }
    }

    /// Forgets what is remembered of the medium, errors of its page cache too; the capacity is 0.
    pub(crate) fn forget_medium(self) {
        // SAFETY: A live disk; callers may sleep.
        unsafe { bindings::invalidate_disk(self.0.as_ptr()) };
    }

    /// Lets userspace know that the medium is another than the last one.
    pub(crate) fn new_medium(self) {
        // SAFETY: A live disk; callers may sleep.
        unsafe { bindings::disk_force_media_change(self.0.as_ptr()) };
    }

    /// Sets the capacity and tells userspace.
    pub(crate) fn set_capacity(self, sectors: u64) {
        // SAFETY: A live disk.
        unsafe { bindings::set_capacity_and_notify(self.0.as_ptr(), sectors) };
    }

    /// Makes the disk and its partitions read-only or not.
    pub(crate) fn set_read_only(self, read_only: bool) {
        // SAFETY: A live disk.
        unsafe { bindings::set_disk_ro(self.0.as_ptr(), read_only) };
    }

    /// Sets the limits; the queue is frozen meanwhile.
    pub(crate) fn set_limits(self, limits: Limits) -> Result {
        let mut lim = limits.to_raw();
        // SAFETY: A live disk and valid limits.
        to_result(unsafe { bindings::ploop_set_limits(self.0.as_ptr(), &mut lim) })
    }

    /// Tells userspace that the disk has changed.
    pub(crate) fn notify_change(self) {
        // SAFETY: A live disk.
        unsafe { bindings::disk_uevent(self.0.as_ptr(), bindings::kobject_action_KOBJ_CHANGE) };
    }

    /// Whether `file` is on a file system on the disk, or the disk or a partition of it.
    pub(crate) fn carries(self, file: &File) -> bool {
        // SAFETY: A live disk; `File` is a live file.
        unsafe { bindings::ploop_file_is_on(file.as_ptr().as_ptr(), self.0.as_ptr()) }
    }

    /// Makes the freezes that follow short, until dropped. Requests go on meanwhile. May sleep for some
    /// milliseconds.
    pub(crate) fn ready_to_freeze(self) -> ReadyToFreeze<'a, D> {
        // SAFETY: A live disk has its queue.
        unsafe { bindings::ploop_freeze_prepare((*self.0.as_ptr()).queue) };
        ReadyToFreeze(self)
    }

    /// [`ReadyToFreeze::frozen`], once.
    pub(crate) fn frozen<R>(
        self,
        give_up: impl Fn() -> bool,
        f: impl FnOnce(&QueueFrozen<'_>) -> R,
    ) -> Option<R> {
        self.ready_to_freeze().frozen(give_up, f)
    }

    /// What tells userspace of events of the disk.
    pub(crate) fn notifier(self) -> Notifier {
        // SAFETY: A live disk.
        unsafe { bindings::ploop_get_disk(self.0.as_ptr()) };
        // INVARIANT: The reference is ours.
        Notifier(self.0)
    }

    /// A reference that keeps the disk's memory and its driver, though not the disk from being
    /// removed.
    pub(crate) fn hold(self) -> HeldDisk<D> {
        // SAFETY: A live disk.
        unsafe { bindings::ploop_get_disk(self.0.as_ptr()) };
        // INVARIANT: The reference is ours.
        HeldDisk(self.0, PhantomData)
    }
}

/// A disk whose queue can be frozen without a grace period; see [`DiskRef::ready_to_freeze`].
pub(crate) struct ReadyToFreeze<'a, D: BlockDevice>(DiskRef<'a, D>);

impl<D: BlockDevice> ReadyToFreeze<'_, D> {
    /// Calls `f` while no request is in flight, none enters, and no request handler runs. It must not
    /// wait for I/O, and memory it gets at once or not at all: who would free some may be waiting to get
    /// in. `None`, and requests go on, if `give_up` says so, which is asked now and then while requests
    /// in flight are waited for.
    ///
    /// What is in flight for long may wait for somebody who waits to get in, as a commit of the file
    /// system below for memory that is swapped out to this disk. So after a second all are let in for a
    /// moment, and again each time after twice as long.
    pub(crate) fn frozen<R>(
        &self,
        give_up: impl Fn() -> bool,
        f: impl FnOnce(&QueueFrozen<'_>) -> R,
    ) -> Option<R> {
        let disk = self.0;
        // SAFETY: A live disk has its queue.
        let queue = unsafe { (*disk.as_ptr()).queue };
        let look = || {
            // SAFETY: As above; freezing has started.
            let is_frozen = unsafe { bindings::ploop_freeze_wait(queue, FREEZE_LOOK_MS) };
            (is_frozen || give_up()).then_some(is_frozen)
        };
        let mut looks = FREEZE_LOOKS;
        let flags = loop {
            // SAFETY: As above.
            let flags = unsafe { bindings::ploop_freeze_start(queue) };
            let seen = (0..looks).find_map(|_| look());
            if seen == Some(true) {
                break flags;
            }
            // SAFETY: Started above.
            unsafe { bindings::ploop_unfreeze_queue(queue, flags) };
            if seen == Some(false) {
                return None;
            }
            sleep_ms(FREEZE_PAUSE_MS);
            looks = looks.saturating_mul(2);
        };
        // A handler may still be on its way out after ending its request.
        disk.driver().tags().wait_for_handlers();
        // SAFETY: Ended below on the same task.
        let scope = unsafe { bindings::ploop_no_reclaim_begin() };
        let r = f(&QueueFrozen::new(disk.driver()));
        // SAFETY: Begun above.
        unsafe { bindings::ploop_no_reclaim_end(scope) };
        // SAFETY: Frozen above.
        unsafe { bindings::ploop_unfreeze_queue(queue, flags) };
        Some(r)
    }
}

impl<D: BlockDevice> Drop for ReadyToFreeze<'_, D> {
    fn drop(&mut self) {
        // SAFETY: A live disk has its queue; made ready when this was made.
        unsafe { bindings::ploop_freeze_ended((*self.0.as_ptr()).queue) };
    }
}

/// A variable of an event that tells how something ended: 0, or the number of an error. ENOMEM.
pub(crate) fn result_variable(result: Result) -> Result<CString> {
    let errno = result.err().map_or(0, Error::to_errno).unsigned_abs();
    CString::try_from_fmt(fmt!("PLOOP_ERRNO={errno}"))
}

/// A reference to a disk that only knows to tell userspace of events.
///
/// # Invariants
///
/// The pointer is a disk that was added; we own a reference to it.
pub(crate) struct Notifier(NonNull<bindings::gendisk>);

// SAFETY: The C functions used are thread-safe.
unsafe impl Send for Notifier {}
// SAFETY: As above.
unsafe impl Sync for Notifier {}

impl Notifier {
    /// Sends a change event with one or two variables, each NAME=VALUE. May sleep.
    pub(crate) fn event<const N: usize>(&self, variables: [&CStr; N]) {
        const { assert!(N <= 2) };
        let mut env = [ptr::null_mut(); 3];
        for (to, variable) in env.iter_mut().zip(variables) {
            *to = variable.as_char_ptr().cast_mut();
        }
        // SAFETY: A live disk by the invariant; the strings are only read, and a null pointer
        // ends their list.
        unsafe { bindings::ploop_disk_event(self.0.as_ptr(), env.as_mut_ptr()) };
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        // SAFETY: Our reference by the invariant.
        unsafe { bindings::ploop_put_disk(self.0.as_ptr()) };
    }
}

/// A reference to a disk.
///
/// # Invariants
///
/// The pointer is a disk of `D` that was added; we own a reference to it.
pub(crate) struct HeldDisk<D: BlockDevice>(NonNull<bindings::gendisk>, PhantomData<Arc<D>>);

// SAFETY: The C functions used are thread-safe.
unsafe impl<D: BlockDevice> Send for HeldDisk<D> {}
// SAFETY: As above.
unsafe impl<D: BlockDevice> Sync for HeldDisk<D> {}

impl<D: BlockDevice> HeldDisk<D> {
    /// The disk, for its methods.
    pub(crate) fn as_ref(&self) -> DiskRef<'_, D> {
        DiskRef(self.0, PhantomData)
    }
}

impl<D: BlockDevice> Drop for HeldDisk<D> {
    fn drop(&mut self) {
        // SAFETY: Our reference by the invariant.
        unsafe { bindings::ploop_put_disk(self.0.as_ptr()) };
    }
}

/// Keeps a disk from being opened or closed.
pub(crate) struct OpenLock<'a, D: BlockDevice>(DiskRef<'a, D>);

impl<D: BlockDevice> OpenLock<'_, D> {
    /// Reads the partition table anew; drops all partitions if the capacity is 0. Failure leaves
    /// the disk without partitions.
    pub(crate) fn rescan_partitions(&self, invalidate: bool) -> Result {
        // SAFETY: A live disk, whose open lock we hold.
        to_result(unsafe { bindings::bdev_disk_changed(self.0.as_ptr(), invalidate) })
    }
}

impl<D: BlockDevice> Drop for OpenLock<'_, D> {
    fn drop(&mut self) {
        // SAFETY: Locked when this was made.
        unsafe { bindings::ploop_disk_open_unlock(self.0.as_ptr()) };
    }
}

/// Waits until every disk that was removed is freed: that runs our code, and those who look at a
/// disk for a moment without opening it do not pin the module. No limit, as there is nothing
/// else that could be done; said in the log every ten seconds.
pub(crate) fn wait_until_freed() {
    let mut waited_ms = 0u32;
    while DISKS.nr.load(kernel::sync::atomic::Relaxed) != 0 {
        // SAFETY: Module exit may sleep.
        unsafe { bindings::ploop_sleep_ms(10) };
        waited_ms = waited_ms.wrapping_add(10);
        if waited_ms % 10_000 == 0 {
            pr_warn!("waiting for somebody to let go of a removed disk\n");
        }
    }
    // Whoever freed the last one is on its way out of our code, without sleeping.
    // SAFETY: As above.
    unsafe { bindings::ploop_wait_for_leavers() };
}

/// The callbacks of the block layer. Each is called by it only, as its contract says.
struct Fops<D>(PhantomData<D>);

impl<D: BlockDevice> Fops<D> {
    const TABLE: &'static Table<bindings::block_device_operations> =
        &Table(bindings::block_device_operations {
            owner: compat::owner(),
            release: Some(Self::release),
            ioctl: Some(Self::ioctl),
            #[cfg(CONFIG_COMPAT)]
            compat_ioctl: Some(bindings::blkdev_compat_ptr_ioctl),
            free_disk: Some(Self::free_disk),
            ..pin_init::zeroed()
        });

    /// # Safety
    ///
    /// Called by the block layer on an open block device of a disk that was added.
    unsafe extern "C" fn ioctl(
        bdev: *mut bindings::block_device,
        _mode: bindings::blk_mode_t,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_int {
        // SAFETY: An open block device has its disk.
        let (disk, on_partition) = unsafe {
            let disk = NonNull::new((*bdev).bd_disk);
            (disk, bindings::ploop_bdev_is_partition(bdev))
        };
        let Some(disk) = disk else {
            return ENODEV.to_errno();
        };
        let disk = DiskRef::<D>(disk, PhantomData);
        let call = Call {
            cmd,
            arg,
            on_partition,
        };
        disk.driver()
            .ioctl(disk, call)
            .unwrap_or_else(Error::to_errno)
    }

    /// # Safety
    ///
    /// Called by the block layer after each close of a disk that was added or of one of its
    /// partitions, with the disk's open lock held.
    unsafe extern "C" fn release(disk: *mut bindings::gendisk) {
        // SAFETY: `private_data` is an `Arc<D>` that lives until the disk is freed, and who closes
        // it holds the disk until we return.
        let driver = unsafe { &*(*disk).private_data.cast::<D>() };
        // SAFETY: As above, a disk that was added.
        if unsafe { bindings::ploop_disk_openers(disk) } == 0 {
            driver.last_closed();
        }
    }

    /// # Safety
    ///
    /// Called by the block layer once, when the last reference to an added disk is gone.
    unsafe extern "C" fn free_disk(disk: *mut bindings::gendisk) {
        // SAFETY: `private_data` came from `Arc::into_raw` in `add`.
        let driver = unsafe { Arc::from_raw((*disk).private_data.cast::<D>()) };
        // Handlers use the driver until they return, which is after their requests have ended.
        driver.workers().flush();
        // Sleeps for long; nothing here does after the count.
        drop(driver);
        DISKS.sub();
    }
}

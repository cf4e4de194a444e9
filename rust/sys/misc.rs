// SPDX-License-Identifier: GPL-2.0
//! The control device and the block major: how userspace asks for devices.

use super::{bindings, compat, Table};
use core::{marker::PhantomData, ptr};
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Release},
        Arc,
    },
    types::Opaque,
};

/// What answers the control device.
pub(crate) trait Control: Send + Sync + 'static {
    /// Answers an ioctl; runs in the caller's process and may sleep.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<c_int>;
    /// A node of our major without a device was opened; may make the device.
    fn probe(&self, minor: u32);
}

/// The registered control device of a `T`.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct MiscDevice<T: Control> {
    #[pin]
    raw: Opaque<bindings::miscdevice>,
    control: Arc<T>,
}

// SAFETY: The registration is thread-safe; `T` is `Send` and `Sync`.
unsafe impl<T: Control> Send for MiscDevice<T> {}
// SAFETY: As above.
unsafe impl<T: Control> Sync for MiscDevice<T> {}

impl<T: Control> MiscDevice<T> {
    const FOPS: &'static Table<bindings::file_operations> = &Table(bindings::file_operations {
        owner: compat::owner(),
        unlocked_ioctl: Some(Self::ioctl),
        compat_ioctl: bindings::compat_ptr_ioctl,
        ..pin_init::zeroed()
    });

    /// Registers `/dev/NAME`, for root only.
    pub(crate) fn register(name: &'static CStr, control: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            control,
            raw <- Opaque::try_ffi_init(|p: *mut bindings::miscdevice| {
                // SAFETY: `p` is valid for writes, and pinned.
                unsafe {
                    p.write(bindings::miscdevice {
                        minor: bindings::MISC_DYNAMIC_MINOR as i32,
                        name: name.as_char_ptr(),
                        fops: &Self::FOPS.0,
                        mode: 0o600,
                        ..pin_init::zeroed()
                    });
                    to_result(bindings::misc_register(p))
                }
            }),
        }? Error)
    }

    /// # Safety
    ///
    /// Called by the VFS on an open file of a registered `MiscDevice<T>`.
    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: `misc_open` put our `miscdevice`, the first field of `Self`, there; the open
        // file pins this module, and with it the registration.
        let this = unsafe { &*(*file).private_data.cast::<Self>() };
        let ret = this.control.ioctl(cmd, arg).unwrap_or_else(Error::to_errno);
        ret as c_long
    }
}

#[pinned_drop]
impl<T: Control> PinnedDrop for MiscDevice<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered in `register`.
        unsafe { bindings::misc_deregister(self.raw.get()) };
    }
}

/// The registered block major. There is one; `PROBE` belongs to it.
pub(crate) struct BlockMajor<T: Control> {
    major: u32,
    name: &'static CStr,
    _control: PhantomData<Arc<T>>,
}

/// The `Arc<T>` of the registered [`BlockMajor`]: the probe callback has no argument for it.
static PROBE: Atomic<*mut c_void> = Atomic::new(ptr::null_mut());

impl<T: Control> BlockMajor<T> {
    /// Registers `major`; opening a node of it without a device calls [`Control::probe`].
    pub(crate) fn register(major: u32, name: &'static CStr, control: Arc<T>) -> Result<Self> {
        let raw = Arc::into_raw(control).cast_mut().cast();
        PROBE.store(raw, Release);
        // SAFETY: A static name; the callback has the prototype wanted.
        let ret = to_result(unsafe {
            bindings::__register_blkdev(major, name.as_char_ptr(), Some(Self::probe))
        });
        let this = Self {
            major,
            name,
            _control: PhantomData,
        };
        if let Err(e) = ret {
            this.forget_probe();
            core::mem::forget(this);
            return Err(e);
        }
        Ok(this)
    }

    fn forget_probe(&self) {
        let raw = PROBE.xchg(ptr::null_mut(), kernel::sync::atomic::Full);
        if !raw.is_null() {
            // SAFETY: From `Arc::into_raw` in `register`; no callback runs any more.
            drop(unsafe { Arc::from_raw(raw.cast::<T>().cast_const()) });
        }
    }

    /// # Safety
    ///
    /// Called by the block layer while the major is registered.
    unsafe extern "C" fn probe(dev: bindings::dev_t) {
        let raw = PROBE.load(Acquire).cast::<T>();
        if raw.is_null() {
            return;
        }
        // SAFETY: An `Arc<T>` of `register`, alive until the major is unregistered, which waits
        // for this callback.
        let control = unsafe { &*raw };
        control.probe(dev & ((1 << bindings::MINORBITS) - 1));
    }
}

impl<T: Control> Drop for BlockMajor<T> {
    fn drop(&mut self) {
        // SAFETY: Registered in `register` with this name.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
        self.forget_probe();
    }
}

/// Keeps this module loaded.
pub(crate) struct ModulePin(());

impl ModulePin {
    /// Keeps the module loaded until this is dropped; ENODEV while it is being unloaded.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Our own module.
        if unsafe { bindings::try_module_get(compat::owner()) } {
            Ok(Self(()))
        } else {
            Err(ENODEV)
        }
    }
}

impl Drop for ModulePin {
    fn drop(&mut self) {
        // SAFETY: Got in `new`.
        unsafe { bindings::module_put(compat::owner()) };
    }
}

// SPDX-License-Identifier: GPL-2.0
//! What differs between the kernel versions that we build against, and nothing else.
//!
//! `kernel_ge_7_3` is set by Kbuild for 7.3 and later; without it this is 7.2.

use super::bindings;
use kernel::prelude::*;

/// This module, as the owner of its tables of callbacks.
pub(super) const fn owner() -> *mut bindings::module {
    #[cfg(kernel_ge_7_3)]
    return kernel::module::this_module::<crate::LocalModule>().as_ptr();
    #[cfg(not(kernel_ge_7_3))]
    crate::THIS_MODULE.as_ptr()
}

/// Bytes of the current segment that an iterator has passed.
pub(super) fn segment_done(iter: &mut bindings::bvec_iter) -> &mut u32 {
    #[cfg(kernel_ge_7_3)]
    return &mut iter.bi_offset;
    #[cfg(not(kernel_ge_7_3))]
    &mut iter.bi_bvec_done
}

/// What sysfs calls to show a file.
pub(super) type Show =
    unsafe extern "C" fn(*mut bindings::kobject, *mut bindings::kobj_attribute, *mut u8) -> isize;

/// What sysfs calls when a file is written.
pub(super) type Store = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *const u8,
    usize,
) -> isize;

/// A file of a folder in sysfs that can be written.
pub(super) const fn attribute_rw(
    name: &'static CStr,
    show: Show,
    store: Store,
) -> bindings::kobj_attribute {
    let mut attr = attribute(name, show);
    attr.attr.mode = 0o644;
    #[cfg(kernel_ge_7_3)]
    {
        attr.__bindgen_anon_2.store = Some(store);
    }
    #[cfg(not(kernel_ge_7_3))]
    {
        attr.store = Some(store);
    }
    attr
}

/// A read-only file of a folder in sysfs.
pub(super) const fn attribute(name: &'static CStr, show: Show) -> bindings::kobj_attribute {
    let mut attr: bindings::kobj_attribute = pin_init::zeroed();
    attr.attr.name = name.to_bytes_with_nul().as_ptr();
    attr.attr.mode = 0o444;
    #[cfg(kernel_ge_7_3)]
    {
        attr.__bindgen_anon_1.show = Some(show);
    }
    #[cfg(not(kernel_ge_7_3))]
    {
        attr.show = Some(show);
    }
    attr
}

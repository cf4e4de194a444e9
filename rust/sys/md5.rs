// SPDX-License-Identifier: GPL-2.0
//! The digest that a format extension has.

use super::bindings;

/// MD5 of what it is fed.
pub(crate) struct Md5(bindings::md5_ctx);

impl Md5 {
    /// Of nothing yet.
    pub(crate) fn new() -> Self {
        let mut ctx = bindings::md5_ctx::default();
        // SAFETY: A context of ours, which needs no cleaning up.
        unsafe { bindings::md5_init(&mut ctx) };
        Self(ctx)
    }

    /// And of these bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        // SAFETY: A context made by `md5_init`; the bytes are borrowed over the call.
        unsafe { bindings::md5_update(&mut self.0, bytes.as_ptr(), bytes.len()) };
    }

    /// The digest.
    pub(crate) fn finish(mut self) -> [u8; 16] {
        let mut digest = [0; 16];
        // SAFETY: A context made by `md5_init`, not used again; it writes the 16 bytes of a digest.
        unsafe { bindings::md5_final(&mut self.0, digest.as_mut_ptr()) };
        digest
    }
}

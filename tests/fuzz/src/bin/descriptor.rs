// SPDX-License-Identifier: GPL-2.0
//! Fuzzes `ploop_fuzz::descriptor`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ploop_fuzz::descriptor(data));

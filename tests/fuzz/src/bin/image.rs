// SPDX-License-Identifier: GPL-2.0
//! Fuzzes `ploop_fuzz::image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ploop_fuzz::image(data));

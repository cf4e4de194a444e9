// SPDX-License-Identifier: GPL-2.0
//! Fuzzes `ploop_fuzz::backup`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ploop_fuzz::backup(data));

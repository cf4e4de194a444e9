// SPDX-License-Identifier: GPL-2.0
//! Bytes on disk. One file per format; endianness and magic numbers appear nowhere else.

pub mod extension;
pub mod ploop1;
pub mod surplus;

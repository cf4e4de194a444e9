// SPDX-License-Identifier: GPL-2.0
//! The binary; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ploopctl::main()
}

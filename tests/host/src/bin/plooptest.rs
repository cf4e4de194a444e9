// SPDX-License-Identifier: GPL-2.0
//! The helper of the guest tests; `plooptest help` lists what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    plooptest::cli::main(std::env::args().skip(1).collect())
}

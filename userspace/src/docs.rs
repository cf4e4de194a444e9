// SPDX-License-Identifier: GPL-2.0
//! `ploopctl-docs DIR`: makes the manual pages and the shell completions of `ploopctl` from its
//! command line, for packages. DIR gets `man/` and `completions/`.

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [dir] = args.as_slice() else {
        eprintln!("usage: ploopctl-docs DIR");
        return ExitCode::from(2);
    };
    let dir = Path::new(dir);
    match make(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ploopctl-docs: {}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn make(dir: &Path) -> io::Result<()> {
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    let mut command = ploopctl::cli::Cli::command();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command, "ploopctl", &completions)?;
    }
    command.build();
    pages(&command, &man)
}

/// The page of a command, and those of what is below it: `ploopctl-snapshot-create.8` and so on.
fn pages(command: &Command, dir: &Path) -> io::Result<()> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    let page = clap_mangen::Man::new(command.clone()).section("8");
    let mut text = Vec::new();
    page.manual("ploop").render(&mut text)?;
    fs::write(dir.join(format!("{name}.8")), text)?;
    for sub in command.get_subcommands() {
        pages(sub, dir)?;
    }
    Ok(())
}

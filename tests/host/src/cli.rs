// SPDX-License-Identifier: GPL-2.0
//! The command line of `plooptest`: `plooptest COMMAND [--OPTION [VALUE]] [OPERAND]...`.
//!
//! Status 0: done. 1: what was to be shown does not hold. 2: could not be tried.

use crate::rng::Rng;
use crate::sim::{self, offline};
use crate::{device, fuzz, ioctls, load, model, mutate, replay, seq, track};
use std::process::ExitCode;

const HELP: &str = "\
plooptest COMMAND...
  simulate [--seeds N] [--seed S]        power cuts over the model disk
  seqwrite DEV --ack FILE [--fua] [--prefill] [--seconds N] [--count C] [--blocks K]
           [--length BYTES]              write numbered blocks, each durable, within so much
  acked FILE                             the number acknowledged last
  seqverify DEV --acked N [--blocks K] [--length BYTES]
                                         every acknowledged block is there
  load [--seed S] [--seconds N] [--stop FILE [--at-least N]] [--begun FILE] [--jobs J] [--discard]
       [--tolerate] [--from FILE] [--save FILE] [--written] [--apart BYTES] DEV
                                         writes, discards, flushes, and reads compared, until FILE
                                         is there and N are done; then all is compared, or only the MiB written;
                                         with --apart 4 KiB written so far apart, once each; makes the
                                         file begun once the first are done
  load-verify [--written] DEV FILE       the disk holds what load saved there
  read-at-once DEV OFFSET KIB[n]...      reads one behind the other, submitted in one call; with n
                                         those that must not wait; prints what each read, or its error
  replay --log DEV --target DEV --to MARK|ENTRY [--lose SEED] [--state FILE]
                                         what dm-log-writes logged up to there; with a seed without half
                                         of what no flush covers
  list-marks --log DEV, list-flushes --log DEV
                                         its marks, its flushes
  attach-raw [--read-only] [--format raw|ploop1] [--cluster-log N] [--flags N]
             [--above raw|ploop1] [--all-rw] IMAGE...
                                         the same as the tool, without its checks; base first, of
                                         which the format is; below the last only read, or all rw
  detach-raw DEV                         undoes it
  ioctl-table IMAGE                      the errors of every ioctl
  ioctl-fuzz [--seed S] [--count N] IMAGE
                                         random ioctls
  model [--seed S] [--ops N] [--cluster-log L] [--version 1|2] [--raw] [--sectors N]
        DIR
                                         random operations compared with a model in memory
  snapshot [--freeze] [--cluster-log N] [--read-only] [--format raw|ploop1] DEV IMAGE
                                         SNAPSHOT
  op [--rate BYTES] [--start] DEV merge LEVEL|top | grow SECTORS | compact
                                         a long operation from start to end, or only its start
  op-wait DEV, op-status DEV, op-cancel DEV, op-rate DEV BYTES
                                         waits for it; prints `running|idle RESULT DONE TOTAL
                                         FREED`; ends it early; limits its bytes a second
  sync DEV                               SYNC
  track-copy [--rounds N] --quiesce COMMAND DEV IMAGE TARGET
                                         a copy of the top's IMAGE in use, complete when COMMAND has
                                         ended all writing
  checkpoint start|arm|drop|read DEV ID [--granularity BYTES], checkpoint list DEV
                                         a checkpoint; what was written since
  mutate --seed S IN OUT                 a damaged copy of an image
  corpus [--seed S] [--count N] IMAGE SCRATCH
                                         attach that many damaged copies
";

/// Why a command ended without success.
#[derive(Debug)]
pub enum Failure {
    /// What was to be shown does not hold.
    Broken(String),
    /// It could not be tried.
    Trouble(String),
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::Trouble(e.to_string())
    }
}

/// How a command ends.
pub type Outcome = Result<(), Failure>;

/// The words after the command.
pub struct Words {
    words: Vec<String>,
}

impl Words {
    fn trouble<T>(what: String) -> Result<T, Failure> {
        Err(Failure::Trouble(format!("{what}; try `plooptest help`")))
    }

    /// Takes the flag `name` away; whether it was there.
    pub fn flag(&mut self, name: &str) -> bool {
        let at = self.words.iter().position(|w| w == name);
        at.map(|at| self.words.remove(at)).is_some()
    }

    /// Takes the option `name` and its value away.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Failure> {
        let Some(at) = self.words.iter().position(|w| w == name) else {
            return Ok(None);
        };
        self.words.remove(at);
        if at >= self.words.len() {
            return Self::trouble(format!("{name} needs a value"));
        }
        Ok(Some(self.words.remove(at)))
    }

    /// The same for a number.
    pub fn number(&mut self, name: &str, default: u64) -> Result<u64, Failure> {
        match self.text(name)? {
            None => Ok(default),
            Some(text) => parse(&text),
        }
    }

    /// The same for an option that must be there.
    pub fn needed(&mut self, name: &str) -> Result<String, Failure> {
        match self.text(name)? {
            Some(text) => Ok(text),
            None => Self::trouble(format!("{name} is needed")),
        }
    }

    /// The operands, of which there must be `N`.
    pub fn operands<const N: usize>(self) -> Result<[String; N], Failure> {
        match <[String; N]>::try_from(self.words) {
            Ok(operands) => Ok(operands),
            Err(words) => Self::trouble(format!("{N} operands expected, not {words:?}")),
        }
    }

    /// The operands, of which there must be one at least.
    pub fn all_operands(self) -> Result<Vec<String>, Failure> {
        match self.words.iter().find(|w| w.starts_with("--")) {
            None if !self.words.is_empty() => Ok(self.words),
            None | Some(_) => Self::trouble(format!("operands expected, not {:?}", self.words)),
        }
    }
}

/// A number, decimal or after 0x hexadecimal.
pub fn parse(text: &str) -> Result<u64, Failure> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| Failure::Trouble(format!("'{text}' is not a number")))
}

/// Runs the command named by the first word.
pub fn main(mut words: Vec<String>) -> ExitCode {
    let command = if words.is_empty() {
        "help".into()
    } else {
        words.remove(0)
    };
    match run(&command, Words { words }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Broken(what)) => {
            println!("BROKEN: {what}");
            ExitCode::from(1)
        }
        Err(Failure::Trouble(what)) => {
            eprintln!("plooptest {command}: {what}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &str, words: Words) -> Outcome {
    match command {
        "simulate" => simulate(words),
        "seqwrite" => seq::write(words),
        "acked" => seq::acked(words),
        "seqverify" => seq::verify(words),
        "load" => load::load(words),
        "load-verify" => load::verify(words),
        "read-at-once" => load::read_at_once(words),
        "replay" => replay::replay(words),
        "list-marks" => replay::list_marks(words),
        "list-flushes" => replay::list_flushes(words),
        "attach-raw" => device::attach_raw(words),
        "detach-raw" => device::detach_raw(words),
        "ioctl-table" => ioctls::table(words),
        "ioctl-fuzz" => fuzz::fuzz(words),
        "model" => model::model(words),
        "snapshot" => device::snapshot(words),
        "op" => device::op(words),
        "op-wait" => device::op_wait(words),
        "op-status" => device::op_status(words),
        "op-cancel" => device::op_cancel(words),
        "op-rate" => device::op_rate(words),
        "sync" => device::sync(words),
        "track-copy" => track::copy(words),
        "checkpoint" => track::checkpoint(words),
        "mutate" => mutate::mutate(words),
        "corpus" => mutate::corpus(words),
        "help" => {
            print!("{HELP}");
            Ok(())
        }
        _ => Words::trouble(format!("'{command}' is not a command")),
    }
}

fn simulate(mut words: Words) -> Outcome {
    let seed = match words.text("--seed")? {
        Some(text) => parse(&text)?,
        None => Rng::new(1).bits() % 1000,
    };
    let seeds = words.number("--seeds", 100)?;
    let [] = words.operands()?;
    let mut states = 0;
    for seed in seed..seed + seeds {
        for op in offline::Op::ALL {
            let cfg = offline::Config::usual(op);
            let tried = offline::run(&cfg, seed).map_err(Failure::Broken)?;
            states += tried.states;
        }
        for cfg in sim::Config::all() {
            let tried = sim::run(&cfg, seed).map_err(Failure::Broken)?;
            states += tried.states;
        }
    }
    println!("{states} states after power cuts are sound");
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! `ploopctl checkpoint`: what is left of backups in a device.

use super::attached;
use crate::checkpoint::{self, Checkpoint};
use crate::cli::{CheckpointCommand, CheckpointDropArgs, CheckpointListArgs};
use crate::descriptor::guid::Guid;
use crate::error::{Code, Error, Result};
use crate::output;
use crate::size::human;
use serde::Serialize;
use std::path::Path;

/// Runs the command.
pub fn run(command: &CheckpointCommand) -> Result<()> {
    match command {
        CheckpointCommand::List(args) => list(args),
        CheckpointCommand::Drop(args) => drop(args),
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    #[serde(serialize_with = "output::path")]
    device: &'a Path,
    checkpoints: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    uuid: Guid,
    /// `recording`, or `armed`: it waits for a snapshot.
    state: &'static str,
    granularity: u32,
    /// Bytes written to since.
    dirty: u64,
}

impl From<Checkpoint> for Row {
    fn from(found: Checkpoint) -> Self {
        Self {
            uuid: found.id,
            state: if found.is_recording {
                "recording"
            } else {
                "armed"
            },
            granularity: found.granularity,
            dirty: found.dirty,
        }
    }
}

fn list(args: &CheckpointListArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    let checkpoints = checkpoint::list(&device)?.into_iter().map(Row::from);
    if args.json {
        return output::json(&Listed {
            device: &device.device,
            checkpoints: checkpoints.collect(),
        });
    }
    let head = ["UUID", "STATE", "WRITTEN", "GRANULARITY"].map(str::to_owned);
    let cells = checkpoints.map(|c| {
        [
            c.uuid.to_string(),
            c.state.to_owned(),
            human(c.dirty),
            human(c.granularity.into()),
        ]
    });
    let all: Vec<_> = std::iter::once(head).chain(cells).collect();
    output::text(&super::list::table(&all))
}

fn drop(args: &CheckpointDropArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    let Some(uuid) = args.uuid else {
        for found in checkpoint::list(&device)? {
            checkpoint::drop(&device, found.id)?;
        }
        return Ok(());
    };
    if checkpoint::drop(&device, uuid)? {
        return Ok(());
    }
    let what = format!(
        "there is no checkpoint {uuid} of {}",
        device.device.display()
    );
    Err(Error::new(Code::NoCheckpoint, what)
        .hint("'ploopctl checkpoint list' shows those there are"))
}

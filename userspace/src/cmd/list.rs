// SPDX-License-Identifier: GPL-2.0
//! `ploopctl list`.

use crate::cli::ListArgs;
use crate::error::Result;
use crate::output;
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use serde::Serialize;

#[derive(Serialize)]
struct Listed<'a> {
    devices: Vec<Row<'a>>,
}

/// A device as JSON shows it, here and in `info`.
#[derive(Serialize)]
pub struct Row<'a> {
    state: &'static str,
    #[serde(flatten)]
    device: &'a Device,
}

impl<'a> Row<'a> {
    /// The row of `device`.
    pub fn new(device: &'a Device) -> Self {
        Self {
            state: device.state(),
            device,
        }
    }
}

/// Runs the command.
pub fn run(args: &ListArgs) -> Result<()> {
    let devices = Sysfs::default().devices()?;
    if args.json {
        return output::json(&Listed {
            devices: devices.iter().map(Row::new).collect(),
        });
    }
    if devices.is_empty() {
        return Ok(());
    }
    let head = ["DEVICE", "SIZE", "FORMAT", "RO", "STATE", "IMAGE"].map(str::to_owned);
    let rows = std::iter::once(head).chain(devices.iter().map(cells));
    output::text(&table(&rows.collect::<Vec<_>>()))
}

fn cells(d: &Device) -> [String; 6] {
    let (format, image) = match d.top() {
        Some(top) if d.deltas.len() > 1 => {
            let image = format!("{} and {} below", top.image.display(), d.deltas.len() - 1);
            (top.format.clone(), image)
        }
        Some(top) => (top.format.clone(), top.image.display().to_string()),
        None => ("-".into(), "-".into()),
    };
    [
        d.device.display().to_string(),
        human(d.size),
        format,
        if d.read_only { "ro" } else { "rw" }.into(),
        condition(d).to_owned(),
        image,
    ]
}

/// The state, or what an administrator has to know before that.
pub fn condition(d: &Device) -> &str {
    match (d.running, d.space.as_str(), d.maintenance.as_str()) {
        _ if d.aborted => "failed",
        (false, _, _) => d.state(),
        (true, "full", _) => "full",
        (true, "low", "off") => "low space",
        (true, _, "off") => d.state(),
        (true, _, operation) => operation,
    }
}

/// Columns as wide as their widest cell; the last is not padded.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if i + 1 == N {
                text += cell;
            } else {
                text += &format!("{cell:width$}  ");
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["A", "BB"], ["long", "x"]].map(|r| r.map(str::to_owned));
        assert_eq!(table(&rows), "A     BB\nlong  x\n");
    }
}

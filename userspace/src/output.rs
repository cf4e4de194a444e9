// SPDX-License-Identifier: GPL-2.0
//! What leaves the tool: answers on standard output, notes for people on standard error.

use crate::error::{Code, Error, Result};
use serde::{Serialize, Serializer};
use std::io::{self, BufWriter, StdoutLock, Write};
use std::path::{Path, PathBuf};

/// Version of every JSON answer; a key is never renamed or given another meaning within one.
pub const SCHEMA: u32 = 1;

/// A JSON answer: its schema and its keys.
#[derive(Serialize)]
struct Answer<'a, T> {
    schema: u32,
    #[serde(flatten)]
    body: &'a T,
}

/// A failed write of an answer.
pub fn failed(e: io::Error) -> Error {
    Error::io(Code::Write, "cannot write the answer to standard output", e)
}

/// Standard output, buffered; [`Write::flush`] at the end tells whether all arrived.
pub fn stdout() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(64 << 10, io::stdout().lock())
}

/// Writes `text`.
pub fn text(text: &str) -> Result<()> {
    let mut out = stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(failed)
}

/// Writes `body` as JSON. All of it, or nothing, is valid.
pub fn json<T: Serialize>(body: &T) -> Result<()> {
    let answer = Answer {
        schema: SCHEMA,
        body,
    };
    let text = serde_json::to_string_pretty(&answer)
        .map_err(|e| Error::io(Code::System, "cannot write JSON", io::Error::from(e)))?;
    self::text(&(text + "\n"))
}

/// A path in JSON. JSON has only Unicode: bytes of a path that are none become U+FFFD.
pub fn path<S: Serializer>(path: impl AsRef<Path>, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_str(&path.as_ref().to_string_lossy())
}

/// The same for several paths.
pub fn paths<S: Serializer>(paths: &[PathBuf], to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(|p| p.to_string_lossy()))
}

/// The same for a path that may be missing.
pub fn path_or_null<S: Serializer>(
    path: &Option<impl AsRef<Path>>,
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    path.as_ref()
        .map(|p| p.as_ref().to_string_lossy())
        .serialize(to)
}

/// Tells the user something on standard error; a closed one is not a failure.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// `1 cluster`, `2 clusters`.
pub fn count(n: u64, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

/// A path of mountinfo as it is: there a blank is `\\040` and the like.
pub fn unescape_mount(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

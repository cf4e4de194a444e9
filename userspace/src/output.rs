// SPDX-License-Identifier: GPL-2.0
//! What leaves the tool: answers on standard output, notes for people on standard error.

use crate::error::{Code, Error, Result};
use serde::{Serialize, Serializer};
use std::borrow::Cow;
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

/// Names and what they are, a line each.
pub fn fields(lines: &[(&str, String)]) -> String {
    lines.iter().fold(String::new(), |text, (name, value)| {
        text + &format!("{:<13} {value}\n", format!("{name}:"))
    })
}

/// Makes `text` the contents of the file `path`: a reader sees all of it or what was there before.
/// It is not made durable.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    let failed = |what: &str, e| {
        let what = format!("cannot {what} {}", path.display());
        Error::io(Code::Write, what, e)
    };
    // A reader of all files with a certain end does not take it for one.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(name);
    // Never through a link that somebody put there.
    let _ = std::fs::remove_file(&new);
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).open(&new);
    let written = file
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|e| failed("write", e));
    let renamed =
        written.and_then(|()| std::fs::rename(&new, path).map_err(|e| failed("replace", e)));
    if renamed.is_err() {
        // What is left of it is in nobody's way.
        let _ = std::fs::remove_file(&new);
    }
    renamed
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

/// Tells the user something on standard error; a closed one is not a failure. Names, and what another
/// machine says, may be in it: nothing of it steers a terminal.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", harmless(text));
}

/// `text`, with control characters but for the ends of lines as Rust writes them: `\u{1b}`.
fn harmless(text: &str) -> Cow<'_, str> {
    let is_harmful = |c: char| c.is_control() && c != '\n';
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_harmful(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// `1 cluster`, `2 clusters`.
pub fn count(n: u64, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_terminal_is_not_steered() {
        assert_eq!(harmless("a: b\n  c"), "a: b\n  c");
        assert_eq!(harmless("\u{1b}[2Jx\r"), "\\u{1b}[2Jx\\r");
    }

    #[test]
    fn a_file_is_replaced_or_left_as_it_was() {
        let dir = std::env::temp_dir().join(format!("ploopctl-output-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("taken")).unwrap();
        let path = dir.join("a.prom");
        replace(&path, "first, and long\n").unwrap();
        replace(&path, "second\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second\n");
        // Nor is anything written through a link that is in the way.
        let link = dir.join(format!("a.prom.{}.new", std::process::id()));
        std::os::unix::fs::symlink(dir.join("victim"), link).unwrap();
        replace(&path, "third\n").unwrap();
        assert!(!dir.join("victim").exists());
        assert_eq!(fs::read_to_string(&path).unwrap(), "third\n");
        // A directory cannot be replaced; nothing is left beside it.
        assert_eq!(
            replace(&dir.join("taken"), "").unwrap_err().code(),
            Code::Write
        );
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        fs::remove_dir_all(&dir).unwrap();
    }
}

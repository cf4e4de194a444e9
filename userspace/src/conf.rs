// SPDX-License-Identifier: GPL-2.0
//! `/etc/ploop.conf`: the disks that a host attaches when it boots, each under a name.
//!
//! A line is `NAME PATH [OPTION,...]`, as in crypttab and fstab; `#` begins a comment line. A bad line
//! is an error of its own: the others hold.

use crate::cli::AttachFormat;
use crate::error::{Code, Error, Result};
use crate::mountinfo::unescape;
use crate::size;
use ploop_pure::abi::COOKIE_LEN_MAX;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where the file is.
pub const PATH: &str = "/etc/ploop.conf";

/// A disk to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name: the device's cookie, and what is below `/dev/disk/by-ploop`.
    pub name: String,
    /// The image, or the disk with a descriptor.
    pub path: PathBuf,
    /// What the options say.
    pub options: Options,
    /// Line of the file, from 1.
    pub line: usize,
}

/// How a disk is attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// `read-only`.
    pub read_only: bool,
    /// `no-repair`: an image that was not closed cleanly is refused.
    pub no_repair: bool,
    /// `noauto`: not at boot, unless something needs it.
    pub no_auto: bool,
    /// `device=N`: as ploopN.
    pub device: Option<u32>,
    /// `format=raw` or `format=ploop1`.
    pub format: AttachFormat,
    /// `cluster=SIZE` of a raw image, in bytes.
    pub cluster: Option<u64>,
}

/// The entries of the file, and what is wrong with the other lines. A missing file has none.
pub fn load(path: &Path) -> Result<(Vec<Entry>, Vec<Error>)> {
    match fs::read(path) {
        Ok(text) => Ok(parse(path, &text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok((Vec::new(), Vec::new())),
        Err(e) => {
            let what = format!("cannot read {}", path.display());
            Err(Error::io(Code::Open, what, e))
        }
    }
}

/// The entry `name` of the file.
pub fn entry(path: &Path, name: &str) -> Result<Entry> {
    let (entries, mut errors) = load(path)?;
    if let Some(entry) = entries.into_iter().find(|e| e.name == name) {
        return Ok(entry);
    }
    let what = format!("{} has no disk called {name}", path.display());
    Err(match errors.pop() {
        Some(bad) => Error::new(Code::Param, what).hint(bad.without_hint()),
        None => Error::new(Code::Param, what),
    })
}

fn parse(path: &Path, text: &[u8]) -> (Vec<Entry>, Vec<Error>) {
    let mut entries: Vec<Entry> = Vec::new();
    let mut errors = Vec::new();
    for (line, text) in (1..).zip(text.split(|b| *b == b'\n')) {
        if text.trim_ascii_start().first().is_none_or(|b| *b == b'#') {
            continue;
        }
        let fields = std::str::from_utf8(text).map(|t| t.split_ascii_whitespace().collect());
        let fields = fields.map_err(|_| "it is not UTF-8".to_owned());
        let parsed = fields.and_then(|fields: Vec<_>| parse_line(line, &fields));
        let parsed = parsed.and_then(
            |entry| match entries.iter().find(|e| e.name == entry.name) {
                None => Ok(entry),
                Some(e) => Err(format!("the name {} is that of line {}", e.name, e.line)),
            },
        );
        match parsed {
            Ok(entry) => entries.push(entry),
            Err(what) => {
                let what = format!("{} line {line}: {what}", path.display());
                errors.push(Error::new(Code::Param, what).hint("the line is left out"));
            }
        }
    }
    (entries, errors)
}

fn parse_line(line: usize, fields: &[&str]) -> std::result::Result<Entry, String> {
    let (name, path, options) = match fields {
        [name, path] => (name, path, "-"),
        [name, path, options] => (name, path, *options),
        _ => return Err("a line is NAME PATH [OPTION,...]; a blank in PATH is \\040".into()),
    };
    if !is_name(name) {
        return Err(format!(
            "'{name}' is not a name: at most {COOKIE_LEN_MAX} of a-z, A-Z, 0-9, '_', '-' and '.', \
             the first a letter or digit, the end not as of a partition ('-part1')"
        ));
    }
    let path = unescape(path.as_bytes()).into_os_string().into_string();
    let path = path.map_err(|_| "a path is Unicode".to_owned())?;
    if !path.starts_with('/') {
        return Err(format!("'{path}' is not an absolute path"));
    }
    // systemd takes none of these.
    if path.contains(char::is_control)
        || Path::new(&path)
            .components()
            .any(|c| c == Component::ParentDir)
    {
        return Err("a path has no '..' and no control characters".into());
    }
    Ok(Entry {
        name: (*name).to_owned(),
        path: path.into(),
        options: parse_options(options)?,
        line,
    })
}

/// Names are file names below /dev and parts of unit names, and need no quoting anywhere.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= COOKIE_LEN_MAX
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
        && !text.rsplit_once("-part").is_some_and(|(_, nr)| {
            // The link of a partition of the disk whose name is in front of that.
            !nr.is_empty() && nr.chars().all(|c| c.is_ascii_digit())
        })
}

fn parse_options(text: &str) -> std::result::Result<Options, String> {
    let mut options = Options::default();
    for option in text.split(',').filter(|o| !o.is_empty() && *o != "-") {
        match option.split_once('=') {
            None if option == "read-only" || option == "ro" => options.read_only = true,
            None if option == "no-repair" => options.no_repair = true,
            None if option == "noauto" => options.no_auto = true,
            None if option == "auto" || option == "defaults" || option == "rw" => {}
            Some(("device", n)) => match n.parse() {
                Ok(n) => options.device = Some(n),
                Err(_) => return Err(format!("'{option}': N of /dev/ploopN is a number")),
            },
            Some(("format", "raw")) => options.format = AttachFormat::Raw,
            Some(("format", "ploop1")) => options.format = AttachFormat::Ploop1,
            Some(("cluster", size)) => match size::parse(size) {
                Ok(size) => options.cluster = Some(size),
                Err(e) => return Err(format!("'{option}': {e}")),
            },
            None | Some(_) => {
                return Err(format!(
                    "'{option}' is not an option: read-only, no-repair, noauto, device=N, \
                     format=raw, cluster=SIZE"
                ))
            }
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Vec<Entry>, Vec<String>) {
        let (entries, errors) = parse(Path::new("conf"), text.as_bytes());
        (entries, errors.iter().map(Error::without_hint).collect())
    }

    #[test]
    fn a_line_that_is_no_text_costs_itself_alone() {
        let text = b"# caf\xe9\nweb /vz/web\ndb /vz/\xe9\nx /y";
        let (entries, errors) = parse(Path::new("conf"), text);
        let names: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.line)).collect();
        assert_eq!(names, [("web", 2), ("x", 4)]);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].without_hint().contains("line 3: it is not UTF-8"));
    }

    #[test]
    fn what_a_unit_or_a_link_cannot_have_is_refused() {
        for bad in ["db-part1 /a", "a /b/../c", "a /b\\012c"] {
            let (entries, errors) = parsed(bad);
            assert!(
                entries.is_empty() && errors.len() == 1,
                "{bad}: {entries:?}"
            );
        }
        assert_eq!(parsed("db-part /a\nb-part1x /b\n").0.len(), 2);
    }

    #[test]
    fn lines_are_name_path_and_options() {
        let (entries, errors) = parsed(
            "# comment\n\nweb /vz/web\n\tdb\t/vz/a\\040b.raw format=raw,cluster=64K,ro,device=7,noauto,no-repair\nx /y -\n",
        );
        assert_eq!(errors, [""; 0]);
        let names: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.line)).collect();
        assert_eq!(names, [("web", 3), ("db", 4), ("x", 5)]);
        assert_eq!(entries[0].options, Options::default());
        assert_eq!(entries[1].path, Path::new("/vz/a b.raw"));
        let want = Options {
            read_only: true,
            no_repair: true,
            no_auto: true,
            device: Some(7),
            format: AttachFormat::Raw,
            cluster: Some(65536),
        };
        assert_eq!(entries[1].options, want);
    }

    #[test]
    fn a_bad_line_does_not_take_the_others_along() {
        for (bad, want) in [
            ("alone", "NAME PATH"),
            ("a /b c d", "NAME PATH"),
            ("a/b /c", "not a name"),
            ("-a /c", "not a name"),
            (".. /c", "not a name"),
            ("a@b /c", "not a name"),
            ("b c", "not an absolute path"),
            ("good /other", "that of line 1"),
            ("b /c nofail", "not an option"),
            ("b /c device=x", "is a number"),
            ("b /c cluster=x", "cluster=x"),
            ("b /c format=qcow2", "not an option"),
        ] {
            let (entries, errors) = parsed(&format!("good /image\n{bad}\nlast /image2\n"));
            assert_eq!(entries.len(), 2, "{bad}");
            assert_eq!(errors.len(), 1, "{bad}");
            assert!(errors[0].starts_with("conf line 2: "), "{}", errors[0]);
            assert!(errors[0].contains(want), "{}", errors[0]);
        }
        let long = "n".repeat(64);
        assert_eq!(parsed(&format!("{long} /c")).1.len(), 1);
        assert_eq!(parsed(&format!("{} /c", &long[1..])).0.len(), 1);
    }
}

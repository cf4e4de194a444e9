// SPDX-License-Identifier: GPL-2.0
//! The documentation says what the code does: tables of `docs/` and the C header are compared with
//! the constants and structures they quote, and every file that a page names must exist.

use ploop_pure::abi;
use ploop_pure::layout::extension;
use ploop_pure::layout::ploop1::{self, RawHeader};
use ploop_pure::lifecycle::{admit, Call, Refusal, State};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "docs/names.rs"]
#[macro_use]
mod names;
use names::{calls, constants, is_dense, size_of_field, structures};

/// The root of the project.
fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &str) -> String {
    std::fs::read_to_string(top().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The rows of the table in `page` whose header row begins with `head`, as cells.
fn table(page: &str, head: &str) -> Vec<Vec<String>> {
    let text = text(page);
    let mut lines = text.lines().skip_while(|l| !l.starts_with(head));
    assert!(lines.next().is_some(), "{page} has no table '{head}'");
    let rows: Vec<Vec<String>> = lines
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .map(|l| {
            let cells = l.trim_matches('|').split('|');
            cells.map(|c| c.trim().replace('`', "")).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "{page}: the table '{head}' is empty");
    rows
}

fn number(text: &str) -> u64 {
    let n = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16),
        None => text.parse(),
    };
    n.unwrap_or_else(|_| panic!("'{text}' is not a number"))
}

#[test]
fn the_table_of_the_header_is_the_header() {
    let fields = fields!(RawHeader: magic, disk_type, heads, cylinders, cluster_sectors, nr_entries,
        size_sectors, in_use, first_block, flags, ext_offset);
    is_dense("RawHeader", &fields, ploop1::HEADER_BYTES);
    let rows = table("docs/format-ploop1.md", "| offset | size | name | field |");
    let said: Vec<_> = rows
        .iter()
        .map(|r| {
            (
                r[3].as_str(),
                number(&r[0]) as usize,
                number(&r[1]) as usize,
            )
        })
        .collect();
    assert_eq!(said, fields);
}

#[test]
fn the_constants_of_the_format_are_those_of_the_code() {
    let magic = |m: &[u8; 16]| String::from_utf8(m.to_vec()).unwrap();
    let rows = table("docs/format-ploop1.md", "| constant | value |");
    let said: BTreeMap<_, _> = rows
        .iter()
        .map(|r| (r[0].as_str(), r[1].as_str()))
        .collect();
    let mut want = BTreeMap::new();
    let (v1, v2) = (magic(&ploop1::MAGIC_V1), magic(&ploop1::MAGIC_V2));
    want.insert("MAGIC_V1", v1.as_str());
    want.insert("MAGIC_V2", v2.as_str());
    for (name, value) in &want {
        assert_eq!(said.get(name), Some(value), "{name}");
    }
    let numbers: [(&str, u64); 11] = [
        ("DISK_TYPE", ploop1::DISK_TYPE.into()),
        ("IN_USE", ploop1::IN_USE.into()),
        ("CLOSED_V21", ploop1::CLOSED_V21.into()),
        ("FLAG_EMPTY", ploop1::FLAG_EMPTY.into()),
        ("FLAG_CONVERTING", ploop1::FLAG_CONVERTING.into()),
        ("HEADER_BYTES", ploop1::HEADER_BYTES as u64),
        ("HEADER_SLOTS", ploop1::HEADER_SLOTS.into()),
        ("PAGE_SLOTS", ploop1::PAGE_SLOTS.into()),
        ("ENTRIES_MAX", ploop1::ENTRIES_MAX.into()),
        ("extension::MAGIC", extension::MAGIC),
        ("extension::BITMAP", extension::BITMAP),
    ];
    for (name, value) in numbers {
        let said = said
            .get(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(number(said), value, "{name}");
    }
    assert_eq!(said.len(), want.len() + numbers.len(), "{said:?}");
}

#[test]
fn the_calls_are_those_of_the_code() {
    let rows = table("docs/abi.md", "| call | nr | number |");
    let source = text("rust/ctl.rs");
    for (row, (name, value)) in rows.iter().zip(calls()) {
        assert_eq!(row[0], name);
        assert_eq!(number(&row[1]), u64::from(value & 0xff), "{name}");
        assert_eq!(number(&row[2]), value.into(), "{name}");
        let is_served = source.contains(&format!("abi::{name} "));
        assert_eq!(row[4], if is_served { "yes" } else { "no" }, "{name}");
    }
    assert_eq!(rows.len(), calls().len());
}

#[test]
fn the_structures_are_those_of_the_code() {
    let rows = table("docs/abi.md", "| structure | field |");
    let said: Vec<_> = rows
        .iter()
        .map(|r| {
            let (offset, size) = (number(&r[2]) as usize, number(&r[3]) as usize);
            (r[0].as_str(), r[1].as_str(), offset, size)
        })
        .collect();
    let mut want = Vec::new();
    for (name, size, fields) in structures() {
        is_dense(name, &fields, size);
        want.extend(
            fields
                .iter()
                .map(|(f, offset, len)| (name, *f, *offset, *len)),
        );
    }
    assert_eq!(said, want);
    let rows = table("docs/abi.md", "| flag | value |");
    let flags = constants().into_iter();
    let want: Vec<_> = flags
        .filter_map(|(n, v)| Some((n.strip_prefix("FLAG_")?, v)))
        .collect();
    let said: Vec<_> = rows
        .iter()
        .map(|r| (r[0].as_str(), number(&r[1])))
        .collect();
    assert_eq!(said, want);
}

#[test]
fn the_states_admit_what_the_table_says() {
    let states = [
        State::Empty,
        State::Stopped { nr_deltas: 1 },
        State::Running { nr_deltas: 1 },
    ];
    for row in table("docs/abi.md", "| call | empty | stopped | running |") {
        let call = match row[0].as_str() {
            "ADD_DELTA" => Call::AddDelta,
            "DEL_DELTA 0" => Call::DelDelta(0),
            "DEL_DELTA 1" => Call::DelDelta(1),
            "START" => Call::Start,
            "STOP" => Call::Stop { openers: 1 },
            "STOP, open elsewhere" => Call::Stop { openers: 2 },
            "CLEAR" => Call::Clear,
            "SYNC" => Call::Sync,
            "SNAPSHOT" => Call::Snapshot,
            "OP_START" => Call::Change,
            "FREEZE, THAW" => Call::Freeze,
            "CTL_REMOVE" => Call::Remove { openers: 0 },
            "CTL_REMOVE, open" => Call::Remove { openers: 1 },
            other => panic!("no call '{other}'"),
        };
        for (state, said) in states.into_iter().zip(&row[1..]) {
            let want = match admit(state, call) {
                Ok(()) => "ok",
                Err(Refusal::Busy) => "EBUSY",
                Err(Refusal::NotFound) => "ENOENT",
                Err(Refusal::Invalid) => "EINVAL",
            };
            assert_eq!(said, want, "{} in {state:?}", row[0]);
        }
    }
}

/// Module, tool and packages are of one version.
#[test]
fn there_is_one_version() {
    let changelog = text("debian/changelog");
    let first = named(&changelog, "ploop (", ')').remove(0);
    assert_eq!(first, abi::VERSION);
    for package in ["userspace/Cargo.toml", "rust/pure/Cargo.toml"] {
        let text = text(package);
        let version = named(&text, "\nversion = \"", '"').remove(0);
        assert_eq!(version, abi::VERSION, "{package}");
    }
}

/// What `prefix` introduces in `source`, up to `end`.
fn named<'a>(source: &'a str, prefix: &str, end: char) -> Vec<&'a str> {
    let parts = source.split(prefix).skip(1);
    parts
        .filter_map(|p| p.split_once(end))
        .map(|(n, _)| n)
        .collect()
}

#[test]
fn all_sysfs_files_and_parameters_are_described() {
    let show = text("rust/device/show.rs");
    let lists = show.split("/// The folders of a device.").next().unwrap();
    let folder = |name: &str| {
        let from = lists.split(&format!("static {name}_FILES")).nth(1).unwrap();
        let list = from.split(");").next().unwrap();
        named(list, "c\"", '"')
    };
    let mut want = BTreeSet::new();
    for (list, folder_name) in [
        ("STATE", "pstate"),
        ("KNOB", "ptune"),
        ("TOP", "pstate"),
        ("EVENT", "pstate"),
        ("TUNE", "ptune"),
        ("DELTA", "pdelta/LEVEL"),
    ] {
        want.extend(folder(list).iter().map(|f| format!("{folder_name}/{f}")));
    }
    let rows = table("docs/abi.md", "| file | content |");
    let said: BTreeSet<_> = rows.iter().map(|r| r[0].clone()).collect();
    assert_eq!(said, want);

    let helpers = text("rust/sys/helpers.c");
    let want: BTreeSet<_> = named(&helpers, "\nmodule_param(", ',')
        .into_iter()
        .collect();
    let rows = table("docs/abi.md", "| parameter | default |");
    let said: BTreeSet<_> = rows.iter().map(|r| r[0].as_str()).collect();
    assert_eq!(said, want);
}

#[test]
fn the_bytes_that_are_locked_are_those_of_the_code() {
    let source = text("rust/io/lock.rs");
    let bytes: BTreeMap<_, _> = source
        .lines()
        .filter_map(|l| l.strip_prefix("const BYTE_")?.split_once(": u8 = "))
        .map(|(name, value)| (name, value.trim_end_matches(';')))
        .collect();
    let list = |name: &str| {
        let from = source.split(&format!("const {name}: [u8")).nth(1).unwrap();
        let from = from.split("= [").nth(1).unwrap();
        let names = named(from.split("];").next().unwrap(), "BYTE_", ',');
        // The last of a list on one line ends without a comma.
        let last = from.split("];").next().unwrap().rsplit("BYTE_").next();
        let last = last.unwrap().trim_end_matches([',', '\n', ' ']);
        let all: BTreeSet<_> = names.into_iter().chain([last]).collect();
        let mut all: Vec<_> = all.iter().map(|n| bytes[n].to_string()).collect();
        all.sort();
        all.join(", ")
    };
    for row in table("docs/abi.md", "| delta | holds |") {
        let what = match row[0].as_str() {
            "read-only" => "READ",
            "writable" => "WRITE",
            other => panic!("no delta '{other}'"),
        };
        assert_eq!(row[1], list(&format!("SHOWN_TO_{what}")));
        assert_eq!(row[2], list(&format!("EXCLUDED_BY_{what}")));
    }
}

/// Every rule names its mutants, and every mutant in the code is named by a rule.
#[test]
fn every_mutant_belongs_to_a_rule() {
    let page = text("docs/architecture.md");
    let mut mutants = BTreeSet::new();
    let dirs = ["rust/pure/src", "rust/pure/src/offline"];
    let entries = dirs
        .iter()
        .flat_map(|dir| std::fs::read_dir(top().join(dir)).unwrap());
    for entry in entries {
        let path = entry.unwrap().path();
        // What lib.rs has is an example.
        if path.extension().is_none_or(|e| e != "rs") || path.ends_with("lib.rs") {
            continue;
        }
        let source = std::fs::read_to_string(path).unwrap();
        let found = named(&source, "mutant!(\"", '"');
        mutants.extend(found.into_iter().map(str::to_string));
    }
    assert!(!mutants.is_empty());
    for mutant in &mutants {
        assert!(
            page.contains(&format!("`{mutant}`")),
            "{mutant} is in no rule"
        );
    }
    let said = named(&page, "mutant `", '`').into_iter();
    for mutant in said.chain(named(&page, "mutants `", '`')) {
        assert!(mutants.contains(mutant), "there is no mutant {mutant}");
    }
    for fault in named(&page, "fault `", '`') {
        let sim = text("tests/host/src/sim.rs");
        assert!(
            sim.contains(&format!("    {fault},")),
            "there is no fault {fault}"
        );
    }
}

/// The list of what is broken on purpose has every mutant and every fault, each under a rule that
/// names it, with tests that exist; and every rule is in it.
#[test]
fn what_is_broken_on_purpose_is_listed() {
    let architecture = text("docs/architecture.md");
    let rules = table("docs/architecture.md", "| rule | decided | done |");
    let tests = text("tests/host/tests/crash.rs") + &text("tests/host/tests/mutants.rs");
    let mut listed = BTreeSet::new();
    let mut broken = BTreeSet::new();
    for row in table("docs/testing.md", "| rule | mutant or fault |") {
        for name in row[1].split(", ") {
            assert!(listed.insert(name.to_string()), "{name} is listed twice");
            for rule in row[0].split(", ") {
                let of_rule = rules.iter().find(|r| r[0] == rule).unwrap();
                let mut words = of_rule[3].split([' ', ',', ';']);
                assert!(words.any(|w| w == name), "rule {rule} does not name {name}");
                broken.insert(rule.to_string());
            }
        }
        for test in row[3].split(", ") {
            assert!(tests.contains(&format!("fn {test}()")), "no test {test}");
        }
    }
    assert_eq!(broken.len(), rules.len(), "only {broken:?} are broken");
    let sim = text("tests/host/src/sim.rs");
    let faults = sim.split("pub enum Fault {").nth(1).unwrap();
    let faults = faults.split("\n}").next().unwrap().lines();
    let faults = faults.filter(|l| !l.contains("///"));
    let faults = faults.filter_map(|l| l.trim().strip_suffix(','));
    let words = ["mutant `", "fault `"];
    let named = words.into_iter().flat_map(|w| named(&architecture, w, '`'));
    let all: BTreeSet<_> = faults.chain(named).filter(|f| *f != "None").collect();
    let listed: BTreeSet<_> = listed.iter().map(String::as_str).collect();
    assert_eq!(listed, all);
}

fn pages() -> Vec<String> {
    let mut pages = vec!["README.md".to_string()];
    for entry in std::fs::read_dir(top().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            pages.push(format!("docs/{name}"));
        }
    }
    pages.sort();
    pages
}

/// Paths in backquotes and links: they must exist.
#[test]
fn what_pages_refer_to_exists() {
    let mut missing = Vec::new();
    for page in pages() {
        let text = text(&page);
        let quoted = text.split('`').skip(1).step_by(2);
        let paths = quoted.filter(|q| {
            let is_path = ["rust/", "tests/", "qemu/", "docs/", "userspace/", ".ci/"]
                .iter()
                .any(|p| q.starts_with(p));
            is_path && !q.contains(['*', '<', ' ', 'N', '{', '…'])
        });
        for path in paths {
            let path = path.split("::").next().unwrap();
            if !top().join(path).exists() {
                missing.push(format!("{page}: {path}"));
            }
        }
        for link in named(&text, "](", ')') {
            let file = link.split('#').next().unwrap();
            let dir = Path::new(&page).parent().unwrap();
            if !link.contains("://") && !file.is_empty() && !top().join(dir).join(file).exists() {
                missing.push(format!("{page}: link to {link}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Where guest tests and host tests are listed, all are.
#[test]
fn all_guest_tests_are_listed() {
    let page = text("docs/testing.md");
    let mut missing = Vec::new();
    for entry in std::fs::read_dir(top().join("tests/guest")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(name) = name.strip_suffix(".sh").filter(|n| *n != "lib") else {
            continue;
        };
        if !page.contains(&format!("`{name}`")) {
            missing.push(name.to_string());
        }
    }
    missing.sort();
    assert!(missing.is_empty(), "docs/testing.md lacks {missing:?}");
}

/// A C program that prints a name and a value for everything in the header.
fn c_program() -> String {
    let mut c = String::from("#include <stddef.h>\n#include <stdio.h>\n#include \"ploop.h\"\n");
    c += "#define P(name, value) printf(\"%s %llu\\n\", name, (unsigned long long)(value))\n";
    c += "int main(void)\n{\n";
    for (name, _) in calls() {
        c += &format!("\tP(\"{name}\", PLOOP_IOC_{name});\n");
    }
    for (name, _) in constants() {
        c += &format!("\tP(\"{name}\", PLOOP_{name});\n");
    }
    for (name, _, fields) in structures() {
        let s = c_name(name);
        c += &format!("\tP(\"{name}\", sizeof(struct {s}));\n");
        for (field, ..) in fields {
            c += &format!("\tP(\"{name}.{field}\", offsetof(struct {s}, {field}));\n");
            c += &format!("\tP(\"{name}.{field} size\", sizeof(((struct {s} *)0)->{field}));\n");
        }
    }
    c + "\tprintf(\"control %s\\n\", PLOOP_CONTROL_NAME);\n\treturn 0;\n}\n"
}

fn c_name(structure: &str) -> &'static str {
    match structure {
        "Ctl" => "ploop_ctl",
        "Chunk" => "ploop_ctl_chunk",
        "AddDelta" => "ploop_add_delta",
        "GetDevice" => "ploop_getdevice_ctl",
        "DeviceArg" => "ploop_device_arg",
        "Version" => "ploop_version",
        "Truncate" => "ploop_truncate_ctl",
        "IndexUpdate" => "ploop_index_update_ctl",
        "ReverseMap" => "reverse_map",
        "Balloon" => "ploop_balloon_ctl",
        "DumpBat" => "ploop_dump_bat_ctl",
        "OpStart" => "ploop_op_start",
        "OpStatus" => "ploop_op_status",
        "TrackExtent" => "ploop_track_extent",
        "Checkpoint" => "ploop_checkpoint",
        "CheckpointRead" => "ploop_checkpoint_read",
        "Extent" => "ploop_extent",
        other => panic!("{other} has no name in C"),
    }
}

/// Compiles and runs the program; `None` if there is no compiler.
fn what_c_says() -> Option<String> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, program) = (dir.join("header.c"), dir.join("header"));
    std::fs::write(&source, c_program()).unwrap();
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-std=gnu99", "-I"])
        .arg(top().join("userspace/include"))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output();
    let compiled = match compiled {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        other => other.unwrap(),
    };
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{said}");
    let output = Command::new(&program).output().unwrap();
    assert!(output.status.success());
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn the_c_header_is_the_abi() {
    let Some(said) = what_c_says() else {
        let missing = "left out: the C header, for want of a C compiler";
        // The build root has one.
        assert!(std::env::var_os("PLOOP_INSIDE").is_none(), "{missing}");
        let mut log = std::io::stderr();
        writeln!(log, "{missing}").unwrap();
        return;
    };
    let mut want = String::new();
    for (name, value) in calls() {
        want += &format!("{name} {value}\n");
    }
    for (name, value) in constants() {
        want += &format!("{name} {value}\n");
    }
    for (name, size, fields) in structures() {
        want += &format!("{name} {size}\n");
        for (field, offset, len) in fields {
            want += &format!("{name}.{field} {offset}\n{name}.{field} size {len}\n");
        }
    }
    want += &format!("control {}\n", abi::CONTROL_NAME);
    assert_eq!(said, want);
    // And nothing in the header that was not asked for.
    let header = text("userspace/include/ploop.h");
    let nr = header.matches("#define PLOOP_IOC_").count();
    assert_eq!(nr, calls().len());
}

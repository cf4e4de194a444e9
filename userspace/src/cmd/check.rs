// SPDX-License-Identifier: GPL-2.0
//! `ploopctl check`.

use super::attached;
use super::info::extension_name;
use super::Target;
use crate::cli::CheckArgs;
use crate::descriptor::guid::Guid;
use crate::descriptor::model::ImageEntry;
use crate::disk::{Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::{repair, Access, Image, Kind, Report};
use crate::locks::{ImageLock, Use};
use crate::output::{self, count};
use crate::size::human;
use crate::sysfs::{Device, Sysfs};
use ploop_pure::problem::{Cure, Problem};
use ploop_pure::repair::{Plan, Scope};
use serde::Serialize;
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// How often a changing image is looked at before an entry counts as bad.
const LIVE_TRIES: u32 = 5;

#[derive(Serialize)]
struct Answer {
    #[serde(serialize_with = "output::path")]
    image: PathBuf,
    /// `clean`, `damaged`, `invalid` or `repaired`; of a disk also `missing`, or `raw`, in which nothing
    /// can be checked.
    result: &'static str,
    live: bool,
    problems: Vec<ProblemRow>,
    problems_omitted: u64,
    #[serde(flatten)]
    counts: Option<Counts>,
    /// What `--repair` does, or did.
    plan: Vec<String>,
}

impl Answer {
    /// Without anything but the result.
    fn plain(image: PathBuf, result: &'static str) -> Self {
        Self {
            image,
            result,
            live: false,
            problems: Vec::new(),
            problems_omitted: 0,
            counts: None,
            plan: Vec::new(),
        }
    }
}

#[derive(Serialize)]
struct ProblemRow {
    kind: &'static str,
    cure: &'static str,
    message: String,
    cluster: Option<u32>,
}

#[derive(Serialize)]
struct Counts {
    format_version: u32,
    cluster_size: u64,
    clusters: u32,
    used_clusters: u32,
    leaked_clusters: u32,
    tail_bytes: u64,
    extension: &'static str,
}

/// Runs the command.
pub fn run(args: &CheckArgs) -> Result<()> {
    let sysfs = Sysfs::default();
    let mut job = Job {
        repair: args.repair,
        json: args.json,
        collected: None,
    };
    match Target::resolve(&args.target, &sysfs)? {
        Target::Device(device) => live(&job, &device),
        Target::Disk(path) => {
            job.collected = args.json.then(RefCell::default);
            disk(&job, &path, args)
        }
        Target::Image(path) => match sysfs.find_image(&path)?.first() {
            Some(device) => Err(in_use(&path, device)),
            None => unattached(&job, &path, args),
        },
    }
}

/// An image that nobody has. One of a disk is repaired as such, or the disk would take it for changed
/// by somebody else.
fn unattached(job: &Job, path: &Path, args: &CheckArgs) -> Result<()> {
    let real = std::fs::canonicalize(path).ok().filter(|_| job.repair);
    // A descriptor that cannot be understood keeps nobody from a repair.
    let descriptor = real
        .as_ref()
        .and_then(|r| attached::naming(r).ok().flatten());
    let (Some(real), Some(descriptor)) = (real, descriptor) else {
        return image(job, path);
    };
    let outside = Live::default();
    let mut opened = super::disk::open(&descriptor, &outside, Work::Long, &args.wait)?;
    let images = opened.descriptor().disk().images.clone();
    let is_it = |i: &&ImageEntry| opened.file(i).is_ok_and(|file| file == real);
    match images.iter().find(is_it).map(|i| i.guid) {
        Some(guid) => one_of_disk(job, &mut opened, guid),
        // What was unfinished has taken it out.
        None => image(job, path),
    }
}

/// What is asked for.
struct Job {
    repair: bool,
    json: bool,
    /// Answers that are given together.
    collected: Option<RefCell<Vec<Answer>>>,
}

impl Job {
    fn answer(&self, answer: Answer) -> Result<()> {
        match &self.collected {
            None => output::json(&answer),
            Some(all) => {
                all.borrow_mut().push(answer);
                Ok(())
            }
        }
    }
}

#[derive(Serialize)]
struct DiskAnswer<'a> {
    #[serde(serialize_with = "output::path")]
    descriptor: &'a Path,
    images: Vec<Answer>,
}

/// Checks all images of a disk; the first that is damaged makes the verdict. Attached, the entries
/// of its top are judged.
fn disk(job: &Job, path: &Path, args: &CheckArgs) -> Result<()> {
    let outside = Live::default();
    let mut opened = super::disk::open(path, &outside, Work::Long, &args.wait)?;
    let users = opened.users(&outside)?;
    // Who only reads keeps nobody from looking.
    let device = match job.repair {
        true => users.all().next(),
        false => users.writers.first(),
    };
    if let Some(device) = device {
        let verdict = live(job, device);
        return tell_all(job, path).and(verdict);
    }
    let top = opened.descriptor().disk().top;
    opened.members(top, true)?;
    let mut verdict = Ok(());
    for image in opened.descriptor().disk().images.clone() {
        let one = one_of_disk(job, &mut opened, image.guid);
        if let Err(e) = &one {
            output::note(&e.without_hint());
        }
        verdict = verdict.and(one);
    }
    tell_all(job, path)?;
    verdict
}

/// Gives the answers on the images of a disk together, if there are any.
fn tell_all(job: &Job, path: &Path) -> Result<()> {
    let images = job.collected.as_ref().map(RefCell::take);
    match images.filter(|images| !images.is_empty()) {
        Some(images) => output::json(&DiskAnswer {
            descriptor: path,
            images,
        }),
        None => Ok(()),
    }
}

/// One that is missing is damage, too, if only to the snapshots that build on it.
fn one_of_disk(job: &Job, disk: &mut Opened, guid: Guid) -> Result<()> {
    let member = match disk.member(guid) {
        Ok(member) => member,
        Err(e) => {
            let file = super::disk::file(disk.path(), disk.descriptor().image(guid));
            if job.json {
                let is_there = file.symlink_metadata().is_ok();
                job.answer(Answer::plain(
                    file,
                    if is_there { "invalid" } else { "missing" },
                ))?;
            }
            return Err(e.hint(format!(
                "restore it from a backup, or drop what builds on it: 'ploopctl snapshot delete --uuid {guid}'"
            )));
        }
    };
    let at = member.path.display();
    if member.header.is_none() {
        return match job.json {
            true => job.answer(Answer::plain(member.path, "raw")),
            false => output::text(&format!("{at}: raw, nothing to check\n")),
        };
    }
    if !job.json {
        output::text(&format!("{at}:\n"))?;
    }
    let checked = image(job, &member.path);
    if job.repair {
        disk.changed_by_us(&member)?;
    }
    checked
}

fn in_use(path: &Path, device: &Device) -> Error {
    let node = device.device.display();
    let what = format!("{} is attached as {node}", path.display());
    Error::new(Code::InUse, what).hint(format!(
        "detach it first, or look at its entries with 'ploopctl check {node}'"
    ))
}

fn image(job: &Job, path: &Path) -> Result<()> {
    let (access, usage) = if job.repair {
        (Access::Write, Use::Write)
    } else {
        (Access::Read, Use::Read)
    };
    let image = Image::open(path, access)?;
    if image.kind() == Kind::Block {
        let what = format!("{} is a block device, not an image file", path.display());
        return Err(Error::new(Code::NotAnImage, what));
    }
    let _lock = ImageLock::take(image.file(), path, usage)?;
    let report = match image.check()? {
        Ok(report) => report,
        Err(problem) => return invalid(job, &image, problem),
    };
    let plan = Plan::new(&report.findings, Scope::All);
    let Some(plan) = plan.filter(|_| job.repair) else {
        let result = tell(job, path, &report, plan.as_ref(), Mode::Look);
        return result.and_then(|()| verdict(path, &report));
    };
    if !job.json {
        tell(job, path, &report, Some(&plan), Mode::Repair)?;
    }
    repair::apply(&image, &report.findings.header, &plan)?;
    // Believe the repair only when a second look does.
    let after = image.check()?.map_err(|p| image.not_an_image(p))?;
    verdict(path, &after)?;
    if job.json {
        tell(job, path, &report, Some(&plan), Mode::Repair)
    } else {
        output::text("Repaired.\n")
    }
}

/// Judges the entries of the image of a device, which may be changing.
fn live(job: &Job, device: &Device) -> Result<()> {
    let Some(top) = device.top() else {
        let what = format!("{} has no image", device.device.display());
        return Err(Error::new(Code::NotAttached, what));
    };
    let path = &top.image;
    if job.repair {
        return Err(in_use(path, device));
    }
    if top.format == "raw" {
        let what = format!("{} is a raw image: nothing to check", path.display());
        return Err(Error::new(Code::NotAnImage, what));
    }
    let image = Image::open(top.reachable()?, Access::Read)?;
    let report = match look_live(&image)? {
        Ok(report) => report,
        Err(problem) => return invalid(job, &image, problem),
    };
    output::note(&format!("note: {}", super::LAGS));
    tell(job, path, &report, None, Mode::Live)?;
    if report.problems.is_empty() {
        return Ok(());
    }
    let what = format!("{} is damaged", path.display());
    let hint = "detach the device, then 'ploopctl check --repair' the image";
    Err(Error::new(Code::Damaged, what).hint(hint))
}

/// What is wrong with the image of a running device, beside what is right as long as it runs. It changes
/// while it is looked at: what shows once only is nothing.
pub fn look_live(image: &Image) -> Result<std::result::Result<Report, Problem>> {
    let mut tries = 0;
    loop {
        let mut report = match image.check()? {
            Ok(report) => report,
            Err(problem) => return Ok(Err(problem)),
        };
        // The mark is right, and the file grows ahead of the entries.
        let is_of_whole = |p: &Problem| {
            matches!(
                p,
                Problem::InUse
                    | Problem::EmptyFlag
                    | Problem::TornTail { .. }
                    | Problem::EntryTorn { .. }
            )
        };
        report.problems.retain(|p| !is_of_whole(p));
        tries += 1;
        if report.problems.is_empty() || tries == LIVE_TRIES {
            return Ok(Ok(report));
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// What kind of look an answer is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Look,
    Repair,
    Live,
}

fn invalid(job: &Job, image: &Image, problem: Problem) -> Result<()> {
    if job.json {
        job.answer(Answer {
            problems: vec![row(problem)],
            ..Answer::plain(image.path().to_owned(), "invalid")
        })?;
    }
    let error = image.not_an_image(problem);
    Err(match problem {
        Problem::Magic => error.hint("if it is a raw image, there is nothing to check"),
        _ => error.hint("the header or length cannot be repaired: take a copy from a backup"),
    })
}

fn verdict(path: &Path, report: &Report) -> Result<()> {
    let at = path.display();
    let Some(cure) = report.findings.cure() else {
        return Ok(());
    };
    let what = format!("{at} is damaged");
    let cost = match cure {
        Cure::Lossless => "mends it and loses nothing",
        Cure::Lossy => "mends it, but what the bad entries held is lost or may be wrong",
        Cure::None => "cannot mend it",
    };
    let hint = format!("'ploopctl check --repair {at}' {cost}");
    Err(Error::new(Code::Damaged, what).hint(hint))
}

fn tell(job: &Job, path: &Path, report: &Report, plan: Option<&Plan>, mode: Mode) -> Result<()> {
    let found = &report.findings;
    let header = found.header;
    let steps = plan.map(|p| p.steps().map(|s| s.to_string()).collect());
    let answer = Answer {
        image: path.to_owned(),
        result: match mode {
            Mode::Repair => "repaired",
            Mode::Look if found.cure().is_some() => "damaged",
            Mode::Live if !report.problems.is_empty() => "damaged",
            Mode::Look | Mode::Live => "clean",
        },
        live: mode == Mode::Live,
        problems: report.problems.iter().copied().map(row).collect(),
        problems_omitted: report.nr_omitted,
        counts: Some(Counts {
            format_version: header.version.number(),
            cluster_size: header.cluster.bytes(),
            clusters: header.nr_entries,
            used_clusters: found.usage.nr_used,
            leaked_clusters: report.nr_leaked,
            tail_bytes: found.tail_bytes(),
            extension: extension_name(found.extension),
        }),
        plan: steps.unwrap_or_default(),
    };
    if job.json {
        job.answer(answer)
    } else {
        output::text(&describe(&answer, mode))
    }
}

fn describe(answer: &Answer, mode: Mode) -> String {
    let mut text = String::new();
    for p in &answer.problems {
        text += &format!("problem: {} ({})\n", p.message, p.cure);
    }
    if answer.problems_omitted > 0 {
        text += &format!("and {} more problems\n", answer.problems_omitted);
    }
    if let Some(c) = &answer.counts {
        text += &format!(
            "ploop1 version {}, {} clusters: {} of {} used, {} leaked; {} unused at the end\n",
            c.format_version,
            human(c.cluster_size),
            c.used_clusters,
            c.clusters,
            c.leaked_clusters,
            count(c.tail_bytes, "byte"),
        );
        if c.extension == "valid" {
            text += "It has a format extension (dirty bitmap), which is valid.\n";
        }
    }
    let has_problems = !answer.problems.is_empty();
    match mode {
        Mode::Repair => text += "Plan:\n",
        Mode::Look if !answer.plan.is_empty() => text += "--repair would:\n",
        Mode::Look | Mode::Live => {}
    }
    for (nr, step) in answer.plan.iter().enumerate() {
        text += &format!("  {}. {step}\n", nr + 1);
    }
    if !has_problems || answer.result == "clean" {
        text += "No damage found.\n";
    }
    text
}

fn row(problem: Problem) -> ProblemRow {
    let (kind, cluster) = kind(problem);
    ProblemRow {
        kind,
        cure: match problem.cure() {
            Cure::Lossless => "lossless",
            Cure::Lossy => "lossy",
            Cure::None => "none",
        },
        message: problem.to_string(),
        cluster,
    }
}

/// Stable name of a problem, and the guest cluster whose entry it is about.
fn kind(problem: Problem) -> (&'static str, Option<u32>) {
    match problem {
        Problem::Truncated { .. } => ("truncated", None),
        Problem::Magic => ("magic", None),
        Problem::DiskType { .. } => ("disk-type", None),
        Problem::ClusterSize { .. } => ("cluster-size", None),
        Problem::SizeZero => ("size-zero", None),
        Problem::SizeLimit { .. } => ("size-limit", None),
        Problem::SizeOverBat { .. } => ("size-over-bat", None),
        Problem::FirstBlock { .. } => ("first-block", None),
        Problem::InUseValue { .. } => ("in-use-value", None),
        Problem::Flags { .. } => ("flags", None),
        Problem::InUse => ("in-use", None),
        Problem::EmptyFlag => ("empty-flag", None),
        Problem::TornTail { .. } => ("torn-tail", None),
        Problem::Extension { .. } => ("extension", None),
        Problem::EntryMisaligned { cluster, .. } => ("entry-misaligned", Some(cluster)),
        Problem::EntryInHeader { cluster, .. } => ("entry-in-header", Some(cluster)),
        Problem::EntryPastEnd { cluster, .. } => ("entry-past-end", Some(cluster)),
        Problem::EntryTorn { cluster, .. } => ("entry-torn", Some(cluster)),
        Problem::EntryPastDisk { cluster, .. } => ("entry-past-disk", Some(cluster)),
        Problem::EntryDuplicate { cluster, .. } => ("entry-duplicate", Some(cluster)),
    }
}

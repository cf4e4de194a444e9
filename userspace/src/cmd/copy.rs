// SPDX-License-Identifier: GPL-2.0
//! `ploopctl copy`: what is copied, over what connection, and what the user sees of it.

use super::{attached, disk, Target};
use crate::cli::{CopyCommand, CopyReceiveArgs, CopySendArgs, CopyThawArgs};
use crate::copy::line::Line;
use crate::copy::live::Kernel;
use crate::copy::receive::{self, receive};
use crate::copy::send;
use crate::copy::source::{How, Source, SourceFile};
use crate::copy::stream::Stream;
use crate::copy::{v1, Silent, Sink, Watch};
use crate::descriptor::guid::Guid;
use crate::disk::{freeze, Live, Opened, Work};
use crate::error::{Code, Error, Result};
use crate::image::{Access, Image};
use crate::locks::{ImageLock, Use};
use crate::operate;
use crate::signals::{for_child, Requests};
use crate::sysfs::{Device, Sysfs};
use shown::Shown;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::thread::{sleep, JoinHandle};
use std::time::{Duration, Instant};

mod shown;

/// How long a command has to end after the copy has failed.
const GRACE: Duration = Duration::from_secs(3);
const NAP: Duration = Duration::from_millis(50);
/// What to heed where a copy is complete, and the command failed all the same.
const TWO: &str = "the disk here goes on: do not use both";

/// Runs the command.
pub fn run(command: &CopyCommand) -> Result<()> {
    match command {
        CopyCommand::Send(args) => send(args),
        CopyCommand::Receive(args) => take(args),
        CopyCommand::Thaw(args) => thaw(args),
    }
}

/// What is copied, and what keeps others away from it meanwhile.
struct Found {
    source: Source,
    /// The device that writes to it.
    device: Option<Device>,
    /// Those that are not of a device: locked while they are read.
    images: Vec<Image>,
    _disk: Option<Opened>,
}

fn send(args: &CopySendArgs) -> Result<()> {
    let requests = Rc::new(RefCell::new(Requests::begin()));
    let found = find(args)?;
    if args.v1 && found.source.files.len() > 1 {
        let what = "a stream of version 1 holds one image";
        return Err(Error::new(Code::Param, what)
            .hint("--top-only sends the one that is written to; copy the others as files"));
    }
    let mut locks = Vec::new();
    for image in &found.images {
        locks.push(ImageLock::take(image.file(), image.path(), Use::Read)?);
    }
    let mut watch = Shown::new(args.json, &requests);
    let peer = Peer::connect(args, &requests)?;
    let Peer { to, back, other } = peer;
    let sent = if args.v1 {
        run_sink(args, &found, &mut v1::Sender::new(to), &mut watch)
    } else {
        let begun = Stream::begin(to, back, &found.source, args.compress.is_some());
        begun.and_then(|mut stream| run_sink(args, &found, &mut stream, &mut watch))
    };
    watch.end();
    // The connection is closed: the other side ends.
    let (sent, frozen) = match sent {
        Ok(frozen) => (Ok(()), frozen),
        Err(e) => (Err(e), None),
    };
    // A command may do more at its end than to receive, unless all that writes waits for it.
    let patience = patience(args.timeout).filter(|_| frozen.is_some());
    other.finish(sent, &mut requests.borrow_mut(), patience)?;
    if let Some(kernel) = frozen {
        kernel.keep_frozen();
    }
    Ok(())
}

/// Sends it all; what is to be left frozen, and is thawed when dropped.
fn run_sink(
    args: &CopySendArgs,
    found: &Found,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
) -> Result<Option<Kernel>> {
    let options = send::Options {
        rate: args.bwlimit,
        rounds: args.rounds,
        stop_command: args.stop_command.clone(),
    };
    let Some(device) = &found.device else {
        return send::at_rest(&found.source, sink, watch, &options).map(|()| None);
    };
    let mut kernel = Kernel::open(device.clone())?;
    let sent = send::live(&found.source, &mut kernel, sink, watch, &options);
    let kept = match sent {
        Ok(()) if args.keep_frozen => Some(kernel),
        Ok(()) | Err(_) => {
            // It thaws the disk.
            drop(kernel);
            watch.thawed();
            None
        }
    };
    sent.map(|()| kept)
}

/// Finds what `args` name.
fn find(args: &CopySendArgs) -> Result<Found> {
    let sysfs = Sysfs::default();
    let device = match Target::resolve(&args.target, &sysfs)? {
        Target::Disk(path) => return find_disk(args, &path),
        Target::Device(device) => *device,
        Target::Image(path) => {
            let users = sysfs.find_image(&path)?;
            let writer = users
                .into_iter()
                .find(|d| d.delta_of(&path).is_some_and(|l| !l.read_only));
            match writer {
                Some(device) => device,
                None => return find_image(&path),
            }
        }
    };
    match attached::descriptor_of(&device)? {
        Some(path) => find_disk(args, &path),
        None => find_device(args, device),
    }
}

/// An image that nobody writes to.
fn find_image(path: &Path) -> Result<Found> {
    attached::must_be_settled(path)?;
    let image = Image::open(path, Access::Read)?;
    let is_raw = !image.has_magic()?;
    if is_raw {
        let what = format!("{} is not a ploop1 image", path.display());
        return Err(Error::new(Code::NotAnImage, what)
            .hint("a raw image is copied with its disk, attached, or as any file"));
    }
    let file = SourceFile::open(path, &name_of(path)?, [0; 16], false, How::AtRest)?;
    Ok(Found {
        source: Source {
            files: vec![file],
            descriptor: None,
            is_directory: false,
        },
        device: None,
        images: vec![image],
        _disk: None,
    })
}

/// A device without a descriptor.
fn find_device(args: &CopySendArgs, device: Device) -> Result<Found> {
    let at = device.device.display();
    if !device.running {
        let what = format!("{at} is not running");
        return Err(Error::new(Code::NotAttached, what));
    }
    let skip = match device.deltas.len() {
        n if args.top_only => n.saturating_sub(1),
        n if n > 1 && !args.chain => {
            let what = format!("{at} has {n} images and no descriptor");
            return Err(Error::new(Code::Param, what)
                .hint("--chain sends all of them, --top-only the one that is written to"));
        }
        _ => 0,
    };
    let mut files = Vec::new();
    for delta in device.deltas.iter().skip(skip) {
        let path = delta.reachable()?;
        let how = if delta.read_only {
            How::AtRest
        } else {
            How::Live
        };
        let is_raw = delta.format == "raw";
        files.push(SourceFile::open(
            path,
            &name_of(path)?,
            [0; 16],
            is_raw,
            how,
        )?);
    }
    let source = Source {
        files,
        descriptor: None,
        is_directory: args.chain,
    };
    let mut names: Vec<_> = source.files.iter().map(|f| &f.info.name).collect();
    names.sort();
    if names.windows(2).any(|w| w[0] == w[1]) {
        let what = format!("two images of {at} have the same name");
        return Err(
            Error::new(Code::Param, what).hint("copy the lower ones as files, then --top-only")
        );
    }
    // Of one that only reads, nobody shall write to the images meanwhile.
    let images = match device.read_only {
        true => source
            .files
            .iter()
            .map(|file| Image::open(&file.path, Access::Read))
            .collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let device = Some(device).filter(|d| !d.read_only);
    Ok(Found {
        source,
        device,
        images,
        _disk: None,
    })
}

/// A disk with a descriptor, which nobody else works on meanwhile.
fn find_disk(args: &CopySendArgs, path: &Path) -> Result<Found> {
    let live = Live::default();
    let disk = disk::open(path, &live, Work::Long, &args.wait)?;
    let writer = disk.top_writer(&disk.users(&live)?)?;
    let said = disk.descriptor().disk();
    // The top last, those it builds on before it, then what hangs elsewhere first of all.
    let chain = said.chain(said.top).unwrap_or_default();
    let others = said
        .images
        .iter()
        .map(|i| i.guid)
        .filter(|g| !chain.contains(g));
    let mut order: Vec<Guid> = others.chain(chain.iter().copied()).collect();
    if args.top_only {
        order = vec![said.top];
    }
    let (mut files, mut images) = (Vec::new(), Vec::new());
    for guid in order {
        let entry = disk.descriptor().image(guid);
        let path = disk.file(entry)?;
        let is_live = guid == said.top && writer.is_some();
        let is_raw = said.is_raw && said.base().is_some_and(|b| b.guid == guid);
        let how = if is_live { How::Live } else { How::AtRest };
        files.push(SourceFile::open(
            &path,
            own_name(&entry.file)?,
            guid.bytes(),
            is_raw,
            how,
        )?);
        if writer.is_none() {
            images.push(Image::open(&path, Access::Read)?);
        }
    }
    let descriptor = (!args.top_only).then(|| disk.descriptor().text());
    let is_directory = descriptor.is_some();
    Ok(Found {
        source: Source {
            files,
            descriptor,
            is_directory,
        },
        device: writer,
        images,
        _disk: Some(disk),
    })
}

/// The name of an image in the directory of its descriptor.
fn own_name(file: &str) -> Result<&str> {
    if file.contains('/') {
        let what = format!("the image {file} is not directly in the directory of the descriptor");
        return Err(Error::new(Code::Descriptor, what).hint("copy such a disk as files, detached"));
    }
    Ok(file)
}

fn name_of(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str());
    let name = name.filter(|n| n.len() <= crate::copy::wire::NAME_MAX);
    name.map(str::to_owned).ok_or_else(|| {
        let what = format!("the name of {} is not Unicode", path.display());
        Error::new(Code::Param, what)
    })
}

/// The other side.
struct Peer {
    to: Line,
    back: Option<Line>,
    other: Other,
}

enum Other {
    /// Unknown.
    Nobody,
    /// A command of ours.
    Command(Child),
    /// This process.
    Here(JoinHandle<Result<()>>),
}

impl Peer {
    fn connect(args: &CopySendArgs, requests: &Rc<RefCell<Requests>>) -> Result<Self> {
        let patience = patience(args.timeout);
        let line = |file| line(file, requests, patience);
        if let Some(path) = &args.to {
            let (ours, theirs) = UnixStream::pair()
                .map_err(|e| Error::io(Code::System, "cannot make a socket", e))?;
            let path = path.clone();
            let thread = std::thread::Builder::new()
                .spawn(move || receive_here(theirs, path))
                .map_err(|e| Error::io(Code::System, "cannot start a thread", e))?;
            let to = File::from(OwnedFd::from(ours));
            let back = Some(line(dup(to.as_fd())?)?);
            return Ok(Self {
                to: line(to)?,
                back,
                other: Other::Here(thread),
            });
        }
        if let Some(command) = &args.through {
            let (ours, theirs) = (Stdio::piped(), Stdio::piped());
            let mut shell = Command::new("/bin/sh");
            let shell = shell.args(["-c", command]).stdin(ours).stdout(theirs);
            let child = for_child(|| shell.spawn());
            let mut child = child.map_err(|e| Error::io(Code::System, "cannot run /bin/sh", e))?;
            let (Some(to), Some(back)) = (child.stdin.take(), child.stdout.take()) else {
                return Err(Error::new(Code::System, "the command has no pipes"));
            };
            return Ok(Self {
                to: line(File::from(OwnedFd::from(to)))?,
                back: Some(line(File::from(OwnedFd::from(back)))?),
                other: Other::Command(child),
            });
        }
        let stdout = io::stdout();
        if stdout.is_terminal() {
            return Err(Error::new(Code::Param, "the stream is not for a terminal")
                .hint("give --to or --through, or redirect standard output"));
        }
        let to = dup(stdout.as_fd())?;
        let is_socket = to.metadata().is_ok_and(|m| m.file_type().is_socket());
        let back = match (is_socket && !args.v1, args.answers) {
            (_, true) => Some(line(dup(io::stdin().as_fd())?)?),
            (true, false) => Some(line(dup(stdout.as_fd())?)?),
            (false, false) => None,
        };
        Ok(Self {
            to: line(to)?,
            back,
            other: Other::Nobody,
        })
    }
}

impl Other {
    /// Waits until the other side has ended, a command no longer than `patience`, and says what became
    /// of the copy.
    fn finish(
        self,
        sent: Result<()>,
        requests: &mut Requests,
        patience: Option<Duration>,
    ) -> Result<()> {
        match self {
            Self::Nobody => sent,
            Self::Here(thread) => match (sent, thread.join()) {
                // What the receiver says is what went wrong first.
                (Err(e), Ok(Err(own))) if e.code() == Code::Protocol => Err(own),
                (Err(e), _) => Err(e),
                (Ok(()), Ok(done)) => done,
                (Ok(()), Err(_)) => Err(Error::new(Code::System, "the receiver ended")),
            },
            Self::Command(mut child) => {
                let ended = match sent {
                    Ok(()) => await_end(&mut child, requests, patience),
                    Err(e) => Err(e),
                };
                if ended.is_err() {
                    give_time(&mut child);
                }
                let status = child.wait();
                ended?;
                let status = status
                    .map_err(|e| Error::io(Code::System, "cannot wait for the command", e))?;
                if !status.success() {
                    let what = format!("the copy is complete, but the command failed: {status}");
                    return Err(Error::new(Code::System, what));
                }
                Ok(())
            }
        }
    }
}

/// Waits until a command ends that has nothing left to do.
fn await_end(child: &mut Child, requests: &mut Requests, patience: Option<Duration>) -> Result<()> {
    let begun = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if requests.is_end_asked() {
            let what = "ended early, as asked; the copy is complete, and its command had not ended";
            return Err(Error::new(Code::Aborted, what).hint(TWO));
        }
        if patience.is_some_and(|patience| begun.elapsed() >= patience) {
            let what = "the copy is complete, but the command does not end";
            return Err(Error::new(Code::Protocol, what).hint(TWO));
        }
        sleep(NAP);
    }
    Ok(())
}

/// Lets a command end that has lost its input; one that does not is ended.
fn give_time(child: &mut Child) {
    let end = Instant::now() + GRACE;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= end {
            let _ = child.kill();
            return;
        }
        sleep(NAP);
    }
}

fn receive_here(stream: UnixStream, path: PathBuf) -> Result<()> {
    let failed = |e| Error::io(Code::System, "cannot use a socket", e);
    let mut from = stream.try_clone().map_err(failed)?;
    let mut back = stream;
    receive(
        &mut from,
        Some(&mut back),
        &path,
        receive::Options::default(),
        &mut Silent,
    )
}

fn patience(seconds: u32) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

fn line(file: File, requests: &Rc<RefCell<Requests>>, patience: Option<Duration>) -> Result<Line> {
    Line::new(file, requests, patience)
        .map_err(|e| Error::io(Code::System, "cannot use the connection", e))
}

fn dup(fd: BorrowedFd<'_>) -> Result<File> {
    let own = fd.try_clone_to_owned();
    let own = own.map_err(|e| Error::io(Code::System, "cannot use standard input or output", e));
    own.map(File::from)
}

fn take(args: &CopyReceiveArgs) -> Result<()> {
    let requests = Rc::new(RefCell::new(Requests::begin()));
    let patience = patience(args.timeout);
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(
            Error::new(Code::Param, "there is no stream on standard input")
                .hint("'ploopctl copy receive --help' shows how it gets there"),
        );
    }
    let from = dup(stdin.as_fd())?;
    let is_socket = from.metadata().is_ok_and(|m| m.file_type().is_socket());
    let back = match is_socket {
        true => dup(stdin.as_fd())?,
        false => dup(io::stdout().as_fd())?,
    };
    let mut from = line(from, &requests, patience)?;
    let mut back = line(back, &requests, patience)?;
    let options = receive::Options {
        answers_v1: args.answer_v1,
    };
    let mut watch = Shown::new(args.json, &requests);
    let done = receive(&mut from, Some(&mut back), &args.path, options, &mut watch);
    watch.end();
    done
}

fn thaw(args: &CopyThawArgs) -> Result<()> {
    let device = attached::device(&args.target)?;
    let node = operate::open(&device)?;
    node.track_abort()
        .map_err(|e| operate::refused(&device, "stop the write tracker of", e))?;
    node.thaw()
        .map_err(|e| operate::refused(&device, "thaw the file systems on", e))?;
    freeze::thaw_stacked_on(&Sysfs::default(), device.index)
}

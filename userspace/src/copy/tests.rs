// SPDX-License-Identifier: GPL-2.0
//! Copies from end to end, with a kernel of our own where one is needed.

use super::answer::{Answer, Kind};
use super::live::{not_quiet, Live};
use super::receive::{self, receive};
use super::send::{self, Options};
use super::source::{How, Source, SourceFile};
use super::stream::Stream;
use super::{v1, v2, Silent, Sink};
use crate::error::{Code, Error, Result};
use crate::image::create::{self, Space};
use ploop_pure::abi::TrackExtent;
use ploop_pure::layout::ploop1::{Header, Version};
use ploop_pure::units::ClusterSize;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const OPTIONS: Options = Options {
    rate: 0,
    rounds: 10,
    stop_command: None,
};
const CLUSTER: u64 = 32 << 10;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ploopctl-copy-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn nr(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }

    /// An image with some clusters filled, every other of them in part, and a hole.
    fn image(&self, name: &str, nr: u32) -> PathBuf {
        let path = self.at(name);
        let cluster = ClusterSize::from_sectors(64).unwrap();
        let header = Header::new(Version::V2, cluster, 64 * 64).unwrap();
        create::ploop1(&path, header, Space::Thin).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // CIF_Empty goes, as there is data.
        file.write_all_at(&[0; 4], 52).unwrap();
        for n in 0..nr {
            file.write_all_at(&(n + 1).to_le_bytes(), 64 + 4 * u64::from(n))
                .unwrap();
            file.set_len(CLUSTER * u64::from(n + 2)).unwrap();
            let len = [CLUSTER as usize, 5000, 0][n as usize % 3];
            file.write_all_at(&vec![n as u8 + 1; len], CLUSTER * u64::from(n + 1))
                .unwrap();
        }
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn source(path: &Path) -> Source {
    let name = path.file_name().unwrap().to_str().unwrap();
    let file = SourceFile::open(path, name, [0; 16], false, How::AtRest).unwrap();
    Source {
        files: vec![file],
        descriptor: None,
        is_directory: false,
    }
}

/// The stream of an image without a way back.
fn stream(path: &Path, is_packed: bool) -> Vec<u8> {
    let source = source(path);
    let mut bytes = Vec::new();
    let mut sink = Stream::begin(&mut bytes, None::<UnixStream>, &source, is_packed).unwrap();
    send::at_rest(&source, &mut sink, &mut Silent, &OPTIONS).unwrap();
    bytes
}

fn take(mut bytes: &[u8], path: &Path) -> Result<()> {
    receive(
        &mut bytes,
        None,
        path,
        receive::Options::default(),
        &mut Silent,
    )
}

#[test]
fn an_image_at_rest_is_copied_as_it_is() {
    let dir = Dir::new("rest");
    for nr in [0, 1, 40] {
        let from = dir.image(&format!("from{nr}"), nr);
        for is_packed in [false, true] {
            let to = dir.at(&format!("to{nr}{is_packed}"));
            take(&stream(&from, is_packed), &to).unwrap();
            assert_eq!(fs::read(&to).unwrap(), fs::read(&from).unwrap());
        }
    }
    // What is there stays.
    let (from, to) = (dir.image("from", 2), dir.at("to"));
    fs::write(&to, "mine").unwrap();
    assert_eq!(
        take(&stream(&from, false), &to).unwrap_err().code(),
        Code::Create
    );
    assert_eq!(fs::read(&to).unwrap(), b"mine");
}

/// Cut or changed anywhere, nothing of it is left.
#[test]
fn what_is_not_the_stream_leaves_nothing() {
    let dir = Dir::new("bad");
    let from = dir.image("from", 2);
    let good = stream(&from, false);
    let to = dir.at("to");
    let before = dir.nr();
    // All of the heads; of the data some.
    let is_tried = |i: usize| i < 400 || i % 397 == 0 || i + 200 > good.len();
    for i in (0..good.len()).filter(|i| is_tried(*i)) {
        assert!(take(&good[..i], &to).is_err(), "cut at {i}");
        let mut bad = good.clone();
        bad[i] ^= 0x10;
        assert!(take(&bad, &to).is_err(), "changed at {i}");
        assert_eq!(dir.nr(), before, "after {i}");
    }
    take(&good, &to).unwrap();
}

#[test]
fn what_a_killed_receiver_left_is_replaced() {
    let dir = Dir::new("left");
    let from = dir.image("from", 3);
    fs::write(dir.at("to.ploopctl-partial"), "half").unwrap();
    take(&stream(&from, false), &dir.at("to")).unwrap();
    assert_eq!(dir.nr(), 2);
    fs::create_dir(dir.at("again.ploopctl-partial")).unwrap();
    fs::write(dir.at("again.ploopctl-partial/root.hds"), "half").unwrap();
    take(&stream(&from, false), &dir.at("again")).unwrap();
    assert_eq!(dir.nr(), 3);
}

/// A download of the same name, or a directory of somebody, was removed without a word.
#[test]
fn what_somebody_else_has_there_stays() {
    let dir = Dir::new("theirs");
    let from = dir.image("from", 3);
    fs::write(dir.at("to.partial"), "theirs").unwrap();
    take(&stream(&from, false), &dir.at("to")).unwrap();
    assert_eq!(fs::read(dir.at("to.partial")).unwrap(), b"theirs");
    fs::create_dir_all(dir.at("again.ploopctl-partial/home")).unwrap();
    fs::write(dir.at("again.ploopctl-partial/file"), "theirs").unwrap();
    let refused = take(&stream(&from, false), &dir.at("again")).unwrap_err();
    assert_eq!(refused.code(), Code::Unlink);
    assert!(dir.at("again.ploopctl-partial/home").exists());
    assert!(dir.at("again.ploopctl-partial/file").exists());
    nix::unistd::mkfifo(
        &dir.at("fifo.ploopctl-partial"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    let refused = take(&stream(&from, false), &dir.at("fifo")).unwrap_err();
    assert_eq!(refused.code(), Code::Unlink);
}

#[test]
fn with_a_way_back_both_sides_know() {
    let dir = Dir::new("answers");
    let from = dir.image("from", 60);
    let source = source(&from);
    let copy = |to: PathBuf| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || {
            let mut back = theirs.try_clone().unwrap();
            receive(
                &mut theirs,
                Some(&mut back),
                &to,
                receive::Options::default(),
                &mut Silent,
            )
        });
        let back = Some(ours.try_clone().unwrap());
        let sent = Stream::begin(ours, back, &source, false)
            .and_then(|mut sink| send::at_rest(&source, &mut sink, &mut Silent, &OPTIONS));
        (sent, other.join().unwrap())
    };
    let (sent, received) = copy(dir.at("to"));
    sent.unwrap();
    received.unwrap();
    assert_eq!(fs::read(dir.at("to")).unwrap(), fs::read(&from).unwrap());
    let (sent, received) = copy(dir.at("to"));
    assert_eq!(received.unwrap_err().code(), Code::Create);
    let said = sent.unwrap_err().to_string();
    assert!(!said.contains("do not use both"), "{said}");
    // It may have all, and nothing is heard of it.
    let lost = Stream::begin(std::io::sink(), Some(std::io::empty()), &source, false)
        .and_then(|mut sink| send::at_rest(&source, &mut sink, &mut Silent, &OPTIONS));
    let lost = lost.unwrap_err().to_string();
    assert!(lost.contains("do not use both"), "{lost}");
    assert!(
        said.contains("gave up") && said.contains("exists already"),
        "{said}"
    );
    let (sent, received) = copy(dir.at("none/to"));
    assert!(sent.is_err() && received.is_err());
}

#[test]
fn through_a_pipe_the_end_is_not_confirmed() {
    let dir = Dir::new("pipe");
    let from = dir.image("from", 50);
    let to = dir.at("to");
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (mut reader, writer) = (fs::File::from(reader), fs::File::from(writer));
    let path = to.clone();
    let other = std::thread::spawn(move || {
        receive(
            &mut reader,
            None,
            &path,
            receive::Options::default(),
            &mut Silent,
        )
    });
    let source = source(&from);
    let mut sink = Stream::begin(writer, None::<UnixStream>, &source, true).unwrap();
    send::at_rest(&source, &mut sink, &mut Silent, &OPTIONS).unwrap();
    drop(sink);
    other.join().unwrap().unwrap();
    assert_eq!(fs::read(&to).unwrap(), fs::read(&from).unwrap());
}

/// A kernel that writes to the image whenever it is asked something, and keeps the rules of the
/// tracker. What was noted and read before it is read again is lost: so the copy differs if the
/// sender looks before it announces or clears.
struct Writer {
    file: fs::File,
    seed: u64,
    nr: u64,
    dirty: BTreeSet<u64>,
    end: u64,
    next: u64,
    is_frozen: bool,
    is_tracked: bool,
    /// It does not stop.
    is_stubborn: bool,
    fails_at: Option<u64>,
    calls: u64,
}

impl Writer {
    fn new(path: &Path, seed: u64) -> Self {
        Self {
            file: OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap(),
            seed,
            nr: fs::metadata(path).unwrap().len() / CLUSTER,
            dirty: BTreeSet::new(),
            end: 0,
            next: 0,
            is_frozen: false,
            is_tracked: false,
            is_stubborn: false,
            fails_at: None,
            calls: 0,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.seed >> 33) % below
    }

    /// Writes go on: data, zeros, discards, and new clusters.
    fn work(&mut self) -> Result<()> {
        self.calls += 1;
        if self.fails_at == Some(self.calls) {
            return Err(Error::new(Code::DeviceIoctl, "as the test wants it"));
        }
        if self.is_frozen && !self.is_stubborn {
            return Ok(());
        }
        for _ in 0..self.random(4) {
            let grown = self.nr < 60 && self.random(8) == 0;
            let at = if grown {
                self.nr
            } else {
                1 + self.random(self.nr - 1)
            };
            if grown {
                self.nr += 1;
                self.file.set_len(self.nr * CLUSTER).unwrap();
                self.file
                    .write_all_at(&(at as u32).to_le_bytes(), 64 + 4 * (at - 1))
                    .unwrap();
                self.note(0);
            }
            let byte = [0, self.random(256) as u8][self.random(2) as usize];
            self.file
                .write_all_at(&[byte; CLUSTER as usize], at * CLUSTER)
                .unwrap();
            self.note(at);
        }
        Ok(())
    }

    fn note(&mut self, cluster: u64) {
        if self.is_tracked && cluster * CLUSTER < self.end {
            self.dirty.insert(cluster);
        }
    }
}

impl Live for Writer {
    fn begin(&mut self) -> Result<TrackExtent> {
        self.work()?;
        self.is_tracked = true;
        Ok(TrackExtent {
            start: 0,
            end: self.nr * CLUSTER,
        })
    }

    fn announce(&mut self, end: u64) -> Result<()> {
        assert!(end >= self.end);
        self.work()?;
        self.end = end;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<TrackExtent>> {
        self.work()?;
        let after = self
            .dirty
            .range(self.next..)
            .next()
            .or(self.dirty.iter().next())
            .copied();
        if let Some(cluster) = after {
            self.dirty.remove(&cluster);
            self.next = cluster + 1;
            let start = cluster * CLUSTER;
            return Ok(Some(TrackExtent {
                start,
                end: start + CLUSTER,
            }));
        }
        let all = self.nr * CLUSTER;
        Ok((all > self.end).then_some(TrackExtent {
            start: self.end,
            end: all,
        }))
    }

    fn finish(&mut self) -> Result<()> {
        self.work()?;
        if !self.dirty.is_empty() || self.nr * CLUSTER > self.end {
            return Err(not_quiet("it"));
        }
        self.is_tracked = false;
        Ok(())
    }

    fn abort(&mut self) {
        self.is_tracked = false;
    }

    fn freeze(&mut self) -> Result<()> {
        self.work()?;
        self.is_frozen = true;
        Ok(())
    }

    fn thaw(&mut self) {
        self.is_frozen = false;
    }
}

/// Marks an image as in use.
fn open(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&0x746F_6E59u32.to_le_bytes(), 44)
        .unwrap();
}

fn live_source(path: &Path) -> Source {
    let file = SourceFile::open(path, "image", [0; 16], false, How::Live).unwrap();
    Source {
        files: vec![file],
        descriptor: None,
        is_directory: false,
    }
}

fn live_stream(path: &Path, kernel: &mut Writer) -> (Result<()>, Vec<u8>) {
    let source = live_source(path);
    let mut bytes = Vec::new();
    let mut sink = Stream::begin(&mut bytes, None::<UnixStream>, &source, false).unwrap();
    let done = send::live(&source, kernel, &mut sink, &mut Silent, &OPTIONS);
    (done, bytes)
}

#[test]
fn a_disk_that_is_written_to_is_copied_as_it_stands_still() {
    for seed in 0..60 {
        let dir = Dir::new("live");
        let from = dir.image("from", 20);
        open(&from);
        let mut kernel = Writer::new(&from, seed);
        let (done, bytes) = live_stream(&from, &mut kernel);
        done.unwrap();
        assert!(kernel.is_frozen && !kernel.is_tracked);
        take(&bytes, &dir.at("to")).unwrap();
        let (mut want, got) = (fs::read(&from).unwrap(), fs::read(dir.at("to")).unwrap());
        want[44..48].fill(0);
        assert!(want == got, "seed {seed}");
    }
}

#[test]
fn whatever_fails_the_disk_goes_on_and_nothing_is_left() {
    let dir = Dir::new("fails");
    let from = dir.image("from", 10);
    open(&from);
    for fails_at in 1.. {
        let mut kernel = Writer::new(&from, fails_at);
        kernel.fails_at = Some(fails_at);
        let (done, bytes) = live_stream(&from, &mut kernel);
        if done.is_ok() {
            assert!(fails_at > 5);
            break;
        }
        assert!(!kernel.is_frozen && !kernel.is_tracked, "{fails_at}");
        let said = take(&bytes, &dir.at("to")).unwrap_err().to_string();
        assert!(said.contains("as the test wants it"), "{said}");
        assert_eq!(dir.nr(), 1);
    }
    let mut kernel = Writer::new(&from, 1);
    kernel.is_stubborn = true;
    let (done, _) = live_stream(&from, &mut kernel);
    assert_eq!(done.unwrap_err().code(), Code::Loops);
    assert!(!kernel.is_frozen && !kernel.is_tracked);
}

fn v1_packet(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut packet = v1::MARKER.to_le_bytes().to_vec();
    packet.extend((bytes.len() as u32).to_le_bytes());
    packet.extend(offset.to_le_bytes());
    packet.extend(bytes);
    packet
}

/// As OpenVZ sends it: clusters, some again, a sync mark, the header last, and the end; zeros are
/// left out at first.
#[test]
fn streams_of_version_1_are_received() {
    let dir = Dir::new("v1");
    let from = dir.image("from", 6);
    let image = fs::read(&from).unwrap();
    let mut stream = Vec::new();
    for (cluster, at) in image.chunks(CLUSTER as usize).zip(0..) {
        if cluster.iter().any(|b| *b != 0) {
            stream.extend(v1_packet(at * CLUSTER, &vec![9; CLUSTER as usize]));
            stream.extend(v1_packet(at * CLUSTER, cluster));
        }
    }
    stream.extend(v1_packet(0, &image[..4]));
    stream.extend(v1_packet(0, &image[..512]));
    let cut = stream.len();
    stream.extend(v1_packet(0, &[]));
    let to = dir.at("to");
    for end in [0, 3, 15, 16, 100, cut - 1, cut, cut + 8] {
        assert!(take(&stream[..end], &to).is_err(), "{end}");
        assert_eq!(dir.nr(), 1);
    }
    let mut back = Vec::new();
    let options = receive::Options { answers_v1: true };
    receive(
        &mut stream.as_slice(),
        Some(&mut back),
        &to,
        options,
        &mut Silent,
    )
    .unwrap();
    assert_eq!(fs::read(&to).unwrap(), image);
    assert_eq!(back, b"SUCCESS\n");
    let mut big = v1::MARKER.to_be_bytes().to_vec();
    big.extend([0; 12]);
    assert!(take(&big, &dir.at("big"))
        .unwrap_err()
        .to_string()
        .contains("byte order"));
}

#[test]
fn streams_of_version_1_are_sent() {
    let dir = Dir::new("v1-send");
    let from = dir.image("from", 6);
    let mut bytes = Vec::new();
    let mut sink = v1::Sender::new(&mut bytes);
    send::at_rest(&source(&from), &mut sink, &mut Silent, &OPTIONS).unwrap();
    take(&bytes, &dir.at("to")).unwrap();
    assert_eq!(fs::read(dir.at("to")).unwrap(), fs::read(&from).unwrap());
    // In use, with the mark that asks for everything to be durable.
    open(&from);
    let mut kernel = Writer::new(&from, 3);
    let mut bytes = Vec::new();
    let mut sink = v1::Sender::new(&mut bytes);
    send::live(
        &live_source(&from),
        &mut kernel,
        &mut sink,
        &mut Silent,
        &OPTIONS,
    )
    .unwrap();
    assert_eq!(sink.sent_bytes(), bytes.len() as u64);
    take(&bytes, &dir.at("live")).unwrap();
    let mut want = fs::read(&from).unwrap();
    want[44..48].fill(0);
    assert!(fs::read(dir.at("live")).unwrap() == want);
}

fn v2_packet(kind: u32, offset: u64, bytes: &[u8], has_md5: bool) -> Vec<u8> {
    let mut packet = v2::MARKER.to_le_bytes().to_vec();
    packet.extend(kind.to_le_bytes());
    packet.extend((bytes.len() as u32).to_le_bytes());
    packet.extend([0; 4]);
    packet.extend(offset.to_le_bytes());
    if has_md5 {
        packet.extend(md5::compute(bytes).0);
    }
    packet.extend(bytes);
    packet
}

#[test]
fn streams_of_version_2_are_received() {
    let dir = Dir::new("v2");
    let from = dir.image("from", 4);
    let image = fs::read(&from).unwrap();
    for has_md5 in [false, true] {
        let mut stream = Vec::new();
        stream.extend(v2_packet(
            1,
            3 * u64::from(has_md5),
            &0u32.to_le_bytes(),
            false,
        ));
        let mut want = vec![-i32::from(has_md5)];
        for (cluster, at) in image.chunks(CLUSTER as usize).zip(0..) {
            stream.extend(v2_packet(at as u32 % 2 * 2, at * CLUSTER, cluster, has_md5));
            want.extend((at % 2 == 0).then_some(0));
        }
        stream.extend(v2_packet(1, 0, &0u32.to_le_bytes(), has_md5));
        stream.extend(v2_packet(1, 0, &[], has_md5));
        want.extend([0, 0]);
        let to = dir.at(&format!("to{has_md5}"));
        let mut back = Vec::new();
        let options = receive::Options::default();
        let done = receive(
            &mut stream.as_slice(),
            Some(&mut back),
            &to,
            options,
            &mut Silent,
        );
        done.unwrap();
        assert_eq!(fs::read(&to).unwrap(), image);
        let said: Vec<i32> = back
            .chunks(4)
            .map(|c| i32::from_le_bytes(c.try_into().unwrap()))
            .collect();
        assert_eq!(said, want);
        if has_md5 {
            let before = dir.nr();
            for at in [55, 70, 5000] {
                let mut bad = stream.clone();
                bad[at] ^= 1;
                let mut back = Vec::new();
                let to = dir.at("bad");
                let done = receive(
                    &mut bad.as_slice(),
                    Some(&mut back),
                    &to,
                    options,
                    &mut Silent,
                );
                assert!(done.is_err(), "{at}");
                assert_eq!(back[back.len() - 4..], 13i32.to_le_bytes());
                assert_eq!(dir.nr(), before);
            }
        }
        // A device, which is not received, and no way back.
        let mut device = Vec::new();
        device.extend(v2_packet(1, 0, &2u32.to_le_bytes(), false));
        let mut back = Vec::new();
        let to = dir.at("device");
        let done = receive(
            &mut device.as_slice(),
            Some(&mut back),
            &to,
            options,
            &mut Silent,
        );
        assert!(done.is_err());
        assert!(take(&stream, &to).is_err());
    }
}

/// A sender that is told nothing for long goes no further than its window.
#[test]
fn a_receiver_that_ends_is_heard() {
    let dir = Dir::new("ends");
    let from = dir.image("from", 8);
    let source = source(&from);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let answer = Answer {
        text: "no space".into(),
        ..Answer::new(Kind::Failed, 0)
    };
    answer.write(&mut theirs).unwrap();
    theirs.flush().unwrap();
    let other = std::thread::spawn(move || {
        let mut some = [0; 5000];
        let _ = theirs.read(&mut some);
    });
    let back = Some(ours.try_clone().unwrap());
    let said = Stream::begin(ours, back, &source, false)
        .and_then(|mut sink| send::at_rest(&source, &mut sink, &mut Silent, &OPTIONS))
        .unwrap_err();
    other.join().unwrap();
    assert!(said.to_string().contains("no space"), "{said}");
}

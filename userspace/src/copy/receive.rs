// SPDX-License-Identifier: GPL-2.0
//! Receiving a copy: ours, or one that OpenVZ's tools send.

use super::answer::{Answer, Kind};
use super::target::Target;
use super::wire::{self, Layout, Reader, Record};
use super::{v1, v2, Event, Watch};
use crate::error::{Code, Error, Result};
use std::io::{self, Read, Write};
use std::path::Path;

/// So many bytes are answered at once.
const ANSWER_AFTER: u64 = 4 << 20;
/// Longest descriptor.
const DESCRIPTOR_MAX: usize = 4 << 20;

/// How a copy is received.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// OpenVZ's sender of version 1 waits for an answer when it asks for one.
    pub answers_v1: bool,
}

/// Makes the copy `path` of what comes. `back` is where answers go, if the sender wants any.
pub fn receive(
    from: &mut dyn Read,
    back: Option<&mut dyn Write>,
    path: &Path,
    options: Options,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut first = [0; 4];
    from.read_exact(&mut first).map_err(wire::read_failed)?;
    let all = &mut io::Cursor::new(first).chain(from);
    match wire::le32(&first, 0) {
        v1::MARKER => {
            let back = back.filter(|_| options.answers_v1);
            v1::receive(all, back, path, watch)
        }
        v2::MARKER => v2::receive(all, back, path, watch),
        other if [v1::MARKER, v2::MARKER].contains(&other.swap_bytes()) => {
            let what = "the stream comes from a machine of the other byte order";
            Err(Error::new(Code::Protocol, what)
                .hint("streams of OpenVZ's tools cannot cross that"))
        }
        _ if first == wire::MAGIC[..4] => ours(all, back, path, watch),
        _ => Err(wire::foreign()),
    }
}

fn ours(
    from: &mut dyn Read,
    back: Option<&mut dyn Write>,
    path: &Path,
    watch: &mut dyn Watch,
) -> Result<()> {
    let mut reader = Reader::begin(from)?;
    let wants_answers = reader.header().features & wire::ANSWERS != 0;
    let mut back = back.filter(|_| wants_answers);
    let done = Receiver::begin(&mut reader, path, watch).and_then(|r| r.run(&mut back));
    let records = reader.totals().records;
    let Some(back) = back else {
        return done;
    };
    let answer = match &done {
        Ok(()) => Answer::new(Kind::Done, records),
        Err(e) => Answer {
            text: e.without_hint(),
            ..Answer::new(Kind::Failed, records)
        },
    };
    match (answer.write(back), done) {
        (Err(_), Ok(())) => {
            let what = format!(
                "{} is complete, but the sender cannot be told",
                path.display()
            );
            Err(Error::new(Code::Protocol, what)
                .hint("the sender takes the copy for failed: do not use both disks"))
        }
        (_, done) => done,
    }
}

struct Receiver<'a, R> {
    reader: &'a mut Reader<R>,
    target: Target,
    watch: &'a mut dyn Watch,
    layout: Layout,
    descriptor: Vec<u8>,
    /// Bytes that were not answered.
    unanswered: u64,
}

impl<'a, R: Read> Receiver<'a, R> {
    /// Reads what comes before the content.
    fn begin(reader: &'a mut Reader<R>, path: &Path, watch: &'a mut dyn Watch) -> Result<Self> {
        let header = *reader.header();
        let mut target = Target::begin(path, header.layout != Layout::File)?;
        let mut bytes: u64 = 0;
        for nr in 0..header.nr_files {
            match reader.read()? {
                Record::File(file, info) if file == nr => {
                    if info.is_top != (nr + 1 == header.nr_files) {
                        return Err(wire::damaged("the top is not the last file"));
                    }
                    bytes = bytes.saturating_add(info.len_bytes);
                    target.add(info)?;
                }
                Record::Abort(why) => return Err(gave_up(&why)),
                _ => return Err(wire::damaged("a file is missing")),
            }
        }
        let files = header.nr_files;
        watch.event(&Event::Begin {
            files,
            bytes,
            live: false,
        });
        Ok(Self {
            reader,
            target,
            watch,
            layout: header.layout,
            descriptor: Vec::new(),
            unanswered: 0,
        })
    }

    fn run(mut self, back: &mut Option<&mut dyn Write>) -> Result<()> {
        loop {
            let len = match self.reader.read()? {
                Record::File(..) => return Err(wire::damaged("there is a file too many")),
                Record::Descriptor(bytes) => {
                    self.descriptor.extend(bytes);
                    if self.descriptor.len() > DESCRIPTOR_MAX || self.layout != Layout::Disk {
                        return Err(wire::damaged("there is a descriptor, or too much of it"));
                    }
                    0
                }
                Record::Data(part, bytes) => {
                    self.target.write(part, bytes)?;
                    part.len
                }
                Record::Zero(part) => {
                    self.target.zero(part)?;
                    0
                }
                Record::Hole(part) => {
                    self.target.hole(part)?;
                    0
                }
                Record::Length(file, len) => {
                    self.target.length(file, len)?;
                    0
                }
                Record::Round(round, dirty) => {
                    self.watch.event(&Event::Round {
                        round,
                        dirty,
                        downtime_ms: 0,
                    });
                    0
                }
                Record::Sync => {
                    self.target.sync()?;
                    let records = self.reader.totals().records;
                    tell(back, Answer::new(Kind::Durable, records))?;
                    self.unanswered = 0;
                    0
                }
                Record::Abort(why) => return Err(gave_up(&why)),
                Record::End(totals) => return self.end(totals.bytes),
            };
            self.unanswered += len + wire::HEAD_BYTES as u64;
            if self.unanswered >= ANSWER_AFTER {
                self.unanswered = 0;
                let records = self.reader.totals().records;
                tell(back, Answer::new(Kind::Applied, records))?;
            }
        }
    }

    fn end(mut self, bytes: u64) -> Result<()> {
        if self.layout == Layout::Disk {
            let text = String::from_utf8(std::mem::take(&mut self.descriptor))
                .map_err(|_| wire::damaged("the descriptor is not Unicode"))?;
            self.target.describe(text);
        }
        self.target.publish()?;
        self.watch.event(&Event::End {
            bytes,
            downtime_ms: 0,
        });
        Ok(())
    }
}

fn tell(back: &mut Option<&mut dyn Write>, answer: Answer) -> Result<()> {
    let Some(back) = back else {
        return Ok(());
    };
    answer.write(*back).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => wire::cut(),
        _ => super::line::failed(Code::Write, "cannot answer the sender", e),
    })
}

fn gave_up(why: &str) -> Error {
    Error::new(Code::Protocol, format!("the sender gave up: {why}"))
        .hint("nothing is left of the copy here")
}

// SPDX-License-Identifier: GPL-2.0
//! What the user sees of a copy, on standard error: a bar on a terminal, else lines, or JSON.

use crate::copy::{Event, Watch};
use crate::output;
use crate::signals::Requests;
use crate::size::human;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// The usual way to follow a copy.
pub struct Shown {
    is_json: bool,
    is_terminal: bool,
    requests: Rc<RefCell<Requests>>,
    bar: Option<ProgressBar>,
    told: Instant,
    /// What is to be said when the disk is thawed: a file that it goes to may be on that disk.
    held: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Line<'a> {
    schema: u32,
    #[serde(flatten)]
    event: &'a Event,
}

impl Shown {
    /// As lines of JSON, or for people.
    pub fn new(is_json: bool, requests: &Rc<RefCell<Requests>>) -> Self {
        Self {
            is_json,
            is_terminal: io::stderr().is_terminal(),
            requests: Rc::clone(requests),
            bar: None,
            told: Instant::now(),
            held: None,
        }
    }

    /// It is over.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn note(&mut self, text: &str) {
        match (&mut self.held, &self.bar) {
            (Some(held), _) => held.push(text.to_owned()),
            (None, Some(bar)) => bar.suspend(|| output::note(text)),
            (None, None) => output::note(text),
        }
    }

    /// Whether a write to standard error may wait for a disk.
    fn is_on_a_disk() -> bool {
        let file = io::stderr().as_fd().try_clone_to_owned().map(File::from);
        file.and_then(|f| f.metadata()).is_ok_and(|m| m.is_file())
    }

    fn progress(&mut self, round: u32, done: u64, total: u64, rate: u64) {
        let what = match round {
            0 => "copying".to_owned(),
            1 => "copying the top".to_owned(),
            n => format!("round {n}"),
        };
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(format!("{what}, {}/s", human(rate)));
        } else if self.told.elapsed() >= PAUSE {
            self.told = Instant::now();
            let (done, total) = (human(done), human(total));
            self.note(&format!("{what}: {done} of {total}, {}/s", human(rate)));
        }
    }
}

impl Watch for Shown {
    fn event(&mut self, event: &Event) {
        if self.is_json {
            let schema = output::SCHEMA;
            if let Ok(text) = serde_json::to_string(&Line { schema, event }) {
                self.note(&text);
            }
        } else {
            self.tell(event);
        }
        if matches!(event, Event::Frozen { .. }) && Self::is_on_a_disk() {
            self.held = Some(Vec::new());
        }
    }

    fn thawed(&mut self) {
        for text in self.held.take().unwrap_or_default() {
            self.note(&text);
        }
    }

    fn is_end_asked(&mut self) -> bool {
        self.requests.borrow_mut().is_end_asked()
    }
}

impl Shown {
    /// For people.
    fn tell(&mut self, event: &Event) {
        match event {
            Event::Begin { bytes, .. } => {
                if self.is_terminal {
                    let bar = ProgressBar::new(*bytes);
                    let look = "{msg} {bar:30} {bytes} of {total_bytes}";
                    if let Ok(style) = ProgressStyle::with_template(look) {
                        bar.set_style(style);
                    }
                    self.bar = Some(bar);
                }
            }
            Event::Progress {
                round,
                done,
                total,
                rate,
                ..
            } => {
                self.progress(*round, *done, *total, *rate);
            }
            Event::Round { round: 0..=1, .. } => {}
            Event::Round {
                round,
                dirty,
                downtime_ms,
            } => {
                let still = match downtime_ms {
                    0 => String::new(),
                    ms => format!("; frozen now it would stand still for about {ms} ms"),
                };
                self.note(&format!("round {round}: {}{still}", human(*dirty)));
            }
            Event::Frozen { rounds } => {
                self.note(&format!(
                    "frozen after {}",
                    output::count((*rounds).into(), "round")
                ));
            }
            Event::End { bytes, downtime_ms } => {
                let still = match downtime_ms {
                    0 => String::new(),
                    ms => format!("; the disk stood still for {ms} ms"),
                };
                self.note(&format!("complete: {}{still}", human(*bytes)));
            }
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The write tracker, step by step, in every order: writers whose data lands and is then noted, and
//! a reader who announces or clears and then reads. In no order may the copy miss a write.

use ploop_pure::track::{Answer, Grid, Reader, Words};
use std::cell::Cell;

const GRANULE: u64 = 1 << 16;
const NR: usize = 2;

/// One word is enough.
#[derive(Clone, Default)]
struct Word(Cell<u64>);

impl Words for Word {
    fn get(&self, idx: usize) -> u64 {
        if idx == 0 {
            self.0.get()
        } else {
            0
        }
    }

    fn set(&self, _: usize, mask: u64) {
        self.0.set(self.0.get() | mask);
    }

    fn take(&self, _: usize, mask: u64) -> u64 {
        let had = self.0.get();
        self.0.set(had & !mask);
        had & mask
    }
}

/// A writer's next step with a granule.
#[derive(Clone, Copy, PartialEq)]
enum Write {
    Land,
    Note,
    Over,
}

/// What the reader does next.
#[derive(Clone, Copy, PartialEq)]
enum Read {
    Announce(usize),
    Copy { at: usize, then: Then },
    Ask,
    Over,
}

/// And after a copy.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Announce(usize),
    Ask,
}

/// Which order is kept.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Right,
    /// A write is noted before it lands.
    NoteFirst,
    /// A granule is copied before it is announced.
    AnnounceLast,
}

#[derive(Clone)]
struct World {
    order: Order,
    file: [u32; NR],
    copy: [u32; NR],
    writers: [(usize, Write); 3],
    reader: Reader2,
    word: Word,
    next: Read,
    /// Rounds before writing ends.
    left: u32,
}

/// [`Reader`], which is not `Clone`: rebuilt from what it was told.
#[derive(Clone, Default)]
struct Reader2 {
    told: Vec<u64>,
    asked: Vec<u64>,
}

impl World {
    fn grid() -> Grid {
        Grid::new(16, NR as u64 * GRANULE)
    }

    fn end(&self) -> u64 {
        self.reader.told.last().copied().unwrap_or(0)
    }

    /// Asks the real machine, replayed up to here.
    fn ask(&mut self) -> Answer {
        let (grid, len) = (Self::grid(), NR as u64 * GRANULE);
        let mut reader = Reader::default();
        for end in &self.reader.told {
            assert_eq!(reader.set_end(*end), Some(false));
        }
        for bits in &self.reader.asked {
            let word = Word(Cell::new(*bits));
            reader.read(grid, &word, || len);
        }
        self.reader.asked.push(self.word.0.get());
        reader.read(grid, &self.word, || len)
    }

    fn write(&mut self, n: usize) {
        let (at, step) = self.writers[n];
        let first = self.order == Order::NoteFirst;
        let (lands, notes) = match step {
            Write::Land => (!first, first),
            Write::Note => (first, !first),
            Write::Over => return,
        };
        if lands {
            self.file[at] += 1;
        }
        let start = at as u64 * GRANULE;
        if notes && start < self.end() {
            Self::grid().mark(&self.word, &(start..start + GRANULE));
        }
        self.writers[n].1 = match step {
            Write::Land => Write::Note,
            Write::Note | Write::Over => Write::Over,
        };
    }

    fn is_written(&self) -> bool {
        self.writers.iter().all(|(_, step)| *step == Write::Over)
    }

    fn read(&mut self) {
        self.next = match self.next {
            Read::Announce(at) if at == NR => Read::Ask,
            Read::Announce(at) if self.order == Order::AnnounceLast => {
                self.copy[at] = self.file[at];
                Read::Copy {
                    at,
                    then: Then::Announce(at + 1),
                }
            }
            Read::Announce(at) => {
                self.reader.told.push((at as u64 + 1) * GRANULE);
                Read::Copy {
                    at,
                    then: Then::Announce(at + 1),
                }
            }
            Read::Copy { at, then } => {
                match (self.order, then) {
                    (Order::AnnounceLast, Then::Announce(_)) => {
                        self.reader.told.push((at as u64 + 1) * GRANULE);
                    }
                    _ => self.copy[at] = self.file[at],
                }
                match then {
                    Then::Announce(at) => Read::Announce(at),
                    Then::Ask => Read::Ask,
                }
            }
            Read::Ask => match self.ask() {
                // One at a time is enough: bits are cleared together, so the rest is noted again.
                Answer::Dirty(e) => {
                    let (first, end) = ((e.start / GRANULE) as usize, (e.end / GRANULE) as usize);
                    for at in first + 1..end {
                        let start = at as u64 * GRANULE;
                        Self::grid().mark(&self.word, &(start..start + GRANULE));
                    }
                    Read::Copy {
                        at: first,
                        then: Then::Ask,
                    }
                }
                Answer::Beyond(_) => panic!("all was announced"),
                Answer::Clean if self.is_written() => Read::Over,
                Answer::Clean => Read::Ask,
            },
            Read::Over => Read::Over,
        };
    }

    /// Tries every order from here; the first that loses a write.
    fn try_all(&self, tried: &mut u64) -> Result<(), String> {
        *tried += 1;
        if self.next == Read::Over {
            return match self.copy == self.file {
                true => Ok(()),
                false => Err(format!("{:?} copied, {:?} written", self.copy, self.file)),
            };
        }
        for n in 0..self.writers.len() {
            if self.writers[n].1 != Write::Over {
                let mut next = self.clone();
                next.write(n);
                next.try_all(tried)?;
            }
        }
        // A reader that finds nothing and goes on asking is not to go on for ever.
        if self.left > 0 || self.is_written() {
            let mut next = self.clone();
            next.left = next.left.saturating_sub(u32::from(self.next == Read::Ask));
            next.read();
            next.try_all(tried)?;
        }
        Ok(())
    }

    fn explore(order: Order) -> Result<u64, String> {
        let mut tried = 0;
        for places in [[0, 0, 1], [0, 1, 1], [1, 1, 1]] {
            let world = Self {
                order,
                file: [0; NR],
                copy: [u32::MAX; NR],
                writers: places.map(|at| (at, Write::Land)),
                reader: Reader2::default(),
                word: Word::default(),
                next: Read::Announce(0),
                left: 3,
            };
            world.try_all(&mut tried)?;
        }
        Ok(tried)
    }
}

#[test]
fn no_order_of_steps_loses_a_write() {
    let tried = World::explore(Order::Right).expect("nothing is lost");
    assert!(tried > 10_000, "only {tried} states");
}

#[test]
fn wrong_orders_lose_a_write() {
    World::explore(Order::NoteFirst).expect_err("noted before it has landed");
    World::explore(Order::AnnounceLast).expect_err("copied before it is announced");
}

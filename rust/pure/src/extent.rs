// SPDX-License-Identifier: GPL-2.0
//! Half-open extents and the joining of neighbours.

/// The numbers from `start` up to, not including, `end`; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    start: u64,
    end: u64,
}

impl Extent {
    /// `[start, end)`; `None` if that is empty.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// First number.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last number.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// How many numbers.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Never: an extent has at least one number.
    pub const fn is_empty(self) -> bool {
        false
    }
}

/// A run of guest clusters that are mapped to neighbouring slots, or all to none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First guest cluster.
    pub cluster: u32,
    /// First image cluster, `None` for a hole.
    pub at: Option<u32>,
    /// Number of clusters.
    pub len: u32,
}

/// Joins a stream of map entries into [`Run`]s.
#[derive(Debug, Default)]
pub struct Runs {
    open: Option<Run>,
}

impl Runs {
    /// Takes the entry of the next cluster; returns a run that ended before it.
    pub fn push(&mut self, cluster: u32, at: Option<u32>) -> Option<Run> {
        if let Some(run) = &mut self.open {
            let follows = match (run.at, at) {
                (None, None) => true,
                (Some(first), Some(now)) => first.checked_add(run.len) == Some(now),
                (None, Some(_)) | (Some(_), None) => false,
            };
            if follows && run.cluster.checked_add(run.len) == Some(cluster) {
                run.len += 1;
                return None;
            }
        }
        self.open.replace(Run {
            cluster,
            at,
            len: 1,
        })
    }

    /// The run still open, at the end.
    pub fn finish(self) -> Option<Run> {
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_neighbours_only() {
        let mut runs = Runs::default();
        let mut out = std::vec::Vec::new();
        for (c, at) in [
            (0, Some(5)),
            (1, Some(6)),
            (2, None),
            (3, None),
            (4, Some(7)),
            (5, Some(9)),
        ] {
            out.extend(runs.push(c, at));
        }
        out.extend(runs.finish());
        let want = [
            (0, Some(5), 2),
            (2, None, 2),
            (4, Some(7), 1),
            (5, Some(9), 1),
        ];
        assert_eq!(out, want.map(|(cluster, at, len)| Run { cluster, at, len }));
    }

    #[test]
    fn extents_are_never_empty() {
        assert_eq!(Extent::new(3, 3), None);
        assert_eq!(Extent::new(3, 5).map(Extent::len), Some(2));
    }
}

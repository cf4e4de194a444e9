// SPDX-License-Identifier: GPL-2.0
//! Carries out a repair plan: every step is durable before the next begins.

use super::Image;
use crate::error::{Code, Result};
use nix::errno::Errno;
use nix::fcntl::{fallocate, FallocateFlags};
use nix::libc;
use ploop_pure::layout::ploop1::{Header, ENTRY_BYTES, HEADER_BYTES};
use ploop_pure::repair::{judge, Fix, Plan, Step};
use ploop_pure::units::{Cluster, ImageCluster};
use zerocopy::IntoBytes;

/// Bytes copied at once, and a divisor of every cluster size.
const COPY_BYTES: u64 = 32 << 10;

/// Repairs `image`, whose header this is, as `plan` says.
pub fn apply(image: &Image, header: &Header, plan: &Plan) -> Result<()> {
    let work = Work {
        image,
        header,
        plan,
    };
    for step in plan.steps() {
        let done = work.step(step);
        if let (Step::Copy { first, .. }, Err(_)) = (step, &done) {
            work.drop_copies(first);
        }
        done?;
        image.sync()?;
    }
    Ok(())
}

struct Work<'a> {
    image: &'a Image,
    header: &'a Header,
    plan: &'a Plan,
}

impl Work<'_> {
    fn step(&self, step: Step) -> Result<()> {
        match step {
            Step::Mark => self.write_header(&self.plan.marked()),
            Step::Extend { len_bytes, .. } | Step::Truncate { len_bytes, .. } => {
                self.image.set_len(len_bytes)
            }
            Step::Zero { .. } => self.each_fix(|cluster, fix| match fix {
                Fix::Zero => self.write_entry(cluster, 0),
                Fix::Forget | Fix::Copy { .. } => Ok(()),
            }),
            Step::Forget { .. } => self.each_fix(|cluster, fix| match fix {
                Fix::Forget => self.write_entry(cluster, 0),
                Fix::Zero | Fix::Copy { .. } => Ok(()),
            }),
            Step::Copy { .. } => self.each_fix(|_, fix| match fix {
                Fix::Zero | Fix::Forget => Ok(()),
                Fix::Copy { from, to } => self.copy(from, to),
            }),
            Step::Move { .. } => self.each_fix(|cluster, fix| match fix {
                Fix::Zero | Fix::Forget => Ok(()),
                Fix::Copy { to, .. } => self.write_entry(cluster, self.header.encode_entry(to)),
            }),
            Step::Punch { .. } => self.punch(),
            Step::Close { .. } => self.write_header(&self.plan.closed()),
        }
    }

    /// Calls `act` for every entry that has to be changed.
    fn each_fix(&self, mut act: impl FnMut(Cluster, Fix) -> Result<()>) -> Result<()> {
        let (_, length, _) = self.image.good_header()?;
        let mut fixer = self.plan.fixer();
        let mut sink = |cluster, entry| match judge(self.header, cluster, entry)
            .err()
            .and_then(|problem| fixer.fix(problem))
        {
            Some(fix) => act(cluster, fix),
            None => Ok(()),
        };
        self.image.scan(self.header, length, &mut sink).map(drop)
    }

    /// Writes the header only: the entries that follow it may be newer on disk.
    fn write_header(&self, header: &Header) -> Result<()> {
        self.image.write_at(header.encode().as_bytes(), 0)
    }

    fn write_entry(&self, cluster: Cluster, entry: u32) -> Result<()> {
        let offset = HEADER_BYTES as u64 + u64::from(cluster.0) * ENTRY_BYTES;
        self.image.write_at(&entry.to_le_bytes(), offset)
    }

    fn copy(&self, from: ImageCluster, to: ImageCluster) -> Result<()> {
        let cluster = self.header.cluster;
        let mut buf = vec![0; COPY_BYTES as usize];
        for part in 0..cluster.bytes() / COPY_BYTES {
            self.image
                .read_at(&mut buf, cluster.offset(from) + part * COPY_BYTES)?;
            self.image
                .write_at(&buf, cluster.offset(to) + part * COPY_BYTES)?;
        }
        Ok(())
    }

    /// Cuts off copies that no entry names yet: most likely they filled the file system. If that
    /// fails, too, they are a tail that the next repair cuts.
    fn drop_copies(&self, first: ImageCluster) {
        let whole = self.header.cluster.offset(first);
        let len = self.image.len_bytes();
        if len.is_ok_and(|len| len > whole) {
            let _ = self.image.file.set_len(whole);
        }
    }

    /// Gives back what nothing names. A file system that cannot punch holes keeps the space.
    fn punch(&self) -> Result<()> {
        let (header, length, _) = self.image.good_header()?;
        let scan = self.image.scan(&header, length, &mut |_, _| Ok(()))?;
        // What was a valid extension is still one, or is dropped by this very plan.
        let extension = if self.drops_extension() {
            super::FoundExtension::default()
        } else {
            self.image.extension(&header, length, &scan)?
        };
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let bytes = header.cluster.bytes();
        for at in (header.first_data.0..scan.usage().end).map(ImageCluster) {
            if scan.is_used(at) || extension.slots.contains_slot(at) {
                continue;
            }
            let offset = libc::off_t::try_from(header.cluster.offset(at));
            let len = libc::off_t::try_from(bytes);
            let (Ok(offset), Ok(len)) = (offset, len) else {
                continue;
            };
            match fallocate(&self.image.file, mode, offset, len) {
                Ok(()) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
                Err(e) => {
                    return Err(self.image.error(Code::Allocate, "give back space of", e));
                }
            }
        }
        Ok(())
    }

    fn drops_extension(&self) -> bool {
        self.plan.steps().any(|s| match s {
            Step::Close {
                drops_extension, ..
            } => drops_extension,
            Step::Mark
            | Step::Extend { .. }
            | Step::Zero { .. }
            | Step::Forget { .. }
            | Step::Copy { .. }
            | Step::Move { .. }
            | Step::Truncate { .. }
            | Step::Punch { .. } => false,
        })
    }
}

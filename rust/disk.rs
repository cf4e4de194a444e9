// SPDX-License-Identifier: GPL-2.0
//! The disk as blk-mq sees it: requests in, ioctls in, limits out.

use crate::{
    ctl,
    device::Device,
    engine::{Cmd, Disk, Engine},
    sys::{
        frozen::Handler,
        gen_disk::{BlockDevice, Call, DiskRef, Limits},
        mq::{Driver, Request},
        prelude::*,
        work::Workqueue,
    },
};

/// Requests in flight for each CPU.
pub(crate) const QUEUE_DEPTH: u32 = 128;

impl Driver for Device {
    type Pdu = Cmd;

    fn new_pdu() -> Cmd {
        Cmd::new()
    }

    fn workers(&self) -> &Workqueue {
        self.workqueue()
    }

    /// File I/O from here would deadlock: we run below `submit_bio`, whose `current->bio_list`
    /// collects the file system's own bios until we return. So every request goes to a worker.
    fn queue_rq(mut rq: Request<Self>) {
        rq.pdu().arrive();
        rq.enqueue();
    }

    fn run(&self, rq: Request<Self>, handler: &Handler<'_>) {
        match self.engine(handler) {
            Some(engine) => engine.handle(rq),
            None => rq.end(Err(EIO)),
        }
    }

    fn io_done(rq: Request<Self>, result: Result<usize>) {
        Engine::io_done(rq, result);
    }
}

impl Disk for Device {}

impl BlockDevice for Device {
    fn ioctl(&self, disk: DiskRef<'_, Self>, call: Call) -> Result<c_int> {
        ctl::device_ioctl(disk, call)
    }
}

/// The limits of a running disk.
pub(crate) fn limits(engine: &Engine<Device>) -> Limits {
    let chain = &engine.chain;
    let cluster = chain.cluster();
    let align = chain.top().map(|top| top.io().align());
    Limits {
        logical_block: align.map_or(512, |a| a.offset),
        memory_align: align.map_or(512, |a| a.memory),
        // One request touches one cluster, unless clusters do not matter.
        chunk_sectors: if chain.is_identity() {
            0
        } else {
            cluster.sectors()
        },
        // At most 64 MiB.
        io_opt: cluster.bytes() as u32,
    }
}

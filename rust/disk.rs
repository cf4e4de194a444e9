// SPDX-License-Identifier: GPL-2.0
//! The disk as blk-mq sees it: requests in, and on to the engine.

use crate::{
    device::Device,
    engine::{tracks::Tracks, Cmd, Disk, Engine},
    sys::{
        epoch::Epoch,
        frozen::Handler,
        mq::{Driver, Request, TagSet},
        prelude::*,
        work::Workqueue,
    },
};

impl Driver for Device {
    type Pdu = Cmd;

    fn new_pdu() -> Cmd {
        Cmd::new()
    }

    fn tags(&self) -> &TagSet<Self> {
        self.tag_set()
    }

    fn workers(&self) -> &Workqueue {
        self.workqueue()
    }

    fn epoch(&self) -> &Epoch {
        self.users()
    }

    /// File I/O from here would deadlock: we run below `submit_bio`, whose `current->bio_list`
    /// collects the file system's own bios until we return. So whatever needs that goes to a worker.
    fn queue_rq(&self, mut rq: Request<Self>, handler: &Handler<'_>) {
        rq.pdu().arrive();
        let left = match self.engine(handler) {
            Some(engine) => engine.try_inline(rq),
            None => Some(rq),
        };
        if let Some(rq) = left {
            rq.enqueue();
        }
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

impl Disk for Device {
    fn tracks(&self) -> &Tracks {
        self.noted()
    }
}

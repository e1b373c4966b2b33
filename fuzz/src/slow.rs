//! A disk in memory that takes its time.

use std::rc::Rc;

use disk::{Disk, DiskError, Identity, LocalBoxFuture, MemDisk, Request, Response};
use runtime::Runtime;

/// A disk whose requests complete in any order.
pub struct SlowDisk {
    memory: Rc<MemDisk>,
    runtime: Runtime,
}

impl SlowDisk {
    /// An empty one of this size.
    pub fn new(runtime: &Runtime, bytes: usize) -> Rc<Self> {
        Rc::new(Self { memory: Rc::new(MemDisk::new(bytes)), runtime: runtime.clone() })
    }
}

impl Disk for SlowDisk {
    fn serial(&self) -> String {
        self.memory.serial()
    }

    fn identity(&self) -> Identity {
        self.memory.identity()
    }

    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.memory.read_only()
    }

    fn severed(&self) -> bool {
        self.memory.severed()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let memory = Rc::clone(&self.memory);
        let runtime = self.runtime.clone();
        Box::pin(async move {
            for _ in 0..runtime.random_below(4) {
                runtime.yield_now().await;
            }
            memory.submit(request).await
        })
    }
}

//! The FUSE frontend: every virtual disk as a file, and its history as directories.
//!
//! What happens to one write, from the system call to its end:
//!
//! 1. Somebody has mounted the tree, and keeps the connection to the kernel; the daemon gets it from
//!    them, and serves it ([`Server::mount`]).
//! 2. `session.rs` reads the kernel's message, which `protocol.rs` understands. The node in it says
//!    which disk it is (`node.rs`); `files.rs` has the disk at hand.
//! 3. The data is copied to an aligned buffer from the pool. `Disk::submit` gets it.
//! 4. The disk completes it and wakes the session, which sends the reply.
//!
//! Names, attributes and listings come from `view.rs`, which asks a [`disk::directory::Directory`];
//! `names.rs` has the rules for file names.
//!
//! A server remembers nothing that the next one needs: who keeps the connection gives it to the next
//! daemon, which asks the kernel for what was left unanswered, and nobody who has a file open sees
//! more than a pause. What users may rely on stands in `docs/fuse.md`.

mod end;
mod files;
mod metrics;
mod names;
mod node;
mod protocol;
mod session;
mod view;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use disk::directory::Directory;
use runtime::Runtime;
use runtime::reactor::Io;

pub use end::End;
use metrics::Metrics;
pub use metrics::Snapshot;
use session::Session;

/// Serves mounts on the thread of its runtime. Clones share it.
#[derive(Clone)]
pub struct Server(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    io: Io,
    directory: Rc<dyn Directory>,
    metrics: Rc<Metrics>,
}

impl Server {
    /// A server of what `directory` holds.
    #[must_use]
    pub fn new(runtime: &Runtime, io: &Io, directory: Rc<dyn Directory>) -> Self {
        let (runtime, io) = (runtime.clone(), io.clone());
        Self(Rc::new(Inner { runtime, io, directory, metrics: Rc::default() }))
    }

    /// Takes a mount: `kernel` is /dev/fuse, opened and mounted by its keeper. An earlier server may
    /// have served it before.
    ///
    /// # Errors
    /// What the kernel says of that descriptor.
    pub fn mount(&self, kernel: OwnedFd) -> io::Result<Mount> {
        let Inner { runtime, io, directory, metrics } = &*self.0;
        let directory = Rc::clone(directory);
        let session = Session::new(runtime, io, directory, metrics, kernel)?;
        Ok(Mount { session, metrics: Rc::clone(metrics) })
    }

    /// What was done so far.
    #[must_use]
    pub fn metrics(&self) -> Snapshot {
        self.0.metrics.snapshot()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fuse::Server")
    }
}

/// A mount that was taken. Clones are the same one.
#[derive(Clone)]
pub struct Mount {
    session: Rc<Session>,
    metrics: Rc<Metrics>,
}

impl Mount {
    /// Serves it until it is unmounted, or is to be left. Then nothing is under way.
    pub async fn serve(&self) -> End {
        self.metrics.mounts.add(1);
        self.metrics.mounts_open.add(1);
        let end = self.session.run().await;
        self.metrics.mounts_open.subtract_one();
        if matches!(end, End::Malformed(_) | End::Io(_)) {
            self.metrics.mounts_failed.add(1);
        }
        end
    }

    /// Takes no more requests: [`Self::serve`] returns when those under way are answered. The others
    /// wait for the next server.
    pub fn leave(&self) {
        self.session.leave();
    }
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fuse::Mount")
    }
}

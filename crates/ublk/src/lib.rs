//! The ublk frontend: a virtual disk as a block device of this machine, `/dev/ublkbN`.
//!
//! What happens to one write, from the page cache to its end:
//!
//! 1. A device was added and started (`control.rs`), or taken over from an earlier daemon
//!    ([`Server`], `server.rs`). For each request that it may have under way, a command of io_uring
//!    waits in the kernel (`sys.rs`).
//! 2. The block layer has a request: it is described in memory that the kernel shares with us
//!    (`protocol.rs`), and one of the commands ends, which wakes the session (`queues.rs`).
//! 3. `session.rs` copies the data to an aligned buffer from the pool: whoever writes may change it at
//!    any time (design rule 14). `Disk::submit` gets it.
//! 4. The disk completes it and wakes the session, whose next command for this place says so, and asks
//!    for another request.
//!
//! A server remembers nothing that the next one needs: the kernel keeps the device, and what was left
//! unanswered comes again. It knows no VDI; what users may rely on stands in `docs/ublk.md`.

mod control;
mod end;
mod error;
mod metrics;
mod protocol;
mod queues;
mod server;
mod session;
mod sys;

pub use error::Error;
pub use metrics::Snapshot;
pub use server::{Config, Server, Taken, start};

//! The vhost-user-blk frontend: a virtual disk as a virtio block device of a virtual machine, whose
//! rings and buffers lie in memory that both share.
//!
//! What happens to one 4 KiB write, from the guest's ring to its interrupt:
//!
//! 1. The daemon listens on a socket for each disk that is attached ([`Attachment`], `server.rs`).
//!    A virtual machine monitor connects. `session.rs` reads its messages ([`protocol`]): which
//!    memory to map (`memory.rs`), where the rings lie, which eventfds to listen to and to signal.
//! 2. A ring that is set up and enabled gets a task (`ring.rs`). The guest's kick wakes it. It
//!    takes what the guest made available (`queue.rs`): the chains of descriptors.
//! 3. `request.rs` makes a request of a chain (`block.rs` has the device's formats). The data is
//!    copied to an aligned buffer from the pool before anybody looks at it: the guest may change
//!    its memory at any time (design rule 14). `Disk::submit` gets it.
//! 4. The disk completes it and wakes the task, which writes the status byte and the used ring,
//!    and signals the guest once for all that completed together, if the guest wants to know.
//!
//! While a monitor moves its guest to another host, all that is written to guest memory is logged for
//! it (`dirty.rs`).
//!
//! What is in flight is noted in memory that the monitor keeps (`inflight.rs`), so that the next
//! daemon can do again what a killed one left undone.
//!
//! It knows no VDI and no tokio: a [`disk::Catalog`] gives it disks by name. Everything that comes
//! from a guest is checked where it is read; a guest whose ring makes no sense loses that ring.
//! What clients may rely on stands in `docs/vhost-user.md`.

mod block;
mod budget;
mod dirty;
mod end;
mod inflight;
mod memory;
mod metrics;
pub mod protocol;
mod queue;
mod request;
mod ring;
mod server;
mod session;

pub use metrics::Snapshot;
pub use server::{Attachment, Config, Server};

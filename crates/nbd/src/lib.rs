//! The NBD frontend: virtual disks for every client that speaks the Network Block Device protocol.
//!
//! What happens to one 4 KiB write, from its bytes to its reply:
//!
//! 1. The daemon accepts a connection and runs [`Server::serve`] for it (`server.rs`).
//! 2. `negotiation.rs` talks the handshake until the client has selected an export: options in,
//!    replies out, through the codec in [`protocol`]; `tls.rs` may slip TLS beneath it. What was
//!    agreed are the *terms*: a `disk::Disk`, the framing of messages, the metadata context.
//! 3. `session.rs` takes over, with one task. `input.rs` receives as many requests as there are
//!    into one buffer. `session/admission.rs` decides whether the request may go on,
//!    `session/budget.rs` whether there is room for it.
//! 4. Its payload is copied, or received, to the start of an aligned buffer from the pool, and
//!    `Disk::submit` gets it. The request is polled once on the spot, then parked in
//!    `session/in_flight.rs`.
//! 5. The disk completes it and wakes the task, which polls what was woken, forms the replies of
//!    all (`session/answer.rs`) in `session/outbox.rs` and sends them with one call.
//!
//! It knows no VDI and no tokio: a [`disk::Catalog`] gives it disks by name, a
//! [`runtime::socket::Socket`] bytes. Listening is the daemon's. What clients may rely on stands
//! in `docs/nbd.md`.

mod control;
mod end;
mod input;
mod metrics;
mod negotiation;
pub mod protocol;
mod server;
mod session;
mod tls;

pub use metrics::Snapshot;
pub use server::{Config, Server};
pub use tls::{ClientCertificates, Security, TlsError, TlsServer};

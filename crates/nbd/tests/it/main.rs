//! The server as a client sees it: in one process, over a pair of sockets in memory, on a clock
//! that jumps from timer to timer.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "helpers of tests fail by panicking, and their numbers are small"
)]

extern crate parallax_nbd as nbd;

mod client;
mod conformance;
mod faults;
mod harness;
mod negotiation;
mod session;
mod sockets;
mod tls;

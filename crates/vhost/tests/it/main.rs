//! The vhost-user-blk server against a driver and a monitor that play by the rules, and some that
//! do not, over real sockets, memory and eventfds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

extern crate parallax_vhost as vhost;

mod conformance;
mod hostile;
mod inflight;
mod machine;
mod messages;
mod migration;
mod requests;
mod testbed;

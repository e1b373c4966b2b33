//! The real binary, run as people run it, in a directory of its own.
//!
//! Needs qemu-img, nbdinfo and nbdcopy, which `cargo xtask test` installs.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod attachments;
mod check;
mod docs;
mod errors;
mod failure;
mod format;
mod http;
mod json;
mod lifecycle;
mod mounts;
mod network;
mod place;
mod quickstart;
mod scrub;
mod snapshots;
mod stats;
mod streams;
mod transfer;
mod upgrade;
mod vdis;

//! The FUSE server before a kernel of the tests' own: a socket that keeps messages apart stands for
//! /dev/fuse.
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that fails says where"
)]

mod conformance;
mod files;
mod kernel;
mod takeover;
mod tree;

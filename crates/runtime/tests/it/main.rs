//! The reactor on the real kernel: each test runs on both engines.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "tests with real time"
)]

mod channels;
mod events;
mod lookouts;
mod reactor;
mod sockets;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use parallax_runtime::reactor::{EngineChoice, Reactor};

/// Runs `test` on each engine that the kernel lets us have. Worker threads always work, so no
/// test passes without running.
fn on_each_engine(test: impl Fn(Reactor)) {
    test(Reactor::start(EngineChoice::ThreadPool).unwrap());
    match Reactor::start(EngineChoice::IoUring) {
        Ok(reactor) => test(reactor),
        Err(error) => eprintln!("io_uring is refused here: {error}"),
    }
}

/// A path that no other test uses; short enough for a unix socket.
fn scratch_path() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("plx-rt-{}-{number}", std::process::id()))
}

//! Real files and block devices, on both engines.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "tests on the real kernel"
)]

mod block_device;
mod data;
mod full;
mod open;

use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use parallax_device::{Access, BlockFile, Device, OpenOptions};
use runtime::reactor::{EngineChoice, Reactor};

/// Runs `test` on each engine that the kernel lets us have. Worker threads always work, so no
/// test passes without running.
fn on_each_engine(test: impl Fn(Reactor)) {
    test(Reactor::start(EngineChoice::ThreadPool).unwrap());
    match Reactor::start(EngineChoice::IoUring) {
        Ok(reactor) => test(reactor),
        Err(error) => eprintln!("io_uring is refused here: {error}"),
    }
}

/// A file that goes away with its owner, on the file system of the build, which has O_DIRECT.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("device-{}-{number}", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn create(&self, reactor: &Reactor, bytes: u64) -> Device {
        let file = BlockFile::create(reactor.io(), &self.0, bytes, false).unwrap();
        Device::new(Rc::new(file))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn options(access: Access) -> OpenOptions {
    OpenOptions { access, buffered: false }
}

/// This test binary again, to run the ignored test `name` on `path`.
fn child(name: &str, path: &std::path::Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]).env(CHILD_PATH, path);
    command
}

/// Where a child finds the path to work on.
const CHILD_PATH: &str = "PARALLAX_TEST_PATH";

fn child_path() -> PathBuf {
    PathBuf::from(std::env::var_os(CHILD_PATH).expect("started by another test"))
}

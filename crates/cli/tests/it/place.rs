//! A directory with a store in it, the commands that run there, and the daemon that serves it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A directory of its own, with one store and one control socket.
pub(crate) struct Place {
    dir: TempDir,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Place {
    /// An empty directory.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A directory with an empty store of `size`.
    pub(crate) fn with_store(size: &str) -> Self {
        let place = Self::new();
        place.ok(&["format", place.store(), "--size", size]);
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Relative, since commands run inside the directory.
    pub(crate) fn store(&self) -> &'static str {
        "store"
    }

    /// `parallax`, ready to be run in this directory with its socket.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_parallax"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env("PARALLAX_SOCKET", self.path("control.sock"))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(arguments))
    }

    /// Runs a command that must succeed; its output without the last line end.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
        outcome.stdout.trim_end().to_owned()
    }

    /// Runs a command with --json that must succeed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// Runs a command that must fail with `code`; what it says.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(code), "{arguments:?}: {outcome:?}");
        assert_eq!(outcome.stdout, "", "{arguments:?} prints no result");
        outcome.stderr
    }

    /// Serves the store until the returned value is dropped.
    #[track_caller]
    pub(crate) fn serve(&self, options: &[&str]) -> Served {
        let arguments = [&["serve", self.store(), "--json"], options].concat();
        Served::start(self.command(&arguments))
    }

    /// The URL of an export on the daemon's own socket.
    pub(crate) fn url(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.text("control.nbd.sock"))
    }

    /// Runs another program in this directory; it must succeed.
    #[track_caller]
    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(program);
        let outcome = Outcome::of(command.args(arguments).current_dir(self.dir.path()));
        assert_eq!(outcome.code, Some(0), "{program} {arguments:?}: {outcome:?}");
        outcome.stdout
    }

    /// Writes `length` bytes of `byte` at `offset` of a disk, and flushes.
    #[track_caller]
    pub(crate) fn write(&self, export: &str, byte: u8, offset: u64, length: u64) {
        let write = format!("write -P {byte} {offset} {length}");
        self.tool("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", &self.url(export)]);
    }

    /// Whether `length` bytes at `offset` of a disk are all `byte`.
    #[track_caller]
    pub(crate) fn holds(&self, export: &str, byte: u8, offset: u64, length: u64) -> bool {
        let read = format!("read -P {byte} {offset} {length}");
        let mut command = Command::new("qemu-io");
        command.args(["-r", "-f", "raw", "-c", &read, &self.url(export)]);
        let outcome = Outcome::of(&mut command);
        assert!(outcome.stdout.contains("read "), "{outcome:?}");
        outcome.code == Some(0) && !outcome.stdout.contains("Pattern verification failed")
    }
}

impl Outcome {
    #[track_caller]
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

/// A daemon that is ready. Killed when dropped.
pub(crate) struct Served {
    child: Child,
    /// Held, so that a late line on it does not fail.
    _stdout: BufReader<ChildStdout>,
    /// What it said when it was ready.
    pub(crate) ready: Value,
}

impl Served {
    /// Starts a daemon and waits until it says with --json that it is ready.
    #[track_caller]
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let Ok(ready) = serde_json::from_str(&line) else {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("not ready: {line:?} {said}");
        };
        Self { child, _stdout: stdout, ready }
    }

    /// Bytes that it has in memory.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, signal).unwrap();
    }

    /// Waits for the end: the exit code, and what was logged.
    #[track_caller]
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now_after(Duration::from_secs(20));
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(!deadline.passed(), "the daemon does not end");
            pause();
        };
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    }

    /// Asks it to stop; it must do so cleanly.
    #[track_caller]
    pub(crate) fn stop(self) {
        self.signal(rustix::process::Signal::TERM);
        let (code, said) = self.wait();
        assert_eq!(code, Some(0), "{said}");
    }

    /// As by `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking()
            && let Some(mut stderr) = self.child.stderr.take()
        {
            let mut said = String::new();
            let _ = stderr.read_to_string(&mut said);
            let _ = writeln!(std::io::stderr(), "the daemon said:\n{said}");
        }
    }
}

/// A moment in the future.
pub(crate) struct Deadline(Instant);

/// Real time: these tests watch real processes.
pub(crate) trait After {
    fn now_after(duration: Duration) -> Deadline;
}

impl After for Instant {
    #[expect(clippy::disallowed_methods, reason = "real processes run on real time")]
    fn now_after(duration: Duration) -> Deadline {
        Deadline(Instant::now() + duration)
    }
}

impl Deadline {
    pub(crate) fn passed(&self) -> bool {
        self.remaining().is_zero()
    }

    #[expect(clippy::disallowed_methods, reason = "real processes run on real time")]
    pub(crate) fn remaining(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

pub(crate) fn pause() {
    wait(10);
}

/// Lets so much time pass, where time is what a test is about.
#[expect(clippy::disallowed_methods, reason = "real processes run on real time")]
pub(crate) fn wait(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// A file of `length` bytes that do not repeat soon.
pub(crate) fn noise_file(path: &Path, length: usize) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    std::fs::write(path, bytes).unwrap();
}

//! Running other programs: with a limit in time, and with what they said kept for the error.
//!
//! Invariants: a program started here never outlives the value that stands for it, and never
//! runs longer than it was given; output goes to an unlinked file, so a program that prints
//! without end cannot block on us.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::clock;

/// Bytes of a failed program's output that go into the error: the end says why it failed.
const TAIL_BYTES: usize = 6000;

/// A program about to be run.
pub(crate) struct Run {
    command: Command,
    line: String,
    limit: Duration,
}

/// What a program left behind.
pub(crate) struct Output {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Its standard output.
    pub(crate) stdout: String,
    /// Its standard error.
    pub(crate) stderr: String,
}

impl Run {
    /// Prepares `program`, looked up on the path.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let line = program.as_ref().to_string_lossy().into_owned();
        Self { command: Command::new(program), line, limit: Duration::from_secs(600) }
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.line.push(' ');
        self.line.push_str(&argument.as_ref().to_string_lossy());
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub(crate) fn args<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Self {
        arguments.into_iter().fold(self, Self::arg)
    }

    /// Adds the words of `text`: for arguments without spaces in them.
    pub(crate) fn words(self, text: &str) -> Self {
        self.args(text.split_whitespace())
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Hides an environment variable of ours from it.
    pub(crate) fn without_env(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Runs in `directory`.
    pub(crate) fn dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Kills the program if it runs longer than this (default: ten minutes).
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs with our own standard streams, so that a person sees its progress.
    ///
    /// # Errors
    /// If it cannot be started, runs too long or fails.
    pub(crate) fn show(mut self) -> Result<()> {
        self.command.stdin(Stdio::null());
        let mut child = self.spawn()?;
        let status = self.wait(&mut child)?;
        ensure!(status.success(), "`{}` failed: {status}", self.line);
        Ok(())
    }

    /// Runs and keeps what it prints, whether it succeeds or not.
    ///
    /// # Errors
    /// If it cannot be started or runs too long.
    pub(crate) fn output(mut self) -> Result<Output> {
        let mut stdout = scratch_file()?;
        let mut stderr = scratch_file()?;
        self.command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let mut child = self.spawn()?;
        let waited = self.wait(&mut child);
        let (stdout, stderr) = (contents(&mut stdout)?, contents(&mut stderr)?);
        let status =
            waited.with_context(|| format!("it said: {}", tail(&format!("{stdout}{stderr}"))))?;
        Ok(Output { status, stdout, stderr })
    }

    /// Runs and returns its standard output.
    ///
    /// # Errors
    /// If it fails; the error ends with what it printed.
    pub(crate) fn read(self) -> Result<String> {
        let line = self.line.clone();
        let output = self.output()?;
        if !output.status.success() {
            let said = format!("{}{}", output.stdout, output.stderr);
            bail!("`{line}` failed: {}\n{}", output.status, tail(&said));
        }
        Ok(output.stdout)
    }

    /// Starts it and leaves it running, its output going to the file `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn background(mut self, log: &Path) -> Result<Running> {
        let out = File::options().create(true).append(true).open(log)?;
        self.command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = self.spawn()?;
        Ok(Running { child, line: self.line })
    }

    fn spawn(&mut self) -> Result<Child> {
        self.command.spawn().with_context(|| format!("start `{}`", self.line))
    }

    fn wait(&self, child: &mut Child) -> Result<ExitStatus> {
        let mut status = None;
        let ended = clock::wait_until(self.limit, || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        if let (true, Some(status)) = (ended, status) {
            return Ok(status);
        }
        child.kill()?;
        child.wait()?;
        bail!("`{}` was still running after {:.0?} and was killed", self.line, self.limit)
    }
}

/// A program that runs beside us; killed when dropped.
pub(crate) struct Running {
    child: Child,
    line: String,
}

impl Running {
    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.ended().is_none()
    }

    /// Kills it at once, as a crash would, and waits until it is gone.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it is still running after `limit` (it is killed then).
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        clock::wait_until(limit, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        match status {
            Some(status) => Ok(status),
            None => {
                self.kill()?;
                bail!("`{}` was still running after {limit:.0?} and was killed", self.line)
            }
        }
    }

    /// Asks it to stop (SIGTERM) and waits for that.
    ///
    /// # Errors
    /// If it is still there after `limit`.
    pub(crate) fn stop(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("process id")?, Signal::TERM)?;
        self.wait(limit)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.kill().is_ok() && self.child.wait().is_err() {
            // The kernel reaps it when we end.
        }
    }
}

/// The last part of a long text, from the start of a line.
pub(crate) fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(TAIL_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let cut = text.get(start..).unwrap_or_default();
    match cut.find('\n') {
        Some(line_end) if start > 0 => cut.get(line_end + 1..).unwrap_or_default(),
        _ => cut,
    }
}

/// A file that vanishes when it is closed.
fn scratch_file() -> Result<File> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("xtask-{}-{number}", std::process::id()));
    let file = File::options().read(true).append(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

fn contents(file: &mut File) -> Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_failure_are_told_apart() {
        assert_eq!(Run::new("echo").arg("a b").read().unwrap(), "a b\n");
        let error = Run::new("sh").args(["-c", "echo broken >&2; exit 3"]).read().unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("broken") && text.contains("exit status: 3"), "{text}");
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let run = Run::new("sleep").arg("60").limit(Duration::from_millis(50));
        assert!(format!("{:#}", run.read().unwrap_err()).contains("was killed"));
    }

    #[test]
    fn a_tail_starts_at_a_line() {
        let long = "x".repeat(TAIL_BYTES) + "\nlast line\n";
        assert_eq!(tail(&long), "last line\n");
        assert_eq!(tail("short"), "short");
    }
}

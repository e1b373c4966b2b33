//! What looks like a machine that was just installed: namespaces of its own, in which /run, /mnt and
//! /srv are empty, with an empty directory to work in and `parallax` on the path.
//!
//! Everything that runs in it, in the background too, and everything that is mounted in it ends with
//! it. Loop devices do not, since the kernel has them for all: [`Sandbox`] frees those that were left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::clock;
use crate::process::{Run, Running, tail};

const READY_LIMIT: Duration = Duration::from_secs(60);
const COMMAND_LIMIT: Duration = Duration::from_secs(600);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const STORE_SIZE: &str = "16G";

/// Where commands of a guide are run.
pub(crate) struct Sandbox {
    /// Where they find what is taken for granted, and leave what they make.
    pub(crate) directory: PathBuf,
    /// Logs.
    scratch: PathBuf,
    path: String,
    /// The first process in it, as seen from here.
    init: String,
    daemon: Option<Program>,
    /// Ends all of it when it is dropped.
    _holder: Running,
}

/// A command that goes on in the background.
pub(crate) struct Program {
    name: String,
    running: Running,
    log: PathBuf,
}

impl Sandbox {
    /// Makes one with a store below `data`, where files at the paths `hidden` are not to be used.
    ///
    /// # Errors
    /// If the kernel refuses: it takes root.
    pub(crate) fn new(data: &Path, scratch: &Path, binary: &Path, hidden: &[&str]) -> Result<Self> {
        let directory = data.join("work");
        std::fs::create_dir_all(&directory)?;
        let programs = data.join("bin");
        std::fs::create_dir_all(&programs)?;
        std::os::unix::fs::symlink(binary, programs.join("parallax"))?;
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", programs.display());

        let ready = data.join("ready");
        let mut script =
            "for empty in /run /mnt /srv; do mount -t tmpfs none $empty; done\n".to_owned();
        for hidden in hidden {
            script += &format!("[ ! -e {hidden} ] || mount --bind /dev/null {hidden}\n");
        }
        // The first process waits for everybody whose parent has ended; `sleep` alone would not.
        script += &format!("touch {}\nwhile sleep 60; do :; done\n", ready.display());
        let run = Run::new("unshare").words("--mount --propagation private --pid --mount-proc");
        let run = run.words("--fork --kill-child sh -e -c").arg(&script);
        let log = scratch.join("sandbox.log");
        let mut holder = run.background(&log)?;
        clock::wait_until(READY_LIMIT, || ready.exists() || !holder.is_alive());
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        ensure!(ready.exists(), "there are no namespaces to be had: {said}");
        let id = holder.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        let init = children.trim().to_owned();
        let scratch = scratch.to_owned();
        let sandbox = Self { directory, scratch, path, init, daemon: None, _holder: holder };
        sandbox.run(&format!("parallax format store --size {STORE_SIZE}"))?;
        Ok(sandbox)
    }

    /// Starts a daemon, and waits until it is ready.
    ///
    /// # Errors
    /// If it does not get ready.
    pub(crate) fn serve(&mut self, command: &str) -> Result<()> {
        let mut daemon = self.start("daemon", command)?;
        daemon.wait_for("\nready", READY_LIMIT)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Runs commands, as somebody who types them: what they set and export is there for the next.
    ///
    /// # Errors
    /// If one fails.
    pub(crate) fn run(&self, commands: &str) -> Result<()> {
        let script = format!(
            "{}\n{commands}\n{{ set +x; }} 2>/dev/null\nexport -p > ../environment\n",
            self.prologue()
        );
        self.shell(&script).limit(COMMAND_LIMIT).read().map(drop)
    }

    /// Starts commands that do not end by themselves.
    ///
    /// # Errors
    /// If they cannot be started.
    pub(crate) fn start(&self, name: &str, commands: &str) -> Result<Program> {
        // The shell leads a process group of its own, so that all of it can be ended.
        let script = format!("{}\necho $$ > ../{name}.pid\n{commands}", self.prologue());
        let log = self.scratch.join(format!("{name}.log"));
        let running = self.enter("setsid --wait sh").args(["-e", "-x", "-c", &script]);
        let running = running.background(&log)?;
        Ok(Program { name: name.to_owned(), running, log })
    }

    fn prologue(&self) -> String {
        let directory = self.directory.display();
        format!(
            "{{ cd '{directory}'; set -a; [ ! -e ../environment ] || . ../environment; }} 2>/dev/null"
        )
    }

    fn shell(&self, script: &str) -> Run {
        self.enter("sh").args(["-e", "-x", "-c", script])
    }

    fn enter(&self, program: &str) -> Run {
        Run::new("nsenter")
            .words("--mount --pid --target")
            .arg(&self.init)
            .words(program)
            .env("PATH", &self.path)
            .without_env("PARALLAX_SOCKET")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let script = "cd /; umount -q /mnt/before /srv; losetup -nlO NAME,BACK-FILE | \
                      while read -r device file; do \
                      case $file in /mnt/disks/*) losetup -d $device ;; esac; done";
        // After a guide that was followed to its end there is nothing left to free.
        let _ = self.enter("sh").args(["-c", script]).output();
    }
}

impl Program {
    /// What it has said so far.
    pub(crate) fn said(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.running.is_alive()
    }

    /// Waits until it has said this.
    ///
    /// # Errors
    /// If it ends before, or takes too long.
    pub(crate) fn wait_for(&mut self, wanted: &str, limit: Duration) -> Result<()> {
        self.wait_for_any(&[wanted], limit)
    }

    /// Waits until it has said one of these.
    ///
    /// # Errors
    /// If it ends before, or takes too long.
    pub(crate) fn wait_for_any(&mut self, wanted: &[&str], limit: Duration) -> Result<()> {
        let has_said = |said: &str| wanted.iter().any(|wanted| said.contains(wanted));
        clock::wait_until(limit, || {
            clock::sleep(Duration::from_millis(50));
            has_said(&self.said()) || !self.is_alive()
        });
        let said = self.said();
        ensure!(has_said(&said), "{} never said {wanted:?}:\n{}", self.name, tail(&said));
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for that.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) fn stop(mut self, sandbox: &Sandbox) -> Result<()> {
        sandbox.run(&format!("kill -- -$(cat ../{}.pid)", self.name))?;
        self.running.wait(STOP_LIMIT).map(drop)
    }
}

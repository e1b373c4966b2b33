//! A virtual machine under QEMU's own emulation: slow, but it runs where nothing else does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::clock;
use crate::process::{Run, Running, tail};
use crate::qmp::Qmp;

use super::kernel::Kernel;

/// How long a guest's disk may be away before it sees an error; over vhost-user it never does.
const RECONNECT_SECONDS: u32 = 120;
/// How often QEMU looks whether a vhost-user server is there again.
const RECONNECT_MILLISECONDS: u32 = 100;

/// How long a guest may stand still while it is moved.
const DOWN_LIMIT_MS: u32 = 300;

/// How a guest gets at a disk.
pub(crate) enum Disk {
    /// The socket of an NBD server, and an export of it.
    Nbd(PathBuf, String),
    /// The socket of a vhost-user-blk server.
    VhostUser(PathBuf),
    /// A file, which is written past the page cache.
    File(PathBuf),
}

/// What a guest is started with.
pub(crate) struct Machine<'a> {
    /// Its kernel.
    pub(crate) kernel: &'a Kernel,
    /// Its first file system.
    pub(crate) initramfs: &'a Path,
    /// Added to the kernel's command line.
    pub(crate) append: String,
    /// Its disks.
    pub(crate) disks: Vec<Disk>,
    /// What else it has.
    pub(crate) size: Size,
    /// Where its serial line is written to. QEMU's log and its monitor's socket stand beside it.
    pub(crate) serial: PathBuf,
    /// The socket at which it waits for another guest's memory, to go on as that one.
    pub(crate) incoming: Option<PathBuf>,
}

/// How long a move took.
pub(crate) struct Moved {
    /// Milliseconds altogether.
    pub(crate) total_ms: u64,
    /// Milliseconds in which the guest stood still.
    pub(crate) down_ms: u64,
}

/// How large a guest is.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Virtual processors, and queues of each disk.
    pub(crate) processors: u32,
    /// Memory.
    pub(crate) memory_mib: u32,
}

/// What most guests are fine with.
pub(crate) const COMMON: Size = Size { processors: 2, memory_mib: 512 };

/// A running guest; gone when dropped.
pub(crate) struct Guest {
    running: Running,
    serial: PathBuf,
}

impl Machine<'_> {
    /// Switches it on.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub(crate) fn start(&self) -> Result<Guest> {
        if self.serial.exists() {
            std::fs::remove_file(&self.serial)?;
        }
        let append =
            format!("console=ttyS0 quiet panic=-1 mitigations=off nokaslr {}", self.append);
        let Size { processors, memory_mib } = self.size;
        let mut run = Run::new("qemu-system-x86_64")
            .words("-M q35 -accel tcg,thread=multi -cpu max")
            .words(&format!("-smp {processors} -m {memory_mib}"))
            .words("-nodefaults -display none -no-reboot -kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-append")
            .arg(append)
            .arg("-serial")
            .arg(format!("file:{}", self.serial.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor(&self.serial).display()));
        if let Some(socket) = &self.incoming {
            run = run.arg("-incoming").arg(format!("unix:{}", socket.display()));
        }
        if self.disks.iter().any(|disk| matches!(disk, Disk::VhostUser(_))) {
            // The server maps the guest's memory.
            let memory = format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on");
            run = run.arg("-object").arg(memory).words("-numa node,memdev=mem");
        }
        for (index, disk) in self.disks.iter().enumerate() {
            run = disk.add_to(run, index, processors);
        }
        let log = self.serial.with_extension("qemu.log");
        Ok(Guest { running: run.background(&log)?, serial: self.serial.clone() })
    }
}

impl Disk {
    fn add_to(&self, run: Run, index: usize, queues: u32) -> Run {
        match self {
            Self::Nbd(socket, export) => run
                .arg("-blockdev")
                .arg(format!(
                    "driver=nbd,node-name=n{index},server.type=unix,server.path={},export={export},\
                     reconnect-delay={RECONNECT_SECONDS},open-timeout=10",
                    socket.display()
                ))
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=n{index},num-queues={queues}")),
            Self::VhostUser(socket) => run
                .arg("-chardev")
                .arg(format!(
                    "socket,id=c{index},path={},reconnect-ms={RECONNECT_MILLISECONDS}",
                    socket.display()
                ))
                .arg("-device")
                .arg(format!("vhost-user-blk-pci,chardev=c{index},num-queues={queues}")),
            Self::File(path) => run
                .arg("-blockdev")
                .arg(format!(
                    "driver=file,node-name=n{index},filename={},cache.direct=on,discard=unmap",
                    path.display()
                ))
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=n{index},num-queues={queues}")),
        }
    }
}

/// The socket of the monitor of the guest with this serial line.
fn monitor(serial: &Path) -> PathBuf {
    serial.with_extension("qmp")
}

impl Guest {
    /// Moves it to `there`, which waits for it at `socket`. `meanwhile` is called while memory is
    /// copied and the guest runs here, slowly enough that it does; then this one is switched off.
    ///
    /// # Errors
    /// If it cannot be moved within `limit`.
    pub(crate) fn migrate(
        self,
        there: &Self,
        socket: &Path,
        limit: Duration,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<Moved> {
        // It listens before it answers.
        Qmp::connect(&monitor(&there.serial))?;
        let mut qmp = Qmp::connect(&monitor(&self.serial))?;
        let slowly = json!({ "downtime-limit": DOWN_LIMIT_MS, "max-bandwidth": 4 << 20 });
        qmp.ask("migrate-set-parameters", &slowly)?;
        qmp.ask("migrate", &json!({ "uri": format!("unix:{}", socket.display()) }))?;
        meanwhile()?;
        qmp.ask("migrate-set-parameters", &json!({ "max-bandwidth": 1 << 30 }))?;
        let mut moved = json!({});
        let mut answered = Ok(());
        clock::wait_until(limit, || {
            clock::sleep(Duration::from_millis(20));
            match qmp.ask("query-migrate", &json!({})) {
                Ok(answer) => moved = answer,
                Err(error) => answered = Err(error),
            }
            let ended = matches!(moved["status"].as_str(), Some("completed" | "failed"));
            ended || answered.is_err()
        });
        answered?;
        ensure!(moved["status"] == "completed", "the guest was not moved: {moved}");
        let number = |name: &str| moved[name].as_u64().with_context(|| format!("QEMU: {name}"));
        Ok(Moved { total_ms: number("total-time")?, down_ms: number("downtime")? })
    }

    /// What it has said so far.
    pub(crate) fn said(&self) -> String {
        let bytes = std::fs::read(&self.serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until it has said a line for which `wanted` holds.
    ///
    /// # Errors
    /// If it ends before, or takes longer than `limit`; the error has the end of what it said.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut found = false;
        let mut ended = false;
        clock::wait_until(limit, || {
            // Asked first: what it says last is still read.
            ended = !self.running.is_alive();
            found = complete_lines(&self.said()).any(&wanted);
            clock::sleep(Duration::from_millis(20));
            found || ended
        });
        if found {
            return Ok(());
        }
        let how = if ended { "ended" } else { "was silent for too long" };
        bail!("the guest {how} instead of {what}:\n{}", tail(&self.said()))
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.running.is_alive()
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// If QEMU is gone already.
    pub(crate) fn kill(mut self) -> Result<String> {
        self.running.kill()?;
        Ok(self.said())
    }

    /// Waits until it has switched itself off; returns all that it said.
    ///
    /// # Errors
    /// If it does not within `limit`.
    pub(crate) fn wait(mut self, limit: Duration) -> Result<String> {
        let ended = self.running.wait(limit);
        let said = self.said();
        ended.with_context(|| format!("the guest said:\n{}", tail(&said)))?;
        Ok(said)
    }
}

/// Lines that have been said to their end: the last one may be cut off by a kill.
pub(crate) fn complete_lines(said: &str) -> impl Iterator<Item = &str> {
    let end = said.rfind('\n').map_or(0, |end| end + 1);
    said.get(..end).unwrap_or_default().lines()
}

/// Files by number, with their sums.
pub(crate) type Files = BTreeMap<u64, String>;

/// The files that a guest names in lines such as `GOT 17 d41d8c…`.
pub(crate) fn files(said: &str, verb: &str) -> Files {
    complete_lines(said).filter_map(|line| numbered(line, verb)).collect()
}

/// The number and the sum in such a line; `verb` ends with a space.
pub(crate) fn numbered(line: &str, verb: &str) -> Option<(u64, String)> {
    let (number, sum) = line.strip_prefix(verb)?.split_once(' ')?;
    Some((number.parse().ok()?, sum.to_owned()))
}

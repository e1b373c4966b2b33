//! A server under test: our daemon, or qemu-storage-daemon as the peer to measure and to prove
//! the tests themselves on.
//!
//! Every kind serves one disk as the NBD export [`EXPORT`] on a unix socket, and to a virtual machine
//! if asked to, from a file opened O_DIRECT, so whatever runs against one runs against all.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::clock;
use crate::control::Control;
use crate::nbd;
use crate::process::{Run, Running};

/// Name of the disk that is served.
pub(crate) const EXPORT: &str = "d";

/// Longest that a server may take to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest that one may take to stop: it may have dirty state to write.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Lines of a server's log that go into an error.
const LOG_LINES: usize = 15;

/// Which program serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Our daemon: the path of the binary.
    Parallax(PathBuf),
    /// qemu-storage-daemon on a raw file.
    Raw,
    /// qemu-storage-daemon on a qcow2 file.
    Qcow2,
}

/// What a server is made with.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Size of the disk.
    pub(crate) disk_bytes: u64,
    /// Size of our store.
    pub(crate) store_bytes: u64,
    /// Size of its extents, if not the usual one.
    pub(crate) extent_bytes: Option<u64>,
    /// Whether our store takes its space from the file system at once.
    pub(crate) preallocate: bool,
    /// Bytes of our node cache.
    pub(crate) cache_bytes: u64,
    /// Whether the disk is also a vhost-user-blk device.
    pub(crate) vhost_user: bool,
    /// Files that a qcow2 disk stands on, the lowest first: it holds only what they do not.
    pub(crate) backing: Vec<PathBuf>,
}

impl Options {
    /// A disk of `disk_bytes` on a sparse store with ample room for old versions of every block.
    pub(crate) fn disk(disk_bytes: u64) -> Self {
        let store_bytes = (disk_bytes * 4).max(1 << 30);
        Self {
            disk_bytes,
            store_bytes,
            extent_bytes: None,
            preallocate: false,
            cache_bytes: 256 << 20,
            vhost_user: false,
            backing: Vec::new(),
        }
    }
}

/// A server with its files. Running between [`start`](Self::start) and a stop or kill.
pub(crate) struct Server {
    kind: Kind,
    options: Options,
    /// The store, or the peer's file.
    file: PathBuf,
    /// Sockets and logs; short, because a socket's path may have 107 bytes.
    directory: PathBuf,
    running: Option<Running>,
}

impl Server {
    /// Makes a disk in `data` (large files) and starts serving it; sockets go to `directory`.
    ///
    /// # Errors
    /// If anything of that fails.
    pub(crate) fn create(
        kind: &Kind,
        options: &Options,
        data: &Path,
        directory: &Path,
    ) -> Result<Self> {
        std::fs::create_dir_all(data)?;
        std::fs::create_dir_all(directory)?;
        let file = data.join(match kind {
            Kind::Parallax(_) => "store.plx",
            Kind::Raw => "disk.raw",
            Kind::Qcow2 => "disk.qcow2",
        });
        if file.exists() {
            std::fs::remove_file(&file)?;
        }
        let mut server = Self {
            kind: kind.clone(),
            options: options.clone(),
            file,
            directory: directory.to_owned(),
            running: None,
        };
        server.make_file().context("make the disk")?;
        server.launch()?;
        if let Kind::Parallax(_) = kind {
            let mut control = server.wait_for_control()?;
            control.create(EXPORT, options.disk_bytes)?;
        }
        server.wait_ready()?;
        Ok(server)
    }

    fn make_file(&self) -> Result<()> {
        let bytes = self.options.disk_bytes.to_string();
        match &self.kind {
            Kind::Raw => std::fs::File::create(&self.file)?.set_len(self.options.disk_bytes)?,
            Kind::Qcow2 => {
                let mut run = Run::new("qemu-img").words("create -q -f qcow2");
                if let Some(below) = self.options.backing.last() {
                    run = run.words("-F qcow2 -b").arg(below);
                }
                run.arg(&self.file).arg(bytes).read()?;
            }
            Kind::Parallax(binary) => {
                let run = Run::new(binary).arg("format").arg(&self.file).arg("--size");
                let run = run.arg(self.options.store_bytes.to_string()).arg("--preallocate");
                let run = run.arg(if self.options.preallocate { "full" } else { "off" });
                match self.options.extent_bytes {
                    Some(bytes) => run.arg("--extent-size").arg(bytes.to_string()).read()?,
                    None => run.read()?,
                };
            }
        }
        Ok(())
    }

    /// Starts the program again after [`stop`](Self::stop) or [`kill`](Self::kill), and returns
    /// how long it took until it answered.
    ///
    /// # Errors
    /// If it does not answer in time; the error has the end of its log.
    pub(crate) fn start(&mut self) -> Result<Duration> {
        let start = self.launch()?;
        self.wait_ready()?;
        Ok(start.elapsed())
    }

    /// As [`start`](Self::start), but ours, and nobody opens the disk: only the control socket answers.
    ///
    /// # Errors
    /// If it does not answer in time; the error has the end of its log.
    pub(crate) fn start_unopened(&mut self) -> Result<Duration> {
        let start = self.launch()?;
        let socket = self.control_socket();
        self.wait_for("open its store", || Control::connect(&socket)?.stats())?;
        Ok(start.elapsed())
    }

    /// Gives our daemon a node cache of another size from its next start on.
    pub(crate) fn set_cache_bytes(&mut self, bytes: u64) {
        self.options.cache_bytes = bytes;
    }

    fn launch(&mut self) -> Result<Instant> {
        ensure!(self.running.is_none(), "the server is running already");
        let ours = matches!(self.kind, Kind::Parallax(_));
        for socket in [self.nbd_socket(), self.control_socket(), self.vhost_socket()] {
            // qemu-storage-daemon refuses a socket that a killed one left behind; ours may not.
            if !ours && socket.exists() {
                std::fs::remove_file(&socket)?;
            }
        }
        let attached = self.control_socket().with_extension("attachments.json");
        if self.options.vhost_user && attached.exists() {
            // It may be that of another store at the same socket: the disk is attached anew.
            std::fs::remove_file(attached)?;
        }
        let run = match &self.kind {
            Kind::Parallax(binary) => self.parallax(binary),
            Kind::Raw => self.storage_daemon("raw"),
            Kind::Qcow2 => self.storage_daemon("qcow2"),
        };
        let start = clock::now();
        self.running = Some(run.background(&self.log())?);
        Ok(start)
    }

    fn parallax(&self, binary: &Path) -> Run {
        Run::new(binary)
            .arg("serve")
            .arg(&self.file)
            .arg("--socket")
            .arg(self.control_socket())
            .arg("--nbd")
            .arg(format!("unix:{}", self.nbd_socket().display()))
            .arg("--cache")
            .arg(self.options.cache_bytes.to_string())
    }

    fn storage_daemon(&self, format: &str) -> Run {
        let (nbd, qmp) = (self.nbd_socket(), self.control_socket());
        let options = "cache.direct=on,aio=io_uring,discard=unmap";
        let file = format!("driver=file,node-name=f,filename={},{options}", self.file.display());
        let server = format!("addr.type=unix,addr.path={},max-connections=64", nbd.display());
        let mut run = Run::new("qemu-storage-daemon");
        // Named one by one, so that each is opened as the top is, and by nothing but this.
        let mut below = String::new();
        for (number, path) in self.options.backing.iter().enumerate() {
            let options = "cache.direct=on,aio=io_uring,read-only=on";
            let file = format!("driver=file,node-name=f{number},filename={}", path.display());
            let node = format!("driver=qcow2,node-name=b{number},file=f{number},read-only=on");
            run = run.arg("--blockdev").arg(format!("{file},{options}"));
            run = run.arg("--blockdev").arg(format!("{node}{below}"));
            below = format!(",backing=b{number}");
        }
        let disk = format!("driver={format},node-name={EXPORT},file=f,discard=unmap{below}");
        let run = run
            .arg("--blockdev")
            .arg(file)
            .arg("--blockdev")
            .arg(disk)
            .arg("--nbd-server")
            .arg(server)
            .arg("--export")
            .arg(format!("type=nbd,id=e,node-name={EXPORT},name={EXPORT},writable=on"))
            .arg("--chardev")
            .arg(format!("socket,id=q,path={},server=on,wait=off", qmp.display()))
            .words("--monitor chardev=q");
        match self.options.vhost_user {
            true => run.arg("--export").arg(format!(
                "type=vhost-user-blk,id=v,node-name={EXPORT},writable=on,addr.type=unix,addr.path={}",
                self.vhost_socket().display()
            )),
            false => run,
        }
    }

    /// Waits until the export answers, and our control socket too.
    fn wait_ready(&mut self) -> Result<()> {
        let socket = self.nbd_socket();
        self.wait_for("serve its disk", || nbd::Client::connect(&socket, EXPORT)).map(drop)?;
        if let Kind::Parallax(_) = self.kind {
            self.wait_for_control()?;
        }
        if !self.options.vhost_user {
            return Ok(());
        }
        let socket = self.vhost_socket();
        match self.kind {
            Kind::Parallax(_) => self.wait_for_control()?.attach(EXPORT, &socket),
            _ => self.wait_for("offer its device", || Ok(socket.metadata()?)).map(drop),
        }
    }

    fn wait_for_control(&mut self) -> Result<Control> {
        let socket = self.control_socket();
        self.wait_for("answer on its control socket", || Control::connect(&socket))
    }

    fn wait_for<T>(&mut self, what: &str, attempt: impl Fn() -> Result<T>) -> Result<T> {
        let mut last = None;
        let running = self.running.as_mut().context("the server was not started")?;
        clock::wait_until(START_LIMIT, || {
            // A failed attempt says little while the server starts; the last one is kept.
            last = Some(attempt());
            matches!(last, Some(Ok(_))) || !running.is_alive()
        });
        match last {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => {
                let post_mortem = self.post_mortem();
                Err(error).with_context(|| format!("the server did not {what}: {post_mortem}"))
            }
            None => bail!("the server was not asked"),
        }
    }

    /// Kills it without warning, as a crash would.
    ///
    /// # Errors
    /// If it is not running.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.running.take().context("the server is not running")?.kill()
    }

    /// Has our daemon become what its program is now, and returns how long it took until that answered.
    ///
    /// # Errors
    /// If it is not ours, or refuses.
    pub(crate) fn upgrade(&mut self) -> Result<Duration> {
        let Kind::Parallax(binary) = &self.kind else { bail!("the peer cannot be upgraded") };
        let start = clock::now();
        Run::new(binary).words("upgrade --socket").arg(self.control_socket()).read()?;
        self.wait_ready()?;
        Ok(start.elapsed())
    }

    /// Asks it to stop and waits until it has.
    ///
    /// # Errors
    /// If it takes too long, or had ended before.
    pub(crate) fn stop(&mut self) -> Result<ExitStatus> {
        self.running.take().context("the server is not running")?.stop(STOP_LIMIT)
    }

    /// Adds to an error how the server fares, and starts it again if it has ended, so that what
    /// is tested next does not fail for the same reason.
    ///
    /// # Errors
    /// The error given, or that of the start.
    pub(crate) fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        let Err(error) = result else { return result };
        let error = error.context(self.post_mortem());
        if !self.running.as_mut().is_some_and(Running::is_alive) {
            self.running = None;
            self.start().context("start the server again")?;
        }
        Err(error)
    }

    /// Whether it still runs, how it ended if it does not, and the end of what it printed.
    fn post_mortem(&mut self) -> String {
        let ended = self.running.as_mut().and_then(Running::ended);
        let state = match ended {
            Some(status) => format!("the server ended by itself: {status}"),
            None if self.running.is_some() => format!("the server is running{}", self.counters()),
            None => "the server was stopped or killed".to_owned(),
        };
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
        format!("{state}; its log ends:\n{}", last.join("\n"))
    }

    /// What our daemon counts, if it still answers.
    fn counters(&self) -> String {
        let Kind::Parallax(_) = &self.kind else { return String::new() };
        let stats = Control::connect(&self.control_socket()).and_then(|mut c| c.stats());
        match stats {
            Ok(stats) => format!(" and counts {stats}"),
            Err(error) => format!(" and does not answer: {error:#}"),
        }
    }

    /// Which program this is.
    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Its process.
    ///
    /// # Errors
    /// If it is not running.
    pub(crate) fn process_id(&self) -> Result<u32> {
        Ok(self.running.as_ref().context("the server is not running")?.id())
    }

    /// The store, or the peer's file.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// All files that hold its disk.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.options.backing.iter().map(PathBuf::as_path).chain([self.file()])
    }

    /// Where NBD clients connect.
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }

    /// Where virtual machines connect, if it was made for them.
    pub(crate) fn vhost_socket(&self) -> PathBuf {
        self.directory.join("vhost.sock")
    }

    /// Our control socket, or the peer's QMP monitor.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.directory.join("control.sock")
    }

    /// What the server printed.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("server.log")
    }

    /// The disk as a URI.
    pub(crate) fn uri(&self) -> String {
        self.uri_of(EXPORT)
    }

    /// Another export of this server as a URI.
    pub(crate) fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd_socket().display())
    }
}

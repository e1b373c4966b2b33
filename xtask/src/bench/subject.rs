//! A subject on its turn: its disk brought into the state that a load needs, and fio on it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::clock;
use crate::control::Control;
use crate::fio::{self, Figures, Target};
use crate::nbd;
use crate::qmp::Qmp;
use crate::server::{self, EXPORT, Kind, Server};

use super::Bench;
use super::plan::{State, Subject};

/// Longest that filling a disk may take.
const FILL_LIMIT: Duration = Duration::from_secs(1800);

/// Longest that ours leaves a completed write without a flush (design rule 16).
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// A subject with a disk in some state. Its server runs only during a turn.
pub(crate) struct Stage<'a> {
    bench: &'a Bench,
    subject: Subject,
    state: State,
    disk: Option<Disk>,
}

enum Disk {
    Served(Box<Server>),
    Bare(PathBuf),
}

impl<'a> Stage<'a> {
    /// Nothing is made before the first turn.
    pub(crate) fn new(bench: &'a Bench, subject: Subject, state: State) -> Self {
        Self { bench, subject, state, disk: None }
    }

    /// Who is measured.
    pub(crate) fn subject(&self) -> Subject {
        self.subject
    }

    /// One turn: brings the disk into its state if it is not, and runs the load.
    ///
    /// # Errors
    /// If the server or fio fails.
    pub(crate) fn turn(&mut self, options: &str) -> Result<Figures> {
        let is_flushed = self.subject.is_flushed();
        self.with_server(|bench, disk| match disk {
            Disk::Served(server) if is_flushed => {
                let mut client = nbd::Client::connect(&server.nbd_socket(), EXPORT)?;
                let flush = || client.ask(nbd::Command::Flush, 0, 0).map(drop);
                let target = Target::Nbd(server.uri());
                let (figures, _) = bench.timed_beside(&target, options, FLUSH_INTERVAL, flush)?;
                Ok(figures)
            }
            _ => bench.timed(&disk.target(), options),
        })
    }

    /// One turn of any kind, on the bare file.
    ///
    /// # Errors
    /// If `action` fails.
    pub(crate) fn turn_on_file<T>(
        &mut self,
        action: impl FnOnce(&Bench, &Path) -> Result<T>,
    ) -> Result<T> {
        self.with_server(|bench, disk| match disk {
            Disk::Served(_) => anyhow::bail!("a server stands before the file"),
            Disk::Bare(path) => action(bench, path),
        })
    }

    /// One turn of any kind, with our server running.
    ///
    /// # Errors
    /// If the server fails, or `action` does.
    pub(crate) fn turn_with<T>(
        &mut self,
        action: impl FnOnce(&Bench, &mut Server) -> Result<T>,
    ) -> Result<T> {
        self.with_server(|bench, disk| match disk {
            Disk::Served(server) => action(bench, server),
            Disk::Bare(_) => anyhow::bail!("the bare file has no server"),
        })
    }

    fn with_server<T>(&mut self, action: impl FnOnce(&Bench, &mut Disk) -> Result<T>) -> Result<T> {
        let reusable = matches!(self.state, State::Filled | State::RandomFilled);
        let mut disk = match self.disk.take().filter(|_| reusable) {
            Some(mut disk) => {
                if let Disk::Served(server) = &mut disk {
                    server.start()?;
                }
                self.touch(&disk)?;
                disk
            }
            None => self.make().context("prepare the disk")?,
        };
        let result = action(self.bench, &mut disk)?;
        if let Disk::Served(server) = &mut disk {
            server.stop()?;
        }
        self.disk = Some(disk);
        if !reusable {
            self.remove()?;
        }
        Ok(result)
    }

    /// Reads the whole disk once: a virtual machine's medium may have become slow for what nobody has
    /// touched for some minutes, and the turn of one subject is longer ago than that of another.
    fn touch(&self, disk: &Disk) -> Result<()> {
        let bench = self.bench;
        let read = "--rw=read --bs=1m --iodepth=8";
        let job = fio::job(&disk.target(), bench.scale.disk_bytes, read, &bench.scratch);
        fio::measure(job, FILL_LIMIT).context("read the disk once").map(drop)
    }

    fn make(&self) -> Result<Disk> {
        let bench = self.bench;
        let directory = self.directory();
        let options = server::Options {
            disk_bytes: bench.scale.disk_bytes,
            // Room for the disk, for what a snapshot keeps of it and for the blocks under way.
            store_bytes: bench.scale.disk_bytes * 4,
            preallocate: self.state != State::Fresh,
            cache_bytes: 256 << 20,
        };
        let kind = match self.subject {
            Subject::File => None,
            Subject::Raw | Subject::RawFlushed => Some(Kind::Raw),
            Subject::Qcow2 | Subject::Qcow2Flushed => Some(Kind::Qcow2),
            Subject::Ours => Some(Kind::Parallax(bench.binary.clone().context("our binary")?)),
        };
        let disk = match kind {
            Some(kind) => {
                let server = Server::create(&kind, &options, &directory, &bench.scratch)?;
                Disk::Served(Box::new(server))
            }
            None => {
                std::fs::create_dir_all(&directory)?;
                let path = directory.join("bare.raw");
                std::fs::File::create(&path)?.set_len(options.disk_bytes)?;
                Disk::Bare(path)
            }
        };
        let fill = match self.state {
            State::Fresh => return Ok(disk),
            State::RandomFilled => "--rw=randwrite --bs=4k --iodepth=32 --end_fsync=1",
            State::Filled | State::FilledAnew | State::Snapshotted => {
                "--rw=write --bs=1m --iodepth=8 --end_fsync=1"
            }
        };
        let job = fio::job(&disk.target(), options.disk_bytes, fill, &bench.scratch);
        fio::measure(job, FILL_LIMIT).context("fill the disk")?;
        if self.state == State::Snapshotted {
            snapshot(&disk)?;
        }
        Ok(disk)
    }

    fn remove(&mut self) -> Result<()> {
        self.disk = None;
        let directory = self.directory();
        if directory.exists() {
            std::fs::remove_dir_all(directory)?;
        }
        Ok(())
    }

    fn directory(&self) -> PathBuf {
        let name = format!("{:?}-{:?}", self.subject, self.state).to_ascii_lowercase();
        self.bench.data.join(name)
    }
}

impl Disk {
    fn target(&self) -> Target {
        match self {
            Self::Served(server) => Target::Nbd(server.uri()),
            Self::Bare(path) => Target::File(path.clone()),
        }
    }
}

impl Bench {
    /// Runs a load for the usual time.
    ///
    /// # Errors
    /// If fio fails.
    pub(crate) fn timed(&self, target: &Target, options: &str) -> Result<Figures> {
        let (runtime, ramp) = (self.scale.runtime_seconds, self.scale.ramp_seconds);
        let options = format!("{options} --time_based --runtime={runtime} --ramp_time={ramp}");
        let job = fio::job(target, self.scale.disk_bytes, &options, &self.scratch);
        fio::measure(job, Duration::from_secs(runtime + ramp + 60))
    }

    /// As [`Self::timed`], with `command` run at every tick meanwhile; also returns how long each
    /// took, in milliseconds.
    ///
    /// # Errors
    /// If fio fails, or `command` does.
    pub(crate) fn timed_beside(
        &self,
        target: &Target,
        options: &str,
        interval: Duration,
        mut command: impl FnMut() -> Result<()>,
    ) -> Result<(Figures, Vec<f64>)> {
        std::thread::scope(|scope| {
            let load = scope.spawn(move || self.timed(target, options));
            let mut times = Vec::new();
            let mut next = clock::now() + interval;
            while !load.is_finished() {
                clock::sleep(next.saturating_duration_since(clock::now()));
                let start = clock::now();
                command()?;
                times.push(start.elapsed().as_secs_f64() * 1000.0);
                // A late one does not make the following ones come faster.
                next = (next + interval).max(clock::now());
            }
            let figures = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
            Ok((figures, times))
        })
    }
}

/// Takes a snapshot as each kind of server can.
fn snapshot(disk: &Disk) -> Result<()> {
    let Disk::Served(server) = disk else { anyhow::bail!("a bare file has no snapshots") };
    match server.kind() {
        Kind::Parallax(_) => {
            Control::connect(&server.control_socket())?.snapshot(EXPORT)?;
        }
        Kind::Raw => anyhow::bail!("a raw file has no snapshots"),
        Kind::Qcow2 => internal_snapshot(&mut Qmp::connect(&server.control_socket())?, "s")?,
    }
    Ok(())
}

/// Takes a qcow2 internal snapshot of the running disk.
///
/// # Errors
/// As QEMU says.
pub(crate) fn internal_snapshot(qmp: &mut Qmp, name: &str) -> Result<()> {
    let arguments = json!({ "device": EXPORT, "name": name });
    qmp.ask("blockdev-snapshot-internal-sync", &arguments).map(drop)
}

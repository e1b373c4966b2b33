//! A subject on its turn: its disk brought into the state that a load needs, and a client on it.

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

use super::access::Access;
use super::client::Client;
use super::plan::{Frontend, Medium, Setting, State, Subject};
use super::{Bench, cpu};

/// Longest that filling a disk may take.
const FILL_LIMIT: Duration = Duration::from_secs(1800);
/// Files of a subject that hold a disk are not smaller.
const LARGE_BYTES: u64 = 1 << 20;

/// Longest that a client takes to begin.
const START_TIME: Duration = Duration::from_millis(500);

/// Longest that ours leaves a completed write without a flush (design rule 16).
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// What a turn has shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// What the client measured.
    pub(crate) figures: Figures,
    /// Share of a processor that the server used meanwhile, if there is one.
    pub(crate) server_share: Option<f64>,
}

/// A subject with a disk in some state. Its server runs only during a turn.
pub(crate) struct Stage<'a> {
    bench: &'a Bench,
    setting: Setting,
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
    pub(crate) fn new(bench: &'a Bench, setting: Setting, subject: Subject, state: State) -> Self {
        Self { bench, setting, subject, state, disk: None }
    }

    /// Who is measured.
    pub(crate) fn subject(&self) -> Subject {
        self.subject
    }

    /// One turn: brings the disk into its state if it is not, and runs the load.
    ///
    /// # Errors
    /// If the server or the client fails.
    pub(crate) fn turn(&mut self, access: &Access) -> Result<Turn> {
        let frontend = self.setting.frontend;
        let is_flushed = self.subject.is_flushed();
        let disk_bytes = self.disk_bytes();
        self.with_server(|bench, disk| {
            let server = match disk {
                Disk::Bare(path) => {
                    let client = Client::of_file(path, frontend);
                    let figures = client.run(access, disk_bytes, bench)?;
                    return Ok(Turn { figures, server_share: None });
                }
                Disk::Served(server) => server,
            };
            let client = Client::of(server, frontend, &bench.scratch)?;
            let processes: Vec<u32> =
                [server.process_id()?].into_iter().chain(client.process()).collect();
            let load = || match is_flushed {
                false => client.run(access, disk_bytes, bench),
                true => bench.run_flushed(&client, access, disk_bytes, &server.nbd_socket()),
            };
            // Somewhat less than what is measured: fio takes a moment to begin.
            let start = bench.scale.ramp + START_TIME;
            let length = bench.scale.runtime.saturating_sub(2 * START_TIME);
            let (figures, share) = cpu::share_during(&processes, start, length, load)?;
            client.close()?;
            Ok(Turn { figures, server_share: Some(share) })
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
                self.touch()?;
                if let Disk::Served(server) = &mut disk {
                    server.start()?;
                }
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

    /// Reads all that the subject has on the medium once, free space of a store too, which is where the
    /// next writes go: a virtual machine's medium may have become slow for what nobody has touched for
    /// some minutes, and the turn of one subject is longer ago than that of another.
    fn touch(&self) -> Result<()> {
        if self.setting.medium == Medium::Ram {
            return Ok(());
        }
        let read = Access::sequential_read(8).fio();
        for entry in std::fs::read_dir(self.directory())? {
            let entry = entry?;
            let found = entry.metadata()?;
            // Others are logs and sockets.
            if found.is_file() && found.len() >= LARGE_BYTES {
                let target = Disk::Bare(entry.path()).target();
                let job = fio::job(&target, found.len(), &read, &self.bench.scratch);
                fio::measure(job, FILL_LIMIT).context("read the files once")?;
            }
        }
        Ok(())
    }

    fn make(&self) -> Result<Disk> {
        let bench = self.bench;
        let directory = self.directory();
        let disk_bytes = self.disk_bytes();
        let options = server::Options {
            disk_bytes,
            // Room for the disk, for what a snapshot keeps of it and for the blocks under way.
            store_bytes: disk_bytes * 4,
            extent_bytes: None,
            preallocate: self.state != State::Fresh,
            cache_bytes: 256 << 20,
            vhost_user: self.setting.frontend == Frontend::VhostUser,
            backing: Vec::new(),
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
                std::fs::File::create(&path)?.set_len(disk_bytes)?;
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
        let job = fio::job(&disk.target(), disk_bytes, fill, &bench.scratch);
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

    fn disk_bytes(&self) -> u64 {
        match self.setting.medium {
            Medium::File => self.bench.scale.disk_bytes,
            Medium::Ram => self.bench.scale.ram_disk_bytes,
        }
    }

    fn directory(&self) -> PathBuf {
        let name = format!("{:?}-{:?}", self.subject, self.state).to_ascii_lowercase();
        match self.setting.medium {
            Medium::File => self.bench.data.join(name),
            Medium::Ram => self.bench.ram.join(name),
        }
    }
}

impl Disk {
    /// Where fio fills and reads it, whichever client is measured.
    fn target(&self) -> Target {
        match self {
            Self::Served(server) => Target::Nbd(server.uri()),
            Self::Bare(path) => Target::File(path.clone()),
        }
    }
}

impl Bench {
    /// As [`Client::run`], with a flush each second, over a connection of its own.
    fn run_flushed(
        &self,
        client: &Client,
        access: &Access,
        disk_bytes: u64,
        socket: &Path,
    ) -> Result<Figures> {
        let mut flusher = nbd::Client::connect(socket, EXPORT)?;
        let flush = || flusher.ask(nbd::Command::Flush, 0, 0).map(drop);
        let load = || client.run(access, disk_bytes, self);
        timed_beside(load, FLUSH_INTERVAL, flush).map(|(figures, _)| figures)
    }
}

/// Runs `load`, with `command` run at every tick meanwhile; also returns how long each took, in
/// milliseconds.
///
/// # Errors
/// If either fails.
pub(crate) fn timed_beside<T: Send>(
    load: impl FnOnce() -> Result<T> + Send,
    interval: Duration,
    mut command: impl FnMut() -> Result<()>,
) -> Result<(T, Vec<f64>)> {
    std::thread::scope(|scope| {
        let load = scope.spawn(load);
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
        let done = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok((done, times))
    })
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

//! How a load reaches a disk: which client, over which frontend.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::fio::{self, Figures, Target};
use crate::process::{Run, Running};
use crate::server::{EXPORT, Kind, Server};

use super::access::Access;
use super::plan::Frontend;
use super::vhost_user;
use super::{Bench, Scale};

/// Longest that a mount may take to show its disk, or to go.
const MOUNT_LIMIT: Duration = Duration::from_secs(20);

/// A client of one disk.
pub(crate) enum Client {
    /// fio.
    Fio(Target),
    /// fio, on the processor that the clients of the row run on.
    PinnedFio(Target),
    /// Ours, on the same processor, over the socket of a device.
    VhostUser(PathBuf),
    /// fio on a file of a mount.
    Mounted(Mount),
}

impl Client {
    /// A client of what `server` serves; it is mounted if need be.
    ///
    /// # Errors
    /// If it cannot be mounted.
    pub(crate) fn of(server: &Server, frontend: Frontend, scratch: &Path) -> Result<Self> {
        Ok(match frontend {
            Frontend::Nbd => Self::nbd(server),
            Frontend::VhostUser => Self::VhostUser(server.vhost_socket()),
            Frontend::Fuse => Self::Mounted(Mount::new(server, scratch)?),
        })
    }

    /// fio on the export of `server`.
    pub(crate) fn nbd(server: &Server) -> Self {
        Self::Fio(Target::Nbd(server.uri()))
    }

    /// A client of a file, to be compared with those of `frontend`.
    pub(crate) fn of_file(path: &Path, frontend: Frontend) -> Self {
        let target = Target::File(path.to_owned());
        match frontend {
            Frontend::Nbd | Frontend::Fuse => Self::Fio(target),
            Frontend::VhostUser => Self::PinnedFio(target),
        }
    }

    /// The process that serves it beside the server, if there is one.
    pub(crate) fn process(&self) -> Option<u32> {
        match self {
            Self::Mounted(mount) => mount.process(),
            _ => None,
        }
    }

    /// Runs a load for the usual time.
    ///
    /// # Errors
    /// If the client fails.
    pub(crate) fn run(&self, access: &Access, disk_bytes: u64, bench: &Bench) -> Result<Figures> {
        let Scale { ramp, runtime, .. } = bench.scale;
        let limit = runtime + ramp + Duration::from_secs(60);
        let job = |target: &Target| {
            let time = format!("--runtime={}s --ramp_time={}s", runtime.as_secs(), ramp.as_secs());
            let options = format!("{} --time_based {time}", access.fio());
            fio::job(target, disk_bytes, &options, &bench.scratch)
        };
        match self {
            Self::Fio(target) => fio::measure(job(target), limit),
            Self::PinnedFio(target) => {
                let processor = format!("--cpus_allowed={}", vhost_user::client_processor());
                fio::measure(job(target).arg(processor), limit)
            }
            Self::VhostUser(socket) => {
                vhost_user::measure(socket, access, disk_bytes, ramp, runtime)
            }
            Self::Mounted(mount) => fio::measure(job(&Target::File(mount.file())), limit),
        }
    }

    /// Gives up the disk.
    ///
    /// # Errors
    /// If it cannot be unmounted.
    pub(crate) fn close(self) -> Result<()> {
        match self {
            Self::Mounted(mount) => mount.close(),
            _ => Ok(()),
        }
    }
}

/// A disk as a file.
pub(crate) struct Mount {
    directory: PathBuf,
    /// nbdfuse; ours serves its mounts itself.
    nbdfuse: Option<Running>,
}

impl Mount {
    fn new(server: &Server, scratch: &Path) -> Result<Self> {
        let directory = scratch.join("mnt");
        std::fs::create_dir_all(&directory)?;
        let nbdfuse = match server.kind() {
            Kind::Parallax(binary) => {
                let run = Run::new(binary).arg("mount").arg(&directory).arg("--socket");
                run.arg(server.control_socket()).read()?;
                None
            }
            Kind::Raw | Kind::Qcow2 => {
                let file = directory.join(format!("{EXPORT}.img"));
                let run = Run::new("nbdfuse").arg(file).arg(server.uri());
                Some(run.background(&scratch.join("nbdfuse.log"))?)
            }
        };
        let mount = Self { directory, nbdfuse };
        let there = clock::wait_until(MOUNT_LIMIT, || mount.file().exists());
        ensure!(there, "{} does not appear", mount.file().display());
        Ok(mount)
    }

    fn file(&self) -> PathBuf {
        self.directory.join(format!("{EXPORT}.img"))
    }

    fn process(&self) -> Option<u32> {
        self.nbdfuse.as_ref().map(Running::id)
    }

    fn close(mut self) -> Result<()> {
        Run::new("umount").arg(&self.directory).read()?;
        if let Some(nbdfuse) = &mut self.nbdfuse {
            nbdfuse.wait(MOUNT_LIMIT).context("nbdfuse goes on")?;
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Whatever has failed before: nothing may hang on it.
        let _ = Run::new("umount").words("-l -q").arg(&self.directory).output();
    }
}

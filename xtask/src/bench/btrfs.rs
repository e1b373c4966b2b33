//! A peer that takes snapshots of files: btrfs, with reflink copies (FICLONE), on a loop device.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::console;
use crate::fio::{self, Figures, Target};
use crate::process::Run;

use super::Bench;
use super::access::Access;
use super::client::Client;
use super::plan::Frontend;
use super::subject::timed_beside;

/// Longest that writing a file once may take.
const FILL_LIMIT: Duration = Duration::from_secs(1800);
/// Size of the device, in disks: room for the disk and for what its copies keep.
const DEVICE_DISKS: u64 = 3;

/// What it showed.
pub(crate) struct Shown {
    /// The load alone.
    pub(crate) quiet: Figures,
    /// The load while copies were made.
    pub(crate) busy: Figures,
    /// Milliseconds that each copy took until it was durable.
    pub(crate) times: Vec<f64>,
}

/// A mounted file system; unmounted when dropped.
pub(super) struct Mounted {
    /// The device, and whether it would not go with the mount.
    device: String,
    stays: bool,
    directory: PathBuf,
}

/// A load on a file, alone and with a copy of it at every tick. `None`, with a message, where this
/// machine cannot mount it.
///
/// # Errors
/// If fio fails, or a copy does.
pub(crate) fn measure(bench: &Bench, access: &Access, interval: Duration) -> Result<Option<Shown>> {
    let Some(mounted) = Mounted::or_message(bench) else { return Ok(None) };
    let path = mounted.directory.join("disk");
    let disk_bytes = bench.scale.disk_bytes;
    write_once(bench, &path, disk_bytes)?;
    let client = Client::of_file(&path, Frontend::Nbd);
    let quiet = client.run(access, disk_bytes, bench)?;
    let mut number = 0;
    let copy = || {
        number += 1;
        copy_file(&path, &mounted.directory.join(format!("copy{number}")))
    };
    let (busy, times) = timed_beside(|| client.run(access, disk_bytes, bench), interval, copy)?;
    Ok(Some(Shown { quiet, busy, times }))
}

/// Writes a file from end to end: as a device it then has all its space, as those of the others have.
pub(super) fn write_once(bench: &Bench, path: &Path, bytes: u64) -> Result<()> {
    let fill = format!("{} --end_fsync=1", Access::sequential_write(8).fio());
    let job = fio::job(&Target::File(path.to_owned()), bytes, &fill, &bench.scratch);
    fio::measure(job, FILL_LIMIT).context("write the file once").map(drop)
}

/// Copies a file by sharing its blocks. Durable on return, as a snapshot of ours is.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from)?;
    let copy = File::create_new(to)?;
    rustix::fs::ioctl_ficlone(&copy, &source).context("share the blocks of a file")?;
    copy.sync_all().context("make a copy durable")
}

impl Mounted {
    /// Where files go.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes that were read of its device so far (Documentation/block/stat.rst).
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub(super) fn device_bytes_read(&self) -> Result<u64> {
        let name = self.device.trim_start_matches("/dev/");
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        let sectors: Option<u64> =
            stat.split_whitespace().nth(2).and_then(|sectors| sectors.parse().ok());
        Ok(sectors.context("read what a device has read")? * 512)
    }

    /// `None`, with a message, where this machine cannot mount one.
    pub(super) fn or_message(bench: &Bench) -> Option<Self> {
        Self::new(bench)
            .inspect_err(|error| console::say(&format!("btrfs is left out: {error:#}")))
            .ok()
    }

    fn new(bench: &Bench) -> Result<Self> {
        let data = bench.data.join("btrfs");
        std::fs::create_dir_all(&data)?;
        let image = data.join("device");
        if image.exists() {
            // Of an earlier round: all its space is there already.
            std::fs::File::open(&image)?.sync_all()?;
        } else {
            write_once(bench, &image, DEVICE_DISKS * bench.scale.disk_bytes)?;
        }
        let directory = bench.scratch.join("btrfs");
        std::fs::create_dir_all(&directory)?;
        let attach = Run::new("losetup").words("--find --show --direct-io=on").arg(&image);
        let device = attach.read()?.trim().to_owned();
        let mut mounted = Self { device: device.clone(), stays: true, directory };
        Run::new("mkfs.btrfs").words("-q -f --nodiscard").arg(&device).read()?;
        // As stores that are made with all their space: none of it is given back.
        let mount = Run::new("mount").words("-t btrfs -o nodiscard");
        mount.arg(&device).arg(&mounted.directory).read()?;
        // It goes by itself with the mount, whatever becomes of us.
        Run::new("losetup").arg("-d").arg(&device).read()?;
        mounted.stays = false;
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It may be that it was not mounted.
        let _ = Run::new("umount").arg(&self.directory).output();
        if self.stays {
            let _ = Run::new("losetup").arg("-d").arg(&self.device).output();
        }
    }
}

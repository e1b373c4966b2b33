//! Disks as files of this machine's kernel (FUSE), and as loop devices with file systems, while the
//! daemon is killed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::fio::{self, Target};
use crate::process::{Run, Running};
use crate::random::Random;
use crate::server::{EXPORT, Server};

use super::Bed;

/// How often the daemon is killed under each load.
const KILLS: u64 = 3;
const FIO_LIMIT: Duration = Duration::from_secs(300);

/// A file system, and what makes and checks it.
struct FileSystem {
    name: &'static str,
    quick: bool,
    make: &'static str,
    check: &'static str,
}

const FILE_SYSTEMS: [FileSystem; 3] = [
    FileSystem { name: "ext4", quick: true, make: "mkfs.ext4 -q -F", check: "e2fsck -fn" },
    FileSystem { name: "xfs", quick: false, make: "mkfs.xfs -q -f", check: "xfs_repair -n" },
    FileSystem {
        name: "btrfs",
        quick: false,
        make: "mkfs.btrfs -q -f",
        check: "btrfs check --force",
    },
];

/// Runs everything on one mount.
///
/// # Errors
/// If the server does not start, or nothing can be mounted.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(binary) = bed.parallax().map(Path::to_owned) else {
        console::say("  the peer's files are no match: they mix up writes that are under way");
        return Ok(());
    };
    let disk_bytes: u64 = if bed.quick { 256 << 20 } else { 1 << 30 };
    let mut story = Story {
        server: bed.server(disk_bytes)?,
        binary,
        dir: bed.scratch.join("mnt"),
        scratch: bed.scratch.clone(),
        disk_bytes,
        random: Random::new(bed.random.next()),
    };
    std::fs::create_dir_all(&story.dir)?;
    let mount = Mount::new(&story)?;
    bed.check("1m direct writes under way together, as a file", || {
        let options = "--rw=write --bs=1m --iodepth=8 --verify=crc32c";
        fio::measure(story.verify(&story.file(), disk_bytes / 4, options), FIO_LIMIT).map(drop)
    });
    bed.check("4k random writes as a file, while the daemon is killed", || {
        let options = "--rw=randwrite --bs=4k --iodepth=32 --verify=crc32c --loops=16";
        let survived = story.survives(|it| it.verify(&it.file(), disk_bytes / 8, options));
        story.server.explain(survived)
    });
    bed.check("the file, the export and a snapshot of both are the same", || story.compare());
    let quick = bed.quick;
    for file_system in FILE_SYSTEMS.iter().filter(|it| it.quick || !quick) {
        for direct in [true, false] {
            let how = if direct { "direct" } else { "cached" };
            bed.check(&format!("{} on a loop device, {how}", file_system.name), || {
                let survived = story.file_system(file_system, direct);
                story.server.explain(survived)
            });
        }
    }
    bed.check("it is unmounted, and nobody keeps it", || mount.end(&story));
    story.server.stop()?;
    Ok(())
}

struct Story {
    server: Server,
    binary: PathBuf,
    dir: PathBuf,
    scratch: PathBuf,
    disk_bytes: u64,
    random: Random,
}

impl Story {
    /// The disk as a file.
    fn file(&self) -> PathBuf {
        self.dir.join(format!("{EXPORT}.img"))
    }

    fn parallax(&self, words: &str) -> Run {
        Run::new(&self.binary).words(words).arg("--socket").arg(self.server.control_socket())
    }

    fn verify(&self, file: &Path, size: u64, options: &str) -> Run {
        let job = fio::job(&Target::File(file.to_owned()), size, options, &self.scratch);
        job.words("--verify_fatal=1 --verify_dump=0 --fallocate=none")
    }

    /// Runs fio, and kills the daemon under it again and again. A kill that came after fio had ended has
    /// tested nothing and is not counted: fio runs once more.
    fn survives(&mut self, fio: impl Fn(&Self) -> Run) -> Result<()> {
        let log = self.scratch.join("fio.log");
        let mut running = fio(self).background(&log)?;
        let mut kills = 0;
        let start = clock::now();
        while kills < KILLS {
            self.pause(1000);
            self.server.kill()?;
            let outlived = running.is_alive();
            self.pause(300);
            self.server.start()?;
            if outlived {
                kills += 1;
            } else {
                end_of_fio(&mut running, &log)?;
                running = fio(self).background(&log)?;
                ensure!(start.elapsed() < FIO_LIMIT, "fio ends before the daemon can be killed");
            }
        }
        end_of_fio(&mut running, &log)
    }

    /// What the file says, the export says; and a snapshot says it in the directory of its hour.
    fn compare(&self) -> Result<()> {
        let handle = Control::connect(&self.server.control_socket())?.snapshot(EXPORT)?;
        let same = |file: &Path, export: &str| {
            let run = Run::new("qemu-img").words("compare -f raw -F raw").arg(file);
            run.arg(self.server.uri_of(export)).read().map(drop)
        };
        same(&self.file(), EXPORT)?;
        let history = self.dir.join(".snapshots").join(EXPORT);
        let only = |dir: &Path| -> Result<PathBuf> {
            let mut entries = std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path()));
            entries
                .next()
                .with_context(|| format!("{} is empty", dir.display()))?
                .map_err(Into::into)
        };
        let number = handle.rsplit('@').next().context("a handle has a number")?;
        same(&history.join(format!("{number}.img")), &handle)?;
        let days = std::fs::read_dir(&history)?.filter_map(|entry| entry.ok());
        let day = days.map(|entry| entry.path()).find(|path| path.is_dir());
        same(&only(&only(&day.context("there is no day")?)?)?, &handle)
    }

    /// A file system on a loop device over the file: fio in it while the daemon is killed, fstrim that
    /// reaches the store, and its own checker at the end.
    fn file_system(&mut self, file_system: &FileSystem, direct: bool) -> Result<()> {
        let device = Loop::new(&self.file(), direct)?;
        let run = |line: &str| {
            let mut words = line.split_whitespace();
            Run::new(words.next().unwrap_or_default()).args(words).arg(&device.device)
        };
        run(file_system.make).read()?;
        let at = self.scratch.join("fs");
        let inner = at.join("data");
        let mounted = Mounted::new(&device, &at)?;
        let options = "--rw=randwrite --bs=4k --iodepth=16 --fsync=64 --verify=crc32c --randseed=7";
        let size = self.disk_bytes / 8;
        self.survives(|it| it.verify(&inner, size, options).words("--loops=4"))?;
        mounted.end()?;
        let mounted = Mounted::new(&device, &at)?;
        let again = format!("{options} --verify_only=1");
        fio::measure(self.verify(&inner, size, &again), FIO_LIMIT)?;
        std::fs::remove_file(&inner)?;
        // Space that was freed is free when the log says so.
        Run::new("sync").arg("-f").arg(&at).read()?;
        let before = self.mapped_bytes()?;
        Run::new("fstrim").arg(&at).read()?;
        let after = self.mapped_bytes()?;
        ensure!(
            after + size / 2 < before || file_system.name == "xfs" && after < before,
            "fstrim left {after} of {before} bytes mapped"
        );
        mounted.end()?;
        run(file_system.check).read()?;
        Ok(())
    }

    fn mapped_bytes(&self) -> Result<u64> {
        let said = self.parallax(&format!("info {EXPORT} --json")).read()?;
        let info: serde_json::Value = serde_json::from_str(&said)?;
        let mapped = info.get("mapped_bytes").or_else(|| info.get("space")?.get("mapped_bytes"));
        mapped.and_then(serde_json::Value::as_u64).with_context(|| format!("no space in {said}"))
    }

    fn pause(&mut self, most_milliseconds: u64) {
        clock::sleep(Duration::from_millis(self.random.below(most_milliseconds)));
    }
}

/// Waits until a fio has ended, and well; its log goes with it.
fn end_of_fio(running: &mut Running, log: &Path) -> Result<()> {
    let mut ended = None;
    clock::wait_until(FIO_LIMIT, || {
        ended = running.ended();
        ended.is_some()
    });
    let said = std::fs::read_to_string(log).unwrap_or_default();
    ensure!(ended.is_some_and(|status| status.success()), "fio, {ended:?}:\n{said}");
    std::fs::remove_file(log)?;
    Ok(())
}

/// The mount of all disks.
struct Mount {
    dir: PathBuf,
}

impl Mount {
    fn new(story: &Story) -> Result<Self> {
        let said = story.parallax("mount").arg(&story.dir).read()?;
        ensure!(said.contains("mounted at"), "mount says: {said}");
        Ok(Self { dir: story.dir.clone() })
    }

    /// Unmounts it; the process that kept it goes too.
    fn end(self, story: &Story) -> Result<()> {
        Run::new(&story.binary).arg("unmount").arg(&self.dir).read()?;
        let gone = clock::wait_until(Duration::from_secs(5), || {
            story.parallax("mounts --json").read().is_ok_and(|said| said.trim() == "[]")
        });
        ensure!(gone, "the daemon still serves the mount");
        ensure!(!story.file().exists(), "it is still mounted");
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Whatever has failed before: nothing may hang on it.
        let _ = Run::new("umount").words("-l -q").arg(&self.dir).output();
    }
}

/// A loop device over a file.
struct Loop {
    device: PathBuf,
}

impl Loop {
    fn new(file: &Path, direct: bool) -> Result<Self> {
        let direct = format!("--direct-io={}", if direct { "on" } else { "off" });
        let run = Run::new("losetup").words("--show -f --sector-size 4096").arg(direct);
        Ok(Self { device: run.arg(file).read()?.trim().into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Run::new("losetup").arg("-d").arg(&self.device).output();
    }
}

/// A file system that is mounted.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    fn new(device: &Loop, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        Run::new("mount").arg(&device.device).arg(at).read()?;
        Ok(Self { at: at.to_owned() })
    }
}

impl Mounted {
    /// Takes it away; what is mounted next has cached nothing of it.
    fn end(self) -> Result<()> {
        Run::new("umount").arg(&self.at).read().map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Run::new("umount").words("-q").arg(&self.at).output();
    }
}

//! A guest with a file system on a disk of ours, while the daemon and the guest are killed.
//!
//! The guest writes files and says on its serial line when fsync has returned for each. After any
//! crash every file that it has said so of must be there with its sum, and the file system's own
//! checker must find nothing. The same holds for a clone of every snapshot that was taken on the
//! way, with the files that were acknowledged before the snapshot was asked for.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::random::Random;
use crate::server::{EXPORT, Server};

use super::Bed;
use super::guest::{COMMON, Disk, Files, Guest, Machine, complete_lines, files, numbered};
use super::initramfs::Initramfs;
use super::kernel::Kernel;

const DISK_BYTES: u64 = 1 << 30;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const CHECK_LIMIT: Duration = Duration::from_secs(300);
/// Guests killed, and daemons killed under each.
const CYCLES: u64 = 3;
const DAEMON_KILLS: u32 = 3;
/// How often the daemon is killed or upgraded under fio, and how long it may be away each time.
const OUTAGES: u64 = 50;
const OUTAGE_LIMIT: Duration = Duration::from_secs(1);

/// What a file system needs in the guest.
struct FileSystem {
    name: &'static str,
    modules: &'static [&'static str],
    programs: &'static [&'static str],
}

const EXT4: FileSystem = FileSystem {
    name: "ext4",
    modules: &["virtio_blk", "virtio_pci", "crc32c_generic", "ext4"],
    programs: &["/sbin/mkfs.ext4", "/sbin/e2fsck"],
};
const XFS: FileSystem = FileSystem {
    name: "xfs",
    modules: &["virtio_blk", "virtio_pci", "crc32c_generic", "xfs"],
    programs: &["/sbin/mkfs.xfs", "/sbin/xfs_repair"],
};
const BTRFS: FileSystem = FileSystem {
    name: "btrfs",
    modules: &["virtio_blk", "virtio_pci", "crc32c_generic", "btrfs"],
    programs: &["/sbin/mkfs.btrfs", "/bin/btrfs"],
};

/// How the guest gets at its disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Nbd,
    VhostUser,
}

pub(crate) fn ext4(bed: &mut Bed) -> Result<()> {
    run(bed, &EXT4, Way::Nbd)
}

pub(crate) fn xfs(bed: &mut Bed) -> Result<()> {
    run(bed, &XFS, Way::Nbd)
}

pub(crate) fn btrfs(bed: &mut Bed) -> Result<()> {
    run(bed, &BTRFS, Way::Nbd)
}

/// The same over vhost-user, and fio on the bare disk. The peer forgets what is in flight: there is
/// nothing to hold it to.
pub(crate) fn vhost_user(bed: &mut Bed) -> Result<()> {
    if bed.parallax().is_none() {
        console::say("  the peer does not survive its own end over vhost-user");
        return Ok(());
    }
    run(bed, &EXT4, Way::VhostUser)
}

/// One file system's story.
struct Story<'a> {
    kernel: &'a Kernel,
    initramfs: &'a Path,
    scratch: &'a Path,
    file_system: &'a FileSystem,
    way: Way,
    server: Server,
    random: Random,
    /// What must be on the disk.
    files: Files,
    /// The highest number that a guest has used.
    last: u64,
    /// Exports of clones of snapshots, and what must be on each.
    clones: Vec<(String, Files)>,
}

fn run(bed: &mut Bed, file_system: &FileSystem, way: Way) -> Result<()> {
    let kernel = Kernel::ensure(&bed.cache)?;
    let initramfs = bed.data.join("initramfs");
    let mut made = Initramfs::new(include_str!("../../assets/files-init.sh"))?;
    for program in file_system.programs {
        made.program(Path::new(program))?;
    }
    if way == Way::VhostUser {
        made.program(Path::new("/usr/bin/fio"))?;
    }
    made.modules(&kernel, file_system.modules)?;
    made.write(&initramfs)?;

    let takes_snapshots = bed.parallax().is_some();
    let scratch = bed.scratch.clone();
    let mut story = Story {
        kernel: &kernel,
        initramfs: &initramfs,
        scratch: &scratch,
        file_system,
        way,
        server: bed.server(DISK_BYTES)?,
        random: Random::new(bed.random.next()),
        files: Files::new(),
        last: 0,
        clones: Vec::new(),
    };
    if way == Way::VhostUser {
        let outages = bed.rounds(DAEMON_KILLS.into(), OUTAGES);
        let name = format!("fio verifies the bare disk, {outages} times the daemon goes");
        bed.check(&name, || {
            let verified = story.fio(outages);
            story.server.explain(verified)
        });
    }
    for cycle in 1..=bed.rounds(CYCLES, CYCLES) {
        let name = file_system.name;
        bed.check(&format!("{name}, cycle {cycle}: writing while the daemon is killed"), || {
            let filled = story.fill(cycle, takes_snapshots);
            story.server.explain(filled)
        });
        bed.check(&format!("{name}, cycle {cycle}: everything is there, fsck is clean"), || {
            let files = story.files.clone();
            let checked = story.check(EXPORT, &files);
            story.server.explain(checked)
        });
        for (export, files) in std::mem::take(&mut story.clones) {
            bed.check(&format!("{name}, cycle {cycle}: snapshot, as {export}"), || {
                let checked = story.check(&export, &files);
                story.server.explain(checked)
            });
        }
    }
    story.server.stop()?;
    Ok(())
}

impl Story<'_> {
    /// A guest runs fio; the daemon is killed under it, or upgraded, again and again.
    fn fio(&mut self, outages: u64) -> Result<()> {
        // As long as the outages can take at most, and some more.
        let seconds = 10 + outages * 2;
        let append = format!("plx.mode=verify plx.new=0 plx.from=0 plx.runtime={seconds}");
        let mut guest = self.machine(&append, EXPORT)?.start()?;
        guest.wait_for("starting fio", BOOT_LIMIT, |line| line == "FIO-START")?;
        let (mut upgrades, mut longest) = (0, Duration::ZERO);
        for outage in 1..=outages {
            self.pause(1000);
            let took = if self.random.below(2) == 0 {
                upgrades += 1;
                self.server.upgrade()?
            } else {
                self.server.kill()?;
                self.server.start()?
            };
            ensure!(took < OUTAGE_LIMIT, "outage {outage} took {took:?}");
            longest = longest.max(took);
        }
        let said = end_of_fio(guest, "outage", CHECK_LIMIT)?;
        let waits = complete_lines(&said).filter_map(|line| line.strip_prefix("LONGEST "));
        console::say(&format!(
            "  {upgrades} upgrades and {} kills, the longest took {longest:.1?}; the guest's longest \
             waits: {}",
            outages - upgrades,
            waits.collect::<Vec<_>>().join(", ")
        ));
        Ok(())
    }

    /// A guest writes; daemon and guest are killed.
    fn fill(&mut self, cycle: u64, takes_snapshots: bool) -> Result<()> {
        let new = u32::from(cycle == 1);
        let append = format!("plx.mode=fill plx.new={new} plx.from={}", self.last);
        let mut guest = self.machine(&append, EXPORT)?.start()?;
        self.wait_for_files(&mut guest, 10)?;
        for kill in 1..=DAEMON_KILLS {
            self.pause(2000);
            if takes_snapshots {
                self.snapshot(&guest, &format!("c{cycle}k{kill}"))?;
                self.pause(1000);
            }
            self.server.kill()?;
            self.pause(500);
            self.server.start()?;
            // The guest noticed nothing: it goes on.
            self.wait_for_files(&mut guest, 5)?;
        }
        self.pause(1500);
        // Every second time both go at once.
        let both = cycle.is_multiple_of(2);
        if both {
            self.server.kill()?;
        }
        let said = guest.kill()?;
        if both {
            self.server.start()?;
        }
        read_fill(&said, &mut self.files, &mut self.last)?;
        console::say(&format!("  {} files acknowledged and kept", self.files.len()));
        Ok(())
    }

    /// Takes a snapshot and clones it; what was acknowledged before must be on the clone.
    fn snapshot(&mut self, guest: &Guest, name: &str) -> Result<()> {
        let mut files = self.files.clone();
        read_fill(&guest.said(), &mut files, &mut 0)?;
        let mut control = Control::connect(&self.server.control_socket())?;
        let handle = control.snapshot(EXPORT)?;
        // Read again: a file whose removal was announced meanwhile may be gone in the snapshot.
        let mut later = self.files.clone();
        read_fill(&guest.said(), &mut later, &mut 0)?;
        files.retain(|number, _| later.contains_key(number));
        control.clone_vdi(&handle, name)?;
        self.clones.push((name.to_owned(), files));
        Ok(())
    }

    /// A guest mounts the disk and lists what is on it; then the file system is checked.
    fn check(&self, export: &str, wanted: &Files) -> Result<()> {
        ensure!(!wanted.is_empty(), "nothing to look for: the guest acknowledged nothing");
        let mut guest = self.machine("plx.mode=check plx.new=0 plx.from=0", export)?.start()?;
        guest.wait_for("finishing its check", CHECK_LIMIT, |line| line == "END")?;
        let said = guest.wait(BOOT_LIMIT)?;
        let found = files(&said, "GOT ");
        for (number, sum) in wanted {
            let there = found.get(number);
            ensure!(there.is_some(), "file {number} was acknowledged and is lost");
            ensure!(there == Some(sum), "file {number} holds something else: {there:?}");
        }
        ensure!(complete_lines(&said).any(|line| line == "FSCK 0"), "fsck complains:\n{said}");
        Ok(())
    }

    fn machine(&self, append: &str, export: &str) -> Result<Machine<'_>> {
        Ok(Machine {
            kernel: self.kernel,
            initramfs: self.initramfs,
            append: format!("{append} plx.fs={}", self.file_system.name),
            disks: vec![self.disk(export)?],
            size: COMMON,
            serial: self.scratch.join("serial.log"),
            incoming: None,
        })
    }

    fn disk(&self, export: &str) -> Result<Disk> {
        if self.way == Way::Nbd {
            return Ok(Disk::Nbd(self.server.nbd_socket(), export.to_owned()));
        }
        let socket = self.scratch.join(format!("{export}.vhost"));
        // A daemon that was started again attaches by itself what was attached.
        if !socket.exists() {
            Control::connect(&self.server.control_socket())?.attach(export, &socket)?;
        }
        Ok(Disk::VhostUser(socket))
    }

    /// Waits until the guest has written so many more files.
    fn wait_for_files(&self, guest: &mut Guest, more: u64) -> Result<()> {
        let count = |said: &str| complete_lines(said).filter(|l| l.starts_with("ACKED ")).count();
        let wanted = count(&guest.said()) + usize::try_from(more)?;
        let start = clock::now();
        while count(&guest.said()) < wanted {
            let said = guest.said();
            let broken = complete_lines(&said).find(|line| {
                line.starts_with("IOERROR") || line.contains("failed") || *line == "END"
            });
            ensure!(broken.is_none(), "the guest says: {}", broken.unwrap_or_default());
            ensure!(start.elapsed() < BOOT_LIMIT, "the guest stopped writing:\n{said}");
            clock::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn pause(&mut self, most_milliseconds: u64) {
        clock::sleep(Duration::from_millis(self.random.below(most_milliseconds)));
    }
}

/// Waits until the fio of a verifying guest, which must still run after the last of what was done to
/// it, has ended well; returns all that the guest said.
pub(super) fn end_of_fio(mut guest: Guest, last: &str, limit: Duration) -> Result<String> {
    let early = complete_lines(&guest.said()).any(|line| line.starts_with("FIO "));
    ensure!(!early, "fio was done before the last {last}");
    guest.wait_for("finishing fio", limit, |line| line == "END")?;
    let said = guest.wait(BOOT_LIMIT)?;
    ensure!(complete_lines(&said).any(|line| line == "FIO 0"), "fio complains:\n{said}");
    Ok(said)
}

/// Adds what a filling guest said to what must be there.
fn read_fill(said: &str, files: &mut Files, last: &mut u64) -> Result<()> {
    for line in complete_lines(said) {
        ensure!(!line.starts_with("IOERROR"), "the guest saw an I/O error: {line}");
        if let Some((number, sum)) = numbered(line, "ACKED ") {
            files.insert(number, sum);
            *last = (*last).max(number);
        } else if let Some(number) = line.strip_prefix("DEL ") {
            files.remove(&number.parse().context("number of a removed file")?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_what_must_be_there() {
        let mut files = Files::new();
        let mut last = 0;
        let said = "BOOTED\nACKED 1 aa\nACKED 2 bb\nDEL 1\nACKED 3 c";
        read_fill(said, &mut files, &mut last).unwrap();
        assert_eq!(files, Files::from([(2, "bb".to_owned())]), "the last line is cut off");
        assert_eq!(last, 2);
        assert!(read_fill("IOERROR 4 no space\n", &mut files, &mut last).is_err());
    }
}

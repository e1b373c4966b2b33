//! A guest on a clone of a golden image, forked while it runs into twenty running guests.
//!
//! A Debian system is imported and cloned; a guest boots from the clone over vhost-user and writes
//! records, each fsynced before it says so. While it writes, a snapshot is taken and cloned again and
//! again, and a guest boots from each of these forks. All run at the same time, over sockets of their
//! own, and write records of their own, while the daemon is killed. Every fork must have
//! - the programs of the golden image, by their sums,
//! - every record that was acknowledged before the snapshot's command began, and none that was begun
//!   after it had ended,
//! - its own records and nothing of anybody else, read anew at the end, on a clean file system,
//!
//! and no guest may see an I/O error. The snapshot and the golden image are afterwards what they were.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::process::Run;
use crate::random::Random;
use crate::server::{Options, Server};

use super::debian::{Debian, ROOT_BYTES};
use super::guest::{Disk, Files, Guest, Machine, Size, complete_lines, files};
use super::{Bed, Step};

const FORKS: usize = 20;
const QUICK_FORKS: usize = 3;
/// Guests that boot side by side: emulation takes a core each, and the others want some of it.
const TOGETHER: usize = 3;
/// How often the daemon is killed under all of the guests; it is killed once in each batch that boots, too.
const KILLS: u64 = 5;
/// All of them fit a machine with 16 GiB.
const SIZE: Size = Size { processors: 1, memory_mib: 192 };
/// What twenty of them on two emulated cores do without: looking at every device of the machine, and writing
/// as fast as they can.
const LIGHTLY: &str = "systemd.mask=systemd-udev-trigger.service plx.pause=3";
/// Room for what all of them write.
const STORE_BYTES: u64 = 16 << 30;
/// What a disk grows by to tell its guest that the story is over.
const GROWTH_BYTES: u64 = 1 << 20;
/// Records that the guest has written when it is forked.
const RECORDS: usize = 20;
/// Longest that a guest may take to boot, or to come to its end, with all the others at it.
const BOOT_LIMIT: Duration = Duration::from_secs(900);
/// Longest that one may take for some records.
const RECORDS_LIMIT: Duration = Duration::from_secs(180);

/// The disk that is forked.
const PARENT: &str = "web01";
/// Where its guest writes.
const PARENT_RECORDS: &str = "/records";

const STEPS: [Step<Story>; 8] = [
    ("Debian is imported and cloned", Story::import),
    ("a guest boots from the clone and writes", Story::boot_parent),
    ("it is snapshotted and forked while it writes", Story::fork),
    ("a guest boots from every fork, while the daemon is killed", Story::boot_forks),
    ("all write at the same time, while the daemon is killed", Story::kill),
    ("every guest has what it must have and nothing else", Story::end_guests),
    ("every file system is clean", Story::check_disks),
    ("the snapshot and the golden image are what they were", Story::compare),
];

/// Runs the scenario. The peer can neither snapshot nor fork.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(binary) = bed.parallax().map(Path::to_owned) else {
        console::say("  the peer does not fork what runs");
        return Ok(());
    };
    let debian = Debian::ensure(&bed.cache)?;
    let initramfs = bed.data.join("initramfs");
    debian.initramfs(include_str!("../../assets/fork-story.sh"), &initramfs)?;
    let store = Options { store_bytes: STORE_BYTES, ..Options::disk(ROOT_BYTES) };
    let mut story = Story {
        binary,
        debian,
        initramfs,
        data: bed.data.clone(),
        scratch: bed.scratch.clone(),
        server: bed.server_with(&store)?,
        random: Random::new(bed.random.next()),
        fork_count: if bed.quick { QUICK_FORKS } else { FORKS },
        kills: bed.rounds(KILLS, KILLS),
        snapshot: Snapshot::default(),
        parent: None,
        forks: Vec::new(),
    };
    bed.tell(&mut story, &STEPS, |story| &mut story.server);
    story.server.stop()?;
    Ok(())
}

struct Story {
    binary: PathBuf,
    debian: Debian,
    initramfs: PathBuf,
    data: PathBuf,
    scratch: PathBuf,
    server: Server,
    random: Random,
    fork_count: usize,
    kills: u64,
    snapshot: Snapshot,
    parent: Option<Running>,
    forks: Vec<Running>,
}

/// The snapshot that is forked.
#[derive(Default)]
struct Snapshot {
    handle: String,
    /// What must be in it.
    acknowledged: Files,
    /// Records from this one on must not be: they were begun when it was there.
    begun_after: u64,
    /// The sum of all of it.
    sum: String,
}

/// A guest, and the disk that it runs from.
struct Running {
    disk: String,
    /// Where it writes.
    records: String,
    guest: Guest,
    started: Instant,
}

impl Story {
    fn import(&mut self) -> Result<()> {
        self.parallax("import").arg(&self.debian.root).arg("golden").read()?;
        self.control()?.clone_vdi("golden", PARENT)
    }

    fn boot_parent(&mut self) -> Result<()> {
        let mut parent = self.start(PARENT, PARENT_RECORDS, "plx.pause=0.5")?;
        wait_until_up(&mut parent)?;
        console::say(&format!("  booted in {:.1?}", parent.started.elapsed()));
        let parent = self.parent.insert(parent);
        wait_for_records(parent, RECORDS)
    }

    fn fork(&mut self) -> Result<()> {
        let mut control = self.control()?;
        let parent = self.parent.as_ref().context("there is no guest")?;
        let acknowledged = parent.acknowledged();
        let start = clock::now();
        let handle = control.snapshot(PARENT)?;
        let took = start.elapsed();
        // The one after the last of these may be under way, and the next is not begun.
        let last = parent.acknowledged().last_key_value().map_or(0, |(number, _)| *number);
        let mut times = Vec::new();
        for number in 1..=self.fork_count {
            let start = clock::now();
            control.clone_vdi(&handle, &fork_name(number))?;
            times.push(start.elapsed());
        }
        times.sort();
        console::say(&format!(
            "  {} records acknowledged; snapshot in {took:.1?}, {} forks: p50 {:.1?}, p99 {:.1?}",
            acknowledged.len(),
            times.len(),
            percentile(&times, 50),
            percentile(&times, 99)
        ));
        let sum = self.sum(&handle)?;
        self.snapshot = Snapshot { handle, acknowledged, begun_after: last + 2, sum };
        Ok(())
    }

    fn boot_forks(&mut self) -> Result<()> {
        let mut times = Vec::new();
        let numbers: Vec<usize> = (1..=self.fork_count).collect();
        for together in numbers.chunks(TOGETHER) {
            let mut batch = Vec::new();
            for &number in together {
                batch.push(self.start(&fork_name(number), &format!("/own-{number}"), LIGHTLY)?);
            }
            self.kill_once(10_000)?;
            for mut fork in batch {
                wait_until_up(&mut fork)?;
                times.push(fork.started.elapsed());
                self.forks.push(fork);
            }
        }
        times.sort();
        console::say(&format!(
            "  booted, {TOGETHER} at a time, and all sums checked: p50 {:.1?}, p99 {:.1?}",
            percentile(&times, 50),
            percentile(&times, 99)
        ));
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        let mut longest = Duration::ZERO;
        for _ in 0..self.kills {
            longest = longest.max(self.kill_once(2000)?);
            // Each of them noticed nothing: it goes on.
            let mut running: Vec<_> = self.parent.iter_mut().chain(&mut self.forks).collect();
            let written: Vec<_> = running.iter().map(|it| it.acknowledged().len()).collect();
            for (running, written) in running.iter_mut().zip(written) {
                wait_for_records(running, written + 2)?;
            }
        }
        let alive = self.forks.iter_mut().filter_map(|fork| fork.guest.is_alive().then_some(()));
        ensure!(alive.count() == self.fork_count, "not all forks are running");
        console::say(&format!(
            "  {} guests run; the daemon was killed {} times, and away for {longest:.1?} at most",
            self.forks.len() + 1,
            self.kills
        ));
        Ok(())
    }

    fn end_guests(&mut self) -> Result<()> {
        let mut control = self.control()?;
        let running: Vec<Running> =
            self.parent.take().into_iter().chain(self.forks.drain(..)).collect();
        for running in &running {
            control.resize(&running.disk, ROOT_BYTES + GROWTH_BYTES)?;
        }
        for mut running in running {
            running.guest.wait_for("finishing", BOOT_LIMIT, |line| line == "END")?;
            let said = running.guest.wait(BOOT_LIMIT)?;
            self.judge(&running.disk, &running.records, &said)
                .with_context(|| format!("the guest of {}", running.disk))?;
        }
        Ok(())
    }

    /// Compares what a guest has said to the end with what it must have said.
    fn judge(&self, disk: &str, own: &str, said: &str) -> Result<()> {
        no_complaints(said)?;
        ensure!(complete_lines(said).any(|line| line == "GOLDEN"), "the golden files differ");
        contains(&files(said, "GOT "), &files(said, "ACKED "))?;
        let marks: Vec<&str> =
            complete_lines(said).filter_map(|line| line.strip_prefix("MARK ")).collect();
        if disk == PARENT {
            ensure!(marks == [PARENT_RECORDS], "there are {marks:?}");
            return Ok(());
        }
        ensure!(marks == [PARENT_RECORDS, own], "there are {marks:?}");
        let inherited = files(said, "HAS ");
        contains(&inherited, &self.snapshot.acknowledged)?;
        let later = inherited.range(self.snapshot.begun_after..).next();
        ensure!(later.is_none(), "{later:?} was begun when the snapshot was there");
        ensure!(files(said, "KEPT ") == inherited, "the records of the snapshot have changed");
        Ok(())
    }

    fn check_disks(&mut self) -> Result<()> {
        for disk in (1..=self.fork_count).map(fork_name).chain([PARENT.to_owned()]) {
            let copy = self.data.join("copy.raw");
            self.parallax("export").arg(&disk).arg(&copy).read()?;
            Run::new("/sbin/e2fsck").arg("-fn").arg(&copy).read().context(disk)?;
            std::fs::remove_file(&copy)?;
        }
        Ok(())
    }

    fn compare(&mut self) -> Result<()> {
        let sum = self.sum(&self.snapshot.handle)?;
        ensure!(sum == self.snapshot.sum, "the snapshot has changed");
        let golden = self.server.uri_of("golden");
        let run = Run::new("qemu-img").words("compare -f raw -F raw").arg(&self.debian.root);
        run.arg(golden).read().map(drop)
    }

    fn start(&self, disk: &str, records: &str, append: &str) -> Result<Running> {
        let socket = self.scratch.join(format!("{disk}.vhost"));
        self.control()?.attach(disk, &socket)?;
        let machine = Machine {
            kernel: &self.debian.kernel,
            initramfs: &self.initramfs,
            append: format!("systemd.show_status=0 plx.own={records} {append}"),
            disks: vec![Disk::VhostUser(socket)],
            size: SIZE,
            serial: self.scratch.join(format!("{disk}.log")),
            incoming: None,
        };
        let started = clock::now();
        Ok(Running {
            disk: disk.to_owned(),
            records: records.to_owned(),
            guest: machine.start()?,
            started,
        })
    }

    /// Kills the daemon within some milliseconds and starts it again; returns how long it was away.
    fn kill_once(&mut self, most_milliseconds: u64) -> Result<Duration> {
        clock::sleep(Duration::from_millis(self.random.below(most_milliseconds)));
        self.server.kill()?;
        self.server.start()
    }

    /// The sum of all of an export.
    fn sum(&self, export: &str) -> Result<String> {
        let copy = format!("nbdcopy '{}' - | md5sum", self.server.uri_of(export));
        Run::new("sh").arg("-c").arg(copy).read()
    }

    fn control(&self) -> Result<Control> {
        Control::connect(&self.server.control_socket())
    }

    fn parallax(&self, command: &str) -> Run {
        Run::new(&self.binary).arg("--socket").arg(self.server.control_socket()).arg(command)
    }
}

impl Running {
    /// The records that it has acknowledged.
    fn acknowledged(&self) -> Files {
        files(&self.guest.said(), "ACKED ")
    }
}

fn fork_name(number: usize) -> String {
    format!("fork{number:02}")
}

fn wait_until_up(running: &mut Running) -> Result<()> {
    running.guest.wait_for("reaching its multi-user state", BOOT_LIMIT, |line| line == "UP")?;
    no_complaints(&running.guest.said()).with_context(|| format!("the guest of {}", running.disk))
}

/// Waits until a guest has written so many records.
fn wait_for_records(running: &mut Running, wanted: usize) -> Result<()> {
    let written = clock::wait_until(RECORDS_LIMIT, || {
        clock::sleep(Duration::from_millis(20));
        running.acknowledged().len() >= wanted || !running.guest.is_alive()
    });
    no_complaints(&running.guest.said())
        .with_context(|| format!("the guest of {}", running.disk))?;
    ensure!(written && running.guest.is_alive(), "the guest of {} stopped writing", running.disk);
    Ok(())
}

/// Whether everything that must be there is there, with its sum.
fn contains(found: &Files, wanted: &Files) -> Result<()> {
    ensure!(!wanted.is_empty(), "nothing to look for: the guest acknowledged nothing");
    for (number, sum) in wanted {
        let there = found.get(number);
        ensure!(there.is_some(), "record {number} was acknowledged and is lost");
        ensure!(there == Some(sum), "record {number} holds something else: {there:?}");
    }
    Ok(())
}

/// Looks for errors of the guest's own and of its kernel.
fn no_complaints(said: &str) -> Result<()> {
    const ERRORS: [&str; 4] = ["IOERROR", "I/O error", "Input/output error", "EXT4-fs error"];
    let error = complete_lines(said).find(|line| ERRORS.iter().any(|error| line.contains(error)));
    ensure!(error.is_none(), "the guest says: {}", error.unwrap_or_default());
    Ok(())
}

/// The nearest-rank percentile of sorted times.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(numbers: &[u64]) -> Files {
        numbers.iter().map(|number| (*number, format!("sum {number}"))).collect()
    }

    #[test]
    fn what_was_acknowledged_must_be_there() {
        let found = numbers(&[1, 2, 3]);
        assert!(contains(&found, &numbers(&[1, 3])).is_ok());
        assert!(contains(&found, &numbers(&[4])).is_err());
        assert!(contains(&found, &Files::from([(2, "other".to_owned())])).is_err());
        assert!(contains(&found, &Files::new()).is_err(), "nothing was tested");
    }

    #[test]
    fn errors_of_a_guest_are_seen() {
        assert!(no_complaints("BOOTED\nACKED 1 a\n").is_ok());
        assert!(no_complaints("BOOTED\nI/O error, dev vda, sector 8\n").is_err());
        assert!(no_complaints("IOERROR 3 cannot write\n").is_err());
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<Duration> = (1..=20).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(10));
        assert_eq!(percentile(&times, 99), Duration::from_millis(20));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}

//! Disks as block devices (ublk), which this machine's kernel may lack: a guest's has them, so the daemon
//! runs in the guest, and so does the whole story (assets/ublk-init.sh).

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::console;
use crate::process::Run;

use super::Bed;
use super::guest::{COMMON, Disk, Guest, Machine, complete_lines};
use super::guides;
use super::initramfs::Initramfs;
use super::kernel::Kernel;

/// The device that the store is on.
const STORE_BYTES: u64 = 8 << 30;
/// How often the daemon is killed or upgraded under each load.
const OUTAGES: u64 = 8;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const CHECK_LIMIT: Duration = Duration::from_secs(600);

/// What the guest's kernel says when it has freed one of its own requests twice: Linux 6.12 does so now and
/// then with io_uring's requests for ublk. No program can do this to it, and nothing that comes after counts.
const FREED_TWICE: [&str; 2] = ["at mm/slub.c:", "io_req_caches_free+"];
/// How many guests may die of that.
const GUESTS_MAX: usize = 4;

/// What the guest does, in this order.
const CHECKS: [&str; 13] = [
    "kernel_without_ublk",
    "suite_of_all_frontends",
    "the_guide_word_for_word",
    "what_the_device_is_like",
    "fio_on_the_bare_device",
    "ext4_while_the_daemon_is_killed",
    "fstrim_reaches_the_store",
    "a_snapshot_can_only_be_read",
    "detaching",
    "rolled_back_under_its_user",
    "a_device_that_was_lost_is_made_anew",
    "killed_while_attaching",
    "the_kernel_complains_of_nothing",
];

/// Runs everything in one guest.
///
/// # Errors
/// If the guest cannot be made or does not start.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(binary) = bed.parallax().map(Path::to_owned) else {
        console::say("  the peer makes no block devices");
        return Ok(());
    };
    let kernel = Kernel::ensure(&bed.cache)?;
    let initramfs = initramfs(bed, &kernel, &binary)?;
    let mut outcomes = Vec::new();
    for _ in 0..GUESTS_MAX {
        outcomes = in_a_guest(bed, &kernel, &initramfs)?;
        let freed_twice = |outcome: &Result<()>| {
            outcome.as_ref().is_err_and(|error| tells_of_a_double_free(&format!("{error:#}")))
        };
        if !outcomes.iter().any(freed_twice) {
            break;
        }
        console::say(
            "  the guest's kernel freed memory of its own twice: once more, in a new guest",
        );
    }
    let mut outcomes = outcomes.into_iter();
    for name in CHECKS {
        let lost = || bail!("not tried: the guest was lost before");
        let outcome = outcomes.next().unwrap_or_else(lost);
        bed.check(&name.replace('_', " "), || outcome);
    }
    Ok(())
}

/// What comes of each check, in a guest of its own.
fn in_a_guest(bed: &mut Bed, kernel: &Kernel, initramfs: &Path) -> Result<Vec<Result<()>>> {
    let store = bed.data.join("store.raw");
    std::fs::File::create(&store)?.set_len(STORE_BYTES)?;
    let outages = bed.rounds(OUTAGES, OUTAGES);
    let machine = Machine {
        kernel,
        initramfs,
        append: format!("plx.seed={} plx.outages={outages}", bed.random.below(1 << 31)),
        disks: vec![Disk::File(store)],
        size: COMMON,
        serial: bed.scratch.join("serial.log"),
        incoming: None,
    };
    let mut guest = machine.start()?;
    guest.wait_for("booting", BOOT_LIMIT, |line| line == "BOOTED")?;
    let mut outcomes = Vec::new();
    for name in CHECKS {
        let outcome = outcome(&mut guest, name);
        let is_lost = outcome.is_err();
        outcomes.push(outcome.and_then(|said| passed(&said, name)));
        if is_lost {
            return Ok(outcomes);
        }
    }
    guest.wait(BOOT_LIMIT)?;
    Ok(outcomes)
}

/// The guest's first file system: the daemon, and what it is tried with.
fn initramfs(bed: &Bed, kernel: &Kernel, binary: &Path) -> Result<PathBuf> {
    let path = bed.data.join("initramfs");
    let mut made = Initramfs::new(include_str!("../../assets/ublk-init.sh"))?;
    let suite = bed.example("parallax-ublk", "conformance")?;
    for (program, inside) in [(binary, "/bin/parallax"), (&suite, "/bin/ublk-conformance")] {
        // Without what debuggers want it needs a third of the memory.
        let stripped = bed.data.join(inside.trim_start_matches("/bin/"));
        Run::new("strip").arg("-o").arg(&stripped).arg(program).read()?;
        made.program_as(&stripped, Path::new(inside))?;
    }
    for program in ["/usr/bin/fio", "/sbin/mkfs.ext4", "/sbin/e2fsck", "/sbin/nbd-client"] {
        made.program(Path::new(program))?;
    }
    let guide: String = guides::of_block_devices()?.into_iter().map(|block| block.text).collect();
    made.file(Path::new("/guide.sh"), guide.as_bytes())?;
    let modules = ["virtio_blk", "virtio_pci", "crc32c_generic", "ext4", "ublk_drv", "nbd"];
    made.modules(kernel, &modules)?;
    made.write(&path)?;
    Ok(path)
}

/// Waits for the outcome of a check; what the guest has said until then.
///
/// # Errors
/// If there is none: nothing more is to be expected of this guest.
fn outcome(guest: &mut Guest, name: &str) -> Result<String> {
    let (pass, why) = (format!("PASS {name}"), format!("WHY {name}"));
    let is_over = |line: &str| line == pass || line == why || tells_of_a_double_free(line);
    guest.wait_for(name, CHECK_LIMIT, is_over)?;
    let said = guest.said();
    if let Some(line) = complete_lines(&said).find(|line| tells_of_a_double_free(line)) {
        bail!("{line}");
    }
    Ok(said)
}

fn tells_of_a_double_free(text: &str) -> bool {
    FREED_TWICE.iter().any(|sign| text.contains(sign))
}

/// Whether a check has passed, and what the guest notes about it.
fn passed(said: &str, name: &str) -> Result<()> {
    let (pass, fail) = (format!("PASS {name}"), format!("FAIL {name}"));
    if complete_lines(said).any(|line| line == pass) {
        let before = complete_lines(said).take_while(|line| *line != pass);
        let notes = before.collect::<Vec<_>>().into_iter().rev();
        for note in notes.map_while(|line| line.strip_prefix("NOTE ")) {
            console::say(&format!("  {note}"));
        }
        return Ok(());
    }
    let mut lines = complete_lines(said).skip_while(|line| *line != fail);
    lines.next().context("there is no outcome")?;
    let end = format!("WHY {name}");
    bail!("{}", lines.take_while(|line| *line != end).collect::<Vec<_>>().join("\n"))
}

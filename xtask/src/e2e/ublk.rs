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
    let store = bed.data.join("store.raw");
    std::fs::File::create(&store)?.set_len(STORE_BYTES)?;
    let outages = bed.rounds(OUTAGES, OUTAGES);
    let machine = Machine {
        kernel: &kernel,
        initramfs: &initramfs,
        append: format!("plx.seed={} plx.outages={outages}", bed.random.below(1 << 31)),
        disks: vec![Disk::File(store)],
        size: COMMON,
        serial: bed.scratch.join("serial.log"),
        incoming: None,
    };
    let mut guest = machine.start()?;
    guest.wait_for("booting", BOOT_LIMIT, |line| line == "BOOTED")?;
    for name in CHECKS {
        bed.check(&name.replace('_', " "), || passed(&mut guest, name));
    }
    guest.wait(BOOT_LIMIT)?;
    Ok(())
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

/// Waits for the outcome of a check, and says what the guest notes about it.
fn passed(guest: &mut Guest, name: &str) -> Result<()> {
    let (pass, fail) = (format!("PASS {name}"), format!("FAIL {name}"));
    let why = format!("WHY {name}");
    guest.wait_for(name, CHECK_LIMIT, |line| line == pass || line == why)?;
    let said = guest.said();
    if complete_lines(&said).any(|line| line == pass) {
        let before = complete_lines(&said).take_while(|line| *line != pass);
        let notes = before.collect::<Vec<_>>().into_iter().rev();
        for note in notes.map_while(|line| line.strip_prefix("NOTE ")) {
            console::say(&format!("  {note}"));
        }
        return Ok(());
    }
    let mut lines = complete_lines(&said).skip_while(|line| *line != fail);
    lines.next().context("there is no outcome")?;
    bail!("{}", lines.take_while(|line| *line != why).collect::<Vec<_>>().join("\n"))
}

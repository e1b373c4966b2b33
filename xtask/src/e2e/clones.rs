//! A Debian system imported once, cloned ten times and booted from every clone.
//!
//! Each clone leaves a mark on its own disk. Afterwards every clone must have its mark and no
//! other, and the disk that they were cloned from must still be what was imported.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::console;
use crate::control::Control;
use crate::packages;
use crate::process::Run;
use crate::server::{EXPORT, Server};

use super::Bed;
use super::guest::{Disk, Guest, Machine};
use super::initramfs::Initramfs;
use super::kernel::Kernel;

const CLONES: usize = 10;
/// Guests that run side by side: emulation takes a core each.
const TOGETHER: usize = 2;
const ROOT_BYTES: u64 = 1 << 30;
/// systemd needs some twenty seconds when it is emulated.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// Runs the scenario. The peer cannot clone: against it, its one disk is booted.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let kernel = Kernel::ensure(&bed.cache)?;
    let root = root_file_system(&bed.cache).context("make a Debian root file system")?;
    let initramfs = bed.data.join("initramfs");
    let mut made = Initramfs::new(include_str!("../../assets/clone-init.sh"))?;
    made.modules(&kernel, &["virtio_blk", "virtio_pci", "crc32c_generic", "ext4"])?;
    made.write(&initramfs)?;

    let mut server = bed.server(ROOT_BYTES)?;
    let scratch = bed.scratch.clone();
    let data = bed.data.clone();
    let boot = |server: &Server, export: &str, number: usize| {
        let machine = Machine {
            kernel: &kernel,
            initramfs: &initramfs,
            append: format!("plx.clone={number}"),
            disks: vec![Disk::Nbd(server.nbd_socket(), export.to_owned())],
            serial: scratch.join(format!("clone{number}.log")),
            incoming: None,
        };
        machine.start()
    };
    let Some(binary) = bed.parallax().map(ToOwned::to_owned) else {
        bed.check("copy Debian in and boot it", || {
            Run::new("nbdcopy").arg(&root).arg(server.uri()).read()?;
            wait_until_up(boot(&server, EXPORT, 1)?, 1)
        });
        server.stop()?;
        return Ok(());
    };

    bed.check("import Debian", || {
        parallax(&binary, &server, "import").arg(&root).arg("golden").read().map(drop)
    });
    bed.check("clone it ten times", || {
        let mut control = Control::connect(&server.control_socket())?;
        let snapshot = control.snapshot("golden")?;
        for number in 1..=CLONES {
            control.clone_vdi(&snapshot, &format!("clone{number}"))?;
        }
        Ok(())
    });
    let numbers: Vec<usize> = (1..=CLONES).collect();
    for together in numbers.chunks(TOGETHER) {
        let guests: Vec<(usize, Result<Guest>)> = together
            .iter()
            .map(|&number| (number, boot(&server, &format!("clone{number}"), number)))
            .collect();
        for (number, guest) in guests {
            bed.check(&format!("clone {number} boots"), || wait_until_up(guest?, number));
        }
    }
    bed.check("every clone has its own mark and no other", || {
        for number in 1..=CLONES {
            let copy = data.join(format!("clone{number}.raw"));
            let export = parallax(&binary, &server, "export").arg(format!("clone{number}"));
            export.arg(&copy).read()?;
            check_marks(&copy, number)?;
            std::fs::remove_file(&copy)?;
        }
        Ok(())
    });
    bed.check("the disk that was cloned is what was imported", || {
        let uri = server.uri_of("golden");
        Run::new("qemu-img").words("compare -f raw -F raw").arg(&root).arg(uri).read().map(drop)
    });
    server.stop()?;
    Ok(())
}

fn parallax(binary: &Path, server: &Server, command: &str) -> Run {
    Run::new(binary).arg("--socket").arg(server.control_socket()).arg(command)
}

fn wait_until_up(mut guest: Guest, number: usize) -> Result<()> {
    let line = format!("CLONE-UP {number}");
    guest.wait_for("reaching its multi-user state", BOOT_LIMIT, |said| said.ends_with(&line))?;
    guest.wait(BOOT_LIMIT).map(drop)
}

/// Looks at the root directory of an ext4 file system without mounting it.
fn check_marks(image: &Path, number: usize) -> Result<()> {
    let listed = Run::new("/sbin/debugfs").words("-R ls").arg(image).read()?;
    let marks: Vec<&str> =
        listed.split_whitespace().filter(|word| word.starts_with("clone-mark-")).collect();
    ensure!(marks == [format!("clone-mark-{number}")], "clone {number} has the marks {marks:?}");
    Ok(())
}

/// A minimal Debian with systemd in an ext4 file system; made once.
fn root_file_system(cache: &Path) -> Result<PathBuf> {
    let path = cache.join("debian.raw");
    if path.exists() {
        return Ok(path);
    }
    console::say("building a Debian root file system");
    let directory = cache.join("debian");
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    let limit = Duration::from_secs(1200);
    Run::new("mmdebstrap")
        .words("--variant=minbase --mode=root --include=systemd-sysv,udev --format=directory")
        .arg(packages::release()?)
        .arg(&directory)
        .arg(packages::mirror()?)
        .limit(limit)
        .read()?;
    let units = directory.join("etc/systemd/system");
    let report = include_str!("../../assets/clone-report.service");
    std::fs::write(units.join("clone-report.service"), report)?;
    let wants = units.join("multi-user.target.wants");
    std::fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../clone-report.service", wants.join("clone-report.service"))?;
    std::fs::write(directory.join("etc/fstab"), "/dev/vda / ext4 defaults 0 0\n")?;
    std::fs::write(directory.join("etc/hostname"), "clone\n")?;

    let unfinished = cache.join("debian.unfinished");
    std::fs::File::create(&unfinished)?.set_len(ROOT_BYTES)?;
    let run = Run::new("/sbin/mkfs.ext4").words("-q -F -d").arg(&directory).arg(&unfinished);
    run.limit(limit).read()?;
    std::fs::rename(&unfinished, &path)?;
    std::fs::remove_dir_all(&directory)?;
    Ok(path)
}

//! A Debian system imported once, cloned ten times and booted from every clone.
//!
//! Each clone leaves a mark on its own disk. Afterwards every clone must have its mark and no
//! other, and the disk that they were cloned from must still be what was imported.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::control::Control;
use crate::process::Run;
use crate::server::{EXPORT, Server};

use super::Bed;
use super::debian::{BOOT_LIMIT, Debian, ROOT_BYTES};
use super::guest::{COMMON, Disk, Guest, Machine};

const CLONES: usize = 10;
/// Guests that run side by side: emulation takes a core each.
const TOGETHER: usize = 2;

/// Runs the scenario. The peer cannot clone: against it, its one disk is booted.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let debian = Debian::ensure(&bed.cache)?;
    let initramfs = bed.data.join("initramfs");
    debian.initramfs(include_str!("../../assets/clone-story.sh"), &initramfs)?;

    let mut server = bed.server(ROOT_BYTES)?;
    let scratch = bed.scratch.clone();
    let data = bed.data.clone();
    let boot = |server: &Server, export: &str, number: usize| {
        let machine = Machine {
            kernel: &debian.kernel,
            initramfs: &initramfs,
            append: format!("plx.clone={number}"),
            disks: vec![Disk::Nbd(server.nbd_socket(), export.to_owned())],
            size: COMMON,
            serial: scratch.join(format!("clone{number}.log")),
            incoming: None,
        };
        machine.start()
    };
    let Some(binary) = bed.parallax().map(ToOwned::to_owned) else {
        bed.check("copy Debian in and boot it", || {
            Run::new("nbdcopy").arg(&debian.root).arg(server.uri()).read()?;
            wait_until_up(boot(&server, EXPORT, 1)?, 1)
        });
        server.stop()?;
        return Ok(());
    };

    bed.check("import Debian", || {
        parallax(&binary, &server, "import").arg(&debian.root).arg("golden").read().map(drop)
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
        Run::new("qemu-img")
            .words("compare -f raw -F raw")
            .arg(&debian.root)
            .arg(uri)
            .read()
            .map(drop)
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

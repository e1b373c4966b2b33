//! The Debian packages that the tasks need, installed only where they are missing.
//!
//! Each is looked for by a file that it brings, so a machine that has it from elsewhere is left
//! alone and nothing is asked of the network. QEMU 10 and libvirt 11 come from bookworm-backports on
//! Debian 12 (what it has itself, 7.2 and 9.0, lacks what the guests use) and from the main suite later.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::console;
use crate::process::Run;

/// What the packages are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The gate: NBD clients against the server.
    Gate,
    /// The benchmarks: the gate's, nothing more.
    Bench,
    /// Guests in QEMU, and all of the above.
    Everything,
}

/// A package, the file that shows that it is there, and whether only guests need it.
struct Package {
    name: &'static str,
    file: &'static str,
    guests_only: bool,
}

const fn gate(name: &'static str, file: &'static str) -> Package {
    Package { name, file, guests_only: false }
}

const fn guest(name: &'static str, file: &'static str) -> Package {
    Package { name, file, guests_only: true }
}

const PACKAGES: [Package; 19] = [
    gate("fio", "/usr/bin/fio"),
    gate("libnbd-bin", "/usr/bin/nbdcopy"),
    gate("python3-libnbd", "/usr/lib/python3/dist-packages/nbd.py"),
    gate("nbdkit", "/usr/bin/nbdkit"),
    gate("qemu-utils", "/usr/bin/qemu-storage-daemon"),
    guest("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    guest("e2fsprogs", "/sbin/mkfs.ext4"),
    guest("xfsprogs", "/sbin/mkfs.xfs"),
    guest("btrfs-progs", "/bin/btrfs"),
    guest("busybox-static", "/bin/busybox"),
    guest("kmod", "/sbin/depmod"),
    guest("nbd-client", "/sbin/nbd-client"),
    guest("netcat-openbsd", "/usr/bin/nc.openbsd"),
    guest("xz-utils", "/usr/bin/xz"),
    guest("mmdebstrap", "/usr/bin/mmdebstrap"),
    guest("extlinux", "/usr/bin/extlinux"),
    guest("libvirt-daemon", "/usr/sbin/libvirtd"),
    guest(
        "libvirt-daemon-driver-qemu",
        "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
    ),
    guest("libvirt-clients", "/usr/bin/virsh"),
];

/// Where a Debian 12 machine learns of the backports suite.
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/parallax-backports.list";

/// Installs what is missing for `purpose`.
///
/// # Errors
/// If something is missing and this is not Debian, or apt fails: the message names the packages.
pub(crate) fn ensure(purpose: Use) -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|package| purpose == Use::Everything || !package.guests_only)
        .filter(|package| !Path::new(package.file).exists())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        console::say("every system package is present");
        return Ok(());
    }
    console::say(&format!("installing {}", missing.join(" ")));
    install(&missing).with_context(|| {
        format!("install the packages {} (as root, on Debian 12 or later)", missing.join(" "))
    })
}

/// Installs packages, QEMU's and libvirt's from the backports suite where the release has one that is
/// needed.
fn install(names: &[&str]) -> Result<()> {
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("there is no apt-get on this machine");
    }
    add_backports()?;
    apt().words("update -q").read()?;
    let (newer, other): (Vec<&str>, Vec<&str>) =
        names.iter().partition(|name| name.starts_with("qemu-") || name.starts_with("libvirt-"));
    if !other.is_empty() {
        apt().words("install -q -y --no-install-recommends").args(other).read()?;
    }
    if !newer.is_empty() {
        let mut run = apt().words("install -q -y --no-install-recommends");
        if is_bookworm()? {
            run = run.words("-t bookworm-backports");
        }
        run.args(newer).read()?;
    }
    Ok(())
}

/// Adds the backports suite on Debian 12 unless some list names it already.
///
/// # Errors
/// If the lists cannot be read or written.
pub(crate) fn add_backports() -> Result<()> {
    if !is_bookworm()? {
        return Ok(());
    }
    for text in source_lists()? {
        if text.contains("bookworm-backports") {
            return Ok(());
        }
    }
    let line = format!("deb {} bookworm-backports main\n", mirror()?);
    std::fs::write(BACKPORTS_LIST, line)?;
    Ok(())
}

/// The mirror that this machine takes its release from.
///
/// # Errors
/// If the lists cannot be read.
pub(crate) fn mirror() -> Result<String> {
    let release = release()?;
    let found = source_lists()?.iter().find_map(|text| debian_mirror(text, &release));
    Ok(found.unwrap_or_else(|| "http://deb.debian.org/debian".to_owned()))
}

/// Every list of package sources.
fn source_lists() -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir("/etc/apt/sources.list.d").context("list package sources")? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "list" || kind == "sources") {
            texts.push(std::fs::read_to_string(&path)?);
        }
    }
    Ok(texts)
}

/// The mirror that a deb822 source file names for the release itself.
fn debian_mirror(sources: &str, release: &str) -> Option<String> {
    let suites = format!("Suites: {release} ");
    let stanza = sources.split("\n\n").find(|stanza| stanza.contains(&suites))?;
    let line = stanza.lines().find(|line| line.starts_with("URIs:"))?;
    line.split_whitespace().nth(1).map(str::to_owned)
}

/// Whether this is Debian 12.
///
/// # Errors
/// If the system does not say what it is.
pub(crate) fn is_bookworm() -> Result<bool> {
    Ok(release()? == "bookworm")
}

/// The code name of this machine's release.
///
/// # Errors
/// If the system does not say what it is.
pub(crate) fn release() -> Result<String> {
    let text = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(str::to_owned).context("the system has no code name")
}

/// apt-get that asks nothing and waits for another one to finish.
pub(crate) fn apt() -> Run {
    Run::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .words("-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_taken_from_the_release_not_from_security() {
        let text = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\n\
                    Types: deb\nURIs: http://mirror/security\nSuites: bookworm-security\n";
        assert_eq!(debian_mirror(text, "bookworm").as_deref(), Some("http://mirror/debian"));
        assert_eq!(debian_mirror("Types: deb\nURIs: http://x\nSuites: sid\n", "bookworm"), None);
    }
}

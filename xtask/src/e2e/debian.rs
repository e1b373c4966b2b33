//! A Debian system as a golden image: made once, booted from disks of ours.
//!
//! It is a minimal Debian that boots by itself, and the sums of its files, no more. What a scenario has a guest do is not on
//! the disk: the guest's first file system brings a script, and a unit that starts it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::console;
use crate::packages;
use crate::process::Run;

use super::initramfs::Initramfs;
use super::kernel::Kernel;

/// Size of the image.
pub(crate) const ROOT_BYTES: u64 = 1 << 30;
/// systemd needs some twenty seconds when it is emulated, and longer if others are at it, too.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(300);

const BUILD_LIMIT: Duration = Duration::from_secs(1200);

/// What the boot loader does when nobody tells it anything.
const BOOT_MENU: &str = "\
DEFAULT linux
PROMPT 0
LABEL linux
    LINUX /vmlinuz
    INITRD /initrd.img
    APPEND root=/dev/vda console=ttyS0 quiet mitigations=off
";

/// Lists the sums of all programs; modules of the kernel are many and of no use to most guests.
const SUMS: &str = "find usr -type f -not -path '*/modules/*' -print0 | sort -z | \
                    xargs -0 md5sum > golden.md5";

/// The image, and a kernel to boot it with.
pub(crate) struct Debian {
    /// What QEMU starts.
    pub(crate) kernel: Kernel,
    /// An ext4 file system.
    pub(crate) root: PathBuf,
}

impl Debian {
    /// Makes them below `cache` if they are not there yet.
    ///
    /// # Errors
    /// If a package cannot be had, or something of it cannot be made.
    pub(crate) fn ensure(cache: &Path) -> Result<Self> {
        let kernel = Kernel::ensure(cache)?;
        let root = cache.join("golden.raw");
        if !root.exists() {
            console::say("building a Debian root file system");
            build(cache, &root).context("make a Debian root file system")?;
        }
        Ok(Self { kernel, root })
    }

    /// Writes a first file system to `path` that boots Debian from the disk and has it run `script`.
    ///
    /// # Errors
    /// If something of it is missing.
    pub(crate) fn initramfs(&self, script: &str, path: &Path) -> Result<()> {
        let mut made = Initramfs::new(include_str!("../../assets/debian-init.sh"))?;
        made.modules(&self.kernel, &["virtio_blk", "virtio_pci", "crc32c_generic", "ext4"])?;
        let unit = include_str!("../../assets/story.service");
        made.file(Path::new("/story.service"), unit.as_bytes())?;
        made.file(Path::new("/story.sh"), script.as_bytes())?;
        made.write(path)
    }
}

impl Debian {
    /// Copies a file of the image, or what a link there points to.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn copy_out(&self, inside: &str, to: &Path) -> Result<()> {
        let link = self.debugfs(&format!("stat {inside}"))?;
        let target = link.lines().find_map(|line| line.strip_prefix("Fast link dest: "));
        let target = target.map_or(inside, |target| target.trim_matches('"'));
        self.debugfs(&format!("dump {target} {}", to.display()))?;
        ensure!(std::fs::metadata(to).is_ok_and(|file| file.len() > 0), "there is no {target}");
        Ok(())
    }

    fn debugfs(&self, request: &str) -> Result<String> {
        Run::new("/sbin/debugfs").args(["-R", request]).arg(&self.root).read()
    }
}

/// Made in a directory, copied into a file system, and given a boot loader through a mount of that.
fn build(cache: &Path, root: &Path) -> Result<()> {
    let directory = cache.join("debian");
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    Run::new("mmdebstrap")
        .words("--variant=minbase --mode=root --format=directory")
        .words("--include=systemd-sysv,udev,linux-image-cloud-amd64")
        .arg(packages::release()?)
        .arg(&directory)
        .arg(packages::mirror()?)
        .limit(BUILD_LIMIT)
        .read()?;
    std::fs::write(directory.join("etc/fstab"), "/dev/vda / ext4 defaults 0 0\n")?;
    std::fs::write(directory.join("etc/hostname"), "golden\n")?;
    std::fs::create_dir_all(directory.join("boot/extlinux"))?;
    std::fs::write(directory.join("boot/extlinux/extlinux.conf"), BOOT_MENU)?;
    Run::new("sh").args(["-c", SUMS]).dir(&directory).read()?;

    let unfinished = cache.join("golden.unfinished");
    std::fs::File::create(&unfinished)?.set_len(ROOT_BYTES)?;
    // The boot loader does not know block numbers of 64 bits.
    let run = Run::new("/sbin/mkfs.ext4").words("-q -F -O ^64bit -d").arg(&directory);
    run.arg(&unfinished).limit(BUILD_LIMIT).read()?;
    std::fs::remove_dir_all(&directory)?;
    std::fs::create_dir_all(&directory)?;
    Run::new("mount").words("-o loop").arg(&unfinished).arg(&directory).read()?;
    let installed =
        Run::new("extlinux").arg("--install").arg(directory.join("boot/extlinux")).read();
    Run::new("umount").arg(&directory).read()?;
    installed?;
    std::fs::rename(&unfinished, root)?;
    std::fs::remove_dir(&directory)?;
    Ok(())
}

//! A guest's first file system: busybox, some programs of this machine, some kernel modules.
//!
//! Written as an uncompressed cpio archive of the "newc" kind (kernel source,
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process::Run;

use super::kernel::Kernel;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive in the making.
pub(crate) struct Initramfs {
    archive: Vec<u8>,
    next_inode: u32,
    present: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// One that starts `init` (a script for busybox's shell) as the first process.
    ///
    /// # Errors
    /// If busybox is missing.
    pub(crate) fn new(init: &str) -> Result<Self> {
        let mut made = Self { archive: Vec::new(), next_inode: 1, present: BTreeSet::new() };
        for directory in ["/proc", "/sys", "/dev", "/mnt", "/tmp", "/run", "/bin", "/sbin"] {
            made.directory(Path::new(directory))?;
        }
        made.entry(Path::new("/init"), PROGRAM, init.as_bytes())?;
        made.program(Path::new("/bin/busybox"))?;
        Ok(made)
    }

    /// Adds a program of this machine and the libraries that it needs, at the same places.
    ///
    /// # Errors
    /// If it is not there.
    pub(crate) fn program(&mut self, path: &Path) -> Result<()> {
        self.program_as(path, path)
    }

    /// Adds a program of this machine at another place, and the libraries that it needs.
    ///
    /// # Errors
    /// If it is not there.
    pub(crate) fn program_as(&mut self, path: &Path, inside: &Path) -> Result<()> {
        self.copy_as(path, inside)?;
        // A static program has nothing that ldd could list, and says so with an error.
        let listed = Run::new("ldd").arg(path).output()?;
        for word in listed.stdout.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(word))?;
        }
        Ok(())
    }

    /// Adds kernel modules, and `/modules`, a list of their files in the order to load them.
    ///
    /// # Errors
    /// If the kernel does not have one.
    pub(crate) fn modules(&mut self, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let mut list = String::new();
        for packed in kernel.modules(names)? {
            let name = packed.file_stem().context("name of a module")?.to_string_lossy();
            let unpacked = std::env::temp_dir().join(format!("{}-{name}", std::process::id()));
            std::fs::copy(&packed, unpacked.with_extension("ko.xz"))?;
            Run::new("xz").args(["-d", "-f"]).arg(unpacked.with_extension("ko.xz")).read()?;
            let bytes = std::fs::read(&unpacked)?;
            std::fs::remove_file(&unpacked)?;
            let inside = format!("/lib/modules/{name}");
            self.entry(Path::new(&inside), FILE, &bytes)?;
            list += &format!("{inside}\n");
        }
        self.entry(Path::new("/modules"), FILE, list.as_bytes())
    }

    /// Adds a file.
    ///
    /// # Errors
    /// If it is too large for an archive.
    pub(crate) fn file(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.entry(path, FILE, bytes)
    }

    /// Writes the archive to `path`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(mut self, path: &Path) -> Result<()> {
        self.header("TRAILER!!!", 0, 0)?;
        std::fs::write(path, &self.archive)?;
        Ok(())
    }

    fn copy(&mut self, path: &Path) -> Result<()> {
        self.copy_as(path, path)
    }

    fn copy_as(&mut self, path: &Path, inside: &Path) -> Result<()> {
        if self.present.contains(inside) {
            return Ok(());
        }
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let mode = std::fs::metadata(path)?.permissions().mode();
        self.entry(inside, if mode & 0o111 == 0 { FILE } else { PROGRAM }, &bytes)
    }

    fn directory(&mut self, path: &Path) -> Result<()> {
        self.entry(path, DIRECTORY, &[])
    }

    fn entry(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        if let Some(parent) = path.parent().filter(|parent| parent.parent().is_some())
            && !self.present.contains(parent)
        {
            self.directory(parent)?;
        }
        self.present.insert(path.to_owned());
        let name = path.to_str().context("name of a file")?.trim_start_matches('/');
        self.header(name, mode, u32::try_from(bytes.len())?)?;
        self.archive.extend(bytes);
        self.pad();
        Ok(())
    }

    fn header(&mut self, name: &str, mode: u32, length: u32) -> Result<()> {
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_length = u32::try_from(name.len() + 1)?;
        let inode = self.next_inode;
        self.next_inode += 1;
        // inode, mode, uid, gid, nlink, mtime, length, four device numbers, name length, checksum.
        let fields = [inode, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0];
        self.archive.extend(b"070701");
        for field in fields {
            self.archive.extend(format!("{field:08x}").as_bytes());
        }
        self.archive.extend(name.as_bytes());
        self.archive.push(0);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_padded_and_ends() {
        let mut made = Initramfs { archive: Vec::new(), next_inode: 1, present: BTreeSet::new() };
        made.entry(Path::new("/lib/x"), FILE, b"12345").unwrap();
        assert!(made.present.contains(Path::new("/lib")), "parents are made");
        made.header("TRAILER!!!", 0, 0).unwrap();
        assert_eq!(made.archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&made.archive);
        assert_eq!(text.matches("070701").count(), 3);
        assert!(text.contains("lib/x\0") && text.contains("12345\0\0\x00070701"), "{text}");
    }
}

//! Debian's kernel with its modules, unpacked from the package and not installed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::console;
use crate::packages;
use crate::process::Run;

/// An unpacked kernel.
pub(crate) struct Kernel {
    /// What QEMU starts.
    pub(crate) image: PathBuf,
    /// Directory of its modules.
    modules: PathBuf,
    /// Paths of modules by name, and what each needs first, from modules.dep.
    depends_on: BTreeMap<String, Vec<String>>,
    /// What is in the kernel itself, from modules.builtin.
    built_in: String,
}

impl Kernel {
    /// Unpacks it below `cache` if it is not there yet.
    ///
    /// # Errors
    /// If the package cannot be had.
    pub(crate) fn ensure(cache: &Path) -> Result<Self> {
        let root = cache.join("kernel");
        let complete = cache.join("kernel.complete");
        if !complete.exists() {
            unpack(cache, &root).context("unpack Debian's kernel")?;
            std::fs::write(&complete, "")?;
        }
        let image = only_entry(&root.join("boot"), "vmlinuz-")?;
        let modules = only_entry(&root.join("lib/modules"), "")?;
        let text = std::fs::read_to_string(modules.join("modules.dep"))?;
        let built_in = std::fs::read_to_string(modules.join("modules.builtin"))?;
        Ok(Self { image, modules, depends_on: parse_dependencies(&text), built_in })
    }

    /// The files of these modules and of all that they need, in the order in which to load them;
    /// what is built in needs none.
    ///
    /// # Errors
    /// If there is no such module.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut ordered: Vec<String> = Vec::new();
        for name in names {
            let built_in = format!("/{name}.ko");
            if self.built_in.lines().any(|path| path.ends_with(&built_in)) {
                continue;
            }
            let suffix = format!("/{name}.ko.xz");
            let path = self.depends_on.keys().find(|path| path.ends_with(&suffix));
            let path = path.with_context(|| format!("the kernel has no module '{name}'"))?;
            // modules.dep lists what must be there first last.
            let needed = self.depends_on.get(path).into_iter().flatten().rev();
            for module in needed.chain([path]) {
                if !ordered.contains(module) {
                    ordered.push(module.clone());
                }
            }
        }
        Ok(ordered.iter().map(|path| self.modules.join(path)).collect())
    }
}

fn parse_dependencies(text: &str) -> BTreeMap<String, Vec<String>> {
    let line = |line: &str| {
        let (path, needed) = line.split_once(':')?;
        Some((path.to_owned(), needed.split_whitespace().map(str::to_owned).collect()))
    };
    text.lines().filter_map(line).collect()
}

fn unpack(cache: &Path, root: &Path) -> Result<()> {
    console::say("fetching Debian's kernel");
    packages::add_backports()?;
    packages::apt().words("update -q").read()?;
    let suite = if packages::is_bookworm()? { "/bookworm-backports" } else { "" };
    let meta = format!("linux-image-amd64{suite}");
    let said = Run::new("apt-cache").arg("depends").arg(meta).read()?;
    let name = said
        .split_whitespace()
        .find(|word| word.starts_with("linux-image-") && *word != "linux-image-amd64")
        .context("apt names no kernel")?;
    let packages_directory = cache.join("packages");
    std::fs::create_dir_all(&packages_directory)?;
    packages::apt().words("download -q").arg(name).dir(&packages_directory).read()?;
    let package = only_entry(&packages_directory, &format!("{name}_"))?;
    if root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    Run::new("dpkg").arg("-x").arg(&package).arg(root).read()?;
    let modules = only_entry(&root.join("lib/modules"), "")?;
    let version = modules.file_name().context("version of the kernel")?;
    Run::new("/sbin/depmod").arg("-b").arg(root).arg(version).read()?;
    Ok(())
}

/// The one entry of a directory whose name starts with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in
        std::fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?
    {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(prefix) {
            found.push(path);
        }
    }
    ensure!(found.len() == 1, "{} entries '{prefix}…' in {}", found.len(), directory.display());
    found.pop().context("no entry")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let text = "kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz\n\
                    kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\n";
        let kernel = Kernel {
            image: PathBuf::new(),
            modules: "/m".into(),
            depends_on: parse_dependencies(text),
            built_in: "kernel/drivers/virtio/virtio_pci.ko\n".to_owned(),
        };
        let found = kernel.modules(&["virtio_pci", "jbd2", "ext4"]).unwrap();
        let expected = [
            "/m/kernel/fs/jbd2/jbd2.ko.xz",
            "/m/kernel/lib/crc16.ko.xz",
            "/m/kernel/fs/ext4/ext4.ko.xz",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
        assert!(kernel.modules(&["xt4"]).is_err());
    }
}

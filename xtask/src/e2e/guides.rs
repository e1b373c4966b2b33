//! The guides, followed word for word.
//!
//! Every block of a guide is run, in the order in which they stand, by a shell in an empty directory of
//! what looks like a machine that was just installed ([`Sandbox`]), where a daemon serves a store as
//! docs/operations/install.md has it. What a guide takes for granted beside that, such as the image of
//! a disk, is put into the directory.

pub(crate) mod backup;
mod sandbox;

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::Run;
use crate::readme::{self, Block};
use crate::workspace;
use crate::{clock, console};

use super::Bed;
use super::debian::{BOOT_LIMIT, Debian};
use sandbox::Sandbox;

/// What the serial line of a machine says when somebody could log in.
const LOGIN: &str = "golden login:";
/// Where libvirt keeps that, as the guide has it.
const SERIAL_LOG: &str = "/var/log/libvirt/qemu/web01.serial.log";

/// What a machine with libvirt has and this one may not: empty directories, and nothing of systemd, of
/// cgroups and of AppArmor.
const LIBVIRT_SET_UP: &str = "\
for empty in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mkdir -p $empty
    mount -t tmpfs none $empty
done
mkdir /var/log/libvirt/qemu
cat > /etc/libvirt/qemu.conf <<'END'
security_driver = \"none\"
namespaces = []
cgroup_controllers = []
stdio_handler = \"file\"
END
cat > /etc/libvirt/libvirtd.conf <<'END'
unix_sock_group = \"root\"
auth_unix_ro = \"none\"
auth_unix_rw = \"none\"
END";

/// docs/guides/host.md.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn host(bed: &mut Bed) -> Result<()> {
    let Some(mut sandbox) = sandbox(bed, &[])? else { return Ok(()) };
    sandbox.serve("exec parallax serve store")?;
    follow_without(bed, "host.md", &mut sandbox, is_of_a_block_device, |_, _| Ok(false))
}

/// docs/guides/time-travel.md.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn time_travel(bed: &mut Bed) -> Result<()> {
    /// How long before its accident the disk lies as the guide has it.
    const QUIET: Duration = Duration::from_secs(15);
    let Some(mut sandbox) = sandbox(bed, &[])? else { return Ok(()) };
    sandbox.serve("exec parallax serve store")?;
    follow(bed, "time-travel.md", &mut sandbox, |_, block| {
        if block.text.starts_with("rm ") {
            clock::sleep(QUIET);
        }
        Ok(false)
    })
}

/// The blocks of docs/guides/host.md that take more than this machine's kernel may have; the scenario
/// `ublk` follows them.
///
/// # Errors
/// If there are none.
pub(crate) fn of_block_devices() -> Result<Vec<Block>> {
    let mut blocks = read("host.md")?;
    blocks.retain(is_of_a_block_device);
    ensure!(!blocks.is_empty(), "host.md has no block devices");
    Ok(blocks)
}

fn is_of_a_block_device(block: &Block) -> bool {
    ["ublk", "nbd"].iter().any(|way| block.text.contains(way))
}

/// docs/guides/qemu.md.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn qemu(bed: &mut Bed) -> Result<()> {
    let debian = Debian::ensure(&bed.cache)?;
    let Some(mut sandbox) = sandbox(bed, &["/dev/kvm"])? else { return Ok(()) };
    image(&debian, &sandbox)?;
    sandbox.serve("exec parallax serve store")?;
    let (mut machine, mut moved) = (None, None);
    follow(bed, "qemu.md", &mut sandbox, |sandbox, block| {
        if block.text.contains("-incoming") {
            // The guest is there when it has moved.
            moved = Some(sandbox.start("moved", &block.text)?);
            sandbox.run("until [ -S /run/web01.migration ]; do sleep 0.1; done")?;
            return Ok(true);
        }
        if block.text.starts_with("qemu-system") {
            let machine = machine.insert(sandbox.start("machine", &block.text)?);
            machine.wait_for(LOGIN, BOOT_LIMIT)?;
            return Ok(true);
        }
        if block.text.contains("echo quit") {
            sandbox.run(&block.text)?;
            // It has ended by itself.
            drop(machine.take());
            return Ok(true);
        }
        if block.text.starts_with("parallax detach") {
            // As the guide has it: after the machine has ended.
            moved.take().context("there is no machine")?.stop(sandbox)?;
        }
        Ok(false)
    })
}

/// docs/guides/libvirt.md, with libvirtd as systemd would have started it.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn libvirt(bed: &mut Bed) -> Result<()> {
    let debian = Debian::ensure(&bed.cache)?;
    let Some(mut sandbox) = sandbox(bed, &["/dev/kvm"])? else { return Ok(()) };
    image(&debian, &sandbox)?;
    sandbox.run(LIBVIRT_SET_UP)?;
    let libvirtd = sandbox.start("libvirtd", "exec libvirtd")?;
    sandbox.run("until virsh version; do sleep 0.2; done")?;
    follow(bed, "libvirt.md", &mut sandbox, |sandbox, block| {
        match block.language.as_str() {
            "ini" => sandbox.serve(&service(&block.text)?)?,
            "xml" => std::fs::write(sandbox.directory.join("web01.xml"), &block.text)?,
            _ if block.text.contains("virsh start") => {
                sandbox.run(&block.text)?;
                sandbox.run(&format!("until grep '{LOGIN}' {SERIAL_LOG}; do sleep 0.5; done"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    libvirtd.stop(&sandbox)
}

/// docs/guides/cloud-hypervisor.md.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn cloud_hypervisor(bed: &mut Bed) -> Result<()> {
    other_monitor(bed, "cloud-hypervisor")
}

/// docs/guides/firecracker.md.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn firecracker(bed: &mut Bed) -> Result<()> {
    other_monitor(bed, "firecracker")
}

/// The guide of a monitor that Debian does not have: where it is not installed everything but its own
/// command is run. It needs KVM; where there is none it must get as far as asking for it.
fn other_monitor(bed: &mut Bed, monitor: &str) -> Result<()> {
    let debian = Debian::ensure(&bed.cache)?;
    let Some(mut sandbox) = sandbox(bed, &[])? else { return Ok(()) };
    image(&debian, &sandbox)?;
    for (inside, name) in [("/vmlinuz", "vmlinuz"), ("/initrd.img", "initrd.img")] {
        debian.copy_out(inside, &sandbox.directory.join(name))?;
    }
    sandbox.serve("exec parallax serve store")?;
    let installed = sandbox.run(&format!("command -v {monitor}")).is_ok();
    let left_out = |block: &Block| !installed && block.text.starts_with(monitor);
    follow_without(bed, &format!("{monitor}.md"), &mut sandbox, left_out, |sandbox, block| {
        if block.language == "json" {
            let said: serde_json::Value = serde_json::from_str(&block.text)?;
            std::fs::write(sandbox.directory.join("web01.json"), said.to_string())?;
            return Ok(true);
        }
        if !block.text.starts_with(monitor) {
            return Ok(false);
        }
        let mut machine = sandbox.start("machine", &block.text)?;
        machine.wait_for_any(&[LOGIN, "kvm", "Kvm", "KVM"], BOOT_LIMIT)?;
        if machine.said().contains(LOGIN) {
            machine.stop(sandbox)?;
        } else {
            console::say(&format!("  {monitor} ends for want of KVM:\n{}", machine.said()));
        }
        Ok(true)
    })
}

/// What systemd would start for a unit that this is added to.
fn service(drop_in: &str) -> Result<String> {
    let value = |key: &str| {
        let mut values =
            drop_in.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        values.next_back().with_context(|| format!("the unit does not say {key}"))
    };
    let (group, directory) = (value("Group")?, value("RuntimeDirectory")?);
    let program = value("ExecStart")?.replace("/usr/local/bin/", "");
    let program = program.replace("/srv/parallax/store", "store");
    Ok(format!(
        "install -d -g {group} -m {} /run/{directory}\numask {}\n\
         exec setpriv --regid {group} --clear-groups {program}",
        value("RuntimeDirectoryMode")?,
        value("UMask")?
    ))
}

/// A sandbox with a store; `None` when the peer is tested: it has no guides.
fn sandbox(bed: &Bed, hidden: &[&str]) -> Result<Option<Sandbox>> {
    let Some(binary) = bed.parallax() else {
        console::say("  the guides are not about the peer");
        return Ok(None);
    };
    Sandbox::new(&bed.data, &bed.scratch, binary, hidden).map(Some)
}

/// Puts the image that guides take for granted where they look for it.
fn image(debian: &Debian, sandbox: &Sandbox) -> Result<()> {
    let run = Run::new("qemu-img").words("convert -f raw -O qcow2").arg(&debian.root);
    run.arg(sandbox.directory.join("debian.qcow2")).read().map(drop)
}

/// The blocks of a guide.
fn read(guide: &str) -> Result<Vec<Block>> {
    let path = workspace::root().join("docs/guides").join(guide);
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let blocks = readme::blocks(&text);
    ensure!(!blocks.is_empty(), "{guide} has no commands");
    Ok(blocks)
}

/// Follows a guide from its first block to its last. `special` returns whether it has done what a
/// block says; otherwise the shell does it.
fn follow(
    bed: &mut Bed,
    guide: &str,
    sandbox: &mut Sandbox,
    special: impl FnMut(&mut Sandbox, &Block) -> Result<bool>,
) -> Result<()> {
    follow_without(bed, guide, sandbox, |_| false, special)
}

/// The same without the commands of what this machine does not have; they are not counted.
fn follow_without(
    bed: &mut Bed,
    guide: &str,
    sandbox: &mut Sandbox,
    is_left_out: impl Fn(&Block) -> bool,
    mut special: impl FnMut(&mut Sandbox, &Block) -> Result<bool>,
) -> Result<()> {
    for block in &read(guide)? {
        // What follows takes for granted that what came before has worked.
        if bed.count.failed > 0 {
            break;
        }
        let first = block.text.lines().next().unwrap_or_default();
        if is_left_out(block) {
            console::say(&format!("  NOT RUN, this machine has not got what it takes: {first}"));
            continue;
        }
        bed.check(&format!("{guide}: {first}"), || {
            if special(sandbox, block)? {
                return Ok(());
            }
            ensure!(block.language == "sh", "nobody does what this block says:\n{}", block.text);
            sandbox.run(&block.text)
        });
    }
    Ok(())
}

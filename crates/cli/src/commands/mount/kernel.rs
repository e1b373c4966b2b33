//! The kernel's side of a mount. Root mounts by itself, others through fusermount3(1), which
//! Debian's package `fuse3` has.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use api::{Error, Kind};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

/// What the mount is called in /proc/mounts, and its kind there.
const NAME: &str = "parallax";
const FILE_SYSTEM: &str = "fuse.parallax";

/// A mounted tree. Taken away when it is dropped, even if somebody uses it: they get errors.
pub(super) struct Mount {
    dir: String,
    /// By which /proc/self/mountinfo knows it, and not another one at that place.
    device: Option<String>,
    /// /dev/fuse: the connection to the kernel. As long as anybody has it open, the mount lives.
    kernel: OwnedFd,
}

impl Mount {
    /// Mounts at a directory.
    pub(super) fn new(dir: &str) -> Result<Self, Error> {
        if device_at(dir)?.is_some() {
            let message = format!("disks are mounted at {dir} already");
            return Err(Error::new(Kind::Exists, message));
        }
        let kernel = match rustix::process::geteuid().is_root() {
            true => mount_as_root(dir)?,
            false => mount_as_user(dir)?,
        };
        Ok(Self { dir: dir.to_owned(), device: device_at(dir)?, kernel })
    }

    pub(super) fn dir(&self) -> &str {
        &self.dir
    }

    /// Whether somebody has unmounted it.
    pub(super) fn is_gone(&self) -> bool {
        let mut kernel = [PollFd::new(&self.kernel, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = rustix::event::poll(&mut kernel, Some(&now));
        polled.is_ok() && kernel.iter().any(|kernel| kernel.revents().contains(PollFlags::ERR))
    }

    /// Unmounts it, if nobody uses it.
    pub(super) fn unmount(&self) -> Result<(), Error> {
        if self.is_there() { unmount(&self.dir) } else { Ok(()) }
    }

    /// Whether it is what is mounted there. Also one that is dead is.
    fn is_there(&self) -> bool {
        self.device.is_some() && device_at(&self.dir).is_ok_and(|device| device == self.device)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.is_there() {
            return;
        }
        // Nothing can be done about a failure; the connection ends with this process anyway.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        let _ = match rustix::process::geteuid().is_root() {
            true => rustix::mount::unmount(&self.dir, flags)
                .map_err(|e| Error::system("unmount", &e.into())),
            false => fusermount(&["-u", "-z", "--", &self.dir]),
        };
    }
}

/// The device of what Parallax has mounted at a directory, if it has, as `0:45`. Asks nobody but the
/// kernel: a daemon that hangs would keep everybody waiting who looks at the directory.
fn device_at(dir: &str) -> Result<Option<String>, Error> {
    let table = std::fs::read("/proc/self/mountinfo")
        .map_err(|e| Error::system("read the table of mounts", &e))?;
    // Other people's paths may be of any bytes.
    Ok(find_device(&String::from_utf8_lossy(&table), dir))
}

/// The last one at a place hides those before.
fn find_device(table: &str, dir: &str) -> Option<String> {
    let last =
        table.lines().rfind(|line| line.split(' ').nth(4).map(unescape).as_deref() == Some(dir))?;
    let (mount, file_system) = last.split_once(" - ")?;
    let is_ours = file_system.split(' ').next() == Some(FILE_SYSTEM);
    is_ours.then(|| mount.split(' ').nth(2).unwrap_or_default().to_owned())
}

/// A path of the table, in which blanks and backslashes are written in octal.
fn unescape(path: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"].iter().fold(path.to_owned(), |path, rule| {
        let (escaped, plain) = rule.split_at(4);
        path.replace(escaped, plain)
    })
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kernel.as_fd()
    }
}

/// Unmounts what Parallax has mounted and nobody uses.
pub(super) fn unmount(dir: &str) -> Result<(), Error> {
    if device_at(dir)?.is_none() {
        return Err(Error::new(Kind::NotFound, format!("no disks are mounted at {dir}")));
    }
    if !rustix::process::geteuid().is_root() {
        return fusermount(&["-u", "--", dir]);
    }
    rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW).map_err(|errno| match errno {
        Errno::BUSY => {
            Error::new(Kind::Busy, format!("{dir} is in use: fuser -vm {dir} shows by whom"))
        }
        errno => Error::system(&format!("unmount {dir}"), &errno.into()),
    })
}

fn mount_as_root(dir: &str) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let kernel = rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(|errno| {
        let message =
            format!("cannot open /dev/fuse: {errno}; has the kernel FUSE (modprobe fuse)?");
        Error::new(Kind::Unsupported, message)
    })?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        kernel.as_raw_fd()
    );
    let options = std::ffi::CString::new(options)
        .map_err(|_| Error::new(Kind::Invalid, "mount options have no NUL"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(NAME, dir, FILE_SYSTEM, flags, options.as_c_str())
        .map_err(|errno| Error::system(&format!("mount at {dir}"), &errno.into()))?;
    Ok(kernel)
}

/// fusermount3 opens /dev/fuse, mounts, and sends the descriptor over the socket that
/// `_FUSE_COMMFD` names.
fn mount_as_user(dir: &str) -> Result<OwnedFd, Error> {
    let system = |errno: Errno| Error::system("mount with fusermount3", &errno.into());
    // Not closed when the program is started, and nothing else is started meanwhile.
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::empty(),
        None,
    )
    .map_err(system)?;
    let options = format!("fsname={NAME},subtype={NAME},default_permissions");
    let mut command = Command::new("fusermount3");
    command.args(["-o", &options, "--", dir]);
    command.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
    finish(&mut command)?;
    drop(theirs);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let socket = UnixStream::from(ours);
    rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(system)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message
            && let Some(kernel) = files.next()
        {
            return Ok(kernel);
        }
    }
    Err(Error::new(Kind::Io, "fusermount3 gave no connection to the kernel"))
}

fn fusermount(arguments: &[&str]) -> Result<(), Error> {
    finish(Command::new("fusermount3").args(arguments))
}

/// Runs it to its end. What it says of errors is good enough for people.
fn finish(command: &mut Command) -> Result<(), Error> {
    let output = command.output().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(Kind::Unsupported, "fusermount3 is missing: install the package fuse3")
        }
        _ => Error::system("run fusermount3", &e),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if said.contains("busy") {
        Kind::Busy
    } else if said.contains("not found") {
        Kind::NotFound
    } else {
        Kind::Io
    };
    Err(Error::new(kind, said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_parallax_has_mounted_there_last_counts() {
        let table = "29 1 254:0 / / rw - ext4 /dev/vda rw\n\
                     40 29 0:45 / /mnt/a rw,nosuid - fuse.parallax parallax rw\n\
                     41 29 0:46 / /mnt/b\\040c rw - fuse.parallax parallax rw\n\
                     42 29 0:47 / /mnt/d rw - fuse.parallax parallax rw\n\
                     43 42 0:48 / /mnt/d rw - tmpfs tmpfs rw\n";
        assert_eq!(find_device(table, "/mnt/a").as_deref(), Some("0:45"));
        assert_eq!(find_device(table, "/mnt/b c").as_deref(), Some("0:46"));
        for other in ["/", "/mnt", "/mnt/d", "/mnt/b"] {
            assert_eq!(find_device(table, other), None, "{other}");
        }
    }
}

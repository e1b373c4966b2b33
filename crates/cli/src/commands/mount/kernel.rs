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

/// What the mount is called in /proc/mounts, and its kind there: `fuse.parallax`.
const NAME: &str = "parallax";

/// A mounted tree.
pub(super) struct Mount {
    dir: String,
    /// /dev/fuse: the connection to the kernel. As long as anybody has it open, the mount lives.
    kernel: OwnedFd,
}

impl Mount {
    /// Mounts at a directory.
    pub(super) fn new(dir: &str) -> Result<Self, Error> {
        let kernel = match rustix::process::geteuid().is_root() {
            true => mount_as_root(dir)?,
            false => mount_as_user(dir)?,
        };
        Ok(Self { dir: dir.to_owned(), kernel })
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

    /// Takes it away, even if somebody uses it: they get errors.
    pub(super) fn abandon(&self) {
        // Nothing can be done about a failure; the mount ends with this process anyway.
        let _ = match rustix::process::geteuid().is_root() {
            true => rustix::mount::unmount(&self.dir, UnmountFlags::DETACH)
                .map_err(|e| Error::system("unmount", &e.into())),
            false => fusermount(&["-u", "-z", "--", &self.dir]),
        };
    }
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kernel.as_fd()
    }
}

/// Unmounts what nobody uses.
pub(super) fn unmount(dir: &str) -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        return fusermount(&["-u", "--", dir]);
    }
    rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW).map_err(|errno| match errno {
        Errno::BUSY => {
            Error::new(Kind::Busy, format!("{dir} is in use: fuser -vm {dir} shows by whom"))
        }
        Errno::INVAL | Errno::NOENT => {
            Error::new(Kind::NotFound, format!("nothing is mounted at {dir}"))
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
    rustix::mount::mount(NAME, dir, "fuse.parallax", flags, options.as_c_str())
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

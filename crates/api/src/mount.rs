//! What the keeper of a mount and the daemon say to each other.
//!
//! The keeper has mounted a tree, and has the connection to the kernel. It connects to a unix socket
//! beside the daemon's control socket, and greets: [`GREETING`], the length of the mount point's path
//! in two bytes, the path; /dev/fuse goes with that (SCM_RIGHTS). The daemon says [`SERVING`] when it
//! serves the mount. If it says nothing more and the connection ends, the daemon has: the keeper
//! connects to the next one. Else it says [`UNMOUNTED`], or [`FAILED`] and why.

use std::path::{Path, PathBuf};

/// What a keeper begins with.
pub const GREETING: [u8; 8] = *b"plxmnt1\n";

/// The daemon serves the mount.
pub const SERVING: u8 = b'S';

/// The mount is gone.
pub const UNMOUNTED: u8 = b'U';

/// The mount cannot be served; what follows, to the end, is text for people.
pub const FAILED: u8 = b'F';

/// Most bytes of the path of a mount point.
pub const PATH_BYTES_MAX: usize = 4096;

/// Where keepers connect: beside the control socket, `/run/parallax.mounts.sock` goes with
/// `/run/parallax.sock`.
#[must_use]
pub fn socket(control: &Path) -> PathBuf {
    control.with_extension("mounts.sock")
}

/// What a keeper says first; `None` if the path is too long.
#[must_use]
pub fn greet(dir: &str) -> Option<Vec<u8>> {
    let length = u16::try_from(dir.len()).ok().filter(|_| dir.len() <= PATH_BYTES_MAX)?;
    Some([&GREETING[..], &length.to_le_bytes(), dir.as_bytes()].concat())
}

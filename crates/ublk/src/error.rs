//! Why there is no block device.

use std::io;

use base::ErrorKind;

/// Why a block device cannot be made, taken over or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no ublk.
    #[error(
        "this kernel has no ublk (there is no /dev/ublk-control): it takes Linux 6.5 or newer with the \
         module ublk_drv; try: modprobe ublk_drv"
    )]
    Absent,
    /// Its ublk is older than what this needs.
    #[error(
        "this kernel's ublk cannot hand devices over to another daemon: it takes Linux 6.5 or newer"
    )]
    TooOld,
    /// The number is taken.
    #[error("/dev/ublkb{0} is there already")]
    Exists(u32),
    /// The device is somebody else's, or its server is alive.
    #[error("/dev/ublkb{0} is not one of this store's, or somebody else serves it")]
    Foreign(u32),
    /// The server is ending.
    #[error("the daemon is stopping")]
    Leaving,
    /// The disk cannot be opened, and there is no device that waits for it.
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
    /// The kernel refuses.
    #[error("cannot {action}")]
    Kernel {
        /// What it was asked.
        action: &'static str,
        /// What it says.
        source: io::Error,
    },
}

impl Error {
    /// As far as a caller may act upon it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Absent | Self::TooOld => ErrorKind::Unsupported,
            Self::Exists(_) => ErrorKind::Exists,
            Self::Foreign(_) => ErrorKind::Busy,
            Self::Leaving => ErrorKind::Fenced,
            Self::Disk(error) => error.kind,
            Self::Kernel { .. } => ErrorKind::Io,
        }
    }

    pub(crate) fn kernel(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { action, source }
    }
}

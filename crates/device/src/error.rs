//! What a device may answer instead of doing its work.

use base::{ErrorKind, Pba};

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The range does not lie on the device.
    #[error("the range lies outside the device")]
    OutOfRange,
    /// No space below: a sparse file on a full file system, a full thin LUN.
    #[error("no space left below the store")]
    NoSpace,
    /// The device failed the operation, with this errno.
    #[error("the device reports errno {0}")]
    Errno(i32),
    /// The device does not do this.
    #[error("the device does not support this operation")]
    Unsupported,
    /// The device ends before the block does: something cut it off while it was open.
    #[error("the device is shorter than when it was opened")]
    Truncated,
    /// The device or the engine that drove it went away before it answered.
    #[error("the device is gone")]
    Gone,
}

/// A failed device operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause} (block {at})")]
pub struct DeviceError {
    /// Why.
    pub cause: Cause,
    /// First block of the operation; 0 for a flush.
    pub at: Pba,
}

/// EIO, and what Linux makes of errors of a medium and of failed integrity checks: ENODATA, EILSEQ.
const MEDIUM_ERRNOS: [i32; 3] = [libc::EIO, libc::ENODATA, libc::EILSEQ];

/// What Linux makes of a device that cannot be reached, does not answer in time, or answers to
/// somebody else now.
const TRANSPORT_ERRNOS: [i32; 7] = [
    libc::ENOLINK,
    libc::ETIMEDOUT,
    libc::EBADE,
    libc::ECONNRESET,
    libc::EHOSTDOWN,
    libc::EHOSTUNREACH,
    libc::ESTALE,
];

impl DeviceError {
    /// An error at a block.
    #[must_use]
    pub const fn new(cause: Cause, at: Pba) -> Self {
        Self { cause, at }
    }

    /// Whether the medium failed this block, rather than the device all of them.
    #[must_use]
    pub fn is_medium(&self) -> bool {
        matches!(self.cause, Cause::Errno(errno) if MEDIUM_ERRNOS.contains(&errno))
    }

    /// Whether the way to the device failed: when it comes back, what was not flushed may be gone
    /// (design rule 57).
    #[must_use]
    pub fn is_transport(&self) -> bool {
        match self.cause {
            Cause::Gone => true,
            Cause::Errno(errno) => TRANSPORT_ERRNOS.contains(&errno),
            Cause::OutOfRange | Cause::NoSpace | Cause::Unsupported | Cause::Truncated => false,
        }
    }

    /// As far as a caller may act upon it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self.cause {
            Cause::OutOfRange => ErrorKind::Corrupt,
            Cause::NoSpace => ErrorKind::NoSpace,
            Cause::Errno(_) | Cause::Truncated | Cause::Gone => ErrorKind::Io,
            Cause::Unsupported => ErrorKind::Unsupported,
        }
    }
}

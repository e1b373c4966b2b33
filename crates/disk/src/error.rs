//! The error of a request, and the tables from kinds to what protocols say.

use base::ErrorKind;

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DiskError {
    /// As far as a caller may act upon it.
    pub kind: ErrorKind,
    /// One sentence for people.
    pub message: std::borrow::Cow<'static, str>,
}

impl DiskError {
    /// An error with a fixed sentence.
    #[must_use]
    pub const fn new(kind: ErrorKind, message: &'static str) -> Self {
        Self { kind, message: std::borrow::Cow::Borrowed(message) }
    }

    /// An error that carries what a lower layer said.
    #[must_use]
    pub fn from_display(kind: ErrorKind, message: &impl std::fmt::Display) -> Self {
        Self { kind, message: std::borrow::Cow::Owned(message.to_string()) }
    }
}

/// The Linux errno of a kind; NBD uses the same numbers.
#[must_use]
pub const fn errno(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::Io | ErrorKind::Corrupt => 5, // EIO
        ErrorKind::Fenced => 108,                // ESHUTDOWN
        ErrorKind::NoSpace => 28,                // ENOSPC
        ErrorKind::Busy => 16,                   // EBUSY
        ErrorKind::Invalid => 22,                // EINVAL
        ErrorKind::NotFound => 2,                // ENOENT
        ErrorKind::Exists => 17,                 // EEXIST
        ErrorKind::Unsupported => 95,            // ENOTSUP
        ErrorKind::ReadOnly => 1,                // EPERM
    }
}

/// The status byte of a kind on a virtio block device (virtio 1.2, section 5.2.6): there are no more
/// of them than success (0), failure (1) and a request that the device does not know (2).
#[must_use]
pub const fn virtio_status(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Unsupported => 2,
        ErrorKind::Io
        | ErrorKind::Corrupt
        | ErrorKind::Fenced
        | ErrorKind::NoSpace
        | ErrorKind::Busy
        | ErrorKind::Invalid
        | ErrorKind::NotFound
        | ErrorKind::Exists
        | ErrorKind::ReadOnly => 1,
    }
}

//! The error of a request, and the one table from kinds to errno.

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

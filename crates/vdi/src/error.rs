//! What the engine may answer instead of doing what was asked.

use base::ErrorKind;
use disk::DiskError;

/// Why an operation on a store or a VDI failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself cannot be carried out.
    #[error("{message}")]
    Refused {
        /// As far as a caller may act upon it.
        kind: ErrorKind,
        /// What was wrong and what to do about it.
        message: String,
    },
    /// The blockstore failed.
    #[error(transparent)]
    Blockstore(#[from] blockstore::Error),
}

impl Error {
    /// A refusal.
    pub(crate) fn refused(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Refused { kind, message: message.into() }
    }

    /// As far as a caller may act upon it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { kind, .. } => *kind,
            Self::Blockstore(error) => error.kind(),
        }
    }
}

impl From<Error> for DiskError {
    fn from(error: Error) -> Self {
        Self::from_display(error.kind(), &error)
    }
}

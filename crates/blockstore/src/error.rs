//! What a blockstore may answer instead of doing what was asked.

use base::ErrorKind;
use device::DeviceError;

/// Why a blockstore operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The device failed.
    #[error("device: {0}")]
    Device(#[from] DeviceError),
    /// Stored bytes are not what they must be.
    #[error("damaged {what} at block {at}")]
    Damaged {
        /// Which structure.
        what: &'static str,
        /// Where it stands.
        at: base::Pba,
    },
    /// Something else, with what to do about it.
    #[error("{message}")]
    Refused {
        /// As far as a caller may act upon it.
        kind: ErrorKind,
        /// What was wrong and what to do about it.
        message: String,
    },
}

impl Error {
    /// A refusal.
    pub fn refused(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Refused { kind, message: message.into() }
    }

    /// As far as a caller may act upon it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Device(error) => error.kind(),
            Self::Damaged { .. } => ErrorKind::Corrupt,
            Self::Refused { kind, .. } => *kind,
        }
    }
}

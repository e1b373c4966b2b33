//! The one shape of failure.

use base::ErrorKind;
use serde::{Deserialize, Serialize};

/// Why something was not done: what a program acts upon, and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// As far as a caller may act upon it.
    pub kind: Kind,
    /// What was wrong and what to do about it.
    pub message: String,
}

/// [`ErrorKind`] as it travels, and what only a client can find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Stored bytes are not what they must be.
    Damaged,
    /// The host or handle may not write any more.
    Fenced,
    /// No free space is left.
    NoSpace,
    /// Somebody else holds what is needed.
    Busy,
    /// The request itself is wrong.
    Invalid,
    /// A named object does not exist.
    NotFound,
    /// The object exists already.
    Exists,
    /// Nothing here does that.
    Unsupported,
    /// A change was asked of something that cannot change.
    ReadOnly,
    /// No daemon answers.
    Unreachable,
    /// A stream is not whole, or not what was sent.
    Stream,
    /// The device, the system or the connection failed; also any kind that is not known here.
    #[serde(other)]
    Io,
}

impl Error {
    /// An error of `kind`.
    pub fn new(kind: impl Into<Kind>, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }

    /// A failed system call: `what` is "verb object", as in "create /srv/store".
    #[must_use]
    pub fn system(what: &str, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as System;
        let kind = match error.kind() {
            System::NotFound => Kind::NotFound,
            System::AlreadyExists => Kind::Exists,
            System::StorageFull | System::QuotaExceeded | System::FileTooLarge => Kind::NoSpace,
            System::AddrInUse | System::ResourceBusy => Kind::Busy,
            System::InvalidInput | System::IsADirectory | System::NotADirectory => Kind::Invalid,
            _ => Kind::Io,
        };
        Self { kind, message: format!("cannot {what}: {error}") }
    }
}

impl From<ErrorKind> for Kind {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Io => Self::Io,
            ErrorKind::Corrupt => Self::Damaged,
            ErrorKind::Fenced => Self::Fenced,
            ErrorKind::NoSpace => Self::NoSpace,
            ErrorKind::Busy => Self::Busy,
            ErrorKind::Invalid => Self::Invalid,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::Exists => Self::Exists,
            ErrorKind::Unsupported => Self::Unsupported,
            ErrorKind::ReadOnly => Self::ReadOnly,
        }
    }
}

impl Kind {
    /// The HTTP status under which an error of this kind travels.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Invalid | Self::Stream => 400,
            Self::ReadOnly => 403,
            Self::NotFound => 404,
            Self::Busy | Self::Exists => 409,
            Self::Unsupported => 501,
            Self::Unreachable | Self::Fenced => 503,
            Self::NoSpace => 507,
            Self::Damaged | Self::Io => 500,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_travel_as_kind_and_message() {
        let error = Error::new(ErrorKind::NoSpace, "the store is full");
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(json, r#"{"kind":"no_space","message":"the store is full"}"#);
        assert_eq!(serde_json::from_str::<Error>(&json).unwrap(), error);
    }

    #[test]
    fn a_kind_from_the_future_counts_as_io() {
        let error: Error = serde_json::from_str(r#"{"kind":"haunted","message":"boo"}"#).unwrap();
        assert_eq!(error.kind, Kind::Io);
    }
}

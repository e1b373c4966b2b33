//! Why a connection ended.

use std::io;

use crate::protocol::Malformed;

/// Why a connection ended. Only some of these are failures; [`End::is_failure`] tells.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The client said goodbye.
    #[error("the client disconnected")]
    Disconnect,
    /// The client closed the connection.
    #[error("the client closed the connection")]
    Closed,
    /// The server is being shut down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The disk is dead for good; see `Disk::severed`.
    #[error("the disk was taken away")]
    Severed,
    /// The client held memory that others waited for; see `session::Budget`.
    #[error("the client took no replies or sent no payload while others waited for room")]
    Stalled,
    /// Negotiation was not done in time.
    #[error("the client did not finish the handshake in time")]
    HandshakeTimeout,
    /// There are too many connections.
    #[error("there are too many connections")]
    TooManyConnections,
    /// The client asked for what it may not have, with an option that has no error reply.
    #[error("the client asked for an export that it cannot have")]
    Refused,
    /// The client sent more options than any client needs.
    #[error("the client sent too many options")]
    TooManyOptions,
    /// The client sent bytes after STARTTLS, which somebody in between may have injected.
    #[error("the client sent plaintext after STARTTLS")]
    PlaintextAfterStartTls,
    /// A payload that is too large to be received, in bytes.
    #[error("a payload of {0} bytes is too large")]
    PayloadTooLarge(u64),
    /// The bytes received are not NBD.
    #[error("the client sent nonsense")]
    Malformed(#[from] Malformed),
    /// The socket or TLS failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

impl End {
    /// Whether somebody did something wrong.
    pub(crate) fn is_failure(&self) -> bool {
        !matches!(self, Self::Disconnect | Self::Closed | Self::ShuttingDown | Self::Severed)
    }
}

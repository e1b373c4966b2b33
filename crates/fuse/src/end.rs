//! Why a mount is served no longer.

use std::io;

use crate::protocol::Malformed;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// It was unmounted.
    #[error("it was unmounted")]
    Unmounted,
    /// The server was told to end it; requests that were not taken wait for the next server.
    #[error("it is left to the next daemon")]
    Left,
    /// The kernel cannot be understood.
    #[error("the kernel cannot be understood")]
    Malformed(#[from] Malformed),
    /// The connection to the kernel failed.
    #[error("the connection to the kernel failed")]
    Io(#[from] io::Error),
}

//! Why a device is served no longer.

use std::io;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The device was stopped, here or by somebody else.
    #[error("it was stopped")]
    Stopped,
    /// The server was told to end; requests that were not answered wait for the next server.
    #[error("it is left to the next daemon")]
    Left,
    /// The kernel refuses to go on.
    #[error("the kernel refuses to go on")]
    Io(#[source] io::Error),
}

//! Why a connection ended.

use std::io;

use crate::memory::MapError;
use crate::protocol::Malformed;

/// Why a connection ended. Only some of these are failures; [`End::is_failure`] tells.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    /// The monitor closed the connection.
    #[error("the virtual machine monitor closed the connection")]
    Closed,
    /// The disk cannot be opened.
    #[error("cannot open the disk")]
    Disk(#[from] disk::DiskError),
    /// The guest begins anew, and the disk that it had has gone.
    #[error(
        "the disk was deleted, rolled back, shrunk or stopped; connecting again gives the new one"
    )]
    Replaced,
    /// A message makes no sense.
    #[error("the virtual machine monitor sent nonsense")]
    Malformed(#[from] Malformed),
    /// A message asks for what was not offered, or comes at the wrong time.
    #[error("the virtual machine monitor asked for {0}")]
    Refused(&'static str),
    /// Memory of the guest, or of what is in flight, cannot be mapped.
    #[error("cannot map memory of the virtual machine")]
    Memory(#[from] MapError),
    /// The socket or an eventfd failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
}

impl End {
    /// Whether somebody did something wrong.
    pub(crate) fn is_failure(&self) -> bool {
        !matches!(self, Self::Closed)
    }
}

//! The stream that carries a snapshot from one store to another: what `parallax send` writes and
//! `parallax receive` reads. docs/send-stream.md is its description, byte by byte.
//!
//! - A stream is a header (`header.rs`), frames in order of offset, and an end (`frame.rs`). Each has
//!   a checksum that goes on from that of the one before: what is cut, altered, left out, repeated or
//!   in another order is refused, and where.
//! - Whatever the bytes are, nothing here panics, or allocates more than a frame may have. Before
//!   the payload of a frame is read, its header has been verified: a reader never waits for bytes
//!   because a length was altered.
//! - The checksums find accidents. Against people who alter streams on purpose they do nothing: that
//!   is up to who carries them, such as ssh.
//!
//! It knows no disk and no daemon: `writer.rs` makes bytes, `reader.rs` takes them from any
//! [`std::io::Read`], `pack.rs` compresses and uncompresses what a frame has. `progress.rs` is how far
//! a receive has come that was cut short.

mod frame;
mod header;
mod pack;
mod progress;
mod reader;
mod writer;

pub use frame::{Encoding, FRAME_DATA_BYTES_MAX, FRAME_HEADER_BYTES, Frame, Packed};
pub use header::{Header, LABEL_BYTES_MAX, NAME_BYTES_MAX, STREAM_HEADER_BYTES, VERSION};
pub use pack::{LEVEL_DEFAULT, LEVEL_MAX, LEVEL_MIN, Packer, Unpacker};
pub use progress::{PROGRESS_BYTES, Progress};
pub use reader::Reader;
pub use writer::Writer;

#[cfg(test)]
mod tests;

/// Why a stream is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be read.
    #[error("cannot read the stream")]
    Io(#[source] std::io::Error),
    /// It begins like something else.
    #[error("this is not a stream of `parallax send`")]
    NotAStream,
    /// It ends before its end: the connection broke, or who sent it was stopped.
    #[error("the stream was cut short")]
    Cut,
    /// It is of a version that is not known here.
    #[error("the stream has version {0}, and this program knows version {VERSION}: upgrade it")]
    Version(u32),
    /// Bytes were altered, left out, repeated or moved.
    #[error("the stream is damaged: the checksum of its {0} does not match")]
    Checksum(&'static str),
    /// Its bytes verify, and make no sense.
    #[error("the stream makes no sense: {0}")]
    Invalid(&'static str),
    /// Something follows its end.
    #[error("the stream goes on behind its end")]
    Trailing,
}

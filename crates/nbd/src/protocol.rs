//! The NBD wire protocol as pure functions: bytes in, values out, and back. No I/O and no policy.
//!
//! Sources: `doc/proto.md` of the NetworkBlockDevice project, and its branch
//! `extension-ext-header` for extended headers. All integers on the wire are big-endian.
//!
//! - Nothing here panics or allocates by a number that a peer sent, whatever the bytes are.
//! - Each message can be encoded and decoded, so that tests, fuzz targets and load generators use
//!   the same code as a client.

pub mod handshake;
pub mod reply;
pub mod request;

/// Longest string that the protocol allows, in bytes: names, queries, messages.
pub const STRING_BYTES_MAX: usize = 4096;

/// Largest payload of a read or write in bytes, as advertised. The protocol asks every server for
/// at least this much.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// The metadata context that tells data, zeroes and holes apart.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The identifier under which this server offers [`BASE_ALLOCATION`].
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Bits of `base:allocation` status: the range occupies no space.
pub const STATE_HOLE: u32 = 1;

/// Bits of `base:allocation` status: the range reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// How messages of the transmission phase are framed, by what the client negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; reads and block status are answered in chunks.
    Structured,
    /// Extended requests with 64-bit lengths; everything is answered in extended chunks.
    Extended,
}

/// Bytes that are no NBD message. The connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The magic number is wrong: the peer lost its place in the stream, or speaks something else.
    #[error("wrong magic number {0:#x}")]
    Magic(u64),
    /// A length or count does not fit the message that it stands in.
    #[error("a length in the message does not fit the message")]
    Length,
    /// A string is not UTF-8, or is longer than [`STRING_BYTES_MAX`].
    #[error("a string is not UTF-8 or is too long")]
    Text,
}

/// Flags of the transmission phase, sent with the size of the export.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and NO_HOLE are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is understood; only with structured replies or extended headers.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload that selects contexts; only with extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Error numbers that may stand in a reply.
pub mod error {
    /// Operation not permitted: a write to a read-only export.
    pub const EPERM: u32 = 1;
    /// Input/output error.
    pub const EIO: u32 = 5;
    /// Invalid argument.
    pub const EINVAL: u32 = 22;
    /// No space left, or a write beyond the end.
    pub const ENOSPC: u32 = 28;
    /// Not supported: a zeroing that would not be fast.
    pub const ENOTSUP: u32 = 95;
    /// The server or the export is going away.
    pub const ESHUTDOWN: u32 = 108;
}

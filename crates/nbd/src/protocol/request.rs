//! Requests of the transmission phase.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Framing, Malformed};

/// First bytes of a compact request.
pub const COMPACT_MAGIC: u32 = 0x2560_9513;

/// First bytes of an extended request.
pub const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Bits of [`Header::flags`].
pub mod flag {
    /// Complete only when durable.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES: keep the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: answer in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: answer with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of a payload, which follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reads bytes.
    Read,
    /// Writes the payload.
    Write,
    /// Ends the session; has no reply.
    Disconnect,
    /// Makes completed writes durable.
    Flush,
    /// Forgets a range.
    Trim,
    /// Announces that a range will be read.
    Cache,
    /// Zeroes a range.
    WriteZeroes,
    /// Asks what is allocated.
    BlockStatus,
}

const COMMANDS: [(u16, Command); 8] = [
    (0, Command::Read),
    (1, Command::Write),
    (2, Command::Disconnect),
    (3, Command::Flush),
    (4, Command::Trim),
    (5, Command::Cache),
    (6, Command::WriteZeroes),
    (7, Command::BlockStatus),
];

impl Command {
    /// The command with this number, if it is known.
    #[must_use]
    pub fn from_wire(number: u16) -> Option<Self> {
        COMMANDS.get(usize::from(number)).map(|&(_, command)| command)
    }

    /// Its number.
    #[must_use]
    pub fn to_wire(self) -> u16 {
        COMMANDS
            .iter()
            .find(|(_, command)| *command == self)
            .map_or(u16::MAX, |&(number, _)| number)
    }
}

/// The fixed part of a request, in either framing. Only the magic number has been verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bits of [`flag`].
    pub flags: u16,
    /// Number of the command; see [`Command::from_wire`].
    pub command: u16,
    /// Names the request in its replies; opaque.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range, or of the payload; see [`Header::payload_bytes`].
    pub length: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CompactWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtendedWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// Bytes of a compact request without its payload.
pub const COMPACT_BYTES: usize = 28;

/// Bytes of an extended request without its payload.
pub const EXTENDED_BYTES: usize = 32;

const _: () = assert!(size_of::<CompactWire>() == COMPACT_BYTES);
const _: () = assert!(size_of::<ExtendedWire>() == EXTENDED_BYTES);

impl Header {
    /// Bytes of a header in this framing.
    #[must_use]
    pub const fn wire_bytes(framing: Framing) -> usize {
        match framing {
            Framing::Simple | Framing::Structured => COMPACT_BYTES,
            Framing::Extended => EXTENDED_BYTES,
        }
    }

    /// Reads the header at the start of `bytes`; `None` if it is not there in full yet.
    ///
    /// # Errors
    /// `Malformed::Magic`.
    pub fn decode(framing: Framing, bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let (magic, expected, header) = match framing {
            Framing::Simple | Framing::Structured => {
                let Ok((wire, _)) = CompactWire::ref_from_prefix(bytes) else { return Ok(None) };
                let header = Self {
                    flags: wire.flags.get(),
                    command: wire.command.get(),
                    cookie: wire.cookie.get(),
                    offset: wire.offset.get(),
                    length: u64::from(wire.length.get()),
                };
                (wire.magic.get(), COMPACT_MAGIC, header)
            }
            Framing::Extended => {
                let Ok((wire, _)) = ExtendedWire::ref_from_prefix(bytes) else { return Ok(None) };
                let header = Self {
                    flags: wire.flags.get(),
                    command: wire.command.get(),
                    cookie: wire.cookie.get(),
                    offset: wire.offset.get(),
                    length: wire.length.get(),
                };
                (wire.magic.get(), EXTENDED_MAGIC, header)
            }
        };
        if magic == expected { Ok(Some(header)) } else { Err(Malformed::Magic(u64::from(magic))) }
    }

    /// Appends the header to `out`. A length above 32 bits is cut in compact framing.
    pub fn encode(&self, framing: Framing, out: &mut Vec<u8>) {
        let (flags, command) = (U16::new(self.flags), U16::new(self.command));
        let (cookie, offset) = (U64::new(self.cookie), U64::new(self.offset));
        match framing {
            Framing::Simple | Framing::Structured => {
                let magic = U32::new(COMPACT_MAGIC);
                let length = U32::new(u32::try_from(self.length).unwrap_or(u32::MAX));
                let wire = CompactWire { magic, flags, command, cookie, offset, length };
                out.extend_from_slice(wire.as_bytes());
            }
            Framing::Extended => {
                let magic = U32::new(EXTENDED_MAGIC);
                let length = U64::new(self.length);
                let wire = ExtendedWire { magic, flags, command, cookie, offset, length };
                out.extend_from_slice(wire.as_bytes());
            }
        }
    }

    /// Bytes that follow the header: of a write always, of other commands if a flag says so, which
    /// exists with extended headers only. The flag is mandatory for writes too, but QEMU (10.0)
    /// leaves it out and sends the payload, and its server takes it like that; so must we.
    #[must_use]
    pub fn payload_bytes(&self, framing: Framing) -> u64 {
        let has_payload = self.command == Command::Write.to_wire()
            || framing == Framing::Extended && self.flags & flag::PAYLOAD_LEN != 0;
        if has_payload { self.length } else { 0 }
    }
}

/// The payload form of BLOCK_STATUS: a range, and the contexts that the client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusPayload {
    /// Bytes of the range.
    pub length: u64,
    /// Identifiers of contexts.
    pub contexts: Vec<u32>,
}

/// Largest [`StatusPayload`] worth reading: this server has one context, so that a client that
/// sends more than 64 identifiers repeats itself and is refused anyway.
pub const STATUS_PAYLOAD_BYTES_MAX: usize = 8 + 64 * 4;

impl StatusPayload {
    /// Reads a payload.
    ///
    /// # Errors
    /// `Malformed::Length`.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (length, rest) = U64::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
        if !rest.len().is_multiple_of(4) || bytes.len() > STATUS_PAYLOAD_BYTES_MAX {
            return Err(Malformed::Length);
        }
        let contexts = rest.chunks_exact(4).filter_map(|id| U32::read_from_bytes(id).ok());
        Ok(Self { length: length.get(), contexts: contexts.map(U32::get).collect() })
    }

    /// Appends the payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.length.to_be_bytes());
        for context in &self.contexts {
            out.extend_from_slice(&context.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn commands_are_numbered_by_their_place() {
        for (place, (number, command)) in COMMANDS.iter().enumerate() {
            assert_eq!(usize::from(*number), place);
            assert_eq!(Command::from_wire(command.to_wire()), Some(*command));
        }
        assert_eq!(Command::from_wire(8), None);
    }

    #[test]
    fn a_compact_read_looks_as_the_specification_says() {
        let header = Header { flags: 4, command: 0, cookie: 7, offset: 512, length: 4096 };
        let mut bytes = Vec::new();
        header.encode(Framing::Structured, &mut bytes);
        let expected = "25609513 0004 0000 0000000000000007 0000000000000200 00001000";
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.replace(' ', ""));
    }

    #[test]
    fn what_has_a_payload() {
        let write = Header { flags: 0, command: 1, cookie: 0, offset: 0, length: 9 };
        assert_eq!(write.payload_bytes(Framing::Simple), 9);
        assert_eq!(write.payload_bytes(Framing::Extended), 9);
        let flagged = Header { flags: flag::PAYLOAD_LEN, command: 3, ..write };
        assert_eq!(flagged.payload_bytes(Framing::Extended), 9);
        assert_eq!(flagged.payload_bytes(Framing::Structured), 0);
    }

    fn headers() -> impl Strategy<Value = Header> {
        (any::<u16>(), any::<u16>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
            |(flags, command, cookie, offset, length)| Header {
                flags,
                command,
                cookie,
                offset,
                length,
            },
        )
    }

    proptest! {
        #[test]
        fn headers_round_trip(header in headers(), rest in proptest::collection::vec(any::<u8>(), 0..40)) {
            let compact = Header { length: header.length & 0xffff_ffff, ..header };
            for (framing, header) in [
                (Framing::Simple, compact),
                (Framing::Structured, compact),
                (Framing::Extended, header),
            ] {
                let mut bytes = Vec::new();
                header.encode(framing, &mut bytes);
                prop_assert_eq!(bytes.len(), Header::wire_bytes(framing));
                prop_assert_eq!(Header::decode(framing, &bytes[..bytes.len() - 1]), Ok(None));
                bytes.extend_from_slice(&rest);
                prop_assert_eq!(Header::decode(framing, &bytes), Ok(Some(header)));
                bytes[0] ^= 0x80;
                prop_assert!(Header::decode(framing, &bytes).is_err());
            }
        }

        #[test]
        fn status_payloads_round_trip(
            length in any::<u64>(),
            contexts in proptest::collection::vec(any::<u32>(), 0..64),
        ) {
            let payload = StatusPayload { length, contexts };
            let mut bytes = Vec::new();
            payload.encode(&mut bytes);
            prop_assert_eq!(StatusPayload::decode(&bytes), Ok(payload));
            bytes.push(0);
            prop_assert_eq!(StatusPayload::decode(&bytes), Err(Malformed::Length));
        }
    }
}

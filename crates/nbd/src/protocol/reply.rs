//! Replies of the transmission phase.
//!
//! A server writes headers with [`simple`], [`chunk`] and the functions for fixed payload parts
//! straight into the buffer that is sent; a client reads them with [`Reply::decode`].

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Framing, Malformed, STRING_BYTES_MAX};

/// First bytes of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;

/// First bytes of a structured reply chunk.
pub const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

/// First bytes of an extended reply chunk.
pub const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

/// The chunk is the last of its reply.
pub const FLAG_DONE: u16 = 1;

/// Largest reply header with the fixed part of its payload, in bytes.
pub const HEADER_BYTES_MAX: usize = size_of::<ExtendedWire>() + size_of::<HoleWire>();

/// Types of chunks.
pub mod kind {
    /// Nothing; ends a reply.
    pub const NONE: u16 = 0;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a number of zero bytes.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context and extents of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// A context and extents of 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error and a message.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// An error, a message and an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SimpleWire {
    magic: U32,
    error: U32,
    cookie: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StructuredWire {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtendedWire {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HoleWire {
    offset: U64,
    length: U32,
}

const _: () = assert!(size_of::<SimpleWire>() == 16);
const _: () = assert!(size_of::<StructuredWire>() == 20);
const _: () = assert!(size_of::<ExtendedWire>() == 32);
const _: () = assert!(size_of::<HoleWire>() == 12);

/// A few bytes on the stack: a header with the fixed part of its payload.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEADER_BYTES_MAX],
    length: usize,
}

impl Head {
    fn new() -> Self {
        Self { bytes: [0; HEADER_BYTES_MAX], length: 0 }
    }

    fn push(&mut self, part: &[u8]) {
        let end = self.length + part.len();
        if let Some(to) = self.bytes.get_mut(self.length..end) {
            to.copy_from_slice(part);
            self.length = end;
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// What every chunk of a reply repeats from the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Framing of the session; chunks exist in `Structured` and `Extended` only.
    pub framing: Framing,
    /// Cookie of the request.
    pub cookie: u64,
    /// Offset of the request.
    pub offset: u64,
}

/// A simple reply; data of a read follows it.
#[must_use]
pub fn simple(cookie: u64, error: u32) -> Head {
    let wire = SimpleWire {
        magic: U32::new(SIMPLE_MAGIC),
        error: U32::new(error),
        cookie: U64::new(cookie),
    };
    let mut head = Head::new();
    head.push(wire.as_bytes());
    head
}

/// The header of a chunk with `length` bytes of payload, which follow it.
#[must_use]
pub fn chunk(origin: &Origin, flags: u16, kind: u16, length: u32) -> Head {
    let (flags, kind) = (U16::new(flags), U16::new(kind));
    let cookie = U64::new(origin.cookie);
    let mut head = Head::new();
    if origin.framing == Framing::Extended {
        let magic = U32::new(EXTENDED_MAGIC);
        let (offset, length) = (U64::new(origin.offset), U64::new(u64::from(length)));
        head.push(ExtendedWire { magic, flags, kind, cookie, offset, length }.as_bytes());
    } else {
        let (magic, length) = (U32::new(STRUCTURED_MAGIC), U32::new(length));
        head.push(StructuredWire { magic, flags, kind, cookie, length }.as_bytes());
    }
    head
}

/// The start of a chunk of `length` bytes of data, which follow it.
#[must_use]
pub fn data(origin: &Origin, flags: u16, offset: u64, length: u32) -> Head {
    let mut head = chunk(origin, flags, kind::OFFSET_DATA, length.saturating_add(8));
    head.push(U64::new(offset).as_bytes());
    head
}

/// A whole chunk that says that `length` bytes read as zeroes.
#[must_use]
pub fn hole(origin: &Origin, flags: u16, offset: u64, length: u32) -> Head {
    let mut head = chunk(origin, flags, kind::OFFSET_HOLE, 12);
    head.push(HoleWire { offset: U64::new(offset), length: U32::new(length) }.as_bytes());
    head
}

/// Appends the payload of an error chunk; the message is cut at a quarter of the protocol's limit.
pub fn encode_error(error: u32, message: &str, out: &mut Vec<u8>) {
    let end = message.floor_char_boundary(STRING_BYTES_MAX / 4);
    let message = message.get(..end).unwrap_or_default();
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// An extent of a block status reply: bytes and state bits.
pub type StatusExtent = (u64, u32);

/// Appends the payload of a block status chunk and tells its type. `Structured` framing has
/// lengths of 32 bits: a longer extent is cut there, and whatever follows it left out.
pub fn encode_status(
    framing: Framing,
    context: u32,
    extents: impl ExactSizeIterator<Item = StatusExtent>,
    out: &mut Vec<u8>,
) -> u16 {
    out.extend_from_slice(&context.to_be_bytes());
    if framing == Framing::Extended {
        let count = u32::try_from(extents.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for (length, state) in extents {
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&u64::from(state).to_be_bytes());
        }
        return kind::BLOCK_STATUS_EXT;
    }
    for (length, state) in extents {
        // A multiple of the block size, as the protocol asks for.
        let short = u32::try_from(length).unwrap_or(u32::MAX - 4095);
        out.extend_from_slice(&short.to_be_bytes());
        out.extend_from_slice(&state.to_be_bytes());
        if u64::from(short) != length {
            break;
        }
    }
    kind::BLOCK_STATUS
}

/// A reply header as a client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply. If `error` is 0 and the request was a read, its data follows.
    Simple {
        /// Cookie of the request.
        cookie: u64,
        /// 0 or an error number.
        error: u32,
    },
    /// A chunk; its payload follows.
    Chunk {
        /// Cookie of the request.
        cookie: u64,
        /// [`FLAG_DONE`] or 0.
        flags: u16,
        /// See [`kind`].
        kind: u16,
        /// Offset of the request; in extended framing only.
        offset: Option<u64>,
        /// Bytes of payload.
        length: u64,
    },
}

impl Reply {
    /// Reads the header at the start of `bytes`, of whichever framing its magic number says, and
    /// tells how long it is; `None` if it is not there in full yet.
    ///
    /// # Errors
    /// `Malformed::Magic`.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let Ok((magic, _)) = U32::read_from_prefix(bytes) else { return Ok(None) };
        let decoded = match magic.get() {
            SIMPLE_MAGIC => SimpleWire::ref_from_prefix(bytes).ok().map(|(wire, _)| {
                let reply = Self::Simple { cookie: wire.cookie.get(), error: wire.error.get() };
                (reply, size_of::<SimpleWire>())
            }),
            STRUCTURED_MAGIC => StructuredWire::ref_from_prefix(bytes).ok().map(|(wire, _)| {
                let reply = Self::Chunk {
                    cookie: wire.cookie.get(),
                    flags: wire.flags.get(),
                    kind: wire.kind.get(),
                    offset: None,
                    length: u64::from(wire.length.get()),
                };
                (reply, size_of::<StructuredWire>())
            }),
            EXTENDED_MAGIC => ExtendedWire::ref_from_prefix(bytes).ok().map(|(wire, _)| {
                let reply = Self::Chunk {
                    cookie: wire.cookie.get(),
                    flags: wire.flags.get(),
                    kind: wire.kind.get(),
                    offset: Some(wire.offset.get()),
                    length: wire.length.get(),
                };
                (reply, size_of::<ExtendedWire>())
            }),
            other => return Err(Malformed::Magic(u64::from(other))),
        };
        Ok(decoded)
    }
}

/// The payload of a chunk as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// Nothing.
    None,
    /// Data at an offset.
    Data(u64, &'a [u8]),
    /// So many zero bytes at an offset.
    Hole(u64, u32),
    /// Extents of a context.
    Status(u32, Vec<StatusExtent>),
    /// An error number and a message.
    Error(u32, &'a str),
}

impl<'a> Payload<'a> {
    /// Reads a payload of this type. Error chunks of unknown types are errors without a place.
    ///
    /// # Errors
    /// `Malformed`.
    pub fn decode(kind: u16, bytes: &'a [u8]) -> Result<Self, Malformed> {
        match kind {
            kind::NONE if bytes.is_empty() => Ok(Self::None),
            kind::OFFSET_DATA => {
                let (offset, data) = U64::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
                if data.is_empty() {
                    Err(Malformed::Length)
                } else {
                    Ok(Self::Data(offset.get(), data))
                }
            }
            kind::OFFSET_HOLE => {
                let wire = HoleWire::read_from_bytes(bytes).map_err(|_| Malformed::Length)?;
                Ok(Self::Hole(wire.offset.get(), wire.length.get()))
            }
            kind::BLOCK_STATUS => {
                let (context, rest) =
                    U32::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
                let extents = <[[U32; 2]]>::ref_from_bytes(rest).map_err(|_| Malformed::Length)?;
                let extents =
                    extents.iter().map(|[length, state]| (length.get().into(), state.get()));
                Ok(Self::Status(context.get(), extents.collect()))
            }
            kind::BLOCK_STATUS_EXT => {
                let ([context, count], rest) =
                    <[U32; 2]>::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
                let extents = <[[U64; 2]]>::ref_from_bytes(rest).map_err(|_| Malformed::Length)?;
                if usize::try_from(count.get()) != Ok(extents.len()) {
                    return Err(Malformed::Length);
                }
                let extents = extents.iter().map(|[length, state]| {
                    // Only 32 bits of `base:` contexts have a meaning.
                    (length.get(), u32::try_from(state.get()).unwrap_or(u32::MAX))
                });
                Ok(Self::Status(context.get(), extents.collect()))
            }
            kind if kind & (1 << 15) != 0 => {
                let (error, rest) = U32::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
                let (length, rest) = U16::read_from_prefix(rest).map_err(|_| Malformed::Length)?;
                let text = rest.get(..usize::from(length.get())).ok_or(Malformed::Length)?;
                let text = std::str::from_utf8(text).map_err(|_| Malformed::Text)?;
                Ok(Self::Error(error.get(), text))
            }
            _ => Err(Malformed::Length),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_chunk(bytes: &[u8]) -> (Reply, Payload<'_>) {
        let (reply, used) = Reply::decode(bytes).unwrap().unwrap();
        let Reply::Chunk { kind, length, .. } = reply else { panic!("{reply:?}") };
        let payload = &bytes[used..];
        assert_eq!(payload.len() as u64, length, "the header tells the length of the payload");
        (reply, Payload::decode(kind, payload).unwrap())
    }

    proptest! {
        #[test]
        fn simple_replies_round_trip(cookie in any::<u64>(), error in any::<u32>()) {
            let head = simple(cookie, error);
            prop_assert_eq!(
                Reply::decode(head.bytes()),
                Ok(Some((Reply::Simple { cookie, error }, 16)))
            );
        }

        #[test]
        fn chunks_round_trip(
            cookie in any::<u64>(), at in any::<u64>(), offset in any::<u64>(),
            length in 1u32..100_000, extended in any::<bool>(), done in any::<bool>(),
            extents in proptest::collection::vec((1..u64::from(u32::MAX), 0u32..4), 1..50),
            message in ".{0,200}",
        ) {
            let framing = if extended { Framing::Extended } else { Framing::Structured };
            let origin = Origin { framing, cookie, offset: at };
            let flags = u16::from(done);

            let mut bytes = data(&origin, flags, offset, length).bytes().to_vec();
            bytes.resize(bytes.len() + length as usize, 7);
            let (reply, payload) = decode_chunk(&bytes);
            let expected_offset = extended.then_some(at);
            let Reply::Chunk { cookie: c, flags: f, offset: o, .. } = reply else {
                panic!("{reply:?}")
            };
            prop_assert_eq!((c, f, o), (cookie, flags, expected_offset));
            prop_assert_eq!(payload, Payload::Data(offset, &vec![7; length as usize][..]));

            let head = hole(&origin, flags, offset, length);
            prop_assert_eq!(decode_chunk(head.bytes()).1, Payload::Hole(offset, length));

            let mut payload = Vec::new();
            let kind = encode_status(framing, 9, extents.iter().copied(), &mut payload);
            let mut bytes = chunk(&origin, flags, kind, u32::try_from(payload.len()).unwrap()).bytes().to_vec();
            bytes.extend(payload);
            prop_assert_eq!(decode_chunk(&bytes).1, Payload::Status(9, extents));

            let mut payload = Vec::new();
            encode_error(22, &message, &mut payload);
            let mut bytes =
                chunk(&origin, flags, kind::ERROR, u32::try_from(payload.len()).unwrap()).bytes().to_vec();
            bytes.extend(payload);
            prop_assert_eq!(decode_chunk(&bytes).1, Payload::Error(22, &message));
        }

        #[test]
        fn nonsense_is_refused_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), kind in any::<u16>(),
        ) {
            let _ = Reply::decode(&bytes);
            let _ = Payload::decode(kind, &bytes);
            for kind in 0..7 {
                let _ = Payload::decode(kind, &bytes);
            }
        }
    }

    #[test]
    fn long_extents_are_cut_in_structured_framing_and_whole_in_extended() {
        let extents = [(1u64 << 40, 3), (4096, 0)];
        let mut out = Vec::new();
        let kind = encode_status(Framing::Structured, 1, extents.into_iter(), &mut out);
        let cut = u64::from(u32::MAX - 4095);
        assert_eq!(Payload::decode(kind, &out), Ok(Payload::Status(1, vec![(cut, 3)])));
        assert_eq!(cut % 4096, 0);
        out.clear();
        let kind = encode_status(Framing::Extended, 1, extents.into_iter(), &mut out);
        assert_eq!(Payload::decode(kind, &out), Ok(Payload::Status(1, extents.to_vec())));
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let mut out = Vec::new();
        encode_error(5, &"ä".repeat(5000), &mut out);
        assert_eq!(Payload::decode(kind::ERROR, &out), Ok(Payload::Error(5, &"ä".repeat(512))));
    }
}

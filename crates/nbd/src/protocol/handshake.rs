//! The handshake: greeting, options, and replies to options.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Malformed, STRING_BYTES_MAX};

/// First bytes of the greeting: `NBDMAGIC`.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;

/// `IHAVEOPT`: ends the greeting of a newstyle server and starts every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

/// Starts every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag, of server and client: fixed newstyle negotiation.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;

/// Handshake flag, of server and client: no 124 zero bytes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Bytes of padding in the reply to EXPORT_NAME unless [`FLAG_NO_ZEROES`] was agreed.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Numbers of options.
pub mod option {
    /// Selects an export and starts the transmission phase; cannot report errors.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Lists exports.
    pub const LIST: u32 = 3;
    /// Starts TLS.
    pub const STARTTLS: u32 = 5;
    /// Describes an export.
    pub const INFO: u32 = 6;
    /// Selects an export and starts the transmission phase.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Selects metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options. Errors have bit 31 set.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// Something about an export; see [`super::info`].
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Forbidden by configuration.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// The server cannot do it, here or now.
    pub const ERR_PLATFORM: u32 = (1 << 31) + 4;
    /// STARTTLS must come first.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is being shut down.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The option is too large.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    /// Extended headers were agreed, which excludes this option.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Types of [`reply::INFO`].
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// A sentence for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum and preferred block size, maximum payload.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Appends the greeting of a server.
pub fn encode_greeting(out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
}

/// What a client answers to the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// Options other than EXPORT_NAME may be used.
    pub fixed_newstyle: bool,
    /// No padding after EXPORT_NAME.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Bytes on the wire.
    pub const BYTES: usize = 4;

    /// Reads the flags.
    ///
    /// # Errors
    /// `Malformed::Magic` if a bit is set that the server did not offer.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, Malformed> {
        let bits = u32::from_be_bytes(bytes);
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if bits & !known != 0 {
            return Err(Malformed::Magic(u64::from(bits)));
        }
        Ok(Self {
            fixed_newstyle: bits & u32::from(FLAG_FIXED_NEWSTYLE) != 0,
            no_zeroes: bits & u32::from(FLAG_NO_ZEROES) != 0,
        })
    }

    /// Appends the flags to `out`.
    pub fn encode(self, out: &mut Vec<u8>) {
        let fixed = if self.fixed_newstyle { FLAG_FIXED_NEWSTYLE } else { 0 };
        let no_zeroes = if self.no_zeroes { FLAG_NO_ZEROES } else { 0 };
        out.extend_from_slice(&u32::from(fixed | no_zeroes).to_be_bytes());
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OptionWire {
    magic: U64,
    option: U32,
    length: U32,
}

/// The fixed part of an option; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// See [`option`].
    pub option: u32,
    /// Bytes of data.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<OptionWire>();

    /// Reads the header at the start of `bytes`; `None` if it is not there in full yet.
    ///
    /// # Errors
    /// `Malformed::Magic`.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Ok((wire, _)) = OptionWire::ref_from_prefix(bytes) else { return Ok(None) };
        if wire.magic.get() != OPTION_MAGIC {
            return Err(Malformed::Magic(wire.magic.get()));
        }
        Ok(Some(Self { option: wire.option.get(), length: wire.length.get() }))
    }
}

/// Appends an option with its data.
pub fn encode_option(option: u32, data: &[u8], out: &mut Vec<u8>) {
    let length = U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX));
    let wire = OptionWire { magic: U64::new(OPTION_MAGIC), option: U32::new(option), length };
    out.extend_from_slice(wire.as_bytes());
    out.extend_from_slice(data);
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct OptionReplyWire {
    magic: U64,
    option: U32,
    kind: U32,
    length: U32,
}

/// The fixed part of a reply to an option; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// See [`reply`].
    pub kind: u32,
    /// Bytes of data.
    pub length: u32,
}

impl OptionReply {
    /// Bytes on the wire.
    pub const BYTES: usize = size_of::<OptionReplyWire>();

    /// Reads the header at the start of `bytes`; `None` if it is not there in full yet.
    ///
    /// # Errors
    /// `Malformed::Magic`.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Ok((wire, _)) = OptionReplyWire::ref_from_prefix(bytes) else { return Ok(None) };
        if wire.magic.get() != OPTION_REPLY_MAGIC {
            return Err(Malformed::Magic(wire.magic.get()));
        }
        let (option, kind, length) = (wire.option.get(), wire.kind.get(), wire.length.get());
        Ok(Some(Self { option, kind, length }))
    }
}

/// Appends a reply to `option`.
pub fn encode_reply(option: u32, kind: u32, data: &[u8], out: &mut Vec<u8>) {
    let wire = OptionReplyWire {
        magic: U64::new(OPTION_REPLY_MAGIC),
        option: U32::new(option),
        kind: U32::new(kind),
        length: U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX)),
    };
    out.extend_from_slice(wire.as_bytes());
    out.extend_from_slice(data);
}

/// Data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRequest<'a> {
    /// Name of the export; empty for the default one.
    pub name: &'a str,
    /// Which of [`info`] the client asks for.
    pub infos: Vec<u16>,
}

impl<'a> ExportRequest<'a> {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// `Malformed::Length` or `Malformed::Text`.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let (name, rest) = take_string(data)?;
        let (count, rest) = U16::read_from_prefix(rest).map_err(|_| Malformed::Length)?;
        let infos = <[U16]>::ref_from_bytes(rest).map_err(|_| Malformed::Length)?;
        if infos.len() != usize::from(count.get()) {
            return Err(Malformed::Length);
        }
        Ok(Self { name, infos: infos.iter().map(|info| info.get()).collect() })
    }

    /// Appends the data to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_string(self.name, out);
        out.extend_from_slice(&u16::try_from(self.infos.len()).unwrap_or(u16::MAX).to_be_bytes());
        for info in &self.infos {
            out.extend_from_slice(&info.to_be_bytes());
        }
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// What is asked for, `namespace:leaf`.
    pub queries: Vec<&'a str>,
}

impl<'a> ContextRequest<'a> {
    /// Reads the data of an option.
    ///
    /// # Errors
    /// `Malformed::Length` or `Malformed::Text`.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let (name, rest) = take_string(data)?;
        let (count, mut rest) = U32::read_from_prefix(rest).map_err(|_| Malformed::Length)?;
        // Not `with_capacity(count)`: the number is the peer's. Each query takes 4 bytes at least.
        let mut queries = Vec::new();
        for _ in 0..count.get() {
            let (query, after) = take_string(rest)?;
            queries.push(query);
            rest = after;
        }
        if rest.is_empty() { Ok(Self { name, queries }) } else { Err(Malformed::Length) }
    }

    /// Appends the data to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_string(self.name, out);
        let count = u32::try_from(self.queries.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for query in &self.queries {
            put_string(query, out);
        }
    }
}

/// Appends the data of [`reply::SERVER`].
pub fn encode_server(name: &str, description: &str, out: &mut Vec<u8>) {
    put_string(name, out);
    out.extend_from_slice(description.as_bytes());
}

/// Reads the data of [`reply::SERVER`]: name and description.
///
/// # Errors
/// `Malformed::Length` or `Malformed::Text`.
pub fn decode_server(data: &[u8]) -> Result<(&str, &str), Malformed> {
    let (name, rest) = take_string(data)?;
    Ok((name, std::str::from_utf8(rest).map_err(|_| Malformed::Text)?))
}

/// Appends the data of [`reply::META_CONTEXT`].
pub fn encode_context(id: u32, name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

/// Reads the data of [`reply::META_CONTEXT`]: identifier and name.
///
/// # Errors
/// `Malformed::Length` or `Malformed::Text`.
pub fn decode_context(data: &[u8]) -> Result<(u32, &str), Malformed> {
    let (id, rest) = U32::read_from_prefix(data).map_err(|_| Malformed::Length)?;
    Ok((id.get(), std::str::from_utf8(rest).map_err(|_| Malformed::Text)?))
}

/// Data of [`reply::INFO`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size in bytes and bits of [`super::transmission`].
    Export {
        /// Bytes.
        size: u64,
        /// Bits.
        flags: u16,
    },
    /// Canonical name.
    Name(&'a str),
    /// A sentence for people.
    Description(&'a str),
    /// All in bytes.
    BlockSize {
        /// Smallest length and alignment.
        minimum: u32,
        /// Smallest length and alignment that is fast.
        preferred: u32,
        /// Largest payload.
        payload_max: u32,
    },
}

impl<'a> Info<'a> {
    /// Reads the data; `None` for an unknown type.
    ///
    /// # Errors
    /// `Malformed::Length` or `Malformed::Text`.
    pub fn decode(data: &'a [u8]) -> Result<Option<Self>, Malformed> {
        let (kind, rest) = U16::read_from_prefix(data).map_err(|_| Malformed::Length)?;
        let text = || std::str::from_utf8(rest).map_err(|_| Malformed::Text);
        Ok(Some(match kind.get() {
            info::EXPORT => {
                let (size, rest) = U64::read_from_prefix(rest).map_err(|_| Malformed::Length)?;
                let flags = U16::read_from_bytes(rest).map_err(|_| Malformed::Length)?;
                Self::Export { size: size.get(), flags: flags.get() }
            }
            info::NAME => Self::Name(text()?),
            info::DESCRIPTION => Self::Description(text()?),
            info::BLOCK_SIZE => {
                let [minimum, preferred, payload_max] =
                    <[U32; 3]>::read_from_bytes(rest).map_err(|_| Malformed::Length)?;
                Self::BlockSize {
                    minimum: minimum.get(),
                    preferred: preferred.get(),
                    payload_max: payload_max.get(),
                }
            }
            _ => return Ok(None),
        }))
    }

    /// Appends the data to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Export { size, flags } => {
                out.extend_from_slice(&info::EXPORT.to_be_bytes());
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
            Self::Name(name) => {
                out.extend_from_slice(&info::NAME.to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            Self::Description(text) => {
                out.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
                out.extend_from_slice(text.as_bytes());
            }
            Self::BlockSize { minimum, preferred, payload_max } => {
                out.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
                for value in [minimum, preferred, payload_max] {
                    out.extend_from_slice(&value.to_be_bytes());
                }
            }
        }
    }
}

/// Reads a string that a 32-bit length precedes.
fn take_string(bytes: &[u8]) -> Result<(&str, &[u8]), Malformed> {
    let (length, rest) = U32::read_from_prefix(bytes).map_err(|_| Malformed::Length)?;
    let length = usize::try_from(length.get()).map_err(|_| Malformed::Length)?;
    let (text, rest) = rest.split_at_checked(length).ok_or(Malformed::Length)?;
    Ok((decode_string(text)?, rest))
}

fn put_string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Reads a string that fills `bytes`, such as the name in EXPORT_NAME.
///
/// # Errors
/// `Malformed::Text`.
pub fn decode_string(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err(Malformed::Text);
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed::Text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_greeting_is_what_clients_expect() {
        let mut out = Vec::new();
        encode_greeting(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn client_flags_that_nobody_offered_are_refused() {
        for bits in 0u32..4 {
            let flags = ClientFlags::decode(bits.to_be_bytes()).unwrap();
            let mut out = Vec::new();
            flags.encode(&mut out);
            assert_eq!(out, bits.to_be_bytes());
        }
        assert!(ClientFlags::decode(4u32.to_be_bytes()).is_err());
        assert!(ClientFlags::decode([0xff; 4]).is_err());
    }

    #[test]
    fn a_name_longer_than_the_option_is_refused() {
        assert_eq!(ExportRequest::decode(&[0, 0, 0, 9, b'a', 0, 0]), Err(Malformed::Length));
        assert_eq!(ExportRequest::decode(&[0xff; 12]), Err(Malformed::Length));
        assert_eq!(ExportRequest::decode(&[0, 0, 0, 1, 0xff, 0, 0]), Err(Malformed::Text));
        let mut long = Vec::new();
        ExportRequest { name: &"n".repeat(4097), infos: vec![] }.encode(&mut long);
        assert_eq!(ExportRequest::decode(&long), Err(Malformed::Text));
    }

    proptest! {
        #[test]
        fn options_round_trip(option in any::<u32>(), kind in any::<u32>(), data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let length = u32::try_from(data.len()).unwrap();
            let mut bytes = Vec::new();
            encode_option(option, &data, &mut bytes);
            prop_assert_eq!(OptionHeader::decode(&bytes), Ok(Some(OptionHeader { option, length })));
            prop_assert_eq!(&bytes[OptionHeader::BYTES..], &data[..]);
            prop_assert_eq!(OptionHeader::decode(&bytes[..15]), Ok(None));
            bytes.clear();
            encode_reply(option, kind, &data, &mut bytes);
            prop_assert_eq!(OptionReply::decode(&bytes), Ok(Some(OptionReply { option, kind, length })));
            prop_assert_eq!(&bytes[OptionReply::BYTES..], &data[..]);
        }

        #[test]
        fn option_data_round_trips(
            name in ".{0,40}", infos in proptest::collection::vec(any::<u16>(), 0..10),
            queries in proptest::collection::vec(".{0,20}", 0..10), text in ".{0,40}",
            id in any::<u32>(), size in any::<u64>(), flags in any::<u16>(),
        ) {
            let mut bytes = Vec::new();
            let request = ExportRequest { name: &name, infos };
            request.encode(&mut bytes);
            prop_assert_eq!(ExportRequest::decode(&bytes), Ok(request));
            bytes.push(0);
            prop_assert_eq!(ExportRequest::decode(&bytes), Err(Malformed::Length));

            bytes.clear();
            let queries = queries.iter().map(String::as_str).collect();
            let request = ContextRequest { name: &name, queries };
            request.encode(&mut bytes);
            prop_assert_eq!(ContextRequest::decode(&bytes), Ok(request));

            bytes.clear();
            encode_server(&name, &text, &mut bytes);
            prop_assert_eq!(decode_server(&bytes), Ok((&name[..], &text[..])));
            bytes.clear();
            encode_context(id, &text, &mut bytes);
            prop_assert_eq!(decode_context(&bytes), Ok((id, &text[..])));

            for info in [
                Info::Export { size, flags },
                Info::Name(&name),
                Info::Description(&text),
                Info::BlockSize { minimum: 1, preferred: id, payload_max: 9 },
            ] {
                bytes.clear();
                info.encode(&mut bytes);
                prop_assert_eq!(Info::decode(&bytes), Ok(Some(info)));
            }
        }

        #[test]
        fn nonsense_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = OptionHeader::decode(&bytes);
            let _ = OptionReply::decode(&bytes);
            let _ = ExportRequest::decode(&bytes);
            let _ = ContextRequest::decode(&bytes);
            let _ = decode_server(&bytes);
            let _ = decode_context(&bytes);
            let _ = Info::decode(&bytes);
        }
    }
}

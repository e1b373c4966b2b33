//! The messages of vhost-user, both ways: bytes in, values out. No I/O.
//!
//! Source: docs/interop/vhost-user.rst of QEMU. Numbers are in the byte order of the machine, of
//! which all that we run on are little-endian.
//!
//! ```text
//! 0        4        8                   12
//! ┌────────┬────────┬───────────────────┬─────────────┐
//! │ code   │ flags  │ bytes of payload  │ payload …   │   descriptors beside it (SCM_RIGHTS)
//! └────────┴────────┴───────────────────┴─────────────┘
//! ```

use std::os::fd::OwnedFd;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;

/// Longest payload that is received: eight regions of memory take 264 bytes, a configuration space
/// 268.
pub const PAYLOAD_BYTES_MAX: usize = 1024;

/// Most descriptors beside one message: one for each region of memory.
pub const FILES_MAX: usize = 8;

/// Most bytes of configuration space in one message (VHOST_USER_MAX_CONFIG_SIZE).
pub const CONFIG_BYTES_MAX: usize = 256;

/// Protocol features that this side offers.
pub mod feature {
    /// More than one ring.
    pub const MQ: u64 = 1 << 0;
    /// The log of written pages is memory that both share.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Success or failure of every message on request.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A second channel, for messages from this side.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// A memory of what is in flight that the monitor keeps.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Regions of memory one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The ring's number in the payload of a message about an eventfd, and that there is none.
const RING_MASK: u64 = 0xff;
const NO_FILE: u64 = 1 << 8;

/// The only message from this side: the configuration space has changed.
const CONFIG_CHANGED: u32 = 2;

/// The bytes received make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The header is of another version, or a reply.
    #[error("the header of a message is wrong")]
    Header,
    /// More payload than any message has.
    #[error("a payload of {0} bytes is too long")]
    TooLong(u32),
    /// More descriptors than any message has.
    #[error("more descriptors came than any message has")]
    TooManyFiles,
    /// A code that this side does not offer.
    #[error("message {0} is unknown")]
    Unknown(u32),
    /// The payload or the descriptors do not fit the code.
    #[error("the payload or the descriptors of message {0} are wrong")]
    Payload(u32),
}

/// What comes before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message.
    pub code: u32,
    /// Whether the sender wants to know how it went, if `REPLY_ACK` is agreed.
    pub need_reply: bool,
    /// Bytes of payload.
    pub payload_bytes: usize,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    code: U32,
    flags: U32,
    payload_bytes: U32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// If it cannot be that of a request.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let flags = raw.flags.get();
        if flags & VERSION_MASK != VERSION || flags & FLAG_REPLY != 0 {
            return Err(Malformed::Header);
        }
        let length = raw.payload_bytes.get();
        let payload_bytes = usize::try_from(length).ok().filter(|&it| it <= PAYLOAD_BYTES_MAX);
        Ok(Self {
            code: raw.code.get(),
            need_reply: flags & FLAG_NEED_REPLY != 0,
            payload_bytes: payload_bytes.ok_or(Malformed::TooLong(length))?,
        })
    }
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    // Payloads of this side are those of configuration space at the longest.
    let length = u32::try_from(payload.len()).unwrap_or(0);
    let header = RawHeader {
        code: code.into(),
        flags: (VERSION | flags).into(),
        payload_bytes: length.into(),
    };
    [header.as_bytes(), payload].concat()
}

/// The reply to a message.
#[must_use]
pub fn reply(code: u32, payload: &[u8]) -> Vec<u8> {
    message(code, FLAG_REPLY, payload)
}

/// Says that the configuration space has changed.
#[must_use]
pub fn config_changed() -> Vec<u8> {
    message(CONFIG_CHANGED, 0, &[])
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address in the guest.
    pub guest: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its address in the monitor, which says by these where rings lie.
    pub user: u64,
    /// Where it begins in its file.
    pub file_offset: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRegion {
    guest: U64,
    bytes: U64,
    user: U64,
    file_offset: U64,
}

impl From<&RawRegion> for Region {
    fn from(raw: &RawRegion) -> Self {
        Self {
            guest: raw.guest.get(),
            bytes: raw.bytes.get(),
            user: raw.user.get(),
            file_offset: raw.file_offset.get(),
        }
    }
}

/// Where the parts of a ring lie, as addresses in the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The table of descriptors.
    pub descriptors: u64,
    /// What the guest makes available.
    pub available: u64,
    /// What the device has used.
    pub used: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAddresses {
    ring: U32,
    flags: U32,
    descriptors: U64,
    used: U64,
    available: U64,
    log: U64,
}

/// The log of written pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogArea {
    /// Its length in bytes.
    pub bytes: u64,
    /// Where it begins in its file.
    pub file_offset: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLog {
    bytes: U64,
    file_offset: U64,
}

/// The memory of what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightArea {
    /// Its length in bytes.
    pub bytes: u64,
    /// Where it begins in its file.
    pub file_offset: u64,
    /// For how many rings.
    pub rings: u16,
    /// For how many descriptors each.
    pub ring_size: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInflight {
    bytes: U64,
    file_offset: U64,
    rings: U16,
    ring_size: U16,
    /// QEMU's and everybody else's structure ends on a multiple of 8.
    padding: [u8; 4],
}

impl InflightArea {
    /// Its bytes as the payload of a reply.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawInflight {
            bytes: self.bytes.into(),
            file_offset: self.file_offset.into(),
            rings: self.rings.into(),
            ring_size: self.ring_size.into(),
            padding: [0; 4],
        };
        raw.as_bytes().to_vec()
    }
}

/// A part of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRange {
    /// First byte.
    pub offset: u32,
    /// Number of bytes, at most [`CONFIG_BYTES_MAX`].
    pub bytes: u32,
    /// What the sender says that it is for.
    pub flags: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawConfig {
    offset: U32,
    bytes: U32,
    flags: U32,
}

impl ConfigRange {
    /// The payload of a reply that gives `contents`.
    #[must_use]
    pub fn encode(&self, contents: &[u8]) -> Vec<u8> {
        let raw = RawConfig {
            offset: self.offset.into(),
            bytes: self.bytes.into(),
            flags: self.flags.into(),
        };
        [raw.as_bytes(), contents].concat()
    }
}

/// The payload of many messages: a ring and a number.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawState {
    ring: U32,
    number: U32,
}

/// The payload of a reply that gives a number of a ring.
#[must_use]
pub fn ring_state(ring: u32, number: u32) -> Vec<u8> {
    RawState { ring: ring.into(), number: number.into() }.as_bytes().to_vec()
}

/// What the monitor asks for.
#[derive(Debug)]
pub enum Request {
    /// Which features of virtio are there.
    GetFeatures,
    /// Which of them are used.
    SetFeatures(u64),
    /// Which features of vhost-user are there.
    GetProtocolFeatures,
    /// Which of them are used.
    SetProtocolFeatures(u64),
    /// Somebody owns the device, or does no longer: nothing to do with one owner per connection.
    Owner,
    /// All of guest memory.
    SetMemory(Vec<(Region, OwnedFd)>),
    /// Where to log which pages of guest memory are written, while they are copied elsewhere.
    SetLog(LogArea, OwnedFd),
    /// More guest memory.
    AddRegion(Region, OwnedFd),
    /// Less guest memory.
    RemoveRegion(Region),
    /// How many regions there may be.
    GetRegionsMax,
    /// How many rings there may be.
    GetRingsMax,
    /// How many descriptors a ring has.
    SetRingSize(u32, u32),
    /// Where a ring lies.
    SetRingAddresses(u32, RingAddresses),
    /// Which entry of a ring comes next.
    SetRingBase(u32, u32),
    /// Stop a ring and say which entry would come next.
    GetRingBase(u32),
    /// The guest's kicks of a ring: from here on it runs.
    SetKick(u32, Option<OwnedFd>),
    /// Interrupts of a ring.
    SetCall(u32, Option<OwnedFd>),
    /// Where to say that a ring is broken.
    SetError(u32, Option<OwnedFd>),
    /// Whether requests are taken from a ring.
    SetRingEnabled(u32, bool),
    /// A part of the configuration space.
    GetConfig(ConfigRange),
    /// Changes the configuration space.
    SetConfig,
    /// The channel for messages of this side.
    SetBackendChannel(OwnedFd),
    /// A memory of what is in flight, of this size.
    GetInflight(InflightArea),
    /// The memory of what is in flight.
    SetInflight(InflightArea, OwnedFd),
}

impl Request {
    /// Reads a message.
    ///
    /// # Errors
    /// If it makes no sense.
    pub fn decode(code: u32, payload: &[u8], files: Vec<OwnedFd>) -> Result<Self, Malformed> {
        let mut payload = Payload { code, rest: payload, files: files.into_iter() };
        let request = payload.request()?;
        // Removing a region may come with its descriptor, "for compatibility".
        let fits = payload.rest.is_empty()
            && (payload.files.next().is_none() || matches!(request, Self::RemoveRegion(_)));
        if fits { Ok(request) } else { Err(Malformed::Payload(code)) }
    }
}

/// What of a message has not been read.
struct Payload<'a> {
    code: u32,
    rest: &'a [u8],
    files: std::vec::IntoIter<OwnedFd>,
}

impl<'a> Payload<'a> {
    fn request(&mut self) -> Result<Request, Malformed> {
        Ok(match self.code {
            1 => Request::GetFeatures,
            2 => Request::SetFeatures(self.number()?),
            3 | 4 => Request::Owner,
            5 => self.memory()?,
            6 => Request::SetLog(self.log()?, self.file()?),
            8 => self.state(Request::SetRingSize)?,
            9 => self.addresses()?,
            10 => self.state(Request::SetRingBase)?,
            11 => self.state(|ring, _| Request::GetRingBase(ring))?,
            12 => self.event(Request::SetKick)?,
            13 => self.event(Request::SetCall)?,
            14 => self.event(Request::SetError)?,
            15 => Request::GetProtocolFeatures,
            16 => Request::SetProtocolFeatures(self.number()?),
            17 => Request::GetRingsMax,
            18 => self.state(|ring, enabled| Request::SetRingEnabled(ring, enabled != 0))?,
            21 => Request::SetBackendChannel(self.file()?),
            24 => Request::GetConfig(self.config()?),
            25 => {
                self.config()?;
                Request::SetConfig
            }
            31 => Request::GetInflight(self.inflight()?),
            32 => Request::SetInflight(self.inflight()?, self.file()?),
            36 => Request::GetRegionsMax,
            37 => {
                self.number()?;
                Request::AddRegion(self.region()?, self.file()?)
            }
            38 => {
                self.number()?;
                Request::RemoveRegion(self.region()?)
            }
            unknown => return Err(Malformed::Unknown(unknown)),
        })
    }

    fn take<T>(&mut self) -> Result<&'a T, Malformed>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let (value, rest) =
            T::ref_from_prefix(self.rest).map_err(|_| Malformed::Payload(self.code))?;
        self.rest = rest;
        Ok(value)
    }

    fn number(&mut self) -> Result<u64, Malformed> {
        self.take::<U64>().map(|number| number.get())
    }

    fn file(&mut self) -> Result<OwnedFd, Malformed> {
        self.files.next().ok_or(Malformed::Payload(self.code))
    }

    fn region(&mut self) -> Result<Region, Malformed> {
        self.take::<RawRegion>().map(Region::from)
    }

    fn memory(&mut self) -> Result<Request, Malformed> {
        let count = self.take::<RawState>()?.ring.get();
        if !usize::try_from(count).is_ok_and(|count| count <= FILES_MAX) {
            return Err(Malformed::Payload(self.code));
        }
        let regions = (0..count).map(|_| Ok((self.region()?, self.file()?)));
        Ok(Request::SetMemory(regions.collect::<Result<_, Malformed>>()?))
    }

    fn state(&mut self, make: impl FnOnce(u32, u32) -> Request) -> Result<Request, Malformed> {
        self.take::<RawState>().map(|state| make(state.ring.get(), state.number.get()))
    }

    fn event(
        &mut self,
        make: impl FnOnce(u32, Option<OwnedFd>) -> Request,
    ) -> Result<Request, Malformed> {
        let number = self.number()?;
        let file = if number & NO_FILE == 0 { Some(self.file()?) } else { None };
        Ok(make(u32::try_from(number & RING_MASK).unwrap_or(0), file))
    }

    fn addresses(&mut self) -> Result<Request, Malformed> {
        let raw = self.take::<RawAddresses>()?;
        let addresses = RingAddresses {
            descriptors: raw.descriptors.get(),
            available: raw.available.get(),
            used: raw.used.get(),
        };
        Ok(Request::SetRingAddresses(raw.ring.get(), addresses))
    }

    fn log(&mut self) -> Result<LogArea, Malformed> {
        let raw = self.take::<RawLog>()?;
        Ok(LogArea { bytes: raw.bytes.get(), file_offset: raw.file_offset.get() })
    }

    fn inflight(&mut self) -> Result<InflightArea, Malformed> {
        let raw = self.take::<RawInflight>()?;
        Ok(InflightArea {
            bytes: raw.bytes.get(),
            file_offset: raw.file_offset.get(),
            rings: raw.rings.get(),
            ring_size: raw.ring_size.get(),
        })
    }

    /// A range and the room for its contents, or the contents themselves.
    fn config(&mut self) -> Result<ConfigRange, Malformed> {
        let raw = self.take::<RawConfig>()?;
        let range = ConfigRange {
            offset: raw.offset.get(),
            bytes: raw.bytes.get(),
            flags: raw.flags.get(),
        };
        let length = usize::try_from(range.bytes).ok().filter(|&it| it <= CONFIG_BYTES_MAX);
        match length.and_then(|length| self.rest.split_at_checked(length)) {
            Some((_, rest)) => self.rest = rest,
            None => return Err(Malformed::Payload(self.code)),
        }
        Ok(range)
    }
}

#[cfg(test)]
mod tests;

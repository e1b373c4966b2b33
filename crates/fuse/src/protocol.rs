//! Messages of the FUSE kernel interface, as `linux/fuse.h` has them; version 7.31 and later.
//!
//! A request is a header, a structure that the operation code decides about, and names or data. A
//! reply is a header, and what was asked for. Everything is in the machine's byte order; this knows
//! little-endian ones.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Oldest and newest minor version of version 7 that is understood.
pub(crate) const MINOR_MIN: u32 = 31;
pub(crate) const MINOR: u32 = 45;
pub(crate) const MAJOR: u32 = 7;

/// Most bytes of one write, and of one read.
pub(crate) const DATA_BYTES_MAX: usize = 1 << 20;

/// The same, as INIT says it: in bytes, and in pages.
const WRITE_MAX: u32 = 1 << 20;
const PAGES_MAX: u16 = 256;
const _: () = assert!(WRITE_MAX as usize == DATA_BYTES_MAX);
const _: () = assert!(PAGES_MAX as usize * 4096 == DATA_BYTES_MAX);

/// Most requests of direct I/O that does not wait for its end: as many as are under way here.
const BACKGROUND_MAX: u16 = 256;
const _: () = assert!(BACKGROUND_MAX as usize == disk::in_flight::REQUESTS_MAX);

/// Most bytes that the kernel sends at once: a write with all that stands before its data.
pub(crate) const REQUEST_BYTES_MAX: usize = DATA_BYTES_MAX + 4096;

/// Most bytes of a directory listing in one reply.
pub(crate) const LISTING_BYTES_MAX: usize = 128 << 10;

/// Operation codes.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
}

/// What the two sides can do: the flags of INIT.
pub(crate) mod feature {
    /// Reads of one file may be under way together.
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    /// Writes of more than a page.
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O that does not wait for its end.
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    /// Look-ups and listings of one directory may be under way together.
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    /// INIT says how many pages a request has at most.
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    /// There are more than 32 flags.
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    /// Files without page cache can be mapped.
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// The server may ask for unanswered requests again.
    pub(crate) const HAS_RESEND: u64 = 1 << 39;

    /// What this server wants.
    pub(crate) const WANTED: u64 = ASYNC_READ
        | BIG_WRITES
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | MAX_PAGES
        | INIT_EXT
        | DIRECT_IO_ALLOW_MMAP
        | HAS_RESEND;
}

/// Flags of an open file.
pub(crate) const OPEN_DIRECT_IO: u32 = 1 << 0;
pub(crate) const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// Asks the kernel for all unanswered requests once more (`FUSE_NOTIFY_RESEND`).
pub(crate) const NOTIFY_RESEND: i32 = 7;

/// Which of its fields a SETATTR changes.
pub(crate) mod set {
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const TIMES: u32 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10;
    /// Fields that only say who asks.
    pub(crate) const CONTEXT: u32 = 1 << 6 | 1 << 9 | 1 << 11;
}

/// Modes of FALLOCATE.
pub(crate) mod allocate {
    pub(crate) const KEEP_SIZE: u32 = 0x01;
    pub(crate) const PUNCH_HOLE: u32 = 0x02;
    pub(crate) const ZERO_RANGE: u32 = 0x10;
}

macro_rules! messages {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$note:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
            #[repr(C)]
            pub(crate) struct $name { $($(#[$note])* pub(crate) $field: $type,)* }
        )*
    };
}

messages! {
    /// `fuse_in_header`
    struct InHeader {
        length: U32,
        opcode: U32,
        unique: U64,
        node: U64,
        uid: U32,
        gid: U32,
        pid: U32,
        extension_length: U16,
        padding: U16,
    }

    /// `fuse_out_header`
    struct OutHeader {
        length: U32,
        error: I32,
        unique: U64,
    }

    /// `fuse_init_in`, without what newer versions have put behind it.
    struct InitIn {
        major: U32,
        minor: U32,
        readahead_max: U32,
        flags: U32,
    }

    /// `fuse_init_out`
    struct InitOut {
        major: U32,
        minor: U32,
        readahead_max: U32,
        flags: U32,
        background_max: U16,
        congestion_threshold: U16,
        write_max: U32,
        time_granularity: U32,
        pages_max: U16,
        map_alignment: U16,
        flags2: U32,
        stack_depth_max: U32,
        request_timeout: U16,
        unused: [U16; 11],
    }

    /// `fuse_attr`
    struct Attributes {
        ino: U64,
        size: U64,
        blocks: U64,
        accessed: U64,
        modified: U64,
        changed: U64,
        accessed_ns: U32,
        modified_ns: U32,
        changed_ns: U32,
        mode: U32,
        links: U32,
        uid: U32,
        gid: U32,
        device: U32,
        block_size: U32,
        flags: U32,
    }

    /// `fuse_attr_out`
    struct AttributesOut {
        valid: U64,
        valid_ns: U32,
        dummy: U32,
        attributes: Attributes,
    }

    /// `fuse_entry_out`
    struct EntryOut {
        node: U64,
        generation: U64,
        entry_valid: U64,
        attributes_valid: U64,
        entry_valid_ns: U32,
        attributes_valid_ns: U32,
        attributes: Attributes,
    }

    /// `fuse_setattr_in`, as far as it matters.
    struct SetAttributesIn {
        valid: U32,
        padding: U32,
        handle: U64,
        size: U64,
    }

    /// `fuse_open_in`
    struct OpenIn {
        flags: U32,
        open_flags: U32,
    }

    /// `fuse_open_out`
    struct OpenOut {
        handle: U64,
        flags: U32,
        backing: U32,
    }

    /// `fuse_read_in`; READDIR has the same.
    struct ReadIn {
        handle: U64,
        offset: U64,
        size: U32,
        read_flags: U32,
        lock_owner: U64,
        flags: U32,
        padding: U32,
    }

    /// `fuse_write_in`
    struct WriteIn {
        handle: U64,
        offset: U64,
        size: U32,
        write_flags: U32,
        lock_owner: U64,
        flags: U32,
        padding: U32,
    }

    /// `fuse_write_out`
    struct WriteOut {
        size: U32,
        padding: U32,
    }

    /// `fuse_fsync_in`; RELEASE begins alike.
    struct HandleIn {
        handle: U64,
    }

    /// `fuse_fallocate_in`
    struct AllocateIn {
        handle: U64,
        offset: U64,
        length: U64,
        mode: U32,
        padding: U32,
    }

    /// `fuse_lseek_in`
    struct SeekIn {
        handle: U64,
        offset: U64,
        whence: U32,
        padding: U32,
    }

    /// `fuse_lseek_out`
    struct SeekOut {
        offset: U64,
    }

    /// `fuse_statfs_out`
    struct StatfsOut {
        blocks: U64,
        blocks_free: U64,
        blocks_available: U64,
        files: U64,
        files_free: U64,
        block_size: U32,
        name_length: U32,
        fragment_size: U32,
        padding: U32,
        spare: [U32; 6],
    }

    /// `fuse_dirent`, before its name.
    struct DirectoryEntry {
        ino: U64,
        /// Where the listing goes on behind it.
        next: U64,
        name_length: U32,
        kind: U32,
    }
}

const _: () = assert!(size_of::<InHeader>() == 40 && size_of::<OutHeader>() == 16);
const _: () = assert!(size_of::<InitOut>() == 64 && size_of::<Attributes>() == 88);
const _: () = assert!(size_of::<EntryOut>() == 128 && size_of::<AttributesOut>() == 104);
const _: () = assert!(size_of::<ReadIn>() == 40 && size_of::<WriteIn>() == 40);
const _: () = assert!(size_of::<AllocateIn>() == 32 && size_of::<StatfsOut>() == 80);

/// Why the kernel cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A request ends too early.
    #[error("a request of operation {0} ends too early")]
    Short(u32),
    /// Not even a header, or its length is another one than that of the message.
    #[error("a request without a header that fits it")]
    Header,
    /// A version that is not understood.
    #[error("the kernel speaks version {0}.{1} of FUSE, and 7.31 is the oldest that is understood")]
    Version(u32, u32),
}

/// What the kernel asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request<'a> {
    Init {
        minor: u32,
        readahead_max: u32,
        features: u64,
    },
    Lookup(&'a [u8]),
    GetAttributes,
    SetAttributes {
        valid: u32,
        size: u64,
    },
    Open {
        flags: u32,
    },
    Read {
        handle: u64,
        offset: u64,
        size: usize,
    },
    Write {
        handle: u64,
        offset: u64,
        flags: u32,
        data: &'a [u8],
    },
    Allocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Seek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    Sync {
        handle: u64,
    },
    OpenDirectory,
    ReadDirectory {
        offset: u64,
        size: usize,
    },
    Statfs,
    /// The end of an open file, or of an open directory, or of the whole mount.
    Release,
    /// The kernel forgets a node; it wants no reply.
    Forget,
    /// Something that would change a name or an attribute, which are not the kernel's to change.
    Rearrange,
    Unknown,
}

/// A structure at the beginning of `bytes`, and what is behind it.
fn head<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
    opcode: u32,
) -> Result<(T, &[u8]), Malformed> {
    T::read_from_prefix(bytes).map_err(|_| Malformed::Short(opcode))
}

fn size(size: U32) -> usize {
    usize::try_from(size.get()).unwrap_or(usize::MAX)
}

impl<'a> Request<'a> {
    /// Understands one message of the kernel.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn decode(message: &'a [u8]) -> Result<(InHeader, Self), Malformed> {
        let (header, body) = InHeader::read_from_prefix(message).map_err(|_| Malformed::Header)?;
        if size(header.length) != message.len() {
            return Err(Malformed::Header);
        }
        Self::of(header.opcode.get(), body).map(|request| (header, request))
    }

    fn of(opcode: u32, body: &'a [u8]) -> Result<Self, Malformed> {
        Ok(match opcode {
            opcode::INIT => Self::init(body)?,
            opcode::LOOKUP => {
                let name = body.split(|&byte| byte == 0).next();
                Self::Lookup(name.ok_or(Malformed::Short(opcode))?)
            }
            opcode::GETATTR => Self::GetAttributes,
            opcode::SETATTR => {
                let (set, _) = head::<SetAttributesIn>(body, opcode)?;
                Self::SetAttributes { valid: set.valid.get(), size: set.size.get() }
            }
            opcode::OPEN => Self::Open { flags: head::<OpenIn>(body, opcode)?.0.flags.get() },
            opcode::READ => {
                let (read, _) = head::<ReadIn>(body, opcode)?;
                let (handle, offset) = (read.handle.get(), read.offset.get());
                Self::Read { handle, offset, size: size(read.size) }
            }
            opcode::WRITE => {
                let (write, rest) = head::<WriteIn>(body, opcode)?;
                let data = rest.get(..size(write.size)).ok_or(Malformed::Short(opcode))?;
                let (handle, offset) = (write.handle.get(), write.offset.get());
                Self::Write { handle, offset, flags: write.flags.get(), data }
            }
            opcode::FALLOCATE => {
                let (allocate, _) = head::<AllocateIn>(body, opcode)?;
                Self::Allocate {
                    handle: allocate.handle.get(),
                    offset: allocate.offset.get(),
                    length: allocate.length.get(),
                    mode: allocate.mode.get(),
                }
            }
            opcode::LSEEK => {
                let (seek, _) = head::<SeekIn>(body, opcode)?;
                let (handle, offset) = (seek.handle.get(), seek.offset.get());
                Self::Seek { handle, offset, whence: seek.whence.get() }
            }
            opcode::FSYNC => Self::Sync { handle: head::<HandleIn>(body, opcode)?.0.handle.get() },
            opcode::OPENDIR => Self::OpenDirectory,
            opcode::READDIR => {
                let (read, _) = head::<ReadIn>(body, opcode)?;
                Self::ReadDirectory { offset: read.offset.get(), size: size(read.size) }
            }
            opcode::STATFS => Self::Statfs,
            opcode::RELEASE | opcode::RELEASEDIR | opcode::FSYNCDIR | opcode::DESTROY => {
                Self::Release
            }
            opcode::FORGET | opcode::BATCH_FORGET => Self::Forget,
            opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::LINK
            | opcode::CREATE
            | opcode::RENAME2 => Self::Rearrange,
            _ => Self::Unknown,
        })
    }

    fn init(body: &'a [u8]) -> Result<Self, Malformed> {
        let (init, rest) = head::<InitIn>(body, opcode::INIT)?;
        let (major, minor) = (init.major.get(), init.minor.get());
        // Of a newer major version the kernel would ask again, for ours.
        if major != MAJOR || minor < MINOR_MIN {
            return Err(Malformed::Version(major, minor));
        }
        let flags = u64::from(init.flags.get());
        let more = match rest.first_chunk() {
            Some(&bytes) if flags & feature::INIT_EXT != 0 => u32::from_le_bytes(bytes),
            _ => 0,
        };
        let features = flags | u64::from(more) << 32;
        Ok(Self::Init { minor, readahead_max: init.readahead_max.get(), features })
    }
}

/// The reply to INIT.
pub(crate) fn init_reply(minor: u32, readahead_max: u32, features: u64) -> InitOut {
    let agreed = features & feature::WANTED;
    let low = |features: u64| U32::new(u32::try_from(features & u64::from(u32::MAX)).unwrap_or(0));
    InitOut {
        major: MAJOR.into(),
        minor: minor.min(MINOR).into(),
        readahead_max: readahead_max.into(),
        flags: low(agreed),
        flags2: low(agreed >> 32),
        background_max: BACKGROUND_MAX.into(),
        congestion_threshold: (BACKGROUND_MAX / 4 * 3).into(),
        write_max: WRITE_MAX.into(),
        time_granularity: 1.into(),
        pages_max: PAGES_MAX.into(),
        ..InitOut::default()
    }
}

/// A directory listing that is being put together.
#[derive(Debug)]
pub(crate) struct Listing {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl Listing {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes: Vec::new(), bytes_max: bytes_max.min(LISTING_BYTES_MAX) }
    }

    /// Adds an entry; `false` if there is no room for it. `next` is where the listing goes on
    /// behind it.
    pub(crate) fn add(&mut self, node: u64, next: u64, is_directory: bool, name: &str) -> bool {
        let head = DirectoryEntry {
            ino: node.into(),
            next: next.into(),
            name_length: u32::try_from(name.len()).unwrap_or(u32::MAX).into(),
            kind: if is_directory { 4 } else { 8 }.into(),
        };
        let padded = (size_of::<DirectoryEntry>() + name.len()).next_multiple_of(8);
        if self.bytes.len() + padded > self.bytes_max {
            return false;
        }
        let end = self.bytes.len() + padded;
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.resize(end, 0);
        true
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + body.len()).unwrap();
        let header =
            InHeader { length: length.into(), opcode: opcode.into(), ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_write_brings_its_data() {
        let write = WriteIn { offset: 512.into(), size: 3.into(), ..WriteIn::default() };
        let message = message(opcode::WRITE, &[write.as_bytes(), b"abcd"].concat());
        let (_, request) = Request::decode(&message).unwrap();
        let Request::Write { offset: 512, data: b"abc", .. } = request else {
            panic!("{request:?}")
        };
    }

    #[test]
    fn old_kernels_are_refused_and_new_ones_are_met_at_what_is_known() {
        let init = |major: u32, minor: u32, flags: u32, more: u32| {
            let body: Vec<u8> =
                [major, minor, 9, flags, more].iter().flat_map(|word| word.to_le_bytes()).collect();
            Request::decode(&message(opcode::INIT, &body))
                .map(|(_, request)| format!("{request:?}"))
        };
        assert_eq!(init(7, 30, 0, 0).unwrap_err(), Malformed::Version(7, 30));
        assert_eq!(init(8, 0, 0, 0).unwrap_err(), Malformed::Version(8, 0));
        let without = init(7, 31, 1, 5).unwrap();
        assert!(without.contains("features: 1 "), "{without}");
        let reply = init_reply(99, 9, u64::MAX);
        assert_eq!(reply.minor.get(), MINOR);
        assert_eq!(reply.flags2.get(), (feature::WANTED >> 32) as u32);
        assert_eq!(init_reply(40, 9, feature::ASYNC_READ).flags.get(), 1);
    }

    #[test]
    fn a_listing_ends_where_its_reader_has_no_more_room() {
        let mut listing = Listing::new(70);
        assert!(listing.add(2, 1, true, "a"));
        assert!(listing.add(3, 2, false, "12345678"));
        assert!(!listing.add(4, 3, false, "b"));
        let bytes = listing.into_bytes();
        assert_eq!(bytes.len(), 64);
        assert_eq!(bytes[32..40], 3u64.to_le_bytes());
        assert_eq!(bytes[24], b'a');
    }

    proptest! {
        #[test]
        fn whatever_comes_is_understood_or_refused(
            opcode in 0u32..64,
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = Request::decode(&message(opcode, &body));
            let _ = Request::decode(&body);
        }
    }
}

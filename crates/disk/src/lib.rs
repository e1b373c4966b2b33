//! The narrow waist between frontends and the engine: a [`Disk`] takes [`Request`]s and completes
//! them in any order, as a physical disk does. Frontends speak only this; the engine knows no
//! protocol. A [`Catalog`] has disks by name, a [`directory::Directory`] by number. [`MemDisk`] is
//! the in-memory model that tests hold the engine and the frontends to, [`GateDisk`] one that they
//! hold up; [`in_flight`], [`split`] and [`metrics!`] are what frontends have in common.

pub mod conformance;
pub mod directory;
mod error;
mod gate;
pub mod in_flight;
mod memory;
pub mod metrics;
pub mod split;

use std::io::IoSlice;
use std::rc::Rc;

use base::{BlockSlice, Buffer};
pub use error::{DiskError, errno, virtio_status};
pub use gate::GateDisk;
pub use memory::MemDisk;
pub use runtime::LocalBoxFuture;

/// Largest read or write in bytes; a frontend splits or refuses what is larger.
pub const REQUEST_BYTES_MAX: usize = base::REQUEST_BLOCKS_MAX * base::BLOCK_SIZE;

/// What can be asked of a disk. Offsets and lengths are in bytes and need no alignment; aligned
/// ones are fast. A range beyond the end is refused with `ErrorKind::Invalid`, whole. A length of
/// zero succeeds and does nothing.
#[derive(Debug)]
pub enum Request {
    /// Reads up to [`REQUEST_BYTES_MAX`] bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: usize,
    },
    /// Writes the first `length` bytes of `data`, up to [`REQUEST_BYTES_MAX`].
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: usize,
        /// The bytes; nobody else can change them any more.
        data: Buffer,
        /// Complete only when durable.
        fua: bool,
    },
    /// Completes when every write that completed before this was submitted is durable.
    Flush,
    /// Forgets contents: the range reads as zeroes afterwards and occupies no space.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes, of any size.
        length: u64,
        /// Complete only when durable.
        fua: bool,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes, of any size.
        length: u64,
        /// Complete only when durable.
        fua: bool,
        /// Keep the range reported as allocated (NBD's NO_HOLE).
        no_hole: bool,
        /// Refuse with `ErrorKind::Unsupported` rather than be slower than a discard.
        fast_only: bool,
    },
    /// Reads metadata of the range ahead.
    Cache {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Describes the range as extents.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Most extents to return, at least 1; the answer may end early.
        extents_max: usize,
    },
}

/// What a disk answers.
#[derive(Debug)]
pub enum Response {
    /// The bytes of a read, in order; their lengths add up to the request's.
    Data(Vec<ReadSegment>),
    /// Extents from the start of the range, adjacent, at least one; they may end before the
    /// range does, never after it.
    Extents(Vec<Extent>),
    /// Done.
    Done,
}

/// A part of the data of a read.
#[derive(Clone, Debug)]
pub enum ReadSegment {
    /// Bytes in memory; the range is in bytes within the slice.
    Bytes(BlockSlice, std::ops::Range<usize>),
    /// So many zero bytes, of a range that is not mapped.
    Zeroes(usize),
}

impl ReadSegment {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(_, range) => range.len(),
            Self::Zeroes(length) => *length,
        }
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Copies the data of a read into `into`, as far as it goes.
pub fn copy_segments(segments: &[ReadSegment], into: &mut [u8]) {
    let mut rest = into;
    for segment in segments {
        let (now, later) = rest.split_at_mut(segment.len().min(rest.len()));
        match segment {
            ReadSegment::Bytes(slice, range) => {
                let from = slice.bytes().get(range.clone()).unwrap_or_default();
                for (to, from) in now.iter_mut().zip(from) {
                    *to = *from;
                }
            }
            ReadSegment::Zeroes(_) => now.fill(0),
        }
        rest = later;
    }
}

/// The data of a read for system calls that take it in parts. There are no more parts than blocks in
/// the request, or as many again if it has holes: less than one call takes.
#[must_use]
pub fn io_slices(segments: &[ReadSegment]) -> Vec<IoSlice<'_>> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut parts = Vec::with_capacity(segments.len());
    for segment in segments {
        match segment {
            ReadSegment::Bytes(slice, range) => {
                parts.push(IoSlice::new(slice.bytes().get(range.clone()).unwrap_or_default()));
            }
            ReadSegment::Zeroes(length) => {
                let mut rest = *length;
                while rest > 0 {
                    let part = ZEROES.get(..rest).unwrap_or(&ZEROES);
                    parts.push(IoSlice::new(part));
                    rest -= part.len();
                }
            }
        }
    }
    parts
}

/// A run of bytes of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub length: u64,
    /// Its state.
    pub state: ExtentState,
}

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentState {
    /// Data occupies space.
    Data,
    /// Reads as zeroes, and is reported as allocated (written with NO_HOLE).
    Zero,
    /// Reads as zeroes and occupies no space.
    Hole,
}

/// Says whether two handles are of the same contents. It is the same after writes, snapshots, and
/// restarts of the daemon; another one once the disk was rolled back, is another disk of that name,
/// or may have lost writes that were acknowledged, because the store's device failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The store.
    pub store: [u8; 16],
    /// The disk in it.
    pub disk: u64,
    /// How often the store's device has failed under its users.
    pub failures: u64,
    /// Which state of the disk: how often it was rolled back, or which snapshot.
    pub state: u64,
}

impl Identity {
    /// Bytes that it is written in.
    pub const BYTES: usize = 40;

    /// As it is written, for who remembers it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let numbers = [self.disk, self.failures, self.state].map(u64::to_le_bytes);
        let all = self.store.iter().chain(numbers.iter().flatten());
        for (to, &from) in bytes.iter_mut().zip(all) {
            *to = from;
        }
        bytes
    }

    /// A number for it, where there is room for no more: two that differ have the same one about once in
    /// 2^64 (FNV-1a).
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mix = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        self.to_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix)
    }
}

/// A virtual disk as a frontend sees it. All methods are called on the disk's own thread.
pub trait Disk {
    /// Stable identity for serial numbers: at most 20 ASCII characters.
    fn serial(&self) -> String;

    /// Whose contents these are, for who may have cached some.
    fn identity(&self) -> Identity;

    /// Size in bytes; changes when the VDI is resized.
    fn size_bytes(&self) -> u64;

    /// Whether writes, discards and zeroes are refused with `ErrorKind::ReadOnly`.
    fn read_only(&self) -> bool;

    /// Whether this handle is dead for good: the VDI was deleted or rolled back, or a flush failed
    /// (G10). Every request then fails with `ErrorKind::Fenced`; the frontend ends the connection.
    fn severed(&self) -> bool;

    /// Starts a request. It goes on even if the future is dropped. Requests in flight together
    /// complete in any order.
    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>>;
}

/// One thing that a frontend can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// `web01`, or `web01@label` for a snapshot.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether it is a snapshot.
    pub read_only: bool,
}

/// Where frontends look disks up by name.
pub trait Catalog {
    /// At most `max` exports whose names come after `after`, in order of name.
    fn list(
        &self,
        after: Option<String>,
        max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>>;

    /// Opens `web01` or `web01@snapshot`.
    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>>;
}

//! Pointers for the kernel, and the blocking calls of worker threads.
//!
//! Every function here takes what it points to from a [`Slot`]'s work; see `work.rs` for why that
//! memory stays where it is until the completion.
#![expect(unsafe_code, reason = "system calls that take pointers")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use base::BlockSlice;
use libc::{c_int, c_void, iovec, msghdr, off_t, socklen_t};

use super::work::{FileAction, Slot, Work};
use crate::socket::Segment;

/// Most vectors that one call takes (IOV_MAX); what lies behind them goes with a further call.
const VECTORS_MAX: usize = 1024;

/// Most bytes that one call moves: what the kernel does not exceed either (MAX_RW_COUNT).
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;

/// Vectors and a message header with stable addresses for as long as their slot lives.
pub(super) struct Transfer {
    vectors: Vec<iovec>,
    header: msghdr,
}

impl Default for Transfer {
    fn default() -> Self {
        let header = MaybeUninit::<msghdr>::zeroed();
        // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is a value:
        // no name, no vectors, no control data. It cannot be written as a literal, because some C
        // libraries pad it with private fields.
        let header = unsafe { header.assume_init() };
        Self { vectors: Vec::new(), header }
    }
}

impl Transfer {
    /// The bytes of `blocks` behind the first `skip`, as few vectors as they allow.
    pub(super) fn gather_blocks(&mut self, blocks: &[BlockSlice], skip: usize) -> &[iovec] {
        self.gather(blocks.iter().map(BlockSlice::bytes), skip);
        &self.vectors
    }

    /// The bytes of `segments` behind the first `skip`, as a message.
    pub(super) fn gather_message(&mut self, segments: &[Segment], skip: usize) -> *const msghdr {
        self.gather(segments.iter().map(Segment::bytes), skip);
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len() as _;
        &raw const self.header
    }

    /// What the last gathering made.
    pub(super) fn vectors(&self) -> &[iovec] {
        &self.vectors
    }

    /// One vector for the bytes to read into.
    fn scatter(&mut self, into: &mut [u8]) {
        self.vectors.clear();
        self.vectors.push(iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
    }

    fn gather<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>, mut skip: usize) {
        self.vectors.clear();
        for part in parts {
            let Some(rest) = part.get(skip..) else {
                skip -= part.len();
                continue;
            };
            skip = 0;
            if rest.is_empty() {
                continue;
            }
            // The kernel only reads through it.
            let iov_base = rest.as_ptr().cast_mut().cast::<c_void>();
            let full = self.vectors.len() == VECTORS_MAX;
            match self.vectors.last_mut() {
                Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == iov_base => {
                    last.iov_len += rest.len();
                }
                _ if full => return,
                _ => self.vectors.push(iovec { iov_base, iov_len: rest.len() }),
            }
        }
    }
}

/// Process and user ids of who connected a unix socket. The process id is 0 if it lies in a pid
/// namespace that we do not see.
pub(super) fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<libc::ucred> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = socklen_t::try_from(size_of_val(&credentials)).unwrap_or(0);
    let to = (&raw mut credentials).cast();
    // SAFETY: SO_PEERCRED writes at most `length` bytes, the size of `credentials`, to it; every
    // bit pattern is a value of its integers. (A type with a non-zero process id would not do.)
    let status = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &raw mut length)
    };
    if status == 0 { Ok(credentials) } else { Err(io::Error::last_os_error()) }
}

/// The length of one contiguous transfer, as calls take it.
pub(super) fn transfer_length(bytes: usize) -> u32 {
    u32::try_from(bytes.min(TRANSFER_BYTES_MAX)).unwrap_or(0)
}

/// A file operation that blocks, for a worker thread.
pub(super) struct Call {
    fd: RawFd,
    offset: u64,
    kind: CallKind,
}

enum CallKind {
    Read(*const iovec, c_int),
    Write(*const iovec, c_int),
    Sync,
    Allocate(u64),
    Punch(u64),
    Discard(u64),
}

// SAFETY: the pointers of a call lead to vectors in its slot, and those to memory that the slot's
// work owns. The slot's thread leaves both alone until the call has run (contract of `Call::new`).
unsafe impl Send for Call {}

impl Call {
    /// The call for the file operation in `slot`; `None` if there is something else in it.
    ///
    /// # Safety
    /// Neither the slot nor its work may be moved, changed or dropped before the call has run, or
    /// was dropped.
    pub(super) unsafe fn new(slot: &mut Slot) -> Option<Self> {
        let Some(Work::File { file, operation, .. }) = &mut slot.work else { return None };
        let count = |transfer: &Transfer| c_int::try_from(transfer.vectors.len()).unwrap_or(0);
        let kind = match &mut operation.action {
            FileAction::Read { buffer, range } => {
                let into = buffer.bytes_mut().get_mut(range.clone()).unwrap_or_default();
                slot.transfer.scatter(into);
                CallKind::Read(slot.transfer.vectors.as_ptr(), count(&slot.transfer))
            }
            FileAction::Write { blocks, skip } => {
                let vectors = slot.transfer.gather_blocks(blocks, *skip).as_ptr();
                CallKind::Write(vectors, count(&slot.transfer))
            }
            FileAction::Sync => CallKind::Sync,
            FileAction::Allocate { length } => CallKind::Allocate(*length),
            FileAction::Punch { length } => CallKind::Punch(*length),
            FileAction::Discard { length } => CallKind::Discard(*length),
        };
        Some(Self { fd: file.fd().as_raw_fd(), offset: operation.offset, kind })
    }

    /// Does it: the number of bytes, or a negative errno.
    pub(super) fn run(self) -> i32 {
        let offset = signed(self.offset);
        let result = match self.kind {
            CallKind::Read(vectors, count) => {
                // SAFETY: `vectors` leads to `count` vectors over memory that nobody else touches
                // (contract of `new`), and the descriptor is open as long as the work lives.
                unsafe { libc::preadv(self.fd, vectors, count, offset) }
            }
            CallKind::Write(vectors, count) => {
                // SAFETY: as for reading; the memory is only read.
                unsafe { libc::pwritev(self.fd, vectors, count, offset) }
            }
            CallKind::Sync => {
                // SAFETY: takes no pointer.
                widen(unsafe { libc::fdatasync(self.fd) })
            }
            CallKind::Allocate(length) => {
                let mode = libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: takes no pointer.
                widen(unsafe { libc::fallocate(self.fd, mode, offset, signed(length)) })
            }
            CallKind::Punch(length) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: takes no pointer.
                widen(unsafe { libc::fallocate(self.fd, mode, offset, signed(length)) })
            }
            CallKind::Discard(length) => {
                let range = [self.offset, length];
                // SAFETY: BLKDISCARD reads two u64, first byte and length, which `range` is.
                widen(unsafe { libc::ioctl(self.fd, BLKDISCARD, range.as_ptr()) })
            }
        };
        if result < 0 {
            return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        }
        // At most MAX_RW_COUNT, see above.
        i32::try_from(result).unwrap_or(i32::MAX)
    }
}

/// `_IO(0x12, 119)`, <linux/fs.h>.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// An offset as system calls take it; one beyond every file if it does not fit.
fn signed(offset: u64) -> off_t {
    off_t::try_from(offset).unwrap_or(off_t::MAX)
}

const fn widen(result: c_int) -> isize {
    result as isize
}

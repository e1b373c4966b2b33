//! Submission entries for works.
//!
//! Invariant: what an entry points to lies in the slot that it was made for, or is owned by the
//! work in that slot.

use std::os::fd::AsRawFd;

use base::{BlockSlice, Buffer};
use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, MSG_NOSIGNAL};

use crate::reactor::io::Descriptor;
use crate::reactor::sys::{Transfer, transfer_length};
use crate::reactor::work::{FileAction, FileOperation, Interest, ONE, Slot, Work};
use crate::socket::Segment;

/// The entry for the work in `slot`. `registered` are the addresses of registered buffers.
pub(super) fn entry(slot: &mut Slot, registered: &[usize]) -> Entry {
    let Slot { work, transfer } = slot;
    let Some(work) = work else { return opcode::Nop::new().build() };
    let (fd, flags) = target(work.descriptor());
    let entry = match work {
        Work::File { operation, .. } => file(fd, operation, transfer, registered),
        Work::Receive { buffer, range, .. } => {
            let into = buffer.bytes_mut().get_mut(range.clone()).unwrap_or_default();
            opcode::Recv::new(fd, into.as_mut_ptr(), transfer_length(into.len())).build()
        }
        Work::Send { segments, skip, .. } => send(fd, segments, *skip, transfer),
        Work::Poll { interest, .. } => opcode::PollAdd::new(fd, poll_mask(*interest)).build(),
        Work::Signal { .. } => {
            opcode::Write::new(fd, ONE.as_ptr(), transfer_length(ONE.len())).build()
        }
    };
    entry.flags(flags)
}

/// How entries name a descriptor.
fn target(descriptor: &Descriptor) -> (Fd, Flags) {
    match descriptor.registration().map(i32::try_from) {
        Some(Ok(index)) => (Fd(index), Flags::FIXED_FILE),
        _ => (Fd(descriptor.fd().as_raw_fd()), Flags::empty()),
    }
}

pub(super) fn poll_mask(interest: Interest) -> u32 {
    let mask = match interest {
        Interest::Readable => libc::POLLIN,
        Interest::Writable => libc::POLLOUT,
    };
    u32::from(mask.unsigned_abs())
}

fn file(
    fd: Fd,
    operation: &mut FileOperation,
    transfer: &mut Transfer,
    registered: &[usize],
) -> Entry {
    let offset = operation.offset;
    match &mut operation.action {
        FileAction::Read { buffer, range } => {
            let index = fixed(buffer, registered);
            let into = buffer.bytes_mut().get_mut(range.clone()).unwrap_or_default();
            let (to, length) = (into.as_mut_ptr(), transfer_length(into.len()));
            match index {
                Some(index) => opcode::ReadFixed::new(fd, to, length, index).offset(offset).build(),
                None => opcode::Read::new(fd, to, length).offset(offset).build(),
            }
        }
        FileAction::Write { blocks, skip } => {
            write(fd, offset, (blocks, *skip), transfer, registered)
        }
        FileAction::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        FileAction::Allocate { length } => {
            opcode::Fallocate::new(fd, *length).offset(offset).mode(FALLOC_FL_KEEP_SIZE).build()
        }
        FileAction::Punch { length } => opcode::Fallocate::new(fd, *length)
            .offset(offset)
            .mode(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
            .build(),
        // Goes to a thread: a ring has no such operation.
        FileAction::Discard { .. } => opcode::Nop::new().build(),
    }
}

fn write(
    fd: Fd,
    offset: u64,
    (blocks, skip): (&[BlockSlice], usize),
    transfer: &mut Transfer,
    registered: &[usize],
) -> Entry {
    let [one] = transfer.gather_blocks(blocks, skip) else {
        let vectors = transfer.vectors();
        let count = transfer_length(vectors.len());
        return opcode::Writev::new(fd, vectors.as_ptr(), count).offset(offset).build();
    };
    let (from, length) = (one.iov_base.cast(), transfer_length(one.iov_len));
    let index = match blocks {
        [slice] => fixed(slice.buffer(), registered),
        _ => None,
    };
    match index {
        Some(index) => opcode::WriteFixed::new(fd, from, length, index).offset(offset).build(),
        None => opcode::Write::new(fd, from, length).offset(offset).build(),
    }
}

fn send(fd: Fd, segments: &[Segment], skip: usize, transfer: &mut Transfer) -> Entry {
    let message = transfer.gather_message(segments, skip);
    if let [one] = transfer.vectors() {
        let (from, length) = (one.iov_base.cast(), transfer_length(one.iov_len));
        return opcode::Send::new(fd, from, length).flags(MSG_NOSIGNAL).build();
    }
    opcode::SendMsg::new(fd, message).flags(MSG_NOSIGNAL.unsigned_abs()).build()
}

/// The index under which `buffer` is registered with this ring. A buffer of another runtime may
/// carry an index too, but lies elsewhere.
fn fixed(buffer: &Buffer, registered: &[usize]) -> Option<u16> {
    let index = buffer.registration()?;
    let address = registered.get(usize::from(index))?;
    (buffer.blocks().as_ptr().addr() == *address).then_some(index)
}

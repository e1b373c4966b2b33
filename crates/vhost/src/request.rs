//! From the buffers of a guest to a request of a disk, and back.
//!
//! ```text
//! readable: │ header, 16 bytes │ data of a write, ranges of a discard … │
//! writable: │ data of a read, serial number … │ status, 1 byte │
//! ```
//!
//! Where one buffer ends and the next begins means nothing (VIRTIO_F_VERSION_1).

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, BufferPool};
use disk::in_flight::{Outcome, Pending};
use disk::{Disk, Request, Response, split};
use runtime::Runtime;
use vm_memory::GuestAddress;

use crate::block::{
    HEADER_BYTES, Header, Operation, RANGE_BYTES, RANGE_SECTORS_MAX, RANGES_MAX, REQUEST_BYTES_MAX,
    Range, SECTOR_BYTES, SERIAL_BYTES, status,
};
use crate::budget;
use crate::memory::{Memory, Span, Spans};
use crate::queue::{Broken, Chain};

/// What a range that is discarded or zeroed holds while it is under way: a task, a lock, a record, and
/// a buffer for each end that is no whole block.
const RANGE_FOOTPRINT: u64 = 16 << 10;

/// A request of a guest that can be answered.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// By which the guest knows it.
    pub(crate) head: u16,
    /// What it asks for; `None` if the device does not know that.
    pub(crate) operation: Option<Operation>,
    /// Where it reads or writes.
    sector: u64,
    /// What it brings behind the header.
    brought: Spans,
    /// Where what it wants goes.
    wanted: Spans,
    /// Where its status goes.
    status: GuestAddress,
}

/// A request that was started, or the status of one that will not be.
pub(crate) enum Started {
    /// The disk works on it.
    Pending(Pending),
    /// It is done.
    Done(u8),
}

impl Ask {
    /// Reads the header of a request.
    ///
    /// # Errors
    /// If it has none, or there is no place for its status: then it cannot be answered.
    pub(crate) fn new(chain: Chain, memory: &Memory) -> Result<Self, Broken> {
        let Chain { head, mut readable, mut writable } = chain;
        let writable_bytes = writable.bytes();
        if readable.bytes() < HEADER_BYTES as u64 || writable_bytes == 0 {
            return Err(Broken::Short);
        }
        let brought = readable.split_off(HEADER_BYTES as u64);
        let mut header = [0; HEADER_BYTES];
        readable.copy_to(memory, &mut header)?;
        let Header { operation, sector } = Header::decode(header);
        let last = writable.split_off(writable_bytes - 1);
        let status = last.0.iter().find(|span| span.bytes > 0).ok_or(Broken::Short)?.address;
        Ok(Self { head, operation, sector, brought, wanted: writable, status })
    }

    /// Bytes of data that are copied for it.
    pub(crate) fn data_bytes(&self) -> u64 {
        match self.operation {
            Some(Operation::Read) => self.wanted.bytes(),
            Some(Operation::Write) => self.brought.bytes(),
            _ => 0,
        }
    }

    /// Bytes that it makes this process hold while it is under way: its buffers, where the guest's lie
    /// is remembered, and what the disk remembers of each of the ranges that it zeroes.
    pub(crate) fn footprint(&self) -> u64 {
        let spans = (self.brought.0.len() + self.wanted.0.len()) * size_of::<Span>();
        let held = match self.operation {
            Some(Operation::Discard | Operation::WriteZeroes) => {
                (self.brought.bytes() / RANGE_BYTES as u64).min(RANGES_MAX.into()) * RANGE_FOOTPRINT
            }
            _ => {
                let (offset, bytes) = (self.sector.wrapping_mul(SECTOR_BYTES), self.data_bytes());
                let aligned = (offset | bytes).is_multiple_of(BLOCK_SIZE_U64);
                let length = usize::try_from(bytes.min(REQUEST_BYTES_MAX)).unwrap_or(0);
                let blocks = |(_, length): (u64, usize)| {
                    BufferPool::size_of(length.div_ceil(BLOCK_SIZE) + usize::from(!aligned))
                };
                let blocks: usize = split::pieces(offset, length).map(blocks).sum();
                // One that is not aligned is completed in a second one.
                (blocks * if aligned { BLOCK_SIZE } else { 2 * BLOCK_SIZE }) as u64
            }
        };
        (held + spans as u64).min(budget::BYTES_MAX)
    }

    /// Whether no device of ours takes it, however much room there is.
    pub(crate) fn is_too_large(&self) -> bool {
        self.data_bytes() > REQUEST_BYTES_MAX
    }

    /// Starts it. `durable` if writes complete only when they are durable.
    pub(crate) fn start(
        &self,
        disk: &dyn Disk,
        runtime: &Runtime,
        memory: &Memory,
        durable: bool,
    ) -> Started {
        let started = match self.operation {
            Some(Operation::Read) => self.read(disk),
            Some(Operation::Write) => self.write(disk, runtime, memory, durable),
            Some(Operation::Flush) => Ok(disk.submit(Request::Flush)),
            Some(operation @ (Operation::Discard | Operation::WriteZeroes)) => {
                self.ranges(operation, disk, memory, durable)
            }
            Some(Operation::Serial) => Err(self.serial(disk, memory)),
            None => Err(status::UNSUPP),
        };
        started.map_or_else(Started::Done, Started::Pending)
    }

    fn read(&self, disk: &dyn Disk) -> Result<Pending, u8> {
        let (offset, length) = self.place(self.wanted.bytes())?;
        Ok(split::read(disk, offset, length))
    }

    fn write(
        &self,
        disk: &dyn Disk,
        runtime: &Runtime,
        memory: &Memory,
        fua: bool,
    ) -> Result<Pending, u8> {
        let (offset, length) = self.place(self.brought.bytes())?;
        // Nothing is copied for what the disk refuses.
        let end = offset.saturating_add(self.brought.bytes());
        if disk.severed() || disk.read_only() || end > disk.size_bytes() {
            return Err(status::IOERR);
        }
        let mut rest = self.brought.clone();
        let mut requests = Vec::new();
        for (offset, length) in split::pieces(offset, length) {
            let mut data = runtime.buffers().take(length.div_ceil(BLOCK_SIZE));
            let into = data.bytes_mut().get_mut(..length).unwrap_or_default();
            rest.copy_to(memory, into).map_err(|_| status::IOERR)?;
            rest = rest.split_off(length as u64);
            requests.push(Request::Write { offset, length, data, fua });
        }
        Ok(match requests.pop() {
            Some(only) if requests.is_empty() => disk.submit(only),
            last => split::together(disk, requests.into_iter().chain(last)),
        })
    }

    fn ranges(
        &self,
        operation: Operation,
        disk: &dyn Disk,
        memory: &Memory,
        fua: bool,
    ) -> Result<Pending, u8> {
        let bytes = usize::try_from(self.brought.bytes()).map_err(|_| status::IOERR)?;
        let count = bytes / RANGE_BYTES;
        if count == 0 || count > RANGES_MAX as usize || bytes % RANGE_BYTES != 0 {
            return Err(status::IOERR);
        }
        let mut raw = vec![0; bytes];
        self.brought.copy_to(memory, &mut raw).map_err(|_| status::IOERR)?;
        let (raw, _) = raw.as_chunks::<RANGE_BYTES>();
        let mut requests = Vec::with_capacity(count);
        for range in raw.iter().map(|&raw| Range::decode(raw)) {
            // A discard that unmaps is unknown too.
            if range.unknown_flags || range.unmap && operation == Operation::Discard {
                return Err(status::UNSUPP);
            }
            if range.sectors > RANGE_SECTORS_MAX {
                return Err(status::IOERR);
            }
            let offset = range.sector.checked_mul(SECTOR_BYTES).ok_or(status::IOERR)?;
            let length = u64::from(range.sectors) * SECTOR_BYTES;
            requests.push(match operation {
                Operation::Discard => Request::Discard { offset, length, fua },
                _ => Request::WriteZeroes {
                    offset,
                    length,
                    fua,
                    no_hole: !range.unmap,
                    fast_only: false,
                },
            });
        }
        Ok(split::together(disk, requests.into_iter()))
    }

    /// Writes the serial number, padded with zeroes.
    fn serial(&self, disk: &dyn Disk, memory: &Memory) -> u8 {
        let mut serial = disk.serial().into_bytes();
        serial.resize(SERIAL_BYTES, 0);
        let data = disk::ReadSegment::Bytes(
            base::BlockSlice::whole(std::rc::Rc::new(base::Buffer::from_bytes(&serial))),
            0..SERIAL_BYTES,
        );
        match self.wanted.fill(memory, &[data]) {
            Ok(()) => status::OK,
            Err(_) => status::IOERR,
        }
    }

    /// Where the disk reads or writes `bytes`, whole sectors.
    fn place(&self, bytes: u64) -> Result<(u64, usize), u8> {
        let offset = self.sector.checked_mul(SECTOR_BYTES);
        let length = usize::try_from(bytes).ok().filter(|_| bytes.is_multiple_of(SECTOR_BYTES));
        Ok((offset.ok_or(status::IOERR)?, length.ok_or(status::IOERR)?))
    }

    /// Brings what the disk answered into guest memory, but for the status, and says that.
    pub(crate) fn answer(&self, outcome: Outcome, memory: &Memory) -> u8 {
        match outcome {
            Ok(Response::Data(segments)) => match self.wanted.fill(memory, &segments) {
                Ok(()) => status::OK,
                Err(_) => status::IOERR,
            },
            Ok(_) => status::OK,
            Err(error) => disk::virtio_status(error.kind),
        }
    }

    /// Writes the status; returns how many bytes the device has written, as the ring wants it.
    ///
    /// # Errors
    /// If its place cannot be reached.
    pub(crate) fn finish(&self, status: u8, memory: &Memory) -> Result<u32, Broken> {
        memory.write(self.status, &[status])?;
        Ok(u32::try_from(self.wanted.bytes() + 1).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(operation: Operation, sector: u64, bytes: u64) -> Ask {
        let bytes = u32::try_from(bytes).unwrap();
        let brought = Spans(vec![Span { address: GuestAddress(0), bytes }]);
        let wanted = Spans::default();
        let status = GuestAddress(0);
        Ask { head: 0, operation: Some(operation), sector, brought, wanted, status }
    }

    /// Sizes of the pool's buffers were not counted, nor what ranges take: a guest could have the daemon
    /// hold eight times of what it was allowed, and half a million tasks.
    #[test]
    fn a_request_is_charged_what_it_holds() {
        let span = size_of::<Span>() as u64;
        let write = |sector, bytes| ask(Operation::Write, sector, bytes).footprint() - span;
        assert_eq!(write(0, 4096), 4096);
        assert_eq!(write(1, 4096), 2 * 4 * 4096, "two blocks, and again to complete them");
        assert_eq!(write(0, 17 * 4096), 64 * 4096);
        assert_eq!(write(0, 65 * 4096), 1 << 20);
        assert_eq!(write(0, 3 << 20), 3 << 20);
        let largest = ask(Operation::Write, 1, REQUEST_BYTES_MAX).footprint();
        assert_eq!(largest, budget::BYTES_MAX, "it has its turn when nothing else is under way");
        let discard = |ranges: u64| ask(Operation::Discard, 0, ranges * 16).footprint() - span;
        assert_eq!(discard(1), RANGE_FOOTPRINT);
        assert_eq!(discard(16), 16 * RANGE_FOOTPRINT);
        assert_eq!(discard(1 << 20), 16 * RANGE_FOOTPRINT, "it is refused");
    }
}

//! The memory of a guest, mapped.
//!
//! What lies in it may change at any time: everything is read once, copied, and then looked at.
//! A map that is in use stays whole when regions come and go; the next look uses the new one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use disk::ReadSegment;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion,
};

use crate::dirty::DirtyLog;
use crate::protocol::Region;

/// Most regions: a guest that plugs memory in has one for each module.
pub(crate) const REGIONS_MAX: usize = 256;

/// Memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    /// Its file is none that could be mapped whole: what lies beyond its end could not be read.
    #[error("the file is no regular file of at least {0} bytes")]
    File(u64),
    /// Its numbers make no sense.
    #[error("the region does not fit into an address space")]
    Range,
    /// It overlaps with another one.
    #[error("regions overlap")]
    Overlap,
    /// There are too many.
    #[error("there are more than {max} regions", max = REGIONS_MAX)]
    TooMany,
    /// It has pages that the log of written ones has no bits for.
    #[error("the log of written pages does not cover the region")]
    Log,
    /// The kernel does not map it.
    #[error("the kernel does not map it")]
    Kernel(#[from] io::Error),
}

/// Maps `bytes` of a file, for reading and writing.
pub(crate) fn map(fd: OwnedFd, file_offset: u64, bytes: u64) -> Result<MmapRegion, MapError> {
    let file = File::from(fd);
    let end = file_offset.checked_add(bytes).ok_or(MapError::Range)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() < end {
        return Err(MapError::File(end));
    }
    let length = usize::try_from(bytes).map_err(|_| MapError::Range)?;
    MmapRegion::from_file(FileOffset::new(file, file_offset), length)
        .map_err(|error| MapError::Kernel(io::Error::other(error)))
}

/// All of a guest's memory.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    map: GuestMemoryMmap,
    regions: Vec<Region>,
    /// Where it is noted what was written, if somebody wants to know.
    log: Option<Rc<DirtyLog>>,
}

impl Memory {
    /// These regions.
    pub(crate) fn of(regions: Vec<(Region, OwnedFd)>) -> Result<Self, MapError> {
        let mut memory = Self::default();
        for (region, fd) in regions {
            memory = memory.with(region, fd)?;
        }
        Ok(memory)
    }

    /// The same memory and one more region.
    pub(crate) fn with(&self, region: Region, fd: OwnedFd) -> Result<Self, MapError> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(MapError::TooMany);
        }
        let fits = region.bytes != 0
            && region.user.checked_add(region.bytes).is_some()
            && region.guest.checked_add(region.bytes).is_some();
        if !fits {
            return Err(MapError::Range);
        }
        let mapping = map(fd, region.file_offset, region.bytes)?;
        let memory = GuestRegionMmap::new(mapping, GuestAddress(region.guest));
        let memory = Arc::new(memory.ok_or(MapError::Range)?);
        let map = self.map.insert_region(memory).map_err(|_| MapError::Overlap)?;
        let regions = self.regions.iter().copied().chain([region]).collect();
        Self { map, regions, log: None }.logged(self.log.clone())
    }

    /// The same memory without a region; `None` if it is not there. Its place in a file is not
    /// compared: the protocol does not either.
    pub(crate) fn without(&self, region: &Region) -> Option<Self> {
        let same = |it: &Region| {
            (it.guest, it.user, it.bytes) == (region.guest, region.user, region.bytes)
        };
        let (map, _) = self.map.remove_region(GuestAddress(region.guest), region.bytes).ok()?;
        let regions: Vec<Region> = self.regions.iter().copied().filter(|it| !same(it)).collect();
        let log = self.log.clone();
        (regions.len() + 1 == self.regions.len()).then_some(Self { map, regions, log })
    }

    /// The same memory, of which it is noted in `log` what is written from now on.
    pub(crate) fn logged(self, log: Option<Rc<DirtyLog>>) -> Result<Self, MapError> {
        let covered = |log: &Rc<DirtyLog>| self.regions.iter().all(|region| log.covers(region));
        if log.as_ref().is_none_or(covered) { Ok(Self { log, ..self }) } else { Err(MapError::Log) }
    }

    fn written(&self, to: GuestAddress, bytes: usize) {
        if let Some(log) = &self.log {
            log.mark(to, bytes);
        }
    }

    /// Where in the guest `bytes` lie whose address in the monitor is `user`.
    pub(crate) fn guest_address(&self, user: u64, bytes: u64) -> Option<GuestAddress> {
        let end = user.checked_add(bytes)?;
        let inside = |it: &&Region| it.user <= user && end <= it.user.saturating_add(it.bytes);
        let region = self.regions.iter().find(inside)?;
        Some(GuestAddress(region.guest + (user - region.user)))
    }

    /// Copies out of guest memory.
    pub(crate) fn read(&self, from: GuestAddress, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.map.read_slice(into, from)
    }

    /// Copies into guest memory.
    pub(crate) fn write(&self, to: GuestAddress, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let outcome = self.map.write_slice(bytes, to);
        // A part may have been written when it fails.
        self.written(to, bytes.len());
        outcome
    }

    /// Reads a number that the guest may be writing.
    pub(crate) fn load<T: AtomicAccess>(
        &self,
        from: GuestAddress,
        order: Ordering,
    ) -> Result<T, GuestMemoryError> {
        self.map.load(from, order)
    }

    /// Writes a number that the guest may be reading.
    pub(crate) fn store<T: AtomicAccess>(
        &self,
        value: T,
        to: GuestAddress,
        order: Ordering,
    ) -> Result<(), GuestMemoryError> {
        self.map.store(value, to, order)?;
        self.written(to, size_of::<T>());
        Ok(())
    }
}

/// A buffer of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Its address.
    pub(crate) address: GuestAddress,
    /// Its length.
    pub(crate) bytes: u32,
}

/// Buffers of a guest that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spans(pub(crate) Vec<Span>);

impl Spans {
    /// Their length together.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.bytes)).sum()
    }

    /// Splits off what lies behind the first `bytes`; nothing if there are fewer.
    pub(crate) fn split_off(&mut self, bytes: u64) -> Self {
        let mut left = bytes;
        for (index, span) in self.0.iter_mut().enumerate() {
            let own = u64::from(span.bytes);
            if left < own {
                // Less than the span's length, which is 32 bits.
                let keep = u32::try_from(left).unwrap_or(span.bytes);
                let start = GuestAddress(span.address.0.saturating_add(left));
                let cut = Span { address: start, bytes: span.bytes - keep };
                span.bytes = keep;
                let mut rest = self.0.split_off(index + 1);
                rest.insert(0, cut);
                return Self(rest);
            }
            left -= own;
        }
        Self::default()
    }

    /// Copies their first bytes to `into`, all of it, which must not be longer.
    pub(crate) fn copy_to(&self, memory: &Memory, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = into;
        for span in &self.0 {
            let count = rest.len().min(usize::try_from(span.bytes).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(count);
            memory.read(span.address, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Fills them with the data of a read, as far as both go.
    pub(crate) fn fill(
        &self,
        memory: &Memory,
        data: &[ReadSegment],
    ) -> Result<(), GuestMemoryError> {
        let mut spans = self.0.iter().copied();
        let mut room = Span { address: GuestAddress(0), bytes: 0 };
        for segment in data {
            let mut at = 0;
            while at < segment.len() {
                while room.bytes == 0 {
                    let Some(next) = spans.next() else { return Ok(()) };
                    room = next;
                }
                let left = segment.len() - at;
                let count = u32::try_from(left).map_or(room.bytes, |left| left.min(room.bytes));
                let length = usize::try_from(count).unwrap_or(0);
                write_segment(memory, room.address, segment, at, length)?;
                room.address = GuestAddress(room.address.0.saturating_add(u64::from(count)));
                room.bytes -= count;
                at += length;
            }
        }
        Ok(())
    }
}

/// Writes `count` bytes of a segment from its byte `at` on.
fn write_segment(
    memory: &Memory,
    to: GuestAddress,
    segment: &ReadSegment,
    at: usize,
    count: usize,
) -> Result<(), GuestMemoryError> {
    match segment {
        ReadSegment::Bytes(slice, range) => {
            let from = range.start + at;
            memory.write(to, slice.bytes().get(from..from + count).unwrap_or_default())
        }
        ReadSegment::Zeroes(_) => {
            let zeroes = [0; base::BLOCK_SIZE];
            let mut done = 0;
            while done < count {
                let now = (count - done).min(zeroes.len());
                let place = GuestAddress(to.0.saturating_add(done as u64));
                memory.write(place, zeroes.get(..now).unwrap_or_default())?;
                done += now;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;

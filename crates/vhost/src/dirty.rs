//! Which pages of guest memory were written here: a monitor that copies the memory of a running guest
//! to another host (live migration) copies those again.
//!
//! The log is memory of the monitor, one bit for each page of guest addresses, which both sides set
//! and clear atomically. A page is marked after it was written: a monitor that finds the mark finds
//! the new contents, too, and one that looked in between finds the mark the next time.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{GuestAddress, MmapRegion, VolatileMemory};

use crate::memory::{MapError, map};
use crate::protocol::{LogArea, Region};

/// The unit of the protocol, whatever pages the guest or the machine has.
const PAGE_BYTES: u64 = 4096;

/// A log of written pages.
pub(crate) struct DirtyLog {
    bits: MmapRegion,
}

impl DirtyLog {
    /// Maps one.
    pub(crate) fn open(area: &LogArea, fd: OwnedFd) -> Result<Self, MapError> {
        Ok(Self { bits: map(fd, area.file_offset, area.bytes)? })
    }

    /// Whether there is a bit for every page of a region.
    pub(crate) fn covers(&self, region: &Region) -> bool {
        let last = region.guest.saturating_add(region.bytes.saturating_sub(1));
        last / PAGE_BYTES / u64::from(u8::BITS) < self.bits.len() as u64
    }

    /// Marks the pages of `bytes` bytes that have just been written. They lie in a region that it
    /// covers; of what does not, nothing was written.
    pub(crate) fn mark(&self, start: GuestAddress, bytes: usize) {
        let Some(behind) = (bytes as u64).checked_sub(1) else { return };
        let (first, last) = (start.0 / PAGE_BYTES, start.0.saturating_add(behind) / PAGE_BYTES);
        for page in first..=last {
            let place = usize::try_from(page / u64::from(u8::BITS)).unwrap_or(usize::MAX);
            let Ok(byte) = self.bits.get_atomic_ref::<AtomicU8>(place) else { return };
            // A mark that is there is set again: it may be cleared at this moment, for what the page
            // held before.
            byte.fetch_or(1 << (page % u64::from(u8::BITS)), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::Bytes;

    use super::*;

    fn log(bytes: u64) -> DirtyLog {
        let fd = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 64 + bytes).unwrap();
        DirtyLog::open(&LogArea { bytes, file_offset: 0 }, fd).unwrap()
    }

    fn bits(log: &DirtyLog) -> Vec<u8> {
        let mut bits = vec![0; log.bits.len()];
        log.bits.as_volatile_slice().read_slice(&mut bits, 0).unwrap();
        bits
    }

    #[test]
    fn every_page_of_a_range_is_marked_and_no_other() {
        let log = log(4);
        log.mark(GuestAddress(4095), 1);
        assert_eq!(bits(&log), [0b1, 0, 0, 0]);
        log.mark(GuestAddress(2 * 4096 - 1), 2);
        assert_eq!(bits(&log), [0b111, 0, 0, 0]);
        log.mark(GuestAddress(7 * 4096), 9 * 4096 + 1);
        assert_eq!(bits(&log), [0b1000_0111, 0xff, 1, 0]);
        log.mark(GuestAddress(31 * 4096), 0);
        assert_eq!(bits(&log), [0b1000_0111, 0xff, 1, 0]);
    }

    #[test]
    fn what_lies_behind_the_log_is_not_covered() {
        let log = log(2);
        let region = |guest, bytes| Region { guest, bytes, user: 0, file_offset: 0 };
        assert!(log.covers(&region(0, 16 * 4096)));
        assert!(log.covers(&region(15 * 4096, 4096)));
        assert!(!log.covers(&region(15 * 4096, 4097)));
        assert!(!log.covers(&region(u64::MAX - 4096, 4096)));
        log.mark(GuestAddress(15 * 4096), 1 << 20);
        log.mark(GuestAddress(u64::MAX), 2);
        assert_eq!(bits(&log), [0, 0x80]);
    }
}

//! The memory of what is in flight: it belongs to the monitor, which gives it to the next daemon
//! when this one was killed, and that one does again what was left undone.
//!
//! For each ring (the protocol calls it `QueueRegionSplit`), at a multiple of 64 bytes:
//!
//! ```text
//! 0          8         10           12                14          16 + 16 n
//! ┌──────────┬─────────┬────────────┬─────────────────┬───────────┬──────────────────────────────
//! │ features │ version │ ring size  │ last batch head │ used index│ descriptor n, 16 bytes:
//! └──────────┴─────────┴────────────┴─────────────────┴───────────┤ 0: in flight  6: next  8: order
//! ```
//!
//! Behind all of them stands which disk it is about: what a guest left undone with one disk must not
//! reach another one that has taken its name, nor what a rollback made of it.
//!
//! What a kill between any two stores leaves is understood: a request is marked before it is
//! started; when it is done its head is noted as the last, then the guest is told by the index of
//! the used ring, then the mark goes, then that index is noted. If the two indices differ the kill
//! came in between, and the last head counts as done. Stores are in program order, which is enough
//! for a reader that comes after the death of the writer.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use disk::{Disk, Identity};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::pwrite;
use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::end::End;
use crate::memory::map;
use crate::protocol::InflightArea;
use crate::queue::SIZE_MAX;

const VERSION: u16 = 1;
const VERSION_AT: usize = 8;
const RING_SIZE_AT: usize = 10;
const LAST_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const DESCRIPTORS_AT: usize = 16;
const DESCRIPTOR_BYTES: usize = 16;
const NEXT_AT: usize = 6;
const ORDER_AT: usize = 8;

/// Behind all rings: that an identity follows, and the identity.
const MAGIC: [u8; 8] = *b"plx-disk";
const IDENTITY_BYTES: usize = MAGIC.len() + Identity::BYTES;

/// Rings begin at multiples of this.
const ALIGNMENT: usize = 64;

fn ring_bytes(ring_size: u16) -> usize {
    (DESCRIPTORS_AT + usize::from(ring_size) * DESCRIPTOR_BYTES).next_multiple_of(ALIGNMENT)
}

/// The memory for all rings of a device.
pub(crate) struct Inflight {
    memory: MmapRegion,
    rings: u16,
    ring_size: u16,
    /// Of which disk it is. Not in memory of earlier daemons.
    identity: Option<[u8; Identity::BYTES]>,
}

impl Inflight {
    /// Makes an empty one for so many rings of such a size, about this disk. Nobody can make it
    /// shorter, whoever has its descriptor.
    pub(crate) fn create(
        wanted: &InflightArea,
        identity: Identity,
    ) -> Result<(InflightArea, OwnedFd), End> {
        if wanted.rings == 0 || wanted.ring_size == 0 || wanted.ring_size > SIZE_MAX {
            return Err(End::Refused("memory for rings that cannot be"));
        }
        let identity_at = (usize::from(wanted.rings) * ring_bytes(wanted.ring_size)) as u64;
        let bytes = identity_at + IDENTITY_BYTES as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let create = || {
            let fd = memfd_create("parallax-inflight", flags)?;
            ftruncate(&fd, bytes)?;
            pwrite(&fd, &[&MAGIC[..], &identity.to_bytes()].concat(), identity_at)?;
            fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok::<_, rustix::io::Errno>(fd)
        };
        let fd = create().map_err(std::io::Error::from)?;
        Ok((InflightArea { bytes, file_offset: 0, ..*wanted }, fd))
    }

    /// Maps one.
    pub(crate) fn open(area: &InflightArea, fd: OwnedFd) -> Result<Self, End> {
        let InflightArea { bytes, file_offset, rings, ring_size } = *area;
        let needed = usize::from(rings) * ring_bytes(ring_size);
        if ring_size > SIZE_MAX || bytes < needed as u64 {
            return Err(End::Refused("memory for rings that do not fit into it"));
        }
        let memory = map(fd, file_offset, bytes)?;
        // At the end: a monitor may use fewer rings than it asked for.
        let mut end = [0; IDENTITY_BYTES];
        let found = memory.len().checked_sub(end.len()).is_some_and(|at| {
            at >= needed && memory.as_volatile_slice().read_slice(&mut end, at).is_ok()
        });
        let identity =
            end.strip_prefix(&MAGIC).and_then(|identity| identity.first_chunk().copied());
        Ok(Self { memory, rings, ring_size, identity: identity.filter(|_| found) })
    }

    /// Whether it is about this disk, as far as it tells.
    pub(crate) fn is_about(&self, disk: &dyn Disk) -> bool {
        self.identity.is_none_or(|identity| identity == disk.identity().to_bytes())
    }

    /// The part of one ring; `None` if there is none for such a ring.
    pub(crate) fn ring(self: &Rc<Self>, index: u16, size: u16) -> Option<Tracker> {
        if index >= self.rings || size > self.ring_size {
            return None;
        }
        let base = usize::from(index) * ring_bytes(self.ring_size);
        Some(Tracker { inflight: Rc::clone(self), base, size, order: Cell::new(0) })
    }

    /// Every place that is asked for lies inside, and is aligned: see `open` and `ring`.
    fn load<T: AtomicAccess + Default>(&self, at: usize) -> T {
        self.memory.as_volatile_slice().load(at, Ordering::Acquire).unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, value: T, at: usize) {
        let stored = self.memory.as_volatile_slice().store(value, at, Ordering::Release);
        assert!(stored.is_ok(), "the place lies inside");
    }
}

/// What of one ring is in flight.
pub(crate) struct Tracker {
    inflight: Rc<Inflight>,
    base: usize,
    size: u16,
    /// The order in which requests began.
    order: Cell<u64>,
}

impl Tracker {
    /// Finds out what was left undone when the ring's used index was `used`: heads, in the order
    /// in which they were begun.
    pub(crate) fn recover(&self, used: u16) -> Vec<u16> {
        let Self { inflight, base, size, .. } = self;
        if inflight.load::<u16>(base + VERSION_AT) == 0 {
            // Fresh: all zeroes.
            inflight.store(*size, base + RING_SIZE_AT);
            inflight.store(used, base + USED_INDEX_AT);
            inflight.store(VERSION, base + VERSION_AT);
            return Vec::new();
        }
        if inflight.load::<u16>(base + USED_INDEX_AT) != used {
            let last = inflight.load::<u16>(base + LAST_HEAD_AT);
            if last < *size {
                self.mark(last, 0);
            }
            inflight.store(used, base + USED_INDEX_AT);
        }
        let marked = (0..*size).filter(|&head| inflight.load::<u8>(self.descriptor(head)) == 1);
        let order = |head| inflight.load::<u64>(self.descriptor(head) + ORDER_AT);
        let mut undone: Vec<(u64, u16)> = marked.map(|head| (order(head), head)).collect();
        undone.sort_unstable();
        self.order.set(undone.last().map_or(0, |&(order, _)| order.wrapping_add(1)));
        undone.into_iter().map(|(_, head)| head).collect()
    }

    /// A request begins.
    pub(crate) fn begin(&self, head: u16) {
        let order = self.order.replace(self.order.get().wrapping_add(1));
        self.inflight.store(order, self.descriptor(head) + ORDER_AT);
        self.mark(head, 1);
    }

    /// The guest is about to be told that a request is done.
    pub(crate) fn ending(&self, head: u16) {
        let Self { inflight, base, .. } = self;
        let last = inflight.load::<u16>(base + LAST_HEAD_AT);
        inflight.store(last, self.descriptor(head) + NEXT_AT);
        inflight.store(head, base + LAST_HEAD_AT);
    }

    /// The guest was told so, by this used index.
    pub(crate) fn ended(&self, head: u16, used: u16) {
        self.mark(head, 0);
        self.inflight.store(used, self.base + USED_INDEX_AT);
    }

    /// Nothing is in flight.
    pub(crate) fn forget(&self) {
        for head in 0..self.size {
            self.mark(head, 0);
        }
    }

    fn mark(&self, head: u16, mark: u8) {
        self.inflight.store(mark, self.descriptor(head));
    }

    fn descriptor(&self, head: u16) -> usize {
        assert!(head < self.size, "a head lies within its ring");
        self.base + DESCRIPTORS_AT + usize::from(head) * DESCRIPTOR_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Identity = Identity { store: [7; 16], disk: 7, failures: 0, state: 0 };

    fn area(rings: u16, ring_size: u16) -> InflightArea {
        InflightArea { bytes: 0, file_offset: 0, rings, ring_size }
    }

    /// What the next daemon would see.
    fn reopened(area: &InflightArea, fd: &OwnedFd) -> Tracker {
        let inflight = Inflight::open(area, fd.try_clone().unwrap()).unwrap();
        Rc::new(inflight).ring(1, 8).unwrap()
    }

    #[test]
    fn what_was_begun_and_not_ended_is_done_again_in_order() {
        let (area, fd) = Inflight::create(&area(2, 8), DISK).unwrap();
        let first = reopened(&area, &fd);
        assert_eq!(first.recover(0), [0u16; 0]);
        for head in [5, 2, 7, 1] {
            first.begin(head);
        }
        first.ending(2);
        first.ended(2, 1);
        let second = reopened(&area, &fd);
        assert_eq!(second.recover(1), [5, 7, 1]);
        second.begin(2);
        assert_eq!(reopened(&area, &fd).recover(1), [5, 7, 1, 2], "younger than all others");
    }

    #[test]
    fn a_kill_between_any_two_stores_loses_and_repeats_nothing() {
        let kill_after = |steps: usize, used: u16| {
            let (area, fd) = Inflight::create(&area(2, 8), DISK).unwrap();
            let tracker = reopened(&area, &fd);
            assert_eq!(tracker.recover(100), [0u16; 0]);
            tracker.begin(3);
            tracker.begin(4);
            if steps > 0 {
                tracker.ending(3);
            }
            if steps > 1 {
                tracker.mark(3, 0);
            }
            if steps > 2 {
                tracker.ended(3, 101);
            }
            reopened(&area, &fd).recover(used)
        };
        assert_eq!(kill_after(0, 100), [3, 4]);
        assert_eq!(kill_after(1, 100), [3, 4], "the guest was not told yet");
        assert_eq!(kill_after(1, 101), [4], "it was told, and the mark was left");
        assert_eq!(kill_after(2, 101), [4]);
        assert_eq!(kill_after(3, 101), [4]);
    }

    #[test]
    fn memory_that_does_not_fit_is_refused() {
        let (made, fd) = Inflight::create(&area(2, 8), DISK).unwrap();
        let open = |area: &InflightArea| Inflight::open(area, fd.try_clone().unwrap());
        assert!(open(&made).is_ok());
        assert!(open(&InflightArea { rings: 3, ..made }).is_err());
        assert!(open(&InflightArea { bytes: made.bytes + 4096, ..made }).is_err());
        assert!(open(&InflightArea { file_offset: u64::MAX, ..made }).is_err());
        assert!(Inflight::create(&area(0, 8), DISK).is_err());
        assert!(Inflight::create(&area(1, SIZE_MAX + 1), DISK).is_err());
        let inflight = Rc::new(open(&made).unwrap());
        assert!(inflight.ring(2, 8).is_none() && inflight.ring(1, 16).is_none());
        assert!(ftruncate(&fd, 0).is_err(), "its length is sealed");
    }
}

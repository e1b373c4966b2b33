//! A split virtqueue in guest memory, as its device sees it (virtio 1.2, section 2.7).
//!
//! ```text
//! descriptors   16 bytes each: address, length, flags, next
//! available     flags, index, ring of heads, used event      written by the guest
//! used          flags, index, ring of (head, length), available event   written here
//! ```
//!
//! The guest is not trusted with anything: what it writes can end this queue ([`Broken`]), and
//! nothing else. A queue that is broken is not looked at again until the guest sets it up anew.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{GuestAddress, GuestMemoryError};

use crate::inflight::Tracker;
use crate::memory::{Memory, Span, Spans};
use crate::protocol::RingAddresses;

/// Most descriptors of a queue; QEMU's limit.
pub(crate) const SIZE_MAX: u16 = 1024;

/// Most descriptors of a request. The standard allows as many as the queue has; indirect ones do
/// not lie in it, and some drivers do not care.
const CHAIN_MAX: usize = SIZE_MAX as usize;

const DESCRIPTOR_BYTES: u64 = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// The guest does not want to be interrupted; the device does not want to be kicked.
const NO_INTERRUPT: u16 = 1;
const NO_KICK: u16 = 1;

/// A queue makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// Its size is no power of two, or too large.
    #[error("a ring cannot have {0} descriptors")]
    Size(u32),
    /// It does not lie in guest memory.
    #[error("the ring does not lie in the memory of the guest")]
    Place,
    /// A part of it, or a status byte, cannot be reached.
    #[error("a part of the ring cannot be reached")]
    Memory(#[from] GuestMemoryError),
    /// There are more entries than it has room for.
    #[error("more is available than the ring has room for")]
    Available,
    /// A head lies outside of it, or is available twice.
    #[error("descriptor {0} cannot be the head of a request")]
    Head(u16),
    /// A descriptor lies outside of its table, or tables are nested.
    #[error("the descriptors of a request are wrong")]
    Descriptor,
    /// Descriptors that form a loop, or too many.
    #[error("a request has more than {max} descriptors", max = CHAIN_MAX)]
    Long,
    /// There is no room for a header or a status.
    #[error("a request has no room for its header or its status")]
    Short,
    /// What was in flight cannot be tracked.
    #[error("there is no memory for what is in flight in this ring")]
    Untracked,
}

/// A request as the guest lays it out.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// By which the guest knows it.
    pub(crate) head: u16,
    /// What the device may read.
    pub(crate) readable: Spans,
    /// What the device may write; it comes after that.
    pub(crate) writable: Spans,
}

/// How a queue is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) size: u32,
    pub(crate) addresses: RingAddresses,
    /// The entry of the available ring that comes next.
    pub(crate) base: u16,
    /// Whether each side says by an index from when on it wants to be told.
    pub(crate) event_index: bool,
}

/// A queue that is set up.
pub(crate) struct Queue {
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    next_available: u16,
    next_used: u16,
    event_index: bool,
    /// The used index when the guest was told last, if it was.
    told: Option<u16>,
    kicks_wanted: bool,
    in_flight: Vec<bool>,
    /// What an earlier daemon left undone.
    undone: VecDeque<u16>,
    tracker: Option<Tracker>,
}

impl Queue {
    /// Looks at a queue for the first time.
    pub(crate) fn open(
        layout: &Layout,
        memory: &Memory,
        tracker: Option<Tracker>,
    ) -> Result<Self, Broken> {
        let wrong = || Broken::Size(layout.size);
        let size = u16::try_from(layout.size).map_err(|_| wrong())?;
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(wrong());
        }
        let place = |user: u64, bytes: u64, alignment: u64| {
            let found = memory.guest_address(user, bytes).ok_or(Broken::Place)?;
            if found.0.is_multiple_of(alignment) { Ok(found) } else { Err(Broken::Place) }
        };
        let entries = u64::from(size);
        let RingAddresses { descriptors, available, used } = layout.addresses;
        let mut queue = Self {
            size,
            descriptors: place(descriptors, DESCRIPTOR_BYTES * entries, 16)?,
            available: place(available, 6 + 2 * entries, 2)?,
            used: place(used, 6 + 8 * entries, 4)?,
            next_available: layout.base,
            next_used: 0,
            event_index: layout.event_index,
            told: None,
            kicks_wanted: true,
            in_flight: vec![false; usize::from(size)],
            undone: VecDeque::new(),
            tracker,
        };
        queue.next_used = memory.load(after(queue.used, 2), Ordering::Acquire)?;
        if let Some(tracker) = &queue.tracker {
            queue.undone = tracker.recover(queue.next_used).into();
            // What is not used yet was begun in order: as many as are in flight have been taken.
            let begun = u16::try_from(queue.undone.len()).unwrap_or(size);
            queue.next_available = queue.next_used.wrapping_add(begun);
        }
        for &head in &queue.undone {
            if let Some(in_flight) = queue.in_flight.get_mut(usize::from(head)) {
                *in_flight = true;
            }
        }
        Ok(queue)
    }

    /// Number of descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The entry of the available ring that comes next.
    pub(crate) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The next request, first of those that an earlier daemon left undone.
    pub(crate) fn take(&mut self, memory: &Memory) -> Result<Option<Chain>, Broken> {
        if let Some(head) = self.undone.pop_front() {
            return self.chain(head, memory).map(Some);
        }
        let ahead = self.available_index(memory)?.wrapping_sub(self.next_available);
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > self.size {
            return Err(Broken::Available);
        }
        let entry = u64::from(self.next_available % self.size);
        let head: u16 = memory.load(after(self.available, 4 + 2 * entry), Ordering::Relaxed)?;
        match self.in_flight.get_mut(usize::from(head)) {
            Some(in_flight) if !*in_flight => *in_flight = true,
            _ => return Err(Broken::Head(head)),
        }
        self.next_available = self.next_available.wrapping_add(1);
        if let Some(tracker) = &self.tracker {
            tracker.begin(head);
        }
        self.chain(head, memory).map(Some)
    }

    /// Whether there is something left that an earlier daemon left undone.
    pub(crate) fn has_undone(&self) -> bool {
        !self.undone.is_empty()
    }

    /// Tells the guest that a request is done, with so many bytes written.
    pub(crate) fn put(&mut self, head: u16, written: u32, memory: &Memory) -> Result<(), Broken> {
        if let Some(tracker) = &self.tracker {
            tracker.ending(head);
        }
        let entry = u64::from(self.next_used % self.size);
        let [a, b, c, d] = u32::from(head).to_le_bytes();
        let [e, f, g, h] = written.to_le_bytes();
        memory.write(after(self.used, 4 + 8 * entry), &[a, b, c, d, e, f, g, h])?;
        self.next_used = self.next_used.wrapping_add(1);
        memory.store(self.next_used, after(self.used, 2), Ordering::Release)?;
        if let Some(tracker) = &self.tracker {
            tracker.ended(head, self.next_used);
        }
        if let Some(in_flight) = self.in_flight.get_mut(usize::from(head)) {
            *in_flight = false;
        }
        Ok(())
    }

    /// Whether the guest wants to be interrupted for what was put since this was last asked.
    pub(crate) fn should_interrupt(&mut self, memory: &Memory) -> Result<bool, Broken> {
        let told = self.told.replace(self.next_used);
        if told == Some(self.next_used) {
            return Ok(false);
        }
        // What was put must be seen before what the guest wants is read; it does the reverse.
        fence(Ordering::SeqCst);
        let Some(told) = told else { return Ok(true) };
        if !self.event_index {
            let flags: u16 = memory.load(self.available, Ordering::Relaxed)?;
            return Ok(flags & NO_INTERRUPT == 0);
        }
        let place = after(self.available, 4 + 2 * u64::from(self.size));
        let event: u16 = memory.load(place, Ordering::Relaxed)?;
        Ok(is_between(event, told, self.next_used))
    }

    /// Asks the guest not to kick, as long as it is looked at anyway.
    pub(crate) fn refuse_kicks(&mut self, memory: &Memory) -> Result<(), Broken> {
        // With an event index kicks stay away by themselves until the index is moved.
        if self.kicks_wanted && !self.event_index {
            memory.store(NO_KICK, self.used, Ordering::Relaxed)?;
        }
        self.kicks_wanted = false;
        Ok(())
    }

    /// Asks the guest to kick for what comes next. `true` if something has come already, for which
    /// it may not.
    pub(crate) fn want_kicks(&mut self, memory: &Memory) -> Result<bool, Broken> {
        if self.event_index {
            let place = after(self.used, 4 + 8 * u64::from(self.size));
            memory.store(self.next_available, place, Ordering::Relaxed)?;
        } else {
            memory.store(0u16, self.used, Ordering::Relaxed)?;
        }
        self.kicks_wanted = true;
        // The wish must be seen before the index is read; the guest does the reverse.
        fence(Ordering::SeqCst);
        Ok(self.available_index(memory)? != self.next_available)
    }

    /// Whether the guest has put something into the ring that was not taken yet; also if it cannot be
    /// read, of which taking tells.
    pub(crate) fn has_news(&self, memory: &Memory) -> bool {
        self.available_index(memory).map_or(true, |index| index != self.next_available)
    }

    /// Gives up what is in flight: the queue is broken, and another one may take its place.
    pub(crate) fn forget(&self) {
        if let Some(tracker) = &self.tracker {
            tracker.forget();
        }
    }

    fn available_index(&self, memory: &Memory) -> Result<u16, Broken> {
        Ok(memory.load(after(self.available, 2), Ordering::Acquire)?)
    }

    /// Follows the descriptors from `head` on.
    fn chain(&self, head: u16, memory: &Memory) -> Result<Chain, Broken> {
        let mut chain = Chain { head, readable: Spans::default(), writable: Spans::default() };
        let mut table = Table { start: self.descriptors, entries: u64::from(self.size) };
        let mut indirect = false;
        let mut index = head;
        for _ in 0..CHAIN_MAX {
            let descriptor = table.read(index, memory)?;
            if descriptor.flags & FLAG_INDIRECT != 0 {
                let bytes = u64::from(descriptor.span.bytes);
                let plain = bytes > 0 && bytes.is_multiple_of(DESCRIPTOR_BYTES);
                if indirect || !plain || descriptor.flags & FLAG_NEXT != 0 {
                    return Err(Broken::Descriptor);
                }
                indirect = true;
                let entries = bytes / DESCRIPTOR_BYTES;
                table = Table { start: descriptor.span.address, entries };
                index = 0;
                continue;
            }
            if descriptor.flags & FLAG_WRITE != 0 {
                chain.writable.0.push(descriptor.span);
            } else if chain.writable.0.is_empty() {
                chain.readable.0.push(descriptor.span);
            } else {
                return Err(Broken::Descriptor);
            }
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next;
        }
        Err(Broken::Long)
    }
}

/// Where descriptors lie.
struct Table {
    start: GuestAddress,
    entries: u64,
}

struct Descriptor {
    span: Span,
    flags: u16,
    next: u16,
}

impl Table {
    fn read(&self, index: u16, memory: &Memory) -> Result<Descriptor, Broken> {
        if u64::from(index) >= self.entries {
            return Err(Broken::Descriptor);
        }
        let mut bytes = [0; 16];
        memory.read(after(self.start, DESCRIPTOR_BYTES * u64::from(index)), &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Descriptor {
            span: Span {
                address: GuestAddress(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
                bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            },
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// An address behind another one. One that wraps around lies in no guest's memory.
fn after(start: GuestAddress, bytes: u64) -> GuestAddress {
    GuestAddress(start.0.saturating_add(bytes))
}

/// Whether the index `event` was passed on the way from `from` to `to` (virtio 1.2, 2.7.7.2).
fn is_between(event: u16, from: u16, to: u16) -> bool {
    to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from)
}

#[cfg(test)]
mod tests;

//! A device behind a vhost-user socket, and the memory that is shared with it.
//!
//! Operations are told apart by the slot that they use: a piece of the shared memory, which belongs
//! to the device from the start of an operation until its completion was seen.
#![expect(
    unsafe_code,
    reason = "the memory is shared with another process; blkio fills what it is given"
)]

use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};

use crate::random::Random;

/// Longest buffer of a request: what a guest's kernel has in one piece is no longer, mostly.
const SEGMENT_BYTES: usize = 64 << 10;

/// Bytes that get new content together.
const BLOCK_BYTES: usize = 4 << 10;

/// A connected device with one ring.
pub(crate) struct Device {
    ring: Blkioq,
    // Behind the ring, since it goes when this is dropped.
    _driver: Blkio,
    memory: MemoryRegion,
    slot_bytes: usize,
    /// The buffers of each slot.
    segments: Vec<Vec<iovec>>,
    completions: Vec<MaybeUninit<Completion>>,
}

impl Device {
    /// Connects to the device at `socket`, with `slots` pieces of memory of `slot_bytes` each, full
    /// of bytes that look random.
    ///
    /// # Errors
    /// If nobody answers there.
    pub(crate) fn connect(socket: &Path, slots: usize, slot_bytes: usize) -> Result<Self> {
        ensure!(slot_bytes.is_multiple_of(BLOCK_BYTES), "a slot is made of blocks");
        let mut driver = Blkio::new("virtio-blk-vhost-user")?;
        driver.set_str("path", socket.to_str().context("the path of a socket")?)?;
        driver.connect().with_context(|| format!("connect to {}", socket.display()))?;
        let mut started = driver.start()?;
        let ring = started.queues.pop().context("a device without a ring")?;
        let memory = driver.alloc_mem_region(slots * slot_bytes)?;
        driver.map_mem_region(&memory)?;
        let segments = (0..slots).map(|slot| segments(&memory, slot * slot_bytes, slot_bytes));
        let segments = segments.collect();
        let completions = (0..slots).map(|_| MaybeUninit::new(nothing())).collect();
        let device = Self { ring, _driver: driver, memory, slot_bytes, segments, completions };
        let mut random = Random::new(1);
        for word in 0..device.memory.len / size_of::<u64>() {
            device.fill(word * size_of::<u64>(), random.next());
        }
        Ok(device)
    }

    /// Starts a read into a slot.
    ///
    /// # Errors
    /// If there is no such slot.
    pub(crate) fn read(&mut self, slot: usize, offset: u64) -> Result<()> {
        let segments = self.segments.get(slot).context("a slot")?;
        let count = u32::try_from(segments.len())?;
        self.ring.readv(offset, segments.as_ptr(), count, slot, ReqFlags::empty());
        Ok(())
    }

    /// Starts a write of a slot, each block of which `stamp` makes another one than before.
    ///
    /// # Errors
    /// If there is no such slot.
    pub(crate) fn write(&mut self, slot: usize, offset: u64, stamp: u64) -> Result<()> {
        let segments = self.segments.get(slot).context("a slot")?;
        let start = slot * self.slot_bytes;
        for block in (start..start + self.slot_bytes).step_by(BLOCK_BYTES) {
            self.fill(block, stamp.wrapping_add(block as u64));
        }
        let count = u32::try_from(segments.len())?;
        self.ring.writev(offset, segments.as_ptr(), count, slot, ReqFlags::empty());
        Ok(())
    }

    /// Waits until something has completed, and tells which slots are free again.
    ///
    /// # Errors
    /// If an operation failed, or the device is gone.
    pub(crate) fn wait(&mut self, completed: &mut Vec<usize>) -> Result<()> {
        completed.clear();
        let count = self.ring.do_io(&mut self.completions, 1, None, None)?;
        for completion in self.completions.iter().take(count) {
            // SAFETY: each was initialised when it was made, and `do_io` has written the first
            // `count` of them.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(completion.ret == 0, "an operation failed with {}", completion.ret);
            completed.push(completion.user_data);
        }
        Ok(())
    }

    /// Writes a word into the shared memory.
    fn fill(&self, offset: usize, word: u64) {
        assert!(offset + size_of::<u64>() <= self.memory.len, "it lies in the memory");
        assert!(offset.is_multiple_of(size_of::<u64>()), "it is aligned");
        let place = std::ptr::with_exposed_provenance_mut::<u64>(self.memory.addr + offset);
        // SAFETY: blkio has mapped `len` bytes from `addr` on, writable and aligned to pages, for as
        // long as the driver lives, and `offset` was checked against that. No reference to the memory
        // exists; the device may read it meanwhile, which is why the write is volatile.
        unsafe { place.write_volatile(word) };
    }
}

/// The buffers of the slot that begins at `start`.
fn segments(memory: &MemoryRegion, start: usize, bytes: usize) -> Vec<iovec> {
    let segment = |offset: usize| iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(memory.addr + start + offset),
        iov_len: SEGMENT_BYTES.min(bytes - offset),
    };
    (0..bytes).step_by(SEGMENT_BYTES).map(segment).collect()
}

/// A completion of nothing.
fn nothing() -> Completion {
    Completion { user_data: 0, error_msg: std::ptr::null(), ret: 0, reserved_: [0; 12] }
}

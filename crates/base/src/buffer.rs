//! Buffers of whole blocks, aligned as O_DIRECT wants them, and the pool that recycles them.
//!
//! The kernel borrows a buffer from submission to completion, so an operation owns its buffers
//! (through [`BlockSlice`]) until then. Buffers come from a [`BufferPool`] and return to it when
//! dropped: allocating and zeroing 1 MiB costs more than writing it to a fast device.

use std::cell::RefCell;
use std::fmt;
use std::rc::{Rc, Weak};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::BLOCK_SIZE;

/// One block of bytes at an address that O_DIRECT accepts.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_SIZE]);

/// A run of blocks in memory. Returns to its pool when dropped; contents are then arbitrary.
pub struct Buffer {
    blocks: Box<[Block]>,
    /// Index under which an I/O engine registered this buffer with the kernel.
    registration: Option<u16>,
    home: Weak<RefCell<Shelves>>,
}

impl Buffer {
    /// A zeroed buffer of `block_count` blocks that belongs to no pool.
    #[must_use]
    pub fn zeroed(block_count: usize) -> Self {
        Self { blocks: zeroed_blocks(block_count), registration: None, home: Weak::new() }
    }

    /// A pool-less buffer that holds `bytes`, padded with zeroes to whole blocks.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len().div_ceil(BLOCK_SIZE));
        for (to, from) in buffer.bytes_mut().iter_mut().zip(bytes) {
            *to = *from;
        }
        buffer
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.blocks.as_bytes()
    }

    /// All bytes, to be changed.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.blocks.as_mut_bytes()
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The blocks, to be changed.
    #[must_use]
    pub fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.blocks
    }

    /// Index under which the I/O engine registered this buffer, if it did.
    #[must_use]
    pub fn registration(&self) -> Option<u16> {
        self.registration
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} blocks)", self.block_count())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let blocks = std::mem::take(&mut self.blocks);
            home.borrow_mut().put(blocks, self.registration);
        }
    }
}

fn zeroed_blocks(block_count: usize) -> Box<[Block]> {
    let mut blocks = Vec::with_capacity(block_count);
    blocks.resize_with(block_count, Block::new_zeroed);
    blocks.into_boxed_slice()
}

/// Whole blocks of a shared buffer: what a device operation reads from or a reply is sent from.
#[derive(Clone, Debug)]
pub struct BlockSlice {
    buffer: Rc<Buffer>,
    first: usize,
    count: usize,
}

impl BlockSlice {
    /// The blocks `first .. first + count` of `buffer`.
    ///
    /// # Panics
    /// If the range does not lie within `buffer`.
    #[must_use]
    pub fn new(buffer: Rc<Buffer>, first: usize, count: usize) -> Self {
        assert!(first <= buffer.block_count() && count <= buffer.block_count() - first);
        Self { buffer, first, count }
    }

    /// The whole of `buffer`.
    #[must_use]
    pub fn whole(buffer: Rc<Buffer>) -> Self {
        let count = buffer.block_count();
        Self { buffer, first: 0, count }
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> usize {
        self.count
    }

    /// Its blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        self.buffer.blocks.get(self.first..self.first + self.count).unwrap_or_default()
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.blocks().as_bytes()
    }

    /// The buffer that it lies in.
    #[must_use]
    pub fn buffer(&self) -> &Rc<Buffer> {
        &self.buffer
    }

    /// Index of its first block in the buffer.
    #[must_use]
    pub fn first_block(&self) -> usize {
        self.first
    }
}

/// Recycles buffers by size. Single-threaded; clones share the pool.
#[derive(Clone, Default)]
pub struct BufferPool {
    shelves: Rc<RefCell<Shelves>>,
}

/// Sizes that are kept, in blocks. A request is rounded up to the next one.
const SHELF_BLOCKS: [usize; 5] = [1, 4, 16, 64, 256];

/// Most bytes that one shelf keeps: what is returned above it is freed.
const SHELF_BYTES_MAX: usize = 16 << 20;

#[derive(Default)]
struct Shelves {
    registered: Vec<(Box<[Block]>, u16)>,
    by_size: [Vec<Box<[Block]>>; SHELF_BLOCKS.len()],
}

impl Shelves {
    fn put(&mut self, blocks: Box<[Block]>, registration: Option<u16>) {
        if let Some(index) = registration {
            self.registered.push((blocks, index));
            return;
        }
        let shelf = SHELF_BLOCKS.iter().position(|&size| size == blocks.len());
        if let Some(shelf) = shelf.and_then(|index| self.by_size.get_mut(index))
            && shelf.len() * blocks.len() * BLOCK_SIZE < SHELF_BYTES_MAX
        {
            shelf.push(blocks);
        }
    }
}

impl BufferPool {
    /// Blocks of the buffer that [`Self::take`] gives for so many.
    #[must_use]
    pub fn size_of(block_count: usize) -> usize {
        SHELF_BLOCKS.into_iter().find(|&size| size >= block_count).unwrap_or(block_count)
    }

    /// A buffer of at least `block_count` blocks with arbitrary (initialised) contents.
    /// `block_count()` of the result may be larger: sizes are rounded up to 1, 4, 16, 64 or 256.
    #[must_use]
    pub fn take(&self, block_count: usize) -> Buffer {
        let home = Rc::downgrade(&self.shelves);
        let mut shelves = self.shelves.borrow_mut();
        if block_count == 1
            && let Some((blocks, index)) = shelves.registered.pop()
        {
            return Buffer { blocks, registration: Some(index), home };
        }
        let size = Self::size_of(block_count);
        let shelf = SHELF_BLOCKS.iter().position(|&it| it == size);
        let recycled = shelf.and_then(|shelf| shelves.by_size.get_mut(shelf)).and_then(Vec::pop);
        let blocks = recycled.unwrap_or_else(|| zeroed_blocks(size));
        Buffer { blocks, registration: None, home }
    }

    /// As [`Self::take`], but never a registered buffer: for what is kept, such as cached nodes, so
    /// that registered ones stay with the I/O that they speed up.
    #[must_use]
    pub fn take_to_keep(&self, block_count: usize) -> Buffer {
        let set_aside = std::mem::take(&mut self.shelves.borrow_mut().registered);
        let buffer = self.take(block_count);
        self.shelves.borrow_mut().registered = set_aside;
        buffer
    }

    /// Creates `count` single-block buffers and hands their blocks to `register`, which tells the
    /// kernel about them in that order; from then on they are what `take(1)` prefers.
    /// The blocks never move or go away while the pool or a buffer of it lives.
    ///
    /// # Errors
    /// Those of `register`; the pool is unchanged then.
    pub fn register<E>(
        &self,
        count: u16,
        register: impl FnOnce(&[Box<[Block]>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let blocks: Vec<Box<[Block]>> = (0..count).map(|_| zeroed_blocks(1)).collect();
        register(&blocks)?;
        self.shelves.borrow_mut().registered.extend(blocks.into_iter().zip(0..count));
        Ok(())
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BufferPool")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_recycled() {
        let pool = BufferPool::default();
        let mut first = pool.take(3);
        assert_eq!(first.block_count(), 4, "rounded up to a shelf");
        assert_eq!(first.bytes().as_ptr().align_offset(BLOCK_SIZE), 0);
        first.bytes_mut().fill(7);
        drop(first);
        assert_eq!(pool.take(4).bytes().first(), Some(&7), "the same memory came back");
        assert_eq!(pool.take(1000).block_count(), 1000, "larger than any shelf");
    }

    #[test]
    fn registered_buffers_keep_their_index() {
        let pool = BufferPool::default();
        pool.register(2, |blocks| {
            assert_eq!(blocks.len(), 2);
            Ok::<(), ()>(())
        })
        .unwrap();
        let held: Vec<Buffer> = (0..3).map(|_| pool.take(1)).collect();
        let mut seen: Vec<_> = held.iter().filter_map(Buffer::registration).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1], "the third is an ordinary buffer");
    }
}

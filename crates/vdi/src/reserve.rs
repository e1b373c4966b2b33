//! Blocks for nodes and pages, taken and really allocated below ahead of need (design rules 25, 26).
//!
//! A checkpoint must not fail for lack of space: only it can make some. So guests are let in only
//! while the reserve holds what the nodes that they dirty may need, and on a sparse file the blocks
//! of the reserve are allocated before they count. So a full file system below refuses data of
//! guests, and never a node.
//!
//! Data is allocated below ahead of its writes as well, but only for speed: a file system that has to
//! find space for each write does one after the other. Nobody waits for that, and where it fails the
//! write itself finds out.
//!
//! The blocks of the reserve are busy, as those of a window are, and nobody's: after a crash they
//! are free again.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};

use base::{ErrorKind, Pba};
use blockstore::allocator::{Run, Space, Window};
use device::Cause;
use runtime::sync::Semaphore;

use crate::Error;
use crate::engine::Engine;

/// Blocks that are allocated below at a time: 16 MiB, the shortest extent.
const PART_BLOCKS: u64 = 4096;

/// Parts that data is ahead of its writes, the one that is being written included.
const PARTS_AHEAD: usize = 2;

/// Parts that are remembered as asked for: 1 TiB. To ask again costs little.
const PARTS_ASKED_MAX: usize = 64 << 10;

/// Blocks that are taken at a time.
const STEP_BLOCKS: u64 = 256;

/// More than is needed by so much goes back.
const EXCESS_BLOCKS: u64 = 4096;

/// Nodes that a checkpoint may need beyond those of changed leaves: tables, bitmaps, paths.
const NODES_MARGIN: u64 = 256;

/// The blocks that checkpoints take.
pub(crate) struct Reserve {
    runs: RefCell<VecDeque<Run>>,
    block_count: Cell<u64>,
    window: RefCell<Window>,
    /// Parts of the store that are known to be really allocated, by number.
    backed: RefCell<BTreeSet<u64>>,
    /// Parts that were asked for ahead of data.
    asked: RefCell<BTreeSet<u64>>,
    filling: Semaphore,
}

impl Reserve {
    pub(crate) fn new() -> Self {
        Self {
            runs: RefCell::default(),
            block_count: Cell::new(0),
            window: RefCell::default(),
            backed: RefCell::default(),
            asked: RefCell::default(),
            filling: Semaphore::new(1),
        }
    }

    /// Blocks in it.
    pub(crate) fn block_count(&self) -> u64 {
        self.block_count.get()
    }

    /// Takes a block.
    pub(crate) fn take(&self) -> Option<Pba> {
        let mut runs = self.runs.borrow_mut();
        let run = runs.front_mut()?;
        let pba = run.start;
        *run = Run { start: pba.plus(1), count: run.count - 1 };
        if run.count == 0 {
            runs.pop_front();
        }
        self.block_count.set(self.block_count.get() - 1);
        Some(pba)
    }

    fn put(&self, run: Run) {
        self.runs.borrow_mut().push_back(run);
        self.block_count.set(self.block_count.get() + run.count);
    }

    /// Notes that the space of these blocks was given back below.
    pub(crate) fn forget_backed(&self, run: Run) {
        let first = run.start.get() / PART_BLOCKS;
        for part in first..=(run.end().get() - 1) / PART_BLOCKS {
            self.backed.borrow_mut().remove(&part);
            self.asked.borrow_mut().remove(&part);
        }
    }
}

impl Engine {
    /// Waits until there is room for the nodes of the next checkpoints (design rule 25): each
    /// changed node with its path, while the old ones still stand. Whether there is.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) async fn metadata_suffices(&self) -> Result<bool, Error> {
        self.metadata_suffices_for(0).await
    }

    /// As [`Self::metadata_suffices`], and for so many nodes more.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) async fn metadata_suffices_for(&self, nodes: u64) -> Result<bool, Error> {
        let needed = self.needed_with(nodes);
        Ok(self.reserve.block_count() >= needed || self.fill_reserve(needed).await?)
    }

    /// Blocks that the next checkpoints may need, with so many nodes more.
    pub(crate) fn needed_with(&self, nodes: u64) -> u64 {
        self.nodes_needed() + 2 * nodes
    }

    /// Blocks that the next checkpoints may need.
    pub(crate) fn nodes_needed(&self) -> u64 {
        let pages = self.registry.borrow().changed_pages();
        2 * (self.changed_nodes.get() + self.owed_nodes.get() + pages) + NODES_MARGIN
    }

    /// Puts blocks into the reserve until it has so many. Whether it has.
    ///
    /// # Errors
    /// If the device fails; a lack of space below is none.
    pub(crate) async fn fill_reserve(&self, needed: u64) -> Result<bool, Error> {
        let _one = self.reserve.filling.acquire(1).await;
        while self.reserve.block_count() < needed {
            let run = {
                let mut window = self.reserve.window.borrow_mut();
                self.allocator.allocate(Space::Metadata, &mut window, STEP_BLOCKS)
            };
            let Some(run) = run else { return Ok(false) };
            match self.back(run).await {
                Ok(true) => self.reserve.put(run),
                unbacked => {
                    self.allocator.free_now(run);
                    self.allocator.return_window(&mut self.reserve.window.borrow_mut());
                    return unbacked;
                }
            }
        }
        Ok(true)
    }

    /// Has the parts that a run lies in really allocated. Whether there was space below.
    async fn back(&self, run: Run) -> Result<bool, Error> {
        let first = run.start.get() / PART_BLOCKS;
        let last = (run.end().get() - 1) / PART_BLOCKS;
        for part in first..=last {
            if self.reserve.backed.borrow().contains(&part) {
                continue;
            }
            let start = Pba::new(part * PART_BLOCKS);
            match self.device.allocate(start, PART_BLOCKS).await {
                Ok(()) => {}
                // Then there is nothing that could be done.
                Err(error) if error.cause == Cause::Unsupported => {}
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    tracing::warn!(block = %start, "there is no space below for metadata");
                    return Ok(false);
                }
                Err(error) => return Err(blockstore::Error::from(error).into()),
            }
            self.reserve.backed.borrow_mut().insert(part);
        }
        Ok(true)
    }

    /// Has the part that data is about to be written to, and the one behind it, really allocated,
    /// in the background.
    pub(crate) fn back_ahead(&self, run: Run) {
        let first = run.start.get() / PART_BLOCKS;
        let end = self.device.block_count() / PART_BLOCKS;
        for part in (first..end).take(PARTS_AHEAD) {
            let mut asked = self.reserve.asked.borrow_mut();
            if !asked.insert(part) {
                continue;
            }
            if asked.len() > PARTS_ASKED_MAX {
                asked.clear();
            }
            let device = self.device.clone();
            drop(self.runtime.spawn(async move {
                // The writes say what is wrong.
                let _ = device.allocate(Pba::new(part * PART_BLOCKS), PART_BLOCKS).await;
            }));
        }
    }

    /// A source of blocks for the nodes of a checkpoint; notes in `allocated` what it gave.
    pub(crate) fn node_blocks<'a>(
        &'a self,
        allocated: &'a RefCell<Vec<Pba>>,
    ) -> impl FnMut() -> Result<Pba, blockstore::Error> + use<'a> {
        move || {
            let pba = self.reserve.take().ok_or_else(|| {
                let message = "no block is free for metadata";
                blockstore::Error::refused(ErrorKind::NoSpace, message)
            })?;
            allocated.borrow_mut().push(pba);
            Ok(pba)
        }
    }

    /// Gives back what is more than enough, so that it may become data.
    pub(crate) fn trim_reserve(&self) {
        let enough = self.nodes_needed() + EXCESS_BLOCKS;
        while self.reserve.block_count() > enough {
            let Some(run) = self.reserve.runs.borrow_mut().pop_back() else { return };
            self.reserve.block_count.set(self.reserve.block_count() - run.count);
            self.allocator.free_now(run);
        }
    }
}

//! Verified metadata blocks in memory: tree nodes and table pages, bounded in bytes.
//!
//! Invariants:
//! - the bytes that are charged never exceed the capacity;
//! - a node is returned only for an entry whose hash it was verified against, so that a block
//!   which was released and rewritten is never served as what it was (design rule 19).
//!
//! Eviction is S3-FIFO (Yang et al., SOSP 2023): new nodes pass through a small queue, and only
//! those that were used there, or are asked for again soon after they left it, get into the main
//! queue. Uses that follow one another closely count once: a scan of a disk uses each leaf hundreds
//! of times in a row and never again. It thus flows through a tenth of the cache, while the upper
//! levels of trees, new ones of a checkpoint too, get into the main queue without a miss.
//! Rejected: LRU and CLOCK, which a scan empties; 2Q, which has to miss a new root once.

mod queue;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use base::{BLOCK_SIZE, Pba};
use ondisk::{Entry, Node};

use queue::{Queue, Slab};

/// What a node is charged beyond its buffer, a generous estimate of the tables' share.
const OVERHEAD_BYTES: usize = 128;

/// The small queue's share of the capacity is one part in this many.
const SMALL_SHARE: usize = 10;

/// Uses that are counted; more make no difference.
const USES_MAX: u8 = 3;

/// A use counts if, since the last one that did, one part in this many of the cache was inserted.
const BURST_SHARE: usize = 64;

/// A node leaves the small queue for the main one if it was used more often than this there.
const USES_TO_STAY: u8 = 1;

/// What the cache did so far, and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups that found their node.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Of the misses, those that found another node at that address, which was dropped.
    pub stale: u64,
    /// Nodes dropped to make room.
    pub evicted: u64,
    /// Nodes held.
    pub nodes: usize,
    /// Bytes charged for them: their buffers and a little more.
    pub bytes: usize,
    /// Most bytes that may be charged.
    pub capacity_bytes: usize,
}

/// A cache of nodes by address. For one thread; lookups and insertions take O(1), amortised.
///
/// Memory of an evicted node is freed when its last user drops it.
pub struct NodeCache {
    state: RefCell<State>,
}

struct Cached {
    pba: Pba,
    hash: u64,
    node: Node,
    charge: usize,
    uses: u8,
    /// Number of insertions when a use was last counted.
    used_at: u64,
    is_main: bool,
}

/// Which of the nodes that left the small queue unused will be taken straight into the main one.
#[derive(Default)]
struct Ghosts {
    order: VecDeque<(Pba, u64)>,
    sequences: HashMap<Pba, u64, PbaHash>,
    next: u64,
}

type PbaHash = BuildHasherDefault<PbaHasher>;

#[derive(Default)]
struct State {
    slots: HashMap<Pba, u32, PbaHash>,
    slab: Slab<Cached>,
    small: Queue,
    small_bytes: usize,
    main: Queue,
    ghosts: Ghosts,
    /// Number of insertions so far: the clock by which uses are told apart.
    insertions: u64,
    stats: CacheStats,
}

impl NodeCache {
    /// An empty cache that holds up to `capacity_bytes`; 0 holds nothing.
    #[must_use]
    pub fn new(capacity_bytes: usize) -> Self {
        let stats = CacheStats { capacity_bytes, ..CacheStats::default() };
        Self { state: RefCell::new(State { stats, ..State::default() }) }
    }

    /// The node at `pba` that `entry` of its parent names, if it is here. Another one that is
    /// cached for that block is stale, and is dropped.
    #[must_use]
    pub fn get(&self, pba: Pba, entry: &Entry) -> Option<Node> {
        let state = &mut *self.state.borrow_mut();
        let found = state.slots.get(&pba).copied();
        if let Some(slot) = found {
            let cached = state.slab.get_mut(slot);
            if entry.matches(cached.hash) {
                let burst = (state.stats.nodes / BURST_SHARE).max(1) as u64;
                if state.insertions - cached.used_at >= burst {
                    cached.uses = (cached.uses + 1).min(USES_MAX);
                    cached.used_at = state.insertions;
                }
                let node = cached.node.clone();
                state.stats.hits += 1;
                return Some(node);
            }
            state.drop_slot(slot);
            state.stats.stale += 1;
        }
        state.stats.misses += 1;
        None
    }

    /// Keeps a node that was verified against `hash`, in place of what is cached for that block.
    /// Others are evicted to make room; one larger than the whole cache is not kept.
    pub fn insert(&self, pba: Pba, hash: u64, node: Node) {
        let state = &mut *self.state.borrow_mut();
        if let Some(&slot) = state.slots.get(&pba) {
            state.drop_slot(slot);
        }
        // A node keeps its whole buffer alive, even if it is longer than a block.
        let charge = node.buffer().block_count() * BLOCK_SIZE + OVERHEAD_BYTES;
        if charge > state.stats.capacity_bytes {
            return;
        }
        state.make_room(charge);
        let is_main = state.ghosts.take(pba);
        state.insertions += 1;
        let used_at = state.insertions;
        let slot = state.slab.insert(Cached { pba, hash, node, charge, uses: 0, used_at, is_main });
        state.slots.insert(pba, slot);
        state.push(slot);
        state.stats.nodes += 1;
        state.stats.bytes += charge;
    }

    /// Drops what is cached for a block; to be called when the block is released.
    pub fn remove(&self, pba: Pba) {
        let state = &mut *self.state.borrow_mut();
        if let Some(&slot) = state.slots.get(&pba) {
            state.drop_slot(slot);
        }
        state.ghosts.take(pba);
    }

    /// Changes the capacity; evicts what exceeds it.
    pub fn set_capacity(&self, capacity_bytes: usize) {
        let state = &mut *self.state.borrow_mut();
        state.stats.capacity_bytes = capacity_bytes;
        state.make_room(0);
    }

    /// Counters and gauges.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        self.state.borrow().stats
    }
}

impl std::fmt::Debug for NodeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("NodeCache").field(&self.stats()).finish()
    }
}

impl State {
    /// Puts a slot at the back of the queue that it belongs to.
    fn push(&mut self, slot: u32) {
        let cached = self.slab.get_mut(slot);
        if cached.is_main {
            self.main.push_back(&mut self.slab, slot);
        } else {
            self.small_bytes += cached.charge;
            self.small.push_back(&mut self.slab, slot);
        }
    }

    /// Takes a slot out of its queue.
    fn unlink(&mut self, slot: u32) {
        let cached = self.slab.get_mut(slot);
        if cached.is_main {
            self.main.remove(&mut self.slab, slot);
        } else {
            self.small_bytes -= cached.charge;
            self.small.remove(&mut self.slab, slot);
        }
    }

    fn drop_slot(&mut self, slot: u32) {
        self.unlink(slot);
        let cached = self.slab.remove(slot);
        self.slots.remove(&cached.pba);
        self.stats.nodes -= 1;
        self.stats.bytes -= cached.charge;
    }

    /// Evicts until `charge` more bytes fit, or nothing is left.
    fn make_room(&mut self, charge: usize) {
        while self.stats.bytes + charge > self.stats.capacity_bytes {
            let small_is_long = self.small_bytes > self.stats.capacity_bytes / SMALL_SHARE;
            let oldest = match (self.small.front(), self.main.front()) {
                (Some(small), None) => small,
                (Some(small), Some(_)) if small_is_long => small,
                (_, Some(main)) => main,
                (None, None) => return,
            };
            self.evict_or_keep(oldest);
        }
    }

    /// Decides about the oldest node of a queue. One that is kept has its count of uses lowered,
    /// so that each is kept a few times at most before something is evicted.
    fn evict_or_keep(&mut self, slot: u32) {
        let cached = self.slab.get_mut(slot);
        let (pba, was_main) = (cached.pba, cached.is_main);
        let keep = if was_main { cached.uses > 0 } else { cached.uses > USES_TO_STAY };
        if keep {
            self.unlink(slot);
            let cached = self.slab.get_mut(slot);
            cached.uses = if was_main { cached.uses - 1 } else { 0 };
            cached.is_main = true;
            self.push(slot);
            return;
        }
        self.drop_slot(slot);
        self.stats.evicted += 1;
        if !was_main {
            self.ghosts.add(pba, self.stats.nodes);
        }
    }
}

impl Ghosts {
    /// Remembers an address, and forgets the oldest ones beyond `count_max`.
    fn add(&mut self, pba: Pba, count_max: usize) {
        self.next += 1;
        self.sequences.insert(pba, self.next);
        self.order.push_back((pba, self.next));
        while self.order.len() > count_max {
            let Some((oldest, sequence)) = self.order.pop_front() else { return };
            // The address may have been taken, and remembered again, since.
            if self.sequences.get(&oldest) == Some(&sequence) {
                self.sequences.remove(&oldest);
            }
        }
    }

    /// Forgets an address; whether it was remembered.
    fn take(&mut self, pba: Pba) -> bool {
        self.sequences.remove(&pba).is_some()
    }
}

/// Spreads block addresses, which are mostly neighbours, over a table. Not keyed: a guest cannot
/// choose physical addresses.
#[derive(Default)]
struct PbaHasher(u64);

impl Hasher for PbaHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // 2^64 divided by the golden ratio; the table uses the top and the bottom bits.
        let product = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

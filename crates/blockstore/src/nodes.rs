//! Metadata blocks: loading them verified, writing new ones. Blocks are immutable once written, so
//! the cache needs no invalidation; a hit counts only if it has the hash that the parent names.
//!
//! A block is *damaged* if its bytes are wrong, or if the device serves others and has failed this
//! one for a while. Only then may somebody give up what it says: a device that fails everything for
//! a moment must not take anything with it.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use base::{Block, BlockSlice, Buffer, Pba};
use device::{Device, DeviceError};
use ondisk::{Checksums, Entry, Node, SUPERBLOCK_COPIES};
use runtime::{Runtime, Time};

use crate::Error;
use crate::cache::NodeCache;
use crate::scheduler::{Batch, WriteScheduler};

/// How often a failed read is repeated before the medium's word is taken: of metadata, a host slot,
/// or what recovery verifies.
pub const READ_RETRIES: u32 = 3;

/// How often it is while loads are patient: for longer than it takes to give a block up.
pub(crate) const PATIENT_RETRIES: u32 = 600;

/// Pause before a failed read is repeated.
pub const RETRY_AFTER: Duration = Duration::from_millis(20);

/// How long a block must have failed to be read before it counts as damaged.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);

/// Most adjacent blocks that are read at once: 128 KiB.
const RUN_BLOCKS_MAX: usize = 32;

/// Failing blocks that are remembered.
const FAILING_MAX: usize = 1024;

/// Loads and writes metadata blocks. Clones share it.
#[derive(Clone)]
pub struct NodeStore(Rc<Inner>);

struct Inner {
    runtime: Runtime,
    device: Device,
    scheduler: WriteScheduler,
    checksums: Checksums,
    cache: NodeCache,
    /// Blocks whose write has not completed: they must not be read from the device yet.
    writing: RefCell<HashMap<Pba, (u64, Node)>>,
    /// Blocks that the device fails to read, and since when.
    failing: RefCell<HashMap<Pba, Time>>,
    patient: Cell<bool>,
    /// See [`NodeStore::give_up`].
    given_up: RefCell<HashSet<Pba>>,
}

impl NodeStore {
    /// A node store whose cache holds up to `cache_bytes`.
    #[must_use]
    pub fn new(
        runtime: Runtime,
        device: Device,
        scheduler: WriteScheduler,
        checksums: Checksums,
        cache_bytes: usize,
    ) -> Self {
        let cache = NodeCache::new(cache_bytes);
        Self(Rc::new(Inner {
            runtime,
            device,
            scheduler,
            checksums,
            cache,
            writing: RefCell::default(),
            failing: RefCell::default(),
            patient: Cell::new(false),
            given_up: RefCell::default(),
        }))
    }

    /// The cache, for its counters.
    #[must_use]
    pub fn cache(&self) -> &NodeCache {
        &self.0.cache
    }

    /// Checksums of the store.
    #[must_use]
    pub fn checksums(&self) -> &Checksums {
        &self.0.checksums
    }

    /// The runtime that loads run on.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.0.runtime
    }

    /// Makes a block damaged for good, whatever the device says later: what it names may be reused
    /// from now on. The owner remembers it when the store is opened again.
    pub fn give_up(&self, at: Pba) {
        self.0.given_up.borrow_mut().insert(at);
        self.0.cache.remove(at);
    }

    /// Whether a block was given up.
    #[must_use]
    pub fn is_given_up(&self, at: Pba) -> bool {
        self.0.given_up.borrow().contains(&at)
    }

    /// The block that `entry` names, if it is in memory.
    #[must_use]
    pub fn cached(&self, entry: Entry) -> Option<Node> {
        if self.is_given_up(entry.pba()) {
            return None;
        }
        self.0.cache.get(entry.pba(), &entry).or_else(|| {
            let writing = self.0.writing.borrow();
            let (hash, node) = writing.get(&entry.pba())?;
            entry.matches(*hash).then(|| node.clone())
        })
    }

    /// The block that `entry` names. The caller holds a read epoch, or knows otherwise that the
    /// block is not released meanwhile.
    ///
    /// # Errors
    /// `Damaged` if the block is damaged; device errors, if it may still be read later.
    pub async fn load(&self, entry: Entry) -> Result<Node, Error> {
        if let Some(node) = self.cached(entry) {
            return Ok(node);
        }
        let at = entry.pba();
        if self.is_given_up(at) {
            return Err(Error::Damaged { what: "metadata block (given up)", at });
        }
        // Twice: a bad transfer is not a bad block.
        for _ in 0..2 {
            let node = Node::from_verified(Rc::new(self.read_again(at).await?));
            let hash = self.0.checksums.block(&node.block().0);
            if entry.matches(hash) || base::mutant::active("ignore_metadata_checksum") {
                self.0.cache.insert(at, hash, node.clone());
                return Ok(node);
            }
        }
        tracing::error!(block = %at, "a metadata block is damaged");
        Err(Error::Damaged { what: "metadata block", at })
    }

    /// Makes loads wait until it is clear whether a block that fails can be read, or no longer: for
    /// those who cannot come back later.
    pub fn set_patient(&self, patient: bool) {
        self.0.patient.set(patient);
    }

    /// Reads a block; a medium that fails it is asked again before its word is taken.
    async fn read_again(&self, at: Pba) -> Result<Buffer, Error> {
        let mut attempts = 0;
        loop {
            let buffer = self.0.runtime.buffers().take_to_keep(1);
            let error = match self.0.device.read(at, 1, buffer).await {
                Ok(buffer) => {
                    self.0.failing.borrow_mut().remove(&at);
                    return Ok(buffer);
                }
                Err(error) => error,
            };
            self.0.scheduler.suspect(error);
            if self.fails_for_long(&error).await {
                tracing::error!(%error, "a metadata block cannot be read and is given up");
                return Err(Error::Damaged { what: "metadata block (unreadable)", at });
            }
            let retries = if self.0.patient.get() { PATIENT_RETRIES } else { READ_RETRIES };
            if attempts == retries || self.0.scheduler.failure().is_some() {
                return Err(error.into());
            }
            attempts += 1;
            self.0.runtime.sleep(RETRY_AFTER).await;
        }
    }

    /// Whether a block has failed for so long, on a device that serves others, that it counts as
    /// damaged.
    async fn fails_for_long(&self, error: &DeviceError) -> bool {
        if !error.is_medium() {
            return false;
        }
        let now = self.0.runtime.now();
        let since = {
            let mut failing = self.0.failing.borrow_mut();
            if failing.len() >= FAILING_MAX {
                failing.clear();
            }
            *failing.entry(error.at).or_insert(now)
        };
        now.since(since) >= GIVE_UP_AFTER && self.serves_others().await
    }

    async fn serves_others(&self) -> bool {
        for at in SUPERBLOCK_COPIES {
            let buffer = self.0.runtime.buffers().take(1);
            if self.0.device.read(at, 1, buffer).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Loads several blocks at once, adjacent ones by one read; the answers are in order.
    pub async fn load_all(&self, entries: Vec<Entry>) -> Vec<Result<Node, Error>> {
        let mut loaded = Vec::with_capacity(entries.len());
        let mut missing = Vec::new();
        for (index, entry) in entries.into_iter().enumerate() {
            match self.cached(entry) {
                Some(node) => loaded.push((index, Ok(node))),
                None => missing.push((index, entry)),
            }
        }
        missing.sort_unstable_by_key(|(_, entry)| entry.pba());
        let runs = missing.chunk_by(|(_, one), (_, next)| next.pba() == one.pba().plus(1));
        let reads: Vec<_> = runs
            .flat_map(|run| run.chunks(RUN_BLOCKS_MAX))
            .map(|run| {
                let (nodes, run) = (self.clone(), run.to_vec());
                self.0.runtime.spawn(async move { nodes.load_run(run).await })
            })
            .collect();
        for read in reads {
            loaded.extend(read.await);
        }
        loaded.sort_unstable_by_key(|(index, _)| *index);
        loaded.into_iter().map(|(_, node)| node).collect()
    }

    /// Loads adjacent blocks, and returns each with its number. What one read does not give is asked for
    /// alone: one bad block must fail only itself.
    async fn load_run(&self, run: Vec<(usize, Entry)>) -> Vec<(usize, Result<Node, Error>)> {
        if let [(index, entry)] = *run {
            return vec![(index, self.load(entry).await)];
        }
        let mut verified = self.read_run(&run).await.into_iter();
        let loads: Vec<_> = run
            .into_iter()
            .map(|(index, entry)| match verified.next().flatten() {
                Some(node) => (index, Err(node)),
                None => {
                    let nodes = self.clone();
                    (index, Ok(self.0.runtime.spawn(async move { nodes.load(entry).await })))
                }
            })
            .collect();
        let mut loaded = Vec::with_capacity(loads.len());
        for (index, load) in loads {
            let node = match load {
                Ok(load) => load.await,
                Err(node) => Ok(node),
            };
            loaded.push((index, node));
        }
        loaded
    }

    /// Reads adjacent blocks at once; those that verify, in order. None if the read fails.
    async fn read_run(&self, run: &[(usize, Entry)]) -> Vec<Option<Node>> {
        let Some((_, first)) = run.first() else { return Vec::new() };
        let buffers = self.0.runtime.buffers();
        let read = self.0.device.read(first.pba(), run.len(), buffers.take(run.len())).await;
        let read = match read {
            Ok(read) => read,
            Err(error) => {
                // The next read may well succeed, on a device that has come back without its cache.
                self.0.scheduler.suspect(error);
                return Vec::new();
            }
        };
        let verify = |((_, entry), block): (&(usize, Entry), &Block)| {
            let hash = self.0.checksums.block(&block.0);
            if !entry.matches(hash) || self.is_given_up(entry.pba()) {
                return None;
            }
            // A node keeps its whole buffer, so each gets one of its own.
            let mut buffer = buffers.take_to_keep(1);
            buffer.bytes_mut().copy_from_slice(&block.0);
            let node = Node::from_verified(Rc::new(buffer));
            self.0.cache.insert(entry.pba(), hash, node.clone());
            Some(node)
        };
        run.iter().zip(read.blocks()).map(verify).collect()
    }

    /// Writes a new block to `at` as part of `batch`; returns its hash. It can be loaded at once.
    pub fn write(&self, batch: &Batch, at: Pba, buffer: Rc<Buffer>) -> u64 {
        let node = Node::from_verified(buffer);
        let hash = self.0.checksums.block(&node.block().0);
        self.0.cache.insert(at, hash, node.clone());
        self.0.writing.borrow_mut().insert(at, (hash, node.clone()));
        let slice = BlockSlice::new(Rc::clone(node.buffer()), 0, 1);
        let nodes = self.clone();
        self.0.scheduler.write_in(batch, at, vec![slice], move || {
            nodes.0.writing.borrow_mut().remove(&at);
        });
        hash
    }
}

impl std::fmt::Debug for NodeStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeStore")
    }
}

//! Metadata blocks: loading them verified, writing new ones. Blocks are immutable once written, so
//! the cache needs no invalidation; a hit counts only if it has the hash that the parent names.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use base::{BlockSlice, Buffer, Pba};
use device::{Device, DeviceError};
use ondisk::{Checksums, Entry, Node};
use runtime::Runtime;

use crate::Error;
use crate::cache::NodeCache;
use crate::scheduler::{Batch, WriteScheduler};

/// How often a failed read of a metadata block is repeated.
const READ_RETRIES: u32 = 3;

/// Pause before it is.
const RETRY_AFTER: Duration = Duration::from_millis(20);

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
        let writing = RefCell::default();
        Self(Rc::new(Inner { runtime, device, scheduler, checksums, cache, writing }))
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

    /// The block that `entry` names, if it is in memory.
    #[must_use]
    pub fn cached(&self, entry: Entry) -> Option<Node> {
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
    /// `Damaged` if the bytes on the device are not those that were written; device errors.
    pub async fn load(&self, entry: Entry) -> Result<Node, Error> {
        if let Some(node) = self.cached(entry) {
            return Ok(node);
        }
        let at = entry.pba();
        let buffer = self.read_again(at).await?;
        let node = Node::from_verified(Rc::new(buffer));
        let hash = self.0.checksums.block(&node.block().0);
        if !entry.matches(hash) && !base::mutant::active("ignore_metadata_checksum") {
            tracing::error!(block = %at, "a metadata block is damaged");
            return Err(Error::Damaged { what: "metadata block", at });
        }
        self.0.cache.insert(at, hash, node.clone());
        Ok(node)
    }

    /// Reads a block; a medium that fails it is asked again before its word is taken.
    async fn read_again(&self, at: Pba) -> Result<Buffer, DeviceError> {
        let mut attempts = 0;
        loop {
            let buffer = self.0.runtime.buffers().take_to_keep(1);
            match self.0.device.read(at, 1, buffer).await {
                Err(_) if attempts < READ_RETRIES => {
                    attempts += 1;
                    self.0.runtime.sleep(RETRY_AFTER).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Loads several blocks at once; the answers are in order.
    pub async fn load_all(&self, entries: Vec<Entry>) -> Vec<Result<Node, Error>> {
        let loads: Vec<_> = entries
            .into_iter()
            .map(|entry| match self.cached(entry) {
                Some(node) => Err(node),
                None => {
                    let nodes = self.clone();
                    Ok(self.0.runtime.spawn(async move { nodes.load(entry).await }))
                }
            })
            .collect();
        let mut loaded = Vec::with_capacity(loads.len());
        for load in loads {
            loaded.push(match load {
                Ok(load) => load.await,
                Err(node) => Ok(node),
            });
        }
        loaded
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

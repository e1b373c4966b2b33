//! Keyed XXH3-64 (design rule 41): a guest that does not know the key cannot prepare collisions.

use std::fmt;

use base::{BLOCK_SIZE, Block, Epoch, Pba, SnapshotNumber, SnapshotUuid, StoreUuid, VdiId};
use xxhash_rust::xxh3::{
    Xxh3Builder, xxh3_64_with_secret, xxh3_64_with_seed, xxh3_128_with_secret,
};

/// XXH3's secret: at least 136 bytes; 192 is its own default.
const SECRET_BYTES: usize = 192;

/// The checksums of one store.
#[derive(Clone)]
pub struct Checksums {
    uuid: StoreUuid,
    secret: [u8; SECRET_BYTES],
}

/// Kind of a self-validating structure; part of its seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StructureKind {
    /// [`crate::Superblock`]
    Superblock = 1,
    /// [`crate::HostSlot`]
    HostSlot = 2,
    /// [`crate::Heartbeat`]
    Heartbeat = 3,
    /// [`crate::LogBlock`]
    LogBlock = 4,
}

impl Checksums {
    /// Checksums under the key that stands in the superblock.
    #[must_use]
    pub fn new(uuid: StoreUuid, key: &[u8; 32]) -> Self {
        let mut secret = [0; SECRET_BYTES];
        // Spread the key over the secret with XXH3 itself, one 8-byte word per counter value.
        for (counter, word) in (0u64..).zip(secret.chunks_exact_mut(8)) {
            let value = xxh3_64_with_seed(key, counter).to_le_bytes();
            for (to, from) in word.iter_mut().zip(value) {
                *to = from;
            }
        }
        Self { uuid, secret }
    }

    /// The store that they are of.
    #[must_use]
    pub fn uuid(&self) -> StoreUuid {
        self.uuid
    }

    /// Hash of stored bytes that a parent or a log record vouches for.
    #[must_use]
    pub fn block(&self, bytes: &[u8]) -> u64 {
        xxh3_64_with_secret(bytes, &self.secret)
    }

    /// What a snapshot that was taken in this store is known by everywhere. Its time tells it from
    /// that of a copy of the store which went its own way.
    #[must_use]
    pub fn snapshot_uuid(&self, vdi: VdiId, number: SnapshotNumber, wall_ns: u64) -> SnapshotUuid {
        let numbers = [vdi.get(), number.get(), wall_ns].map(u64::to_le_bytes);
        let bytes = [self.uuid.0.as_slice(), numbers.as_flattened()].concat();
        SnapshotUuid(xxh3_128_with_secret(&bytes, &self.secret).to_le_bytes())
    }

    /// Checksum of a self-validating block over all but its last eight bytes.
    #[must_use]
    pub(crate) fn structure(
        &self,
        kind: StructureKind,
        at: Pba,
        epoch: Epoch,
        sequence: u64,
        block: &Block,
    ) -> u64 {
        let mut hasher = Xxh3Builder::new().with_secret(self.secret).build();
        hasher.update(&self.uuid.0);
        hasher.update(&[kind as u8]);
        hasher.update(&at.get().to_le_bytes());
        hasher.update(&epoch.get().to_le_bytes());
        hasher.update(&sequence.to_le_bytes());
        hasher.update(block.0.get(..BLOCK_SIZE - 8).unwrap_or_default());
        hasher.digest()
    }
}

#[cfg(fuzzing)]
impl Checksums {
    /// For fuzz targets: ends a block as its writer would, so that what decoders do behind the
    /// checksum is reached with any bytes.
    pub fn seal(
        &self,
        kind: StructureKind,
        at: Pba,
        epoch: Epoch,
        sequence: u64,
        block: &mut Block,
    ) {
        let checksum = self.structure(kind, at, epoch, sequence, block);
        if let Some(end) = block.0.last_chunk_mut() {
            *end = checksum.to_le_bytes();
        }
    }
}

impl fmt::Debug for Checksums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key is a secret: a guest that knew it could prepare collisions.
        write!(f, "Checksums({})", self.uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_seed_counts() {
        let block = Block([5; BLOCK_SIZE]);
        let uuid = StoreUuid([1; 16]);
        let sum = |uuid, key: u8, kind, at, epoch, sequence| {
            Checksums::new(uuid, &[key; 32]).structure(
                kind,
                Pba::new(at),
                Epoch::new(epoch),
                sequence,
                &block,
            )
        };
        let kind = StructureKind::LogBlock;
        let all = [
            sum(uuid, 1, kind, 1, 1, 1),
            sum(StoreUuid([2; 16]), 1, kind, 1, 1, 1),
            sum(uuid, 2, kind, 1, 1, 1),
            sum(uuid, 1, StructureKind::HostSlot, 1, 1, 1),
            sum(uuid, 1, kind, 2, 1, 1),
            sum(uuid, 1, kind, 1, 2, 1),
            sum(uuid, 1, kind, 1, 1, 2),
        ];
        let distinct: std::collections::BTreeSet<_> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}

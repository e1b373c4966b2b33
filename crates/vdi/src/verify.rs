//! Reading and verifying data blocks: in order of address, adjacent ones together.

use base::{Pba, REQUEST_BLOCKS_MAX};
use device::{Device, DeviceError};
use ondisk::Checksums;
use runtime::Runtime;
use runtime::sync::Semaphore;

/// A data block and what it must hash to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DataBlock {
    pub(crate) pba: Pba,
    /// 48 bits.
    pub(crate) hash48: u64,
    /// The caller's number of the tree that names it.
    pub(crate) tree: usize,
    pub(crate) lba: u64,
}

/// Why a block is not what it must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Mismatch,
    Unreadable(DeviceError),
}

/// Reads blocks, so many runs at a time, and returns those that are not what they must be.
pub(crate) async fn verify(
    device: &Device,
    runtime: &Runtime,
    checksums: &Checksums,
    reads_at_once: usize,
    mut blocks: Vec<DataBlock>,
) -> Vec<(DataBlock, Fault)> {
    blocks.sort_unstable_by_key(|block| block.pba);
    let at_once = Semaphore::new(reads_at_once);
    let mut reads = Vec::new();
    let adjacent = |a: &DataBlock, b: &DataBlock| a.pba.plus(1) == b.pba;
    let runs = blocks.chunk_by(adjacent).flat_map(|run| run.chunks(REQUEST_BLOCKS_MAX));
    for run in runs {
        let (device, runtime_too, checksums) = (device.clone(), runtime.clone(), checksums.clone());
        let run = run.to_vec();
        let permit = at_once.acquire(1).await;
        reads.push(runtime.spawn(async move {
            let faults = verify_run(&device, &runtime_too, &checksums, &run).await;
            drop(permit);
            faults
        }));
    }
    let mut faults = Vec::new();
    for read in reads {
        faults.extend(read.await);
    }
    faults
}

async fn verify_run(
    device: &Device,
    runtime: &Runtime,
    checksums: &Checksums,
    run: &[DataBlock],
) -> Vec<(DataBlock, Fault)> {
    let faults = read_run(device, runtime, checksums, run).await;
    let mut again = Vec::new();
    for (block, _) in faults {
        // Each by itself, once more: one bad block of a run, or a bad transfer.
        again.extend(read_run(device, runtime, checksums, &[block]).await);
    }
    again
}

async fn read_run(
    device: &Device,
    runtime: &Runtime,
    checksums: &Checksums,
    run: &[DataBlock],
) -> Vec<(DataBlock, Fault)> {
    let Some(first) = run.first() else { return Vec::new() };
    match device.read(first.pba, run.len(), runtime.buffers().take(run.len())).await {
        Err(error) => run.iter().map(|block| (*block, Fault::Unreadable(error))).collect(),
        Ok(buffer) => run
            .iter()
            .zip(buffer.blocks())
            .filter(|(block, stored)| checksums.block(&stored.0) & ((1 << 48) - 1) != block.hash48)
            .map(|(block, _)| (*block, Fault::Mismatch))
            .collect(),
    }
}

//! The read path: overlay or tree give a mapping, neighbours become one device read, every block
//! is verified. Unmapped and zero blocks cost no I/O.

use std::ops::Range;
use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, BlockSlice, ErrorKind, Pba, VdiId};
use blockstore::tree::{self, Leaf};
use disk::{Extent, ExtentState, ReadSegment};
use ondisk::{Entry, EntryState, History, RootRef};

use crate::Error;
use crate::branch::{Place, View};
use crate::engine::{Engine, as_u64};
use crate::history::Versions;

/// Steps for one answer about the state of blocks: an overlay says what it knows of some, or a tree.
/// The thread does nothing else meanwhile, and leaves are read in one read epoch. Who asks for the
/// state of more gets it in several answers.
const STATE_STEPS_MAX: u64 = 4096;

/// What it counts that a tree is asked: a leaf may have to be read.
const STEPS_OF_A_LEAF: u64 = 4;

/// Blocks that stand next to each other, in the VDI and in the blockstore.
struct MappedRun {
    lba: u64,
    pba: Pba,
    entries: Vec<Entry>,
}

impl Engine {
    /// Reads `length` bytes at `offset`; their range was checked.
    ///
    /// # Errors
    /// `Corrupt` if a block is not what was written; `Io`.
    pub(crate) async fn read(
        self: &Rc<Self>,
        vdi: VdiId,
        view: &View,
        offset: u64,
        length: usize,
    ) -> Result<Vec<ReadSegment>, Error> {
        // What is looked up now may be replaced meanwhile, but not reused (design rule 19).
        let _reader = self.epochs.enter();
        let first = offset / BLOCK_SIZE_U64;
        let last = (offset + as_u64(length)).div_ceil(BLOCK_SIZE_U64);
        let entries = self.entries(view, first..last).await?;
        let skip = usize::try_from(offset % BLOCK_SIZE_U64).unwrap_or(0);
        let mut cut = Cut { skip, left: length, segments: Vec::with_capacity(1) };
        // Most reads are of one run: it is read in place, others are read at the same time.
        let mut pieces: Vec<Result<MappedRun, usize>> = Vec::with_capacity(1);
        for (lba, entry) in (first..).zip(entries) {
            match entry.state() {
                EntryState::Damaged => {
                    return Err(Error::refused(
                        ErrorKind::Corrupt,
                        format!("block {lba} was lost to damage; writing it again heals it"),
                    ));
                }
                EntryState::Mapped => match pieces.last_mut() {
                    Some(Ok(run)) if run.pba.plus(as_u64(run.entries.len())) == entry.pba() => {
                        run.entries.push(entry);
                    }
                    _ => pieces.push(Ok(MappedRun { lba, pba: entry.pba(), entries: vec![entry] })),
                },
                EntryState::Unmapped | EntryState::Zero => match pieces.last_mut() {
                    Some(Err(blocks)) => *blocks += 1,
                    _ => pieces.push(Err(1)),
                },
            }
        }
        if let [Ok(_)] = pieces.as_slice()
            && let Some(Ok(run)) = pieces.pop()
        {
            cut.push_data(self.read_run(vdi, run).await?);
            return Ok(cut.segments);
        }
        let reads: Vec<_> = pieces
            .into_iter()
            .map(|piece| {
                piece.map(|run| {
                    let engine = Rc::clone(self);
                    self.runtime.spawn(async move { engine.read_run(vdi, run).await })
                })
            })
            .collect();
        let mut failure = None;
        for piece in reads {
            match piece {
                Err(blocks) => cut.push_zeroes(blocks),
                Ok(read) => match read.await {
                    Ok(slice) => cut.push_data(slice),
                    Err(error) => failure = failure.or(Some(error)),
                },
            }
        }
        failure.map_or(Ok(cut.segments), Err)
    }

    async fn read_run(&self, vdi: VdiId, run: MappedRun) -> Result<BlockSlice, Error> {
        let count = run.entries.len();
        let failed = |error| {
            self.scheduler.suspect(error);
            blockstore::Error::from(error)
        };
        let buffer = self.runtime.buffers().take(count);
        let mut buffer = self.device.read(run.pba, count, buffer).await.map_err(failed)?;
        if self.first_damaged(&run.entries, &buffer).is_some() {
            // Once more: a bad transfer is not a bad block.
            buffer = self.device.read(run.pba, count, buffer).await.map_err(failed)?;
            if let Some(index) = self.first_damaged(&run.entries, &buffer) {
                let at = run.pba.plus(index);
                self.alarm_damage(vdi, run.lba + index, at);
                return Err(blockstore::Error::Damaged { what: "data block", at }.into());
            }
        }
        Ok(BlockSlice::new(Rc::new(buffer), 0, count))
    }

    /// Index of the first block that is not what its entry says.
    fn first_damaged(&self, entries: &[Entry], buffer: &base::Buffer) -> Option<u64> {
        if base::mutant::active("ignore_data_checksum") {
            return None;
        }
        let mut blocks = (0u64..).zip(entries.iter().zip(buffer.blocks()));
        let damaged =
            blocks.find(|(_, (entry, block))| !entry.matches(self.checksums.block(&block.0)));
        damaged.map(|(index, _)| index)
    }

    /// The entries of some blocks, through overlays and tree.
    pub(crate) async fn entries(
        &self,
        view: &View,
        blocks: Range<u64>,
    ) -> Result<Vec<Entry>, Error> {
        let mut entries =
            Vec::with_capacity(usize::try_from(blocks.end - blocks.start).unwrap_or(1));
        // The leaf of the last lookup, with the tree that it belongs to and the blocks it covers.
        let mut near: Option<(RootRef, Range<u64>, Leaf)> = None;
        // What the history of the last lookup says of the blocks from there on.
        let mut versions: Option<(History, Vec<(u64, Entry)>)> = None;
        for block in blocks.clone() {
            let root = match view.place(block) {
                Place::Entry(entry) => {
                    entries.push(entry);
                    continue;
                }
                Place::Tree(root) => root,
                Place::Past(past, before) => {
                    let seen = match &versions {
                        Some((history, seen)) if *history == past.history => seen,
                        _ => {
                            let mut history = Versions::new(&self.nodes, past.history);
                            let seen = history.seen(block..blocks.end, before).await?;
                            &versions.insert((past.history, seen)).1
                        }
                    };
                    let found = seen.binary_search_by_key(&block, |&(block, _)| block);
                    if let Some((_, entry)) = found.ok().and_then(|index| seen.get(index)) {
                        entries.push(*entry);
                        continue;
                    }
                    past.root
                }
            };
            entries.push(match &near {
                Some((of, range, leaf)) if *of == root && range.contains(&block) => {
                    leaf.entry(block)
                }
                _ => {
                    let leaf = match tree::leaf_cached(&self.nodes, &root, block) {
                        Some(leaf) => leaf,
                        None => tree::leaf(&self.nodes, &root, block).await?,
                    };
                    let entry = leaf.entry(block);
                    near = Some((root, block..leaf.end(block), leaf));
                    entry
                }
            });
        }
        Ok(entries)
    }

    /// The state of the bytes from `offset` on, in at most `extents_max` runs; it may end early.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) async fn block_status(
        &self,
        view: &View,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Error> {
        let _reader = self.epochs.enter();
        let end = offset + length;
        let mut extents: Vec<Extent> = Vec::new();
        let mut versions: Option<Versions<'_>> = None;
        let mut at = offset;
        let mut steps = 0;
        while at < end && steps < STATE_STEPS_MAX {
            let block = at / BLOCK_SIZE_U64;
            let (state, next) = match view.run(block) {
                (Place::Entry(entry), run_end) => {
                    steps += 1;
                    (extent_state(entry.state()), run_end)
                }
                (Place::Tree(root), run_end) => {
                    steps += STEPS_OF_A_LEAF;
                    self.state_run(&root, block, run_end).await?
                }
                (Place::Past(past, before), run_end) => {
                    steps += STEPS_OF_A_LEAF;
                    let versions = match &mut versions {
                        Some(versions) if versions.of(&past.history) => versions,
                        other => other.insert(Versions::new(&self.nodes, past.history)),
                    };
                    match versions.seen(block..block + 1, before).await?.first() {
                        Some((_, entry)) => (extent_state(entry.state()), block + 1),
                        None => {
                            let run_end = versions.next_block(block + 1).await?.min(run_end);
                            self.state_run(&past.root, block, run_end).await?
                        }
                    }
                }
            };
            let next = next.saturating_mul(BLOCK_SIZE_U64).min(end);
            let full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.state == state => last.length += next - at,
                _ if full => break,
                _ => extents.push(Extent { length: next - at, state }),
            }
            at = next;
        }
        Ok(extents)
    }

    /// The state of a block that a tree knows, as it does those up to `run_end`, and the first block
    /// behind it that may have another.
    async fn state_run(
        &self,
        root: &RootRef,
        block: u64,
        run_end: u64,
    ) -> Result<(ExtentState, u64), Error> {
        let leaf = tree::leaf(&self.nodes, root, block).await?;
        let state = extent_state(leaf.entry(block).state());
        let leaf_end = leaf.end(block).min(run_end);
        let next = match &leaf {
            Leaf::Uniform(..) => leaf_end,
            Leaf::Node(_) => (block + 1..leaf_end)
                .find(|&other| extent_state(leaf.entry(other).state()) != state)
                .unwrap_or(leaf_end),
        };
        Ok((state, next))
    }
}

fn extent_state(state: EntryState) -> ExtentState {
    match state {
        EntryState::Unmapped => ExtentState::Hole,
        EntryState::Zero => ExtentState::Zero,
        // Reading it tells of the damage; calling it a hole would hide it.
        EntryState::Mapped | EntryState::Damaged => ExtentState::Data,
    }
}

/// Cuts whole blocks down to the bytes that were asked for.
struct Cut {
    skip: usize,
    left: usize,
    segments: Vec<ReadSegment>,
}

impl Cut {
    fn take(&mut self, bytes: usize) -> Range<usize> {
        let start = self.skip.min(bytes);
        let end = bytes.min(start + self.left);
        self.skip -= start;
        self.left -= end - start;
        start..end
    }

    fn push_data(&mut self, slice: BlockSlice) {
        let range = self.take(slice.block_count() * BLOCK_SIZE);
        self.segments.push(ReadSegment::Bytes(slice, range));
    }

    fn push_zeroes(&mut self, blocks: usize) {
        let range = self.take(blocks * BLOCK_SIZE);
        self.segments.push(ReadSegment::Zeroes(range.len()));
    }
}

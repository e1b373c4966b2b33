//! The write path: the spine of the engine, read from top to bottom.
//!
//! 1. [`Engine::write`] takes the blocks of the request, so that nobody else changes them, and
//!    completes partly written blocks from what is there.
//! 2. It takes free blocks next to each other, and room in the log.
//! 3. Data and log record leave together; neither waits for the other.
//! 4. When both have completed, and every log block before, the mapping enters the overlay.
//! 5. The request is acknowledged. `kill -9` loses nothing from here on (G2).

use std::rc::Rc;

use base::{
    BLOCK_SIZE, BLOCK_SIZE_U64, BirthLabel, BlockSlice, Buffer, ErrorKind, Lba, Lsn, Pba,
    REQUEST_BLOCKS_MAX,
};
use blockstore::allocator::Run;
use blockstore::log::Admission;
use blockstore::tree::Change;
use device::{Cause, DeviceError};
use disk::{Extent, ExtentState};
use ondisk::{Entry, RangeState, Record, RecordBody};
use runtime::sync::OneshotReceiver;

use crate::Error;
use crate::branch::{Branch, Generation};
use crate::engine::{EIO, Engine, as_u64, severed, stopped, wait};
use crate::overlay::subtrees;
use crate::vdi::Vdi;

/// How often a data write that the device fails is tried on other blocks.
const DATA_WRITE_ATTEMPTS: usize = 3;

/// A record on its way: what is to be installed when it has completed.
struct Pending {
    lsn: Lsn,
    branch: Rc<Branch>,
    generation: Rc<Generation>,
}

/// Adjacent data blocks on their way, with their record.
struct PendingRun {
    pending: Pending,
    logged: OneshotReceiver<Result<(), DeviceError>>,
    written: OneshotReceiver<Result<(), DeviceError>>,
    lba: u64,
    run: Run,
    slice: BlockSlice,
    hashes: Vec<u64>,
}

impl Engine {
    /// Writes the first `length` bytes of `data` at byte `offset`. When it returns, data and
    /// mapping have left the process; with `fua` they are durable.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the blocks hold their old or their new contents, each as a whole.
    pub(crate) async fn write(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        incarnation: u64,
        offset: u64,
        length: usize,
        data: Buffer,
        fua: bool,
    ) -> Result<(), Error> {
        let end = offset + as_u64(length);
        let (first, last) = (offset / BLOCK_SIZE_U64, end.div_ceil(BLOCK_SIZE_U64));
        let _range = vdi.ranges.lock(first..last).await;
        refuse_severed(vdi, incarnation)?;
        let data = if offset.is_multiple_of(BLOCK_SIZE_U64) && end.is_multiple_of(BLOCK_SIZE_U64) {
            data
        } else {
            self.complete_blocks(vdi, offset, length, &data).await?
        };
        self.write_blocks(vdi, first, last - first, Rc::new(data)).await?;
        vdi.note_changed(last - first);
        self.finish(fua).await
    }

    /// Makes the bytes read as zeroes: whole blocks by their mapping, partial ones by writing. The
    /// mapping comes first: on a full store what it frees makes room for the rest.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(crate) async fn write_zeroes(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        incarnation: u64,
        offset: u64,
        length: u64,
        state: RangeState,
        fua: bool,
    ) -> Result<(), Error> {
        let end = offset + length;
        let (first, last) = (offset.div_ceil(BLOCK_SIZE_U64), end / BLOCK_SIZE_U64);
        if last > first {
            self.write_range(vdi, incarnation, first, last - first, state).await?;
            vdi.note_changed(last - first);
        }
        let head_end = end.min(first * BLOCK_SIZE_U64);
        if head_end > offset {
            self.zero_bytes(vdi, incarnation, offset, head_end).await?;
        }
        let tail = (last * BLOCK_SIZE_U64).max(head_end);
        if end > tail {
            self.zero_bytes(vdi, incarnation, tail, end).await?;
        }
        self.finish(fua).await
    }

    /// Zeroes a part of one block. A block without data stays without: a write of the block that
    /// is on its way meanwhile counts as the later one.
    async fn zero_bytes(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        incarnation: u64,
        from: u64,
        to: u64,
    ) -> Result<(), Error> {
        let extents = self.block_status(&vdi.head(), from, to - from, 1).await?;
        if !matches!(extents.as_slice(), [Extent { state: ExtentState::Data, .. }]) {
            return refuse_severed(vdi, incarnation);
        }
        let length = usize::try_from(to - from).unwrap_or(0);
        let mut zeroes = self.runtime.buffers().take(1);
        zeroes.bytes_mut().fill(0);
        self.write(vdi, incarnation, from, length, zeroes, false).await
    }

    async fn finish(&self, fua: bool) -> Result<(), Error> {
        if fua && !base::mutant::active("fua_without_flush") {
            self.scheduler.flush().await.map_err(blockstore::Error::from)?;
        }
        Ok(())
    }

    /// Whole blocks for a write that covers some only in part: the rest is what is there now. The
    /// caller holds the range, so that nothing newer is on its way.
    async fn complete_blocks(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        offset: u64,
        length: usize,
        data: &Buffer,
    ) -> Result<Buffer, Error> {
        let end = offset + as_u64(length);
        let (first, last) = (offset / BLOCK_SIZE_U64, end.div_ceil(BLOCK_SIZE_U64));
        let count = usize::try_from(last - first).unwrap_or(0);
        let mut blocks = self.runtime.buffers().take(count);
        let head = !offset.is_multiple_of(BLOCK_SIZE_U64);
        let tail = !end.is_multiple_of(BLOCK_SIZE_U64);
        for (partial, block) in [(head, first), (tail && (!head || last - 1 > first), last - 1)] {
            if partial {
                let at = usize::try_from(block - first).unwrap_or(0);
                let old =
                    self.read(vdi.id, &vdi.head(), block * BLOCK_SIZE_U64, BLOCK_SIZE).await?;
                let into = blocks.bytes_mut().get_mut(at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE);
                disk::copy_segments(&old, into.unwrap_or_default());
            }
        }
        let start = usize::try_from(offset % BLOCK_SIZE_U64).unwrap_or(0);
        let into = blocks.bytes_mut().get_mut(start..start + length).unwrap_or_default();
        into.copy_from_slice(data.bytes().get(..length).unwrap_or_default());
        Ok(blocks)
    }

    /// Writes whole blocks. The caller holds their range.
    async fn write_blocks(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        first: u64,
        count: u64,
        data: Rc<Buffer>,
    ) -> Result<(), Error> {
        let run = self.start_run(vdi, first, count, 0, &data).await?;
        let mut done = run.run.count;
        if done == count {
            return self.finish_run(vdi, run).await;
        }
        // Each is finished by itself: the next may wait for a checkpoint, which waits for all
        // records before it.
        let finish = |run: PendingRun| {
            let (engine, vdi) = (Rc::clone(self), Rc::clone(vdi));
            self.runtime.spawn(async move { engine.finish_run(&vdi, run).await })
        };
        let mut under_way = vec![finish(run)];
        let mut failure = None;
        while done < count {
            match self.start_run(vdi, first + done, count - done, done, &data).await {
                Ok(run) => {
                    done += run.run.count;
                    under_way.push(finish(run));
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        for run in under_way {
            if let Err(error) = run.await {
                failure = failure.or(Some(error));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Sends off as many blocks as fit next to each other and into one record: a request that is
    /// not aligned touches one block more than [`REQUEST_BLOCKS_MAX`].
    async fn start_run(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        lba: u64,
        count: u64,
        offset: u64,
        data: &Rc<Buffer>,
    ) -> Result<PendingRun, Error> {
        let count = count.min(as_u64(REQUEST_BLOCKS_MAX));
        let (run, room) = self.blocks_and_room(vdi, count).await?;
        let offset = usize::try_from(offset).unwrap_or(0);
        let length = usize::try_from(run.count).unwrap_or(0);
        let slice = BlockSlice::new(Rc::clone(data), offset, length);
        let hashes: Vec<u64> =
            slice.blocks().iter().map(|block| self.checksums.block(&block.0)).collect();
        let written = self.write_data(run.start, slice.clone());
        let body = RecordBody::Write { lba: Lba::new(lba), pba: run.start, hashes: hashes.clone() };
        let (lsn, logged) = self.append(room, vdi, body);
        let pending = self.pending(vdi, lsn, run.count);
        self.keep_many_writes(vdi);
        self.nudge(run.count * BLOCK_SIZE_U64);
        Ok(PendingRun { pending, logged, written, lba, run, slice, hashes })
    }

    /// Takes free blocks, and room in the log for a record that names them. Who waits for blocks has
    /// no room: that is what others wait for.
    async fn blocks_and_room(
        self: &Rc<Self>,
        vdi: &Vdi,
        count: u64,
    ) -> Result<(Run, Admission), Error> {
        loop {
            let room = self.room().await?;
            let part = self.room_to_part(vdi).await?;
            if let Some(run) = self.take_data(vdi, count).await? {
                if vdi.branch.borrow().writes.is_behind_range() {
                    let Some(part) = part else {
                        self.allocator.free_now(run);
                        continue;
                    };
                    self.append_moment_aside(part, vdi);
                }
                return Ok((run, room));
            }
            drop((room, part));
            // When there are some, they are taken as above.
            let run = self.allocate_data(vdi, count).await?;
            self.allocator.free_now(run);
        }
    }

    /// Room for a moment that parts a change from a large range before it; `None` if there is no such range.
    async fn room_to_part(&self, vdi: &Vdi) -> Result<Option<Admission>, Error> {
        let is_behind = vdi.branch.borrow().writes.is_behind_range();
        Ok(match is_behind {
            true => Some(self.room().await?),
            false => None,
        })
    }

    /// Appends the record of a moment, for which nobody waits.
    fn append_moment_aside(self: &Rc<Self>, room: Admission, vdi: &Vdi) {
        let appended = self.append_moment(room, vdi);
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            // A store that has stopped says so to everybody.
            let _ = engine.complete_record(appended).await;
        }));
    }

    /// The branch and generation that a record which was appended just now belongs to, of so many blocks.
    fn pending(&self, vdi: &Vdi, lsn: Lsn, block_count: u64) -> Pending {
        self.touch(vdi);
        let branch = Rc::clone(&vdi.branch.borrow());
        branch.writes.note(lsn, block_count);
        let generation = branch.active();
        Pending { lsn, branch, generation }
    }

    /// Waits for data and record, then lets readers see the blocks.
    async fn finish_run(self: &Rc<Self>, vdi: &Rc<Vdi>, run: PendingRun) -> Result<(), Error> {
        let written = wait(run.written, run.run.start).await;
        let logged = wait(run.logged, run.run.start).await;
        logged?;
        if let Err(error) = written {
            return self
                .write_elsewhere(vdi, run.pending, run.run, run.lba, run.slice, error)
                .await;
        }
        self.install_run(&run.pending, run.lba, run.run.start, &run.hashes);
        self.log.complete(run.pending.lsn);
        Ok(())
    }

    fn install_run(&self, pending: &Pending, lba: u64, pba: Pba, hashes: &[u64]) {
        for (index, &hash) in (0u64..).zip(hashes) {
            let entry = Entry::mapped(pba.plus(index), hash, BirthLabel::default());
            let change = Change { level: 0, start: lba + index, lsn: pending.lsn, entry };
            self.install(&pending.branch, &pending.generation, &change);
        }
    }

    /// The device failed a data write: the blocks are retired and the data goes elsewhere, under a
    /// new record. The old one is voided, so that recovery does not take it for a lost write
    /// (design rules 10, 58).
    async fn write_elsewhere(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        old: Pending,
        bad: Run,
        lba: u64,
        slice: BlockSlice,
        error: Error,
    ) -> Result<(), Error> {
        let mut error = error;
        let (mut old, mut bad) = (old, bad);
        for attempt in 1..=DATA_WRITE_ATTEMPTS {
            tracing::warn!(block = %bad.start, count = bad.count, %error, "a data write failed");
            self.void(vdi, old.lsn, bad.start).await?;
            if error.kind() == ErrorKind::NoSpace {
                // Nothing is wrong with the blocks: there is no room below them (rule 26).
                self.allocator.free_now(bad);
                return Err(error);
            }
            for pba in bad.blocks() {
                self.allocator.retire(pba).map_err(Error::from)?;
            }
            if attempt == DATA_WRITE_ATTEMPTS {
                break;
            }
            let run = self.allocate_data(vdi, as_u64(slice.block_count())).await?;
            if run.count < as_u64(slice.block_count()) {
                self.allocator.free_now(run);
                break;
            }
            self.reserve_log(run.start).await?;
            let hashes: Vec<u64> =
                slice.blocks().iter().map(|block| self.checksums.block(&block.0)).collect();
            let written = self.write_data(run.start, slice.clone());
            let body =
                RecordBody::Write { lba: Lba::new(lba), pba: run.start, hashes: hashes.clone() };
            let (lsn, logged) = self.append_reserved(vdi, body);
            let pending = self.pending(vdi, lsn, run.count);
            let written = wait(written, run.start).await;
            wait(logged, run.start).await?;
            match written {
                Ok(()) => {
                    self.install_run(&pending, lba, run.start, &hashes);
                    self.log.complete(pending.lsn);
                    return Ok(());
                }
                Err(next) => {
                    (old, bad, error) = (pending, run, next);
                }
            }
        }
        Err(error)
    }

    /// Waits for room in the log's reserve for one record, which says what becomes of one that was
    /// admitted, whose data is not at `at`.
    ///
    /// # Errors
    /// If so many writes fail at once that there is none. The store has stopped then: recovery finds
    /// the records whose data is not there, and has the room to write again those that count.
    async fn reserve_log(&self, at: Pba) -> Result<(), Error> {
        if self.log.reserve().await.map_err(blockstore::Error::from)? {
            return Ok(());
        }
        tracing::error!(block = %at, "more data writes fail than the log has room for");
        let error = DeviceError::new(Cause::Errno(EIO), at);
        self.scheduler.fail(error);
        Err(stopped(&error))
    }

    /// Appends a record for which [`Self::reserve_log`] found room just now.
    fn append_reserved(
        &self,
        vdi: &Vdi,
        body: RecordBody,
    ) -> (Lsn, OneshotReceiver<Result<(), DeviceError>>) {
        self.log.append(&Record { vdi: vdi.id, claim: vdi.claim, body })
    }

    /// Declares that a record does not count, whose data is not at `at`.
    async fn void(&self, vdi: &Vdi, lsn: Lsn, at: Pba) -> Result<(), Error> {
        if base::mutant::active("failed_write_counts") {
            self.log.complete(lsn);
            return Ok(());
        }
        self.reserve_log(at).await?;
        let (void, appended) = self.append_reserved(vdi, RecordBody::Void { lsn });
        wait(appended, at).await?;
        self.log.complete(lsn);
        self.log.complete(void);
        Ok(())
    }

    /// Makes whole blocks unmapped or zero: one record, whatever the length.
    async fn write_range(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        incarnation: u64,
        first: u64,
        count: u64,
        state: RangeState,
    ) -> Result<(), Error> {
        let _range = vdi.ranges.lock(first..first + count).await;
        refuse_severed(vdi, incarnation)?;
        self.reserve_for_guest(vdi).await?;
        let level_max = Self::level_max(vdi.block_count.get());
        let (piece_count, is_large) = pieces(first, first + count, level_max);
        let room = self.room().await?;
        let keeps_writes = vdi.branch.borrow().writes.is_on();
        let room_before = match keeps_writes {
            true => Some(self.room().await?),
            false => None,
        };
        let branch = Rc::clone(&vdi.branch.borrow());
        let now = self.runtime.now();
        // No history tells of a large one: the writes on both sides are kept by moments that end before it
        // and begin behind it.
        let parts = is_large && branch.writes.is_on() && branch.writes.parts(now);
        let is_parted = match is_large {
            true => parts && branch.writes.has_unkept(),
            false => branch.writes.is_behind_range(),
        };
        if let Some(room) = room_before.filter(|_| is_parted) {
            self.append_moment_aside(room, vdi);
        }
        let body = RecordBody::Range { lba: Lba::new(first), count, state };
        let (lsn, logged) = self.append(room, vdi, body);
        let pending = self.pending(vdi, lsn, piece_count);
        if is_large {
            branch.writes.break_at(lsn.plus(1));
        }
        if parts {
            branch.writes.part(now);
        }
        self.keep_many_writes(vdi);
        wait(logged, Pba::new(0)).await?;
        self.install_range(
            &pending.branch,
            &pending.generation,
            pending.lsn,
            (first, first + count),
            state,
            level_max,
        );
        self.log.complete(pending.lsn);
        Ok(())
    }

    /// Applies a range to an overlay.
    pub(crate) fn install_range(
        &self,
        branch: &Branch,
        generation: &Generation,
        lsn: Lsn,
        (first, end): (u64, u64),
        state: RangeState,
        level_max: u8,
    ) {
        let entry = match state {
            RangeState::Unmapped => Entry::UNMAPPED,
            RangeState::Zero => Entry::ZERO,
        };
        self.full.set(false);
        for (level, start) in subtrees(first, end, level_max) {
            self.install(branch, generation, &Change { level, start, lsn, entry });
        }
    }
}

/// How many changes of an overlay a range is, and whether one of them is of more than a block.
pub(crate) fn pieces(first: u64, end: u64, level_max: u8) -> (u64, bool) {
    let count = |(count, is_large), (level, _)| (count + 1, is_large || level > 0);
    subtrees(first, end, level_max).fold((0, false), count)
}

/// A request that waited behind a deletion, a rollback or a shrink must not change what came after.
fn refuse_severed(vdi: &Vdi, incarnation: u64) -> Result<(), Error> {
    if vdi.incarnation.get() == incarnation { Ok(()) } else { Err(severed()) }
}

//! Writing again what counts above F, in windows: first the data goes to new blocks, then records
//! that name these go to the new log. So a block that cannot be written is known before a record
//! names it, and the data stays where it was verified.

use std::rc::Rc;

use base::{BlockSlice, ErrorKind, Lsn, Pba};
use blockstore::allocator::{Run, Space, Window};
use device::{Cause, DeviceError};
use ondisk::{LOG_PAYLOAD_BYTES, Record, RecordBody};
use runtime::sync::OneshotReceiver;

use super::verify::Dropped;
use crate::Error;
use crate::engine::{Engine, as_u64, wait};
use crate::types::OpenReport;

/// Blocks of data that are verified and written again at a time: 32 MiB of memory. Each window ends a
/// log block, so it is long enough for that to cost little of the log.
const WINDOW_BLOCKS: usize = 8192;

/// How many of some records have data that fits into a window; at least one.
pub(super) fn window(records: &[Record]) -> usize {
    let mut block_count = 0;
    let next = records.iter().position(|record| {
        let is_full = block_count >= WINDOW_BLOCKS;
        if let RecordBody::Write { hashes, .. } = &record.body {
            block_count += hashes.len();
        }
        is_full
    });
    next.unwrap_or(records.len())
}

/// Log blocks that some records take, in windows.
pub(super) fn log_blocks(records: &[Record]) -> u64 {
    let mut block_count = 0;
    let mut rest = records;
    while !rest.is_empty() {
        let (first, behind) = rest.split_at(window(rest));
        let mut bytes_left = 0;
        for bytes in first.iter().map(Record::encoded_bytes) {
            if bytes > bytes_left {
                block_count += 1;
                bytes_left = LOG_PAYLOAD_BYTES;
            }
            bytes_left -= bytes;
        }
        rest = behind;
    }
    block_count
}

/// Blocks of a write next to each other, and where their data is.
struct Piece {
    /// First block within the write.
    index: u64,
    /// Where it was verified.
    old: Pba,
    /// Where it is to be: there, or in new blocks.
    run: Run,
    /// On its way to new blocks.
    written: Option<OneshotReceiver<Result<(), DeviceError>>>,
}

impl Piece {
    fn moves(&self) -> bool {
        self.run.start != self.old
    }

    fn old_blocks(&self) -> impl Iterator<Item = Pba> + use<> {
        Run { start: self.old, ..self.run }.blocks()
    }
}

impl Engine {
    /// Writes again what counts of some records above F, which with all behind them take so many
    /// log blocks.
    pub(super) async fn rewrite_window(
        self: &Rc<Self>,
        records: Vec<Record>,
        log_blocks: u64,
        dropped: &mut Dropped,
        report: &mut OpenReport,
    ) -> Result<(), Error> {
        let counted = self.verify(records, dropped, report).await?;
        let counted = self.move_data(counted, log_blocks).await?;
        for (record, _) in &counted {
            self.load_for(record).await?;
        }
        // All together, so that they share log blocks: there is only the reserve to write to. What
        // is waited for in between ends a block.
        let mut rewritten = Vec::with_capacity(counted.len());
        for (record, pieces) in counted {
            self.rewrite(record, pieces, &mut rewritten).await?;
            report.records_replayed += 1;
        }
        for (lsn, appended) in rewritten {
            wait(appended, Pba::new(0)).await?;
            self.log.complete(lsn);
        }
        Ok(())
    }

    /// Loads what a record applies to, if it is there yet.
    async fn load_for(self: &Rc<Self>, record: &Record) -> Result<(), Error> {
        let source = match record.body {
            RecordBody::Clone { source, .. } => source,
            _ => record.vdi,
        };
        if self.registry.borrow().directory.contains(source) {
            self.surviving(source).await?;
        }
        Ok(())
    }

    /// Writes the data of records to new blocks, as far as there are any that can be written.
    async fn move_data(
        &self,
        counted: Vec<(Record, Option<BlockSlice>)>,
        mut log_blocks: u64,
    ) -> Result<Vec<(Record, Vec<Piece>)>, Error> {
        let mut window = Window::default();
        let mut moved = Vec::with_capacity(counted.len());
        for (record, data) in counted {
            let pieces = match (&record.body, data) {
                (RecordBody::Write { pba, .. }, Some(data)) => {
                    self.move_record(*pba, &data, &mut window, &mut log_blocks)
                }
                _ => Vec::new(),
            };
            moved.push((record, pieces));
        }
        self.allocator.return_window(&mut window);
        for piece in moved.iter_mut().flat_map(|(_, pieces)| pieces) {
            self.moved(piece).await?;
        }
        Ok(moved)
    }

    fn move_record(
        &self,
        old: Pba,
        data: &BlockSlice,
        window: &mut Window,
        log_blocks: &mut u64,
    ) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(1);
        let mut done = 0;
        while done < data.block_count() {
            let index = as_u64(done);
            let old = old.plus(index);
            let left = as_u64(data.block_count() - done);
            let run = self.room_to_move(window, left, *log_blocks);
            let run = run.filter(|_| !base::mutant::active("recovery_trusts_the_cache"));
            let moves = run.is_some();
            // A full store keeps the data where it was verified; the flush at the end covers it,
            // unless the device failed one and forgot that it did.
            let run = run.unwrap_or(Run { start: old, count: left });
            let count = usize::try_from(run.count).unwrap_or(0);
            let slice = BlockSlice::new(Rc::clone(data.buffer()), data.first_block() + done, count);
            let written = moves.then(|| self.write_data(run.start, slice));
            pieces.push(Piece { index, old, run, written });
            // Each piece more is a record more, in a block of its own at worst.
            *log_blocks += u64::from(run.count < left);
            done += count;
        }
        pieces
    }

    /// New blocks for data that is written again. None if there are none; nor fewer than `count`
    /// if the log has no room for one more than the blocks that are to come, and one that is begun.
    fn room_to_move(&self, window: &mut Window, count: u64, log_blocks: u64) -> Option<Run> {
        let run = self.allocator.allocate(Space::Data, window, count)?;
        if run.count == count || self.log.has_room(log_blocks + 2) {
            return Some(run);
        }
        self.allocator.free_now(run);
        None
    }

    /// Waits until a piece is where it is to be. If it cannot be written there, it stays where it
    /// was verified: what fails a write must not keep the store shut (design rules 26, 58).
    async fn moved(&self, piece: &mut Piece) -> Result<(), Error> {
        let Some(written) = piece.written.take() else { return Ok(()) };
        let at = piece.run.start;
        let written = written.await.unwrap_or(Err(DeviceError::new(Cause::Gone, at)));
        let Err(error) = written else { return Ok(()) };
        if error.is_transport() {
            return Err(blockstore::Error::from(error).into());
        }
        tracing::warn!(block = %at, count = piece.run.count, %error, "data stays where it was");
        if error.cause == Cause::NoSpace {
            self.allocator.free_now(piece.run);
        } else {
            for pba in piece.run.blocks() {
                self.allocator.retire(pba).map_err(Error::from)?;
            }
        }
        piece.run.start = piece.old;
        Ok(())
    }

    fn refuse_full_log(&self) -> Result<(), Error> {
        if self.log.has_room(1) {
            return Ok(());
        }
        Err(Error::refused(ErrorKind::NoSpace, "the log has no room left to recover its end"))
    }

    /// Writes a record that counts to the new log, with what became of its data, and applies it.
    async fn rewrite(
        self: &Rc<Self>,
        record: Record,
        pieces: Vec<Piece>,
        rewritten: &mut Vec<(Lsn, OneshotReceiver<Result<(), DeviceError>>)>,
    ) -> Result<(), Error> {
        let RecordBody::Write { lba, hashes, .. } = &record.body else {
            return self.append_again(&record, rewritten).await;
        };
        if pieces.is_empty() {
            return self.append_again(&record, rewritten).await;
        }
        let is_known = self.registry.borrow().directory.contains(record.vdi);
        if !is_known || self.surviving(record.vdi).await?.is_none() {
            for piece in &pieces {
                self.replaced_by_recovery(piece.old_blocks());
                if piece.moves() {
                    self.allocator.free_now(piece.run);
                }
            }
            if is_known {
                self.lose(record.vdi);
            }
            return Ok(());
        }
        let mut hashes = hashes.iter().copied();
        for piece in &pieces {
            if piece.moves() {
                self.replaced_by_recovery(piece.old_blocks());
            }
            let count = usize::try_from(piece.run.count).unwrap_or(0);
            let hashes = hashes.by_ref().take(count).collect();
            let (lba, pba) = (lba.plus(piece.index), piece.run.start);
            let part = Record { body: RecordBody::Write { lba, pba, hashes }, ..record };
            self.append_again(&part, rewritten).await?;
        }
        Ok(())
    }

    async fn append_again(
        self: &Rc<Self>,
        record: &Record,
        rewritten: &mut Vec<(Lsn, OneshotReceiver<Result<(), DeviceError>>)>,
    ) -> Result<(), Error> {
        self.refuse_full_log()?;
        let (lsn, appended) = self.log.append(record);
        rewritten.push((lsn, appended));
        self.apply(lsn, record).await
    }
}

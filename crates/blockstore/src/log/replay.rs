//! Reading a log back: which records count, and where it really ends.
//!
//! A chain of blocks ends where the next one does not validate. That is the end of the log if
//! nothing behind it was promised to be durable; it is damage if a later block of the same epoch
//! says that F had passed the missing one (design rule 9), if a sealed segment ends early, or if the
//! next block is intact and yet cannot be decoded: nothing torn has a valid checksum. A block that
//! cannot be read is one that does not validate; most likely the power went while it was written.

use std::collections::BTreeSet;

use base::{BLOCK_SIZE, Buffer, Lsn, Pba, REQUEST_BLOCKS_MAX, RingPosition};
use device::Device;
use ondisk::{Checksums, DecodeError, LogBlock, LogSegment, Record};
use runtime::Runtime;

use crate::nodes::{PATIENT_RETRIES, READ_RETRIES, RETRY_AFTER};
use crate::{Error, Geometry};

/// What a log says.
#[derive(Debug, Default)]
pub struct Replayed {
    /// All records in order; those of sealed segments up to their last one.
    pub records: Vec<(Lsn, Record)>,
    /// F: everything up to here was durable. Sealed segments are durable as a whole.
    pub durable: Lsn,
    /// Position behind the last valid block.
    pub end: RingPosition,
    /// Number behind the last valid record.
    pub lsn_next: Lsn,
    /// Newest host slot sequence that a block names as durable.
    pub slot_sequence: u64,
    /// The block behind the last valid one, if it cannot be read: what was acknowledged last may have
    /// stood there, also what was flushed since the last valid one was written.
    pub unreadable: Option<Pba>,
}

/// Where a log breaks although more of it was promised to be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Break {
    /// What is damaged.
    pub what: &'static str,
    /// Index of the segment that breaks.
    pub segment: usize,
    /// Where a valid block should stand.
    pub at: Pba,
    /// First record that is missing.
    pub lsn: Lsn,
    /// Last record that is known to have been durable.
    pub durable: Lsn,
}

/// Reads the segments of a log, oldest first, and shows every valid block on the way. The last one
/// is the live one if it is not sealed. Where something that was durable does not validate, it ends:
/// then it returns what stands before the break, and the break.
///
/// # Errors
/// If the device is out of reach.
pub async fn survey(
    device: &Device,
    runtime: &Runtime,
    geometry: &Geometry,
    log_start: Pba,
    checksums: &Checksums,
    segments: &[LogSegment],
    see: &mut dyn FnMut(&LogSegment, &LogBlock),
) -> Result<(Replayed, Option<Break>), Error> {
    let unreadable = BTreeSet::new();
    let mut ring = RingReader { device, runtime, geometry, log_start, chunk: None, unreadable };
    let mut replayed = Replayed::default();
    let mut broken = None;
    for (index, segment) in segments.iter().enumerate() {
        broken = ring.read_segment(checksums, segment, &mut replayed, see).await?;
        if let Some(broken) = &mut broken {
            broken.segment = index;
            break;
        }
    }
    replayed.records = without_void(replayed.records);
    Ok((replayed, broken))
}

/// Blocks that are read at once.
fn request_blocks() -> u64 {
    u64::try_from(REQUEST_BLOCKS_MAX).unwrap_or(1)
}

/// What stands behind a break of the chain.
struct Behind {
    /// Highest F.
    durable: Lsn,
    /// Position behind the last valid block.
    end: RingPosition,
    /// Where a block of a later lap stands.
    laps: Option<Pba>,
}

/// Reads the ring in large pieces.
struct RingReader<'a> {
    device: &'a Device,
    runtime: &'a Runtime,
    geometry: &'a Geometry,
    log_start: Pba,
    /// Offset in the ring, number of blocks, contents.
    chunk: Option<(u64, u64, Buffer)>,
    /// Blocks that cannot be read, by offset in the ring.
    unreadable: BTreeSet<u64>,
}

impl RingReader<'_> {
    async fn read_segment(
        &mut self,
        checksums: &Checksums,
        segment: &LogSegment,
        replayed: &mut Replayed,
        see: &mut dyn FnMut(&LogSegment, &LogBlock),
    ) -> Result<Option<Break>, Error> {
        let sealed = segment.last_lsn > Lsn::default();
        let mut position = segment.start;
        let mut lsn = segment.first_lsn;
        let mut chain = segment.chain;
        let mut durable = Lsn::default();
        let mut undecodable = false;
        while position.distance_from(segment.start) < self.geometry.ring_blocks
            && !(sealed && lsn > segment.last_lsn)
        {
            let block = match self.next(checksums, segment, position, (lsn, chain)).await? {
                Ok(block) => block,
                Err(error) => {
                    undecodable = error.is_some_and(|it| matches!(it, DecodeError::Invalid(_)));
                    break;
                }
            };
            see(segment, &block);
            for record in block.records {
                if !sealed || lsn <= segment.last_lsn {
                    replayed.records.push((lsn, record));
                }
                lsn = lsn.plus(1);
            }
            durable = durable.max(block.durable);
            replayed.slot_sequence = replayed.slot_sequence.max(block.slot_sequence);
            chain = block.checksum;
            position = position.plus(1);
        }
        let at = self.geometry.log_block(self.log_start, position);
        let broken = |what, durable| Break { what, segment: 0, at, lsn, durable };
        let mut breaks = None;
        if undecodable {
            breaks = Some(broken("log block that this version cannot decode", durable));
        } else if sealed {
            if lsn <= segment.last_lsn {
                breaks = Some(broken("sealed log segment", segment.last_lsn));
            }
            durable = segment.last_lsn;
        } else {
            match self.durable_behind(checksums, segment, position).await? {
                Ok(later) if later >= lsn => breaks = Some(broken("log block", later)),
                Ok(later) => durable = durable.max(later),
                Err(at) => {
                    breaks = Some(Break { at, ..broken("host slot older than the log", durable) });
                }
            }
        }
        if breaks.is_some() {
            // What stands before the break was written before what proves the break.
            durable = Lsn::new(lsn.get().saturating_sub(1));
        }
        replayed.durable = replayed.durable.max(durable);
        let ends = !sealed && breaks.is_none() && self.unreadable.contains(&self.offset(position));
        replayed.unreadable = ends.then_some(at);
        replayed.end = position;
        replayed.lsn_next = lsn;
        Ok(breaks)
    }

    /// The block at `position` if it continues the chain, or what is wrong with it, if anything. One
    /// that does not is read once more: a bad transfer is not the end of the log.
    async fn next(
        &mut self,
        checksums: &Checksums,
        segment: &LogSegment,
        position: RingPosition,
        (lsn, chain): (Lsn, u64),
    ) -> Result<Result<LogBlock, Option<DecodeError>>, Error> {
        let at = self.geometry.log_block(self.log_start, position);
        let mut wrong = None;
        for attempt in 0..3 {
            let block = self.block(position).await?;
            match LogBlock::decode(block, checksums, at, segment.epoch, segment.nonce) {
                // The first block of an epoch is chained to nothing: its epoch's nonce stands for
                // it.
                Ok(block)
                    if block.position == position
                        && block.first_lsn == lsn
                        && block.previous == chain =>
                {
                    return Ok(Ok(block));
                }
                Ok(_) => wrong = None,
                Err(error) => wrong = Some(error),
            }
            self.chunk = None;
            let offset = self.offset(position);
            let is_unreadable = self.unreadable.contains(&offset);
            if attempt > 0 && !(attempt == 1 && is_unreadable && self.recovers(offset).await?) {
                break;
            }
        }
        Ok(Err(wrong))
    }

    /// Whether a block can be read after a while. The log is cut before it if not, for ever.
    async fn recovers(&self, offset: u64) -> Result<bool, Error> {
        for _ in 0..PATIENT_RETRIES {
            self.runtime.sleep(RETRY_AFTER).await;
            if self.read(offset, 1).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Highest F in valid blocks of the segment's epoch behind a break of its chain; or where a
    /// block of a later lap stands: the ring went round, and the segment is older than the log
    /// knows (rule 18).
    ///
    /// One bad transfer must not hide what says so. F never falls along the log, so if it did, what
    /// says so lies just behind the last valid block that was found: only that is read again.
    async fn durable_behind(
        &mut self,
        checksums: &Checksums,
        segment: &LogSegment,
        broken: RingPosition,
    ) -> Result<Result<Lsn, Pba>, Error> {
        let mut behind = Behind { durable: Lsn::default(), end: broken, laps: None };
        let end = segment.start.plus(self.geometry.ring_blocks);
        self.look_behind(checksums, segment, (broken, end), &mut behind).await?;
        if behind.laps.is_none() {
            self.chunk = None;
            // Up to the end of the transfer that may have been bad.
            let again = (behind.end, end.min(behind.end.plus(2 * request_blocks())));
            self.look_behind(checksums, segment, again, &mut behind).await?;
        }
        Ok(behind.laps.map_or(Ok(behind.durable), Err))
    }

    /// Adds what valid blocks at some positions say to `behind`.
    async fn look_behind(
        &mut self,
        checksums: &Checksums,
        segment: &LogSegment,
        (start, end): (RingPosition, RingPosition),
        behind: &mut Behind,
    ) -> Result<(), Error> {
        let mut position = start;
        while position < end && behind.laps.is_none() {
            let at = self.geometry.log_block(self.log_start, position);
            let block = self.block(position).await?;
            match LogBlock::decode(block, checksums, at, segment.epoch, segment.nonce) {
                Ok(block) if block.position > position => behind.laps = Some(at),
                Ok(block) if block.position == position => {
                    behind.durable = behind.durable.max(block.durable);
                    behind.end = behind.end.max(position.plus(1));
                }
                _ => {}
            }
            position = position.plus(1);
        }
        Ok(())
    }

    fn offset(&self, position: RingPosition) -> u64 {
        position.get() % self.geometry.ring_blocks
    }

    async fn block(&mut self, position: RingPosition) -> Result<&base::Block, Error> {
        let offset = self.offset(position);
        let held = matches!(&self.chunk, Some((start, count, _)) if (*start..start + count).contains(&offset));
        if !held {
            let count = request_blocks().min(self.geometry.ring_blocks - offset);
            let buffer = self.read_chunk(offset, usize::try_from(count).unwrap_or(1)).await?;
            self.chunk = Some((offset, count, buffer));
        }
        let at = self.log_start.plus(offset);
        self.chunk
            .as_ref()
            .and_then(|(start, _, buffer)| {
                buffer.blocks().get(usize::try_from(offset - start).ok()?)
            })
            .ok_or(Error::Damaged { what: "log ring", at })
    }

    /// Reads blocks of the ring: all at once, or one by one if some cannot be read. Those are zeroes.
    async fn read_chunk(&mut self, offset: u64, block_count: usize) -> Result<Buffer, Error> {
        for attempt in 0..=READ_RETRIES {
            if attempt > 0 {
                self.runtime.sleep(RETRY_AFTER).await;
            }
            if let Some(blocks) = self.read(offset, block_count).await? {
                let end = offset + u64::try_from(block_count).unwrap_or(0);
                self.unreadable.retain(|block| !(offset..end).contains(block));
                return Ok(blocks);
            }
        }
        let mut all = self.runtime.buffers().take(block_count);
        for (offset, into) in (offset..).zip(all.bytes_mut().chunks_exact_mut(BLOCK_SIZE)) {
            if let Some(block) = self.read(offset, 1).await? {
                into.copy_from_slice(block.bytes());
                self.unreadable.remove(&offset);
            } else {
                into.fill(0);
                self.unreadable.insert(offset);
            }
        }
        Ok(all)
    }

    /// Reads blocks of the ring, if they can be read.
    async fn read(&self, offset: u64, block_count: usize) -> Result<Option<Buffer>, Error> {
        let buffer = self.runtime.buffers().take(block_count);
        match self.device.read(self.log_start.plus(offset), block_count, buffer).await {
            Ok(blocks) => Ok(Some(blocks)),
            Err(error) if error.is_transport() => Err(error.into()),
            Err(_) => Ok(None),
        }
    }
}

/// Applies `VOID` records: those that they name do not count.
fn without_void(records: Vec<(Lsn, Record)>) -> Vec<(Lsn, Record)> {
    let void: std::collections::HashSet<Lsn> = records
        .iter()
        .filter_map(|(_, record)| match record.body {
            ondisk::RecordBody::Void { lsn } => Some(lsn),
            _ => None,
        })
        .collect();
    records.into_iter().filter(|(lsn, _)| !void.contains(lsn)).collect()
}

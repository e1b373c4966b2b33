//! Requests of the data path: what clients ask of disks, and what the model says of the answers.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind};
use disk::{Disk, DiskError, ExtentState, Request, Response};

use crate::model::ops::Outcome;
use crate::model::{Change, Place, VdiRef};
use crate::plan::RequestKind;
use crate::random::{Random, to_u64, to_usize};
use crate::session::{Handle, Reach, Session};

/// A run of bytes of a VDI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// First byte behind it.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    fn reach(self) -> Reach {
        Reach::Blocks(self.offset / BLOCK_SIZE_U64, self.end().div_ceil(BLOCK_SIZE_U64))
    }
}

/// What a client is about to ask.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// What.
    pub kind: RequestKind,
    /// Where.
    pub range: ByteRange,
    /// Whether it must be durable when it completes.
    pub fua: bool,
    /// Flags of write-zeroes: keep it allocated; only if that is fast.
    pub flags: (bool, bool),
    /// Most extents of a block status.
    pub extents_max: usize,
    /// Open a handle of its own.
    pub fresh_handle: bool,
}

impl Wish {
    /// Draws a request of this kind on a VDI of `block_count` blocks.
    #[must_use]
    pub fn draw(
        kind: RequestKind,
        session: &Session,
        block_count: u64,
        random: &mut Random,
    ) -> Self {
        let weights = &session.world.plan.weights;
        let layout = &session.world.plan.layout;
        let windows: Vec<_> =
            layout.windows().iter().filter(|window| window.first < block_count).collect();
        let window = windows.get(random.index(windows.len()));
        let (first, count) = window.map_or((0, 1), |window| (window.first, window.count));
        let start = first + random.below(count);
        let blocks = random.magnitude(weights.blocks_max).min(count);
        // Mostly within the window, sometimes across its end, where only reads may go.
        let blocks = blocks.min(first + count - start);
        let mut range =
            ByteRange { offset: start * BLOCK_SIZE_U64, length: blocks * BLOCK_SIZE_U64 };
        if random.chance(weights.unaligned_per_mille) {
            range = cut(range, 512, random);
        } else if random.chance(weights.ragged_per_mille) {
            range = cut(range, 1, random);
        }
        let wide = matches!(kind, RequestKind::Discard | RequestKind::WriteZeroes);
        let reads = matches!(kind, RequestKind::Read | RequestKind::BlockStatus);
        if wide && random.chance(150) {
            let from = random.below(block_count);
            let to = random.between(from, block_count);
            range =
                ByteRange { offset: from * BLOCK_SIZE_U64, length: (to - from) * BLOCK_SIZE_U64 };
        } else if reads && random.chance(100) {
            let from = random.below(block_count * BLOCK_SIZE_U64);
            range = ByteRange { offset: from, length: random.magnitude(64 << 10) };
        }
        if !random.chance(10) {
            let size = block_count * BLOCK_SIZE_U64;
            range.offset = range.offset.min(size);
            range.length = range.length.min(size - range.offset);
        }
        Self {
            kind,
            range,
            fua: random.chance(weights.fua_per_mille),
            flags: (random.chance(300), random.chance(100)),
            extents_max: to_usize(random.magnitude(32)),
            fresh_handle: random.chance(50),
        }
    }
}

/// A part of a range, at a multiple of `unit`.
fn cut(range: ByteRange, unit: u64, random: &mut Random) -> ByteRange {
    let units = range.length / unit;
    let from = random.below(units);
    let length = random.magnitude(units - from) * unit;
    ByteRange { offset: range.offset + from * unit, length }
}

/// Makes a request of a VDI or a snapshot of it, and judges the answer.
pub async fn make(session: Rc<Session>, place: Place, wish: Wish) {
    let Some(handle) = session.handle(place, wish.fresh_handle).await else { return };
    let world = Rc::clone(&session.world);
    let number = world.number();
    world.trace.event([20, number, wish.range.offset, wish.range.length], || {
        let fua = if wish.fua { " fua" } else { "" };
        let ByteRange { offset, length } = wish.range;
        let name = world.name_of(place);
        format!("request #{number} {:?} {name} {offset} +{length}{fua}", wish.kind)
    });
    let outcome = match (place, wish.kind) {
        (Place::Snapshot(..), _) => read_snapshot(&session, &handle, place, wish).await,
        (Place::Head(_), RequestKind::Read | RequestKind::ReadSnapshot) => {
            read(&session, &handle, place, wish.range).await
        }
        (Place::Head(vdi), RequestKind::Flush) => flush(&session, &handle, vdi).await,
        (_, RequestKind::BlockStatus) => status(&session, &handle, place, wish).await,
        (_, RequestKind::Cache) => cache(&session, &handle, wish).await,
        (Place::Head(vdi), _) => change(&session, &handle, vdi, wish).await,
    };
    world.progressed();
    let code = match &outcome {
        Ok(()) => 0,
        Err(error) => 1 + u64::from(disk::errno(error.kind)),
    };
    world.trace.event([21, number, code, 0], || match &outcome {
        Ok(()) => format!("request #{number} done"),
        Err(error) => format!("request #{number} failed: {error}"),
    });
    if let Err(error) = outcome {
        judge(&session, &handle, place, wish, &error);
    }
}

fn judge(session: &Session, handle: &Handle, place: Place, wish: Wish, error: &DiskError) {
    let what = format!("{:?} of {}", wish.kind, session.world.name_of(place));
    let (Place::Head(vdi) | Place::Snapshot(vdi, _)) = place;
    match error.kind {
        ErrorKind::Invalid if beyond(session, place, vdi, wish) => {
            session.world.probe("request: invalid");
        }
        ErrorKind::Unsupported if wish.kind == RequestKind::WriteZeroes && wish.flags.1 => {}
        _ => session.excuse_request(&what, handle, error, wish.range.reach()),
    }
}

/// Whether a request may lie beyond the end of its VDI.
fn beyond(session: &Session, place: Place, vdi: VdiRef, wish: Wish) -> bool {
    let model = session.world.model.borrow();
    let blocks = match place {
        Place::Head(_) => model.vdi(vdi).block_count,
        Place::Snapshot(_, number) => {
            model.vdi(vdi).snapshots.get(&number).map_or(0, |snapshot| snapshot.block_count)
        }
    };
    wish.range.end() > blocks * BLOCK_SIZE_U64
        || matches!(place, Place::Head(_)) && session.world.is_held(vdi)
}

async fn read(
    session: &Session,
    handle: &Handle,
    place: Place,
    range: ByteRange,
) -> Result<(), DiskError> {
    let world = &session.world;
    let asked = world.model.borrow_mut().begin_read();
    let length = to_usize(range.length);
    let answer = handle.disk.submit(Request::Read { offset: range.offset, length }).await;
    let mut model = world.model.borrow_mut();
    let segments = match answer {
        Ok(Response::Data(segments)) => segments,
        Ok(other) => {
            model.forget_read(asked);
            world.fail(format!("a read was answered with {other:?}"));
            return Ok(());
        }
        Err(error) => {
            model.forget_read(asked);
            return Err(error);
        }
    };
    let got: usize = segments.iter().map(disk::ReadSegment::len).sum();
    if got != length {
        world.fail(format!("a read of {length} bytes was answered with {got}"));
        return Ok(());
    }
    let mut bytes = vec![0; length];
    disk::copy_segments(&segments, &mut bytes);
    let _ = world.check(model.end_read(place, asked, range.offset, &bytes));
    Ok(())
}

async fn read_snapshot(
    session: &Session,
    handle: &Handle,
    place: Place,
    wish: Wish,
) -> Result<(), DiskError> {
    if wish.kind == RequestKind::Write {
        let data = session.runtime.buffers().take(1);
        let request = Request::Write { offset: 0, length: 512, data, fua: false };
        return match handle.disk.submit(request).await {
            Err(error) if error.kind == ErrorKind::ReadOnly => Ok(()),
            Err(error) => Err(error),
            Ok(_) => {
                session.world.fail(format!("{} was written", session.world.name_of(place)));
                Ok(())
            }
        };
    }
    if wish.kind == RequestKind::BlockStatus {
        return status(session, handle, place, wish).await;
    }
    read(session, handle, place, wish.range).await
}

async fn flush(session: &Session, handle: &Handle, vdi: VdiRef) -> Result<(), DiskError> {
    let asked = session.world.model.borrow_mut().begin_flush();
    let answer = handle.disk.submit(Request::Flush).await;
    match answer {
        Ok(_) => {
            session.world.model.borrow_mut().end_flush(vdi, asked);
            session.world.promised();
            Ok(())
        }
        Err(error) => {
            session.world.probe("flush: failed");
            Err(error)
        }
    }
}

async fn change(
    session: &Session,
    handle: &Handle,
    vdi: VdiRef,
    wish: Wish,
) -> Result<(), DiskError> {
    let world = &session.world;
    let ByteRange { offset, length } = wish.range;
    let change = match wish.kind {
        RequestKind::Write => Change::Write,
        RequestKind::WriteOfZeroes => Change::WriteOfZeroes,
        RequestKind::Discard => Change::Discard,
        _ => Change::Zero,
    };
    let serial = world.model.borrow_mut().begin(vdi, change, offset, length);
    world.trace.note(|| format!("         change {} is of the request above", serial.0));
    let fua = wish.fua;
    let request = match change {
        Change::Write | Change::WriteOfZeroes => {
            if offset % BLOCK_SIZE_U64 != 0 || length % BLOCK_SIZE_U64 != 0 {
                world.probe("request: sub-block write");
            }
            let length = to_usize(length);
            let mut data = session.runtime.buffers().take(length.div_ceil(base::BLOCK_SIZE).max(1));
            world.model.borrow().fill(serial, change, offset, &mut data.bytes_mut()[..length]);
            Request::Write { offset, length, data, fua }
        }
        Change::Discard => Request::Discard { offset, length, fua },
        Change::Zero => {
            let (no_hole, fast_only) = wish.flags;
            Request::WriteZeroes { offset, length, fua, no_hole, fast_only }
        }
    };
    let answer = handle.disk.submit(request).await;
    let outcome = if answer.is_ok() { Outcome::Acked } else { Outcome::Failed };
    world.model.borrow_mut().end(serial, outcome, fua);
    if fua && outcome == Outcome::Acked {
        world.promised();
    }
    answer.map(|_| ())
}

async fn cache(session: &Session, handle: &Handle, wish: Wish) -> Result<(), DiskError> {
    let ByteRange { offset, length } = wish.range;
    let answer = handle.disk.submit(Request::Cache { offset, length }).await;
    if let Ok(Response::Data(_) | Response::Extents(_)) = answer {
        session.world.fail("a cache request was answered with something else");
    }
    answer.map(|_| ())
}

async fn status(
    session: &Session,
    handle: &Handle,
    place: Place,
    wish: Wish,
) -> Result<(), DiskError> {
    let world = &session.world;
    let ByteRange { offset, length } = wish.range;
    if length == 0 {
        return Ok(());
    }
    let extents_max = wish.extents_max;
    let asked = world.model.borrow_mut().begin_read();
    let answer = handle.disk.submit(Request::BlockStatus { offset, length, extents_max }).await;
    let mut model = world.model.borrow_mut();
    model.forget_read(asked);
    let extents = match answer {
        Ok(Response::Extents(extents)) => extents,
        Ok(other) => {
            world.fail(format!("a block status was answered with {other:?}"));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let total: u64 = extents.iter().map(|extent| extent.length).sum();
    if extents.is_empty()
        || extents.len() > extents_max
        || total > length
        || extents.iter().any(|extent| extent.length == 0)
    {
        world.fail(format!("a block status of {length} bytes was answered with {extents:?}"));
        return Ok(());
    }
    let mut at = offset;
    for extent in extents {
        if extent.state != ExtentState::Data {
            let _ = world.check(model.check_zero(place, asked, at, at + extent.length));
        }
        at += extent.length;
    }
    Ok(())
}

/// Reads every block of a place that lies in a window, with the number of each. `None`: it could
/// not be opened.
pub async fn read_all(
    session: &Session,
    place: Place,
    block_count: u64,
) -> Option<Vec<(usize, Vec<u8>)>> {
    let world = &session.world;
    let handle = session.handle(place, true).await?;
    let mut blocks = Vec::new();
    let windows = world.plan.layout.windows().to_vec();
    for window in windows.iter().filter(|window| window.first < block_count) {
        let end = (window.first + window.count).min(block_count);
        let mut from = window.first;
        while from < end {
            let count = (end - from).min(64);
            match read_blocks(session, &handle.disk, from, count).await {
                Ok(bytes) => add_blocks(world, &mut blocks, from, &bytes),
                // One bad block must not hide its neighbours.
                Err(_) if count > 1 => {
                    for lba in from..from + count {
                        match read_blocks(session, &handle.disk, lba, 1).await {
                            Ok(bytes) => add_blocks(world, &mut blocks, lba, &bytes),
                            Err(error) => excuse(session, &handle, place, lba, &error),
                        }
                    }
                }
                Err(error) => excuse(session, &handle, place, from, &error),
            }
            from += count;
        }
    }
    Some(blocks)
}

fn add_blocks(
    world: &crate::world::World,
    blocks: &mut Vec<(usize, Vec<u8>)>,
    from: u64,
    bytes: &[u8],
) {
    for (lba, block) in (from..).zip(bytes.chunks_exact(base::BLOCK_SIZE)) {
        if let Some(slot) = world.plan.layout.slot(lba) {
            blocks.push((slot, block.to_vec()));
        }
    }
}

fn excuse(session: &Session, handle: &Handle, place: Place, lba: u64, error: &DiskError) {
    let what = format!("read of block {lba} of {}", session.world.name_of(place));
    session.excuse_request(&what, handle, error, Reach::Blocks(lba, lba + 1));
}

/// Reads whole blocks of a disk.
///
/// # Errors
/// Those of the disk.
pub async fn read_blocks(
    session: &Session,
    disk: &Rc<dyn Disk>,
    lba: u64,
    count: u64,
) -> Result<Vec<u8>, DiskError> {
    let length = to_usize(count * BLOCK_SIZE_U64);
    let answer = disk.submit(Request::Read { offset: lba * BLOCK_SIZE_U64, length }).await;
    session.world.progressed();
    let mut bytes = vec![0xee; length];
    match answer? {
        Response::Data(segments) => {
            let got: u64 = segments.iter().map(|segment| to_u64(segment.len())).sum();
            if got != to_u64(length) {
                session.world.fail(format!("a read of {length} bytes was answered with {got}"));
            }
            disk::copy_segments(&segments, &mut bytes);
        }
        other => session.world.fail(format!("a read was answered with {other:?}")),
    }
    Ok(bytes)
}

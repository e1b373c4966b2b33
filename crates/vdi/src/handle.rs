//! What frontends hold: a VDI, or a snapshot of one, as a [`Disk`].

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind, VdiId};
use disk::{Disk, DiskError, Identity, LocalBoxFuture, Request, Response};
use ondisk::RangeState;

use crate::branch::{Point, View};
use crate::engine::{Engine, as_u64};
use crate::vdi::{Snapshot, Vdi};

/// A VDI, open for reading and writing.
pub(crate) struct VdiHandle {
    engine: Rc<Engine>,
    vdi: Rc<Vdi>,
    incarnation: u64,
}

/// A snapshot, or a write that it keeps, open for reading.
pub(crate) struct SnapshotHandle {
    engine: Rc<Engine>,
    vdi: Rc<Vdi>,
    snapshot: Rc<Snapshot>,
    write: Option<Rc<Point>>,
}

impl VdiHandle {
    pub(crate) fn new(engine: Rc<Engine>, vdi: Rc<Vdi>) -> Self {
        let incarnation = vdi.incarnation.get();
        Self { engine, vdi, incarnation }
    }
}

impl SnapshotHandle {
    pub(crate) fn new(
        engine: Rc<Engine>,
        vdi: Rc<Vdi>,
        snapshot: Rc<Snapshot>,
        write: Option<Rc<Point>>,
    ) -> Self {
        Self { engine, vdi, snapshot, write }
    }

    fn view(&self) -> View {
        match &self.write {
            Some(point) => View::Point(Rc::clone(&self.snapshot.branch), Rc::clone(point)),
            None => self.snapshot.view(),
        }
    }
}

/// First byte and length of a request, and whether it changes anything.
fn range_of(request: &Request) -> (u64, u64, bool) {
    match request {
        Request::Read { offset, length } => (*offset, as_u64(*length), false),
        Request::Write { offset, length, .. } => (*offset, as_u64(*length), true),
        Request::Flush => (0, 0, false),
        Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
            (*offset, *length, true)
        }
        Request::Cache { offset, length } | Request::BlockStatus { offset, length, .. } => {
            (*offset, *length, false)
        }
    }
}

/// What a handle is of.
fn identity(engine: &Engine, vdi: &Vdi, state: u64) -> Identity {
    let store = engine.checksums.uuid().0;
    Identity { store, disk: vdi.id.get(), failures: engine.failures, state }
}

/// Distinguishes the identity of a snapshot, by number, from that of its VDI, by rollbacks.
const SNAPSHOT: u64 = 1 << 63;

/// As [`SNAPSHOT`], of a write, by position.
const WRITE: u64 = 1 << 62;

fn check(request: &Request, size_bytes: u64, read_only: bool) -> Result<(), DiskError> {
    let (offset, length, changes) = range_of(request);
    if changes && read_only {
        return Err(DiskError::new(ErrorKind::ReadOnly, "the disk is read-only"));
    }
    if offset.checked_add(length).is_none_or(|end| end > size_bytes) {
        return Err(DiskError::new(ErrorKind::Invalid, "the range ends beyond the disk"));
    }
    let too_long = match request {
        Request::Read { length, .. } => *length > disk::REQUEST_BYTES_MAX,
        Request::Write { length, data, .. } => {
            *length > disk::REQUEST_BYTES_MAX || *length > data.bytes().len()
        }
        _ => false,
    };
    if too_long {
        return Err(DiskError::new(ErrorKind::Invalid, "the request is larger than 1 MiB"));
    }
    Ok(())
}

const SEVERED: DiskError = DiskError::new(
    ErrorKind::Fenced,
    "the disk was deleted, rolled back, shrunk or stopped; connect again",
);

impl Disk for VdiHandle {
    fn serial(&self) -> String {
        format!("plx-{:016x}", self.vdi.id.get())
    }

    fn identity(&self) -> Identity {
        identity(&self.engine, &self.vdi, self.vdi.rollbacks.get())
    }

    fn size_bytes(&self) -> u64 {
        self.vdi.block_count.get() * BLOCK_SIZE_U64
    }

    fn read_only(&self) -> bool {
        self.engine.read_only
    }

    fn severed(&self) -> bool {
        self.vdi.incarnation.get() != self.incarnation || self.engine.scheduler.failure().is_some()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        if self.severed() {
            return Box::pin(std::future::ready(Err(SEVERED)));
        }
        if let Err(error) = check(&request, self.size_bytes(), self.read_only()) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let active = match self.engine.begin() {
            Ok(active) => active,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        };
        let (engine, vdi) = (Rc::clone(&self.engine), Rc::clone(&self.vdi));
        let incarnation = self.incarnation;
        let changes = range_of(&request).2;
        let work = async move {
            let outcome = execute(&engine, &vdi, incarnation, request).await;
            drop(active);
            if outcome.is_err() {
                engine.stats.borrow_mut().errors += 1;
            }
            outcome
        };
        if changes {
            // A change that was begun is finished, whoever waits for it: its log record counts.
            Box::pin(self.engine.runtime.spawn(work))
        } else {
            Box::pin(work)
        }
    }
}

async fn execute(
    engine: &Rc<Engine>,
    vdi: &Rc<Vdi>,
    incarnation: u64,
    request: Request,
) -> Result<Response, DiskError> {
    match request {
        Request::Read { length: 0, .. } => Ok(Response::Data(Vec::new())),
        Request::Write { length: 0, .. }
        | Request::Discard { length: 0, .. }
        | Request::WriteZeroes { length: 0, .. } => Ok(Response::Done),
        Request::Read { offset, length } => {
            let data = engine.read(vdi.id, &vdi.head(), offset, length).await?;
            if vdi.incarnation.get() != incarnation {
                // A rollback or deletion came between: what was looked up may be of neither state.
                return Err(SEVERED);
            }
            let mut stats = engine.stats.borrow_mut();
            stats.reads += 1;
            stats.read_bytes += as_u64(length);
            Ok(Response::Data(data))
        }
        Request::Write { offset, length, data, fua } => {
            engine.write(vdi, incarnation, offset, length, data, fua).await?;
            let mut stats = engine.stats.borrow_mut();
            stats.writes += 1;
            stats.write_bytes += as_u64(length);
            Ok(Response::Done)
        }
        Request::Flush => {
            engine
                .scheduler
                .flush()
                .await
                .map_err(|error| DiskError::from_display(ErrorKind::Io, &error))?;
            engine.stats.borrow_mut().flushes += 1;
            engine.note_flush(vdi);
            Ok(Response::Done)
        }
        Request::Discard { offset, length, fua } => {
            let state = RangeState::Unmapped;
            engine.write_zeroes(vdi, incarnation, offset, length, state, fua).await?;
            engine.stats.borrow_mut().discards += 1;
            Ok(Response::Done)
        }
        Request::WriteZeroes { offset, length, fua, no_hole, .. } => {
            let state = if no_hole { RangeState::Zero } else { RangeState::Unmapped };
            engine.write_zeroes(vdi, incarnation, offset, length, state, fua).await?;
            engine.stats.borrow_mut().discards += 1;
            Ok(Response::Done)
        }
        Request::Cache { .. } => Ok(Response::Done),
        Request::BlockStatus { offset, length, extents_max } => {
            let extents =
                engine.block_status(&vdi.head(), offset, length, extents_max.max(1)).await?;
            Ok(Response::Extents(extents))
        }
    }
}

impl Disk for SnapshotHandle {
    fn serial(&self) -> String {
        format!("plx-{:x}-{:x}", self.vdi.id.get(), self.snapshot.number.get())
            .chars()
            .take(20)
            .collect()
    }

    fn identity(&self) -> Identity {
        let state = match &self.write {
            Some(point) => WRITE | point.position.get(),
            None => SNAPSHOT | self.snapshot.number.get(),
        };
        identity(&self.engine, &self.vdi, state)
    }

    fn size_bytes(&self) -> u64 {
        self.snapshot.block_count * BLOCK_SIZE_U64
    }

    fn read_only(&self) -> bool {
        true
    }

    fn severed(&self) -> bool {
        // One that gets a tree of its own names no history any more.
        let is_forgotten = self.write.is_some() && self.snapshot.point.writes_from.get().is_none();
        self.snapshot.deleted.get() || is_forgotten || self.engine.scheduler.failure().is_some()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        if self.severed() {
            return Box::pin(std::future::ready(Err(SEVERED)));
        }
        if let Err(error) = check(&request, self.size_bytes(), true) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let active = match self.engine.begin() {
            Ok(active) => active,
            Err(error) => return Box::pin(std::future::ready(Err(error.into()))),
        };
        let engine = Rc::clone(&self.engine);
        let (vdi, view) = (self.vdi.id, self.view());
        Box::pin(async move {
            let outcome = look(&engine, vdi, &view, request).await;
            drop(active);
            if outcome.is_err() {
                engine.stats.borrow_mut().errors += 1;
            }
            outcome
        })
    }
}

/// Executes a request that changes nothing.
async fn look(
    engine: &Rc<Engine>,
    vdi: VdiId,
    view: &View,
    request: Request,
) -> Result<Response, DiskError> {
    match request {
        Request::Read { length: 0, .. } => Ok(Response::Data(Vec::new())),
        Request::Read { offset, length } => {
            let data = engine.read(vdi, view, offset, length).await?;
            let mut stats = engine.stats.borrow_mut();
            stats.reads += 1;
            stats.read_bytes += as_u64(length);
            Ok(Response::Data(data))
        }
        Request::BlockStatus { offset, length, extents_max } => {
            let extents = engine.block_status(view, offset, length, extents_max.max(1)).await?;
            Ok(Response::Extents(extents))
        }
        _ => Ok(Response::Done),
    }
}

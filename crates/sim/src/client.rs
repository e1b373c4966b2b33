//! What the clients of a store do: several tasks, each with several requests under way.

use std::cell::Cell;
use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind};
use disk::{Disk, DiskError, Request, Response};
use runtime::sync::Semaphore;
use vdi::Target;

use crate::content::{self, Tag};
use crate::management;
use crate::model::Place;
use crate::plan::{Fill, RequestKind};
use crate::random::{Random, to_u64, to_usize};
use crate::requests::{self, Wish};
use crate::session::{Reach, Session};

/// Lets the clients of a plan work until they have made `requests` requests together, or the store
/// stops.
pub async fn work(session: Rc<Session>, requests: u64) {
    let world = &session.world;
    let mut random = Random::split(world.seed ^ world.number(), "clients");
    if world.model.borrow().live().next().is_none() && requests > 0 {
        management::create(&session, &mut random).await;
    }
    let left = Rc::new(Cell::new(requests));
    let mut clients = Vec::new();
    for _ in 0..world.plan.clients {
        let client = client(Rc::clone(&session), Rc::clone(&left), Random::new(random.number()));
        clients.push(session.runtime.spawn(client));
    }
    for client in clients {
        client.await;
    }
}

/// Fills a VDI of its own until the store is full, frees some of it or all, and shows that the space
/// is back. Nothing else is under way.
pub async fn fill(session: Rc<Session>, fill: Fill) {
    let world = &session.world;
    let outcome = fill_and_free(&session, fill).await;
    match outcome {
        Ok(()) => {}
        Err(error) => session.excuse("fill", error.kind, &error, FILL_REACH),
    }
    world.progressed();
}

/// The VDI that fills the store; the model does not know it.
pub const FILL_NAME: &str = "fill";

/// Bytes of each request that fills the store.
const FILL_BYTES: usize = 1 << 20;

/// What of the VDI is read again.
const FILL_REACH: Reach = Reach::Blocks(0, 256);

async fn fill_and_free(session: &Session, fill: Fill) -> Result<(), DiskError> {
    let world = &session.world;
    let size = world.plan.device_blocks * BLOCK_SIZE_U64;
    let target = Target { vdi: FILL_NAME.to_owned(), snapshot: None };
    let id = session.store.create(&target.vdi, size).await?;
    world.ids.borrow_mut().insert(id.get());
    let disk = session.store.open_disk(&target).await?;
    let tag = Tag::new(u32::MAX, 1);
    let mut offset = 0;
    loop {
        match write_at(session, &disk, tag, offset).await {
            Ok(()) => offset += to_u64(FILL_BYTES),
            Err(error) if error.kind == ErrorKind::NoSpace => break,
            Err(error) => return Err(error),
        }
        if offset >= size && world.device.with_atlas(|atlas| atlas.metadata_is_damaged()) {
            // Nodes were lost, and with them what they named: that space is free again.
            return Ok(());
        }
        if offset >= size {
            world.fail("more was written than the store holds");
            return Ok(());
        }
    }
    world.probe("fill: full");
    // Everything but writing goes on.
    disk.submit(Request::Flush).await?;
    let read = Request::Read { offset: 0, length: FILL_BYTES };
    if let Response::Data(segments) = disk.submit(read).await? {
        let mut bytes = vec![0; FILL_BYTES];
        disk::copy_segments(&segments, &mut bytes);
        let mut expected = vec![0; FILL_BYTES];
        content::fill(tag, 0, &mut expected);
        if offset > 0 && bytes != expected {
            world.fail("a full store reads wrong");
        }
    }
    let kept = match fill {
        Fill::AllFree => 0,
        Fill::Blocks(blocks) => offset.saturating_sub(blocks * BLOCK_SIZE_U64),
    };
    disk.submit(Request::Discard { offset: kept, length: size - kept, fua: true }).await?;
    session.store.checkpoint().await?;
    if kept > 0 {
        world.probe("fill: tight");
        return Ok(());
    }
    match write_at(session, &disk, tag, 0).await {
        Ok(()) => world.probe("fill: healed"),
        Err(error) if error.kind == ErrorKind::NoSpace => {
            world.fail(format!("an emptied store cannot be written: {error}"));
        }
        Err(error) => return Err(error),
    }
    session.store.remove(&target).await?;
    Ok(())
}

async fn write_at(
    session: &Session,
    disk: &Rc<dyn Disk>,
    tag: Tag,
    offset: u64,
) -> Result<(), DiskError> {
    let mut data = session.runtime.buffers().take(FILL_BYTES / base::BLOCK_SIZE);
    content::fill(tag, offset, &mut data.bytes_mut()[..FILL_BYTES]);
    let request = Request::Write { offset, length: FILL_BYTES, data, fua: false };
    let answer = disk.submit(request).await;
    session.world.progressed();
    answer.map(|_| ())
}

async fn client(session: Rc<Session>, left: Rc<Cell<u64>>, mut random: Random) {
    let depth = to_usize(session.world.plan.depth).max(1);
    let slots = Semaphore::new(depth);
    while left.get() > 0 && !session.stopped() {
        left.set(left.get() - 1);
        let permit = slots.acquire(1).await;
        let weights = &session.world.plan.weights;
        if random.chance(weights.management_per_mille) {
            let Some(kind) = random.weighted(&weights.management) else { continue };
            let own = Random::new(random.number());
            let task = management::make(Rc::clone(&session), kind, own);
            drop(session.runtime.spawn(async move {
                task.await;
                drop(permit);
            }));
        } else if let Some((place, wish)) = draw(&session, &mut random) {
            let task = requests::make(Rc::clone(&session), place, wish);
            drop(session.runtime.spawn(async move {
                task.await;
                drop(permit);
            }));
        }
        if random.chance(100) {
            let pause = std::time::Duration::from_micros(random.magnitude(3_000_000));
            session.runtime.sleep(pause).await;
        }
    }
    drop(slots.acquire(depth).await);
}

fn draw(session: &Session, random: &mut Random) -> Option<(Place, Wish)> {
    let weights = &session.world.plan.weights;
    let kind = random.weighted(&weights.requests)?;
    if kind == RequestKind::ReadSnapshot {
        let (vdi, number) = management::pick_snapshot(session, random)?;
        let size = session.world.model.borrow().vdi(vdi).snapshots.get(&number)?.block_count;
        let kinds =
            [RequestKind::Read, RequestKind::Read, RequestKind::BlockStatus, RequestKind::Write];
        let kind = random.pick(&kinds)?;
        let wish = Wish::draw(kind, session, size, random);
        return Some((Place::Snapshot(vdi, number), wish));
    }
    let vdi = management::pick(session, random)?;
    let size = session.world.model.borrow().vdi(vdi).block_count;
    Some((Place::Head(vdi), Wish::draw(kind, session, size, random)))
}

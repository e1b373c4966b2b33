//! What the clients of a store do: several tasks, each with several requests under way.

use std::cell::Cell;
use std::rc::Rc;

use runtime::sync::Semaphore;

use crate::management;
use crate::model::Place;
use crate::plan::RequestKind;
use crate::random::{Random, to_usize};
use crate::requests::{self, Wish};
use crate::session::Session;

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

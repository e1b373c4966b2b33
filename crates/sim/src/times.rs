//! Times: a disk as it was at one is its newest snapshot that was taken then or before, a moment or one
//! that was asked for; the wall clock leaps, back and forth.
//!
//! What a moment holds the model does not know, so it is read first, by its number; a clone of the time
//! must hold the same. Whoever reads a moment has it open: it stays.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, ErrorKind};
use disk::Disk;
use runtime::Clock;
use vdi::{SnapshotEntry, Target};

use crate::management::{
    VDIS_MAX, begin_rollback, created, give_up, list_snapshots, new_name, pick, rolled_back,
};
use crate::model::{Contents, Place, VdiRef};
use crate::random::Random;
use crate::requests::read_blocks;
use crate::session::{Reach, Session};
use crate::world::{Pending, Source, World};

/// Blocks that are read at a time.
const BLOCKS_READ: u64 = 64;

/// A snapshot that is open, and all that it holds in windows of the layout.
pub struct Opened {
    /// It, by its number.
    pub target: Target,
    /// Its size.
    pub block_count: u64,
    /// Its blocks, by number in the layout.
    pub blocks: Vec<(usize, Vec<u8>)>,
    /// Keeps it.
    pub disk: Rc<dyn Disk>,
}

/// A time as people write it.
fn written(wall_ns: u64) -> String {
    let time = jiff::Timestamp::from_nanosecond(wall_ns.into());
    time.map_or_else(|error| error.to_string(), |time| time.to_string())
}

/// The newest that was taken at a time or before. A list is in order of numbers, and of times.
fn newest_at(listed: &[SnapshotEntry], wall_ns: u64) -> Option<&SnapshotEntry> {
    listed.iter().rev().find(|entry| entry.created_ns <= wall_ns)
}

/// A time near one of those at which something was taken.
fn draw_time(listed: &[SnapshotEntry], random: &mut Random) -> u64 {
    let at = listed.get(random.index(listed.len())).map_or(0, |entry| entry.created_ns);
    match random.below(5) {
        0 => at,
        1 => at.saturating_sub(1),
        2 => at + 1,
        3 => at + random.magnitude(10_000_000_000),
        _ => at.saturating_sub(random.magnitude(10_000_000_000)),
    }
}

/// Makes the wall clock wrong, or right.
pub fn leap(session: &Session, random: &mut Random) {
    let clock = &session.world.clock;
    let ns = i64::try_from(random.magnitude(100_000_000_000_000)).unwrap_or(0);
    clock.jump_wall(match random.below(3) {
        0 => ns,
        1 => -ns,
        _ => -clock.wall_error_ns(),
    });
    session.world.probe("clock: leapt");
}

/// Asks what a VDI was at a time.
pub async fn look_up(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, false) {
        return;
    }
    let name = world.name_of(Place::Head(vdi));
    if let Some(before) = list_snapshots(session, &name).await {
        let wall_ns = draw_time(&before, random);
        let (error_ns, asked_ns) = (world.clock.wall_error_ns(), world.clock.wall_ns());
        let answer = session.store.snapshot_info(&name, &written(wall_ns)).await;
        let answered_ns = world.clock.wall_ns();
        let leapt = error_ns != world.clock.wall_error_ns();
        if let Some(after) = list_snapshots(session, &name).await {
            check_order(world, &name, &after);
            // Both lists have it: it was there all the time.
            let stayed: Vec<SnapshotEntry> =
                before.into_iter().filter(|entry| after.contains(entry)).collect();
            if !leapt {
                let times = Times { wall_ns, asked_ns, answered_ns };
                judge(session, &name, &times, &stayed, answer);
            }
        }
    }
    world.release(vdi);
}

/// Times never go back from one snapshot to the next (rule 38).
fn check_order(world: &World, name: &str, listed: &[SnapshotEntry]) {
    if !listed.is_sorted_by(|one, other| one.created_ns <= other.created_ns) {
        world.fail(format!("times of {name} go back: {listed:?}"));
    }
}

/// What the wall clock said.
struct Times {
    /// The time that was looked up.
    wall_ns: u64,
    /// When.
    asked_ns: u64,
    /// When that was answered.
    answered_ns: u64,
}

fn judge(
    session: &Session,
    name: &str,
    times: &Times,
    stayed: &[SnapshotEntry],
    answer: Result<SnapshotEntry, vdi::Error>,
) {
    let world = &session.world;
    let &Times { wall_ns, asked_ns, answered_ns } = times;
    let expected = newest_at(stayed, wall_ns);
    let is_to_come = wall_ns > answered_ns;
    let is_behind = stayed.last().is_some_and(|newest| newest.created_ns > answered_ns);
    let what = format!("{name}@{}", written(wall_ns));
    match answer {
        Ok(_) if is_to_come || is_behind => {
            world.fail(format!("{what}: it is {} only", written(answered_ns)));
        }
        Ok(entry) if entry.created_ns > wall_ns => world.fail(format!("{what} is {entry:?}")),
        Ok(entry) if expected.is_some_and(|expected| expected.number > entry.number) => {
            world.fail(format!("{what} is {entry:?}, but there is {expected:?}"));
        }
        Ok(_) => world.probe("times: found"),
        Err(error) => match error.kind() {
            ErrorKind::NotFound if expected.is_none() => world.probe("times: too long ago"),
            ErrorKind::Invalid if wall_ns > asked_ns => {}
            // The newest may be one that is not listed, as it is being taken.
            ErrorKind::Invalid if world.clock.was_ahead(asked_ns) => {
                world.probe("times: the clock went back")
            }
            ErrorKind::NotFound => world.fail(format!("{what}: {error}, but it is {expected:?}")),
            kind => session.excuse(&what, kind, &error, Reach::Metadata),
        },
    }
}

/// Makes a VDI of what another one was at a time.
pub async fn clone(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if world.model.borrow().live().count() >= VDIS_MAX || !world.hold(vdi, false) {
        return;
    }
    let found = at_time(session, vdi, random).await;
    if let Some(AtTime { target, opened, contents, wall_error_ns }) = found {
        let name = new_name(session, random);
        let (block_count, source) = (opened.block_count, Source::Fixed(contents));
        let number = world.ask(Pending::Create { name: name.clone(), block_count, source });
        let answer = session.store.clone_vdi(&target, &name).await;
        match answer {
            Err(error) if is_about_the_clock(world, wall_error_ns, &error) => {
                give_up(session, number);
            }
            answer => {
                created(session, number, &format!("clone {target} as {name}"), answer);
                world.probe("clone: of a time");
            }
        }
    }
    world.release(vdi);
}

/// Makes a VDI what it was at a time.
pub async fn rollback(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, true) {
        return;
    }
    match at_time(session, vdi, random).await {
        Some(AtTime { target, opened, contents, wall_error_ns }) => {
            let serial = begin_rollback(session, vdi, &contents);
            let number = world.ask(Pending::Rollback(vdi, opened.block_count, serial));
            let label = target.snapshot.clone().unwrap_or_default();
            let answer = session.store.rollback(&target.vdi, &label).await;
            match answer {
                Err(error) if is_about_the_clock(world, wall_error_ns, &error) => {
                    give_up(session, number);
                    world.release(vdi);
                }
                answer => {
                    rolled_back(session, number, &target, answer);
                    world.probe("rollback: to a time");
                }
            }
        }
        None => world.release(vdi),
    }
}

/// What a VDI was at a time.
struct AtTime {
    /// The VDI, and the time.
    target: Target,
    /// What that is, by number.
    opened: Opened,
    contents: Contents,
    /// How wrong the clock was.
    wall_error_ns: i64,
}

/// Finds out what a VDI that is held was at some time before its newest snapshot: what is taken
/// later does not change that.
async fn at_time(session: &Session, vdi: VdiRef, random: &mut Random) -> Option<AtTime> {
    let world = &session.world;
    let name = world.name_of(Place::Head(vdi));
    let listed = list_snapshots(session, &name).await?;
    let (wall_ns, wall_error_ns) = (draw_time(&listed, random), world.clock.wall_error_ns());
    let newest_ns = listed.last()?.created_ns;
    if wall_ns >= newest_ns || newest_ns > world.clock.wall_ns() {
        return None;
    }
    let opened = open(session, &name, newest_at(&listed, wall_ns)?).await?;
    let empty = world.model.borrow().empty();
    let contents = Contents::seen(empty, &world.plan.layout, &opened.blocks)?;
    let target = Target { vdi: name, snapshot: Some(written(wall_ns)) };
    Some(AtTime { target, opened, contents, wall_error_ns })
}

/// Opens a snapshot, and reads all of it. `None`: it is gone, or damaged.
pub async fn open(session: &Session, name: &str, entry: &SnapshotEntry) -> Option<Opened> {
    let target = Target { vdi: name.to_owned(), snapshot: Some(entry.number.to_string()) };
    // A moment's time may come.
    open_target(session, target, entry.changed_bytes.is_some()).await
}

/// As [`open`], of what may go by itself, or may not.
pub async fn open_target(session: &Session, target: Target, may_go: bool) -> Option<Opened> {
    let world = &session.world;
    let disk = match session.store.open_disk(&target).await {
        Ok(disk) => disk,
        Err(error) if error.kind() == ErrorKind::NotFound && may_go => return None,
        Err(error) => {
            session.excuse(&format!("open {target}"), error.kind(), &error, Reach::Metadata);
            return None;
        }
    };
    let block_count = disk.size_bytes() / BLOCK_SIZE_U64;
    let mut blocks = Vec::new();
    for window in world.plan.layout.windows().to_vec() {
        let mut lba = window.first;
        let end = (window.first + window.count).min(block_count);
        while lba < end {
            let count = (end - lba).min(BLOCKS_READ);
            let bytes = match read_blocks(session, &disk, lba, count).await {
                Ok(bytes) => bytes,
                Err(_) if disk.severed() => return None,
                Err(error) => {
                    let reach = Reach::Blocks(lba, lba + count);
                    session.excuse(&format!("read of {target}"), error.kind, &error, reach);
                    return None;
                }
            };
            for (lba, block) in (lba..).zip(bytes.chunks_exact(base::BLOCK_SIZE)) {
                let damaged = world.device.with_atlas(|atlas| atlas.may_have_undone(lba));
                let slot = world.plan.layout.slot(lba).filter(|_| !damaged)?;
                blocks.push((slot, block.to_vec()));
            }
            lba += count;
        }
    }
    Some(Opened { target, block_count, blocks, disk })
}

/// Whether a time was refused for a clock that has leapt: meanwhile, or after the newest was taken, if that is
/// not listed yet.
fn is_about_the_clock(world: &World, error_ns: i64, error: &vdi::Error) -> bool {
    let has_leapt = error_ns != world.clock.wall_error_ns();
    let was_ahead = world.clock.was_ahead(world.clock.wall_ns());
    error.kind() == ErrorKind::Invalid && (has_leapt || was_ahead)
}

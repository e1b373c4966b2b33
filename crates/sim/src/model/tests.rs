//! The model bites: disks with planted bugs are caught, a right one never is.

use std::task::{Context, Poll, Waker};

use base::Buffer;
use disk::{Disk, MemDisk, Request, Response};

use super::*;
use crate::random::Random;

const SIZE: usize = 16 * BLOCK_SIZE;

/// What is wrong with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// An acknowledged write is dropped.
    LostWrite,
    /// A write lands one block further on.
    Misplaced,
    /// A power cut leaves half of an unflushed write in a block.
    Torn,
    /// A flush does nothing.
    IgnoredFlush,
    /// A power cut keeps a newer write of a block, without an older one.
    Reordered,
    /// A kill takes the newest acknowledged write.
    KilledWrite,
    /// A snapshot follows the disk.
    LiveSnapshot,
    /// A snapshot lacks the newest acknowledged write.
    EarlySnapshot,
    /// Reads go back in time once.
    StaleRead,
    /// What survived a crash changes at the next one.
    SecondThoughts,
}

/// A disk over [`MemDisk`] with a volatile cache: a list of writes on top of what was flushed.
struct FakeDisk {
    bug: Bug,
    flushed: MemDisk,
    cached: Vec<(u64, Vec<u8>)>,
    random: Random,
    struck: bool,
}

fn now<T>(mut future: runtime::LocalBoxFuture<T>) -> T {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a disk in memory answers at once"),
    }
}

fn contents(disk: &MemDisk) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    match now(disk.submit(Request::Read { offset: 0, length: SIZE })) {
        Ok(Response::Data(segments)) => disk::copy_segments(&segments, &mut bytes),
        other => panic!("{other:?}"),
    }
    bytes
}

fn put(disk: &MemDisk, offset: u64, bytes: &[u8]) {
    let data = Buffer::from_bytes(bytes);
    now(disk.submit(Request::Write { offset, length: bytes.len(), data, fua: false })).unwrap();
}

impl FakeDisk {
    fn new(bug: Bug, seed: u64) -> Self {
        let random = Random::split(seed, "fake disk");
        Self { bug, flushed: MemDisk::new(SIZE), cached: Vec::new(), random, struck: false }
    }

    fn strikes(&mut self, bug: Bug) -> bool {
        let strikes = self.bug == bug && self.random.chance(200);
        self.struck |= strikes;
        strikes
    }

    fn write(&mut self, offset: u64, bytes: Vec<u8>) {
        if self.strikes(Bug::LostWrite) {
            return;
        }
        let further = offset + BLOCK_SIZE_U64;
        let fits = further + to_u64(bytes.len()) <= to_u64(SIZE);
        let at = if fits && self.strikes(Bug::Misplaced) { further } else { offset };
        self.cached.push((at, bytes));
    }

    fn flush(&mut self) {
        if self.strikes(Bug::IgnoredFlush) {
            return;
        }
        for (offset, bytes) in std::mem::take(&mut self.cached) {
            put(&self.flushed, offset, &bytes);
        }
    }

    fn view(&self) -> Vec<u8> {
        let mut bytes = contents(&self.flushed);
        for (offset, data) in &self.cached {
            bytes[to_usize(*offset)..][..data.len()].copy_from_slice(data);
        }
        bytes
    }

    fn read(&mut self) -> Vec<u8> {
        if !self.cached.is_empty() && self.strikes(Bug::StaleRead) {
            return contents(&self.flushed);
        }
        self.view()
    }

    fn kill(&mut self) {
        if self.strikes(Bug::KilledWrite) {
            self.cached.pop();
        }
    }

    /// Writes are whole blocks here, so that each is kept or lost by itself, except where one
    /// builds upon another of the same block.
    fn cut_power(&mut self) {
        let mut lost: BTreeSet<u64> = BTreeSet::new();
        for (offset, mut data) in std::mem::take(&mut self.cached) {
            let blocks = offset / BLOCK_SIZE_U64..(offset + to_u64(data.len())).div_ceil(4096);
            let depends = blocks.clone().any(|block| lost.contains(&block));
            let reordered = depends && self.strikes(Bug::Reordered);
            if (self.random.chance(500) || depends) && !reordered {
                lost.extend(blocks);
                if data.len() > SECTOR_SIZE && self.strikes(Bug::Torn) {
                    data.truncate(SECTOR_SIZE);
                    put(&self.flushed, offset, &data);
                }
                continue;
            }
            put(&self.flushed, offset, &data);
        }
    }
}

/// Runs a disk with a bug under the model. What the model says, and whether the bug struck.
fn run(bug: Bug, seed: u64) -> (Result<(), Divergence>, bool) {
    let mut random = Random::split(seed, "client");
    let mut disk = FakeDisk::new(bug, seed);
    let mut model = Model::new(Layout::new(&[(0, 16)]));
    let blocks = model.empty();
    let vdi = model.add("disk", 1, 16, blocks);
    let mut snapshots: Vec<Vec<u8>> = Vec::new();
    let outcome = (|| {
        for _ in 0..60 {
            step(&mut random, &mut disk, &mut model, vdi, &mut snapshots)?;
        }
        Ok(())
    })();
    (outcome, disk.struck)
}

fn step(
    random: &mut Random,
    disk: &mut FakeDisk,
    model: &mut Model,
    vdi: VdiRef,
    snapshots: &mut Vec<Vec<u8>>,
) -> Result<(), Divergence> {
    match random.below(10) {
        0..5 => {
            let start = random.below(40) * 512;
            let length = (1 + random.below(24)) * 512;
            let change = if random.chance(200) { Change::Discard } else { Change::Write };
            let serial = model.begin(vdi, change, start, length);
            let mut bytes = vec![0; to_usize(length)];
            model.fill(serial, change, start, &mut bytes);
            disk.write(start, bytes);
            model.end(serial, Outcome::Acked, false);
        }
        5 => {
            let asked = model.begin_flush();
            disk.flush();
            model.end_flush(vdi, asked);
        }
        6 => {
            let asked = model.begin_read();
            let seen = disk.read();
            model.end_read(Place::Head(vdi), asked, 0, &seen)?;
        }
        7 => {
            let asked = model.ask();
            let early = !disk.cached.is_empty() && disk.strikes(Bug::EarlySnapshot);
            let newest = if early { disk.cached.pop() } else { None };
            snapshots.push(disk.view());
            disk.cached.extend(newest);
            let blocks = model.contents_since(vdi, asked);
            model.answered(asked);
            model.add_snapshot(vdi, to_u64(snapshots.len()), None, 16, blocks);
        }
        8 => {
            for number in 1..=snapshots.len() {
                let live = disk.strikes(Bug::LiveSnapshot);
                let seen = if live { disk.view() } else { snapshots[number - 1].clone() };
                let place = Place::Snapshot(vdi, to_u64(number));
                let asked = model.begin_read();
                model.end_read(place, asked, 0, &seen)?;
            }
        }
        _ => crash(random, disk, model, vdi)?,
    }
    Ok(())
}

fn crash(
    random: &mut Random,
    disk: &mut FakeDisk,
    model: &mut Model,
    vdi: VdiRef,
) -> Result<(), Divergence> {
    let cut = random.chance(600);
    model.crash();
    if cut {
        disk.cut_power()
    } else {
        disk.kill()
    }
    let second = disk.strikes(Bug::SecondThoughts);
    let before = contents(&disk.flushed);
    model.settle(if cut { Floor::Flushed } else { Floor::Acked });
    let pin = |model: &mut Model, seen: &[u8]| {
        let blocks = seen.chunks_exact(BLOCK_SIZE).enumerate();
        blocks.into_iter().try_for_each(|(slot, seen)| model.pin(vdi, slot, seen, false))
    };
    pin(model, &disk.view())?;
    // What was recovered is durable.
    let bug = std::mem::replace(&mut disk.bug, Bug::None);
    disk.flush();
    disk.bug = bug;
    if second {
        put(&disk.flushed, 0, &before[..512]);
        put(&disk.flushed, 512, &[0; 512]);
    }
    model.crash();
    model.settle(Floor::Flushed);
    pin(model, &disk.view())
}

#[test]
fn a_right_disk_is_never_blamed() {
    for seed in 0..200 {
        let (outcome, _) = run(Bug::None, seed);
        assert_eq!(outcome, Ok(()), "seed {seed}");
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let bugs = [
        Bug::LostWrite,
        Bug::Misplaced,
        Bug::Torn,
        Bug::IgnoredFlush,
        Bug::Reordered,
        Bug::KilledWrite,
        Bug::LiveSnapshot,
        Bug::EarlySnapshot,
        Bug::StaleRead,
        Bug::SecondThoughts,
    ];
    for bug in bugs {
        let runs = (0..120).map(|seed| run(bug, seed));
        let (mut struck, mut caught) = (0, 0);
        for (outcome, did_strike) in runs {
            struck += u32::from(did_strike);
            caught += u32::from(outcome.is_err());
            assert!(did_strike || outcome.is_ok(), "{bug:?} was blamed before it struck");
        }
        assert!(caught * 4 > struck && caught > 10, "{bug:?}: struck {struck}, caught {caught}");
    }
}

#[test]
fn a_snapshot_must_be_an_instant() {
    let mut model = Model::new(Layout::new(&[(0, 4)]));
    let blocks = model.empty();
    let vdi = model.add("disk", 1, 4, blocks);
    let asked = model.ask();
    // Both are under way together with the snapshot; the second was asked for after the first was
    // acknowledged.
    let first = model.begin(vdi, Change::Write, 0, BLOCK_SIZE_U64);
    model.end(first, Outcome::Acked, false);
    let second = model.begin(vdi, Change::Write, BLOCK_SIZE_U64, BLOCK_SIZE_U64);
    model.end(second, Outcome::Acked, false);
    let blocks = model.contents_since(vdi, asked);
    model.answered(asked);
    for number in 1..=4 {
        model.add_snapshot(vdi, number, None, 4, blocks.clone());
    }
    let mut bytes = vec![0; 2 * BLOCK_SIZE];
    let mut look = |model: &mut Model, number: u64, one: bool, two: bool| {
        bytes.fill(0);
        let (low, high) = bytes.split_at_mut(BLOCK_SIZE);
        if one {
            model.fill(first, Change::Write, 0, low);
        }
        if two {
            model.fill(second, Change::Write, BLOCK_SIZE_U64, high);
        }
        let asked = model.begin_read();
        model.end_read(Place::Snapshot(vdi, number), asked, 0, &bytes)
    };
    assert_eq!(look(&mut model, 1, false, false), Ok(()));
    assert_eq!(look(&mut model, 2, true, false), Ok(()));
    assert_eq!(look(&mut model, 3, true, true), Ok(()));
    assert!(look(&mut model, 4, false, true).is_err());
    assert!(look(&mut model, 1, true, false).is_err(), "once seen, a snapshot never changes");
}

#[test]
fn a_rollback_happens_whole_or_not() {
    let mut model = Model::new(Layout::new(&[(0, 2)]));
    let blocks = model.empty();
    let vdi = model.add("disk", 1, 2, blocks);
    let asked = model.ask();
    let blocks = model.contents_since(vdi, asked);
    model.answered(asked);
    model.add_snapshot(vdi, 1, None, 2, blocks);
    let write = model.begin(vdi, Change::Write, 0, 2 * BLOCK_SIZE_U64);
    model.end(write, Outcome::Acked, true);
    let contents = model.contents_of(vdi, 1).expect("it is there");
    let rollback = model.begin_replace(vdi, "rollback", &contents);
    model.crash();
    model.settle(Floor::Flushed);
    let mut written = vec![0; BLOCK_SIZE];
    model.fill(write, Change::Write, 0, &mut written);
    assert!(model.is_legal(vdi, 0, &written) && model.is_legal(vdi, 0, &[0; BLOCK_SIZE]));
    model.decide(vdi, rollback, true);
    assert!(!model.is_legal(vdi, 0, &written) && model.is_legal(vdi, 0, &[0; BLOCK_SIZE]));
}

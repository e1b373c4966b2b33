//! Writes that moments keep one by one. In the order of their LSNs they must be what the model saw: a block
//! changes where a write of it is listed and nowhere else, the last one leaves what the moment holds, and
//! none that was acknowledged before another was asked for comes behind it. What was just opened can be read.

use std::collections::BTreeMap;
use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64, ErrorKind, Lsn, SnapshotNumber};
use disk::Disk;
use vdi::{Target, VdiWrite};

use crate::content::{self, SECTOR_SIZE};
use crate::management::pick;
use crate::model::Place;
use crate::random::Random;
use crate::requests::read_blocks;
use crate::session::{Reach, Session};

/// Writes that are opened at a time.
const WRITES_MAX: u64 = 12;

/// What was seen of a block: at which write of it, and what it left.
struct Left {
    lsn: Lsn,
    bytes: Vec<u8>,
}

/// A VDI whose writes are opened.
struct Opener<'a> {
    session: &'a Session,
    name: &'a str,
}

/// Opens some writes that follow each other, of one moment.
pub async fn read(session: &Session, random: &mut Random) {
    let world = &session.world;
    let Some(vdi) = pick(session, random) else { return };
    if !world.hold(vdi, false) {
        return;
    }
    let name = world.name_of(Place::Head(vdi));
    let _ = read_some(&Opener { session, name: &name }, random).await;
    world.release(vdi);
}

/// `None`: it went meanwhile, or cannot be judged.
async fn read_some(opener: &Opener<'_>, random: &mut Random) -> Option<()> {
    let (session, world) = (opener.session, &opener.session.world);
    let listed = session.store.snapshots(opener.name, SnapshotNumber::new(0), usize::MAX).await;
    let listed = listed.ok()?;
    let kept = listed.iter().filter(|entry| entry.changed_bytes.is_some());
    let numbers: Vec<u64> = kept.map(|entry| entry.number.get()).collect();
    // Most of the older ones have forgotten their writes.
    let recent = numbers.len().saturating_sub(8);
    let number = random.pick(numbers.get(recent..)?)?.to_string();
    // Whoever has it open keeps it.
    let moment = opener.open(&number).await?;
    let all = match session.store.writes(opener.name, &number).await {
        Ok(all) => all,
        Err(error) => {
            let is_over = matches!(error.kind(), ErrorKind::Invalid | ErrorKind::NotFound);
            if !is_over {
                session.excuse("writes", error.kind(), &error, Reach::Metadata);
            }
            return None;
        }
    };
    let first = random.index(all.len().max(1));
    let some = all.get(first..)?;
    let mut left: BTreeMap<u64, Left> = BTreeMap::new();
    let mut order = Vec::new();
    for write in some.iter().take(crate::random::to_usize(random.between(1, WRITES_MAX))) {
        let Some(lba) = opener.block_of(write, random) else { continue };
        let bytes = opener.at(write.lsn, lba).await?;
        if let Some(before) = left.get(&lba) {
            // Between two writes of a block it is what the first has left.
            let between = opener.at(Lsn::new(write.lsn.get() - 1), lba).await?;
            let is_listed_between =
                some.iter().any(|it| before.lsn < it.lsn && it.lsn < write.lsn && touches(it, lba));
            if !is_listed_between && between != before.bytes {
                world.fail(format!(
                    "{}: block {lba} changes between lsn:{} and lsn:{}, where no write of it is",
                    opener.name, before.lsn, write.lsn
                ));
            }
            world.probe("writes: read between");
        }
        if let Some(serial) = newest_serial(left.get(&lba), &bytes) {
            order.push((write.lsn, serial));
        }
        left.insert(lba, Left { lsn: write.lsn, bytes });
    }
    for (lba, before) in &left {
        if some.iter().any(|it| before.lsn < it.lsn && touches(it, *lba)) {
            continue;
        }
        let bytes = opener.block(&moment, *lba).await?;
        if bytes != before.bytes {
            world.fail(format!(
                "{}@{number}: block {lba} is not what its last write left, lsn:{}",
                opener.name, before.lsn
            ));
        }
        world.probe("writes: read the last");
    }
    let model = world.model.borrow();
    for pair in order.windows(2) {
        if let [(lsn, one), (later, other)] = pair
            && model.was_acknowledged_before(*other, *one)
        {
            world.fail(format!(
                "{}: write {other} was acknowledged before {one} was asked for, but stands at \
                 lsn:{later}, behind lsn:{lsn}",
                opener.name
            ));
        }
    }
    world.probe("writes: opened");
    Some(())
}

fn touches(write: &VdiWrite, lba: u64) -> bool {
    let offset = lba * BLOCK_SIZE_U64;
    (write.offset..write.offset + write.length).contains(&offset)
}

/// The change by which a block is not what it was before, if one sector of it tells.
fn newest_serial(before: Option<&Left>, bytes: &[u8]) -> Option<u64> {
    let before = before?.bytes.chunks_exact(SECTOR_SIZE);
    let pairs = before.zip(bytes.chunks_exact(SECTOR_SIZE));
    let mut changed = pairs.filter(|(before, now)| before != now).map(|(_, now)| now);
    changed.find_map(content::identify).map(|origin| origin.tag.serial())
}

impl Opener<'_> {
    async fn open(&self, moment: &str) -> Option<Rc<dyn Disk>> {
        let target = Target { vdi: self.name.to_owned(), snapshot: Some(moment.to_owned()) };
        match self.session.store.open_disk(&target).await {
            Ok(disk) => Some(disk),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                let what = format!("open {target}");
                self.session.excuse(&what, error.kind(), &error, Reach::Metadata);
                None
            }
        }
    }

    /// A block of those that a write changed, in the layout.
    fn block_of(&self, write: &VdiWrite, random: &mut Random) -> Option<u64> {
        let first = write.offset / BLOCK_SIZE_U64;
        let count = write.length / BLOCK_SIZE_U64;
        let lba = first + random.below(count.max(1));
        self.session.world.plan.layout.slot(lba).map(|_| lba)
    }

    /// A block as it was when a write had been made.
    async fn at(&self, lsn: Lsn, lba: u64) -> Option<Vec<u8>> {
        let disk = self.open(&format!("lsn:{lsn}")).await?;
        if disk.severed() {
            self.session
                .world
                .fail(format!("{}@lsn:{lsn} is severed when it is opened", self.name));
        }
        self.block(&disk, lba).await
    }

    async fn block(&self, disk: &Rc<dyn Disk>, lba: u64) -> Option<Vec<u8>> {
        let world = &self.session.world;
        if lba >= disk.size_bytes() / BLOCK_SIZE_U64 {
            return None;
        }
        match read_blocks(self.session, disk, lba, 1).await {
            Ok(bytes) => {
                let damaged = world.device.with_atlas(|atlas| atlas.may_have_undone(lba));
                world.check(content::check_belongs(lba, &bytes))?;
                (!damaged && bytes.len() == BLOCK_SIZE).then_some(bytes)
            }
            Err(_) if disk.severed() => None,
            Err(error) => {
                let what = format!("read of block {lba} of a write of {}", self.name);
                self.session.excuse(&what, error.kind, &error, Reach::Blocks(lba, lba + 1));
                None
            }
        }
    }
}

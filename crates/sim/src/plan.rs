//! What a seed decides before anything runs: sizes, clients, what they do, faults and crashes.

use vdi::Reuse;

use crate::faults::{FaultKind, Faults};
use crate::focus::Focus;
use crate::model::layout::Layout;
use crate::random::Random;

/// Narrows a run, to shrink a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most requests that clients make over the whole run.
    pub requests: Option<u64>,
    /// Most clients.
    pub clients: Option<u64>,
    /// Most lives of the store.
    pub lives: Option<u64>,
    /// Kinds of faults that are not injected.
    pub without: Vec<FaultKind>,
    /// Cut the power when the device has been given so many writes, instead of the drawn crashes.
    pub cut_at_write: Option<u64>,
    /// Fail the device's operation with this number.
    pub fail_operation: Option<u64>,
    /// What the run is about, instead of what the seed says.
    pub focus: Option<Focus>,
}

impl Limits {
    /// As arguments of the command line.
    #[must_use]
    pub fn arguments(&self) -> String {
        let mut text = String::new();
        let numbers = [
            ("--requests", self.requests),
            ("--clients", self.clients),
            ("--lives", self.lives),
            ("--cut-at-write", self.cut_at_write),
            ("--fail-operation", self.fail_operation),
        ];
        for (name, number) in numbers {
            if let Some(number) = number {
                text.push_str(&format!(" {name} {number}"));
            }
        }
        if let Some(focus) = self.focus {
            text.push_str(&format!(" --focus {}", focus.name()));
        }
        for kind in &self.without {
            text.push_str(&format!(" --without {}", kind.name()));
        }
        text
    }
}

/// Which operations of the device are sometimes slow, by milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erratic {
    /// None.
    Nothing,
    /// Reads.
    Reads(u64),
    /// Writes.
    Writes(u64),
    /// Flushes.
    Flushes(u64),
    /// Flushes, and each of them.
    EachFlush(u64),
    /// Writes of host slots, so that the log fills up meanwhile.
    Slots(u64),
}

impl Erratic {
    fn draw(random: &mut Random) -> Self {
        match random.below(10) {
            0 => Self::Reads(random.between(1, 200)),
            1 => Self::Writes(random.between(1, 50)),
            2 => Self::Flushes(random.between(1, 500)),
            3 => Self::Slots(random.between(10, 2_000)),
            _ => Self::Nothing,
        }
    }
}

/// How a life of the store ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// It is closed as it should be.
    Close,
    /// The process dies; the device keeps its cache.
    Kill,
    /// The power goes.
    PowerCut,
}

/// When a crash strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// After so many steps of the executor since the process began.
    Steps(u64),
    /// After so many steps of the executor since clients began to work.
    WorkSteps(u64),
    /// When the device has been given so many writes over the whole run.
    DeviceWrites(u64),
    /// So many steps after the given number of changes was promised to be durable.
    AfterPromise(u64, u64),
    /// So many steps after the given number of receives was about to be completed.
    InReceive(u64, u64),
    /// So many steps after the device was given the given number of slots to write.
    AfterSlotWrite(u64, u64),
    /// When so many blocks of the log were written since a slot was.
    LogGrown(u64),
    /// When the clients are done.
    Never,
}

/// One life of the store, from opening to its end.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// Requests that clients make.
    pub requests: u64,
    /// How it ends.
    pub ending: Ending,
    /// When.
    pub strike: Strike,
    /// Whether faults are injected while the store is opened, too.
    pub faults_at_open: bool,
    /// Whether the power goes, or the process dies once more, while the store is being opened.
    pub crash_at_open: Option<(Ending, u64)>,
}

/// What clients do, by weight.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Requests of the data path.
    pub requests: Vec<(u32, RequestKind)>,
    /// Changes of VDIs and snapshots.
    pub management: Vec<(u32, ManagementKind)>,
    /// Changes per thousand things that clients do.
    pub management_per_mille: u64,
    /// Requests per thousand whose offset and length are not multiples of a block.
    pub unaligned_per_mille: u64,
    /// Requests per thousand whose offset and length are not even multiples of a sector.
    pub ragged_per_mille: u64,
    /// Changes per thousand that ask for FUA.
    pub fua_per_mille: u64,
    /// Largest request in blocks.
    pub blocks_max: u64,
}

/// Requests of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are the requests of the waist")]
pub enum RequestKind {
    Read,
    Write,
    WriteOfZeroes,
    Discard,
    WriteZeroes,
    Flush,
    BlockStatus,
    Cache,
    ReadSnapshot,
}

/// Changes of VDIs and snapshots, and what describes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are the methods of the store")]
pub enum ManagementKind {
    Create,
    Snapshot,
    Series,
    CloneSnapshot,
    CloneHead,
    Rollback,
    Rename,
    Resize,
    Remove,
    RemoveSnapshot,
    Checkpoint,
    CollectGarbage,
    Scrub,
    CheckOnline,
    List,
    Describe,
    Diff,
    Retain,
    RetainByDefault,
    ReadMoment,
    Receive,
    LookUp,
    CloneAtTime,
    RollbackToTime,
    CloneAtWrite,
    RollbackToWrite,
    DiffMoments,
    LeapClock,
    Hold,
    Release,
}

/// Everything that a seed decides.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Length of the device in blocks.
    pub device_blocks: u64,
    /// Bytes of the log ring.
    pub log_bytes: u64,
    /// Bytes of the node cache.
    pub cache_bytes: usize,
    /// Where clients write.
    pub layout: Layout,
    /// Number of clients.
    pub clients: u64,
    /// Requests that each has under way.
    pub depth: u64,
    /// What they do.
    pub weights: Weights,
    /// Nanoseconds that a step of the executor takes at most.
    pub step_ns: u64,
    /// What the device is sometimes slow at.
    pub erratic: Erratic,
    /// Faults of the device.
    pub faults: Faults,
    /// Blocks that the device has space for beyond those of a new store, if that is limited.
    pub space_below: Option<u64>,
    /// The lives of the store, one after the other.
    pub lives: Vec<Life>,
    /// Whether the device was used before.
    pub used_device: bool,
    /// Whether the store is filled to the brim once, and how many blocks are free afterwards: all
    /// (nothing of it stays), or so many, so that blocks are reused soon.
    pub fill: Option<Fill>,
    /// Which free blocks the store writes first.
    pub reuse: Reuse,
    /// Kills per thousand after which one copy of a slot or of the superblock is damaged.
    pub copy_rot_per_mille: u64,
}

/// What is left free once a store was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Everything.
    AllFree,
    /// So many blocks.
    Blocks(u64),
}

/// Blocks of an extent of a simulated store: the fewest that there can be.
pub const EXTENT_BLOCKS: u64 = 4096;

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn draw(seed: u64, limits: &Limits) -> Self {
        let mut random = Random::split(seed, "plan");
        let mut faults = Faults::swarm(&mut Random::split(seed, "faults"));
        for &kind in &limits.without {
            faults.remove(kind);
        }
        let space_below = match faults.rate(FaultKind::NoSpace) {
            0 => None,
            // A part for metadata, which is allocated whole, and some for data.
            rate => Some(EXTENT_BLOCKS + u64::from(rate) / 1_000),
        };
        let fill = match random.below(100) {
            0 => Some(Fill::AllFree),
            1..7 => Some(Fill::Blocks(random.between(64, 1_500))),
            _ => None,
        };
        let mut plan = Self {
            device_blocks: EXTENT_BLOCKS * if fill.is_some() { 6 } else { random.between(8, 24) },
            log_bytes: (256 << 10) << random.below(3),
            cache_bytes: 4096 << random.between(2, 8),
            layout: Layout::draw(&mut random),
            clients: random.between(1, 4),
            depth: random.magnitude(8),
            weights: Weights::draw(&mut random),
            step_ns: random.magnitude(5_000),
            erratic: Erratic::draw(&mut random),
            faults,
            space_below,
            lives: Vec::new(),
            used_device: random.chance(200),
            fill,
            reuse: if random.chance(600) { Reuse::Soon } else { Reuse::Late },
            copy_rot_per_mille: if random.chance(250) { random.between(200, 1_000) } else { 0 },
        };
        let crashes = random.magnitude(5);
        plan.lives = (0..=crashes).map(|_| Life::draw(&mut random)).collect();
        let own = random.pick(&Focus::ALL).filter(|_| random.chance(500));
        if let Some(focus) = limits.focus.or(own.map(|(focus, _)| focus)) {
            plan.focus(focus, &mut random);
            for &kind in &limits.without {
                plan.faults.remove(kind);
            }
        }
        plan.narrow(limits);
        if let Some(last) = plan.lives.last_mut() {
            last.ending = Ending::Close;
            last.strike = Strike::Never;
        }
        plan
    }

    fn narrow(&mut self, limits: &Limits) {
        if let Some(clients) = limits.clients {
            self.clients = self.clients.min(clients.max(1));
        }
        if let Some(lives) = limits.lives {
            self.lives.truncate(usize::try_from(lives.max(1)).unwrap_or(usize::MAX));
        }
        if let Some(writes) = limits.cut_at_write {
            // One crash, at exactly that write, and one life after it.
            self.lives.truncate(1);
            for life in &mut self.lives {
                life.ending = Ending::PowerCut;
                life.strike = Strike::DeviceWrites(writes);
                life.crash_at_open = None;
            }
            let last = self.lives.last().copied();
            self.lives.extend(last);
        }
        if let Some(mut left) = limits.requests {
            for life in &mut self.lives {
                life.requests = life.requests.min(left);
                left -= life.requests;
            }
        }
    }
}

impl Life {
    fn draw(random: &mut Random) -> Self {
        let requests = random.magnitude(200);
        let ending = match random.below(10) {
            0 => Ending::Close,
            1..5 => Ending::Kill,
            _ => Ending::PowerCut,
        };
        let strike = match random.below(10) {
            0 => Strike::Never,
            1 => Strike::Steps(random.magnitude(3_000)),
            2..5 => Strike::AfterPromise(random.magnitude(requests / 4), random.below(30)),
            5 | 6 => Strike::AfterSlotWrite(random.magnitude(16), random.below(30)),
            _ => Strike::WorkSteps(random.magnitude(requests * 60)),
        };
        let again = if random.chance(500) { Ending::Kill } else { Ending::PowerCut };
        let crash_at_open = random.chance(200).then(|| (again, random.magnitude(400)));
        Self { requests, ending, strike, faults_at_open: random.chance(200), crash_at_open }
    }
}

impl Weights {
    fn draw(random: &mut Random) -> Self {
        // Swarm: each seed leaves some kinds out.
        let mut weight = |usual: u64| {
            let drawn = if random.chance(200) { 0 } else { random.between(1, usual * 2) };
            u32::try_from(drawn).unwrap_or(0)
        };
        let requests = vec![
            (weight(15), RequestKind::Read),
            (weight(40), RequestKind::Write),
            (weight(3), RequestKind::WriteOfZeroes),
            (weight(5), RequestKind::Discard),
            (weight(4), RequestKind::WriteZeroes),
            (weight(8), RequestKind::Flush),
            (weight(2), RequestKind::BlockStatus),
            (weight(1), RequestKind::Cache),
            (weight(3), RequestKind::ReadSnapshot),
        ];
        let management = vec![
            (weight(6), ManagementKind::Create),
            (weight(20), ManagementKind::Snapshot),
            (weight(6), ManagementKind::Series),
            (weight(6), ManagementKind::CloneSnapshot),
            (weight(6), ManagementKind::CloneHead),
            (weight(5), ManagementKind::Rollback),
            (weight(3), ManagementKind::Rename),
            (weight(4), ManagementKind::Resize),
            (weight(4), ManagementKind::Remove),
            (weight(7), ManagementKind::RemoveSnapshot),
            (weight(10), ManagementKind::Checkpoint),
            (weight(6), ManagementKind::CollectGarbage),
            (weight(4), ManagementKind::Scrub),
            (weight(2), ManagementKind::CheckOnline),
            (weight(3), ManagementKind::List),
            (weight(4), ManagementKind::Describe),
            (weight(4), ManagementKind::Diff),
            (weight(3), ManagementKind::Retain),
            (weight(6), ManagementKind::ReadMoment),
            (weight(5), ManagementKind::Receive),
            (weight(4), ManagementKind::LookUp),
            (weight(3), ManagementKind::CloneAtTime),
            (weight(3), ManagementKind::RollbackToTime),
            (weight(3), ManagementKind::CloneAtWrite),
            (weight(3), ManagementKind::RollbackToWrite),
            (weight(3), ManagementKind::DiffMoments),
            (weight(2), ManagementKind::LeapClock),
            (weight(1), ManagementKind::RetainByDefault),
            (weight(4), ManagementKind::Hold),
            (weight(4), ManagementKind::Release),
        ];
        Self {
            requests,
            management,
            management_per_mille: random.magnitude(400),
            unaligned_per_mille: random.below(600),
            ragged_per_mille: random.below(100),
            fua_per_mille: random.below(300),
            blocks_max: random.magnitude(64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_narrow_a_plan() {
        for seed in 0..50 {
            let limits = Limits {
                requests: Some(7),
                clients: Some(1),
                lives: Some(2),
                without: FaultKind::ALL.map(|(kind, _)| kind).to_vec(),
                cut_at_write: None,
                fail_operation: None,
                focus: None,
            };
            let plan = Plan::draw(seed, &limits);
            assert!(plan.lives.iter().map(|life| life.requests).sum::<u64>() <= 7);
            assert!(plan.lives.len() <= 2 && plan.clients == 1);
            assert_eq!(plan.faults, Faults::none());
            let last = plan.lives.last().expect("there is a life");
            assert_eq!((last.ending, last.strike), (Ending::Close, Strike::Never));
        }
    }
}

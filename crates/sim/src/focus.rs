//! Corners that a run may be about: each seed draws one, or none.

use vdi::Reuse;

use crate::faults::{FaultKind, Faults};
use crate::model::layout::Layout;
use crate::plan::{Ending, Erratic, Life, ManagementKind, Plan, RequestKind, Strike};
use crate::random::Random;

/// A corner that plans drawn at random rarely get into: it takes several things that fit together.
/// Half of all seeds are about one (swarm testing, see [`crate::faults`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// Reads take long, while what they read is replaced and checkpoints free it.
    SlowReads,
    /// Writes overtake each other, and the power goes just after something was promised.
    SlowWrites,
    /// Many small writes send a small log round its ring.
    Laps,
    /// Large writes, many of which fail, fill a small log, and recovery has to fit behind them.
    CrowdedLog,
    /// The power goes while slots are being written.
    Slots,
    /// One copy of what there are two copies of rots.
    Copies,
    /// Writes of tree nodes get lost, and little is cached.
    LostNodes,
    /// Blocks rot and are read again.
    Rot,
    /// Writes fail.
    WriteErrors,
    /// Flushes fail, and the power goes later.
    FlushErrors,
    /// Snapshots, clones and what drops them.
    Branches,
    /// Many snapshots between two checkpoints, which are read, cloned and deleted.
    History,
    /// Garbage is collected all the time, and the daemon is killed meanwhile.
    Collections,
    /// The power goes while snapshots and clones wait for the flush that makes them durable.
    Unsettled,
    /// Snapshots are received, and the process dies or the power goes while one becomes part of a disk.
    Receive,
}

impl Focus {
    /// All of them, with the names that the command line knows.
    pub const ALL: [(Self, &str); 15] = [
        (Self::SlowReads, "slow-reads"),
        (Self::SlowWrites, "slow-writes"),
        (Self::Laps, "laps"),
        (Self::CrowdedLog, "crowded-log"),
        (Self::Slots, "slots"),
        (Self::Copies, "copies"),
        (Self::LostNodes, "lost-nodes"),
        (Self::Rot, "rot"),
        (Self::WriteErrors, "write-errors"),
        (Self::FlushErrors, "flush-errors"),
        (Self::Branches, "branches"),
        (Self::History, "history"),
        (Self::Collections, "collections"),
        (Self::Unsettled, "unsettled"),
        (Self::Receive, "receive"),
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(focus, _)| *focus == self).map_or("", |&(_, name)| name)
    }

    /// The focus with this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|&(focus, _)| focus)
    }
}

impl Plan {
    /// Bends what was drawn towards a corner.
    pub(crate) fn focus(&mut self, focus: Focus, random: &mut Random) {
        self.fill = None;
        self.space_below = None;
        self.faults = Faults::none();
        self.erratic = Erratic::Nothing;
        match focus {
            Focus::SlowReads => self.read_slowly(random),
            Focus::SlowWrites => self.write_slowly(random),
            Focus::Laps => self.go_round_the_log(random),
            Focus::CrowdedLog => self.crowd_the_log(random),
            Focus::Slots => {
                self.checkpoint_often(random);
                self.live(6, 60, random, |random| {
                    let strike = Strike::AfterSlotWrite(random.between(1, 8), random.below(12));
                    (Ending::PowerCut, strike)
                });
            }
            Focus::Copies => {
                self.reuse = Reuse::Soon;
                self.copy_rot_per_mille = 1_000;
                self.checkpoint_often(random);
                self.live(4, 100, random, |random| {
                    (Ending::Kill, Strike::WorkSteps(random.magnitude(3_000)))
                });
            }
            Focus::LostNodes => {
                self.suffer(FaultKind::LostNode, 5_000, 100_000, random);
                self.cache_bytes = 16 << 10;
                self.weights.management.push((10, ManagementKind::Scrub));
            }
            Focus::Rot => {
                self.suffer(FaultKind::Rot, 1_000, 10_000, random);
                self.weights.requests.push((60, RequestKind::Read));
                self.weights.management.push((20, ManagementKind::Scrub));
            }
            Focus::WriteErrors => self.suffer(FaultKind::WriteError, 2_000, 40_000, random),
            Focus::FlushErrors => {
                self.suffer(FaultKind::FlushError, 10_000, 100_000, random);
                self.live(5, 80, random, |random| {
                    let ending = if random.chance(400) { Ending::Kill } else { Ending::PowerCut };
                    (ending, after_promise(random))
                });
            }
            Focus::Branches => self.branch_out(random),
            Focus::History => self.remember(random),
            Focus::Collections => self.collect(random),
            Focus::Unsettled => self.leave_unsettled(random),
            Focus::Receive => self.receive(random),
        }
    }

    fn read_slowly(&mut self, random: &mut Random) {
        self.erratic = Erratic::Reads(random.between(20, 200));
        self.reuse = Reuse::Soon;
        self.layout = Layout::new(&[(0, random.between(4, 24))]);
        self.checkpoint_often(random);
        self.weights.requests.push((60, RequestKind::Read));
        self.weights.requests.push((60, RequestKind::Write));
        self.weights.management.push((20, ManagementKind::Scrub));
        self.weights.management.push((20, ManagementKind::CheckOnline));
        self.live(2, 300, random, |_| (Ending::Kill, Strike::Never));
    }

    fn write_slowly(&mut self, random: &mut Random) {
        self.erratic = Erratic::Writes(random.between(5, 50));
        self.weights.requests.push((60, RequestKind::Write));
        self.weights.requests.push((20, RequestKind::Flush));
        self.live(4, 100, random, |random| (Ending::PowerCut, after_promise(random)));
    }

    fn go_round_the_log(&mut self, random: &mut Random) {
        self.log_bytes = 256 << 10;
        let fills_up = random.chance(500);
        self.erratic = if fills_up {
            Erratic::Slots(random.between(100, 2_000))
        } else {
            Erratic::Flushes(random.between(1, 100))
        };
        self.copy_rot_per_mille = 500;
        self.weights.management_per_mille = random.magnitude(20);
        self.weights.blocks_max = random.magnitude(4);
        self.weights.requests.push((200, RequestKind::Write));
        self.live(2, 1_200, random, |random| {
            let strike = if fills_up {
                Strike::LogGrown(random.between(10, 60))
            } else {
                Strike::WorkSteps(random.between(2_000, 20_000))
            };
            (Ending::Kill, strike)
        });
    }

    fn crowd_the_log(&mut self, random: &mut Random) {
        self.log_bytes = 256 << 10;
        // Neither F nor a checkpoint keeps up.
        self.erratic = Erratic::EachFlush(random.between(20, 2_000));
        let rate = u32::try_from(random.between(50_000, 400_000)).unwrap_or(u32::MAX);
        self.faults = Faults::only(FaultKind::DataWriteError, rate);
        self.layout = Layout::new(&[(0, random.between(256, 1_024))]);
        self.weights.management_per_mille = random.magnitude(10);
        self.weights.fua_per_mille = 0;
        self.weights.blocks_max = random.between(16, 256);
        self.weights.requests.push((1_000, RequestKind::Write));
        self.live(5, 160, random, |random| {
            (Ending::Kill, Strike::LogGrown(random.between(44, 60)))
        });
        self.depth = random.between(4, 16);
    }

    fn branch_out(&mut self, random: &mut Random) {
        self.reuse = Reuse::Soon;
        self.checkpoint_often(random);
        for kind in [
            ManagementKind::Snapshot,
            ManagementKind::CloneSnapshot,
            ManagementKind::CloneHead,
            ManagementKind::Rollback,
            ManagementKind::RemoveSnapshot,
            ManagementKind::CollectGarbage,
        ] {
            self.weights.management.push((20, kind));
        }
        self.live(3, 150, random, |random| (Ending::PowerCut, after_promise(random)));
    }

    fn remember(&mut self, random: &mut Random) {
        self.reuse = Reuse::Soon;
        self.layout = Layout::new(&[(0, random.between(4, 40))]);
        self.weights.management_per_mille = random.between(200, 500);
        self.weights.blocks_max = random.magnitude(4);
        for (weight, kind) in [
            (200, ManagementKind::Snapshot),
            (10, ManagementKind::CloneSnapshot),
            (10, ManagementKind::Rollback),
            (60, ManagementKind::RemoveSnapshot),
            (10, ManagementKind::Checkpoint),
            (20, ManagementKind::CollectGarbage),
            (40, ManagementKind::Retain),
            (60, ManagementKind::ReadMoment),
            (40, ManagementKind::LookUp),
            (10, ManagementKind::CloneAtTime),
            (10, ManagementKind::RollbackToTime),
            (20, ManagementKind::CloneAtWrite),
            (20, ManagementKind::RollbackToWrite),
            (20, ManagementKind::DiffMoments),
            (4, ManagementKind::LeapClock),
            (10, ManagementKind::RetainByDefault),
            (30, ManagementKind::Hold),
            (20, ManagementKind::Release),
        ] {
            self.weights.management.push((weight, kind));
        }
        self.weights.requests.push((100, RequestKind::Write));
        self.weights.requests.push((20, RequestKind::Flush));
        self.live(3, 200, random, |random| {
            let ending = if random.chance(500) { Ending::Kill } else { Ending::PowerCut };
            (ending, after_promise(random))
        });
    }

    fn collect(&mut self, random: &mut Random) {
        self.reuse = Reuse::Soon;
        // Each in a leaf of its own: checkpoints take many nodes, and so those that were freed.
        let leaves: Vec<_> = (0..random.between(4, 60)).map(|leaf| (leaf * 256, 2)).collect();
        self.layout = Layout::new(&leaves);
        self.weights.management_per_mille = random.between(100, 500);
        self.weights.blocks_max = random.magnitude(4);
        for (weight, kind) in [
            (60, ManagementKind::Snapshot),
            (30, ManagementKind::CloneSnapshot),
            (20, ManagementKind::Rollback),
            (60, ManagementKind::RemoveSnapshot),
            (20, ManagementKind::Remove),
            (random.magnitude(1_000), ManagementKind::Checkpoint),
            (random.magnitude(200), ManagementKind::CollectGarbage),
        ] {
            self.weights.management.push((u32::try_from(weight).unwrap_or(u32::MAX), kind));
        }
        self.weights.requests.push((100, RequestKind::Write));
        self.live(6, 300, random, |random| {
            (Ending::Kill, Strike::WorkSteps(random.magnitude(20_000)))
        });
    }

    fn leave_unsettled(&mut self, random: &mut Random) {
        self.erratic = Erratic::Flushes(random.between(5, 200));
        self.weights.management_per_mille = random.between(50, 300);
        self.weights.management.push((200, ManagementKind::Snapshot));
        self.weights.management.push((40, ManagementKind::CloneHead));
        self.weights.requests.push((200, RequestKind::Write));
        self.live(5, 60, random, |random| {
            (Ending::PowerCut, Strike::WorkSteps(random.between(50, 1_500)))
        });
    }

    fn receive(&mut self, random: &mut Random) {
        self.reuse = Reuse::Soon;
        self.layout = Layout::new(&[(0, random.between(4, 24)), (250, random.between(1, 12))]);
        self.erratic = Erratic::Flushes(random.between(1, 20));
        self.weights.management_per_mille = random.between(200, 500);
        self.weights.blocks_max = random.magnitude(4);
        for (weight, kind) in [
            (40, ManagementKind::Snapshot),
            (20, ManagementKind::RemoveSnapshot),
            (20, ManagementKind::Remove),
            (10, ManagementKind::Rollback),
            (10, ManagementKind::Checkpoint),
            (10, ManagementKind::CollectGarbage),
            (200, ManagementKind::Receive),
        ] {
            self.weights.management.push((weight, kind));
        }
        self.weights.requests.push((60, RequestKind::Write));
        self.live(5, 120, random, |random| {
            let ending = if random.chance(300) { Ending::Kill } else { Ending::PowerCut };
            let steps = if random.chance(500) { random.below(40) } else { random.magnitude(600) };
            (ending, Strike::InReceive(random.magnitude(8), steps))
        });
        if random.chance(500) {
            // Nobody else flushes.
            (self.clients, self.depth) = (1, 2);
        }
    }

    /// One kind of fault, `low` to `high` times in a million operations; the store is opened again
    /// and compared now and then.
    fn suffer(&mut self, kind: FaultKind, low: u64, high: u64, random: &mut Random) {
        let rate = u32::try_from(random.between(low, high)).unwrap_or(u32::MAX);
        self.faults = Faults::only(kind, rate);
        self.checkpoint_often(random);
        self.live(4, 120, random, |_| (Ending::Kill, Strike::Never));
    }

    fn checkpoint_often(&mut self, random: &mut Random) {
        self.weights.management_per_mille = random.between(50, 300);
        self.weights.management.push((60, ManagementKind::Checkpoint));
    }

    /// Up to `lives_max` lives of busy clients that make up to `requests_max` requests, and one.
    fn live(
        &mut self,
        lives_max: u64,
        requests_max: u64,
        random: &mut Random,
        end: impl Fn(&mut Random) -> (Ending, Strike),
    ) {
        self.clients = random.between(2, 4);
        self.depth = random.between(2, 12);
        self.lives = (0..=random.between(1, lives_max))
            .map(|_| {
                let (ending, strike) = end(random);
                let requests = random.between(requests_max / 4, requests_max);
                Life { requests, ending, strike, faults_at_open: false, crash_at_open: None }
            })
            .collect();
    }
}

/// Just after something was promised to be durable.
fn after_promise(random: &mut Random) -> Strike {
    Strike::AfterPromise(random.magnitude(30), random.below(20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Limits;

    #[test]
    fn names_parse() {
        for (focus, name) in Focus::ALL {
            assert_eq!(Focus::parse(name), Some(focus));
            assert_eq!(focus.name(), name);
        }
        assert_eq!(Focus::parse("nonsense"), None);
    }

    #[test]
    fn every_corner_is_drawn() {
        let laps = |seed| {
            let plan = Plan::draw(seed, &Limits::default());
            plan.lives.iter().any(|life| life.requests > 300)
        };
        assert!((1..400).any(laps));
        let limits = Limits { focus: Some(Focus::Slots), ..Limits::default() };
        let plan = Plan::draw(1, &limits);
        assert!(matches!(plan.lives[0].strike, Strike::AfterSlotWrite(..)));
        assert_eq!(plan.faults, Faults::none());
    }
}

//! What is measured and what it must reach: the table of the goals, as data.

use anyhow::Result;

use super::access::Access;
use super::report::{Measured, Unit};
use super::{Bench, garbage, history, idle, latency, scale, send, snapshots, throughput};

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frontend {
    /// Over a unix socket.
    Nbd,
    /// Through shared memory.
    VhostUser,
    /// As a file.
    Fuse,
}

/// What disks and stores lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium {
    /// Files of the file system that is measured on, opened O_DIRECT.
    File,
    /// Files in memory (tmpfs), opened likewise.
    Ram,
}

/// What the loads of a row have in common: they share their disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) frontend: Frontend,
    pub(crate) medium: Medium,
}

impl Setting {
    /// Of the first rows.
    pub(crate) const NBD: Self = Self { frontend: Frontend::Nbd, medium: Medium::File };
    const VHOST_USER: Self = Self { frontend: Frontend::VhostUser, medium: Medium::File };
    const VHOST_USER_RAM: Self = Self { frontend: Frontend::VhostUser, medium: Medium::Ram };
    const FUSE: Self = Self { frontend: Frontend::Fuse, medium: Medium::File };
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Our daemon.
    Ours,
    /// qemu-storage-daemon on a raw file; as a file through nbdfuse.
    Raw,
    /// The same, with a flush each second, as ours flushes by itself.
    RawFlushed,
    /// qemu-storage-daemon on a qcow2 file.
    Qcow2,
    /// The same, with a flush each second.
    Qcow2Flushed,
    /// The bare file through io_uring: what the machine can do without any server.
    File,
}

impl Subject {
    /// What reports call it.
    pub(crate) fn label(self, frontend: Frontend) -> &'static str {
        match (self, frontend) {
            (Self::Ours, _) => "ours",
            (Self::Raw, Frontend::Nbd) => RAW,
            (Self::Raw, Frontend::VhostUser) => RAW_VHOST,
            (Self::Raw, Frontend::Fuse) => RAW_FUSE,
            (Self::RawFlushed, _) => RAW_FLUSHED,
            (Self::Qcow2, Frontend::Nbd) => QCOW2,
            (Self::Qcow2, Frontend::VhostUser) => QCOW2_VHOST,
            (Self::Qcow2, Frontend::Fuse) => QCOW2_FUSE,
            (Self::Qcow2Flushed, _) => QCOW2_FLUSHED,
            (Self::File, _) => FILE,
        }
    }

    /// Whether it is flushed each second.
    pub(crate) fn is_flushed(self) -> bool {
        matches!(self, Self::RawFlushed | Self::Qcow2Flushed)
    }
}

/// What a disk holds before a load runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing: made for this run, sparse.
    Fresh,
    /// Written once from the first byte to the last; kept for all rounds and loads of the row.
    Filled,
    /// Written once in random order, 4 KiB at a time; kept likewise.
    RandomFilled,
    /// As `Filled`, but made for this run.
    FilledAnew,
    /// As `FilledAnew`, with a snapshot taken after, so that every block is shared.
    Snapshotted,
}

/// One thing to reach, in multiples of what another column reaches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Goal {
    /// At least this many times…
    pub(crate) at_least: f64,
    /// …what stands in this column.
    pub(crate) times: &'static str,
}

/// A load that fio makes.
pub(crate) struct Load {
    /// What the table calls it.
    pub(crate) measure: &'static str,
    /// What the disk holds before.
    pub(crate) state: State,
    /// What the client does.
    pub(crate) access: Access,
    /// Operations or bytes per second.
    pub(crate) unit: Unit,
    /// What must be reached.
    pub(crate) goals: &'static [Goal],
}

impl Load {
    /// Whether `subject`, which is called `label`, belongs beside it: one that is flushed only where
    /// a goal names it.
    pub(crate) fn compares(&self, subject: Subject, label: &str) -> bool {
        !subject.is_flushed() || self.goals.iter().any(|goal| goal.times == label)
    }
}

/// A row of the table of goals; some have two lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    RandomWrite,
    RandomRead,
    DepthOne,
    Flush,
    Sequential,
    AfterSnapshot,
    SnapshotBusy,
    SnapshotRate,
    CreateClone,
    OpenAfterKill,
    Memory,
    VhostRandom,
    VhostDepthOne,
    VhostSequential,
    VhostRam,
    Fuse,
    Idle,
    ManyDisks,
    ManySnapshots,
    CloneDepth,
    Gc,
    Send,
}

const fn at_least(at_least: f64, times: &'static str) -> Goal {
    Goal { at_least, times }
}

const RAW: &str = "raw over NBD";
const RAW_FLUSHED: &str = "raw, a flush a second";
const QCOW2: &str = "qcow2 over NBD";
const QCOW2_FLUSHED: &str = "qcow2, a flush a second";
const RAW_VHOST: &str = "raw over vhost-user";
const QCOW2_VHOST: &str = "qcow2 over vhost-user";
const RAW_FUSE: &str = "raw over nbdfuse";
const QCOW2_FUSE: &str = "qcow2 over nbdfuse";
const FILE: &str = "bare file";

const RANDOM_WRITE: [Load; 2] = [
    Load {
        measure: "random write, depth 32, allocated space",
        state: State::Filled,
        access: Access::random_write(32),
        unit: Unit::Iops,
        goals: &[
            at_least(2.0, QCOW2),
            at_least(1.5, RAW),
            at_least(2.0, QCOW2_FLUSHED),
            at_least(1.5, RAW_FLUSHED),
        ],
    },
    Load {
        measure: "random write, depth 32, fresh disk",
        state: State::Fresh,
        access: Access::random_write(32),
        unit: Unit::Iops,
        goals: &[at_least(2.0, QCOW2), at_least(1.5, RAW)],
    },
];

const RANDOM_READ: [Load; 1] = [Load {
    measure: "random read, depth 32, after random fill",
    state: State::RandomFilled,
    access: Access::random_read(32),
    unit: Unit::Iops,
    goals: &[at_least(1.2, RAW)],
}];

const DEPTH_ONE: [Load; 2] = [
    Load {
        measure: "random read, depth 1",
        state: State::Filled,
        access: Access::random_read(1),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW)],
    },
    Load {
        measure: "random write, depth 1",
        state: State::Filled,
        access: Access::random_write(1),
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW)],
    },
];

const FLUSH: [Load; 2] = [
    Load {
        measure: "random write with a flush after each, allocated space",
        state: State::Filled,
        access: Access::random_write(1).flushed(),
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW), at_least(1.5, QCOW2)],
    },
    Load {
        measure: "random write with a flush after each, fresh disk",
        state: State::Fresh,
        access: Access::random_write(1).flushed(),
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW), at_least(1.5, QCOW2)],
    },
];

const SEQUENTIAL: [Load; 2] = [
    Load {
        measure: "sequential write, 1 MiB, depth 8",
        state: State::Filled,
        access: Access::sequential_write(8),
        unit: Unit::BytesPerSecond,
        goals: &[at_least(1.0, RAW), at_least(1.0, RAW_FLUSHED)],
    },
    Load {
        measure: "sequential read, 1 MiB, depth 8",
        state: State::Filled,
        access: Access::sequential_read(8),
        unit: Unit::BytesPerSecond,
        goals: &[at_least(1.0, RAW)],
    },
];

/// Column of our daemon without the snapshot, in the row that compares with it.
pub(crate) const OURS_WITHOUT: &str = "ours without";
/// Column of qcow2 after an internal snapshot.
pub(crate) const QCOW2_AFTER: &str = "qcow2 after a snapshot";

/// Just after a snapshot: its columns are not the usual ones.
pub(crate) const AFTER_SNAPSHOT: Load = Load {
    measure: "random write, depth 32, just after a snapshot",
    state: State::Snapshotted,
    access: Access::random_write(32),
    unit: Unit::Iops,
    goals: &[at_least(0.9, OURS_WITHOUT), at_least(3.0, QCOW2_AFTER)],
};

const VHOST_RANDOM: [Load; 2] = [
    Load {
        measure: "vhost-user: random read, depth 32",
        state: State::Filled,
        access: Access::random_read(32),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW_VHOST)],
    },
    Load {
        measure: "vhost-user: random write, depth 32",
        state: State::Filled,
        access: Access::random_write(32),
        unit: Unit::Iops,
        goals: &[at_least(1.5, RAW_VHOST), at_least(1.5, RAW_FLUSHED), at_least(1.0, FILE)],
    },
];

const VHOST_DEPTH_ONE: [Load; 2] = [
    Load {
        measure: "vhost-user: random read, depth 1",
        state: State::Filled,
        access: Access::random_read(1),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW_VHOST)],
    },
    Load {
        measure: "vhost-user: random write, depth 1",
        state: State::Filled,
        access: Access::random_write(1),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW_VHOST)],
    },
];

const VHOST_SEQUENTIAL: [Load; 2] = [
    Load {
        measure: "vhost-user: sequential write, 1 MiB, depth 8",
        state: State::Filled,
        access: Access::sequential_write(8),
        unit: Unit::BytesPerSecond,
        goals: &[at_least(1.0, RAW_VHOST), at_least(1.0, RAW_FLUSHED)],
    },
    Load {
        measure: "vhost-user: sequential read, 1 MiB, depth 8",
        state: State::Filled,
        access: Access::sequential_read(8),
        unit: Unit::BytesPerSecond,
        goals: &[at_least(1.0, RAW_VHOST)],
    },
];

const VHOST_RAM: [Load; 1] = [Load {
    measure: "vhost-user: random read, depth 32, in memory",
    state: State::Filled,
    access: Access::random_read(32),
    unit: Unit::Iops,
    goals: &[at_least(1.5, RAW_VHOST)],
}];

const FUSE: [Load; 2] = [
    Load {
        measure: "as a file: random read, depth 32",
        state: State::Filled,
        access: Access::random_read(32),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW_FUSE)],
    },
    Load {
        measure: "as a file: random write, depth 32",
        state: State::Filled,
        access: Access::random_write(32),
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW_FUSE)],
    },
];

impl Row {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 22] = [
        Self::RandomWrite,
        Self::RandomRead,
        Self::DepthOne,
        Self::Flush,
        Self::Sequential,
        Self::AfterSnapshot,
        Self::SnapshotBusy,
        Self::SnapshotRate,
        Self::CreateClone,
        Self::OpenAfterKill,
        Self::Memory,
        Self::VhostRandom,
        Self::VhostDepthOne,
        Self::VhostSequential,
        Self::VhostRam,
        Self::Fuse,
        Self::Idle,
        Self::ManyDisks,
        Self::ManySnapshots,
        Self::CloneDepth,
        Self::Gc,
        Self::Send,
    ];

    /// What `--rows` calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RandomWrite => "random-write",
            Self::RandomRead => "random-read",
            Self::DepthOne => "depth-1",
            Self::Flush => "flush",
            Self::Sequential => "sequential",
            Self::AfterSnapshot => "after-snapshot",
            Self::SnapshotBusy => "snapshot-busy",
            Self::SnapshotRate => "snapshot-rate",
            Self::CreateClone => "create-clone",
            Self::OpenAfterKill => "open-after-kill",
            Self::Memory => "memory",
            Self::VhostRandom => "vhost-random",
            Self::VhostDepthOne => "vhost-depth-1",
            Self::VhostSequential => "vhost-sequential",
            Self::VhostRam => "vhost-ram",
            Self::Fuse => "fuse",
            Self::Idle => "idle",
            Self::ManyDisks => "many-disks",
            Self::ManySnapshots => "many-snapshots",
            Self::CloneDepth => "clone-depth",
            Self::Gc => "gc",
            Self::Send => "send",
        }
    }

    /// Every name, for messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Whether it can be measured without us.
    pub(crate) fn has_peers(self) -> bool {
        !matches!(
            self,
            Self::SnapshotRate
                | Self::CreateClone
                | Self::OpenAfterKill
                | Self::Memory
                | Self::Idle
                | Self::ManyDisks
                | Self::ManySnapshots
                | Self::CloneDepth
                | Self::Gc
        )
    }

    /// Measures the row.
    ///
    /// # Errors
    /// If a program fails.
    pub(crate) fn measure(self, bench: &Bench) -> Result<Measured> {
        let lines = match self {
            Self::RandomWrite => throughput::loads(bench, Setting::NBD, &RANDOM_WRITE),
            Self::RandomRead => throughput::loads(bench, Setting::NBD, &RANDOM_READ),
            Self::DepthOne => throughput::loads(bench, Setting::NBD, &DEPTH_ONE),
            Self::Flush => throughput::loads(bench, Setting::NBD, &FLUSH),
            Self::Sequential => throughput::loads(bench, Setting::NBD, &SEQUENTIAL),
            Self::AfterSnapshot => throughput::after_snapshot(bench),
            Self::SnapshotBusy => snapshots::busy(bench),
            Self::SnapshotRate => return snapshots::rate(bench),
            Self::CreateClone => latency::create_and_clone(bench),
            Self::OpenAfterKill => latency::open_after_kill(bench),
            Self::Memory => latency::memory(bench),
            Self::VhostRandom => throughput::loads(bench, Setting::VHOST_USER, &VHOST_RANDOM),
            Self::VhostDepthOne => throughput::loads(bench, Setting::VHOST_USER, &VHOST_DEPTH_ONE),
            Self::VhostSequential => {
                throughput::loads(bench, Setting::VHOST_USER, &VHOST_SEQUENTIAL)
            }
            Self::VhostRam => throughput::loads(bench, Setting::VHOST_USER_RAM, &VHOST_RAM),
            Self::Fuse => throughput::loads(bench, Setting::FUSE, &FUSE),
            Self::Idle => idle::measure(bench),
            Self::ManyDisks => scale::many_disks(bench),
            Self::ManySnapshots => return history::many_snapshots(bench),
            Self::CloneDepth => history::clone_depth(bench),
            Self::Gc => garbage::collect(bench),
            Self::Send => send::measure(bench),
        }?;
        Ok(lines.into())
    }
}

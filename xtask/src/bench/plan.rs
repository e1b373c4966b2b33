//! What is measured and what it must reach: the table of the goals, as data.

use anyhow::Result;

use super::report::{Line, Unit};
use super::{Bench, latency, throughput};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Our daemon over NBD.
    Ours,
    /// qemu-storage-daemon on a raw file, over NBD.
    Raw,
    /// The same, with a flush each second, as ours flushes by itself.
    RawFlushed,
    /// qemu-storage-daemon on a qcow2 file, over NBD.
    Qcow2,
    /// The same, with a flush each second.
    Qcow2Flushed,
    /// The bare file through io_uring: what the machine can do without any server.
    File,
}

impl Subject {
    /// Column of the table.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Raw => RAW,
            Self::RawFlushed => RAW_FLUSHED,
            Self::Qcow2 => QCOW2,
            Self::Qcow2Flushed => QCOW2_FLUSHED,
            Self::File => "bare file",
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
    /// What fio does; the bench adds size and time.
    pub(crate) fio: &'static str,
    /// Operations or bytes per second.
    pub(crate) unit: Unit,
    /// What must be reached.
    pub(crate) goals: &'static [Goal],
}

impl Load {
    /// Whether `subject` belongs beside it: one that is flushed only where a goal names it.
    pub(crate) fn compares(&self, subject: Subject) -> bool {
        !subject.is_flushed() || self.goals.iter().any(|goal| goal.times == subject.label())
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
    CreateClone,
    OpenAfterKill,
    Memory,
}

const fn at_least(at_least: f64, times: &'static str) -> Goal {
    Goal { at_least, times }
}

const RAW: &str = "raw over NBD";
const RAW_FLUSHED: &str = "raw, a flush a second";
const QCOW2: &str = "qcow2 over NBD";
const QCOW2_FLUSHED: &str = "qcow2, a flush a second";

const RANDOM_WRITE: [Load; 2] = [
    Load {
        measure: "random write, depth 32, allocated space",
        state: State::Filled,
        fio: "--rw=randwrite --norandommap --bs=4k --iodepth=32",
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
        fio: "--rw=randwrite --norandommap --bs=4k --iodepth=32",
        unit: Unit::Iops,
        goals: &[at_least(2.0, QCOW2), at_least(1.5, RAW)],
    },
];

const RANDOM_READ: [Load; 1] = [Load {
    measure: "random read, depth 32, after random fill",
    state: State::RandomFilled,
    fio: "--rw=randread --norandommap --bs=4k --iodepth=32",
    unit: Unit::Iops,
    goals: &[at_least(1.2, RAW)],
}];

const DEPTH_ONE: [Load; 2] = [
    Load {
        measure: "random read, depth 1",
        state: State::Filled,
        fio: "--rw=randread --norandommap --bs=4k --iodepth=1",
        unit: Unit::Iops,
        goals: &[at_least(1.0, RAW)],
    },
    Load {
        measure: "random write, depth 1",
        state: State::Filled,
        fio: "--rw=randwrite --norandommap --bs=4k --iodepth=1",
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW)],
    },
];

const FLUSH: [Load; 2] = [
    Load {
        measure: "random write with a flush after each, allocated space",
        state: State::Filled,
        fio: "--rw=randwrite --norandommap --bs=4k --iodepth=1 --fsync=1",
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW), at_least(1.5, QCOW2)],
    },
    Load {
        measure: "random write with a flush after each, fresh disk",
        state: State::Fresh,
        fio: "--rw=randwrite --norandommap --bs=4k --iodepth=1 --fsync=1",
        unit: Unit::Iops,
        goals: &[at_least(0.95, RAW), at_least(1.5, QCOW2)],
    },
];

const SEQUENTIAL: [Load; 2] = [
    Load {
        measure: "sequential write, 1 MiB, depth 8",
        state: State::Filled,
        fio: "--rw=write --bs=1m --iodepth=8",
        unit: Unit::BytesPerSecond,
        goals: &[at_least(1.0, RAW), at_least(1.0, RAW_FLUSHED)],
    },
    Load {
        measure: "sequential read, 1 MiB, depth 8",
        state: State::Filled,
        fio: "--rw=read --bs=1m --iodepth=8",
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
    fio: "--rw=randwrite --norandommap --bs=4k --iodepth=32",
    unit: Unit::Iops,
    goals: &[at_least(0.9, OURS_WITHOUT), at_least(3.0, QCOW2_AFTER)],
};

impl Row {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 10] = [
        Self::RandomWrite,
        Self::RandomRead,
        Self::DepthOne,
        Self::Flush,
        Self::Sequential,
        Self::AfterSnapshot,
        Self::SnapshotBusy,
        Self::CreateClone,
        Self::OpenAfterKill,
        Self::Memory,
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
            Self::CreateClone => "create-clone",
            Self::OpenAfterKill => "open-after-kill",
            Self::Memory => "memory",
        }
    }

    /// Every name, for messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Whether anybody but us is measured in it.
    pub(crate) fn has_peers(self) -> bool {
        !matches!(self, Self::CreateClone | Self::OpenAfterKill | Self::Memory)
    }

    /// Measures the row's lines.
    ///
    /// # Errors
    /// If a program fails.
    pub(crate) fn measure(self, bench: &Bench) -> Result<Vec<Line>> {
        match self {
            Self::RandomWrite => throughput::loads(bench, &RANDOM_WRITE),
            Self::RandomRead => throughput::loads(bench, &RANDOM_READ),
            Self::DepthOne => throughput::loads(bench, &DEPTH_ONE),
            Self::Flush => throughput::loads(bench, &FLUSH),
            Self::Sequential => throughput::loads(bench, &SEQUENTIAL),
            Self::AfterSnapshot => throughput::after_snapshot(bench),
            Self::SnapshotBusy => latency::snapshot_busy(bench),
            Self::CreateClone => latency::create_and_clone(bench),
            Self::OpenAfterKill => latency::open_after_kill(bench),
            Self::Memory => latency::memory(bench),
        }
    }
}

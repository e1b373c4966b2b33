//! Rare paths: what runs must reach now and then, or they test less than they seem to.

use std::collections::BTreeMap;

/// Every rare path that a smoke run is expected to reach, with what it means.
pub const DECLARED: &[(&str, &str)] = &[
    ("crash: kill", "the process died while clients worked"),
    ("crash: power cut", "the power went while clients worked"),
    ("crash: while opening", "the process died or the power went during recovery"),
    ("crash: while verifying", "the same right after recovery"),
    ("crash: while closing", "the same during a clean stop"),
    ("crash: while formatting", "the same before there was a store"),
    ("crash: twice before anybody read", "two crashes with nothing read between them"),
    ("open: clean", "a store that was closed is opened"),
    ("open: replayed records", "recovery replayed the log"),
    ("open: dropped records", "recovery dropped records above the durable point"),
    ("open: alarms", "recovery reported damage"),
    ("open: failed under faults", "opening failed with an error that was injected"),
    ("log: lapped", "the log was written round once"),
    ("checkpoint: published", "a checkpoint came to its end"),
    ("checkpoint: made histories", "snapshots got a history instead of a tree"),
    ("moments: retention changed", "a disk got another history"),
    ("moments: read", "a moment that was kept by itself was read"),
    ("moments: read again", "the same block of one was read once more"),
    (
        "moments: within their budgets",
        "each history was given a budget, and was within it in the end",
    ),
    ("cache: missed", "a node was read from the device"),
    ("request: sub-block write", "a write of a part of a block"),
    ("request: concurrent on a block", "two changes of one block were under way together"),
    ("request: severed", "a request met a handle that was severed"),
    ("request: corrupt", "a request met damage"),
    ("request: io error", "a request met an error of the device"),
    ("request: no space", "a request found the store full"),
    ("request: invalid", "a request lay beyond the end of a VDI that shrank"),
    ("flush: failed", "a flush failed, and the VDI stopped"),
    ("store: stopped", "the store stopped after a failure and was reopened"),
    ("snapshot: with requests under way", "a snapshot was taken of a busy VDI"),
    ("series: taken", "snapshots were taken one after the other, and made durable together"),
    ("snapshot: unsettled at a crash", "a snapshot was asked for, and the crash came first"),
    ("clone: of a running VDI", "a clone without a snapshot"),
    ("clone: of a snapshot", "a clone of a snapshot"),
    ("rollback", "a rollback came to its end"),
    ("rollback: undecided at a crash", "a rollback was asked for, and the crash came first"),
    ("resize: shrink", "a VDI was cut"),
    ("resize: grow", "a VDI was grown"),
    ("remove: busy VDI", "a VDI was deleted under its clients"),
    ("gc: freed", "garbage collection found something to free"),
    ("scrub: finished", "a pass read everything while clients worked"),
    ("scrub: found damage", "a pass found what was planted"),
    ("scrub: compared", "what a pass found was compared with what the offline check finds"),
    ("check: online", "the check of a store in use came to its end while clients worked"),
    ("check: gave way", "the same ended, as somebody needed space"),
    ("diff: compared", "a diff of two snapshots was compared with the model"),
    ("diff: in parts", "a diff was asked for in several parts"),
    ("diff: of moments", "a diff of snapshots, moments or not, was compared with what they hold"),
    ("clock: leapt", "the wall clock leapt, back or forth"),
    ("times: found", "a disk was looked up as it was at a time"),
    ("times: too long ago", "the same, and nothing of it was as old"),
    ("times: the clock went back", "the same, while the clock stood behind the newest snapshot"),
    ("clone: of a time", "a clone of what a disk was at a time"),
    ("rollback: to a time", "a rollback to what a disk was at a time"),
    ("clone: of a write", "a clone of what a disk was after a write"),
    ("rollback: to a write", "a rollback to what a disk was after a write"),
    ("receive: a new disk", "a snapshot was received into a new disk"),
    ("receive: onto a disk", "what differs was received onto a disk"),
    ("receive: refused", "a stream built on something else, or the disk was written since"),
    ("receive: done at a crash", "a receive was under way at a crash, and all of it was there"),
    (
        "receive: undone at a crash",
        "a receive was under way at a crash, and nothing of it was there",
    ),
    ("check: offline", "the offline check looked at a store"),
    ("fill: full", "the store was filled to the brim"),
    ("fill: tight", "clients worked in a store that is almost full"),
    ("crash: with a copy damaged", "one copy of a slot or of the superblock rotted at a crash"),
    ("open: nodes are damaged", "all that could be read of a store with damaged nodes was right"),
    ("fill: healed", "freeing space made it writable again"),
];

/// How often each path was reached.
#[derive(Clone, Debug, Default)]
pub struct Probes(BTreeMap<String, u64>);

impl Probes {
    /// Notes that `path` was reached.
    pub fn hit(&mut self, path: &str) {
        self.add(path, 1);
    }

    /// Notes that `path` was reached `count` times.
    pub fn add(&mut self, path: &str, count: u64) {
        if count == 0 {
            return;
        }
        match self.0.get_mut(path) {
            Some(sum) => *sum += count,
            None => {
                self.0.insert(path.to_owned(), count);
            }
        }
    }

    /// Adds those of another run.
    pub fn merge(&mut self, other: &Self) {
        for (path, &count) in &other.0 {
            self.add(path, count);
        }
    }

    /// How often `path` was reached.
    #[must_use]
    pub fn count(&self, path: &str) -> u64 {
        self.0.get(path).copied().unwrap_or(0)
    }

    /// All paths that were reached.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> + '_ {
        self.0.iter().map(|(path, &count)| (path.as_str(), count))
    }

    /// Declared paths that were never reached.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> + '_ {
        DECLARED.iter().map(|&(path, _)| path).filter(|path| self.count(path) == 0)
    }
}

//! Counters of one server. They belong to its thread; [`Snapshot`] is plain data for others.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

use std::cell::Cell;

use crate::block::Operation;

/// The live counters.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Counter,
    pub(crate) connections_failed: Counter,
    pub(crate) rings_broken: Counter,
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) flushes: Counter,
    pub(crate) discards: Counter,
    pub(crate) zeroings: Counter,
    pub(crate) requests_failed: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) kicks: Counter,
    pub(crate) interrupts: Counter,
}

impl Metrics {
    /// Counts a request that goes to the disk.
    pub(crate) fn count(&self, operation: Option<Operation>) {
        let counter = match operation {
            Some(Operation::Read) => &self.reads,
            Some(Operation::Write) => &self.writes,
            Some(Operation::Flush) => &self.flushes,
            Some(Operation::Discard) => &self.discards,
            Some(Operation::WriteZeroes) => &self.zeroings,
            Some(Operation::Serial) | None => return,
        };
        counter.add(1);
    }

    /// Counts what a request that succeeded has moved.
    pub(crate) fn count_bytes(&self, operation: Option<Operation>, bytes: u64) {
        match operation {
            Some(Operation::Read) => self.read_bytes.add(bytes),
            Some(Operation::Write) => self.written_bytes.add(bytes),
            _ => {}
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            connections: self.connections.get(),
            connections_open: self.connections_open.get(),
            connections_failed: self.connections_failed.get(),
            rings_broken: self.rings_broken.get(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            flushes: self.flushes.get(),
            discards: self.discards.get(),
            zeroings: self.zeroings.get(),
            requests_failed: self.requests_failed.get(),
            read_bytes: self.read_bytes.get(),
            written_bytes: self.written_bytes.get(),
            kicks: self.kicks.get(),
            interrupts: self.interrupts.get(),
        }
    }
}

/// A number that a single thread counts.
#[derive(Debug, Default)]
pub(crate) struct Counter(Cell<u64>);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.set(self.0.get().wrapping_add(count));
    }

    pub(crate) fn subtract_one(&self) {
        self.0.set(self.0.get().wrapping_sub(1));
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.get()
    }
}

/// What a server has done so far. Counters rise, `connections_open` is a gauge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Connections of virtual machine monitors.
    pub connections: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Connections that a malformed message, a failing socket or a missing disk ended.
    pub connections_failed: u64,
    /// Rings that were given up because they made no sense.
    pub rings_broken: u64,
    /// Reads that reached the disk.
    pub reads: u64,
    /// Writes that reached the disk.
    pub writes: u64,
    /// Flushes that reached the disk.
    pub flushes: u64,
    /// Discards that reached the disk.
    pub discards: u64,
    /// Zeroings that reached the disk.
    pub zeroings: u64,
    /// Requests answered with an error, by the server or the disk.
    pub requests_failed: u64,
    /// Bytes that successful reads returned, zeroes included.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Kicks of guests.
    pub kicks: u64,
    /// Interrupts of guests; requests that are done together share one.
    pub interrupts: u64,
}

impl Snapshot {
    /// Every value with its stable name and whether it is a gauge.
    #[must_use]
    pub fn values(&self) -> [(&'static str, u64, bool); 14] {
        [
            ("vhost_connections_total", self.connections, false),
            ("vhost_connections_open", self.connections_open, true),
            ("vhost_connections_failed_total", self.connections_failed, false),
            ("vhost_rings_broken_total", self.rings_broken, false),
            ("vhost_read_requests_total", self.reads, false),
            ("vhost_write_requests_total", self.writes, false),
            ("vhost_flush_requests_total", self.flushes, false),
            ("vhost_discard_requests_total", self.discards, false),
            ("vhost_write_zeroes_requests_total", self.zeroings, false),
            ("vhost_requests_failed_total", self.requests_failed, false),
            ("vhost_read_bytes_total", self.read_bytes, false),
            ("vhost_written_bytes_total", self.written_bytes, false),
            ("vhost_kicks_total", self.kicks, false),
            ("vhost_interrupts_total", self.interrupts, false),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_a_row_for_each_metric() {
        let text = include_str!("../../../docs/vhost-user.md");
        let rows: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `vhost_")?.split('`').next())
            .collect();
        let names = Snapshot::default().values().map(|(name, _, _)| name.replacen("vhost_", "", 1));
        assert_eq!(rows, names);
    }
}

//! Counters of one server. They belong to its thread; [`Snapshot`] is plain data for others.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

use crate::block::Operation;

disk::metrics! {
    in "docs/vhost-user.md";
    /// Connections of virtual machine monitors.
    connections: counter = "vhost_connections_total",
    /// Connections open now.
    connections_open: gauge = "vhost_connections_open",
    /// Connections that a malformed message, a failing socket or a missing disk ended.
    connections_failed: counter = "vhost_connections_failed_total",
    /// Rings that were given up because they made no sense.
    rings_broken: counter = "vhost_rings_broken_total",
    /// Reads that reached the disk.
    reads: counter = "vhost_read_requests_total",
    /// Writes that reached the disk.
    writes: counter = "vhost_write_requests_total",
    /// Flushes that reached the disk.
    flushes: counter = "vhost_flush_requests_total",
    /// Discards that reached the disk.
    discards: counter = "vhost_discard_requests_total",
    /// Zeroings that reached the disk.
    zeroings: counter = "vhost_write_zeroes_requests_total",
    /// Requests answered with an error, by the server or the disk.
    requests_failed: counter = "vhost_requests_failed_total",
    /// Bytes that successful reads returned, zeroes included.
    read_bytes: counter = "vhost_read_bytes_total",
    /// Bytes of successful writes.
    written_bytes: counter = "vhost_written_bytes_total",
    /// Kicks of guests.
    kicks: counter = "vhost_kicks_total",
    /// Interrupts of guests; requests that are done together share one.
    interrupts: counter = "vhost_interrupts_total",
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
}

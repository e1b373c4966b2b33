//! Counters of one server. They belong to its thread; [`Snapshot`] is plain data for others.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

use crate::protocol::Operation;

disk::metrics! {
    in "docs/ublk.md";
    /// Block devices that were served, those taken over from an earlier daemon included.
    devices: counter = "ublk_devices_total",
    /// Block devices served now.
    devices_open: gauge = "ublk_devices_open",
    /// Block devices that a refusal of the kernel's ended.
    devices_failed: counter = "ublk_devices_failed_total",
    /// Reads.
    reads: counter = "ublk_read_requests_total",
    /// Writes.
    writes: counter = "ublk_write_requests_total",
    /// Flushes.
    flushes: counter = "ublk_flush_requests_total",
    /// Discards.
    discards: counter = "ublk_discard_requests_total",
    /// Zeroings.
    zeroings: counter = "ublk_write_zeroes_requests_total",
    /// Requests answered with an error, by the server or the disk.
    requests_failed: counter = "ublk_requests_failed_total",
    /// Bytes that successful reads returned, zeroes included.
    read_bytes: counter = "ublk_read_bytes_total",
    /// Bytes of successful writes.
    written_bytes: counter = "ublk_written_bytes_total",
}

impl Metrics {
    /// Counts a request that has come.
    pub(crate) fn count(&self, operation: Option<Operation>) {
        let counter = match operation {
            Some(Operation::Read) => &self.reads,
            Some(Operation::Write) => &self.writes,
            Some(Operation::Flush) => &self.flushes,
            Some(Operation::Discard) => &self.discards,
            Some(Operation::WriteZeroes) => &self.zeroings,
            None => return,
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

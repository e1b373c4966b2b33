//! Counters of one server. They belong to its thread; [`Snapshot`] is plain data for others.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

use disk::metrics::Counter;

use crate::protocol::request::Command;

disk::metrics! {
    in "docs/nbd.md";
    /// Connections accepted.
    connections: counter = "nbd_connections_total",
    /// Connections open now.
    connections_open: gauge = "nbd_connections_open",
    /// Connections closed at once because there were too many.
    connections_refused: counter = "nbd_connections_refused_total",
    /// Connections that ended badly before an export was selected.
    handshakes_failed: counter = "nbd_handshakes_failed_total",
    /// TLS handshakes that succeeded.
    handshakes_tls: counter = "nbd_handshakes_tls_total",
    /// Sessions that a malformed request or a failing socket ended.
    sessions_failed: counter = "nbd_sessions_failed_total",
    /// READ requests that reached the disk.
    reads: counter = "nbd_read_requests_total",
    /// WRITE requests that reached the disk.
    writes: counter = "nbd_write_requests_total",
    /// FLUSH requests that reached the disk.
    flushes: counter = "nbd_flush_requests_total",
    /// TRIM requests that reached the disk.
    trims: counter = "nbd_trim_requests_total",
    /// WRITE_ZEROES requests that reached the disk.
    zeroings: counter = "nbd_write_zeroes_requests_total",
    /// CACHE requests that reached the disk.
    caches: counter = "nbd_cache_requests_total",
    /// BLOCK_STATUS requests that reached the disk.
    status_queries: counter = "nbd_block_status_requests_total",
    /// Requests answered with an error, by the server or the disk.
    requests_failed: counter = "nbd_requests_failed_total",
    /// Bytes that successful reads returned, zeroes included.
    read_bytes: counter = "nbd_read_bytes_total",
    /// Bytes that writes brought.
    written_bytes: counter = "nbd_written_bytes_total",
    /// Sends; replies that become ready together share one.
    sends: counter = "nbd_sends_total",
}

impl Metrics {
    /// The counter of requests with this command.
    pub(crate) fn of_command(&self, command: Command) -> Option<&Counter> {
        Some(match command {
            Command::Read => &self.reads,
            Command::Write => &self.writes,
            Command::Flush => &self.flushes,
            Command::Trim => &self.trims,
            Command::WriteZeroes => &self.zeroings,
            Command::Cache => &self.caches,
            Command::BlockStatus => &self.status_queries,
            Command::Disconnect => return None,
        })
    }
}

//! Counters of one server. They belong to its thread; [`Snapshot`] is plain data for others.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

use std::cell::Cell;

use crate::protocol::request::Command;

/// The live counters.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Counter,
    pub(crate) connections_refused: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) handshakes_tls: Counter,
    pub(crate) sessions_failed: Counter,
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) flushes: Counter,
    pub(crate) trims: Counter,
    pub(crate) zeroings: Counter,
    pub(crate) caches: Counter,
    pub(crate) status_queries: Counter,
    pub(crate) requests_failed: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) sends: Counter,
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

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            connections: self.connections.get(),
            connections_open: self.connections_open.get(),
            connections_refused: self.connections_refused.get(),
            handshakes_failed: self.handshakes_failed.get(),
            handshakes_tls: self.handshakes_tls.get(),
            sessions_failed: self.sessions_failed.get(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            flushes: self.flushes.get(),
            trims: self.trims.get(),
            zeroings: self.zeroings.get(),
            caches: self.caches.get(),
            status_queries: self.status_queries.get(),
            requests_failed: self.requests_failed.get(),
            read_bytes: self.read_bytes.get(),
            written_bytes: self.written_bytes.get(),
            sends: self.sends.get(),
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
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Connections closed at once because there were too many.
    pub connections_refused: u64,
    /// Connections that ended badly before an export was selected.
    pub handshakes_failed: u64,
    /// TLS handshakes that succeeded.
    pub handshakes_tls: u64,
    /// Sessions that a malformed request or a failing socket ended.
    pub sessions_failed: u64,
    /// READ requests that reached the disk.
    pub reads: u64,
    /// WRITE requests that reached the disk.
    pub writes: u64,
    /// FLUSH requests that reached the disk.
    pub flushes: u64,
    /// TRIM requests that reached the disk.
    pub trims: u64,
    /// WRITE_ZEROES requests that reached the disk.
    pub zeroings: u64,
    /// CACHE requests that reached the disk.
    pub caches: u64,
    /// BLOCK_STATUS requests that reached the disk.
    pub status_queries: u64,
    /// Requests answered with an error, by the server or the disk.
    pub requests_failed: u64,
    /// Bytes that successful reads returned, zeroes included.
    pub read_bytes: u64,
    /// Bytes that writes brought.
    pub written_bytes: u64,
    /// Sends; replies that become ready together share one.
    pub sends: u64,
}

impl Snapshot {
    /// Every value with its stable name and whether it is a gauge.
    #[must_use]
    pub fn values(&self) -> [(&'static str, u64, bool); 17] {
        [
            ("nbd_connections_total", self.connections, false),
            ("nbd_connections_open", self.connections_open, true),
            ("nbd_connections_refused_total", self.connections_refused, false),
            ("nbd_handshakes_failed_total", self.handshakes_failed, false),
            ("nbd_handshakes_tls_total", self.handshakes_tls, false),
            ("nbd_sessions_failed_total", self.sessions_failed, false),
            ("nbd_read_requests_total", self.reads, false),
            ("nbd_write_requests_total", self.writes, false),
            ("nbd_flush_requests_total", self.flushes, false),
            ("nbd_trim_requests_total", self.trims, false),
            ("nbd_write_zeroes_requests_total", self.zeroings, false),
            ("nbd_cache_requests_total", self.caches, false),
            ("nbd_block_status_requests_total", self.status_queries, false),
            ("nbd_requests_failed_total", self.requests_failed, false),
            ("nbd_read_bytes_total", self.read_bytes, false),
            ("nbd_written_bytes_total", self.written_bytes, false),
            ("nbd_sends_total", self.sends, false),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_a_row_for_each_metric() {
        let text = include_str!("../../../docs/nbd.md");
        let rows: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `nbd_")?.split('`').next())
            .collect();
        let names = Snapshot::default().values().map(|(name, _, _)| name.replacen("nbd_", "", 1));
        assert_eq!(rows, names);
    }
}

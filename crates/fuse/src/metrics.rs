//! Counters of one server.
//!
//! Names and meanings in [`Snapshot::values`] are stable: dashboards are built on them.

disk::metrics! {
    in "docs/fuse.md";
    /// Mounts that were served, each daemon that takes one over counting anew.
    mounts: counter = "fuse_mounts_total",
    /// Mounts served now.
    mounts_open: gauge = "fuse_mounts_open",
    /// Mounts that the kernel's nonsense or a failing connection ended.
    mounts_failed: counter = "fuse_mounts_failed_total",
    /// Requests about names, attributes and directories, and opened files.
    queries: counter = "fuse_queries_total",
    /// Reads.
    reads: counter = "fuse_read_requests_total",
    /// Writes.
    writes: counter = "fuse_write_requests_total",
    /// Flushes.
    flushes: counter = "fuse_flush_requests_total",
    /// Holes punched and ranges zeroed.
    discards: counter = "fuse_discard_requests_total",
    /// Requests answered with an error, missing files included.
    requests_failed: counter = "fuse_requests_failed_total",
    /// Bytes that successful reads returned, zeroes included.
    read_bytes: counter = "fuse_read_bytes_total",
    /// Bytes of successful writes.
    written_bytes: counter = "fuse_written_bytes_total",
}

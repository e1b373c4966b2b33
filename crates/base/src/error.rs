//! The kinds of failure that callers tell apart.

/// What went wrong, as far as a caller may act upon it. Each crate's error carries one of these
/// with typed context; `disk` has the one table from kinds to errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The device failed a read, write or flush, or vanished.
    Io,
    /// Stored bytes do not match their checksum or break an invariant. Never retried.
    Corrupt,
    /// This host or handle may not write any more: a lost lease, a failed log, a severed handle.
    Fenced,
    /// No free space is left, even after a forced checkpoint.
    NoSpace,
    /// Somebody else holds what is needed: a second daemon, an open connection.
    Busy,
    /// The request itself is wrong: out of range, misaligned, malformed, a name that is taken.
    Invalid,
    /// A named object does not exist.
    NotFound,
    /// The object exists already.
    Exists,
    /// A feature, version or operation that this build does not know.
    Unsupported,
    /// A change was asked of something that cannot change, such as a snapshot.
    ReadOnly,
}

//! How a client reads or writes, whichever client it is.

/// What is asked for, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Whether it writes; else it reads.
    pub(crate) is_write: bool,
    /// Whether each operation goes to a place of its own, in no order.
    pub(crate) is_random: bool,
    /// Bytes of an operation.
    pub(crate) bytes: u64,
    /// Operations under way at once.
    pub(crate) depth: usize,
    /// Whether each write is followed by a flush.
    pub(crate) flushes: bool,
}

impl Access {
    /// Reads of 4 KiB anywhere.
    pub(crate) const fn random_read(depth: usize) -> Self {
        Self { is_write: false, is_random: true, bytes: 4 << 10, depth, flushes: false }
    }

    /// Writes of 4 KiB anywhere.
    pub(crate) const fn random_write(depth: usize) -> Self {
        Self { is_write: true, ..Self::random_read(depth) }
    }

    /// Reads of 1 MiB, one after the other.
    pub(crate) const fn sequential_read(depth: usize) -> Self {
        Self { is_write: false, is_random: false, bytes: 1 << 20, depth, flushes: false }
    }

    /// Writes of 1 MiB, one after the other.
    pub(crate) const fn sequential_write(depth: usize) -> Self {
        Self { is_write: true, ..Self::sequential_read(depth) }
    }

    /// Each write made durable before the next.
    pub(crate) const fn flushed(self) -> Self {
        Self { flushes: true, ..self }
    }

    /// The same for fio.
    pub(crate) fn fio(&self) -> String {
        let pattern = match (self.is_random, self.is_write) {
            (true, false) => "--rw=randread --norandommap",
            (true, true) => "--rw=randwrite --norandommap",
            (false, false) => "--rw=read",
            (false, true) => "--rw=write",
        };
        let flush = if self.flushes { " --fsync=1" } else { "" };
        format!("{pattern} --bs={} --iodepth={}{flush}", self.bytes, self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_is_told_the_same() {
        let check = |access: Access, expected: &str| assert_eq!(access.fio(), expected);
        check(
            Access::random_write(1).flushed(),
            "--rw=randwrite --norandommap --bs=4096 --iodepth=1 --fsync=1",
        );
        check(Access::random_read(32), "--rw=randread --norandommap --bs=4096 --iodepth=32");
        check(Access::sequential_read(8), "--rw=read --bs=1048576 --iodepth=8");
        check(Access::sequential_write(8), "--rw=write --bs=1048576 --iodepth=8");
    }
}

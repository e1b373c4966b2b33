//! Virtual disk images over a blockstore.
//!
//! One 4 KiB guest write, from top to bottom:
//!
//! 1. A frontend calls [`disk::Disk::submit`] on a handle (`handle.rs`), which checks the range.
//! 2. `write.rs` holds the block against other changes (`ranges.rs`), takes a free block from the
//!    VDI's window (`blockstore::allocator`) and room in the log (`blockstore::log`).
//! 3. The data goes to the write scheduler (`blockstore::scheduler`), which joins it with its
//!    neighbours of this turn; the mapping record goes into the open log block.
//! 4. When both have completed, and every log block before, the mapping enters the overlay of the
//!    VDI's branch (`branch.rs`, `overlay.rs`), where reads (`read.rs`) find it from now on.
//! 5. The request is acknowledged.
//! 6. Some time later a checkpoint (`checkpoint.rs`) merges the overlay into the radix tree
//!    (`blockstore::tree`) and publishes the root with one slot write (`blockstore::slots`).
//! 7. After a crash, `recovery.rs` replays the log over the last published root.
//!
//! Snapshots, clones and the rest are log records too (`manage.rs`).

mod background;
mod branch;
mod budget;
pub mod check;
mod checkpoint;
mod claim;
mod compare;
mod damage;
mod directory;
pub mod dump;
mod engine;
mod error;
mod gc;
mod handle;
mod history;
mod holds;
mod intervals;
mod latest_writes;
mod ledger;
mod loaded;
mod manage;
mod mark;
mod overlay;
mod pace;
mod ranges;
mod reach;
mod read;
mod receive;
mod recovery;
mod release;
mod reserve;
mod retention;
mod scrub;
mod series;
mod snapshots;
mod start;
pub mod store;
mod times;
mod trim;
mod types;
mod vdi;
mod verify;
mod write;
mod writes;

pub use blockstore::allocator::Reuse;
pub use error::Error;
pub use gc::{GcPhase, GcReport, GcSpace, GcStatus};
pub use retention::Retention;
pub use scrub::{Damage, DamageKind, Owner, ScrubEnd, ScrubReport, ScrubStatus};
pub use store::Store;
pub use types::{
    DiffExtent, FormatOptions, HoldEntry, KeptWrite, LedgerEntry, OpenOptions, OpenReport,
    Received, Series, SnapshotEntry, Stats, Target, VdiDiff, VdiEntry, VdiInterval, VdiIntervals,
    VdiPast, VdiSpace, VdiWrite, VdiWrites, WantedIntervals, WantedSeries, WantedWrites,
};

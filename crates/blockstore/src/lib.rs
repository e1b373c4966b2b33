//! Blocks on the shared device: who owns them, which are free, what is durable.
//!
//! From the bottom up:
//! - [`scheduler`]: writes and flushes in the order that their edges demand;
//! - [`log`]: the host's write-ahead log;
//! - [`nodes`], [`tree`], [`table`]: immutable, verified metadata and what is built of it;
//! - [`allocator`]: which blocks are free;
//! - [`slots`]: the one write that publishes a checkpoint;
//! - [`format`](mod@format): an empty store.
//!
//! Nothing here knows what a VDI is.

pub mod allocator;
pub mod cache;
mod epochs;
mod error;
pub mod format;
mod geometry;
pub mod log;
pub mod nodes;
pub mod scheduler;
pub mod slots;
pub mod superblock;
pub mod table;
pub mod tree;

pub use epochs::{ReadEpochs, Reader};
pub use error::Error;
pub use geometry::{Geometry, choose_sizes};
pub use nodes::NodeStore;
pub use scheduler::WriteScheduler;

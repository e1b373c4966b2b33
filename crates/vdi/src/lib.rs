//! Virtual disk images over a blockstore.

mod error;
pub mod store;
mod types;

pub use error::Error;
pub use store::Store;
pub use types::{
    DiffExtent, FormatOptions, OpenOptions, OpenReport, SnapshotEntry, Stats, Target, VdiEntry,
    VdiSpace,
};

//! Blocks on the shared device: who owns them, which are free, what is durable.

mod error;
pub use error::Error;

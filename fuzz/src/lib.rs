//! What fuzz targets share: scripts of bytes, and small stores in memory.

pub mod image;
pub mod ram;
pub mod reactor;
pub mod script;
pub mod seal;
pub mod slow;

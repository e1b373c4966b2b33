//! The deterministic simulator.

pub mod clock;
pub mod content;
pub mod device;
pub mod faults;
pub mod medium;
pub mod model;
pub mod random;
pub mod trace;

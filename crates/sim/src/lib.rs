//! The deterministic simulator.

pub mod client;
pub mod clock;
pub mod content;
pub mod device;
pub mod executor;
pub mod faults;
pub mod management;
pub mod medium;
pub mod model;
pub mod mutants;
pub mod plan;
pub mod probes;
pub mod random;
pub mod requests;
pub mod run;
pub mod session;
pub mod trace;
pub mod verify;
pub mod world;

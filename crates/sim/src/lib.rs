//! The deterministic simulator: the engine on a simulated device, clock and executor. One seed is
//! one run, and the same seed is the same run, on every machine.
//!
//! A run, from top to bottom:
//!
//! 1. [`plan`] draws everything that the seed decides: sizes, clients, what they do, faults, and
//!    the lives of the store, each with its end (a clean stop, a kill, a power cut).
//! 2. [`run`] formats a store and lives these lives. In each, [`executor`] polls the engine's tasks
//!    in random order, moves time, and lets [`device`] complete operations, until the crash.
//! 3. After each opening [`verify`] reads everything there is and compares it with [`model`].
//! 4. [`client`] then lets several clients work: [`requests`] of the data path and [`management`]
//!    of VDIs and snapshots. Every answer goes to the model; every error must be excused by what
//!    was injected ([`session`], [`faults::Atlas`]).
//! 5. Between lives the offline check looks at the store.
//!
//! [`medium`] is the fault model of a disk as a written contract, and [`model::block`] decides what
//! one block may hold: read these two first. `docs/simulator.md` tells how to use it all.
//!
//! Nothing here runs two threads, asks the machine for the time or for random numbers: `main` does,
//! around the runs.

pub mod client;
pub mod clock;
pub mod compare;
pub mod content;
pub mod device;
pub mod executor;
pub mod faults;
pub mod focus;
pub mod holds;
pub mod management;
pub mod medium;
pub mod model;
pub mod moments;
pub mod mutants;
pub mod plan;
pub mod probes;
pub mod random;
pub mod receive;
pub mod requests;
pub mod run;
pub mod scrub;
pub mod series;
pub mod session;
pub mod starts;
pub mod times;
pub mod trace;
pub mod verify;
pub mod world;
pub mod writes;

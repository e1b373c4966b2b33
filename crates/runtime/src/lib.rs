//! The seams of design.md I4: tasks, time, randomness and sockets.
//!
//! Engine code is `async` and runs on one thread, on an executor of ours: nothing but the order in
//! which tasks are polled, the clock and the random numbers can make two runs differ, and all
//! three come from here. In production [`reactor`] waits for the kernel between turns; in the
//! simulator a seed decides everything and time is a number.
//!
//! Rules for code that runs on it:
//! - no `RefCell` borrow is held across an `await`;
//! - an operation that was started is not cancelled: its future is awaited or spawned, or its
//!   result arrives in a oneshot whose sender does not care;
//! - a task that loops without waiting calls [`Runtime::yield_now`].

mod executor;
pub mod inherited;
pub mod reactor;
pub mod socket;
pub mod sync;

pub use executor::{Clock, JoinHandle, Options, Order, Runtime, Time};

/// A boxed future that stays on its thread.
pub type LocalBoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T>>>;

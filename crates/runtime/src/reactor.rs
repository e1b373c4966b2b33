//! The driver of a [`Runtime`] in production: it polls tasks until none is ready, hands what they
//! submitted to the kernel, and waits for completions, timers and other threads.
//!
//! ```text
//! run ─► posted functions ─► timers ─► tasks until stalled ─► submit and wait ─► deliver ─┐
//!   ▲                                  (one system call per round)                        │
//!   └─────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Two engines do the I/O: io_uring, and worker threads with poll(2) where io_uring is refused.
//! Works under way own their memory until they are done; dropping the reactor waits for them.

mod channel;
mod clock;
mod event;
mod io;
mod lookout;
mod net;
mod pollable;
mod pool;
mod ring;
mod sys;
mod threads;
mod unpark;
mod work;

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub use channel::{Channel, Filled};
pub use clock::SystemClock;
pub use event::Event;
pub use io::{File, Io};
pub use lookout::{Lookout, Watch};
pub use net::{Address, Listener, Peer};
pub use pollable::Pollable;
pub use unpark::RemoteHandle;
pub use work::{Completions, FileAction, FileOperation};

use crate::{Options, Order, Runtime};
use unpark::Unparker;

/// Most task polls between two looks at the kernel, so that busy tasks cannot starve I/O.
const POLLS_MAX: usize = 1024;

/// Polls between two looks at the clock, and how long tasks may go on before the kernel is looked at.
const POLLS_PER_LOOK: usize = 16;
const POLLS_TIME: Duration = Duration::from_millis(2);

/// Which engine does the I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring, or worker threads where it is refused.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Worker threads.
    ThreadPool,
}

impl EngineChoice {
    /// What PARALLAX_IO_ENGINE says: `io_uring`, `threads`, or `auto`, which is also what nothing says.
    ///
    /// # Errors
    /// `InvalidInput` for anything else.
    pub fn from_environment() -> std::io::Result<Self> {
        match std::env::var("PARALLAX_IO_ENGINE").as_deref() {
            Ok("io_uring") => Ok(Self::IoUring),
            Ok("threads") => Ok(Self::ThreadPool),
            Ok("auto") | Err(std::env::VarError::NotPresent) => Ok(Self::Auto),
            _ => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "PARALLAX_IO_ENGINE is none of auto, io_uring, threads",
            )),
        }
    }
}

/// Drives a runtime. Stays on the thread that started it.
pub struct Reactor {
    runtime: Runtime,
    io: Io,
    unparker: Arc<Unparker>,
}

impl Reactor {
    /// Makes a runtime and its reactor on this thread.
    ///
    /// # Errors
    /// If the kernel refuses the engine.
    pub fn start(choice: EngineChoice) -> std::io::Result<Self> {
        let unparker = Unparker::new()?;
        let io = Io::start(choice, &unparker)?;
        let unpark = Arc::clone(&unparker);
        let runtime = Runtime::new(Options {
            order: Order::Fifo,
            seed: seed()?,
            clock: Rc::new(SystemClock),
            unpark: Arc::new(move || unpark.unpark()),
        });
        io.register_buffers(runtime.buffers());
        Ok(Self { runtime, io, unparker })
    }

    /// The runtime that it drives.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Files and sockets on it.
    #[must_use]
    pub fn io(&self) -> &Io {
        &self.io
    }

    /// Runs everything until `main` has ended. Other tasks stay, and go on at the next `run`.
    ///
    /// # Errors
    /// If the kernel refuses to go on with the engine; tasks cannot go on then.
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> std::io::Result<T> {
        let result = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&result);
        drop(self.runtime.spawn(async move {
            let value = main.await;
            *slot.borrow_mut() = Some(value);
        }));
        loop {
            for function in self.unparker.take_posted() {
                function(&self.runtime);
            }
            if self.runtime.next_deadline().is_some() {
                self.runtime.fire_timers();
            }
            let stalled = self.poll_tasks();
            if let Some(value) = result.borrow_mut().take() {
                return Ok(value);
            }
            self.turn(stalled)?;
        }
    }

    /// Polls tasks until none is ready; `false` if it gave up before.
    fn poll_tasks(&self) -> bool {
        let start = self.runtime.now();
        for polls in 1..=POLLS_MAX {
            if !self.runtime.step() && !self.runtime.end_turn() {
                return true;
            }
            let is_due = polls.is_multiple_of(POLLS_PER_LOOK);
            if is_due && self.runtime.now().since(start) >= POLLS_TIME {
                return false;
            }
        }
        false
    }

    fn turn(&self, stalled: bool) -> std::io::Result<()> {
        if !stalled {
            return self.io.turn(Some(Duration::ZERO));
        }
        let deadline = self.runtime.next_deadline();
        let timeout = deadline.map(|deadline| deadline.since(self.runtime.now()));
        // The order matters: see `unpark.rs`.
        self.unparker.will_park();
        let awake = self.runtime.has_ready() || self.unparker.has_posted();
        let timeout = if awake || self.io.has_finished() { Some(Duration::ZERO) } else { timeout };
        self.io.turn(timeout)
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.unparker.close();
        self.io.close();
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reactor({})", self.io.describe())
    }
}

fn seed() -> std::io::Result<u64> {
    let mut bytes = [0u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

//! Worker threads for calls that block: all file operations where io_uring is refused, and the few
//! that io_uring has no operation for.
//!
//! The works stay in a table on the reactor's thread; workers see pointers into them only. A pool
//! that is dropped first runs what it has taken.
#![expect(unsafe_code, reason = "builds calls, which promise that their memory stays")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::sys::Call;
use super::unpark::Unparker;
use super::work::{Completed, Table, Work};

pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Dropped last: the workers have ended then.
    table: Table,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    unparker: Arc<Unparker>,
}

#[derive(Default)]
struct Queue {
    calls: VecDeque<(usize, Call)>,
    finished: Vec<(usize, i32)>,
    stopping: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some((slot, call)) = queue.calls.pop_front() {
                drop(queue);
                let result = call.run();
                queue = self.lock();
                queue.finished.push((slot, result));
                drop(queue);
                self.unparker.unpark();
                queue = self.lock();
            } else if queue.stopping {
                return;
            } else {
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Pool {
    pub(super) fn new(thread_count: usize, unparker: &Arc<Unparker>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            ready: Condvar::new(),
            unparker: Arc::clone(unparker),
        });
        let mut pool = Self { shared, threads: Vec::new(), table: Table::default() };
        for index in 0..thread_count {
            let shared = Arc::clone(&pool.shared);
            let thread = thread::Builder::new().name(format!("parallax-io-{index}"));
            pool.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Takes a file operation.
    pub(super) fn submit(&mut self, work: Work) {
        let index = self.table.insert(work);
        let Some(slot) = self.table.slot(index) else { return };
        // SAFETY: the work stays in its slot, which is boxed and which nobody looks into, until
        // `take_finished` got the call's result; `drop` waits for all workers before it drops the
        // table.
        let call = unsafe { Call::new(slot) };
        let mut queue = self.shared.lock();
        match call {
            Some(call) => queue.calls.push_back((index, call)),
            None => queue.finished.push((index, -libc::EINVAL)),
        }
        drop(queue);
        self.shared.ready.notify_one();
    }

    pub(super) fn in_flight(&self) -> usize {
        self.table.in_flight()
    }

    pub(super) fn has_finished(&self) -> bool {
        self.in_flight() > 0 && !self.shared.lock().finished.is_empty()
    }

    pub(super) fn take_finished(&mut self, completed: &mut Vec<Completed>) {
        if self.in_flight() == 0 {
            return;
        }
        let finished = std::mem::take(&mut self.shared.lock().finished);
        for (index, result) in finished {
            completed.extend(self.table.remove(index).map(|work| Completed { work, result }));
        }
    }

    /// Waits for everything that was submitted; takes no more after that.
    pub(super) fn finish(&mut self, completed: &mut Vec<Completed>) {
        self.stop();
        self.take_finished(completed);
    }

    fn stop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.ready.notify_all();
        for thread in self.threads.drain(..) {
            // A worker that panicked has ended too.
            let _ = thread.join();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

//! Read epochs: a block that was replaced may be reused only when every lookup that began before
//! the replacement was published has ended (design rule 19).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use runtime::sync::Signal;

/// Counts readers by the epoch in which they began. Clones share it.
#[derive(Clone, Default)]
pub struct ReadEpochs(Rc<Inner>);

#[derive(Default)]
struct Inner {
    state: RefCell<State>,
    ended: Signal,
}

#[derive(Default)]
struct State {
    /// Number of the oldest epoch in `readers`.
    oldest: u64,
    /// Readers per epoch; the last is the current one.
    readers: VecDeque<u64>,
}

/// A reader; ends when dropped.
pub struct Reader {
    epochs: ReadEpochs,
    epoch: u64,
}

impl ReadEpochs {
    /// Begins a read.
    #[must_use]
    pub fn enter(&self) -> Reader {
        let mut state = self.0.state.borrow_mut();
        if state.readers.is_empty() {
            state.readers.push_back(0);
        }
        if let Some(current) = state.readers.back_mut() {
            *current += 1;
        }
        let epoch = state.oldest + as_u64(state.readers.len()) - 1;
        drop(state);
        Reader { epochs: self.clone(), epoch }
    }

    /// Waits until every read that began before this call has ended.
    pub async fn quiesce(&self) {
        let epoch = {
            let mut state = self.0.state.borrow_mut();
            state.readers.push_back(0);
            state.oldest + as_u64(state.readers.len()) - 1
        };
        loop {
            let ended = self.0.ended.changed();
            self.0.state.borrow_mut().forget_ended();
            if self.0.state.borrow().oldest >= epoch {
                return;
            }
            ended.await;
        }
    }
}

impl State {
    fn forget_ended(&mut self) {
        while self.readers.len() > 1 && self.readers.front() == Some(&0) {
            self.readers.pop_front();
            self.oldest += 1;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.epochs.0.state.borrow_mut();
        let index = usize::try_from(self.epoch.saturating_sub(state.oldest)).unwrap_or(0);
        let ended = match state.readers.get_mut(index) {
            Some(count) => {
                *count = count.saturating_sub(1);
                *count == 0 && state.readers.len() > 1
            }
            None => false,
        };
        drop(state);
        if ended {
            self.epochs.0.ended.notify();
        }
    }
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

impl std::fmt::Debug for ReadEpochs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadEpochs({:?})", self.0.state.borrow().readers)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({})", self.epoch)
    }
}

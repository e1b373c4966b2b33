//! What happened in a run: a hash of every event, so that two runs can be compared, and the events
//! themselves when a person wants to read them.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use crate::random::mix;

/// Takes events. Clones share it.
#[derive(Clone, Default)]
pub struct Trace(Rc<Inner>);

type Sink = Box<dyn FnMut(&str)>;

#[derive(Default)]
struct Inner {
    hash: Cell<u64>,
    count: Cell<u64>,
    sink: RefCell<Option<Sink>>,
}

impl Trace {
    /// A trace that only hashes.
    #[must_use]
    pub fn silent() -> Self {
        Self::default()
    }

    /// A trace that also hands every event to `sink`, as one line.
    pub fn to(sink: impl FnMut(&str) + 'static) -> Self {
        let trace = Self::default();
        *trace.0.sink.borrow_mut() = Some(Box::new(sink));
        trace
    }

    /// Notes an event: its numbers go into the hash, its text to the reader.
    pub fn event(&self, numbers: [u64; 4], text: impl FnOnce() -> String) {
        let hash = numbers.iter().fold(self.0.hash.get(), |hash, &number| {
            mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ number)
        });
        self.0.hash.set(hash);
        self.0.count.set(self.0.count.get() + 1);
        self.note(text);
    }

    /// Hands a line to the reader, if there is one; not part of the hash.
    pub fn note(&self, text: impl FnOnce() -> String) {
        if let Some(sink) = self.0.sink.borrow_mut().as_mut() {
            sink(&text());
        }
    }

    /// Hash of all events so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.0.hash.get()
    }

    /// Number of events so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.count.get()
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({} events)", self.count())
    }
}

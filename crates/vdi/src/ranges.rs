//! Serialises changes of overlapping blocks of one VDI. Two writes to one block are never in
//! flight together, so that the order of their LSNs, of their completion and of what readers see
//! is one order (design rules 11-13), and a sub-block write merges into what is really newest.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use runtime::sync::{OneshotSender, oneshot};

/// Ranges that are being changed, and those that wait for them, first come, first served.
#[derive(Clone, Default)]
pub(crate) struct RangeLocks(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    /// Held ranges by their start; they do not overlap.
    held: BTreeMap<u64, u64>,
    /// Waiting ranges in order of arrival.
    waiting: Vec<(Range<u64>, OneshotSender<RangeGuard>)>,
}

/// Holds a range until dropped.
pub(crate) struct RangeGuard {
    locks: RangeLocks,
    start: u64,
}

impl RangeLocks {
    /// Waits until no change that came earlier overlaps `range`, then holds it.
    pub(crate) async fn lock(&self, range: Range<u64>) -> RangeGuard {
        let start = range.start;
        let guard = || RangeGuard { locks: self.clone(), start };
        let free = {
            let mut state = self.0.borrow_mut();
            // Who waits already goes first, or a stream of small writes would starve a discard.
            let behind = state.waiting.iter().any(|(other, _)| overlaps(other, &range));
            let free = (!behind && !state.is_held(&range))
                || base::mutant::active("changes_overlap")
                || base::mutant::active("last_completed_wins");
            if free {
                state.held.insert(range.start, range.end);
            }
            free
        };
        if free {
            return guard();
        }
        let (sender, receiver) = oneshot();
        self.0.borrow_mut().waiting.push((range, sender));
        // The queue lives in these locks, which we hold: the sender is not dropped unsent.
        receiver.await.unwrap_or_else(|_| guard())
    }
}

impl State {
    fn is_held(&self, range: &Range<u64>) -> bool {
        let last_before_end = self.held.range(..range.end).next_back();
        last_before_end.is_some_and(|(_, &end)| end > range.start)
    }

    /// Takes what can be granted, in order; nobody overtakes an overlapping earlier one. Returns
    /// the starts of the ranges, and who waits for them.
    fn grant(&mut self) -> Vec<(u64, OneshotSender<RangeGuard>)> {
        let mut granted = Vec::new();
        let mut blocked: Vec<Range<u64>> = Vec::new();
        for (range, sender) in std::mem::take(&mut self.waiting) {
            let behind = blocked.iter().any(|other| overlaps(other, &range));
            if behind || self.is_held(&range) {
                blocked.push(range.clone());
                self.waiting.push((range, sender));
            } else {
                self.held.insert(range.start, range.end);
                granted.push((range.start, sender));
            }
        }
        granted
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let granted = {
            let mut state = self.locks.0.borrow_mut();
            state.held.remove(&self.start);
            if state.waiting.is_empty() { Vec::new() } else { state.grant() }
        };
        for (start, sender) in granted {
            // To one that waits no more this releases the range at once, by dropping the guard.
            sender.send(RangeGuard { locks: self.locks.clone(), start });
        }
    }
}

impl std::fmt::Debug for RangeLocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RangeLocks({} held)", self.0.borrow().held.len())
    }
}

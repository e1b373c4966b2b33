//! Giving back blocks that were replaced. A read that began before may still look at them, however
//! long its device takes (design rule 19); so they wait in the background, and nothing but the
//! reuse of these blocks waits with them. Only who needs the space waits for it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::Pba;
use runtime::sync::Signal;

use crate::engine::Engine;
use crate::mark::BlockSet;

/// Blocks that are released between two breaths of the thread.
const BLOCKS_PER_TURN: usize = 4096;

/// Blocks on their way from replaced to free.
#[derive(Default)]
pub(crate) struct Releases {
    /// Blocks that both slots are past, and that readers may still see: a bit each, for a reader may
    /// take its time, and all blocks of the store may come meanwhile.
    waiting: RefCell<BlockSet>,
    /// How many have come, and how many have left.
    begun: Cell<u64>,
    ended: Cell<u64>,
    /// Whether a task releases them. One at a time: what comes while it waits for readers waits
    /// for the same ones.
    running: Cell<bool>,
    changed: Signal,
}

/// A moment in the order of releases: all that had come by then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReleasedUpTo(u64);

impl Releases {
    /// This moment, for [`Engine::released`].
    pub(crate) fn up_to_now(&self) -> ReleasedUpTo {
        ReleasedUpTo(self.begun.get())
    }

    /// Whether some have come that have not left.
    pub(crate) fn are_under_way(&self) -> bool {
        self.ended.get() < self.begun.get()
    }

    /// Wakes everybody who waits, so that they see that there is nothing to wait for any more.
    pub(crate) fn wake_all(&self) {
        self.changed.notify();
    }
}

impl Engine {
    /// As [`Self::release_set`], of blocks that were noted one by one: what a checkpoint replaced.
    ///
    /// # Panics
    /// If one is there twice, or waits already.
    pub(crate) fn release(self: &Rc<Self>, blocks: impl IntoIterator<Item = Pba>) {
        let mut set = BlockSet::default();
        for pba in blocks {
            assert!(set.insert(pba), "block {pba} was released twice");
        }
        self.release_set(set);
    }

    /// Makes blocks that nothing can reach allocatable, when no reader sees them any more. The
    /// only callers are the publication of a checkpoint, when both slots are past the replacement
    /// (design rules 17, 18), and the end of a mark, with what it held back: that may be all of the
    /// store, and costs no step for each block.
    ///
    /// # Panics
    /// If a block waits already.
    pub(crate) fn release_set(self: &Rc<Self>, blocks: BlockSet) {
        let releases = &self.releases;
        let count = blocks.len();
        let common = releases.waiting.borrow_mut().union(blocks);
        assert_eq!(common, None, "a block was released twice");
        if count == 0 {
            self.full.set(false);
            return;
        }
        releases.begun.set(releases.begun.get() + count);
        if releases.running.replace(true) {
            return;
        }
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            let releases = &engine.releases;
            loop {
                let blocks = std::mem::take(&mut *releases.waiting.borrow_mut());
                let count = blocks.len();
                if count == 0 {
                    releases.running.set(false);
                    return;
                }
                engine.release_unread(blocks).await;
                releases.ended.set(releases.ended.get() + count);
                releases.changed.notify();
            }
        }));
    }

    /// Waits until everything is free that was to be released by some moment, but for what a mark
    /// holds back; or until the store has failed, or who waits gives up. A reader may hold this up
    /// for as long as its device likes: whoever waits here must have nothing that others wait for,
    /// or give up when they do.
    pub(crate) async fn released(
        &self,
        ReleasedUpTo(begun): ReleasedUpTo,
        gives_up: impl Fn() -> bool,
    ) {
        loop {
            let changed = self.releases.changed.changed();
            let is_over = self.releases.ended.get() >= begun || self.scheduler.failure().is_some();
            if is_over || gives_up() {
                return;
            }
            changed.await;
        }
    }

    async fn release_unread(&self, blocks: BlockSet) {
        if !base::mutant::active("release_ignores_readers") {
            self.epochs.quiesce().await;
        }
        // Garbage collection may still be reading trees that name them.
        let blocks = self.collector.hold(blocks, &self.allocator);
        let mut left = blocks.iter().peekable();
        while left.peek().is_some() {
            let part = left.by_ref().take(BLOCKS_PER_TURN);
            self.allocator.release(part.inspect(|&pba| {
                self.nodes.cache().remove(pba);
                self.trimmer.note_freed(pba);
                self.scrubber.note_freed(pba);
            }));
            self.runtime.yield_now().await;
        }
        self.full.set(false);
    }
}

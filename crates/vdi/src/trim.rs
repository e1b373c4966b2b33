//! Trimming: the space of free blocks is given back to what lies below, a file system or a thin device,
//! so that a store takes no more of it than it needs.
//!
//! A block is lent by the allocator while it is being discarded, and nobody gets it before that has ended
//! (design rule 20). It was free, so no slot, no log record that counts and no reader names it any more
//! (rules 17 to 19). Nodes must find space, whatever became full below meanwhile (rule 26): they are written
//! to blocks of the reserve alone, which are not free, and count when they were allocated below
//! (`reserve.rs`). So what is free in a metadata extent can be given back like anything else
//! (docs/decisions/0016-trimming-metadata.md).
//!
//! Freed blocks are trimmed after each garbage collection, in runs of [`RUN_BLOCKS_MIN`] and more:
//! shorter ones cost the file system below more than they give, and are tried again when what lies
//! between them is free. Who asks for it ([`Scope::All`]) gets them back too, and what earlier runs of the
//! store left untrimmed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use base::{ExtentIndex, Pba};
use blockstore::allocator::{BITMAP_PAGE_BLOCKS, Run};
use device::Cause;
use ondisk::ExtentKind;
use runtime::sync::Semaphore;

use crate::Error;
use crate::engine::Engine;
use crate::gc::GcPhase;
use crate::mark::{BlockSet, PAGE_WORDS};
use crate::pace::Pace;

/// Fewest adjacent blocks that are trimmed when nobody asks: 64 KiB.
const RUN_BLOCKS_MIN: u64 = 16;

/// Most blocks of an extent in use that are lent at a time: 4 MiB.
const LENT_BLOCKS_MAX: u64 = 1024;

/// What is trimmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What was freed since it was tried the last time.
    Freed,
    /// Every free block of the store.
    All,
}

/// What is known about space that could be given back.
pub(crate) struct Trimmer {
    /// Blocks that were freed, and whose space was not given back: a bit each.
    freed: RefCell<BlockSet>,
    pub(crate) one: Semaphore,
    is_off: Cell<bool>,
}

impl Trimmer {
    pub(crate) fn new() -> Self {
        Self { freed: RefCell::default(), one: Semaphore::new(1), is_off: Cell::new(false) }
    }

    /// Notes that a block became free.
    pub(crate) fn note_freed(&self, pba: Pba) {
        if !self.is_off.get() {
            self.freed.borrow_mut().insert(pba);
        }
    }

    /// Gives nothing back from now on: the space of this store is to stay allocated, or the device
    /// cannot take it.
    pub(crate) fn turn_off(&self) {
        self.is_off.set(true);
        *self.freed.borrow_mut() = BlockSet::default();
    }
}

impl Engine {
    /// Gives space back. Returns how many blocks it was of. What fails is tried another time, but for
    /// a device that cannot do it.
    ///
    /// # Errors
    /// If the store has failed, or is being closed.
    pub(crate) async fn trim(self: &Rc<Self>, scope: Scope) -> Result<u64, Error> {
        let _one = self.trimmer.one.acquire(1).await;
        self.collector.enter(GcPhase::Trimming);
        let trimmed = self.trim_pages(scope).await;
        self.collector.enter(GcPhase::Idle);
        let trimmed = trimmed?;
        self.stats.borrow_mut().trimmed_blocks += trimmed;
        Ok(trimmed)
    }

    async fn trim_pages(&self, scope: Scope) -> Result<u64, Error> {
        let mut trimmed = 0;
        let page_count = self.allocator.page_count();
        let mut pace = Pace::new(self);
        let mut next = 0;
        while next < page_count && !self.trimmer.is_off.get() {
            let page = match scope {
                Scope::All => next,
                Scope::Freed => match self.trimmer.freed.borrow().first_page(next) {
                    Some(page) => page,
                    None => break,
                },
            };
            trimmed += self.trim_page(page, scope, &mut pace).await?;
            next = page + 1;
            pace.rest().await;
        }
        Ok(trimmed)
    }

    async fn trim_page(&self, page: u64, scope: Scope, pace: &mut Pace<'_>) -> Result<u64, Error> {
        let mut trimmed = 0;
        let start = page * BITMAP_PAGE_BLOCKS;
        let end = (start + BITMAP_PAGE_BLOCKS).min(self.geometry.block_count);
        let mut at = start;
        while at < end {
            self.go_on()?;
            let extent = self.geometry.extent_of(Pba::new(at));
            let part_end =
                end.min((at / self.geometry.extent_blocks + 1) * self.geometry.extent_blocks);
            let part = Run { start: Pba::new(at), count: part_end - at };
            at = part_end;
            trimmed += match self.allocator.extent_kind(extent) {
                Some(ExtentKind::Data | ExtentKind::Metadata) => {
                    self.trim_used(part, scope, pace).await
                }
                None => self.trim_free(extent, part, scope).await,
                Some(ExtentKind::System | ExtentKind::Log) => 0,
            };
        }
        Ok(trimmed)
    }

    /// Trims a part of an extent of data or metadata.
    async fn trim_used(&self, part: Run, scope: Scope, pace: &mut Pace<'_>) -> u64 {
        let mut trimmed = 0;
        for run in self.trimmable(part, scope, true) {
            for piece in pieces(run, LENT_BLOCKS_MAX) {
                // Who opens the store next may write what is free here.
                if self.go_on().is_err() {
                    return trimmed;
                }
                if self.allocator.lend(piece) {
                    let early = base::mutant::active("trim_returns_blocks_early");
                    if early {
                        self.allocator.free_now(piece);
                    }
                    trimmed += self.discard(piece).await;
                    if !early {
                        self.allocator.free_now(piece);
                    }
                    pace.rest().await;
                }
            }
        }
        trimmed
    }

    /// Trims a part of an extent that is free.
    async fn trim_free(&self, extent: ExtentIndex, part: Run, scope: Scope) -> u64 {
        let runs = self.trimmable(part, scope, false);
        if runs.is_empty() || !self.allocator.lend_extent(extent) {
            return 0;
        }
        let mut trimmed = 0;
        for run in runs {
            if self.go_on().is_ok() {
                trimmed += self.discard(run).await;
            }
        }
        self.allocator.return_extent(extent);
        trimmed
    }

    /// Runs of blocks that may be trimmed in a part of one page and one extent: those that are free now,
    /// if the extent is in use; in a free one all are.
    fn trimmable(&self, part: Run, scope: Scope, is_used: bool) -> Vec<Run> {
        let page = part.start.get() / BITMAP_PAGE_BLOCKS;
        let free = is_used.then(|| self.allocator.free_page(page));
        let count_min = match scope {
            Scope::Freed => RUN_BLOCKS_MIN,
            Scope::All => 1,
        };
        let freed = self.trimmer.freed.borrow();
        let freed = match (scope, freed.page(page)) {
            (Scope::All, _) => None,
            (Scope::Freed, None) => return Vec::new(),
            (Scope::Freed, freed) => freed,
        };
        let is_wanted = |pba: Pba| {
            let bit = pba.get() % BITMAP_PAGE_BLOCKS;
            let word = usize::try_from(bit / 64).unwrap_or(0);
            let is_set = |words: &[u64; PAGE_WORDS]| words[word] >> (bit % 64) & 1 == 1;
            free.as_deref().is_none_or(is_set) && freed.is_none_or(is_set)
        };
        runs(part, is_wanted).filter(|run| run.count >= count_min).collect()
    }

    /// Discards blocks that are lent; of how many the space was given back.
    async fn discard(&self, run: Run) -> u64 {
        match self.device.discard(run.start, run.count).await {
            Ok(()) => {
                self.reserve.forget_backed(run);
                let mut freed = self.trimmer.freed.borrow_mut();
                for pba in run.blocks() {
                    freed.remove(pba);
                }
                run.count
            }
            Err(error) if error.cause == Cause::Unsupported => {
                tracing::info!("the device cannot take space back: free blocks keep theirs");
                self.trimmer.turn_off();
                0
            }
            Err(error) => {
                tracing::warn!(%error, "the space of free blocks could not be given back");
                0
            }
        }
    }
}

fn pieces(run: Run, max: u64) -> impl Iterator<Item = Run> {
    let count = run.count.div_ceil(max);
    (0..count).map(move |at| {
        let start = run.start.plus(at * max);
        Run { start, count: max.min(run.end().distance_from(start)) }
    })
}

/// The runs of wanted blocks within `part`.
fn runs(part: Run, is_wanted: impl Fn(Pba) -> bool) -> impl Iterator<Item = Run> {
    let mut blocks = part.blocks().peekable();
    std::iter::from_fn(move || {
        let start = blocks.find(|&pba| is_wanted(pba))?;
        let mut count = 1;
        while blocks.next_if(|&pba| is_wanted(pba)).is_some() {
            count += 1;
        }
        Some(Run { start, count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_pieces_cover_what_is_wanted() {
        let part = Run { start: Pba::new(10), count: 20 };
        let wanted = |pba: Pba| pba.get() < 13 || (15..=22).contains(&pba.get());
        let found: Vec<_> = runs(part, wanted).map(|run| (run.start.get(), run.count)).collect();
        assert_eq!(found, [(10, 3), (15, 8)]);
        let run = Run { start: Pba::new(15), count: 8 };
        let found: Vec<_> = pieces(run, 3).map(|run| (run.start.get(), run.count)).collect();
        assert_eq!(found, [(15, 3), (18, 3), (21, 2)]);
    }
}

//! Reading what the published roots say: which blocks are in use, and which VDIs there are.

use std::rc::Rc;

use base::{ExtentIndex, Pba};
use blockstore::allocator::{BITMAP_PAGE_BLOCKS, Space};
use blockstore::table::{self, Named};
use ondisk::{DirectoryRecord, EntryState, ExtentRecord, RootRef};

use crate::Error;
use crate::directory::Directory;
use crate::engine::Engine;
use crate::mark::{BlockSet, PAGE_WORDS, words_of};
use crate::types::OpenReport;

impl Engine {
    /// Reads the control tables.
    pub(super) async fn load_tables(&self, report: &mut OpenReport) -> Result<(), Error> {
        self.load_space(report).await?;
        self.load_directory().await
    }

    async fn load_directory(&self) -> Result<(), Error> {
        let mut records = Vec::new();
        let root = self.roots.get().directory;
        table::scan(&self.nodes, &root, |_, record: DirectoryRecord| {
            records.push(Rc::new(record));
            true
        })
        .await?;
        let mut registry = self.registry.borrow_mut();
        registry.directory = Directory::new(records);
        // An id is never given twice, whatever the slot says.
        let last = registry.directory.last_id().unwrap_or_default();
        registry.id_next = registry.id_next.max(last.get() + 1);
        Ok(())
    }

    /// Reads which extents are in use and which of their blocks: truth as of the published roots.
    async fn load_space(&self, report: &mut OpenReport) -> Result<(), Error> {
        let roots = self.roots.get();
        let ring_end = self.log_start.plus(self.geometry.ring_blocks.saturating_sub(1));
        self.allocator.load_extent(ExtentIndex::new(0), ondisk::ExtentKind::System)?;
        let (first, last) =
            (self.geometry.extent_of(self.log_start), self.geometry.extent_of(ring_end));
        for extent in first.get()..=last.get() {
            self.allocator.load_extent(ExtentIndex::new(extent), ondisk::ExtentKind::Log)?;
        }
        let mut extents = Vec::new();
        table::scan(&self.nodes, &roots.extents, |index, record: ExtentRecord| {
            extents.push((index, record.kind));
            true
        })
        .await?;
        for (index, kind) in extents {
            let index = ExtentIndex::new(u32::try_from(index).unwrap_or(u32::MAX));
            self.allocator.load_extent(index, kind)?;
        }
        let mut own = Vec::new();
        let mut walk = table::Walk::new(&self.nodes, &roots.bitmaps, self.bitmap_pages());
        while let Some(named) = walk.next().await? {
            let (Named::Node(entry) | Named::Page(_, entry)) = named;
            own.push(entry.pba());
            if let Named::Page(index, entry) = named {
                let page = self.nodes.load(entry).await?;
                self.allocator.load_live_page(index, &page.block().0)?;
            }
        }
        for pba in own {
            if self.allocator.is_live(pba) {
                // They are released without a look at the bitmaps, which must not know them.
                let what = "allocation bitmap (it has its own blocks)";
                return Err(blockstore::Error::Damaged { what, at: pba }.into());
            }
            self.allocator.mark_busy(pba, 1, Space::Metadata)?;
        }
        if roots.marks.entry.state() == EntryState::Mapped && !self.read_only {
            self.load_marks(roots.marks).await;
        }
        let bad = self.load_bad_blocks(roots.bad_blocks).await?;
        if bad > 0 {
            report.alarms.push(format!("{bad} blocks were retired after failed writes"));
        }
        Ok(())
    }

    /// What a garbage collection had marked: of that, what the bitmaps have, too. What they do not may be
    /// allocated from now on.
    async fn load_marks(&self, root: RootRef) {
        if !self.collects_in_one_pass() {
            tracing::warn!(
                "a garbage collection starts over: it would take more memory than it may"
            );
            self.collector.store_marks(BlockSet::default());
            return;
        }
        let mut marked = BlockSet::default();
        let mut walk = table::Walk::new(&self.nodes, &root, self.bitmap_pages());
        loop {
            match walk.next_page().await {
                Ok(Some((index, page))) => {
                    let mut words = words_of(&page.block().0);
                    let live = self.allocator.live_page(index).filter(|(at, _)| *at == index);
                    let live = live.map_or([0; PAGE_WORDS], |(_, live)| *live);
                    if !base::mutant::active("gc_resumes_with_what_was_freed") {
                        words.iter_mut().zip(live).for_each(|(word, live)| *word &= live);
                    }
                    if words.iter().any(|&word| word != 0) {
                        marked.insert_page(index, &words);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "a garbage collection starts over");
                    marked = BlockSet::default();
                    break;
                }
            }
        }
        tracing::info!(blocks = marked.len(), "a garbage collection goes on where it was");
        self.collector.resume(marked);
    }

    /// Pages of bits that describe the store.
    pub(crate) fn bitmap_pages(&self) -> u64 {
        self.geometry.block_count.div_ceil(BITMAP_PAGE_BLOCKS)
    }

    async fn load_bad_blocks(&self, root: RootRef) -> Result<usize, Error> {
        let mut walk = table::Walk::new(&self.nodes, &root, self.bitmap_pages());
        let mut count = 0;
        while let Some((index, page)) = walk.next_page().await? {
            for (byte_index, byte) in (0u64..).zip(page.block().0) {
                for bit in (0..8u64).filter(|bit| byte & (1 << bit) != 0) {
                    let pba = Pba::new(index * BITMAP_PAGE_BLOCKS + byte_index * 8 + bit);
                    self.allocator.retire(pba)?;
                    self.nodes.give_up(pba);
                    count += 1;
                }
            }
        }
        Ok(count)
    }
}

//! Changes of a VDI as a whole: it becomes a copy of something, or is cut. Whether one happened that
//! nobody heard of again is decided when the store is opened.

use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64};

use super::block::{BlockModel, Floor};
use super::ops::{Moment, Serial};
use super::segments::{Content, Segments};
use super::{Contents, Model, VdiRef};
use crate::content::{Tag, check_belongs};

/// Behind every byte of a VDI.
const END: u64 = u64::MAX >> 1;

impl Contents {
    /// What was seen of whole blocks, by number. `None`: it cannot be told which writes made them.
    #[must_use]
    pub fn seen(empty: Self, layout: &super::Layout, blocks: &[(usize, Vec<u8>)]) -> Option<Self> {
        let mut contents = empty;
        for (slot, bytes) in blocks {
            let segments = Segments::seen(bytes);
            let mut rendered = [0; BLOCK_SIZE];
            segments.render(layout.lba(*slot), 0, &mut rendered);
            if rendered != **bytes || check_belongs(layout.lba(*slot), bytes).is_err() {
                return None;
            }
            Rc::make_mut(contents.blocks.get_mut(*slot)?).set(segments);
        }
        Some(contents)
    }

    /// What stands in a block, if that is certain.
    fn content(&self, slot: usize) -> Content {
        let settled = self.blocks.get(slot).and_then(|block| block.settled().cloned());
        settled.map_or(Content::Tag(Tag::ZERO), |segments| Content::Segments(Rc::new(segments)))
    }
}

impl Model {
    /// Making a VDI a copy of something of which everything is certain is asked for.
    pub fn begin_replace(&mut self, vdi: VdiRef, what: &'static str, from: &Contents) -> Serial {
        let serial = self.ops.begin(vdi.0, what, 0, END);
        self.change_blocks(vdi, serial, 0, END, |slot| from.content(slot));
        serial
    }

    /// Writing what a part of something else holds, all of which is certain, is asked for.
    pub fn begin_copy(&mut self, vdi: VdiRef, offset: u64, length: u64, from: &Contents) -> Serial {
        let serial = self.ops.begin(vdi.0, "copy", offset, length);
        self.change_blocks(vdi, serial, offset, offset + length, |slot| from.content(slot));
        serial
    }

    /// Cutting a VDI at `block_count` blocks is asked for.
    pub fn begin_shrink(&mut self, vdi: VdiRef, block_count: u64) -> Serial {
        let start = block_count * BLOCK_SIZE_U64;
        let serial = self.ops.begin(vdi.0, "shrink", start, END - start);
        self.change_blocks(vdi, serial, start, END, |_| Content::Tag(Tag::ZERO));
        serial
    }

    /// It turned out whether a change of the whole happened that nobody heard of again.
    pub fn decide(&mut self, vdi: VdiRef, serial: Serial, happened: bool) {
        let count = self.layout.slot_count();
        for slot in 0..count {
            let block = &mut self.vdi_mut(vdi).blocks[slot];
            if !block.is_settled() {
                Rc::make_mut(block).decide(serial, happened);
            }
        }
    }

    /// Whether what was seen of whole blocks of a VDI is legal if a change of the whole that nobody
    /// heard of again happened, or did not.
    #[must_use]
    pub fn could_have(
        &self,
        vdi: VdiRef,
        serial: Serial,
        happened: bool,
        seen: &[(usize, Vec<u8>)],
    ) -> bool {
        seen.iter().all(|(slot, bytes)| {
            let mut block = BlockModel::clone(&self.vdi(vdi).blocks[*slot]);
            block.decide(serial, happened);
            let lba = self.layout.lba(*slot);
            block.check(&self.ops, lba, 0, bytes, Floor::Before(Moment::NEVER)).is_ok()
        })
    }

    /// Whether a VDI may have been as one of its snapshots is, at some instant since `asked`. What is
    /// not certain of the snapshot is let pass.
    #[must_use]
    pub fn may_be_as(&self, vdi: VdiRef, number: u64, asked: Moment) -> bool {
        let vdi = self.vdi(vdi);
        let Some(snapshot) = vdi.snapshots.get(&number) else { return false };
        let mut blocks = vdi.blocks.iter().zip(&snapshot.blocks).enumerate();
        snapshot.block_count == vdi.block_count
            && blocks.all(|(slot, (block, then))| {
                let Some(then) = then.settled() else { return true };
                let lba = self.layout.lba(slot);
                let mut bytes = [0; BLOCK_SIZE];
                then.render(lba, 0, &mut bytes);
                block.check(&self.ops, lba, 0, &bytes, Floor::Before(asked)).is_ok()
            })
    }
}

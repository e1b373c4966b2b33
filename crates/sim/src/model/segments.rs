//! What a block holds, in terms of who wrote which bytes of it.

use std::rc::Rc;

use base::{BLOCK_SIZE, BLOCK_SIZE_U64};

use crate::content::{self, SECTOR_SIZE, Tag};

/// Length of a block as the offsets here count it.
pub const BLOCK_END: u16 = 4096;
const SECTOR_END: u16 = 512;
const _: () = assert!(BLOCK_END as usize == BLOCK_SIZE && SECTOR_END as usize == SECTOR_SIZE);

/// The bytes of a block by writer, in order, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments(Vec<Piece>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    end: u16,
    tag: Tag,
}

impl Segments {
    /// A block that one write filled, or zeroes.
    #[must_use]
    pub fn uniform(tag: Tag) -> Self {
        Self(vec![Piece { end: BLOCK_END, tag }])
    }

    /// A block as it was seen. Sectors that several writes have a part in cannot be told
    /// apart, and count as zeroes.
    #[must_use]
    pub fn seen(block: &[u8]) -> Self {
        let mut segments = Self::uniform(Tag::ZERO);
        let mut start = 0;
        for sector in block.chunks_exact(SECTOR_SIZE) {
            let end = (start + SECTOR_END).min(BLOCK_END);
            if let Some(origin) = content::identify(sector) {
                segments.overlay(start, end, &Content::Tag(origin.tag));
            }
            start = end;
        }
        segments
    }

    /// Puts what `content` holds in `start..end` over what is there.
    pub fn overlay(&mut self, start: u16, end: u16, content: &Content) {
        let mut pieces = Vec::with_capacity(self.0.len() + 2);
        let mut push = |end: u16, tag: Tag| match pieces.last_mut() {
            Some(Piece { end: last, tag: same }) if *same == tag => *last = end,
            Some(Piece { end: last, .. }) if *last >= end => {}
            _ if end == 0 => {}
            _ => pieces.push(Piece { end, tag }),
        };
        for piece in self.0.iter().take_while(|piece| piece.end <= start) {
            push(piece.end, piece.tag);
        }
        push(start, self.tag_at(start.saturating_sub(1)));
        match content {
            Content::Tag(tag) => push(end, *tag),
            Content::Segments(segments) => {
                for piece in segments.0.iter().filter(|piece| piece.end > start) {
                    push(piece.end.min(end), piece.tag);
                }
            }
        }
        for piece in self.0.iter().filter(|piece| piece.end > end) {
            push(piece.end, piece.tag);
        }
        self.0 = pieces;
    }

    /// Writes the bytes `start..start + into.len()` of the block `lba`.
    pub fn render(&self, lba: u64, start: u16, into: &mut [u8]) {
        let mut from = start;
        let mut rest = into;
        for piece in &self.0 {
            if rest.is_empty() {
                return;
            }
            let length = usize::from(piece.end.saturating_sub(from)).min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            if !now.is_empty() {
                content::fill(piece.tag, lba * BLOCK_SIZE_U64 + u64::from(from), now);
                from = piece.end;
            }
            rest = later;
        }
    }

    /// Who wrote this byte.
    #[must_use]
    pub fn tag_at(&self, byte: u16) -> Tag {
        self.0.iter().find(|piece| piece.end > byte).map_or(Tag::ZERO, |piece| piece.tag)
    }

    /// Where the writer changes.
    pub fn ends(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().map(|piece| piece.end)
    }

    /// Whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|piece| piece.tag == Tag::ZERO)
    }
}

/// What a change puts into a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// What one write makes, or zeroes.
    Tag(Tag),
    /// What the block held at some other time.
    Segments(Rc<Segments>),
}

impl Content {
    /// Writes the bytes `start..start + into.len()` of the block `lba`.
    pub fn render(&self, lba: u64, start: u16, into: &mut [u8]) {
        match self {
            Self::Tag(tag) => {
                content::fill(*tag, lba * BLOCK_SIZE_U64 + u64::from(start), into);
            }
            Self::Segments(segments) => segments.render(lba, start, into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn overlays_equal_overwriting_bytes() {
        let lba = 3;
        let mut random = Random::new(1);
        for _ in 0..200 {
            let mut segments = Segments::uniform(Tag::ZERO);
            let mut bytes = [0; BLOCK_SIZE];
            let mut older = Vec::new();
            for serial in 1..12 {
                let (one, two) = (random.below(4097), random.below(4097));
                let start = u16::try_from(one.min(two)).unwrap();
                let end = u16::try_from(one.max(two)).unwrap();
                let content = match random.below(4) {
                    0 => Content::Tag(Tag::ZERO),
                    1 if !older.is_empty() => {
                        Content::Segments(Rc::clone(&older[random.index(older.len())]))
                    }
                    _ => Content::Tag(Tag::new(1, serial)),
                };
                if start == end {
                    continue;
                }
                content.render(lba, start, &mut bytes[usize::from(start)..usize::from(end)]);
                segments.overlay(start, end, &content);
                older.push(Rc::new(segments.clone()));
                let mut rendered = [0; BLOCK_SIZE];
                segments.render(lba, 0, &mut rendered);
                assert!(rendered == bytes, "{segments:?} after {start}..{end} {content:?}");
                let mut part = vec![0; usize::from(end - start)];
                segments.render(lba, start, &mut part);
                assert!(part == bytes[usize::from(start)..usize::from(end)]);
            }
        }
    }
}

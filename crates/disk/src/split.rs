//! Requests larger than a disk takes at once, in pieces that are under way together.

use std::pin::Pin;
use std::task::{Context, Poll};

use crate::in_flight::{Outcome, Pending};
use crate::{Disk, REQUEST_BYTES_MAX, Request, Response};
use base::{BLOCK_SIZE, BLOCK_SIZE_U64};

/// The pieces of a range as `(offset, length)`. All but the first start at a block, so that an
/// unaligned request pays for that at its ends only.
pub fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut at = offset;
    let mut rest = length;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let into_block = usize::try_from(at % BLOCK_SIZE_U64).unwrap_or(0);
        let count = rest.min(REQUEST_BYTES_MAX - into_block);
        let piece = (at, count);
        at = at.saturating_add(count as u64);
        rest -= count;
        Some(piece)
    })
}

const _: () = assert!(REQUEST_BYTES_MAX >= 2 * BLOCK_SIZE);

/// Starts a read of any length.
pub fn read(disk: &dyn Disk, offset: u64, length: usize) -> Pending {
    if length <= REQUEST_BYTES_MAX {
        return disk.submit(Request::Read { offset, length });
    }
    let reads = pieces(offset, length).map(|(offset, length)| Request::Read { offset, length });
    together(disk, reads)
}

/// Starts several requests and waits for all of them. The data of reads is joined in order; the
/// first error in that order is the outcome, after all have ended.
pub fn together(disk: &dyn Disk, requests: impl Iterator<Item = Request>) -> Pending {
    let parts = requests.map(|request| Part::Pending(disk.submit(request))).collect();
    Box::pin(Together { parts })
}

struct Together {
    parts: Vec<Part>,
}

enum Part {
    Pending(Pending),
    Done(Outcome),
}

impl Future for Together {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let mut waiting = false;
        for part in &mut self.parts {
            if let Part::Pending(pending) = part {
                match pending.as_mut().poll(context) {
                    Poll::Ready(outcome) => *part = Part::Done(outcome),
                    Poll::Pending => waiting = true,
                }
            }
        }
        if waiting {
            return Poll::Pending;
        }
        Poll::Ready(join(std::mem::take(&mut self.parts)))
    }
}

fn join(parts: Vec<Part>) -> Outcome {
    let mut segments = Vec::new();
    for part in parts {
        if let Part::Done(outcome) = part
            && let Response::Data(more) = outcome?
        {
            segments.extend(more);
        }
    }
    Ok(if segments.is_empty() { Response::Done } else { Response::Data(segments) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_are_cut_at_blocks() {
        let cut = |offset, length| pieces(offset, length).collect::<Vec<_>>();
        let max = REQUEST_BYTES_MAX as u64;
        assert_eq!(cut(0, 0), []);
        assert_eq!(cut(5, 10), [(5, 10)]);
        assert_eq!(cut(8192, REQUEST_BYTES_MAX), [(8192, REQUEST_BYTES_MAX)]);
        assert_eq!(cut(4097, REQUEST_BYTES_MAX), [(4097, REQUEST_BYTES_MAX - 1), (4096 + max, 1)]);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range(offset in 0u64..1 << 40, length in 0usize..5 << 20) {
            let mut at = offset;
            for (start, count) in pieces(offset, length) {
                prop_assert_eq!(start, at);
                prop_assert!(count > 0 && count <= REQUEST_BYTES_MAX);
                prop_assert!(start == offset || start % BLOCK_SIZE_U64 == 0);
                at += count as u64;
            }
            prop_assert_eq!(at, offset + length as u64);
        }
    }
}

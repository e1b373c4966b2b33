//! From the outcome of a request to the bytes of its reply.

use base::ErrorKind;
use disk::in_flight::Outcome;
use disk::{Extent, ExtentState, ReadSegment, Response};
use runtime::socket::Segment;

use super::outbox::Outbox;
use crate::protocol::reply::{self, FLAG_DONE, Origin, kind};
use crate::protocol::{BASE_ALLOCATION_ID, Framing, STATE_HOLE, STATE_ZERO, error};

/// What the client expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Success or an error.
    Nothing,
    /// So many bytes, in one chunk if `dont_fragment`.
    Data { length: u32, dont_fragment: bool },
    /// Extents.
    Status,
}

/// Appends the reply to a request. `false` if it is an error.
pub(crate) fn push(
    outbox: &mut Outbox,
    origin: &Origin,
    expected: Expected,
    outcome: Outcome,
) -> bool {
    match (expected, outcome) {
        (_, Err(failure)) => {
            let error = error_number(failure.kind);
            push_error(outbox, origin, error, &failure.message);
            return false;
        }
        (Expected::Nothing, Ok(_)) => push_done(outbox, origin),
        (Expected::Data { length, dont_fragment }, Ok(Response::Data(segments)))
            if segments.iter().map(ReadSegment::len).sum::<usize>() as u64 == u64::from(length) =>
        {
            push_data(outbox, origin, length, dont_fragment, segments);
        }
        (Expected::Data { length: 0, .. }, Ok(_)) if origin.framing == Framing::Simple => {
            outbox.push_header(reply::simple(origin.cookie, 0).bytes());
        }
        (Expected::Data { length: 0, .. }, Ok(_)) => {
            outbox.push_header(reply::chunk(origin, FLAG_DONE, kind::NONE, 0).bytes());
        }
        (Expected::Status, Ok(Response::Extents(extents))) if !extents.is_empty() => {
            push_status(outbox, origin, &extents);
        }
        (Expected::Data { .. } | Expected::Status, Ok(_)) => {
            push_error(outbox, origin, error::EIO, "the disk gave an answer that does not fit");
            return false;
        }
    }
    true
}

/// Appends an error. A message goes with it where the framing has room for one.
pub(crate) fn push_error(outbox: &mut Outbox, origin: &Origin, error: u32, message: &str) {
    if origin.framing == Framing::Simple {
        outbox.push_header(reply::simple(origin.cookie, error).bytes());
        return;
    }
    let mut payload = Vec::new();
    reply::encode_error(error, message, &mut payload);
    push_chunk(outbox, origin, kind::ERROR, payload);
}

/// The error number for a kind. The protocol allows few, and asks for two of them to be kept for
/// what they are documented for.
fn error_number(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::Busy | ErrorKind::NotFound | ErrorKind::Exists => error::EIO,
        other => disk::errno(other),
    }
}

fn push_done(outbox: &mut Outbox, origin: &Origin) {
    if origin.framing == Framing::Extended {
        outbox.push_header(reply::chunk(origin, FLAG_DONE, kind::NONE, 0).bytes());
    } else {
        // Four bytes shorter than a chunk, and always allowed where there is no payload.
        outbox.push_header(reply::simple(origin.cookie, 0).bytes());
    }
}

fn push_data(
    outbox: &mut Outbox,
    origin: &Origin,
    length: u32,
    dont_fragment: bool,
    segments: Vec<ReadSegment>,
) {
    if origin.framing == Framing::Simple {
        outbox.push_header(reply::simple(origin.cookie, 0).bytes());
        return push_bytes(outbox, segments);
    }
    let all_zero = segments.iter().all(|segment| matches!(segment, ReadSegment::Zeroes(_)));
    let no_zero = segments.iter().all(|segment| matches!(segment, ReadSegment::Bytes(..)));
    if length == 0 {
        outbox.push_header(reply::chunk(origin, FLAG_DONE, kind::NONE, 0).bytes());
    } else if all_zero {
        outbox.push_header(reply::hole(origin, FLAG_DONE, origin.offset, length).bytes());
    } else if no_zero || dont_fragment {
        outbox.push_header(reply::data(origin, FLAG_DONE, origin.offset, length).bytes());
        push_bytes(outbox, segments);
    } else {
        push_chunks(outbox, origin, length, segments);
    }
}

/// Chunks of data and holes in turn.
fn push_chunks(outbox: &mut Outbox, origin: &Origin, length: u32, segments: Vec<ReadSegment>) {
    let end = origin.offset.saturating_add(u64::from(length));
    let mut at = origin.offset;
    let mut segments = segments.into_iter().filter(|segment| !segment.is_empty()).peekable();
    while let Some(first) = segments.next() {
        let zero = matches!(first, ReadSegment::Zeroes(_));
        let mut run = vec![first];
        while let Some(next) =
            segments.next_if(|next| matches!(next, ReadSegment::Zeroes(_)) == zero)
        {
            run.push(next);
        }
        let count = run.iter().map(ReadSegment::len).sum::<usize>();
        let next = at.saturating_add(count as u64);
        let flags = if next == end { FLAG_DONE } else { 0 };
        // `push` verified that the lengths add up to `length`.
        let count = u32::try_from(count).unwrap_or(length);
        if zero {
            outbox.push_header(reply::hole(origin, flags, at, count).bytes());
        } else {
            outbox.push_header(reply::data(origin, flags, at, count).bytes());
            push_bytes(outbox, run);
        }
        at = next;
    }
}

fn push_bytes(outbox: &mut Outbox, segments: Vec<ReadSegment>) {
    for segment in segments {
        match segment {
            ReadSegment::Bytes(slice, range) => outbox.push(Segment::Blocks(slice, range)),
            ReadSegment::Zeroes(length) => outbox.push_zeroes(length),
        }
    }
}

fn push_status(outbox: &mut Outbox, origin: &Origin, extents: &[Extent]) {
    let mut payload = Vec::new();
    let extents = extents.iter().map(|extent| (extent.length, state_bits(extent.state)));
    let kind = reply::encode_status(origin.framing, BASE_ALLOCATION_ID, extents, &mut payload);
    push_chunk(outbox, origin, kind, payload);
}

fn state_bits(state: ExtentState) -> u32 {
    match state {
        ExtentState::Data => 0,
        ExtentState::Zero => STATE_ZERO,
        ExtentState::Hole => STATE_HOLE | STATE_ZERO,
    }
}

fn push_chunk(outbox: &mut Outbox, origin: &Origin, kind: u16, payload: Vec<u8>) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    outbox.push_header(reply::chunk(origin, FLAG_DONE, kind, length).bytes());
    outbox.push(Segment::Bytes(payload));
}

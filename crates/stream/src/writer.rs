//! Makes the bytes of a stream.

use zerocopy::IntoBytes;

use crate::frame::{END, FRAME_HEADER_BYTES, Packed, RawFrame, ZEROES};
use crate::header::{Header, STREAM_HEADER_BYTES};

/// Makes one part after the other. Who calls it keeps the order of offsets: a reader refuses
/// anything else.
#[derive(Clone, Debug)]
pub struct Writer {
    checksum: u64,
    frame_count: u64,
    data_bytes: u64,
}

impl Writer {
    /// Begins a stream; also its first bytes.
    #[must_use]
    pub fn begin(header: &Header) -> (Self, [u8; STREAM_HEADER_BYTES]) {
        let (bytes, checksum) = header.encode();
        (Self { checksum, frame_count: 0, data_bytes: 0 }, bytes)
    }

    /// The header of a frame with data; its payload follows it.
    pub fn data(&mut self, packed: &Packed) -> [u8; FRAME_HEADER_BYTES] {
        self.data_bytes = self.data_bytes.saturating_add(packed.length as u64);
        self.next(RawFrame::of(packed))
    }

    /// A frame of zeroes.
    pub fn zeroes(&mut self, offset: u64, length: u64) -> [u8; FRAME_HEADER_BYTES] {
        self.next(RawFrame::bare(ZEROES, offset, length))
    }

    /// The end, with how much was before.
    #[must_use]
    pub fn end(mut self) -> [u8; FRAME_HEADER_BYTES] {
        self.next(RawFrame::bare(END, self.data_bytes, self.frame_count))
    }

    fn next(&mut self, mut raw: RawFrame) -> [u8; FRAME_HEADER_BYTES] {
        self.checksum = raw.chained(self.checksum);
        self.frame_count += 1;
        raw.checksum = self.checksum.into();
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }
}

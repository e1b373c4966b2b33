//! Reads a stream, and believes nothing of it that is not verified.

use std::io::{ErrorKind, Read};

use base::BLOCK_SIZE_U64;
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::FromBytes;

use crate::Error;
use crate::frame::{DATA, END, FRAME_HEADER_BYTES, Frame, Packed, RawFrame, ZEROES};
use crate::header::{Header, MAGIC, STREAM_HEADER_BYTES};

/// A stream whose header has been read.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    header: Header,
    checksum: u64,
    /// Where the last frame ended: the next one is behind it.
    at: u64,
    frame_count: u64,
    data_bytes: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header. Blocks as `input` does.
    ///
    /// # Errors
    /// If it is none, or could not be read.
    pub fn open(mut input: R) -> Result<Self, Error> {
        let mut bytes = [0; STREAM_HEADER_BYTES];
        let count = fill(&mut input, &mut bytes)?;
        let begins = bytes.iter().zip(&MAGIC).take(count).all(|(one, other)| one == other);
        if !begins {
            return Err(Error::NotAStream);
        }
        if count < bytes.len() {
            return Err(Error::Cut);
        }
        let (header, checksum) = Header::decode(&bytes)?;
        let at = header.start;
        Ok(Self { input, header, checksum, at, frame_count: 0, data_bytes: 0, ended: false })
    }

    /// What it carries.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next frame; `None` at the end, when all before has been what was sent.
    ///
    /// # Errors
    /// What was read is not what was sent, or could not be read. Nothing can be read behind it.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        if self.ended {
            return Ok(None);
        }
        let mut bytes = [0; FRAME_HEADER_BYTES];
        self.fill_whole(&mut bytes)?;
        let raw = RawFrame::ref_from_bytes(&bytes).map_err(|_| Error::Checksum("frame"))?;
        if raw.chained(self.checksum) != raw.checksum.get() {
            return Err(Error::Checksum("frame"));
        }
        self.checksum = raw.checksum.get();
        let (offset, length) = (raw.offset.get(), raw.length.get());
        let frame = match raw.kind {
            DATA => {
                self.check_place(offset, length)?;
                let (stored, encoding) = raw.stored()?;
                let mut payload = vec![0; stored];
                self.fill_whole(&mut payload)?;
                if xxh3_64(&payload) != raw.payload.get() {
                    return Err(Error::Checksum("data"));
                }
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                self.data_bytes = self.data_bytes.saturating_add(length as u64);
                Frame::Data(Packed { offset, length, encoding, payload })
            }
            ZEROES if raw.is_bare() => {
                self.check_place(offset, length)?;
                Frame::Zeroes { offset, length }
            }
            END if raw.is_bare() => return self.check_end(offset, length).map(|()| None),
            _ => return Err(Error::Invalid("a frame is of a kind that is not known")),
        };
        self.frame_count += 1;
        self.at = frame.end();
        Ok(Some(frame))
    }

    /// Frames are whole blocks, follow each other, and are on the disk.
    fn check_place(&self, offset: u64, length: u64) -> Result<(), Error> {
        let whole_blocks = [offset, length].iter().all(|it| it.is_multiple_of(BLOCK_SIZE_U64));
        let end = offset.checked_add(length).filter(|&end| end <= self.header.size_bytes);
        if !whole_blocks || length == 0 || offset < self.at || end.is_none() {
            return Err(Error::Invalid("a frame is where none can be"));
        }
        Ok(())
    }

    /// The end says how much was before, and nothing is behind it.
    fn check_end(&mut self, data_bytes: u64, frame_count: u64) -> Result<(), Error> {
        if (data_bytes, frame_count) != (self.data_bytes, self.frame_count) {
            return Err(Error::Invalid("its end does not belong to what is before"));
        }
        if fill(&mut self.input, &mut [0])? > 0 {
            return Err(Error::Trailing);
        }
        self.ended = true;
        Ok(())
    }

    fn fill_whole(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        if fill(&mut self.input, bytes)? < bytes.len() { Err(Error::Cut) } else { Ok(()) }
    }
}

/// Reads until `bytes` are full or the input ends; how many there were.
fn fill(input: &mut impl Read, bytes: &mut [u8]) -> Result<usize, Error> {
    let mut count = 0;
    while let Some(rest) = bytes.get_mut(count..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Io(error)),
        }
    }
    Ok(count)
}

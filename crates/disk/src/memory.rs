//! A disk in memory: the model of what every disk must do.

use std::cell::{Cell, RefCell};

use base::{BlockSlice, Buffer, ErrorKind};

use crate::{
    Disk, DiskError, Extent, ExtentState, Identity, LocalBoxFuture, ReadSegment, Request, Response,
};

/// Contents in a `Vec`, everything durable at once. Reports all-zero blocks as holes.
pub struct MemDisk {
    bytes: RefCell<Vec<u8>>,
    read_only: bool,
    severed: Cell<bool>,
}

impl MemDisk {
    /// A zeroed disk of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; size_bytes]),
            read_only: false,
            severed: Cell::new(false),
        }
    }

    /// A read-only disk with these contents.
    #[must_use]
    pub fn read_only(bytes: Vec<u8>) -> Self {
        Self { bytes: RefCell::new(bytes), read_only: true, severed: Cell::new(false) }
    }

    /// Ends the disk, as a deletion does.
    pub fn sever(&self) {
        self.severed.set(true);
    }

    pub(crate) fn execute(&self, request: Request) -> Result<Response, DiskError> {
        if self.severed.get() {
            return Err(DiskError::new(ErrorKind::Fenced, "the disk is gone"));
        }
        let (offset, length, writes) = match &request {
            Request::Flush => return Ok(Response::Done),
            Request::Read { offset, length } => (*offset, as_u64(*length), false),
            Request::Write { offset, length, .. } => (*offset, as_u64(*length), true),
            Request::Discard { offset, length, .. }
            | Request::WriteZeroes { offset, length, .. } => (*offset, *length, true),
            Request::Cache { offset, length } | Request::BlockStatus { offset, length, .. } => {
                (*offset, *length, false)
            }
        };
        if writes && self.read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let out_of_range = DiskError::new(ErrorKind::Invalid, "the range ends beyond the disk");
        let start = usize::try_from(offset).map_err(|_| out_of_range.clone())?;
        let length = usize::try_from(length).map_err(|_| out_of_range.clone())?;
        let mut bytes = self.bytes.borrow_mut();
        let end = start.checked_add(length).ok_or_else(|| out_of_range.clone())?;
        let range = bytes.get_mut(start..end).ok_or(out_of_range)?;
        Ok(match request {
            Request::Read { .. } => {
                let buffer = Buffer::from_bytes(range);
                let slice = BlockSlice::whole(std::rc::Rc::new(buffer));
                Response::Data(vec![ReadSegment::Bytes(slice, 0..length)])
            }
            Request::Write { data, .. } => {
                for (to, from) in range.iter_mut().zip(data.bytes()) {
                    *to = *from;
                }
                Response::Done
            }
            Request::Discard { .. } | Request::WriteZeroes { .. } => {
                range.fill(0);
                Response::Done
            }
            Request::BlockStatus { extents_max, .. } => {
                Response::Extents(extents(range, start, extents_max))
            }
            Request::Flush | Request::Cache { .. } => Response::Done,
        })
    }
}

fn extents(range: &[u8], start: usize, extents_max: usize) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    // The first piece ends at a block boundary of the disk, not of the range.
    let head = (base::BLOCK_SIZE - start % base::BLOCK_SIZE).min(range.len());
    let (first, rest) = range.split_at(head);
    for piece in std::iter::once(first).chain(rest.chunks(base::BLOCK_SIZE)) {
        let hole = piece.iter().all(|&byte| byte == 0);
        let state = if hole { ExtentState::Hole } else { ExtentState::Data };
        let full = extents.len() == extents_max;
        match extents.last_mut() {
            Some(last) if last.state == state => last.length += as_u64(piece.len()),
            _ if full => break,
            _ => extents.push(Extent { length: as_u64(piece.len()), state }),
        }
    }
    extents
}

fn as_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

impl Disk for MemDisk {
    fn serial(&self) -> String {
        "memory".to_owned()
    }

    fn identity(&self) -> Identity {
        Identity::default()
    }

    fn size_bytes(&self) -> u64 {
        as_u64(self.bytes.borrow().len())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn severed(&self) -> bool {
        self.severed.get()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let outcome = self.execute(request);
        Box::pin(std::future::ready(outcome))
    }
}

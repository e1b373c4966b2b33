//! Reading, judging and repairing the superblock.

use std::rc::Rc;

use base::{BlockSlice, ErrorKind, Pba};
use device::{Device, DeviceError};
use ondisk::{
    DecodeError, KNOWN_INCOMPATIBLE, KNOWN_READ_ONLY_COMPATIBLE, SUPERBLOCK_COPIES, Superblock,
};
use runtime::Runtime;

use crate::Error;

/// A superblock, and which copies of it are damaged.
#[derive(Clone, Debug)]
pub struct Found {
    /// What the store is.
    pub superblock: Superblock,
    /// Copies to be written again.
    pub damaged: Vec<Pba>,
}

/// Reads the superblock from whichever copy is intact.
///
/// # Errors
/// `NotFound` if there is no store; `Damaged` if both copies are; `Unsupported` for a newer format
/// or an incompatible feature; `ReadOnly` for a feature that forbids writing if `writable`.
pub async fn read(device: &Device, runtime: &Runtime, writable: bool) -> Result<Found, Error> {
    let mut intact: Option<Superblock> = None;
    let mut damaged = Vec::new();
    let mut worst = DecodeError::Magic;
    let mut absent = false;
    let mut unreadable = None;
    for at in SUPERBLOCK_COPIES {
        match read_copy(device, runtime, at).await {
            Ok(superblock) => match &intact {
                Some(first) if *first != superblock => damaged.push(at),
                Some(_) => {}
                None => intact = Some(superblock),
            },
            Err(Unusable::Read(error)) => {
                unreadable = Some(error);
                damaged.push(at);
            }
            Err(Unusable::Contents(error)) => {
                match error {
                    DecodeError::Magic => absent = true,
                    _ => worst = error,
                }
                damaged.push(at);
            }
        }
    }
    if let (None, Some(error)) = (&intact, unreadable) {
        return Err(error.into());
    }
    let Some(superblock) = intact else {
        return Err(match worst {
            DecodeError::Magic => {
                Error::refused(ErrorKind::NotFound, "neither copy of a superblock is there")
            }
            // The primary is written last (rule 44): without it, a torn secondary is what a format
            // that was cut short leaves.
            DecodeError::Checksum if absent => Error::refused(
                ErrorKind::NotFound,
                "formatting it was cut short, or both copies of its superblock were destroyed",
            ),
            DecodeError::Checksum => {
                Error::Damaged { what: "superblock (all copies)", at: Pba::new(0) }
            }
            DecodeError::Invalid(what) => Error::refused(
                ErrorKind::Unsupported,
                format!("the store's {what} is not one that this version of Parallax knows"),
            ),
        });
    };
    judge(&superblock, device.block_count(), writable)?;
    Ok(Found { superblock, damaged })
}

fn judge(superblock: &Superblock, block_count: u64, writable: bool) -> Result<(), Error> {
    let features = superblock.features;
    let unknown = features.incompatible & !KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        return Err(Error::refused(
            ErrorKind::Unsupported,
            format!(
                "the store uses incompatible features {unknown:#x}: a newer Parallax is needed"
            ),
        ));
    }
    let unknown = features.read_only_compatible & !KNOWN_READ_ONLY_COMPATIBLE;
    if unknown != 0 && writable {
        return Err(Error::refused(
            ErrorKind::Unsupported,
            format!("the store uses features {unknown:#x} that this version can only read"),
        ));
    }
    if superblock.block_count > block_count {
        return Err(Error::refused(
            ErrorKind::Corrupt,
            format!(
                "the device has {block_count} blocks, but the store needs {}: it was truncated",
                superblock.block_count
            ),
        ));
    }
    Ok(())
}

/// Why a copy is of no use.
enum Unusable {
    Read(DeviceError),
    Contents(DecodeError),
}

async fn read_copy(device: &Device, runtime: &Runtime, at: Pba) -> Result<Superblock, Unusable> {
    if at.get() >= device.block_count() {
        return Err(Unusable::Contents(DecodeError::Magic));
    }
    let read = device.read(at, 1, runtime.buffers().take(1)).await;
    let buffer = read.map_err(Unusable::Read)?;
    let decoded = buffer
        .blocks()
        .first()
        .map_or(Err(DecodeError::Magic), |block| Superblock::decode(block, at));
    decoded.map_err(Unusable::Contents)
}

/// Writes the given copies, each durable before the next (design rule 44), in the given order.
///
/// # Errors
/// If the device fails.
pub async fn write(device: &Device, superblock: &Superblock, copies: &[Pba]) -> Result<(), Error> {
    for &at in copies {
        let block = BlockSlice::whole(Rc::new(superblock.encode(at)));
        device.write(at, vec![block]).await?;
        device.flush().await?;
    }
    Ok(())
}

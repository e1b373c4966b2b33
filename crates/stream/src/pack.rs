//! Compression: one frame at a time, so that several threads can do it and no frame needs another.

use zstd::bulk::{Compressor, Decompressor};

use crate::Error;
use crate::frame::{Encoding, FRAME_DATA_BYTES_MAX, Packed};

/// The least that zstd does.
pub const LEVEL_MIN: i32 = 1;

/// The most that zstd does.
pub const LEVEL_MAX: i32 = 19;

/// What is done unless another level is asked for: the quickest, as most streams are for once.
pub const LEVEL_DEFAULT: i32 = 1;

/// Compresses, or does not.
pub struct Packer {
    compressor: Option<Compressor<'static>>,
}

impl Packer {
    /// One that compresses at `level`; without a level it does not.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(level: Option<i32>) -> std::io::Result<Self> {
        Ok(Self { compressor: level.map(Compressor::new).transpose()? })
    }

    /// Packs a run of at most [`FRAME_DATA_BYTES_MAX`] bytes; as it is if that is no longer.
    pub fn pack(&mut self, offset: u64, data: Vec<u8>) -> Packed {
        let length = data.len();
        let packed = self.compressor.as_mut().and_then(|it| it.compress(&data).ok());
        match packed.filter(|packed| packed.len() < length) {
            Some(payload) => Packed { offset, length, encoding: Encoding::Zstd, payload },
            None => Packed { offset, length, encoding: Encoding::Plain, payload: data },
        }
    }
}

/// Undoes what a [`Packer`] did.
pub struct Unpacker {
    decompressor: Decompressor<'static>,
}

impl Unpacker {
    /// A new one.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { decompressor: Decompressor::new()? })
    }

    /// The bytes of the disk.
    ///
    /// # Errors
    /// `Invalid` if they are not as many as they should be.
    pub fn unpack(&mut self, packed: Packed) -> Result<Vec<u8>, Error> {
        match packed.encoding {
            Encoding::Plain => Ok(packed.payload),
            Encoding::Zstd => {
                let mut data = vec![0; packed.length.min(FRAME_DATA_BYTES_MAX)];
                let to = data.as_mut_slice();
                let count = self.decompressor.decompress_to_buffer(&packed.payload, to);
                match count {
                    Ok(count) if count == packed.length => Ok(data),
                    _ => Err(Error::Invalid("a frame cannot be uncompressed")),
                }
            }
        }
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packer({})", if self.compressor.is_some() { "zstd" } else { "plain" })
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

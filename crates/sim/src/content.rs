//! What clients write: every 512-byte sector says which VDI, which place and which write it comes
//! from, so that a wrong one tells where it came from, and no two writes are alike.

use base::{BLOCK_SIZE, BLOCK_SIZE_U64};

use crate::model::Divergence;
use crate::random::mix;

/// Bytes of a sector: what a torn write keeps or loses.
pub const SECTOR_SIZE: usize = 512;

/// [`SECTOR_SIZE`] as `u64`.
pub const SECTOR_SIZE_U64: u64 = 512;

/// Sectors per block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_SIZE / SECTOR_SIZE;

const MAGIC: u64 = 0x5061_7261_6c6c_6178; // "Parallax"

/// Names the write that bytes come from; the place is part of the bytes. `ZERO` for zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u64);

impl Tag {
    /// Zero bytes, written or never written.
    pub const ZERO: Self = Self(0);

    /// The write `serial` (from 1, counted over the run) to the VDI numbered `vdi` by the model.
    #[must_use]
    pub fn new(vdi: u32, serial: u32) -> Self {
        Self((u64::from(vdi) << 32) | u64::from(serial))
    }

    /// The model's number of the VDI that was written.
    #[must_use]
    pub fn vdi(self) -> u64 {
        self.0 >> 32
    }

    /// The write's number.
    #[must_use]
    pub fn serial(self) -> u64 {
        self.0 & 0xffff_ffff
    }
}

/// A sector that some client once wrote in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The write.
    pub tag: Tag,
    /// Its place in the VDI, in sectors.
    pub sector: u64,
}

/// The sector `sector` of a VDI as the write `tag` makes it.
#[must_use]
pub fn sector_bytes(tag: Tag, sector: u64) -> [u8; SECTOR_SIZE] {
    let mut bytes = [0; SECTOR_SIZE];
    if tag == Tag::ZERO {
        return bytes;
    }
    let seed = mix(tag.0 ^ mix(sector));
    for (index, word) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
        let value = match index {
            0 => MAGIC,
            1 => tag.0,
            2 => sector,
            _ => seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Fills `into` with what the write `tag` puts at byte `offset` of a VDI.
pub fn fill(tag: Tag, offset: u64, into: &mut [u8]) {
    if tag == Tag::ZERO {
        into.fill(0);
        return;
    }
    let mut at = offset;
    let mut rest = into;
    while !rest.is_empty() {
        let skip = crate::random::to_usize(at % SECTOR_SIZE_U64);
        let length = (SECTOR_SIZE - skip).min(rest.len());
        let (now, later) = rest.split_at_mut(length);
        now.copy_from_slice(&sector_bytes(tag, at / SECTOR_SIZE_U64)[skip..skip + length]);
        at += crate::random::to_u64(length);
        rest = later;
    }
}

/// Who wrote this sector, if it is one of ours and whole.
#[must_use]
pub fn identify(sector: &[u8]) -> Option<Origin> {
    let word = |index: usize| {
        sector.get(index * 8..index * 8 + 8)?.try_into().ok().map(u64::from_le_bytes)
    };
    let origin = Origin { tag: Tag(word(1)?), sector: word(2)? };
    let whole = word(0)? == MAGIC && sector == sector_bytes(origin.tag, origin.sector);
    whole.then_some(origin)
}

/// The block of a VDI that a block on the device holds data of, if its first intact sector says so.
#[must_use]
pub fn identify_lba(block: &[u8]) -> Option<u64> {
    block
        .chunks_exact(SECTOR_SIZE)
        .find_map(identify)
        .map(|origin| origin.sector * SECTOR_SIZE_U64 / BLOCK_SIZE_U64)
}

/// Checks that every sector of the block `lba` is zeroes or was written there by somebody.
/// Sectors that several writes have a part in cannot be judged.
///
/// # Errors
/// If a sector belongs elsewhere.
pub fn check_belongs(lba: u64, block: &[u8]) -> Result<(), Divergence> {
    for (sector, bytes) in (lba * 8..).zip(block.chunks_exact(SECTOR_SIZE)) {
        match identify(bytes) {
            Some(origin) if origin.sector != sector => {
                return Err(Divergence(format!(
                    "block {lba}, sector {sector} holds {}",
                    describe(bytes)
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Says what a sector holds, for people.
#[must_use]
pub fn describe(sector: &[u8]) -> String {
    if sector.iter().all(|&byte| byte == 0) {
        return "zeroes".to_owned();
    }
    match identify(sector) {
        Some(origin) => format!(
            "write {} of VDI {} at sector {}",
            origin.tag.serial(),
            origin.tag.vdi(),
            origin.sector
        ),
        None => {
            let head: Vec<String> =
                sector.iter().take(24).map(|byte| format!("{byte:02x}")).collect();
            format!("bytes that no write made, or a mix ({}...)", head.concat())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_where_it_comes_from() {
        let tag = Tag::new(3, 77);
        let sector = sector_bytes(tag, 1234);
        assert_eq!(identify(&sector), Some(Origin { tag, sector: 1234 }));
        let mut torn = sector;
        torn[300] ^= 1;
        assert_eq!(identify(&torn), None);
        assert_eq!(describe(&[0; SECTOR_SIZE]), "zeroes");
    }

    #[test]
    fn parts_of_a_write_are_parts_of_its_sectors() {
        let tag = Tag::new(1, 2);
        let mut whole = vec![0; 3 * SECTOR_SIZE];
        fill(tag, 5 * SECTOR_SIZE_U64, &mut whole);
        let mut part = vec![0; 700];
        fill(tag, 5 * SECTOR_SIZE_U64 + 100, &mut part);
        assert_eq!(part, whole[100..800]);
    }
}

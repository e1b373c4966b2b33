//! Makes every checksum of a damaged store right again, so that what lies behind them is reached:
//! the store then looks as if software, not the medium, had written nonsense.

use std::collections::HashSet;

use base::{BLOCK_SIZE, Block, Epoch, HostId, Pba};
use blockstore::Geometry;
use ondisk::{
    Checksums, HOST_SLOT_LAYOUT, HostSlot, LOG_BLOCK_LAYOUT, Layout, SNAPSHOT_LAYOUT,
    SUPERBLOCK_COPIES, StructureKind, Superblock, VDI_LAYOUT, VERSION_LAYOUT,
};

use crate::ram::Ram;

const ENTRY_BYTES: usize = 16;
const RECORD_BYTES: usize = 256;

/// The one host that there is.
const HOST: HostId = HostId::new(0);

/// What a tree's leaves name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Contents {
    Data,
    /// Pages without references.
    Pages,
    Vdis,
    Snapshots,
    Versions,
}

/// Where everything of a store stands.
pub struct Sealer {
    geometry: Geometry,
    checksums: Checksums,
    /// Blocks that were sealed, or are being sealed.
    visited: HashSet<Pba>,
}

/// What a store's blocks are, before anything happens to it.
pub struct Anatomy {
    /// Superblock and slot copies, heartbeat.
    pub fixed: Vec<Pba>,
    /// Log blocks.
    pub log: Vec<Pba>,
    /// Nodes, pages and data that the trees reach.
    pub reached: Vec<Pba>,
}

fn field(layout: &Layout, name: &str) -> usize {
    layout.fields.iter().find(|field| field.name == name).expect("a field of that name").offset
}

fn word(block: &Block, at: usize) -> u64 {
    block.0[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Sealer {
    /// For a store whose superblock is intact.
    pub fn new(ram: &Ram) -> Option<Self> {
        let [primary, _] = SUPERBLOCK_COPIES;
        let superblock = Superblock::decode(&ram.block(primary), primary).ok()?;
        Some(Self {
            geometry: Geometry::new(&superblock),
            checksums: Checksums::new(superblock.uuid, &superblock.key),
            visited: HashSet::new(),
        })
    }

    /// Seals both copies of the superblock.
    pub fn superblocks(ram: &Ram) {
        for at in SUPERBLOCK_COPIES {
            ram.change(at, |block| {
                let uuid = block.0[field(&ondisk::SUPERBLOCK_LAYOUT, "uuid")..].first_chunk();
                let uuid = base::StoreUuid(*uuid.expect("it is in the block"));
                let checksums = Checksums::new(uuid, &[0; 32]);
                checksums.seal(StructureKind::Superblock, at, Epoch::new(0), 0, block);
            });
        }
    }

    /// Seals everything else.
    pub fn all(&mut self, ram: &Ram) {
        for copy in 0..2 {
            let at = self.geometry.host_slot(HOST, copy);
            let mut slot = ram.block(at);
            if !slot.0.starts_with(b"PXhs") {
                continue;
            }
            for (name, contents) in [
                ("directory", Contents::Pages),
                ("extents", Contents::Pages),
                ("vdis", Contents::Vdis),
                ("bitmaps", Contents::Pages),
                ("bad_blocks", Contents::Pages),
                ("marks", Contents::Pages),
            ] {
                self.root(ram, &mut slot, field(&HOST_SLOT_LAYOUT, name), contents);
            }
            let kind = StructureKind::HostSlot;
            self.checksums.seal(kind, at, Epoch::new(0), 0, &mut slot);
            if let Ok(slot) = HostSlot::decode(&slot, &self.checksums, at) {
                self.log(ram, &slot);
            }
            ram.change(at, |block| *block = slot);
        }
        let at = self.geometry.heartbeat(HOST);
        let kind = StructureKind::Heartbeat;
        if ram.block(at).0.starts_with(b"PXhb") {
            ram.change(at, |block| self.checksums.seal(kind, at, Epoch::new(0), 0, block));
        }
    }

    /// Seals a tree whose root reference stands in `block`, and the reference.
    fn root(&mut self, ram: &Ram, block: &mut Block, at: usize, contents: Contents) {
        let height = block.0[at + 24];
        let entry = &mut block.0[at..at + ENTRY_BYTES];
        if let Some(hash) = self.entry(ram, entry, height, contents) {
            block.0[at + 16..at + 24].copy_from_slice(&hash.to_le_bytes());
        }
    }

    /// Seals what an entry names, and the entry. `level` is 0 for what a leaf names.
    fn entry(&mut self, ram: &Ram, entry: &mut [u8], level: u8, contents: Contents) -> Option<u64> {
        const MAPPED: u8 = 2;
        let pba = u64::from_le_bytes([entry[0], entry[1], entry[2], entry[3], entry[4], 0, 0, 0]);
        let pba = Pba::new(pba);
        if entry[5] & 3 != MAPPED || pba.get() >= ram.block_count() || level > ondisk::HEIGHT_MAX {
            return None;
        }
        // A block that names itself, over whatever detour, can have no hash that is right.
        if self.visited.insert(pba) && (level > 0 || contents != Contents::Data) {
            let mut block = ram.block(pba);
            if level > 0 {
                for child in block.0.chunks_exact_mut(ENTRY_BYTES) {
                    self.entry(ram, child, level - 1, contents);
                }
            } else {
                self.page(ram, &mut block, contents);
            }
            ram.change(pba, |stored| *stored = block);
        }
        let hash = self.checksums.block(&ram.block(pba).0);
        entry[10..].copy_from_slice(&hash.to_le_bytes()[..6]);
        Some(hash)
    }

    fn page(&mut self, ram: &Ram, page: &mut Block, contents: Contents) {
        let fields: &[(usize, Contents)] = match contents {
            Contents::Vdis => &[
                (field(&VDI_LAYOUT, "root"), Contents::Data),
                (field(&VDI_LAYOUT, "snapshots"), Contents::Snapshots),
                (field(&VDI_LAYOUT, "ledger"), Contents::Pages),
            ],
            Contents::Snapshots => &[
                (field(&SNAPSHOT_LAYOUT, "root"), Contents::Data),
                (field(&SNAPSHOT_LAYOUT, "versions"), Contents::Versions),
            ],
            Contents::Versions => {
                let entry = field(&VERSION_LAYOUT, "entry");
                for version in page.0.chunks_exact_mut(VERSION_LAYOUT.size) {
                    self.entry(ram, &mut version[entry..entry + ENTRY_BYTES], 0, Contents::Data);
                }
                return;
            }
            Contents::Data | Contents::Pages => return,
        };
        for record in (0..BLOCK_SIZE).step_by(RECORD_BYTES) {
            for &(offset, contents) in fields {
                self.root(ram, page, record + offset, contents);
            }
        }
    }

    /// Seals the blocks that look like the segment's, and chains them.
    fn log(&mut self, ram: &Ram, slot: &HostSlot) {
        for segment in &slot.segments {
            let mut chain = segment.chain;
            let mut position = segment.start;
            for _ in 0..self.geometry.ring_blocks.min(64) {
                let at = self.geometry.log_block(slot.log_start, position);
                let block = ram.block(at);
                let is_own = block.0.starts_with(b"PXlg")
                    && word(&block, field(&LOG_BLOCK_LAYOUT, "epoch")) == segment.epoch.get()
                    && word(&block, field(&LOG_BLOCK_LAYOUT, "position")) == position.get();
                if at.get() >= ram.block_count() || !is_own {
                    break;
                }
                chain = ram.change(at, |block| {
                    let previous = field(&LOG_BLOCK_LAYOUT, "previous");
                    block.0[previous..previous + 8].copy_from_slice(&chain.to_le_bytes());
                    let (kind, epoch) = (StructureKind::LogBlock, segment.epoch);
                    self.checksums.seal(kind, at, epoch, segment.nonce, block);
                    word(block, BLOCK_SIZE - 8)
                });
                position = position.plus(1);
            }
        }
    }
}

impl Anatomy {
    /// Of a store that is whole.
    pub fn of(ram: &Ram) -> Self {
        // Sealing changes nothing there, but visits everything.
        let ram = ram.fork();
        let mut sealer = Sealer::new(&ram).expect("the superblock is intact");
        sealer.all(&ram);
        assert!(!ram.written().into_iter().any(|at| ram.is_changed(at)), "sealing is idempotent");
        let geometry = &sealer.geometry;
        let mut fixed = SUPERBLOCK_COPIES.to_vec();
        fixed.extend((0..2).map(|copy| geometry.host_slot(HOST, copy)));
        fixed.push(geometry.heartbeat(HOST));
        let is_log = |at: &Pba| ram.block(*at).0.starts_with(b"PXlg");
        let log = ram.written().into_iter().filter(is_log).collect();
        let mut reached: Vec<Pba> = sealer.visited.into_iter().collect();
        reached.sort_unstable();
        Self { fixed, log, reached }
    }
}

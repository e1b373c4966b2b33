//! What stands on a store, as lines of text for people: superblock, slots, log, tables, trees.
//!
//! Reads only, and only what is asked for; damage is shown where it stands and stops nothing that
//! does not lie below it. Shows what is published: what the log adds to it, [`Dump::log`] lists.
//! The lines are for reading, not for parsing: they may change with any version.

use base::{BLOCK_SIZE_U64, ErrorKind, HostId, Lsn, SnapshotNumber, StoreUuid};
use blockstore::log::survey;
use blockstore::slots::{SlotPair, read_slots};
use blockstore::{Geometry, NodeStore, WriteScheduler, superblock, table, tree};
use device::Device;
use ondisk::{
    Checksums, DecodeError, DirectoryRecord, Entry, EntryState, ExtentRecord, Heartbeat, History,
    HostSlot, LedgerRecord, LogBlock, Record, RecordBody, RootRef, SUPERBLOCK_COPIES, SlotState,
    SnapshotRecord, Superblock, Until, VdiRecord, VersionRecord,
};
use runtime::Runtime;

use crate::mark::{BlockSet, words_of};
use crate::retention::Retention;
use crate::{Error, Target};

/// The one host that there is today.
const HOST: HostId = HostId::new(0);

/// Memory for nodes that are met again.
const CACHE_BYTES: usize = 4 << 20;

/// Takes one line after the other.
pub type Lines<'a> = &'a mut dyn FnMut(String);

/// A store that is looked at. Nobody may write it meanwhile.
#[derive(Debug)]
pub struct Dump {
    device: Device,
    runtime: Runtime,
    superblock: superblock::Found,
    geometry: Geometry,
    checksums: Checksums,
    nodes: NodeStore,
}

/// A tree that is shown, with the history and the position of a snapshot that has no other.
struct Shown {
    root: RootRef,
    history: Option<(History, Lsn)>,
}

impl Dump {
    /// Begins to look at the store on `device`.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Unsupported` if there is no superblock to start from.
    pub async fn open(device: &Device, runtime: &Runtime) -> Result<Self, Error> {
        let superblock = superblock::read(device, runtime, false).await?;
        let geometry = Geometry::new(&superblock.superblock);
        let checksums = Checksums::new(superblock.superblock.uuid, &superblock.superblock.key);
        let scheduler = WriteScheduler::new(runtime.clone(), device.clone());
        let nodes = NodeStore::new(
            runtime.clone(),
            device.clone(),
            scheduler,
            checksums.clone(),
            CACHE_BYTES,
        );
        let (device, runtime) = (device.clone(), runtime.clone());
        Ok(Self { device, runtime, superblock, geometry, checksums, nodes })
    }

    /// The superblock and the state of its copies. Does not show the checksum key.
    pub fn superblock(&self, line: Lines<'_>) {
        for at in SUPERBLOCK_COPIES {
            let damaged = self.superblock.damaged.contains(&at);
            let state = if damaged { "damaged" } else { "intact" };
            line(format!("superblock copy at block {at}: {state}"));
        }
        let Superblock {
            uuid,
            key: _,
            features,
            block_count,
            extent_blocks,
            log_ring_blocks,
            host_slots_start,
            host_slot_count,
            lock_slots_start,
            lock_slot_count,
            created_ns,
        } = &self.superblock.superblock;
        line(format!("uuid {uuid}"));
        line(format!(
            "features: compatible {:#x}, read-only compatible {:#x}, incompatible {:#x}",
            features.compatible, features.read_only_compatible, features.incompatible
        ));
        line(format!(
            "{block_count} blocks ({}), extents of {extent_blocks} blocks ({}), log rings of \
             {log_ring_blocks} blocks ({})",
            human(*block_count),
            human(*extent_blocks),
            human(*log_ring_blocks)
        ));
        line(format!(
            "{host_slot_count} host slots from block {host_slots_start}, {lock_slot_count} lock \
             slots from block {lock_slots_start}"
        ));
        line(format!("created {}", time(*created_ns)));
    }

    /// Both copies of the host slot, and the heartbeat.
    ///
    /// # Errors
    /// Device errors.
    pub async fn slots(&self, line: Lines<'_>) -> Result<(), Error> {
        for copy in 0..2 {
            let at = self.geometry.host_slot(HOST, copy);
            match self.block(at).await?.map(|block| HostSlot::decode(&block, &self.checksums, at)) {
                Some(Ok(slot)) => show_slot(&slot, copy, at, line),
                Some(Err(DecodeError::Magic)) | None => {
                    line(format!("host slot {HOST}, copy {copy} at block {at}: none"));
                }
                Some(Err(error)) => {
                    line(format!("host slot {HOST}, copy {copy} at block {at}: {error}"));
                }
            }
        }
        let at = self.geometry.heartbeat(HOST);
        let beat = self.block(at).await?;
        match beat.map(|block| Heartbeat::decode(&block, &self.checksums, at)) {
            Some(Ok(beat)) => line(format!(
                "heartbeat at block {at}: epoch {}, sequence {}, boot {}, {}",
                beat.epoch,
                beat.sequence,
                StoreUuid(beat.boot_id),
                time(beat.wall_ns)
            )),
            Some(Err(error)) => line(format!("heartbeat at block {at}: {error}")),
            None => line(format!("heartbeat at block {at}: none")),
        }
        Ok(())
    }

    /// The log that the newest slot names: blocks and their records, in order, and where it ends.
    ///
    /// # Errors
    /// `Corrupt` if no slot is intact; device errors.
    pub async fn log(&self, line: Lines<'_>) -> Result<(), Error> {
        let slot = self.newest().await?.newest;
        line(format!(
            "ring of {} blocks from block {}; the roots contain everything up to record {}",
            self.geometry.ring_blocks, slot.log_start, slot.cut
        ));
        let geometry = &self.geometry;
        let mut see = |segment: &ondisk::LogSegment, block: &LogBlock| {
            show_log_block(
                segment,
                block,
                geometry.log_block(slot.log_start, block.position),
                line,
            );
        };
        let (log, broken) = survey(
            &self.device,
            &self.runtime,
            geometry,
            slot.log_start,
            &self.checksums,
            &slot.segments,
            &mut see,
        )
        .await?;
        line(format!(
            "the log ends before position {}, next record {}, F {}",
            log.end, log.lsn_next, log.durable
        ));
        if let Some(broken) = broken {
            line(format!(
                "damaged at block {} ({}): record {} is missing, records up to {} were durable",
                broken.at, broken.what, broken.lsn, broken.durable
            ));
        }
        Ok(())
    }

    /// All VDIs with their records and snapshots.
    ///
    /// # Errors
    /// `Corrupt` if no slot is intact, or a table is damaged; device errors.
    pub async fn vdis(&self, line: Lines<'_>) -> Result<(), Error> {
        let roots = self.newest().await?.newest.roots;
        let mut names = Vec::new();
        table::scan(&self.nodes, &roots.directory, |_, record: DirectoryRecord| {
            names.push(record);
            true
        })
        .await?;
        for record in names {
            line(format!(
                "VDI {} {:?}: parent {}@{}, claim {} of host {}, created {}",
                record.id,
                record.name,
                record.parent,
                record.parent_snapshot,
                record.claim,
                record.owner,
                time(record.created_ns)
            ));
            let vdi = table::get::<VdiRecord>(&self.nodes, &roots.vdis, record.id.get()).await;
            match vdi {
                Ok(Some(vdi)) => self.show_vdi(&vdi, line).await,
                Ok(None) => line("  has no record in the VDI table".to_owned()),
                Err(error) => line(format!("  its record cannot be read: {error}")),
            }
        }
        Ok(())
    }

    async fn show_vdi(&self, vdi: &VdiRecord, line: Lines<'_>) {
        line(format!(
            "  {} blocks ({}), root {}, up to record {}, label {}, shared up to {}, snapshots: {} \
             in {}, next {}",
            vdi.block_count,
            human(vdi.block_count),
            root(&vdi.root),
            vdi.lsn,
            vdi.label,
            vdi.shared_up_to,
            vdi.snapshot_count,
            root(&vdi.snapshots),
            vdi.snapshot_next
        ));
        let shown = table::scan(&self.nodes, &vdi.snapshots, |_, snapshot: SnapshotRecord| {
            line(format!(
                "  @{} {:?}: position {}, {} blocks, root {}{}, {}{}",
                snapshot.number,
                snapshot.label,
                snapshot.position,
                snapshot.block_count,
                root(&snapshot.root),
                snapshot.history.map_or_else(String::new, |history| format!(
                    " with {} versions in {}",
                    history.count,
                    root(&history.versions)
                )),
                time(snapshot.wall_ns),
                if snapshot.is_held { ", held" } else { "" }
            ));
            true
        });
        if let Err(error) = shown.await {
            line(format!("  its snapshots cannot be read: {error}"));
        }
        self.show_ledger(vdi, line).await;
    }

    async fn show_ledger(&self, vdi: &VdiRecord, line: Lines<'_>) {
        if vdi.ledger_count == 0 {
            return;
        }
        line(format!(
            "  ledger: {} records in {}, head {}",
            vdi.ledger_count,
            root(&vdi.ledger),
            vdi.ledger_head
        ));
        let mut left = vdi.ledger_count;
        let shown = table::scan(&self.nodes, &vdi.ledger, |_, record: LedgerRecord| {
            line(format!(
                "  {} {:?} @{}{}, {}: digest {}, chain {}",
                record.sequence,
                record.kind,
                record.number,
                record.until.map_or_else(String::new, shown_until),
                time(record.wall_ns),
                record.digest,
                record.chain
            ));
            left = left.saturating_sub(1);
            left > 0
        });
        if let Err(error) = shown.await {
            line(format!("  its ledger cannot be read: {error}"));
        }
    }

    /// The tree of a VDI or snapshot: nodes from the root down, what leaves map, in order.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` if what leads to the tree is damaged; device errors.
    pub async fn tree(&self, target: &Target, line: Lines<'_>) -> Result<(), Error> {
        let Shown { root, history } = self.find(target).await?;
        if let Some((history, position)) = history {
            line(format!("{target}: what has a version below {position} is in no tree:"));
            let versions =
                table::scan(&self.nodes, &history.versions, |_, version: VersionRecord| {
                    let VersionRecord { block, lsn, entry } = version;
                    line(format!("  block {block} since {lsn}: {entry:?}"));
                    true
                });
            if let Err(error) = versions.await {
                line(format!("  its history cannot be read: {error}"));
            }
        }
        line(format!("{target}: height {}, root {}", root.height, self::root(&root)));
        let mut shown = BlockSet::default();
        let mut stack = vec![(root.entry, root.height, 0u64)];
        while let Some((entry, height, start)) = stack.pop() {
            let end = start + tree::span(height) - 1;
            let indent = "  ".repeat(usize::from(root.height - height) + 1);
            if entry.state() != EntryState::Mapped {
                line(format!("{indent}blocks {start} to {end}: {entry:?}"));
                continue;
            }
            if !shown.insert(entry.pba()) {
                line(format!("{indent}blocks {start} to {end}: node {entry:?} once more"));
                continue;
            }
            let node = match self.nodes.load(entry).await {
                Ok(node) => node,
                Err(error) => {
                    line(format!("{indent}blocks {start} to {end}: node {entry:?}: {error}"));
                    continue;
                }
            };
            let level = height - 1;
            line(format!("{indent}blocks {start} to {end}: level {level} node {entry:?}"));
            let width = tree::span(level);
            let entries = (0u64..).zip(node.entries()).map(|(slot, entry)| (slot * width, entry));
            if level == 0 {
                show_leaf(start, entries, &indent, line);
                continue;
            }
            let children: Vec<_> = entries
                .filter(|(_, entry)| entry.state() != EntryState::Unmapped)
                .map(|(offset, entry)| (entry, level, start + offset))
                .collect();
            stack.extend(children.into_iter().rev());
        }
        Ok(())
    }

    async fn find(&self, target: &Target) -> Result<Shown, Error> {
        let not_found =
            || Error::refused(ErrorKind::NotFound, format!("{target} is not in the tables"));
        let roots = self.newest().await?.newest.roots;
        let mut id = None;
        table::scan(&self.nodes, &roots.directory, |_, record: DirectoryRecord| {
            id = (record.name == target.vdi).then_some(record.id);
            id.is_none()
        })
        .await?;
        let id = id.ok_or_else(not_found)?;
        let vdi = table::get::<VdiRecord>(&self.nodes, &roots.vdis, id.get()).await?;
        let vdi = vdi.ok_or_else(not_found)?;
        let Some(wanted) = &target.snapshot else {
            return Ok(Shown { root: vdi.root, history: None });
        };
        let number = wanted.parse().ok().map(SnapshotNumber::new);
        let (mut by_label, mut by_number) = (None, None);
        table::scan(&self.nodes, &vdi.snapshots, |_, snapshot: SnapshotRecord| {
            let history = snapshot.history.map(|history| (history, snapshot.position));
            let shown = Shown { root: snapshot.root, history };
            if snapshot.label == *wanted {
                by_label = Some(shown);
            } else if Some(snapshot.number) == number {
                by_number = Some(shown);
            }
            by_label.is_none()
        })
        .await?;
        by_label.or(by_number).ok_or_else(not_found)
    }

    /// What each extent in use holds.
    ///
    /// # Errors
    /// As [`Self::vdis`].
    pub async fn extents(&self, line: Lines<'_>) -> Result<(), Error> {
        let slot = self.newest().await?.newest;
        line(format!(
            "{} extents of {} blocks; 0 is the system's; the log rings begin at block {}",
            self.geometry.extent_count(),
            self.geometry.extent_blocks,
            slot.log_start
        ));
        table::scan(&self.nodes, &slot.roots.extents, |index, record: ExtentRecord| {
            line(format!(
                "extent {index}: {:?}, of host {} since epoch {}",
                record.kind, record.owner, record.epoch
            ));
            true
        })
        .await?;
        Ok(())
    }

    /// How many blocks each page of the bitmaps, and of the bad blocks, has.
    ///
    /// # Errors
    /// As [`Self::vdis`].
    pub async fn bitmaps(&self, line: Lines<'_>) -> Result<(), Error> {
        let roots = self.newest().await?.newest.roots;
        for (title, what, root) in
            [("bitmap", "in use", roots.bitmaps), ("bad blocks", "retired", roots.bad_blocks)]
        {
            let mut shown = BlockSet::default();
            let mut stack = vec![(root.entry, root.height, 0u64)];
            while let Some((entry, height, start)) = stack.pop() {
                if entry.state() != EntryState::Mapped {
                    continue;
                }
                if !shown.insert(entry.pba()) {
                    line(format!("{title} page {start}: {entry:?} once more"));
                    continue;
                }
                let node = match self.nodes.load(entry).await {
                    Ok(node) => node,
                    Err(error) => {
                        line(format!("{title} page {start}: {error}"));
                        continue;
                    }
                };
                if height == 0 {
                    let words = words_of(&node.block().0);
                    let count: u32 = words.iter().map(|word| word.count_ones()).sum();
                    let bits = BLOCK_SIZE_U64 * 8;
                    let (first, last) = (start * bits, (start + 1) * bits - 1);
                    line(format!(
                        "{title} page {start} at block {}: {count} of blocks {first} to {last} \
                         {what}",
                        entry.pba()
                    ));
                    continue;
                }
                let width = tree::span(height - 1);
                let children = (0u64..).zip(node.entries());
                let children: Vec<_> = children
                    .map(|(slot, entry)| (entry, height - 1, start + slot * width))
                    .collect();
                stack.extend(children.into_iter().rev());
            }
        }
        Ok(())
    }

    async fn newest(&self) -> Result<SlotPair, Error> {
        let pair =
            read_slots(&self.device, &self.runtime, &self.geometry, &self.checksums, HOST).await;
        Ok(pair?)
    }

    async fn block(&self, at: base::Pba) -> Result<Option<base::Block>, Error> {
        let buffer = self.device.read(at, 1, self.runtime.buffers().take(1)).await;
        let buffer = buffer.map_err(blockstore::Error::from)?;
        Ok(buffer.blocks().first().cloned())
    }
}

fn human(blocks: u64) -> base::size::HumanBytes {
    base::size::HumanBytes(blocks.saturating_mul(BLOCK_SIZE_U64))
}

/// RFC 3339 in UTC, to the nanosecond that is stored.
fn time(ns_since_1970: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(ns_since_1970)) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{ns_since_1970} ns after 1970"),
    }
}

fn shown_until(until: Until) -> String {
    format!(" until {} and {} ns of store time", time(until.wall_ns), until.store_ns)
}

fn root(root: &RootRef) -> String {
    format!("{:?} of height {}", root.entry, root.height)
}

fn show_slot(slot: &HostSlot, copy: u64, at: base::Pba, line: Lines<'_>) {
    let state = match slot.state {
        SlotState::Free => "free",
        SlotState::Clean => "closed cleanly",
        SlotState::Running => "running, or left by a crash",
    };
    line(format!(
        "host slot {}, copy {copy} at block {at}: sequence {}, {state}, epoch {}, ballot {}",
        slot.host, slot.sequence, slot.epoch, slot.ballot
    ));
    line(format!(
        "  contains records up to {}; next VDI {}; {}, open for {} ns",
        slot.cut,
        slot.vdi_id_next,
        time(slot.wall_ns),
        slot.store_ns
    ));
    let roots = &slot.roots;
    for (title, tree) in [
        ("directory", &roots.directory),
        ("extents", &roots.extents),
        ("vdis", &roots.vdis),
        ("bitmaps", &roots.bitmaps),
        ("bad blocks", &roots.bad_blocks),
        ("marks", &roots.marks),
    ] {
        line(format!("  {title}: {}", root(tree)));
    }
    for segment in &slot.segments {
        let end = match segment.last_lsn.get() {
            0 => "open".to_owned(),
            last => format!("sealed after record {last}"),
        };
        line(format!(
            "  log segment of epoch {}: from position {}, record {}, {end}",
            segment.epoch, segment.start, segment.first_lsn
        ));
    }
}

fn show_log_block(segment: &ondisk::LogSegment, block: &LogBlock, at: base::Pba, line: Lines<'_>) {
    line(format!(
        "position {} at block {at}: epoch {}, {} records from {}, F {}, slot sequence {}, cut {}",
        block.position,
        block.epoch,
        block.records.len(),
        block.first_lsn,
        block.durable,
        block.slot_sequence,
        block.cut
    ));
    let mut lsn = block.first_lsn;
    for record in &block.records {
        let sealed = segment.last_lsn.get() > 0 && lsn > segment.last_lsn;
        let note = if sealed { " (behind the seal: does not count)" } else { "" };
        line(format!("  {lsn} VDI {}: {}{note}", record.vdi, describe(record)));
        lsn = lsn.plus(1);
    }
}

fn describe(record: &Record) -> String {
    match &record.body {
        RecordBody::Write { lba, pba, hashes } => {
            format!("write {} blocks at {lba} to block {pba}", hashes.len())
        }
        RecordBody::Range { lba, count, state } => {
            format!("range of {count} blocks at {lba} becomes {state:?}").to_lowercase()
        }
        RecordBody::Void { lsn } => format!("void record {lsn}"),
        RecordBody::Snapshot { number, label, wall_ns, .. } => {
            format!("snapshot {number} {label:?}, {}", time(*wall_ns))
        }
        RecordBody::Retain { rules: None } => "retain what the store does".to_owned(),
        RecordBody::Retain { rules: Some(rules) } => {
            format!("retain {}", Retention::new(rules.clone()))
        }
        RecordBody::RetainByDefault { rules } => {
            format!("retain {} by default", Retention::new(rules.clone()))
        }
        RecordBody::Hold { number, until, .. } => {
            format!("hold @{number}{}", until.map_or_else(String::new, shown_until))
        }
        RecordBody::EndHold { number, is_due, .. } => {
            format!("end hold of @{number}{}", if *is_due { ", which is due" } else { "" })
        }
        RecordBody::DeleteSnapshot { number } => format!("delete snapshot {number}"),
        RecordBody::Create { block_count, name, .. } => {
            format!("create {name:?} with {block_count} blocks")
        }
        RecordBody::Clone { source, snapshot, position, name, .. } => {
            format!("clone of VDI {source}@{snapshot}{} as {name:?}", shown_position(*position))
        }
        RecordBody::Rename { name } => format!("rename to {name:?}"),
        RecordBody::Resize { block_count } => format!("resize to {block_count} blocks"),
        RecordBody::Delete => "delete".to_owned(),
        RecordBody::Rollback { number, position } => {
            format!("roll back to snapshot {number}{}", shown_position(*position))
        }
        RecordBody::Adopt { source, number } => format!("becomes VDI {source}@{number}"),
        RecordBody::Time { wall_ns, store_ns } => {
            format!("time: {}, open for {store_ns} ns", time(*wall_ns))
        }
    }
}

/// Where before a snapshot something starts.
fn shown_position(position: Option<Lsn>) -> String {
    position.map_or_else(String::new, |position| format!(" at position {position}"))
}

/// Entries of a leaf, adjacent blocks as one line.
fn show_leaf(
    start: u64,
    entries: impl Iterator<Item = (u64, Entry)>,
    indent: &str,
    line: Lines<'_>,
) {
    let entries: Vec<_> = entries.map(|(offset, entry)| (start + offset, entry)).collect();
    let continues = |(_, a): &(u64, Entry), (_, b): &(u64, Entry)| match a.state() {
        EntryState::Mapped => {
            b.state() == EntryState::Mapped && a.pba().plus(1) == b.pba() && a.birth() == b.birth()
        }
        _ => a == b,
    };
    for run in entries.chunk_by(continues) {
        let (Some((first, entry)), Some((last, _))) = (run.first(), run.last()) else { continue };
        match (entry.state(), run.len()) {
            (EntryState::Unmapped, _) => {}
            (EntryState::Mapped, 1) => line(format!("{indent}  {first}: {entry:?}")),
            (EntryState::Mapped, _) => {
                let (from, birth) = (entry.pba(), entry.birth());
                let to = from.plus(last - first);
                line(format!("{indent}  {first} to {last}: {from} to {to} (born {birth})"));
            }
            _ => line(format!("{indent}  {first} to {last}: {entry:?}")),
        }
    }
}

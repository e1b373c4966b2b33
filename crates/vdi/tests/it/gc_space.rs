//! What a garbage collection counts, against what the device says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use base::{Pba, SnapshotNumber};
use ondisk::{
    Entry, EntryState, History, Origin, RootRef, SnapshotRecord, TableRecord, VdiRecord,
    VersionRecord,
};
use parallax_vdi::{GcReport, OpenOptions, Retention, Store, Target};
use runtime::Runtime;

use crate::check::{Anatomy, assert_sound};
use crate::ram::{Ram, run};
use crate::{STORE_BLOCKS, disk, format_options, open_options, write};

/// What trees name, walked without any regard to what was walked before.
#[derive(Default)]
struct Walked {
    blocks: BTreeSet<Pba>,
    leaves: Vec<Entry>,
}

impl Walked {
    fn tree(&mut self, anatomy: &Anatomy, root: &RootRef) {
        if root.entry.state() != EntryState::Mapped {
            return;
        }
        let mut level = vec![root.entry];
        self.blocks.insert(root.entry.pba());
        for _ in 0..root.height {
            level = level.into_iter().flat_map(|node| anatomy.entries(node)).collect();
            self.blocks.extend(level.iter().map(|entry| entry.pba()));
        }
        self.leaves.extend(level);
    }

    /// The records of a table; its blocks are added.
    fn table<R: TableRecord>(&mut self, anatomy: &Anatomy, root: &RootRef) -> Vec<R> {
        let mut walked = Self::default();
        walked.tree(anatomy, root);
        self.blocks.extend(walked.blocks);
        let page = |entry| {
            let node = anatomy.node(entry);
            let records = node.block().0.chunks_exact(R::BYTES).take(R::PER_PAGE as usize);
            records.filter_map(|bytes| R::decode(bytes).unwrap()).collect::<Vec<R>>()
        };
        walked.leaves.into_iter().flat_map(page).collect()
    }

    /// What a snapshot sees of its history: of each block the newest version below its position, and all
    /// that its writes made.
    fn history(&mut self, anatomy: &Anatomy, snapshot: &SnapshotRecord, history: &History) {
        let versions: Vec<VersionRecord> = self.table(anatomy, &history.versions);
        let mut of_block: BTreeMap<u64, Vec<VersionRecord>> = BTreeMap::new();
        for version in versions {
            of_block.entry(version.block).or_default().push(version);
        }
        let from = snapshot.writes_from.unwrap_or(snapshot.position);
        for versions in of_block.into_values() {
            let below = |position| versions.iter().filter(|it| it.lsn < position).count();
            let seen = below(from).saturating_sub(1)..below(snapshot.position);
            let mapped = |it: &&VersionRecord| it.entry.state() == EntryState::Mapped;
            self.blocks.extend(versions[seen].iter().filter(mapped).map(|it| it.entry.pba()));
        }
    }
}

/// What the past of a VDI holds: snapshots that are wanted, and moments.
type Pasts = BTreeMap<u64, (u64, u64)>;

/// Counted from the device: blocks that heads reach, those that snapshots alone hold, how many of these
/// are their table's, and whose they are.
fn counted(ram: &Ram) -> (u64, u64, u64, Pasts) {
    let anatomy = Anatomy::of(ram);
    let (mut heads, mut of_snapshots) = (Walked::default(), Walked::default());
    let mut tables = BTreeSet::new();
    let mut of_vdis = Vec::new();
    let vdis: Vec<VdiRecord> = Walked::default().table(&anatomy, &anatomy.slot().roots.vdis);
    assert!(vdis.len() > 3, "{} VDIs", vdis.len());
    for vdi in vdis {
        heads.tree(&anatomy, &vdi.root);
        let mut table = Walked::default();
        let snapshots: Vec<SnapshotRecord> = table.table(&anatomy, &vdi.snapshots);
        tables.extend(&table.blocks);
        let (mut wanted, mut moments) = (Walked::default(), Walked::default());
        match snapshots.iter().any(is_moment) {
            true => moments.blocks.extend(table.blocks),
            false => wanted.blocks.extend(table.blocks),
        }
        for snapshot in snapshots {
            let is_mere_moment = is_moment(&snapshot) && !snapshot.is_held;
            let walked = if is_mere_moment { &mut moments } else { &mut wanted };
            walked.tree(&anatomy, &snapshot.root);
            if let Some(history) = &snapshot.history {
                walked.history(&anatomy, &snapshot, history);
            }
        }
        of_snapshots.blocks.extend(wanted.blocks.union(&moments.blocks));
        of_vdis.push((vdi.id.get(), [wanted.blocks, moments.blocks]));
    }
    let mut known = heads.blocks.clone();
    let mut fresh = |blocks: BTreeSet<Pba>| {
        blocks.into_iter().filter(|&block| known.insert(block)).count() as u64
    };
    let pasts = of_vdis.into_iter().map(|(id, blocks)| {
        let [wanted, moments] = blocks.map(&mut fresh);
        (id, (wanted, moments))
    });
    let pasts = pasts.collect();
    of_snapshots.blocks.extend(&tables);
    let alone = of_snapshots.blocks.difference(&heads.blocks).count();
    (heads.blocks.len() as u64, alone as u64, tables.len() as u64, pasts)
}

fn is_moment(snapshot: &SnapshotRecord) -> bool {
    matches!(snapshot.origin, Origin::Kept { .. })
}

/// As [`counted`], by the store.
async fn told(store: &Store) -> Pasts {
    let told = store.list(None, usize::MAX).await.unwrap().into_iter().map(|vdi| {
        let past = vdi.past.expect("it was counted");
        let blocks = |bytes: u64| bytes / base::BLOCK_SIZE_U64;
        (vdi.id.get(), (blocks(past.snapshots_bytes), blocks(past.moments_bytes)))
    });
    told.collect()
}

/// Disks with snapshots, moments, writes that are kept, clones, and garbage.
async fn fill(runtime: &Runtime, store: &Store) {
    for (name, rules) in [("plain", None), ("web01", Some("1s for 1h"))]
        .into_iter()
        .chain([("db01", Some("every write for 10m, 1s for 1h")), ("gone", None)])
    {
        store.create(name, 64 << 20).await.unwrap();
        if let Some(rules) = rules {
            store.retain(name, Retention::parse(rules).unwrap()).await.unwrap();
        }
    }
    for round in 1..=12u8 {
        for name in ["plain", "web01", "db01", "gone"] {
            let head = disk(store, name).await;
            for index in 0..30u64 {
                let offset = (index * u64::from(round)) % 41;
                write(&head, offset << 18, &[round; 20_480]).await;
            }
            head.submit(disk::Request::Flush).await.unwrap();
            if round % 3 == 1 {
                store.snapshot(name, Some(&format!("s{round}"))).await.unwrap();
            }
        }
        runtime.sleep(Duration::from_millis(1100)).await;
        if round % 4 == 0 {
            store.checkpoint().await.unwrap();
        }
    }
    for (origin, name) in [("plain@s4", "clone"), ("web01@s7", "other"), ("gone@s1", "heir")] {
        store.clone_vdi(&Target::parse(origin), name).await.unwrap();
        write(&disk(store, name).await, 0, &[99; 65_536]).await;
    }
    let moments = store.snapshots("db01", SnapshotNumber::new(0), usize::MAX).await.unwrap();
    let held = moments.iter().filter(|it| it.changed_bytes.is_some()).nth(3).unwrap();
    store.hold("db01", &held.number.to_string(), None).await.unwrap();
    store.remove(&Target::parse("gone")).await.unwrap();
    store.remove(&Target::parse("plain@s1")).await.unwrap();
}

async fn opened(ram: &Ram, runtime: &Runtime, gc_memory_bytes: u64, nonce: u64) -> Store {
    let options = OpenOptions { gc_memory_bytes, ..open_options(nonce) };
    Store::open(ram.device(STORE_BLOCKS), runtime.clone(), &options).await.unwrap().0
}

fn check(gc_memory_bytes: u64) -> GcReport {
    let ram = Ram::default();
    let device = ram.clone();
    let (report, pasts) = run(1, move |runtime| async move {
        Store::format(&device.device(STORE_BLOCKS), &runtime, &format_options()).await.unwrap();
        let store = opened(&device, &runtime, gc_memory_bytes, 1).await;
        fill(&runtime, &store).await;
        let before_ns = runtime.wall_ns();
        assert_eq!(store.info("web01").await.unwrap().past, None);
        let report = store.collect_garbage().await.unwrap();
        let space = report.space.expect("it began anew");
        assert!((before_ns..=runtime.wall_ns()).contains(&space.wall_ns), "{space:?}");
        assert_eq!(store.info("web01").await.unwrap().past.unwrap().wall_ns, space.wall_ns);
        let pasts = told(&store).await;
        store.close().await.unwrap();
        (report, pasts)
    });
    let space = report.space.unwrap();
    let (heads, snapshots, tables_of_snapshots, expected) = counted(&ram);
    assert_eq!(pasts, expected);
    let busy = pasts.values().filter(|&&(wanted, moments)| wanted > 30 && moments > 30).count();
    assert_eq!(busy, 2, "{pasts:?}");
    assert_eq!(pasts.values().map(|(wanted, moments)| wanted + moments).sum::<u64>(), snapshots);
    assert_eq!((space.heads_blocks, space.snapshots_blocks), (heads, snapshots), "{report:?}");
    assert!(heads > 500 && snapshots > 500, "{report:?}");
    assert_eq!(space.garbage_blocks, report.freed_blocks);
    assert!(space.garbage_blocks > 100, "{report:?}");
    assert_eq!(heads + snapshots + space.tables_blocks, report.reached_blocks);
    assert!((4..50).contains(&space.tables_blocks), "{report:?}");

    // All of that comes back if all snapshots and moments are deleted; checkpoints free their tables.
    let device = ram.clone();
    let (freed, left) = run(2, move |runtime| async move {
        let store = opened(&device, &runtime, gc_memory_bytes, 2).await;
        for name in ["plain", "web01", "db01"] {
            let all = store.snapshots(name, SnapshotNumber::new(0), usize::MAX).await.unwrap();
            for snapshot in all {
                if snapshot.hold.is_some() {
                    store.release_hold(name, &snapshot.number.to_string()).await.unwrap();
                }
                let target = format!("{name}@{}", snapshot.number);
                store.remove(&Target::parse(&target)).await.unwrap();
            }
        }
        let freed = store.collect_garbage().await.unwrap().freed_blocks;
        let left = store.collect_garbage().await.unwrap().space.unwrap();
        store.close().await.unwrap();
        (freed, left)
    });
    assert_eq!(freed + tables_of_snapshots, snapshots);
    let left = (left.heads_blocks, left.snapshots_blocks, left.garbage_blocks);
    assert_eq!(left, (heads, 0, 0));
    assert_sound(&ram, 0);
    report
}

#[test]
fn a_collection_tells_what_heads_and_snapshots_hold() {
    let report = check(1 << 20);
    assert_eq!(report.passes, 1, "{report:?}");
}

/// A node is counted in the pass in whose section it lies, and in no other.
#[test]
fn passes_count_what_one_would() {
    let report = check(0);
    assert!(report.passes > 4, "{report:?}");
}

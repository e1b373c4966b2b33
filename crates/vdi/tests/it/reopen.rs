//! What opening a store makes of what it finds.

use base::Lba;
use ondisk::{RangeState, RecordBody};

use crate::check::forge_record;
use crate::{disk, read, reopened, with_store, write};

/// A record is bounded by what a VDI can have at most, but this one has a single block: cut into
/// subtrees of its size, the range was 2^40 pieces.
#[test]
fn a_forged_range_ends_where_the_disk_does() {
    let (ram, ()) = with_store(|_, store| async move {
        store.create("web01", 4096).await.unwrap();
        write(&disk(&store, "web01").await, 0, &[1; 4096]).await;
    });
    let range = RecordBody::Range { lba: Lba::new(0), count: 1 << 40, state: RangeState::Unmapped };
    forge_record(&ram, 1, range);
    reopened(&ram, |_, store, report| async move {
        assert!(report.records_replayed == 3, "{report:?}");
        assert_eq!(read(&disk(&store, "web01").await, 0, 4096).await, [0; 4096]);
        store.close().await.unwrap();
    });
}

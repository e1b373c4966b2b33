//! Mutants of the engine: switches that break one rule each (`base::mutant`), and the proof that
//! the simulator catches every one of them.

use crate::focus::Focus;

/// A switch, and the rule that it breaks.
#[derive(Clone, Copy, Debug)]
pub struct Mutant {
    /// Name of the switch in the engine.
    pub name: &'static str,
    /// Rule of the design that it breaks.
    pub rule: &'static str,
    /// What the engine does instead.
    pub breaks: &'static str,
    /// What runs that look for it are about: where it does harm. All seeds get there now and then.
    pub focus: Option<Focus>,
}

/// All mutants, in the order of the rules.
pub const ALL: &[Mutant] = &[
    Mutant {
        name: "ack_own_log_block_only",
        rule: "1",
        breaks: "acknowledges a write when its own log block is there, whatever became of those before",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "recovery_stops_at_bad_data",
        rule: "2",
        breaks: "drops every record behind the first whose data does not verify",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "durable_runs_ahead",
        rule: "3",
        breaks: "notes a durable point that the flush did not cover",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "flush_joins_one_under_way",
        rule: "4",
        breaks: "lets a flush request join a device flush that was issued before",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "recovery_trusts_data",
        rule: "3",
        breaks: "keeps records above the durable point without verifying their data",
        focus: None,
    },
    Mutant {
        name: "fua_without_flush",
        rule: "5",
        breaks: "acknowledges a write with FUA that no flush covered",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "log_rewrites_last_block",
        rule: "6",
        breaks: "writes a marker of the durable point over the last block of the log",
        focus: None,
    },
    Mutant {
        name: "dropped_records_come_back",
        rule: "7",
        breaks: "seals the log of an older epoch behind what recovery dropped",
        focus: None,
    },
    Mutant {
        name: "failed_write_counts",
        rule: "10",
        breaks: "leaves the record of a failed data write in the log",
        focus: Some(Focus::WriteErrors),
    },
    Mutant {
        name: "last_completed_wins",
        rule: "11",
        breaks: "lets changes of one block install themselves as they complete",
        focus: None,
    },
    Mutant {
        name: "changes_overlap",
        rule: "12",
        breaks: "does not serialise changes of one block",
        focus: None,
    },
    Mutant {
        name: "release_before_publication",
        rule: "17",
        breaks: "frees replaced blocks before the checkpoint that replaces them is there",
        focus: Some(Focus::Copies),
    },
    Mutant {
        name: "release_at_own_publication",
        rule: "18",
        breaks: "frees replaced blocks when the newer slot only is past them",
        focus: Some(Focus::Copies),
    },
    Mutant {
        name: "tail_follows_newer_slot",
        rule: "18",
        breaks: "trims the log by the newer slot",
        focus: Some(Focus::Laps),
    },
    Mutant {
        name: "release_ignores_readers",
        rule: "19",
        breaks: "frees blocks under readers that looked them up before",
        focus: Some(Focus::SlowReads),
    },
    Mutant {
        name: "trim_returns_blocks_early",
        rule: "20",
        breaks: "lets blocks be written while they are being discarded",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "checkpoint_ignores_in_flight",
        rule: "22",
        breaks: "merges mappings whose data is still on the way",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "cut_runs_ahead",
        rule: "22",
        breaks: "publishes a cut above what the checkpoint contains",
        focus: Some(Focus::Slots),
    },
    Mutant {
        name: "checkpoint_ignores_failed_writes",
        rule: "23",
        breaks: "publishes trees of which a write failed",
        focus: Some(Focus::WriteErrors),
    },
    Mutant {
        name: "both_slots_at_once",
        rule: "23",
        breaks: "has writes of both copies of a slot in flight",
        focus: Some(Focus::Slots),
    },
    Mutant {
        name: "root_before_nodes",
        rule: "I3",
        breaks: "writes the slot before the nodes that it names are durable",
        focus: Some(Focus::Slots),
    },
    Mutant {
        name: "checkpoint_skips_flush",
        rule: "I3",
        breaks: "publishes without a flush of what the slot names",
        focus: Some(Focus::Slots),
    },
    Mutant {
        name: "recovery_forgets_log_blocks",
        rule: "24",
        breaks: "lets blocks be allocated that only the log names",
        focus: None,
    },
    Mutant {
        name: "guests_fill_the_log",
        rule: "25",
        breaks: "leaves no reserve in the log for checkpoints",
        focus: Some(Focus::CrowdedLog),
    },
    Mutant {
        name: "shrink_leaves_data",
        rule: "29",
        breaks: "leaves what lay behind the end of a VDI that shrank",
        focus: None,
    },
    Mutant {
        name: "overlay_forgets_snapshots",
        rule: "30",
        breaks: "lets a later write replace what a snapshot holds",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "snapshot_shares_nothing",
        rule: "33",
        breaks: "treats blocks that a snapshot shares as private",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "snapshot_ignores_in_flight",
        rule: "30",
        breaks: "answers a snapshot while earlier writes are on their way",
        focus: Some(Focus::SlowWrites),
    },
    Mutant {
        name: "snapshots_with_holes",
        rule: "31",
        breaks: "keeps a snapshot although an earlier write was dropped",
        focus: Some(Focus::Unsettled),
    },
    Mutant {
        name: "management_without_flush",
        rule: "30",
        breaks: "answers creations, snapshots and deletions before they are durable",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "series_is_flushed_up_to_its_first",
        rule: "30",
        breaks: "answers a series of snapshots when the first is durable",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "gc_frees_newly_live",
        rule: "35",
        breaks: "takes blocks that became live during a mark for garbage",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "gc_misses_snapshot_roots",
        rule: "36",
        breaks: "does not mark what only snapshots reach",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "history_is_taken_for_private",
        rule: "21",
        breaks: "lets a checkpoint free what a history names",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "history_dies_with_what_replaces_it",
        rule: "21",
        breaks: "frees a version that only a history names when it is replaced",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "gc_marks_outlive_their_cycle",
        rule: "51",
        breaks: "goes on with marks of a garbage collection that had ended",
        focus: Some(Focus::Collections),
    },
    Mutant {
        name: "gc_resumes_with_what_was_freed",
        rule: "51",
        breaks: "goes on with marks of blocks that became free before the crash",
        focus: Some(Focus::Collections),
    },
    Mutant {
        name: "gc_sweeps_beyond_its_section",
        rule: "35",
        breaks: "takes blocks for garbage that the pass under way does not look at",
        focus: Some(Focus::Collections),
    },
    Mutant {
        name: "gc_stores_marks_of_a_section",
        rule: "51",
        breaks: "goes on with marks of one section as if they were of the whole store",
        focus: Some(Focus::Collections),
    },
    Mutant {
        name: "unloads_what_changed",
        rule: "22",
        breaks: "drops a VDI from memory of which no checkpoint has everything",
        focus: None,
    },
    Mutant {
        name: "history_replays_one_too_many",
        rule: "30",
        breaks: "shows a snapshot a version that was written behind it",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "write_is_one_record_too_far",
        rule: "30",
        breaks: "shows who opens a write also the next record",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "gc_frees_kept_writes",
        rule: "21",
        breaks: "frees what a write that can be opened sees, and no moment does",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "clone_is_one_write_too_far",
        rule: "30",
        breaks: "has a clone, or a rollback, of a write begin with the next record, too",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "replay_starts_at_the_moment",
        rule: "22",
        breaks: "replays a clone, or a rollback, of a write as one of the moment that keeps it",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "clone_forgets_history",
        rule: "36",
        breaks: "continues the keyframe where a clone continues a later snapshot",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "gc_misses_histories",
        rule: "37",
        breaks: "does not mark what only histories reach",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "gc_thins_history_too_far",
        rule: "37",
        breaks: "frees a version that one snapshot sees, and those behind it do not",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "gc_meets_pages_out_of_order",
        rule: "37",
        breaks: "meets the snapshots of one history apart from each other",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "snapshot_times_go_back",
        rule: "38",
        breaks: "gives a snapshot an earlier time than the one before, if the clock says so",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "lookup_trusts_the_clock",
        rule: "38",
        breaks: "looks times up while the clock stands behind the newest snapshot",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "lookup_leaves_out_its_instant",
        rule: "38",
        breaks: "looks up what was before a time, and not what was taken at it",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "lookup_finds_the_next",
        rule: "38",
        breaks: "looks up the first snapshot after a time",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "thinning_takes_what_was_asked_for",
        rule: "39",
        breaks: "lets a history's rules delete snapshots that somebody asked for",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "scrub_does_not_look_again",
        rule: "19",
        breaks: "has scrub call a block damaged that was freed and written again meanwhile",
        focus: Some(Focus::SlowReads),
    },
    Mutant {
        name: "check_holds_nothing_back",
        rule: "19",
        breaks: "has the check of a store in use walk trees whose blocks are freed and written again",
        focus: Some(Focus::SlowReads),
    },
    Mutant {
        name: "thinning_takes_held",
        rule: "39",
        breaks: "lets a history's rules delete moments that are held",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "budget_bounds_nothing",
        rule: "39",
        breaks: "deletes no moments when a history holds more than its budget",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "budget_leaves_no_moment",
        rule: "39",
        breaks: "deletes also the newest moment when a history holds more than its budget",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "checkpoint_forgets_holds",
        rule: "22",
        breaks: "leaves holds out of what a checkpoint contains",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "holds_end_by_the_clock",
        rule: "38",
        breaks: "ends a hold when the wall clock says so, however long the store was open",
        focus: Some(Focus::History),
    },
    Mutant {
        name: "labels_wrap",
        rule: "42",
        breaks: "starts birth labels anew when few bits are used up",
        focus: Some(Focus::Branches),
    },
    Mutant {
        name: "receive_in_pieces",
        rule: "31",
        breaks: "completes a receive with records in several log blocks",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "receive_onto_what_was_written",
        rule: "33",
        breaks: "lets a stream replace what was written since the snapshot that it builds on",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "adopt_leaves_handles",
        rule: "39",
        breaks: "leaves a disk open to those who had it before it became what was received",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "adopt_keeps_the_branch",
        rule: "33",
        breaks: "goes on with what the disk was before it became what was received",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "adopt_is_not_replayed",
        rule: "31",
        breaks: "forgets in a crash that a disk became what was received",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "received_snapshot_forgets_its_origin",
        rule: "33",
        breaks: "replays a received snapshot as one that was taken here",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "diff_misses_what_is_zeroed",
        rule: "32",
        breaks: "leaves out of a diff what has become a hole",
        focus: Some(Focus::Receive),
    },
    Mutant {
        name: "overwrite_newest_slot",
        rule: "43",
        breaks: "writes over the last good slot",
        focus: None,
    },
    Mutant {
        name: "failed_flush_is_forgotten",
        rule: "56",
        breaks: "goes on after a failed flush",
        focus: Some(Focus::FlushErrors),
    },
    Mutant {
        name: "recovery_trusts_the_cache",
        rule: "56",
        breaks: "does not write again what a failed flush may have lost",
        focus: Some(Focus::FlushErrors),
    },
    Mutant {
        name: "ignore_data_checksum",
        rule: "G5",
        breaks: "hands out data that does not verify",
        focus: Some(Focus::Rot),
    },
    Mutant {
        name: "scrub_trusts_the_cache",
        rule: "G5",
        breaks: "has scrub take nodes from memory that may be damaged on the device",
        focus: Some(Focus::Rot),
    },
    Mutant {
        name: "scrub_skips_what_a_snapshot_has",
        rule: "G5",
        breaks: "has scrub pass over what only snapshots reach",
        focus: Some(Focus::Rot),
    },
    Mutant {
        name: "ignore_metadata_checksum",
        rule: "G5",
        breaks: "follows nodes that do not verify",
        focus: Some(Focus::LostNodes),
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Collects the names of all switches in the sources under `directory`.
    fn switches(directory: &Path, names: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                switches(&path, names);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                for rest in text.split("mutant::active(\"").skip(1) {
                    names.extend(rest.split('"').next().map(str::to_owned));
                }
            }
        }
    }

    #[test]
    fn every_switch_in_the_engine_is_listed_and_every_listed_one_exists() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
        let mut found = BTreeSet::new();
        for name in ["blockstore", "device", "ondisk", "vdi"] {
            switches(&crates.join(name).join("src"), &mut found);
        }
        let listed: BTreeSet<String> = ALL.iter().map(|mutant| mutant.name.to_owned()).collect();
        assert_eq!(listed.len(), ALL.len(), "a mutant is listed twice");
        assert_eq!(found, listed);
    }
}

//! From the engine's types to those that travel.

use base::{Lsn, SnapshotNumber};
use jiff::Timestamp;

pub(crate) fn vdi(entry: vdi::VdiEntry) -> api::Vdi {
    api::Vdi {
        id: entry.id.get(),
        name: entry.name,
        size_bytes: entry.size_bytes,
        created: time(entry.created_ns),
        snapshot_count: entry.snapshot_count,
        moment_count: entry.moment_count,
        parent: entry.parent.map(|(id, snapshot)| api::Parent {
            id: id.get(),
            name: entry.parent_name,
            snapshot: snapshot.get(),
        }),
        history: entry.retention.to_string(),
        history_budget_bytes: entry.retention.budget_bytes(),
        history_inherited: !entry.has_own_retention,
        held_count: entry.held_count,
        ledger: entry.ledger.map(|ledger| api::Ledger {
            record: ledger.sequence,
            pending: ledger.pending,
            head: ledger.head.iter().map(|byte| format!("{byte:02x}")).collect(),
        }),
        past: entry.past.map(|past| api::Past {
            snapshots_bytes: past.snapshots_bytes,
            moments_bytes: past.moments_bytes,
            counted: time(past.wall_ns),
        }),
    }
}

pub(crate) fn snapshot(vdi_name: &str, entry: vdi::SnapshotEntry) -> api::Snapshot {
    let handle = match &entry.label {
        Some(label) => format!("{vdi_name}@{label}"),
        None => format!("{vdi_name}@{}", entry.number),
    };
    api::Snapshot {
        handle,
        number: entry.number.get(),
        label: entry.label,
        size_bytes: entry.size_bytes,
        created: time(entry.created_ns),
        uuid: entry.uuid.to_string(),
        changed_bytes: entry.changed_bytes,
        hold: entry.hold.map(|hold| api::Held { until: hold.until_ns.map(time) }),
    }
}

pub(crate) fn intervals(vdi_name: &str, told: vdi::VdiIntervals) -> api::IntervalPage {
    let handle = |snapshot: String| format!("{vdi_name}@{snapshot}");
    let interval = |interval: vdi::VdiInterval| api::Interval {
        from: time(interval.from_ns),
        moments: interval.moments,
        changed_bytes: interval.changed_bytes,
        last: handle(interval.last),
        snapshots: interval.snapshots.into_iter().map(handle).collect(),
        held: interval.held.into_iter().map(handle).collect(),
    };
    api::IntervalPage {
        every_seconds: told.every_s,
        intervals: told.intervals.into_iter().map(interval).collect(),
        earlier: told.earlier,
        next: told.next.map(SnapshotNumber::get),
    }
}

pub(crate) fn writes(vdi_name: &str, told: vdi::VdiWrites) -> api::WritePage {
    let write = |vdi::KeptWrite { write, moment, wall_ns }: vdi::KeptWrite| api::Write {
        handle: format!("{vdi_name}@lsn:{}", write.lsn),
        lsn: write.lsn.get(),
        offset: write.offset,
        length: write.length,
        moment: format!("{vdi_name}@{moment}"),
        time: time(wall_ns),
    };
    let writes = told.writes.into_iter().map(write).collect();
    api::WritePage { writes, next: told.next.map(Lsn::get) }
}

pub(crate) fn space(space: vdi::VdiSpace) -> api::Space {
    api::Space {
        mapped_bytes: space.mapped_bytes,
        exclusive_bytes: space.exclusive_bytes,
        shared_bytes: space.shared_bytes,
    }
}

pub(crate) fn diff(from: Option<String>, to: String, diff: vdi::VdiDiff) -> api::DiffPage {
    let extent = |extent: vdi::DiffExtent| api::DiffExtent {
        offset: extent.offset,
        length: extent.length,
        data: extent.data,
    };
    let next = diff.next;
    let diff = api::Diff {
        from,
        to,
        from_size_bytes: diff.from_size_bytes,
        to_size_bytes: diff.to_size_bytes,
        extents: diff.extents.into_iter().map(extent).collect(),
    };
    api::DiffPage { diff, next }
}

pub(crate) fn opened(report: vdi::OpenReport) -> api::OpenReport {
    api::OpenReport {
        clean: report.clean,
        records_replayed: report.records_replayed,
        records_dropped: report.records_dropped,
        alarms: report.alarms,
    }
}

pub(crate) fn stats(
    stats: &vdi::Stats,
    nbd_connections: u64,
    vhost_connections: u64,
) -> api::Stats {
    api::Stats {
        capacity_bytes: stats.capacity_bytes,
        free_bytes: stats.free_bytes,
        vdi_count: stats.vdi_count,
        reads: stats.reads,
        read_bytes: stats.read_bytes,
        writes: stats.writes,
        write_bytes: stats.write_bytes,
        flushes: stats.flushes,
        discards: stats.discards,
        errors: stats.errors,
        checksum_failures: stats.checksum_failures,
        device_flushes: stats.device_flushes,
        log_blocks: stats.log_blocks,
        log_records: stats.log_records,
        log_used_percent: stats.log_used_percent,
        checkpoints: stats.checkpoints,
        nodes_written: stats.nodes_written,
        histories: stats.histories,
        versions_written: stats.versions_written,
        collections: stats.collections,
        collected_blocks: stats.collected_blocks,
        trimmed_blocks: stats.trimmed_blocks,
        scrubbed_bytes: stats.scrubbed_bytes,
        scrub_damaged_blocks: stats.scrub_damaged_blocks,
        scrubs: stats.scrubs,
        scrub_ended_seconds: stats.scrub_ended_seconds,
        cache_hits: stats.cache_hits,
        cache_misses: stats.cache_misses,
        cache_bytes: stats.cache_bytes,
        snapshots: stats.snapshots,
        moments: stats.moments,
        nbd_connections,
        vhost_connections,
    }
}

pub(crate) fn gc(report: vdi::GcReport) -> api::Gc {
    api::Gc {
        reached_bytes: report.reached_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        freed_bytes: report.freed_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        trimmed_bytes: report.trimmed_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        passes: report.passes,
        memory_bytes: report.memory_bytes,
        space: report.space.map(gc_space),
    }
}

fn gc_space(space: vdi::GcSpace) -> api::GcSpace {
    api::GcSpace {
        disks_bytes: space.heads_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        snapshots_bytes: space.snapshots_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        tables_bytes: space.tables_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        garbage_bytes: space.garbage_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        counted: time(space.wall_ns),
    }
}

pub(crate) fn gc_status(status: vdi::GcStatus) -> api::GcStatus {
    api::GcStatus {
        phase: match status.phase {
            vdi::GcPhase::Idle => api::GcPhase::Idle,
            vdi::GcPhase::Marking => api::GcPhase::Marking,
            vdi::GcPhase::Sweeping => api::GcPhase::Sweeping,
            vdi::GcPhase::Trimming => api::GcPhase::Trimming,
        },
        marked_bytes: status.marked_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        candidate_bytes: status.candidate_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        pass: status.pass,
        memory_bytes_max: status.memory_bytes_max,
        cycles: status.cycles,
        last: gc(status.last),
    }
}

pub(crate) fn check_report(report: vdi::check::CheckReport) -> api::CheckReport {
    let counts = report.counts;
    api::CheckReport {
        clean: report.is_clean(),
        closed_cleanly: report.closed_cleanly,
        errors: report.errors.into_iter().map(finding).collect(),
        errors_omitted: report.errors_omitted,
        warnings: report.warnings.into_iter().map(finding).collect(),
        warnings_omitted: report.warnings_omitted,
        repairs: report.repairs,
        counts: api::CheckCounts {
            vdis: counts.vdis,
            snapshots: counts.snapshots,
            metadata_blocks: counts.metadata_blocks,
            data_blocks: counts.data_blocks,
            data_blocks_verified: counts.data_blocks_verified,
            leaked_blocks: counts.leaked_blocks,
            bad_blocks: counts.bad_blocks,
            lost_entries: counts.lost_entries,
            log_records: counts.log_records,
            log_records_doubtful: counts.log_records_doubtful,
        },
    }
}

fn finding(finding: vdi::check::Finding) -> api::Finding {
    use vdi::check::FindingKind as From;
    let kind = match finding.kind {
        From::Superblock => api::FindingKind::Superblock,
        From::HostSlot => api::FindingKind::HostSlot,
        From::Log => api::FindingKind::Log,
        From::Metadata => api::FindingKind::Metadata,
        From::Data => api::FindingKind::Data,
        From::ReachedButFree => api::FindingKind::ReachedButFree,
        From::BitmapBlockLive => api::FindingKind::BitmapBlockLive,
        From::WrongExtent => api::FindingKind::WrongExtent,
        From::NamedTwice => api::FindingKind::NamedTwice,
        From::Record => api::FindingKind::Record,
        From::Ledger => api::FindingKind::Ledger,
        From::HeldMissing => api::FindingKind::HeldMissing,
        From::HeldAltered => api::FindingKind::HeldAltered,
    };
    api::Finding { kind, block: finding.at.map(base::Pba::get), message: finding.message }
}

pub(crate) fn scrub_status(status: vdi::ScrubStatus, next: Option<Timestamp>) -> api::ScrubStatus {
    let bytes = |blocks: u64| blocks.saturating_mul(base::BLOCK_SIZE_U64);
    api::ScrubStatus {
        pass: status.pass,
        running: status.running,
        rate_bytes: status.rate_bytes,
        elapsed_ms: u64::try_from(status.elapsed.as_millis()).unwrap_or(u64::MAX),
        done_bytes: bytes(status.done_blocks),
        total_bytes: bytes(status.total_blocks),
        read_bytes: bytes(status.read_blocks),
        damaged_blocks: status.damaged_blocks,
        next,
        last: status.last.map(scrub_report),
    }
}

fn scrub_report(report: vdi::ScrubReport) -> api::ScrubReport {
    let (end, why) = match report.end {
        vdi::ScrubEnd::Finished => (api::ScrubEnd::Finished, None),
        vdi::ScrubEnd::Stopped => (api::ScrubEnd::Stopped, None),
        vdi::ScrubEnd::Failed(why) => (api::ScrubEnd::Failed, Some(why)),
    };
    api::ScrubReport {
        pass: report.pass,
        began: time(report.began_ns),
        ended: time(report.ended_ns),
        end,
        why,
        read_bytes: report.read_blocks.saturating_mul(base::BLOCK_SIZE_U64),
        damaged_blocks: report.damaged_blocks,
        damages: report.damages.into_iter().map(scrub_damage).collect(),
        damages_omitted: report.damages_omitted,
    }
}

fn scrub_damage(damage: vdi::Damage) -> api::ScrubDamage {
    let owner = |owner: vdi::Owner| api::ScrubOwner {
        id: owner.id.get(),
        name: owner.name,
        head: owner.head,
        snapshots: owner.snapshots.into_iter().map(base::SnapshotNumber::get).collect(),
        snapshots_omitted: owner.snapshots_omitted,
    };
    api::ScrubDamage {
        kind: match damage.kind {
            vdi::DamageKind::Data => api::ScrubDamageKind::Data,
            vdi::DamageKind::Node => api::ScrubDamageKind::Node,
            vdi::DamageKind::Table(_) => api::ScrubDamageKind::Table,
        },
        block: damage.at.get(),
        block_count: damage.block_count,
        offset: damage.offset,
        length: damage.length,
        unreadable: damage.is_unreadable,
        message: damage.to_string(),
        owners: damage.owners.into_iter().map(owner).collect(),
        owners_omitted: damage.owners_omitted,
    }
}

pub(crate) fn check_status(at: Option<vdi::check::CheckProgress>) -> api::CheckStatus {
    match at {
        None => api::CheckStatus::default(),
        Some(at) => api::CheckStatus {
            stage: check_stage(at.stage).to_owned(),
            done: at.done,
            total: at.total,
        },
    }
}

/// What a check is at, in a word or two.
pub(crate) const fn check_stage(stage: vdi::check::CheckStage) -> &'static str {
    match stage {
        vdi::check::CheckStage::Log => "log",
        vdi::check::CheckStage::Tables => "tables",
        vdi::check::CheckStage::Vdis => "disks",
        vdi::check::CheckStage::OlderSlot => "older copy",
        vdi::check::CheckStage::Data => "data",
        vdi::check::CheckStage::Repair => "repair",
    }
}

/// Nanoseconds since 1970 in 64 bits reach to 2554, well within a timestamp's range.
fn time(ns: u64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(ns)).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use base::SnapshotNumber;

    use super::*;

    #[test]
    fn a_handle_is_what_commands_take() {
        let entry = |label: Option<&str>| vdi::SnapshotEntry {
            number: SnapshotNumber::new(17),
            label: label.map(str::to_owned),
            size_bytes: 4096,
            created_ns: 1_500_000_000,
            uuid: base::SnapshotUuid([1; 16]),
            changed_bytes: None,
            hold: None,
        };
        assert_eq!(snapshot("web01", entry(None)).handle, "web01@17");
        let labelled = snapshot("web01", entry(Some("daily")));
        assert_eq!(labelled.handle, "web01@daily");
        assert_eq!(labelled.created.to_string(), "1970-01-01T00:00:01.5Z");
    }

    #[test]
    fn the_end_of_time_is_a_time() {
        assert_eq!(time(u64::MAX).to_string().split('-').next(), Some("2554"));
    }
}

//! Commands on VDIs: create, clone, ls, info, rename, resize, rm.

use api::{ChangeVdi, CreateVdi, Error, Kind, Ledger, Snapshot, Space, Vdi};
use serde::Serialize;

use super::{Context, series, snapshots};
use crate::args::NewSize;
use crate::output::{self, Column, bytes, count, time};

/// What a list says that is empty.
pub(super) const NO_DISKS: &str = "no disks yet; make one with: parallax create NAME --size 20G";

pub(super) async fn create(
    context: &Context,
    name: String,
    size: u64,
    history: Option<String>,
) -> Result<(), Error> {
    let request = CreateVdi { name, size_bytes: Some(size), source: None, history };
    let vdi = context.client.create(&request).await?;
    context.print(&vdi, &format!("created {} ({})", vdi.name, bytes(vdi.size_bytes)))
}

/// What `clone` and `rollback` print with --json.
#[derive(Serialize)]
pub(super) struct Taken {
    #[serde(flatten)]
    pub(super) vdi: Vdi,
    /// What it is as; `None`: the running disk, or a write.
    pub(super) snapshot: Option<Snapshot>,
    /// The write that it is as, as a handle.
    pub(super) write: Option<String>,
}

/// A handle as people know it, and which snapshot that is: a time names whatever it meets.
pub(super) fn with_time(snapshot: &Snapshot) -> String {
    let Snapshot { handle, number, label, created, .. } = snapshot;
    match label {
        Some(_) => format!("{handle} (number {number}, {})", time(*created)),
        None => format!("{handle} ({})", time(*created)),
    }
}

pub(super) async fn clone(
    context: &Context,
    source: String,
    snapshot: Option<Snapshot>,
    name: String,
) -> Result<(), Error> {
    let shown = snapshot.as_ref().map_or_else(|| source.clone(), with_time);
    let write = (snapshot.is_none() && source.contains('@')).then(|| source.clone());
    let request = CreateVdi { name, size_bytes: None, source: Some(source), history: None };
    let vdi = context.client.create(&request).await?;
    let text = format!("cloned {shown} to {} ({})", vdi.name, bytes(vdi.size_bytes));
    context.print(&Taken { vdi, snapshot, write }, &text)
}

pub(super) async fn ls(context: &Context, space: bool) -> Result<(), Error> {
    let vdis = context.client.vdis().await?;
    if space {
        return ls_with_space(context, vdis).await;
    }
    if context.json {
        return output::print_json(&vdis);
    }
    if vdis.is_empty() {
        return output::print(NO_DISKS);
    }
    let columns = [
        Column::Left("NAME"),
        Column::Right("SIZE"),
        Column::Right("SNAPSHOTS"),
        Column::Left("CREATED"),
        Column::Left("CLONED FROM"),
    ];
    let row = |vdi: Vdi| {
        let origin = origin(&vdi).unwrap_or_default();
        let snapshots = vdi.snapshot_count.to_string();
        let size = match vdi.size_bytes {
            0 => "damaged".to_owned(),
            size => bytes(size),
        };
        vec![vdi.name, size, snapshots, time(vdi.created), origin]
    };
    output::print(&output::table(&columns, vdis.into_iter().map(row).collect()))
}

async fn ls_with_space(context: &Context, vdis: Vec<Vdi>) -> Result<(), Error> {
    let mut list = Vec::new();
    for vdi in vdis {
        match context.client.space(&vdi.name, None).await {
            Ok(space) => list.push(Description { object: vdi, space }),
            // Deleted or renamed since it was listed.
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if context.json {
        return output::print_json(&list);
    }
    if list.is_empty() {
        return output::print(NO_DISKS);
    }
    let columns = [
        Column::Left("NAME"),
        Column::Right("SIZE"),
        Column::Right("MAPPED"),
        Column::Right("EXCLUSIVE"),
        Column::Right("SHARED"),
    ];
    let row = |Description { object: vdi, space }: Description<Vdi>| {
        let sizes = [vdi.size_bytes, space.mapped_bytes, space.exclusive_bytes, space.shared_bytes];
        std::iter::once(vdi.name).chain(sizes.map(bytes)).collect()
    };
    output::print(&output::table(&columns, list.into_iter().map(row).collect()))
}

/// Where a disk was cloned from, as a handle while its parent exists.
pub(super) fn origin(vdi: &Vdi) -> Option<String> {
    let parent = vdi.parent.as_ref()?;
    Some(match (&parent.name, parent.snapshot) {
        (None, _) => "a deleted disk".to_owned(),
        (Some(name), 0) => name.clone(),
        (Some(name), number) => format!("{name}@{number}"),
    })
}

/// What `info --json` prints, and `ls --space --json` for each disk.
#[derive(Serialize)]
struct Description<T> {
    #[serde(flatten)]
    object: T,
    space: Space,
}

pub(super) async fn info(
    context: &Context,
    name: &str,
    snapshot: Option<&str>,
) -> Result<(), Error> {
    match snapshot {
        None => {
            let vdi = context.client.vdi(name).await?;
            let space = context.client.space(name, None).await?;
            let text = describe_vdi(&vdi, &space);
            context.print(&Description { object: vdi, space }, &text)
        }
        Some(label) => {
            let snapshot = context.client.snapshot_status(name, label).await?;
            let space = context.client.space(name, Some(label)).await?;
            let text = describe_snapshot(&snapshot, &space);
            context.print(&Description { object: snapshot, space }, &text)
        }
    }
}

fn describe_vdi(vdi: &Vdi, space: &Space) -> String {
    let mut lines = vec![
        ("name", vdi.name.clone()),
        ("id", vdi.id.to_string()),
        ("created", time(vdi.created)),
        ("snapshots", vdi.snapshot_count.to_string()),
        ("history", history(vdi)),
        ("moments", vdi.moment_count.to_string()),
        ("held alone", held_alone(vdi)),
        ("held", vdi.held_count.to_string()),
    ];
    lines.extend(vdi.ledger.as_ref().map(|ledger| ("ledger", ledger_end(ledger))));
    lines.extend(origin(vdi).map(|origin| ("cloned from", origin)));
    lines.extend(space_lines(vdi.size_bytes, space));
    columns(&lines)
}

/// Which moments of a disk are kept, and who says so.
fn history(vdi: &Vdi) -> String {
    match vdi.history_inherited {
        true => format!("{} (as the store has it)", vdi.history),
        false => vdi.history.clone(),
    }
}

/// What the snapshots and moments of a disk hold, and how much these may.
fn held_alone(vdi: &Vdi) -> String {
    let budget = |how: &str| match vdi.history_budget_bytes {
        Some(budget) => format!("{how}{}", bytes(budget)),
        None => String::new(),
    };
    let Some(past) = &vdi.past else {
        return "not known before the next garbage collection".to_owned();
    };
    let is_over = vdi.history_budget_bytes.is_some_and(|budget| past.moments_bytes > budget);
    let bound = budget(if is_over { ", over its budget of " } else { " of at most " });
    let (moments, snapshots) = (bytes(past.moments_bytes), bytes(past.snapshots_bytes));
    format!("moments {moments}{bound}; snapshots {snapshots} ({})", time(past.counted))
}

/// Where a ledger ends: what people note.
pub(super) fn ledger_end(ledger: &Ledger) -> String {
    let end = format!("{}:{}", ledger.record, ledger.head);
    match ledger.pending {
        0 => end,
        pending => {
            format!("{end}, without the last {pending}, which no checkpoint has written yet")
        }
    }
}

fn describe_snapshot(snapshot: &Snapshot, space: &Space) -> String {
    let mut lines = vec![
        ("snapshot", snapshot.handle.clone()),
        ("number", snapshot.number.to_string()),
        ("taken", time(snapshot.created)),
        ("held", snapshots::held(snapshot)),
    ];
    lines.extend(space_lines(snapshot.size_bytes, space));
    columns(&lines)
}

fn space_lines(size: u64, space: &Space) -> [(&'static str, String); 4] {
    [
        ("size", bytes(size)),
        ("mapped", bytes(space.mapped_bytes)),
        ("exclusive", bytes(space.exclusive_bytes)),
        ("shared", bytes(space.shared_bytes)),
    ]
}

pub(super) fn columns(lines: &[(&str, String)]) -> String {
    let lines: Vec<String> =
        lines.iter().map(|(name, value)| format!("{name:<13}{value}")).collect();
    lines.join("\n")
}

pub(super) async fn rename(context: &Context, name: &str, new: String) -> Result<(), Error> {
    let request = ChangeVdi { name: Some(new), ..ChangeVdi::default() };
    let vdi = context.client.change(name, &request).await?;
    context.print(&vdi, &format!("renamed {name} to {}", vdi.name))
}

pub(super) async fn set(context: &Context, name: &str, history: String) -> Result<(), Error> {
    let request = ChangeVdi { history: Some(history), ..ChangeVdi::default() };
    let vdi = context.client.change(name, &request).await?;
    let text = match (vdi.history.as_str(), vdi.moment_count) {
        ("off", count @ 1..) => {
            let held = if vdi.held_count > 0 { ", but for what is held" } else { "" };
            let moments = output::count(count, "moment");
            format!("history of {name}: off; {moments} are being deleted{held}")
        }
        _ => format!("history of {name}: {}", self::history(&vdi)),
    };
    context.print(&vdi, &text)
}

pub(super) async fn resize(
    context: &Context,
    name: &str,
    size: NewSize,
    shrink: bool,
) -> Result<(), Error> {
    let size = match size {
        NewSize::Bytes(bytes) => bytes,
        NewSize::More(bytes) => context.client.vdi(name).await?.size_bytes.saturating_add(bytes),
    };
    let request = ChangeVdi { size_bytes: Some(size), shrink, ..ChangeVdi::default() };
    let vdi = context.client.change(name, &request).await?;
    context.print(&vdi, &format!("{name} now has {}", bytes(vdi.size_bytes)))
}

pub(super) async fn rm(context: &Context, name: &str, snapshot: Option<&str>) -> Result<(), Error> {
    if let Some(snapshot) = snapshot
        && let Some(range) = series::parse(snapshot)
    {
        match context.client.snapshot_status(name, snapshot).await {
            Err(error) if error.kind == Kind::NotFound => {
                return series::remove(context, name, range).await;
            }
            // A label may look like that.
            label => drop(label?),
        }
    }
    let removed = match snapshot {
        Some(snapshot) => context.client.remove_snapshot(name, snapshot).await?,
        None => context.client.remove(name).await?,
    };
    let text = match removed.snapshots {
        0 => format!("deleted {}", removed.removed),
        snapshots => format!("deleted {} with {}", removed.removed, count(snapshots, "snapshot")),
    };
    context.print(&removed, &text)
}

#[cfg(test)]
mod tests {
    use api::Parent;

    use super::*;

    fn vdi(parent: Option<Parent>) -> Vdi {
        Vdi {
            id: 2,
            name: "b".to_owned(),
            size_bytes: 1,
            created: jiff::Timestamp::UNIX_EPOCH,
            snapshot_count: 0,
            moment_count: 0,
            parent,
            history: "off".to_owned(),
            history_inherited: true,
            held_count: 0,
            history_budget_bytes: None,
            ledger: None,
            past: None,
        }
    }

    #[test]
    fn what_is_held_alone_is_told_with_its_budget() {
        let mut vdi = vdi(None);
        assert_eq!(held_alone(&vdi), "not known before the next garbage collection");
        let counted = jiff::Timestamp::UNIX_EPOCH;
        vdi.past = Some(api::Past { snapshots_bytes: 4096, moments_bytes: 3 << 30, counted });
        let at = time(counted);
        assert_eq!(held_alone(&vdi), format!("moments 3 GiB; snapshots 4 KiB ({at})"));
        vdi.history_budget_bytes = Some(3 << 30);
        let told = format!("moments 3 GiB of at most 3 GiB; snapshots 4 KiB ({at})");
        assert_eq!(held_alone(&vdi), told);
        vdi.history_budget_bytes = Some(1 << 30);
        let told = format!("moments 3 GiB, over its budget of 1 GiB; snapshots 4 KiB ({at})");
        assert_eq!(held_alone(&vdi), told);
    }

    #[test]
    fn origins_read_as_handles() {
        let check = |parent: Option<(Option<&str>, u64)>, expected: Option<&str>| {
            let parent = parent.map(|(name, snapshot)| Parent {
                id: 1,
                name: name.map(str::to_owned),
                snapshot,
            });
            let vdi = vdi(parent);
            assert_eq!(origin(&vdi).as_deref(), expected);
        };
        check(None, None);
        check(Some((Some("a"), 3)), Some("a@3"));
        check(Some((Some("a"), 0)), Some("a"));
        check(Some((None, 3)), Some("a deleted disk"));
    }
}

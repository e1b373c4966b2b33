//! `parallax tree`: which disk was cloned from which snapshot of which disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use api::{Error, Kind, Snapshot, Vdi};
use serde::Serialize;

use super::Context;
use crate::output::{self, bytes, count, time};

/// Snapshots without clones that are drawn per disk before the rest is only counted.
const PLAIN_SNAPSHOTS_MAX: usize = 5;

/// Clones of clones that are drawn under each other; what lies deeper starts again at the left.
/// Keeps lines readable, and the stack small however deep a family is.
const DEPTH_MAX: usize = 32;

/// A disk with everything that descends from it.
#[derive(Debug, Serialize)]
struct Node {
    #[serde(flatten)]
    vdi: Vdi,
    snapshots: Vec<SnapshotNode>,
    /// Clones of the running disk, or of snapshots that are gone.
    clones: Vec<Node>,
}

#[derive(Debug, Serialize)]
struct SnapshotNode {
    #[serde(flatten)]
    snapshot: Snapshot,
    clones: Vec<Node>,
}

pub(super) async fn run(context: &Context, all: bool) -> Result<(), Error> {
    let vdis = context.client.vdis().await?;
    let mut snapshots = BTreeMap::new();
    let origins: BTreeSet<(u64, u64)> = vdis
        .iter()
        .filter_map(|vdi| vdi.parent.as_ref().map(|parent| (parent.id, parent.snapshot)))
        .collect();
    for vdi in vdis.iter().filter(|vdi| vdi.snapshot_count + vdi.moment_count > 0) {
        match context.client.snapshots(&vdi.name).await {
            Ok(mut list) => {
                // Of moments those that something comes from: `log` shows the others.
                list.retain(|snapshot| {
                    let is_origin = origins.contains(&(vdi.id, snapshot.number));
                    snapshot.changed_bytes.is_none() || is_origin
                });
                snapshots.insert(vdi.id, list);
            }
            // Deleted or renamed since it was listed.
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let roots = grow(vdis, snapshots);
    if context.json {
        return output::print_json(&roots);
    }
    if roots.is_empty() {
        return output::print(super::vdis::NO_DISKS);
    }
    let mut lines = Vec::new();
    for root in &roots {
        lines.push(root_line(&root.vdi));
        draw(root, "", all, &mut lines);
    }
    output::print(&lines.join("\n"))
}

/// Puts every disk under what it was cloned from; those whose parent is gone, or too deep, become
/// roots.
fn grow(vdis: Vec<Vdi>, snapshots: BTreeMap<u64, Vec<Snapshot>>) -> Vec<Node> {
    let known: BTreeSet<u64> = vdis.iter().map(|vdi| vdi.id).collect();
    let mut children: BTreeMap<Option<u64>, Vec<Vdi>> = BTreeMap::new();
    for vdi in vdis {
        let parent = vdi.parent.as_ref().map(|parent| parent.id);
        children.entry(parent.filter(|id| known.contains(id))).or_default().push(vdi);
    }
    let mut waiting = VecDeque::from(children.remove(&None).unwrap_or_default());
    let mut family = Family { children, snapshots, deeper: Vec::new() };
    let mut roots = Vec::new();
    while let Some(vdi) = waiting.pop_front() {
        roots.push(family.node(vdi, 0));
        for vdi in family.deeper.drain(..).rev() {
            waiting.push_front(vdi);
        }
    }
    roots
}

/// What is not in the tree yet.
struct Family {
    children: BTreeMap<Option<u64>, Vec<Vdi>>,
    snapshots: BTreeMap<u64, Vec<Snapshot>>,
    /// Clones below `DEPTH_MAX`.
    deeper: Vec<Vdi>,
}

impl Family {
    /// Clones are younger than what they were cloned from, so this ends; each disk is taken once.
    fn node(&mut self, vdi: Vdi, depth: usize) -> Node {
        let mut by_snapshot: BTreeMap<u64, Vec<Node>> = BTreeMap::new();
        for child in self.children.remove(&Some(vdi.id)).unwrap_or_default() {
            if depth == DEPTH_MAX {
                self.deeper.push(child);
                continue;
            }
            let number = child.parent.as_ref().map_or(0, |parent| parent.snapshot);
            by_snapshot.entry(number).or_default().push(self.node(child, depth + 1));
        }
        let own = self.snapshots.remove(&vdi.id).unwrap_or_default();
        let snapshots = own
            .into_iter()
            .map(|snapshot| {
                let clones = by_snapshot.remove(&snapshot.number).unwrap_or_default();
                SnapshotNode { snapshot, clones }
            })
            .collect();
        Node { vdi, snapshots, clones: by_snapshot.into_values().flatten().collect() }
    }
}

fn vdi_line(vdi: &Vdi) -> String {
    format!("{} ({})", vdi.name, bytes(vdi.size_bytes))
}

/// A disk at the left, with what it was cloned from if that is not drawn above it.
fn root_line(vdi: &Vdi) -> String {
    match super::vdis::origin(vdi) {
        None => vdi_line(vdi),
        Some(origin) => format!("{} ({}, cloned from {origin})", vdi.name, bytes(vdi.size_bytes)),
    }
}

/// What hangs under a disk, in the order in which it is drawn.
enum Branch<'a> {
    Snapshot(&'a SnapshotNode),
    Clone(&'a Node),
    Hidden(u64),
}

fn draw(node: &Node, indent: &str, all: bool, lines: &mut Vec<String>) {
    let branches = branches(node, all);
    let last = branches.len().saturating_sub(1);
    for (index, branch) in branches.iter().enumerate() {
        let (joint, below) =
            if index == last { ("└── ", "    ") } else { ("├── ", "│   ") };
        let below = format!("{indent}{below}");
        match branch {
            Branch::Snapshot(SnapshotNode { snapshot, clones }) => {
                let taken = time(snapshot.created);
                lines.push(format!("{indent}{joint}{} ({taken})", snapshot.handle));
                draw_clones(clones, &below, all, lines);
            }
            Branch::Clone(clone) => {
                lines.push(format!("{indent}{joint}{}", vdi_line(&clone.vdi)));
                draw(clone, &below, all, lines);
            }
            Branch::Hidden(number) => {
                let more = count(*number, "more snapshot");
                lines.push(format!("{indent}{joint}… {more} (--all shows them)"));
            }
        }
    }
}

fn draw_clones(clones: &[Node], indent: &str, all: bool, lines: &mut Vec<String>) {
    for (index, clone) in clones.iter().enumerate() {
        let last = index + 1 == clones.len();
        let (joint, below) = if last { ("└── ", "    ") } else { ("├── ", "│   ") };
        lines.push(format!("{indent}{joint}{}", vdi_line(&clone.vdi)));
        draw(clone, &format!("{indent}{below}"), all, lines);
    }
}

fn branches(node: &Node, all: bool) -> Vec<Branch<'_>> {
    let plain = node.snapshots.iter().filter(|snapshot| snapshot.clones.is_empty()).count();
    // One line that counts a single snapshot would save nothing.
    let mut hide =
        if all || plain <= PLAIN_SNAPSHOTS_MAX + 1 { 0 } else { plain - PLAIN_SNAPSHOTS_MAX };
    let hidden = u64::try_from(hide).unwrap_or(u64::MAX);
    let mut branches = Vec::new();
    if hidden > 0 {
        branches.push(Branch::Hidden(hidden));
    }
    for snapshot in &node.snapshots {
        // The oldest are hidden: people look for what is new.
        if snapshot.clones.is_empty() && hide > 0 {
            hide -= 1;
        } else {
            branches.push(Branch::Snapshot(snapshot));
        }
    }
    branches.extend(node.clones.iter().map(Branch::Clone));
    branches
}

#[cfg(test)]
mod tests {
    use api::Parent;
    use jiff::Timestamp;

    use super::*;

    fn vdi(id: u64, name: &str, parent: Option<(u64, Option<&str>, u64)>) -> Vdi {
        Vdi {
            id,
            name: name.to_owned(),
            size_bytes: 1 << 30,
            created: Timestamp::UNIX_EPOCH,
            snapshot_count: 0,
            moment_count: 0,
            history_inherited: true,
            history_budget_bytes: None,
            held_count: 0,
            ledger: None,
            past: None,
            parent: parent.map(|(id, name, snapshot)| Parent {
                id,
                name: name.map(str::to_owned),
                snapshot,
            }),
            history: "off".to_owned(),
        }
    }

    fn snapshot(handle: &str, number: u64) -> Snapshot {
        Snapshot {
            handle: handle.to_owned(),
            number,
            label: None,
            size_bytes: 1 << 30,
            created: Timestamp::UNIX_EPOCH,
            uuid: "00000000-0000-0000-0000-000000000001".to_owned(),
            changed_bytes: None,
            hold: None,
        }
    }

    fn drawn(roots: &[Node], all: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for root in roots {
            lines.push(root_line(&root.vdi));
            draw(root, "", all, &mut lines);
        }
        lines
    }

    #[test]
    fn families_hang_together() {
        let vdis = vec![
            vdi(1, "base", None),
            vdi(2, "web", Some((1, Some("base"), 1))),
            vdi(3, "test", Some((2, Some("web"), 0))),
            vdi(4, "orphan", Some((9, None, 4))),
        ];
        let snapshots = BTreeMap::from([(1, vec![snapshot("base@1", 1), snapshot("base@2", 2)])]);
        assert_eq!(
            drawn(&grow(vdis, snapshots), false),
            [
                "base (1 GiB)",
                "├── base@1 (1970-01-01T00:00:00Z)",
                "│   └── web (1 GiB)",
                "│       └── test (1 GiB)",
                "└── base@2 (1970-01-01T00:00:00Z)",
                "orphan (1 GiB, cloned from a deleted disk)",
            ]
        );
    }

    #[test]
    fn families_of_any_depth_are_drawn() {
        let depth = 100_000;
        let mut vdis = vec![vdi(1, "d1", None)];
        vdis.extend((2..=depth).map(|id| {
            let parent = format!("d{}", id - 1);
            vdi(id, &format!("d{id}"), Some((id - 1, Some(&parent), 0)))
        }));
        let lines = drawn(&grow(vdis, BTreeMap::new()), false);
        assert_eq!(lines.len(), 100_000);
        assert_eq!(lines[33], "d34 (1 GiB, cloned from d33)", "starts again at the left");
        assert!(lines.iter().all(|line| line.chars().count() < 200));
    }

    #[test]
    fn many_plain_snapshots_are_counted() {
        let many = (1..=100).map(|number| snapshot(&format!("a@{number}"), number)).collect();
        let vdis = vec![vdi(1, "a", None), vdi(2, "b", Some((1, Some("a"), 1)))];
        let roots = grow(vdis, BTreeMap::from([(1, many)]));
        let lines = drawn(&roots, false);
        assert_eq!(lines.len(), 1 + 1 + 2 + PLAIN_SNAPSHOTS_MAX, "{lines:?}");
        assert!(lines[1].contains("94 more snapshots"), "{lines:?}");
        assert!(lines[2].contains("a@1"), "one that was cloned is always drawn");
        assert_eq!(drawn(&roots, true).len(), 1 + 100 + 1);
    }
}

//! Nodes: what a file or directory of the mount is, packed into the number by which the kernel
//! knows it.
//!
//! The number alone tells everything, so that nothing need be remembered: a daemon that takes over
//! a mount knows each file that somebody has open.
//!
//! ```text
//! DIR/web01.img                                 a VDI
//! DIR/.snapshots/web01/2026-11-27/              snapshots of a VDI, of a day
//! DIR/.snapshots/web01/2026-11-27/10/           of an hour of it
//! DIR/.snapshots/web01/2026-11-27/10/daily.img  a snapshot
//!
//! 63   61 60                32 31                 0
//! ┌──────┬────────────────────┬────────────────────┐
//! │ kind │ identity of a VDI  │ day, hour, number  │
//! └──────┴────────────────────┴────────────────────┘
//! ```
//!
//! So VDIs with identities from 2^29 on, and snapshots with numbers from 2^32 on, are not shown.

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Node {
    /// The directory of all VDIs.
    Root,
    /// The directory of all histories.
    Histories,
    /// A VDI.
    Disk(u64),
    /// The directory of a VDI's snapshots.
    History(u64),
    /// Those of a day, counted from 1970.
    Day(u64, u64),
    /// Those of an hour, counted from 1970.
    Hour(u64, u64),
    /// A snapshot of a VDI, by number.
    Snapshot(u64, u64),
}

const KIND_SHIFT: u32 = 61;
const DISK_SHIFT: u32 = 32;
const DISK_END: u64 = 1 << (KIND_SHIFT - DISK_SHIFT);
const INDEX_END: u64 = 1 << DISK_SHIFT;

const ROOT: u64 = 1;
const HISTORIES: u64 = 2;

impl Node {
    /// Its number; `None` if it has none, and cannot be shown.
    pub(crate) fn number(self) -> Option<u64> {
        let pack = |kind: u64, disk: u64, index: u64| {
            let fits = disk < DISK_END && index < INDEX_END;
            fits.then_some(kind << KIND_SHIFT | disk << DISK_SHIFT | index)
        };
        match self {
            Self::Root => Some(ROOT),
            Self::Histories => Some(HISTORIES),
            Self::Disk(disk) => pack(1, disk, 0),
            Self::History(disk) => pack(2, disk, 0),
            Self::Day(disk, day) => pack(3, disk, day),
            Self::Hour(disk, hour) => pack(4, disk, hour),
            Self::Snapshot(disk, number) => pack(5, disk, number),
        }
    }

    /// The node with this number.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        let disk = number >> DISK_SHIFT & (DISK_END - 1);
        let index = number & (INDEX_END - 1);
        Some(match (number >> KIND_SHIFT, index) {
            (0, _) if number == ROOT => Self::Root,
            (0, _) if number == HISTORIES => Self::Histories,
            (1, 0) => Self::Disk(disk),
            (2, 0) => Self::History(disk),
            (3, day) => Self::Day(disk, day),
            (4, hour) => Self::Hour(disk, hour),
            (5, number) => Self::Snapshot(disk, number),
            _ => return None,
        })
    }

    /// Whether it is a directory.
    pub(crate) fn is_directory(self) -> bool {
        !matches!(self, Self::Disk(_) | Self::Snapshot(..))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_number_and_a_node_are_the_same_thing(number: u64) {
            if let Some(node) = Node::from_number(number) {
                prop_assert_eq!(node.number(), Some(number));
            }
        }

        #[test]
        fn every_node_that_can_be_shown_has_a_number_of_its_own(
            disk in 0..DISK_END,
            index in 0..INDEX_END,
        ) {
            let nodes = [
                Node::Root,
                Node::Histories,
                Node::Disk(disk),
                Node::History(disk),
                Node::Day(disk, index),
                Node::Hour(disk, index),
                Node::Snapshot(disk, index),
            ];
            let numbers = nodes.map(|node| node.number().unwrap());
            prop_assert_eq!(numbers.map(|number| Node::from_number(number).unwrap()), nodes);
        }
    }

    #[test]
    fn what_does_not_fit_has_no_number() {
        assert_eq!(Node::Disk(DISK_END).number(), None);
        assert_eq!(Node::Snapshot(1, INDEX_END).number(), None);
    }
}

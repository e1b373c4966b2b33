//! Walking trees: what differs between two, and what one maps.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, BirthLabel, ErrorKind};
use blockstore::tree::span;
use ondisk::{Entry, EntryState, FANOUT, Node, RootRef};

use crate::Error;
use crate::branch::{Base, View};
use crate::engine::Engine;
use crate::manage::find_snapshot;
use crate::mark::BlockSet;
use crate::types::{DiffExtent, Target, VdiSpace};

/// A tree as of now, and what it may share.
struct Settled {
    root: RootRef,
    block_count: u64,
    /// Births above this are exclusive; `None`: nothing is known to be.
    shared_up_to: Option<BirthLabel>,
}

impl Engine {
    /// Lists what differs; everything acknowledged before the call is in.
    pub(crate) async fn diff(
        self: &Rc<Self>,
        from: &Target,
        to: &Target,
    ) -> Result<Vec<DiffExtent>, Error> {
        let _request = self.begin()?;
        self.checkpoint(ondisk::SlotState::Running).await?;
        let _reader = self.epochs.enter();
        let (from, to) = (self.settled(from).await?, self.settled(to).await?);
        let height = from.root.height.max(to.root.height);
        let end = from.block_count.max(to.block_count);
        let mut differences = Differences { extents: Vec::new(), end };
        let mut walked = [BlockSet::default(), BlockSet::default()];
        let mut stack = vec![(raise(&from.root, height), raise(&to.root, height), height, 0u64)];
        while let Some((a, b, level, start)) = stack.pop() {
            if start >= end || a.same(&b) {
                continue;
            }
            if level == 0 {
                differences.push(start, 1, b.entry.state());
                continue;
            }
            if a.is_uniform() && b.is_uniform() {
                // Hole against zeroes: the bytes are the same.
                continue;
            }
            let (a, b) = (
                self.children(&a, &mut walked[0]).await?,
                self.children(&b, &mut walked[1]).await?,
            );
            let width = span(level - 1);
            for (slot, (a, b)) in
                (0u64..).zip(a.into_iter().zip(b)).collect::<Vec<_>>().into_iter().rev()
            {
                stack.push((a, b, level - 1, start + slot * width));
            }
        }
        Ok(differences.extents)
    }

    /// Counts what a VDI or snapshot maps; everything acknowledged before the call is in.
    pub(crate) async fn space(self: &Rc<Self>, target: &Target) -> Result<VdiSpace, Error> {
        let _request = self.begin()?;
        self.checkpoint(ondisk::SlotState::Running).await?;
        let _reader = self.epochs.enter();
        let settled = self.settled(target).await?;
        let mut space = VdiSpace::default();
        let mut walked = BlockSet::default();
        let mut stack = vec![(settled.root.entry, settled.root.height)];
        while let Some((entry, level)) = stack.pop() {
            if entry.state() != EntryState::Mapped {
                continue;
            }
            if level > 0 {
                let node = self.node_once(entry, &mut walked).await?;
                stack.extend(node.entries().into_iter().map(|child| (child, level - 1)));
                continue;
            }
            space.mapped_bytes += BLOCK_SIZE_U64;
            let exclusive = settled.shared_up_to.is_some_and(|shared| entry.birth() > shared);
            if exclusive && !entry.is_shared() {
                space.exclusive_bytes += BLOCK_SIZE_U64;
            } else {
                space.shared_bytes += BLOCK_SIZE_U64;
            }
        }
        Ok(space)
    }

    /// The tree of a target. A checkpoint has just merged everything that was acknowledged before.
    async fn settled(self: &Rc<Self>, target: &Target) -> Result<Settled, Error> {
        let vdi = self.find(&target.vdi).await?;
        let (view, block_count) = match &target.snapshot {
            Some(label) => {
                let snapshot = find_snapshot(&vdi, &target.vdi, label)?;
                (snapshot.view(), snapshot.block_count)
            }
            None => (vdi.head(), vdi.block_count.get()),
        };
        let settled = match view {
            View::Head(branch) => match &*branch.base.borrow() {
                Base::Root(root) => Some((*root, Some(branch.shared_up_to.get()))),
                Base::Point(_, point) => point.root.get().map(|root| (root, None)),
            },
            View::Point(_, point) => point.root.get().map(|root| (root, None)),
        };
        let (root, shared_up_to) = settled.ok_or_else(|| {
            let message = format!("{target} was taken while it was being compared; try again");
            Error::refused(ErrorKind::Busy, message)
        })?;
        Ok(Settled { root, block_count, shared_up_to })
    }

    /// A node of a tree that is walked, and time for others. A tree names each of its nodes once:
    /// without that rule a handful of blocks could stand for 2^40, and a walk would have no end.
    async fn node_once(&self, entry: Entry, walked: &mut BlockSet) -> Result<Node, Error> {
        let at = entry.pba();
        if !walked.insert(at) {
            let what = "tree (it names a block twice)";
            return Err(blockstore::Error::Damaged { what, at }.into());
        }
        self.runtime.yield_now().await;
        Ok(self.nodes.load(entry).await?)
    }

    async fn children(&self, side: &Side, walked: &mut BlockSet) -> Result<Vec<Side>, Error> {
        let mut children = vec![side.below(); FANOUT];
        match side.entry.state() {
            _ if side.lift > 0 => {
                // A node that only exists because the other tree is higher.
                let lowered = Side { entry: side.entry, lift: side.lift - 1 };
                children.fill(Side { entry: Entry::UNMAPPED, lift: 0 });
                if let Some(first) = children.first_mut() {
                    *first = lowered;
                }
            }
            EntryState::Mapped => {
                let node = self.node_once(side.entry, walked).await?;
                for (child, entry) in children.iter_mut().zip(node.entries()) {
                    *child = Side { entry, lift: 0 };
                }
            }
            _ => {}
        }
        Ok(children)
    }
}

/// One side of a comparison: an entry, and how many levels higher it is pretended to be.
#[derive(Clone, Copy)]
struct Side {
    entry: Entry,
    lift: u8,
}

fn raise(root: &RootRef, height: u8) -> Side {
    Side { entry: root.entry, lift: height - root.height }
}

impl Side {
    fn same(&self, other: &Self) -> bool {
        self.lift == other.lift && self.entry.same_content(other.entry)
    }

    fn is_uniform(&self) -> bool {
        matches!(self.entry.state(), EntryState::Unmapped | EntryState::Zero)
    }

    /// What stands below an entry that names no node.
    fn below(&self) -> Self {
        Self { entry: self.entry, lift: 0 }
    }
}

struct Differences {
    extents: Vec<DiffExtent>,
    end: u64,
}

impl Differences {
    fn push(&mut self, start: u64, count: u64, state: EntryState) {
        let offset = start * BLOCK_SIZE_U64;
        let length = count.min(self.end - start) * BLOCK_SIZE_U64;
        let data = matches!(state, EntryState::Mapped | EntryState::Damaged);
        match self.extents.last_mut() {
            Some(last) if last.offset + last.length == offset && last.data == data => {
                last.length += length;
            }
            _ => self.extents.push(DiffExtent { offset, length, data }),
        }
    }
}

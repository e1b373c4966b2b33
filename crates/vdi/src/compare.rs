//! Walking trees: what differs between two, and what one maps.
//!
//! A walk may take hours, and a read epoch that lasted as long would keep everything that is replaced
//! meanwhile from becoming free. So it goes in parts, in order of blocks, and enters an epoch for
//! each: it looks up the trees as they are then, and goes down to where the part before ended. So no
//! part reads a node that was released:
//! - the tree of a VDI's head as of now is released no earlier than readers from now on end;
//! - that of a snapshot is not, until after the snapshot is deleted, which each part looks at first.
//!
//! So of a VDI that is written meanwhile, each part is as it was at some moment of the call. The
//! road not taken: a hidden snapshot would be one moment, and make all that is mapped count as
//! shared for ever.

use std::rc::Rc;

use base::{BLOCK_SIZE_U64, BirthLabel, ErrorKind};
use blockstore::Reader;
use blockstore::tree::span;
use ondisk::{Entry, EntryState, FANOUT, Node, RootRef};

use crate::Error;
use crate::branch::{Base, View};
use crate::engine::{Engine, as_u64};
use crate::manage::not_found;
use crate::mark::BlockSet;
use crate::start::nodes_wanted;
use crate::types::{DiffExtent, Target, VdiDiff, VdiSpace};
use crate::vdi::{Snapshot, Vdi};

/// Nodes that are read in one part of a walk: a second or two on a slow disk.
const NODES_PER_PART: u64 = 256;

/// How often a tree is waited for that a checkpoint has yet to make.
const CHECKPOINTS_MAX: usize = 8;

/// What is walked.
enum Subject {
    /// Nothing at all: what everything differs from that has data.
    Nothing,
    Of {
        vdi: Rc<Vdi>,
        snapshot: Option<Rc<Snapshot>>,
        target: Target,
    },
}

/// A tree as of now, and what it may share.
struct Settled {
    root: RootRef,
    /// Births above this are exclusive; `None`: nothing is known to be.
    shared_up_to: Option<BirthLabel>,
}

/// What a walk has read of one tree.
struct Walked {
    /// In this part. A tree names each of its nodes once: without that rule a handful of blocks
    /// could stand for 2^40, and a walk would have no end.
    blocks: BlockSet,
    /// How many it may still read, in all parts: what is named again may be so in another part.
    nodes_left: u64,
}

impl Subject {
    fn block_count(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Of { snapshot: Some(snapshot), .. } => snapshot.block_count,
            Self::Of { vdi, .. } => vdi.block_count.get(),
        }
    }

    /// The tree as of now; `None` if a checkpoint has yet to make it.
    fn settled(&self) -> Result<Option<Settled>, Error> {
        let Self::Of { vdi, snapshot, target } = self else {
            return Ok(Some(Settled { root: RootRef::empty(1), shared_up_to: None }));
        };
        if vdi.deleted.get() {
            return Err(not_found(&target.vdi));
        }
        let view = match snapshot {
            Some(snapshot) if snapshot.deleted.get() => {
                let message = format!("{target} was deleted meanwhile");
                return Err(Error::refused(ErrorKind::NotFound, message));
            }
            Some(snapshot) => snapshot.view(),
            None => vdi.head(),
        };
        let settled = match view {
            View::Head(branch) => match &*branch.base.borrow() {
                Base::Root(root) => Some((*root, Some(branch.shared_up_to.get()))),
                Base::Point(_, point) => point.root().map(|root| (root, None)),
            },
            View::Point(_, point) => point.root().map(|root| (root, None)),
        };
        Ok(settled.map(|(root, shared_up_to)| Settled { root, shared_up_to }))
    }
}

impl Engine {
    /// Lists at most `extents_max` runs of what differs at and behind the block of byte `offset`;
    /// everything acknowledged before the call is in. Without `from`: of what `to` has data for.
    pub(crate) async fn diff(
        self: &Rc<Self>,
        from: Option<&Target>,
        to: &Target,
        offset: u64,
        extents_max: usize,
    ) -> Result<VdiDiff, Error> {
        let _request = self.begin()?;
        let from = match from {
            Some(from) => self.subject(from).await?,
            None => Subject::Nothing,
        };
        let subjects = [from, self.subject(to).await?];
        self.checkpoint(ondisk::SlotState::Running).await?;
        let [from, to] = subjects.each_ref().map(Subject::block_count);
        let end = from.max(to);
        let mut differences = Differences { extents: Vec::new(), extents_max, left: None, end };
        let mut walked = [self.walked(), self.walked()];
        let mut next = Some(offset / BLOCK_SIZE_U64).filter(|&start| start < end);
        while let Some(start) = next {
            next = self.diff_part(&subjects, start, &mut walked, &mut differences).await?;
        }
        Ok(VdiDiff {
            from_size_bytes: from * BLOCK_SIZE_U64,
            to_size_bytes: to * BLOCK_SIZE_U64,
            extents: differences.extents,
            next: differences.left.map(|block| block * BLOCK_SIZE_U64),
        })
    }

    /// Lists some of what differs at and behind block `start`; where that ended, unless there was no
    /// more, or no room for more.
    async fn diff_part(
        self: &Rc<Self>,
        subjects: &[Subject; 2],
        start: u64,
        walked: &mut [Walked; 2],
        differences: &mut Differences,
    ) -> Result<Option<u64>, Error> {
        let (_reader, [from, to]) = self.enter(subjects).await?;
        let height = from.root.height.max(to.root.height);
        walked.iter_mut().for_each(Walked::begin_part);
        let mut stack = vec![(raise(&from.root, height), raise(&to.root, height), height, 0u64)];
        while let Some((a, b, level, at)) = stack.pop() {
            if at >= differences.end {
                return Ok(None);
            }
            let is_missed = b.is_zeroes() && base::mutant::active("diff_misses_what_is_zeroed");
            if at + span(level) <= start || a.same(&b) || is_missed {
                continue;
            }
            if a.is_zeroes() && b.is_zeroes() {
                // Hole against zeroes: the bytes are the same.
                continue;
            }
            if level == 0 || (a.is_uniform() && b.is_uniform()) {
                let from = at.max(start);
                if !differences.push(from, at + span(level) - from, b.entry.state()) {
                    return Ok(None);
                }
                continue;
            }
            let node_count: u64 = walked.iter().map(Walked::node_count).sum();
            if at > start && node_count >= NODES_PER_PART {
                return Ok(Some(at));
            }
            let (a, b) = (
                self.children(&a, &mut walked[0]).await?,
                self.children(&b, &mut walked[1]).await?,
            );
            let width = span(level - 1);
            for (slot, (a, b)) in
                (0u64..).zip(a.into_iter().zip(b)).collect::<Vec<_>>().into_iter().rev()
            {
                stack.push((a, b, level - 1, at + slot * width));
            }
        }
        Ok(None)
    }

    /// Counts what a VDI or snapshot maps; everything acknowledged before the call is in.
    pub(crate) async fn space(self: &Rc<Self>, target: &Target) -> Result<VdiSpace, Error> {
        let _request = self.begin()?;
        let subject = [self.subject(target).await?];
        self.checkpoint(ondisk::SlotState::Running).await?;
        let mut space = VdiSpace::default();
        let mut walked = self.walked();
        let mut next = Some(0);
        while let Some(start) = next {
            next = self.space_part(&subject, start, &mut walked, &mut space).await?;
        }
        Ok(space)
    }

    /// Counts some of what is mapped at and behind block `start`; where that ended.
    async fn space_part(
        self: &Rc<Self>,
        subject: &[Subject; 1],
        start: u64,
        walked: &mut Walked,
        space: &mut VdiSpace,
    ) -> Result<Option<u64>, Error> {
        let (_reader, [settled]) = self.enter(subject).await?;
        walked.begin_part();
        let mut stack = vec![(settled.root.entry, settled.root.height, 0u64)];
        while let Some((entry, level, at)) = stack.pop() {
            if entry.state() != EntryState::Mapped || at + span(level) <= start {
                continue;
            }
            if level > 0 {
                if at > start && walked.node_count() >= NODES_PER_PART {
                    return Ok(Some(at));
                }
                let node = self.node_once(entry, walked).await?;
                let width = span(level - 1);
                let children = node.entries().into_iter().enumerate().rev();
                let place = |slot| at + as_u64(slot) * width;
                stack.extend(children.map(|(slot, child)| (child, level - 1, place(slot))));
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
        Ok(None)
    }

    async fn subject(self: &Rc<Self>, target: &Target) -> Result<Subject, Error> {
        let (vdi, snapshot) = self.find_durable(target).await?;
        if let Some(snapshot) = &snapshot
            && snapshot.point.root().is_none()
        {
            self.refuse_read_only()?;
            self.reserve_nodes(nodes_wanted(snapshot), || false).await?;
            self.want_tree(&vdi, snapshot);
        }
        Ok(Subject::Of { vdi, snapshot, target: target.clone() })
    }

    /// Enters a read epoch, and looks up trees in it. They are there, but for those of a VDI that
    /// was rolled back meanwhile to a snapshot that no checkpoint has met.
    async fn enter<const COUNT: usize>(
        self: &Rc<Self>,
        subjects: &[Subject; COUNT],
    ) -> Result<(Reader, [Settled; COUNT]), Error> {
        for _ in 0..CHECKPOINTS_MAX {
            self.go_on()?;
            let reader = self.epochs.enter();
            let settled: Result<Option<Vec<_>>, Error> =
                subjects.iter().map(Subject::settled).collect();
            if let Some(Ok(settled)) = settled?.map(TryInto::try_into) {
                return Ok((reader, settled));
            }
            drop(reader);
            self.checkpoint(ondisk::SlotState::Running).await?;
        }
        let message = "a disk is rolled back again and again while it is walked; try later";
        Err(Error::refused(ErrorKind::Busy, message))
    }

    fn walked(&self) -> Walked {
        // A tree has at most as many nodes as there are blocks. Twice that leaves room for paths
        // that are walked again, and for what guests change meanwhile.
        let nodes_left = 2 * self.allocator.capacity_blocks();
        Walked { blocks: BlockSet::default(), nodes_left }
    }

    /// A node of a tree that is walked, and time for others.
    async fn node_once(&self, entry: Entry, walked: &mut Walked) -> Result<Node, Error> {
        let at = entry.pba();
        if !walked.blocks.insert(at) {
            let what = "tree (it names a block twice)";
            return Err(blockstore::Error::Damaged { what, at }.into());
        }
        walked.nodes_left = walked.nodes_left.checked_sub(1).ok_or_else(|| {
            let message = "the tree names more nodes than there are blocks, or changes faster \
                           than it is walked: check the store, or walk a snapshot";
            Error::refused(ErrorKind::Busy, message)
        })?;
        self.runtime.yield_now().await;
        Ok(self.nodes.load(entry).await?)
    }

    async fn children(&self, side: &Side, walked: &mut Walked) -> Result<Vec<Side>, Error> {
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

impl Walked {
    fn begin_part(&mut self) {
        self.blocks = BlockSet::default();
    }

    /// Nodes of this part.
    fn node_count(&self) -> u64 {
        self.blocks.len()
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

    fn is_zeroes(&self) -> bool {
        matches!(self.entry.state(), EntryState::Unmapped | EntryState::Zero)
    }

    /// Whether all blocks below are of one kind, damaged ones too, and there is no node to be read.
    fn is_uniform(&self) -> bool {
        self.lift == 0 && self.entry.state() != EntryState::Mapped
    }

    /// What stands below an entry that names no node.
    fn below(&self) -> Self {
        Self { entry: self.entry, lift: 0 }
    }
}

/// What was found to differ, as far as there is room for it.
struct Differences {
    extents: Vec<DiffExtent>,
    extents_max: usize,
    /// The first block that differs and had no room.
    left: Option<u64>,
    end: u64,
}

impl Differences {
    /// Adds a run, or notes that there is no room for it: then false. The last run goes on whatever
    /// its length, so that none is cut in two.
    fn push(&mut self, start: u64, count: u64, state: EntryState) -> bool {
        let offset = start * BLOCK_SIZE_U64;
        let length = count.min(self.end - start) * BLOCK_SIZE_U64;
        let data = matches!(state, EntryState::Mapped | EntryState::Damaged);
        let full = self.extents.len() >= self.extents_max;
        match self.extents.last_mut() {
            Some(last) if last.offset + last.length == offset && last.data == data => {
                last.length += length;
            }
            _ if full => {
                self.left = Some(start);
                return false;
            }
            _ => self.extents.push(DiffExtent { offset, length, data }),
        }
        true
    }
}

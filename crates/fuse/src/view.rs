//! The tree of files: what is where, and what it is like.

use std::rc::Rc;

use base::ErrorKind;
use disk::directory::{Directory, DiskEntry, SnapshotEntry};
use disk::{Disk, DiskError, Extent, ExtentState, Request, Response};

use crate::files::Files;
use crate::names;
use crate::node::Node;
use crate::protocol::{Attributes, Listing};

/// A VDI with more snapshots than this has them in the directories of their hours only.
const SNAPSHOTS_AT_HAND_MAX: u64 = 1000;

/// Entries that are asked for at once.
const PAGE: usize = 128;

/// Extents that are asked for at once.
const EXTENTS_MAX: usize = 1024;

/// How often they are asked for to know the space of a file: each time costs up to a thousand nodes.
/// What lies behind counts as if it were all data.
const COUNTS_MAX: u32 = 4;

const SECTOR_BYTES: u64 = 512;
const NS_PER_HOUR: u64 = names::SECONDS_PER_HOUR * 1_000_000_000;
const NS_PER_DAY: u64 = names::HOURS_PER_DAY * NS_PER_HOUR;

/// Positions in listings, behind "." and "..": where the listing goes on after an entry. In the
/// directory of a VDI's snapshots, days come first.
const BEGIN: u64 = 2;
const DAYS: u64 = 1 << 40;
const SNAPSHOTS: u64 = 1 << 41;

pub(crate) type Outcome<T> = Result<T, DiskError>;

/// The tree.
pub(crate) struct View {
    directory: Rc<dyn Directory>,
    pub(crate) files: Files,
    uid: u32,
    gid: u32,
}

impl View {
    pub(crate) fn new(directory: Rc<dyn Directory>) -> Self {
        let files = Files::new(Rc::clone(&directory));
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        Self { directory, files, uid, gid }
    }

    /// What a node is like.
    pub(crate) async fn attributes(&self, node: Node) -> Outcome<Attributes> {
        match node {
            Node::Root | Node::Histories => self.directory_attributes(node, 0),
            Node::Disk(id) => {
                let entry = self.directory.disk(id).await?;
                self.file_attributes(node, entry.size_bytes, entry.created_ns, 0o600).await
            }
            Node::History(id) => {
                let entry = self.directory.disk(id).await?;
                self.directory_attributes(node, entry.created_ns)
            }
            Node::Day(id, day) => {
                let at = self.within(id, day.saturating_mul(NS_PER_DAY), NS_PER_DAY).await?;
                self.directory_attributes(node, at)
            }
            Node::Hour(id, hour) => {
                let at = self.within(id, hour.saturating_mul(NS_PER_HOUR), NS_PER_HOUR).await?;
                self.directory_attributes(node, at)
            }
            Node::Snapshot(id, number) => {
                let behind = self.directory.snapshots(id, number.saturating_sub(1), 1).await?;
                let entry = behind.into_iter().find(|entry| entry.number == number);
                let SnapshotEntry { size_bytes, created_ns, .. } = entry.ok_or(MISSING)?;
                self.file_attributes(node, size_bytes, created_ns, 0o400).await
            }
        }
    }

    /// The node of a name in a directory, and what it is like.
    pub(crate) async fn lookup(&self, parent: Node, name: &[u8]) -> Outcome<(Node, Attributes)> {
        let name = std::str::from_utf8(name).map_err(|_| MISSING)?;
        let node = match parent {
            Node::Root if name == names::HISTORIES => Node::Histories,
            Node::Root => {
                let name = names::of_file(name).ok_or(MISSING)?;
                Node::Disk(self.directory.find(&name).await?.id)
            }
            Node::Histories => {
                let name = names::decode(name).ok_or(MISSING)?;
                Node::History(self.directory.find(&name).await?.id)
            }
            Node::History(id) => match names::of_day(name) {
                Some(day) => Node::Day(id, day),
                None => Node::Snapshot(id, self.snapshot(id, name).await?.number),
            },
            Node::Day(id, day) => Node::Hour(id, names::of_hour(day, name).ok_or(MISSING)?),
            Node::Hour(id, hour) => {
                let found = self.snapshot(id, name).await?;
                if names::hour_of(found.created_ns) != hour {
                    return Err(MISSING);
                }
                Node::Snapshot(id, found.number)
            }
            Node::Disk(_) | Node::Snapshot(..) => return Err(NO_DIRECTORY),
        };
        Ok((node, self.attributes(node).await?))
    }

    /// The snapshot of a file name.
    async fn snapshot(&self, id: u64, file: &str) -> Outcome<SnapshotEntry> {
        let name = names::of_file(file).ok_or(MISSING)?;
        let found = self.directory.find_snapshot(id, names::snapshot_key(&name)).await?;
        let is_this = names::snapshot_file(&found) == file || found.number.to_string() == name;
        is_this.then_some(found).ok_or(MISSING)
    }

    /// What is in a directory, from a position on, as far as it fits into so many bytes.
    pub(crate) async fn list(&self, node: Node, from: u64, bytes_max: usize) -> Outcome<Vec<u8>> {
        let mut listing = Listing::new(bytes_max);
        let own = node.number().ok_or(MISSING)?;
        let dots = [(0, "."), (1, "..")];
        let room = dots
            .into_iter()
            .filter(|&(at, _)| at >= from)
            .all(|(at, name)| listing.add(own, at + 1, true, name));
        if room {
            let from = from.max(BEGIN);
            match node {
                Node::Root => {
                    let histories = Node::Histories.number().unwrap_or_default();
                    if from > BEGIN || listing.add(histories, BEGIN + 1, true, names::HISTORIES) {
                        let after = from.saturating_sub(BEGIN + 1);
                        self.list_disks(&mut listing, BEGIN + 1, after, Node::Disk).await?;
                    }
                }
                Node::Histories => {
                    self.list_disks(&mut listing, BEGIN, from - BEGIN, Node::History).await?;
                }
                Node::History(id) => self.list_history(&mut listing, id, from).await?,
                Node::Day(id, day) => self.list_day(&mut listing, id, day, from - BEGIN).await?,
                Node::Hour(id, hour) => {
                    let start = hour.saturating_mul(NS_PER_HOUR);
                    let first = self.first_from(id, start).await?;
                    let before = first.map_or(u64::MAX, |first| first.number - 1);
                    let range = (before.max(from - BEGIN), start.saturating_add(NS_PER_HOUR));
                    self.list_snapshots(&mut listing, id, BEGIN, range).await?;
                }
                Node::Disk(_) | Node::Snapshot(..) => return Err(NO_DIRECTORY),
            }
        }
        Ok(listing.into_bytes())
    }

    /// All VDIs with identities above `after`; the listing goes on behind one at `base` and its
    /// identity.
    async fn list_disks(
        &self,
        listing: &mut Listing,
        base: u64,
        mut after: u64,
        node: fn(u64) -> Node,
    ) -> Outcome<()> {
        loop {
            let page = self.directory.disks(after, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            for DiskEntry { id, name, .. } in page {
                let node = node(id);
                let Some(number) = node.number() else { continue };
                let name = match node.is_directory() {
                    true => names::encode(&name),
                    false => names::file(&name),
                };
                if !listing.add(number, base + id, node.is_directory(), &name) {
                    return Ok(());
                }
            }
        }
    }

    async fn list_history(&self, listing: &mut Listing, id: u64, from: u64) -> Outcome<()> {
        if from < SNAPSHOTS {
            let mut day = if from < DAYS { 0 } else { from - DAYS + 1 };
            while let Some(first) = self.first_from(id, day.saturating_mul(NS_PER_DAY)).await? {
                let found = names::day_of(names::hour_of(first.created_ns));
                if let Some(number) = Node::Day(id, found).number()
                    && !listing.add(number, DAYS + found, true, &names::day(found))
                {
                    return Ok(());
                }
                day = found + 1;
            }
        }
        if self.directory.disk(id).await?.snapshot_count > SNAPSHOTS_AT_HAND_MAX {
            return Ok(());
        }
        let after = from.saturating_sub(SNAPSHOTS);
        self.list_snapshots(listing, id, SNAPSHOTS, (after, u64::MAX)).await
    }

    async fn list_day(&self, listing: &mut Listing, id: u64, day: u64, from: u64) -> Outcome<()> {
        let begin = day.saturating_mul(names::HOURS_PER_DAY);
        let mut hour = begin + from.min(names::HOURS_PER_DAY);
        while let Some(first) = self.first_from(id, hour.saturating_mul(NS_PER_HOUR)).await? {
            let found = names::hour_of(first.created_ns);
            if names::day_of(found) != day {
                return Ok(());
            }
            let next = BEGIN + found - begin + 1;
            if let Some(number) = Node::Hour(id, found).number()
                && !listing.add(number, next, true, &names::hour(found))
            {
                return Ok(());
            }
            hour = found + 1;
        }
        Ok(())
    }

    /// The snapshots with numbers above the first, and from before the second; the listing goes on behind
    /// one at `base` and its number.
    async fn list_snapshots(
        &self,
        listing: &mut Listing,
        id: u64,
        base: u64,
        (mut after, before_ns): (u64, u64),
    ) -> Outcome<()> {
        loop {
            let page = self.directory.snapshots(id, after, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.number;
            for entry in page {
                if entry.created_ns >= before_ns {
                    return Ok(());
                }
                let Some(number) = Node::Snapshot(id, entry.number).number() else { continue };
                let next = base + entry.number;
                if !listing.add(number, next, false, &names::snapshot_file(&entry)) {
                    return Ok(());
                }
            }
        }
    }

    /// When the first snapshot was taken within `length_ns` from `start_ns` on.
    async fn within(&self, id: u64, start_ns: u64, length_ns: u64) -> Outcome<u64> {
        let first = self.first_from(id, start_ns).await?.ok_or(MISSING)?;
        let inside = first.created_ns - start_ns < length_ns;
        inside.then_some(first.created_ns).ok_or(MISSING)
    }

    /// The first snapshot that was not taken before this time. Numbers are in order of time.
    async fn first_from(&self, id: u64, ns: u64) -> Outcome<Option<SnapshotEntry>> {
        // Everything up to `before` is earlier; `first` is the first one known that is not.
        let (mut before, mut end, mut first) = (0, 1u64 << u32::BITS, None);
        while before < end {
            let middle = before + (end - before) / 2;
            let found = self.directory.snapshots(id, middle, 1).await?.pop();
            match found {
                Some(entry) if entry.created_ns < ns => before = entry.number,
                // Nothing above `middle` is earlier.
                later => {
                    end = middle;
                    first = later;
                }
            }
        }
        Ok(first)
    }

    fn directory_attributes(&self, node: Node, changed_ns: u64) -> Outcome<Attributes> {
        let mut attributes = self.times(changed_ns);
        attributes.ino = node.number().ok_or(UNSHOWN)?.into();
        attributes.mode = (0o040_000 | 0o500).into();
        attributes.links = 2.into();
        Ok(attributes)
    }

    async fn file_attributes(
        &self,
        node: Node,
        size: u64,
        changed_ns: u64,
        mode: u32,
    ) -> Outcome<Attributes> {
        let mut attributes = self.times(changed_ns);
        attributes.ino = node.number().ok_or(UNSHOWN)?.into();
        attributes.mode = (0o100_000 | mode).into();
        attributes.links = 1.into();
        attributes.size = size.into();
        // What is damaged shall be seen all the same.
        let bytes = self.data_bytes(node, size).await.unwrap_or(size);
        attributes.blocks = bytes.div_ceil(SECTOR_BYTES).into();
        Ok(attributes)
    }

    fn times(&self, ns: u64) -> Attributes {
        let (seconds, within) = (ns / 1_000_000_000, ns % 1_000_000_000);
        let within = u32::try_from(within).unwrap_or(0);
        Attributes {
            accessed: seconds.into(),
            modified: seconds.into(),
            changed: seconds.into(),
            accessed_ns: within.into(),
            modified_ns: within.into(),
            changed_ns: within.into(),
            uid: self.uid.into(),
            gid: self.gid.into(),
            block_size: 4096.into(),
            ..Attributes::default()
        }
    }

    /// Bytes of data in a file; not less.
    async fn data_bytes(&self, node: Node, size: u64) -> Outcome<u64> {
        let disk = self.files.open(node).await?;
        let (mut at, mut holes) = (0, 0);
        for _ in 0..COUNTS_MAX {
            if at >= size {
                break;
            }
            for extent in extents(&*disk, at, size).await? {
                at += extent.length;
                holes += if is_data(extent) { 0 } else { extent.length };
            }
        }
        Ok(size.max(at) - holes)
    }
}

/// The first place at or behind `offset` that is data, or that is none; `None` if there is no more.
pub(crate) async fn seek(disk: &dyn Disk, offset: u64, data: bool) -> Outcome<Option<u64>> {
    let size = disk.size_bytes();
    let mut at = offset;
    while at < size {
        for extent in extents(disk, at, size).await? {
            if is_data(extent) == data {
                return Ok(Some(at));
            }
            at += extent.length;
        }
    }
    // Every file has a hole behind its end.
    Ok((!data && offset < size).then_some(size))
}

/// Whether a run is reported as data: all but holes.
fn is_data(extent: Extent) -> bool {
    extent.state != ExtentState::Hole
}

/// What lies between two offsets, or at the first of them at least.
async fn extents(disk: &dyn Disk, offset: u64, end: u64) -> Outcome<Vec<Extent>> {
    let length = end - offset;
    let request = Request::BlockStatus { offset, length, extents_max: EXTENTS_MAX };
    match disk.submit(request).await? {
        Response::Extents(extents) => Ok(extents),
        _ => Err(DiskError::new(ErrorKind::Io, "the disk says nothing of its extents")),
    }
}

const MISSING: DiskError = DiskError::new(ErrorKind::NotFound, "there is no such file");
const UNSHOWN: DiskError =
    DiskError::new(ErrorKind::Unsupported, "its number is too large to be shown as a file");
const NO_DIRECTORY: DiskError = DiskError::new(ErrorKind::Invalid, "it is no directory");

//! The legal contents of one block.
//!
//! A block has a base, which is certain, and versions on top of it: changes whose order or whose
//! survival is not certain. What a reader saw is legal if there is
//!
//! - a set of versions that happened: it holds every version that must be there, and with each one
//!   also those that were acknowledged before that one was asked for, unless a crash or a clone
//!   came between (every version of a block is a whole block, G3, so nobody gets the newer one
//!   without what it was built upon), and
//! - an order of that set which keeps what was acknowledged before something else was asked for
//!   before it, and what earlier readers learned,
//!
//! such that every byte is what the last version that covers it put there. The smallest such set is
//! the best one, since more versions only add constraints; so the question is whether a small graph
//! has a cycle.

use std::collections::BTreeSet;
use std::rc::Rc;

use base::BLOCK_SIZE;

use crate::content::Tag;
use crate::model::ops::{Moment, Ops, Outcome, Serial};
use crate::model::segments::{BLOCK_END, Content, Segments};

/// Which versions must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// What was acknowledged before this moment: a running disk.
    Before(Moment),
    /// What was acknowledged: after the process died.
    Acked,
    /// What a flush covered: after the power went.
    Flushed,
}

/// A change of a block that is not yet part of its base.
#[derive(Clone, Debug)]
struct Version {
    serial: Serial,
    start: u16,
    end: u16,
    content: Content,
    /// What is known of it here once it can change no more; else the list of changes knows.
    settled: Option<Fate>,
}

/// The part of a change's history that decides.
#[derive(Clone, Copy, Debug)]
struct Fate {
    issued: Moment,
    ended: Moment,
    /// Whether it must be there, as far as that is settled.
    must: bool,
    acked: bool,
    /// Whether it survives everything from now on.
    durable: bool,
    /// When it was settled, with everything that was not settled before; not yet: never. A crash
    /// or a clone takes a part of what goes together, and what comes later builds upon the rest.
    settled_at: Moment,
}

/// The legal contents of one block.
#[derive(Clone, Debug)]
pub struct BlockModel {
    base: Segments,
    versions: Vec<Version>,
    /// Pairs of versions whose order a reader learned.
    learned: BTreeSet<(Serial, Serial)>,
}

/// A range of bytes that were not legal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Illegal {
    /// First byte within the block.
    pub start: u16,
    /// Why, for people.
    pub why: String,
}

/// How legal bytes came about.
#[derive(Clone, Debug, Default)]
pub struct Explanation {
    /// For each range of bytes (its end), the version that it comes from; `None`: the base.
    writers: Vec<(u16, Option<usize>)>,
    /// Versions that happened before the reader looked.
    happened: Vec<usize>,
    /// Whether no other explanation was possible.
    unique: bool,
}

impl BlockModel {
    /// A block that reads as zeroes.
    #[must_use]
    pub fn zero() -> Self {
        Self::certain(Segments::uniform(Tag::ZERO))
    }

    fn certain(base: Segments) -> Self {
        Self { base, versions: Vec::new(), learned: BTreeSet::new() }
    }

    /// Adds a change that is being asked for.
    pub fn push(
        &mut self,
        ops: &Ops,
        oldest: Moment,
        serial: Serial,
        piece: (u16, u16),
        content: Content,
    ) {
        self.fold(ops, oldest);
        let (start, end) = piece;
        self.versions.push(Version { serial, start, end, content, settled: None });
    }

    /// Whether the contents are certain.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.versions.is_empty()
    }

    /// The contents, if they are certain.
    #[must_use]
    pub fn settled(&self) -> Option<&Segments> {
        self.versions.is_empty().then_some(&self.base)
    }

    /// Whether every legal content is zeroes.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.base.is_zero()
            && self.versions.iter().all(|version| match &version.content {
                Content::Tag(tag) => *tag == Tag::ZERO,
                Content::Segments(segments) => segments.is_zero(),
            })
    }

    /// Checks the bytes of `start..` that a reader saw. `floor` says what must be there.
    ///
    /// # Errors
    /// Where and why they are not legal.
    pub fn check(
        &self,
        ops: &Ops,
        lba: u64,
        start: u16,
        seen: &[u8],
        floor: Floor,
    ) -> Result<Explanation, Illegal> {
        if self.versions.is_empty() {
            let mut expected = [0; BLOCK_SIZE];
            let expected = &mut expected[..seen.len()];
            self.base.render(lba, start, expected);
            let end = start + u16::try_from(seen.len()).unwrap_or(BLOCK_END);
            return match first_difference(expected, seen) {
                None => {
                    Ok(Explanation { writers: vec![(end, None)], happened: vec![], unique: true })
                }
                Some(at) => Err(self.illegal(ops, start + at, "that is certain here")),
            };
        }
        Question::new(self, ops, floor).answer(lba, start, seen)
    }

    /// Notes the order of versions that a reader of a running disk learned.
    pub fn learn(&mut self, ops: &Ops, floor: Floor, explanation: &Explanation) {
        if !self.has_rivals(explanation) {
            return;
        }
        let question = Question::new(self, ops, floor);
        let mut learned = Vec::new();
        for &(end, writer) in &explanation.writers {
            let Some(writer) = writer else { continue };
            for &other in &explanation.happened {
                let meet = question.covers(other, end.saturating_sub(1));
                if other != writer && meet && !question.precedes(other, writer) {
                    learned.push((self.versions[other].serial, self.versions[writer].serial));
                }
            }
        }
        self.learned.extend(learned);
    }

    /// Whether there is an order to be learned from this.
    #[must_use]
    pub fn has_rivals(&self, explanation: &Explanation) -> bool {
        explanation.unique && explanation.happened.len() > 1
    }

    /// Says of a change whether it happened, once that is known.
    pub fn decide(&mut self, serial: Serial, happened: bool) {
        if happened {
            for version in &mut self.versions {
                if let (true, Some(fate)) = (version.serial == serial, &mut version.settled) {
                    fate.must = true;
                    fate.durable = true;
                }
            }
        } else {
            self.versions.retain(|version| version.serial != serial);
        }
    }

    /// Makes what a reader of the whole block saw the certain content, for ever.
    pub fn pin(&mut self, explanation: &Explanation) {
        let mut base = self.base.clone();
        let mut start = 0;
        for &(end, writer) in &explanation.writers {
            if let Some(version) = writer.and_then(|index| self.versions.get(index)) {
                base.overlay(start, end, &version.content);
            }
            start = end;
        }
        *self = Self::certain(base);
    }

    /// Makes `content` the certain content.
    pub fn set(&mut self, content: Segments) {
        *self = Self::certain(content);
    }

    /// The block as it is now, for good: a copy in a snapshot or a clone, or the block itself after
    /// a crash. What is not in `floor` may be there or not, and nothing later is.
    #[must_use]
    pub fn frozen(&self, ops: &Ops, now: Moment, floor: Floor) -> Self {
        let mut copy = self.clone();
        let question = Question::new(self, ops, floor);
        for (index, version) in copy.versions.iter_mut().enumerate() {
            let mut fate = question.fates[index];
            fate.ended = fate.ended.min(now);
            fate.durable = fate.must;
            fate.settled_at = fate.settled_at.min(now);
            version.settled = Some(fate);
        }
        copy.fold(ops, now);
        copy
    }

    /// The latest that a version which happened was asked for, and the earliest that one which did
    /// not happen was acknowledged, among those that were settled at `settled_at`.
    #[must_use]
    pub fn instant(
        &self,
        ops: &Ops,
        explanation: &Explanation,
        settled_at: Moment,
    ) -> (Moment, Moment) {
        let mut latest_in = Moment(0);
        let mut earliest_out = Moment::NEVER;
        let question = Question::new(self, ops, Floor::Flushed);
        for (index, fate) in question.fates.iter().enumerate() {
            if fate.settled_at != settled_at {
                continue;
            }
            if explanation.happened.contains(&index) {
                latest_in = latest_in.max(fate.issued);
            } else if explanation.unique && fate.acked && question.is_out(index, explanation) {
                earliest_out = earliest_out.min(fate.ended);
            }
        }
        (latest_in, earliest_out)
    }

    /// Moves into the base what no crash can take and no reader can miss any more.
    fn fold(&mut self, ops: &Ops, oldest: Moment) {
        while let Some(index) = self.first_certain(ops, oldest) {
            let version = self.versions.remove(index);
            self.base.overlay(version.start, version.end, &version.content);
            let serial = version.serial;
            self.learned.retain(|&(before, after)| before != serial && after != serial);
        }
    }

    /// A version that is certain and follows upon the base; what it covers in full and what it
    /// follows upon is dropped.
    fn first_certain(&mut self, ops: &Ops, oldest: Moment) -> Option<usize> {
        let fates: Vec<Fate> = self.versions.iter().map(|version| version.fate(ops)).collect();
        let certain = |fate: &Fate| fate.durable && fate.ended < oldest;
        for (index, fate) in fates.iter().enumerate().rev().filter(|(_, fate)| certain(fate)) {
            let version = &self.versions[index];
            let whole = version.start == 0 && version.end == BLOCK_END;
            let serial = version.serial;
            let mut others = fates.iter().enumerate().filter(|&(other, _)| other != index);
            let alone = others.all(|(_, other)| {
                fate.ended < other.issued || (whole && other.ended < fate.issued)
            });
            if !alone {
                continue;
            }
            let mut kept = fates.iter().map(|other| other.ended >= fate.issued);
            self.versions.retain(|_| kept.next().unwrap_or(true));
            return self.versions.iter().position(|version| version.serial == serial);
        }
        None
    }

    fn illegal(&self, ops: &Ops, start: u16, why: &str) -> Illegal {
        let mut text = format!("expected the base ({:?}) {why}", self.base.tag_at(start));
        if !self.versions.is_empty() {
            text = format!("base is {:?}; {why}; changes:", self.base.tag_at(start));
        }
        for version in &self.versions {
            let fate = version.fate(ops);
            let settled = match version.settled {
                Some(_) if fate.must => " [settled: must be there]",
                Some(_) => " [settled: may be there]",
                None => "",
            };
            text.push_str(&format!(
                "\n    {}..{} {}{settled}",
                version.start,
                version.end,
                ops.describe(version.serial)
            ));
        }
        for (before, after) in &self.learned {
            text.push_str(&format!("\n    a reader saw {} before {}", before.0, after.0));
        }
        Illegal { start, why: text }
    }
}

impl Version {
    fn fate(&self, ops: &Ops) -> Fate {
        if let Some(fate) = self.settled {
            return fate;
        }
        match ops.get(self.serial) {
            Some(op) => Fate {
                issued: op.issued,
                ended: op.ended,
                must: false,
                acked: op.outcome == Outcome::Acked,
                durable: op.durable,
                settled_at: Moment::NEVER,
            },
            None => Fate {
                issued: Moment(0),
                ended: Moment::NEVER,
                must: false,
                acked: false,
                durable: false,
                settled_at: Moment::NEVER,
            },
        }
    }
}

fn first_difference(one: &[u8], other: &[u8]) -> Option<u16> {
    if one == other {
        return None;
    }
    let at = one.iter().zip(other).position(|(one, other)| one != other);
    at.and_then(|at| u16::try_from(at).ok())
}

/// One reader's view of a block.
struct Question<'a> {
    block: &'a BlockModel,
    ops: &'a Ops,
    fates: Vec<Fate>,
}

/// A range of bytes that no version's border cuts, with what it may come from.
struct Range {
    end: u16,
    /// `None` is the base.
    choices: Vec<Option<usize>>,
    covering: Vec<usize>,
}

/// Most steps of a search before bytes are let pass as undecided: a choice of a writer is one, and to
/// see whether a choice for each range can be is one for each pair of versions. Only zeroes can be
/// explained in more than one way, so hardly any run gets there. One did when choices alone were counted,
/// and took minutes for a block of some hundred versions.
const STEPS_MAX: usize = 2_000_000;

impl<'a> Question<'a> {
    fn new(block: &'a BlockModel, ops: &'a Ops, floor: Floor) -> Self {
        let fates = block
            .versions
            .iter()
            .map(|version| {
                let mut fate = version.fate(ops);
                fate.must |= version.settled.is_none()
                    && match floor {
                        Floor::Before(moment) => fate.acked && fate.ended < moment,
                        Floor::Acked => fate.acked,
                        Floor::Flushed => fate.durable,
                    };
                fate
            })
            .collect();
        Self { block, ops, fates }
    }

    fn covers(&self, version: usize, byte: u16) -> bool {
        let version = &self.block.versions[version];
        version.start <= byte && byte < version.end
    }

    /// Whether `one` is certainly before `other`, if both happened.
    fn precedes(&self, one: usize, other: usize) -> bool {
        let pair = (self.block.versions[one].serial, self.block.versions[other].serial);
        self.fates[one].ended < self.fates[other].issued || self.block.learned.contains(&pair)
    }

    /// Whether `one` must have happened if `other` did.
    fn implied(&self, one: usize, other: usize) -> bool {
        let (one, other) = (&self.fates[one], &self.fates[other]);
        one.acked && one.settled_at == other.settled_at && one.ended < other.issued
    }

    /// Whether what was seen shows that this version had not happened.
    fn is_out(&self, version: usize, explanation: &Explanation) -> bool {
        explanation.writers.iter().any(|&(end, writer)| {
            self.covers(version, end.saturating_sub(1))
                && writer.is_none_or(|writer| writer != version && self.precedes(writer, version))
        })
    }

    fn answer(&self, lba: u64, start: u16, seen: &[u8]) -> Result<Explanation, Illegal> {
        let mut ranges = self.ranges(lba, start, seen)?;
        self.agree(&mut ranges);
        let unique = ranges.iter().all(|range| range.choices.len() == 1);
        let mut chosen = vec![None; ranges.len()];
        let mut budget = STEPS_MAX;
        let happened = match self.search(&ranges, 0, &mut chosen, &mut budget) {
            Some(happened) => happened,
            None if budget == 0 => Vec::new(),
            None => {
                return Err(self.block.illegal(
                    self.ops,
                    start,
                    "every part is a legal one, but they do not go together",
                ));
            }
        };
        let writers = ranges.iter().zip(chosen).map(|(range, writer)| (range.end, writer));
        Ok(Explanation { writers: writers.collect(), happened, unique: unique && budget > 0 })
    }

    /// Cuts what was seen at the borders of versions, and says what each piece may come from.
    fn ranges(&self, lba: u64, start: u16, seen: &[u8]) -> Result<Vec<Range>, Illegal> {
        let stop = start + u16::try_from(seen.len()).unwrap_or(0);
        let mut borders: Vec<u16> = self.block.base.ends().chain([stop]).collect();
        for version in &self.block.versions {
            borders.extend([version.start, version.end]);
            if let Content::Segments(segments) = &version.content {
                borders.extend(segments.ends());
            }
        }
        borders.sort_unstable();
        borders.dedup();
        let mut ranges = Vec::with_capacity(borders.len());
        let mut from = start;
        let mut scratch = [0; BLOCK_SIZE];
        for &end in borders.iter().filter(|&&end| start < end && end <= stop) {
            let bytes = &seen[usize::from(from - start)..usize::from(end - start)];
            let scratch = &mut scratch[..bytes.len()];
            let covering: Vec<usize> =
                (0..self.fates.len()).filter(|&version| self.covers(version, from)).collect();
            let mut choices = Vec::new();
            for writer in std::iter::once(None).chain(covering.iter().copied().map(Some)) {
                if self.is_overwritten(writer, &covering) {
                    continue;
                }
                match writer {
                    None => self.block.base.render(lba, from, scratch),
                    Some(version) => {
                        self.block.versions[version].content.render(lba, from, scratch);
                    }
                }
                if scratch == bytes {
                    choices.push(writer);
                }
            }
            if choices.is_empty() {
                return Err(self.block.illegal(self.ops, from, "none of these is it"));
            }
            ranges.push(Range { end, choices, covering });
            from = end;
        }
        Ok(ranges)
    }

    /// Whether something that must be there certainly came after `writer`.
    fn is_overwritten(&self, writer: Option<usize>, covering: &[usize]) -> bool {
        covering.iter().any(|&other| {
            self.fates[other].must
                && writer.is_none_or(|writer| writer != other && self.precedes(writer, other))
        })
    }

    /// Ranges that the same versions cover have the same last one.
    fn agree(&self, ranges: &mut [Range]) {
        for index in 1..ranges.len() {
            let (before, after) = ranges.split_at_mut(index);
            let (Some(one), Some(other)) = (before.last_mut(), after.first_mut()) else { continue };
            if one.covering == other.covering {
                other.choices.retain(|choice| one.choices.contains(choice));
            }
        }
        for index in (1..ranges.len()).rev() {
            let (before, after) = ranges.split_at_mut(index);
            let (Some(one), Some(other)) = (before.last_mut(), after.first_mut()) else { continue };
            if one.covering == other.covering {
                one.choices.retain(|choice| other.choices.contains(choice));
            }
        }
    }

    /// Tries writers for the ranges from `at` on. The versions that happened, if it works out.
    fn search(
        &self,
        ranges: &[Range],
        at: usize,
        chosen: &mut [Option<usize>],
        budget: &mut usize,
    ) -> Option<Vec<usize>> {
        let Some(range) = ranges.get(at) else {
            *budget = budget.saturating_sub(self.fates.len() * self.fates.len());
            return self.consistent(ranges, chosen);
        };
        for &choice in &range.choices {
            // Also a choice that leads nowhere costs: there may be more of them than of whole ones.
            *budget = budget.saturating_sub(1);
            if *budget == 0 {
                return None;
            }
            chosen[at] = choice;
            let same_cover = at > 0 && ranges[at - 1].covering == range.covering;
            if same_cover && chosen[at - 1] != choice {
                continue;
            }
            let found = self.search(ranges, at + 1, chosen, budget);
            if found.is_some() || *budget == 0 {
                return found;
            }
        }
        None
    }

    /// The versions that happened if the ranges come from `chosen`; `None` if that cannot be.
    fn consistent(&self, ranges: &[Range], chosen: &[Option<usize>]) -> Option<Vec<usize>> {
        let mut happened: Vec<bool> = self.fates.iter().map(|fate| fate.must).collect();
        for version in chosen.iter().flatten() {
            happened[*version] = true;
        }
        // Whatever implies one directly implies all: being acknowledged before is transitive.
        let roots: Vec<usize> = indices(&happened);
        for (version, happened) in happened.iter_mut().enumerate() {
            *happened |= roots.iter().any(|&root| self.implied(version, root));
        }
        let happened = indices(&happened);
        let mut after: Vec<(usize, usize)> = Vec::new();
        for (range, writer) in ranges.iter().zip(chosen) {
            for &other in range.covering.iter().filter(|other| happened.contains(other)) {
                match writer {
                    None => return None,
                    Some(writer) if *writer != other => after.push((other, *writer)),
                    Some(_) => {}
                }
            }
        }
        self.can_be_ordered(&happened, &after).then_some(happened)
    }

    /// Whether versions can follow each other so that each comes behind those that precede it, and
    /// the second of each pair behind the first.
    fn can_be_ordered(&self, versions: &[usize], pairs: &[(usize, usize)]) -> bool {
        let mut goes_first: Vec<Vec<bool>> = versions
            .iter()
            .map(|&one| {
                let follows = |&other: &usize| other != one && self.precedes(one, other);
                versions.iter().map(follows).collect()
            })
            .collect();
        for (one, other) in pairs {
            if let (Ok(one), Ok(other)) =
                (versions.binary_search(one), versions.binary_search(other))
            {
                goes_first[one][other] = true;
            }
        }
        let count = |at: usize| goes_first.iter().filter(|follows| follows[at]).count();
        let mut before: Vec<usize> = (0..versions.len()).map(count).collect();
        let mut ready: Vec<usize> = (0..before.len()).filter(|&at| before[at] == 0).collect();
        let mut placed = 0;
        while let Some(first) = ready.pop() {
            placed += 1;
            for (at, _) in goes_first[first].iter().enumerate().filter(|(_, follows)| **follows) {
                before[at] -= 1;
                if before[at] == 0 {
                    ready.push(at);
                }
            }
        }
        placed == versions.len()
    }
}

fn indices(set: &[bool]) -> Vec<usize> {
    set.iter().enumerate().filter(|(_, in_set)| **in_set).map(|(index, _)| index).collect()
}

/// Blocks are shared between a VDI, its snapshots and its clones until they differ.
pub type SharedBlock = Rc<BlockModel>;

#[cfg(test)]
mod tests;

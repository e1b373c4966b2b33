//! Every change that clients asked for, in the order in which they asked, and what became of it.

use crate::content::Tag;
use crate::random::{to_u64, to_usize};

/// A point in the order of everything that clients saw and did: request issued, answer received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// After everything.
    pub const NEVER: Self = Self(u64::MAX);
}

/// Counts crashes: what one crash may take must not be confused with what another may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Era(pub u32);

/// Number of a change, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serial(pub u32);

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No answer yet, or none ever, after a crash.
    InFlight,
    /// Acknowledged.
    Acked,
    /// Answered with an error: it may be there or not.
    Failed,
}

/// One change.
#[derive(Clone, Debug)]
pub struct Op {
    /// The model's number of the VDI.
    pub vdi: u32,
    /// What it is, for people.
    pub what: &'static str,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// When it was asked for.
    pub issued: Moment,
    /// When it was answered.
    pub ended: Moment,
    /// What became of it.
    pub outcome: Outcome,
    /// Whether it must survive a power cut.
    pub durable: bool,
    /// Between which crashes it was asked for.
    pub era: Era,
}

/// All changes of a run, and its order of events.
#[derive(Debug, Default)]
pub struct Ops {
    list: Vec<Op>,
    now: Moment,
    era: Era,
}

impl Ops {
    /// The next moment.
    pub fn tick(&mut self) -> Moment {
        self.now.0 += 1;
        self.now
    }

    /// The latest moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.now
    }

    /// The current era.
    #[must_use]
    pub fn era(&self) -> Era {
        self.era
    }

    /// Ends the era.
    pub fn next_era(&mut self) {
        self.era.0 += 1;
    }

    /// Notes a change that is being asked for now.
    pub fn begin(&mut self, vdi: u32, what: &'static str, offset: u64, length: u64) -> Serial {
        let issued = self.tick();
        self.list.push(Op {
            vdi,
            what,
            offset,
            length,
            issued,
            ended: Moment::NEVER,
            outcome: Outcome::InFlight,
            durable: false,
            era: self.era,
        });
        Serial(u32::try_from(self.list.len()).unwrap_or(u32::MAX))
    }

    /// Notes the answer to a change.
    pub fn end(&mut self, serial: Serial, outcome: Outcome, durable: bool) {
        let now = self.tick();
        if let Some(op) = self.get_mut(serial) {
            op.ended = now;
            op.outcome = outcome;
            op.durable = durable;
        }
    }

    /// The change numbered `serial`.
    #[must_use]
    pub fn get(&self, serial: Serial) -> Option<&Op> {
        self.list.get(to_usize(u64::from(serial.0)).checked_sub(1)?)
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, serial: Serial) -> Option<&mut Op> {
        self.list.get_mut(to_usize(u64::from(serial.0)).checked_sub(1)?)
    }

    /// Number of changes so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        to_u64(self.list.len())
    }

    /// Whether there were no changes yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Describes a change, for people.
    #[must_use]
    pub fn describe(&self, serial: Serial) -> String {
        let Some(op) = self.get(serial) else { return format!("unknown write {}", serial.0) };
        let ended = match op.outcome {
            Outcome::InFlight => "no answer".to_owned(),
            Outcome::Acked => format!("acknowledged at {}", op.ended.0),
            Outcome::Failed => format!("failed at {}", op.ended.0),
        };
        let durable = if op.durable { ", flushed" } else { "" };
        format!(
            "{} {} of VDI {} bytes {}..{}, asked for at {}, {ended}{durable}, era {}",
            op.what,
            serial.0,
            op.vdi,
            op.offset,
            op.offset + op.length,
            op.issued.0,
            op.era.0
        )
    }

    /// The bytes that a write leaves are tagged with this.
    #[must_use]
    pub fn tag(&self, serial: Serial) -> Tag {
        self.get(serial).map_or(Tag::ZERO, |op| Tag::new(op.vdi, serial.0))
    }
}

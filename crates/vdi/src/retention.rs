//! Moments of a VDI that are kept by themselves, so that it can be opened as it was.
//!
//! A *retention* is a list of rules such as `every flush for 1h, every 1m for 1d`. Its first rule says
//! when a snapshot is taken, all of them how long it stays: of each interval the first one, up to the
//! rule's age. Ages are of store time, so that a clock that leaps deletes nothing (design rule 38).
//!
//! - A moment is taken after a flush of the guest, so it holds everything that the flush covered; and
//!   when nobody flushes, after a second at most. None is taken while nothing is written.
//! - It is a snapshot like others, with a number and no label, which a checkpoint gives a history
//!   (`history.rs`); its record becomes durable with the next flush, and nobody waits for it.
//! - What was the newest moment when all rules had run out stays: it is what the disk was at their
//!   start.
//! - A moment that is held stays (`holds.rs`).
//! - When the store is full, older halves of them go before a guest's write is refused (design
//!   rule 39).

use std::collections::HashSet;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use base::{ClaimGeneration, ErrorKind, Lsn, SnapshotNumber, VdiId};
use blockstore::log::Admission;
use blockstore::table;
use ondisk::{KEEP_RULES_MAX, KeepRule, Origin, Record, RecordBody, TableRecord, VdiRecord};

use crate::Error;
use crate::engine::Engine;
use crate::manage::{Appended, refuse_without_labels};
use crate::vdi::{Snapshot, Vdi};

/// Shortest time between two moments: flushes that are closer share one.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Longest time between two moments of a VDI that is written and not flushed.
const UNFLUSHED_MAX: Duration = Duration::from_secs(1);

/// Deletions of moments under way at a time.
const DELETED_AT_ONCE: usize = 64;

/// How often in a row it is waited for what is released before moments go.
const RELEASES_AWAITED_MAX: usize = 2;

/// Most moments of a VDI: beyond it the oldest go. They are in memory while the VDI is in use.
const MOMENTS_MAX: usize = 100_000;

/// Which moments are kept by themselves: rules by age, none for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention(Vec<KeepRule>);

/// Units of a length of time as it is shown.
const MS: [(&str, u64); 8] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
    ("w", 7 * 86_400_000),
    ("mo", 30 * 86_400_000),
    ("y", 365 * 86_400_000),
];

impl Retention {
    /// Parses `off`, `24h` (every flush, for a day), or rules with commas between them: `every 1s for
    /// 1h, 1m for 1d`, with `flush` for an interval that leaves out nothing, and `write` if what lies between
    /// two moments can be opened, too.
    ///
    /// # Errors
    /// `Invalid`, with what would be right.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if text == "off" {
            return Ok(Self::default());
        }
        let rules: Option<Vec<KeepRule>> = text.split(',').map(parse_rule).collect();
        let refuse = |what: &str| {
            let message = format!(
                "'{text}' is no history: {what}; give `off`, an age such as `24h`, or rules such as \
                 `every 1s for 1h, 1m for 1d, 1h for 30d`"
            );
            Error::refused(ErrorKind::Invalid, message)
        };
        let rules = rules.ok_or_else(|| {
            refuse("a rule is not understood (ages are written `5m`, `24h`, `30 days`, `1y`), or too long")
        })?;
        if rules.len() > KEEP_RULES_MAX {
            return Err(refuse(&format!("it has more than {KEEP_RULES_MAX} rules")));
        }
        let order =
            |rule: &KeepRule| (rule.every_ms != KeepRule::EVERY_WRITE).then_some(rule.every_ms);
        let rises = |pair: &[KeepRule]| match pair {
            [a, b] => a.for_s < b.for_s && order(a) < order(b),
            _ => true,
        };
        if rules.first().is_some_and(|first| (1..1000).contains(&first.every_ms)) {
            return Err(refuse("a moment is taken at each flush, or once in a second at most"));
        }
        if rules.iter().any(|rule| interval_ms(rule) >= u64::from(rule.for_s) * 1000) {
            return Err(refuse("an age must be longer than its interval"));
        }
        if !rules.windows(2).all(rises) {
            return Err(refuse("ages and intervals must rise from rule to rule"));
        }
        Ok(Self(rules))
    }

    pub(crate) fn new(rules: Vec<KeepRule>) -> Self {
        Self(rules)
    }

    pub(crate) fn rules(&self) -> &[KeepRule] {
        &self.0
    }

    /// Whether nothing is kept by itself.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether each write can be opened.
    pub(crate) fn keeps_writes(&self) -> bool {
        self.0.first().is_some_and(|first| first.every_ms == KeepRule::EVERY_WRITE)
    }

    /// How long it can, in nanoseconds of store time.
    pub(crate) fn writes_for_ns(&self) -> u64 {
        let first = self.0.first().filter(|_| self.keeps_writes());
        first.map_or(0, |first| u64::from(first.for_s) * 1_000_000_000)
    }

    /// Time between two moments, and whether each flush makes one.
    fn interval(&self) -> Option<(Duration, bool)> {
        let first = self.0.first()?;
        Some(match first.every_ms {
            0 | KeepRule::EVERY_WRITE => (INTERVAL_MIN, true),
            every => (Duration::from_millis(every.into()).max(INTERVAL_MIN), false),
        })
    }

    /// Which of some moments, oldest first, with their store times in nanoseconds, are to go.
    fn expired(
        &self,
        now_ns: u64,
        moments: impl Iterator<Item = (SnapshotNumber, u64)>,
    ) -> Vec<SnapshotNumber> {
        let mut expired = Vec::new();
        // The newest that is older than every rule.
        let mut base = None;
        let mut kept = None;
        for (number, taken_ns) in moments {
            let age_ms = now_ns.saturating_sub(taken_ns) / 1_000_000;
            let rule = self.0.iter().position(|rule| age_ms <= u64::from(rule.for_s) * 1000);
            let Some(rule) = rule else {
                expired.extend(base.replace(number));
                continue;
            };
            let every_ms = self.0.get(rule).map_or(0, interval_ms);
            let interval = (taken_ns / 1_000_000).checked_div(every_ms);
            let place = interval.map(|interval| (rule, interval));
            if place.is_some() && place == kept {
                expired.push(number);
            }
            kept = place;
        }
        if self.is_off() {
            expired.extend(base);
        }
        expired
    }
}

/// The interval of which a rule keeps one moment; 0: each.
fn interval_ms(rule: &KeepRule) -> u64 {
    match rule.every_ms {
        KeepRule::EVERY_WRITE => 0,
        every => every.into(),
    }
}

/// `every 1s for 1h`, `1m for 1d`, `flush for 1h`, `write for 10m` or `24h`.
fn parse_rule(text: &str) -> Option<KeepRule> {
    let text = text.trim();
    let (every, age) = match text.strip_prefix("every ") {
        Some(rule) => rule.split_once(" for ")?,
        None => text.split_once(" for ").unwrap_or(("flush", text)),
    };
    let every_ms = match every.trim() {
        "flush" => 0,
        "write" => u64::from(KeepRule::EVERY_WRITE),
        every => parse_ms(every).filter(|&ms| ms < u64::from(KeepRule::EVERY_WRITE))?,
    };
    let for_ms = parse_ms(age.trim())?;
    let rule = KeepRule {
        every_ms: u32::try_from(every_ms).ok()?,
        for_s: u32::try_from(for_ms.div_ceil(1000)).ok()?,
    };
    (rule.for_s > 0 && (every == "flush" || rule.every_ms > 0)).then_some(rule)
}

/// A time in nanoseconds since 1970, if `text` is one: RFC 3339 such as `2026-11-22T10:15:30.250Z`, or
/// `5 minutes ago`.
pub(crate) fn parse_time(text: &str, now_ns: u64) -> Option<u64> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return u64::try_from(time.as_nanosecond()).ok();
    }
    let age_ms = parse_ms(text.strip_suffix("ago")?)?;
    now_ns.checked_sub(age_ms.checked_mul(1_000_000)?)
}

/// Length of `2030-01-31`.
const DATE_BYTES: usize = 10;

/// A time to come, in nanoseconds since 1970: RFC 3339, a day such as `2030-01-31` (its beginning, UTC),
/// or how long from now, such as `30d` or `2 years`.
pub(crate) fn parse_until(text: &str, now_ns: u64) -> Option<u64> {
    let utc = jiff::tz::TimeZone::UTC;
    let now = jiff::Timestamp::from_nanosecond(now_ns.into()).ok()?;
    let time = if let Ok(time) = text.parse::<jiff::Timestamp>() {
        time
    } else if let (DATE_BYTES, Ok(day)) = (text.len(), text.parse::<jiff::civil::Date>()) {
        // Longer texts have a time of day, and no zone that would say of which.
        day.to_zoned(utc).ok()?.timestamp()
    } else {
        let span = text.parse::<jiff::Span>().ok()?;
        now.to_zoned(utc).checked_add(span).ok()?.timestamp()
    };
    u64::try_from(time.as_nanosecond()).ok().filter(|&wall_ns| wall_ns > now_ns)
}

/// A length of time in milliseconds: `5m`, `24h`, `1 day`, `2 days 1h`. A day has 24 hours, a month 30
/// days, a year 365.
pub(crate) fn parse_ms(text: &str) -> Option<u64> {
    let span = text.trim().parse::<jiff::Span>().ok().filter(|span| !span.is_negative())?;
    let days = i64::from(span.get_years()) * 365 + i64::from(span.get_months()) * 30;
    let rest =
        span.years(0).months(0).to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok()?;
    let rest_ms = u64::try_from(rest.as_millis()).ok()?;
    rest_ms.checked_add(u64::try_from(days).ok()?.checked_mul(86_400_000)?)
}

fn show_ms(ms: u64) -> String {
    let whole = MS.iter().rev().find(|(_, unit)| ms.is_multiple_of(*unit));
    whole.map_or_else(String::new, |(name, unit)| format!("{}{name}", ms / unit))
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off() {
            return f.write_str("off");
        }
        for (index, rule) in self.0.iter().enumerate() {
            let every = match rule.every_ms {
                0 => "flush".to_owned(),
                KeepRule::EVERY_WRITE => "write".to_owned(),
                every => show_ms(every.into()),
            };
            let lead = if index == 0 { "every " } else { ", " };
            write!(f, "{lead}{every} for {}", show_ms(u64::from(rule.for_s) * 1000))?;
        }
        Ok(())
    }
}

impl Engine {
    /// Changes which moments of a VDI are kept by themselves; `None`: those that the store keeps.
    /// Durable on return.
    pub(crate) async fn retain(
        self: &Rc<Self>,
        name: &str,
        retention: Option<Retention>,
    ) -> Result<(), Error> {
        let _request = self.begin_change()?;
        self.reserve_metadata(|| false).await?;
        if let Some(retention) = &retention {
            self.refuse_writes(retention)?;
        }
        let (one, vdi) = self.manage(name).await?;
        let room = self.room().await?;
        let rules = retention.as_ref().map(|retention| retention.rules().to_vec());
        let appended = self.append(room, &vdi, RecordBody::Retain { rules });
        self.apply_retain(&vdi, retention, appended.0);
        drop(one);
        self.settle(appended).await
    }

    pub(crate) fn apply_retain(&self, vdi: &Vdi, retention: Option<Retention>, lsn: Lsn) {
        vdi.has_own_rules.set(retention.is_some());
        let retention = retention.unwrap_or_else(|| self.default_retention.borrow().clone());
        vdi.branch.borrow().writes.set(retention.keeps_writes(), lsn);
        *vdi.retention.borrow_mut() = retention;
        self.touch(vdi);
    }

    /// Changes which moments are kept of VDIs that have no rules of their own. Durable on return.
    pub(crate) async fn retain_by_default(
        self: &Rc<Self>,
        retention: Retention,
    ) -> Result<(), Error> {
        let _request = self.begin_change()?;
        if !self.has_holds.get() {
            let message = "this store was formatted by a Parallax that knew no history for all disks: \
                           give each disk its own";
            return Err(Error::refused(ErrorKind::Unsupported, message));
        }
        self.refuse_writes(&retention)?;
        let one = self.management.acquire(1).await;
        let room = self.room().await?;
        let (vdi, claim) = (VdiId::default(), ClaimGeneration::default());
        let body = RecordBody::RetainByDefault { rules: retention.rules().to_vec() };
        let appended = self.log.append_admitted(room, &Record { vdi, claim, body });
        self.apply_retain_by_default(retention, appended.0);
        drop(one);
        self.settle(appended).await
    }

    pub(crate) fn apply_retain_by_default(&self, retention: Retention, lsn: Lsn) {
        let registry = self.registry.borrow();
        for vdi in registry.loaded.values().filter(|vdi| !vdi.has_own_rules.get()) {
            vdi.branch.borrow().writes.set(retention.keeps_writes(), lsn);
            *vdi.retention.borrow_mut() = retention.clone();
        }
        *self.default_retention.borrow_mut() = retention;
    }

    /// Refuses a retention with `every write` if the store was formatted before there was that.
    fn refuse_writes(&self, retention: &Retention) -> Result<(), Error> {
        if !retention.keeps_writes() || self.keeps_writes.get() {
            return Ok(());
        }
        let message = "this store was formatted by a Parallax that could not keep every write: keep every \
                       flush, or send its disks to a new store";
        Err(Error::refused(ErrorKind::Unsupported, message))
    }

    /// Has a moment taken soon if there are many writes that none keeps.
    pub(crate) fn keep_many_writes(self: &Rc<Self>, vdi: &Rc<Vdi>) {
        if vdi.branch.borrow().writes.are_many() {
            self.keep_moment(vdi, Duration::ZERO);
        }
    }

    /// Notes that a guest's flush has succeeded.
    pub(crate) fn note_flush(self: &Rc<Self>, vdi: &Rc<Vdi>) {
        let interval = vdi.retention.borrow().interval();
        if let Some((interval, true)) = interval {
            self.keep_moment(vdi, interval);
        }
    }

    /// Has the VDIs in use of which moments are kept or something is held: their time comes though nobody
    /// opens them.
    pub(crate) async fn load_retained(self: Rc<Self>) {
        let mut last = VdiId::default();
        loop {
            let next = self.registry.borrow().directory.after(last).next();
            let Some(next) = next.filter(|_| self.go_on().is_ok()) else { return };
            let page = next.get() / VdiRecord::PER_PAGE;
            last = VdiId::new((page + 1) * VdiRecord::PER_PAGE - 1);
            for id in self.retained_on(page).await {
                // What is damaged is told of when somebody opens it.
                let _ = self.vdi(id).await;
            }
            self.runtime.yield_now().await;
        }
    }

    /// VDIs of a page of their table that have something to do with moments or holds.
    async fn retained_on(&self, page: u64) -> Vec<VdiId> {
        let _reader = self.epochs.enter();
        let vdis = self.roots.get().vdis;
        let Ok(Some(node)) = table::page_once(&self.nodes, &vdis, page).await else {
            return Vec::new();
        };
        let indices = page * VdiRecord::PER_PAGE..(page + 1) * VdiRecord::PER_PAGE;
        let records = indices.filter_map(|at| VdiRecord::get(node.block(), at).ok().flatten());
        // What has nothing but the store's rules and no moment yet has had nothing to keep.
        let has_rules = |vdi: &VdiRecord| vdi.retention.as_ref().is_some_and(|it| !it.is_empty());
        let is_wanted = |vdi: &VdiRecord| vdi.has_moments || has_rules(vdi) || vdi.ledger_count > 0;
        records.filter(is_wanted).map(|vdi| vdi.id).collect()
    }

    /// VDIs in use that have something to do with moments, in order.
    fn retained(&self) -> Vec<Rc<Vdi>> {
        let registry = self.registry.borrow();
        let loaded = registry.loaded.values();
        let mut retained: Vec<_> = loaded.filter(|vdi| vdi.has_moments()).map(Rc::clone).collect();
        retained.sort_by_key(|vdi| vdi.id);
        retained
    }

    /// Takes the moments that are due by time.
    pub(crate) fn keep_moments(self: &Rc<Self>) {
        for vdi in self.retained() {
            let interval = vdi.retention.borrow().interval();
            if let Some((interval, by_flush)) = interval {
                self.keep_moment(&vdi, if by_flush { UNFLUSHED_MAX } else { interval });
            }
        }
    }

    /// Deletes moments whose time has come, in the background.
    pub(crate) fn end_moments(self: &Rc<Self>) {
        let retained = self.retained();
        if retained.is_empty() || self.keeping.replace(true) {
            return;
        }
        let engine = Rc::clone(self);
        drop(self.runtime.spawn(async move {
            for vdi in retained {
                engine.end_writes(&vdi);
                let expired = engine.expired_moments(&vdi);
                if let Err(error) = engine.delete_moments(&vdi, expired).await {
                    tracing::warn!(%error, "moments whose time has come could not be deleted");
                    break;
                }
            }
            engine.keeping.set(false);
        }));
    }

    fn expired_moments(&self, vdi: &Vdi) -> Vec<SnapshotNumber> {
        let snapshots = vdi.snapshots.borrow();
        let moments = || snapshots.iter().filter(|snapshot| is_unused_moment(snapshot));
        let with_times = moments().map(|snapshot| (snapshot.number, snapshot.store_ns));
        let mut expired = vdi.retention.borrow().expired(self.store_ns(), with_times);
        let excess = snapshots.kept_count().saturating_sub(expired.len() + MOMENTS_MAX);
        if excess > 0 {
            let gone: HashSet<_> = expired.iter().copied().collect();
            let left = moments().map(|snapshot| snapshot.number).filter(|it| !gone.contains(it));
            expired.extend(left.take(excess));
        }
        expired
    }

    /// Takes a moment in the background, if something was written and the last one is old enough.
    fn keep_moment(self: &Rc<Self>, vdi: &Rc<Vdi>, interval: Duration) {
        let now = self.runtime.now();
        let rested = vdi.moment_at.get().is_none_or(|at| now.since(at) >= interval);
        let is_due = vdi.changed_blocks.get() > 0 && rested && !vdi.is_leaving();
        if !is_due || self.read_only || vdi.moment_pending.replace(true) {
            return;
        }
        let (engine, vdi) = (Rc::clone(self), Rc::clone(vdi));
        drop(self.runtime.spawn(async move {
            let taken = engine.take_moment(&vdi).await;
            vdi.moment_pending.set(false);
            if let Err(error) = taken {
                let registry = engine.registry.borrow();
                tracing::warn!(disk = registry.name(vdi.id), %error, "a moment could not be kept");
            }
        }));
    }

    async fn take_moment(self: &Rc<Self>, vdi: &Rc<Vdi>) -> Result<(), Error> {
        let _request = self.begin_change()?;
        // Older moments do not go for a new one.
        if !self.metadata_suffices().await? {
            return Ok(());
        }
        refuse_without_labels(&vdi.branch.borrow())?;
        let room = self.room().await?;
        if vdi.deleted.get() || vdi.is_leaving() {
            return Ok(());
        }
        let appended = self.append_moment(room, vdi);
        self.complete_record(appended).await
    }

    /// Appends the record of a moment of all that was written so far.
    pub(crate) fn append_moment(&self, room: Admission, vdi: &Vdi) -> Appended {
        let changed_blocks = self.begin_moment(vdi);
        self.append_snapshot(room, vdi, "", Origin::Kept { changed_blocks })
    }

    /// Notes that a moment is taken; returns the number of blocks that were changed since the last.
    pub(crate) fn begin_moment(&self, vdi: &Vdi) -> u64 {
        vdi.moment_at.set(Some(self.runtime.now()));
        self.stats.borrow_mut().moments += 1;
        vdi.changed_blocks.take()
    }

    /// Deletes some moments of a VDI, but for those that somebody has open by now.
    async fn delete_moments(
        self: &Rc<Self>,
        vdi: &Rc<Vdi>,
        numbers: Vec<SnapshotNumber>,
    ) -> Result<(), Error> {
        for numbers in numbers.chunks(DELETED_AT_ONCE) {
            let _request = self.begin_change()?;
            let mut under_way = Vec::with_capacity(numbers.len());
            for &number in numbers {
                let one = self.management.acquire(1).await;
                let room = self.room().await?;
                let goes = vdi.snapshots.borrow().get(number).is_some_and(is_unused_moment);
                if goes && !vdi.deleted.get() {
                    let appended = self.append(room, vdi, RecordBody::DeleteSnapshot { number });
                    self.apply_delete_snapshot(vdi, number);
                    // Each is finished by itself: the next may wait for a checkpoint, which waits for
                    // all records before it.
                    let engine = Rc::clone(self);
                    under_way.push(
                        self.runtime.spawn(async move { engine.complete_record(appended).await }),
                    );
                }
                drop(one);
            }
            for deletion in under_way {
                deletion.await?;
            }
            self.runtime.yield_now().await;
        }
        Ok(())
    }

    /// Gives up the older half of all moments, and then of what is left, until an attempt at what a guest
    /// waits for gives something; `None` if it never does.
    pub(crate) async fn thin_until<T>(
        self: &Rc<Self>,
        gives_up: impl Fn() -> bool,
        attempt: impl AsyncFn() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let mut waits = 0;
        loop {
            // What was given up before is worth waiting for before more goes. Others need not wait for
            // this one's readers.
            self.released(self.releases.up_to_now(), &gives_up).await;
            self.allocator.reclaim_empty_extents();
            self.go_on()?;
            let _one = self.thinning.acquire(1).await;
            if let Some(given) = attempt().await? {
                return Ok(Some(given));
            }
            if gives_up() {
                return Ok(None);
            }
            // Guests that go on overwriting release without end.
            if self.releases.are_under_way() && waits < RELEASES_AWAITED_MAX {
                waits += 1;
                continue;
            }
            waits = 0;
            if !self.thin_moments().await || !self.cycle_for_space().await {
                return Ok(None);
            }
        }
    }

    /// Gives up the older half of all moments. Whether there were any.
    async fn thin_moments(self: &Rc<Self>) -> bool {
        let mut any = false;
        for vdi in self.retained() {
            let older: Vec<SnapshotNumber> = {
                let snapshots = vdi.snapshots.borrow();
                let unused = snapshots.iter().filter(|snapshot| is_unused_moment(snapshot));
                let count = snapshots.kept_count().div_ceil(2);
                unused.take(count).map(|snapshot| snapshot.number).collect()
            };
            if older.is_empty() {
                continue;
            }
            any = true;
            tracing::warn!(
                disk = self.registry.borrow().name(vdi.id),
                count = older.len(),
                "the store is full: the older half of the kept moments goes"
            );
            if self.delete_moments(&vdi, older).await.is_err() {
                return false;
            }
        }
        any
    }
}

/// Whether a snapshot is a moment that is not held, and that nobody has open.
fn is_unused_moment(snapshot: &Rc<Snapshot>) -> bool {
    let is_kept = snapshot.is_kept() || base::mutant::active("thinning_takes_what_was_asked_for");
    let is_held = snapshot.hold.get().is_some() && !base::mutant::active("thinning_takes_held");
    is_kept && !is_held && Rc::strong_count(snapshot) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retentions_are_understood_and_shown() {
        for (text, shown) in [
            ("24h", "every flush for 1d"),
            ("off", "off"),
            ("every 1s for 1h, 1m for 1d, 1h for 30d, 1d for 1y", ""),
            ("every flush for 90m", "every flush for 90m"),
            (" 2s for 1m ", "every 2s for 1m"),
            ("1 day", "every flush for 1d"),
            ("every 2 seconds for 1h 30m, 1 minute for 3mo", "every 2s for 90m, 1m for 3mo"),
            ("1mo", "every flush for 1mo"),
            ("every write for 10m, 1s for 1h", "every write for 10m, 1s for 1h"),
            ("every write for 10m, flush for 1h", ""),
            ("write for 10m", "every write for 10m"),
        ] {
            let retention = Retention::parse(text).unwrap();
            let again = Retention::parse(&retention.to_string()).unwrap();
            assert_eq!(retention, again, "{text}");
            assert!(shown.is_empty() || retention.to_string() == shown, "{retention}");
        }
        for nonsense in [
            "x",
            "1",
            "-1h",
            "1h ago",
            "every 1h",
            "0s",
            "1h for 1d, 1m for 2d",
            "5m for 1h, 1h",
            "",
            "1d for 1h",
            "1s for 1h, write for 2h",
            "flush for 10m, write for 1h",
            "every write",
        ] {
            assert!(Retention::parse(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn moments_are_named_by_their_time() {
        let now = 1_764_240_000_000_000_000;
        assert_eq!(parse_time("2025-11-27T10:40:00.250Z", now), Some(now + 250_000_000));
        assert_eq!(parse_time("5 minutes ago", now), Some(now - 300_000_000_000));
        assert_eq!(parse_time("2 days 1h ago", now), Some(now - 49 * 3_600_000_000_000));
        // As a history takes them.
        assert_eq!(parse_time("5m ago", now), Some(now - 300_000_000_000));
        assert_eq!(parse_time("1mo ago", now), Some(now - 30 * 86_400_000_000_000));
        assert_eq!(parse_time("1y 1w ago", now), Some(now - 372 * 86_400_000_000_000));
        for nonsense in ["", "ago", "yesterday", "17", "-5 minutes ago", "5 minutes", "90000 y ago"]
        {
            assert_eq!(parse_time(nonsense, now), None, "{nonsense}");
        }
    }

    #[test]
    fn times_to_come_are_understood() {
        // 2025-11-27T11:20:00Z
        let now = 1_764_242_400_000_000_000;
        let seconds = |text: &str| parse_until(text, now).map(|at| (at - now) / 1_000_000_000);
        assert_eq!(seconds("2025-11-27T12:20:00.5+00:00"), Some(3600));
        assert_eq!(seconds("2025-11-28"), Some(12 * 3600 + 40 * 60));
        assert_eq!(seconds("30d"), Some(30 * 86_400));
        assert_eq!(seconds("2 weeks 1h"), Some(14 * 86_400 + 3600));
        assert_eq!(seconds("1 year"), Some(365 * 86_400));
        for nonsense in [
            "",
            "0s",
            "-1d",
            "5 minutes ago",
            "2025-11-27",
            "soon",
            "90000 years",
            "7",
            "2030-01-31T18:00:00",
            "2030-01-31 18:00",
        ] {
            assert_eq!(parse_until(nonsense, now), None, "{nonsense}");
        }
    }

    #[test]
    fn of_each_interval_one_moment_is_kept() {
        let retention = Retention::parse("every flush for 10s, 5s for 60s").unwrap();
        let second = |at: u64| at * 1_000_000_000;
        let moments = |now: u64| (1..=now).map(|at| (SnapshotNumber::new(at), second(at)));
        let expired = |now: u64| -> Vec<u64> {
            let expired = retention.expired(second(now), moments(now));
            expired.into_iter().map(SnapshotNumber::get).collect()
        };
        assert_eq!(expired(11), [0u64; 0]);
        let gone = expired(100);
        let kept: Vec<u64> = (1..=100).filter(|at| !gone.contains(at)).collect();
        let mut expected = vec![39];
        expected.extend((40..90).step_by(5));
        expected.extend(90..=100);
        assert_eq!(kept, expected, "the newest that is too old, one each five seconds, all");
        let off = Retention::default();
        assert_eq!(off.expired(second(5), moments(5)).len(), 5);
    }
}

//! The rules of a retention: as they are written and shown, and which moments they leave.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

use base::size::parse_bytes;
use base::{BLOCK_SIZE_U64, ErrorKind, SnapshotNumber};
use ondisk::{KEEP_RULES_MAX, KeepRule, KeepRules};

use crate::Error;
use crate::times::{parse_ms, show_ms};

/// Shortest time between two moments: flushes that are closer share one.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// What a budget begins with.
const AT_MOST: &str = "at most ";

/// Units of a budget as it is shown.
const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// Which moments are kept by themselves: rules by age, none for none, and how much they may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention(KeepRules);

impl Retention {
    /// Parses `off`, `24h` (every flush, for a day), or rules with commas between them: `every 1s for
    /// 1h, 1m for 1d`, with `flush` for an interval that leaves out nothing, and `write` if what lies between
    /// two moments can be opened, too. Behind rules may stand a budget, `at most 20G`.
    ///
    /// # Errors
    /// `Invalid`, with what would be right.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if text == "off" {
            return Ok(Self::default());
        }
        let refuse = |what: &str| {
            let message = format!(
                "'{text}' is no history: {what}; give `off`, an age such as `24h`, rules such as \
                 `every 1s for 1h, 1m for 1d, 1h for 30d` or `every write for 10m, 24h`, and `at most 20G` behind \
                 them for a bound"
            );
            Error::refused(ErrorKind::Invalid, message)
        };
        let (rules, budget) = match text.rsplit_once(',') {
            _ if text.starts_with(AT_MOST) => {
                return Err(refuse("how much it may hold stands behind what is kept"));
            }
            Some((rules, last)) => match last.trim().strip_prefix(AT_MOST) {
                Some(budget) => (rules, Some(parse_budget(budget).map_err(|what| refuse(&what))?)),
                None => (text, None),
            },
            None => (text, None),
        };
        if rules.trim() == "off" {
            return Err(refuse("`off` keeps nothing that could be bounded"));
        }
        if rules.split(',').any(|rule| rule.trim().starts_with(AT_MOST)) {
            return Err(refuse("how much it may hold stands once, at the end"));
        }
        let rules: Option<Vec<KeepRule>> = rules.split(',').map(parse_rule).collect();
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
        Ok(Self(KeepRules { rules, budget }))
    }

    pub(crate) fn new(rules: KeepRules) -> Self {
        Self(rules)
    }

    pub(crate) fn rules(&self) -> &KeepRules {
        &self.0
    }

    /// Bytes that the moments may hold which no newest state needs, if that is bounded.
    #[must_use]
    pub fn budget_bytes(&self) -> Option<u64> {
        self.0.budget.map(NonZeroU64::get)
    }

    /// As [`Self::budget_bytes`], in whole blocks.
    pub(crate) fn budget_blocks(&self) -> Option<u64> {
        self.budget_bytes().map(|bytes| bytes / BLOCK_SIZE_U64)
    }

    /// Whether nothing is kept by itself.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.0.rules.is_empty()
    }

    /// Whether each write can be opened.
    pub(crate) fn keeps_writes(&self) -> bool {
        self.0.rules.first().is_some_and(|first| first.every_ms == KeepRule::EVERY_WRITE)
    }

    /// How long it can, in nanoseconds of store time.
    pub(crate) fn writes_for_ns(&self) -> u64 {
        let first = self.0.rules.first().filter(|_| self.keeps_writes());
        first.map_or(0, |first| u64::from(first.for_s) * 1_000_000_000)
    }

    /// Time between two moments, and whether each flush makes one.
    pub(super) fn interval(&self) -> Option<(Duration, bool)> {
        let first = self.0.rules.first()?;
        Some(match first.every_ms {
            0 | KeepRule::EVERY_WRITE => (INTERVAL_MIN, true),
            every => (Duration::from_millis(every.into()).max(INTERVAL_MIN), false),
        })
    }

    /// Which of some moments, oldest first, with their store times in nanoseconds, are to go.
    pub(super) fn expired(
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
            let rule = self.0.rules.iter().position(|rule| age_ms <= u64::from(rule.for_s) * 1000);
            let Some(rule) = rule else {
                expired.extend(base.replace(number));
                continue;
            };
            let every_ms = self.0.rules.get(rule).map_or(0, interval_ms);
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

/// `20G`. A number alone would be bytes: whoever forgets the unit would lose the history.
fn parse_budget(text: &str) -> Result<NonZeroU64, String> {
    let text = text.trim();
    if text.ends_with(|last: char| last.is_ascii_digit() || last == '.') {
        return Err(format!("{text} of what? write `{AT_MOST}{text}G`, or another unit"));
    }
    NonZeroU64::new(parse_bytes(text)?).ok_or_else(|| "0 bytes hold nothing".to_owned())
}

/// A budget as [`parse_bytes`] takes it.
fn show_budget(bytes: u64) -> String {
    let whole = UNITS.iter().find(|(_, shift)| bytes.is_multiple_of(1 << shift));
    whole.map_or_else(|| format!("{bytes}B"), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off() {
            return f.write_str("off");
        }
        for (index, rule) in self.0.rules.iter().enumerate() {
            let every = match rule.every_ms {
                0 => "flush".to_owned(),
                KeepRule::EVERY_WRITE => "write".to_owned(),
                every => show_ms(every.into()),
            };
            let lead = if index == 0 { "every " } else { ", " };
            write!(f, "{lead}{every} for {}", show_ms(u64::from(rule.for_s) * 1000))?;
        }
        if let Some(bytes) = self.budget_bytes() {
            write!(f, ", {AT_MOST}{}", show_budget(bytes))?;
        }
        Ok(())
    }
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
            ("24h, at most 20G", "every flush for 1d, at most 20G"),
            (
                "every flush for 1h, 1m for 1d,  at most  1.5 TiB ",
                "every flush for 1h, 1m for 1d, at most 1536G",
            ),
            ("1h, at most 4097b", "every flush for 1h, at most 4097B"),
            ("1h, at most 15.5E", "every flush for 1h, at most 16252928T"),
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
            "1h at most 20G",
        ] {
            assert!(Retention::parse(nonsense).is_err(), "{nonsense}");
        }
        for (nonsense, what) in [
            ("off, at most 20G", "`off` keeps nothing"),
            ("at most 20G", "stands behind what is kept"),
            ("at most 20G, 1h", "stands behind what is kept"),
            ("1h, at most 20G, 1m for 1d", "stands once, at the end"),
            ("1h, at most 1G, at most 2G", "stands once, at the end"),
            ("1h, at most much", "'much' is not a size"),
            ("1h, at most 0K", "0 bytes hold nothing"),
            ("1h, at most 20", "write `at most 20G`"),
            ("1h, at most  20 ", "write `at most 20G`"),
            ("1h, at most 1.5", "write `at most 1.5G`"),
            ("1h, at most 16E", "16 EiB or more"),
            ("1h, at most", "a rule is not understood"),
        ] {
            let error = Retention::parse(nonsense).unwrap_err().to_string();
            assert!(error.contains(what), "{nonsense}: {error}");
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

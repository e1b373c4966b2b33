//! File names: how VDIs, snapshots and the times of their directories are written, and read again.
//!
//! - A VDI `web01` is the file `web01.img`; its snapshots are in a directory `web01`.
//! - A snapshot is a file named by its label, or else by the moment at which it was taken and its number,
//!   `2026-11-27T10:15:30.250Z@17.img`. `17.img` finds it too.
//! - What a file name cannot hold is written as a percent sign and two hexadecimal digits: slashes, percent
//!   signs, and a dot at the beginning.
//! - Times are UTC.

use disk::directory::SnapshotEntry;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

const SUFFIX: &str = ".img";

/// The directory of all snapshots.
pub(crate) const HISTORIES: &str = ".snapshots";

pub(crate) const SECONDS_PER_HOUR: u64 = 3600;
pub(crate) const HOURS_PER_DAY: u64 = 24;

/// A name as a file name.
pub(crate) fn encode(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (index, c) in name.chars().enumerate() {
        match c {
            '/' => encoded.push_str("%2F"),
            '%' => encoded.push_str("%25"),
            '.' if index == 0 => encoded.push_str("%2E"),
            c => encoded.push(c),
        }
    }
    encoded
}

/// The name that a file name stands for.
pub(crate) fn decode(encoded: &str) -> Option<String> {
    let mut parts = encoded.split('%');
    let mut name = parts.next()?.to_owned();
    for part in parts {
        name.push(match part.get(..2)? {
            "2F" => '/',
            "25" => '%',
            "2E" => '.',
            _ => return None,
        });
        name.push_str(part.get(2..)?);
    }
    // Each name has one file.
    (encode(&name) == encoded).then_some(name)
}

/// The file of what is called `name`.
pub(crate) fn file(name: &str) -> String {
    format!("{}{SUFFIX}", encode(name))
}

/// What the file stands for.
pub(crate) fn of_file(file: &str) -> Option<String> {
    decode(file.strip_suffix(SUFFIX)?)
}

/// The file of a snapshot.
pub(crate) fn snapshot_file(snapshot: &SnapshotEntry) -> String {
    match &snapshot.label {
        Some(label) => file(label),
        None => file(&format!("{:.3}@{}", timestamp(snapshot.created_ns), snapshot.number)),
    }
}

/// The label or number that a snapshot of this name is found by. Labels have no `@`.
pub(crate) fn snapshot_key(name: &str) -> &str {
    name.rsplit_once('@').map_or(name, |(_, number)| number)
}

/// The day of an hour, both counted from 1970.
pub(crate) fn day_of(hour: u64) -> u64 {
    hour / HOURS_PER_DAY
}

/// The hour, counted from 1970, of a time.
pub(crate) fn hour_of(ns: u64) -> u64 {
    ns / 1_000_000_000 / SECONDS_PER_HOUR
}

/// The directory of a day: `2026-11-27`.
pub(crate) fn day(day: u64) -> String {
    let seconds = day.saturating_mul(HOURS_PER_DAY * SECONDS_PER_HOUR);
    timestamp(seconds.saturating_mul(1_000_000_000)).to_zoned(TimeZone::UTC).date().to_string()
}

/// The day, counted from 1970, that a directory stands for.
pub(crate) fn of_day(name: &str) -> Option<u64> {
    let date: Date = name.parse().ok()?;
    // The same day can be written in several ways, and a directory has one name.
    if date.to_string() != name {
        return None;
    }
    let seconds = date.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second();
    Some(u64::try_from(seconds).ok()? / SECONDS_PER_HOUR / HOURS_PER_DAY)
}

/// The directory of an hour within its day: `07`.
pub(crate) fn hour(hour: u64) -> String {
    format!("{:02}", hour % HOURS_PER_DAY)
}

/// The hour, counted from 1970, that a directory of a day stands for.
pub(crate) fn of_hour(day: u64, name: &str) -> Option<u64> {
    let within: u64 = name.parse().ok().filter(|&within| hour(within) == name)?;
    Some(day.saturating_mul(HOURS_PER_DAY) + within)
}

fn timestamp(ns: u64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(ns)).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_files() {
        for (name, expected) in [
            ("web01", "web01.img"),
            ("a/b", "a%2Fb.img"),
            ("50%", "50%25.img"),
            (".hidden", "%2Ehidden.img"),
            ("..", "%2E..img"),
            ("x.img", "x.img.img"),
        ] {
            assert_eq!(file(name), expected);
            assert_eq!(of_file(expected).as_deref(), Some(name));
        }
        for nonsense in ["web01", "a%.img", "a%2f.img", "a%41.img", "a%2E.img", "a%2ö.img"] {
            assert_eq!(of_file(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_snapshot_without_a_label_is_named_by_its_time() {
        let mut snapshot = SnapshotEntry {
            number: 17,
            label: None,
            size_bytes: 0,
            created_ns: 1_795_774_530_250_999_999,
        };
        let file = snapshot_file(&snapshot);
        assert_eq!(file, "2026-11-27T10:15:30.250Z@17.img");
        assert_eq!(snapshot_key(&of_file(&file).unwrap()), "17");
        snapshot.label = Some("before upgrade".to_owned());
        assert_eq!(snapshot_file(&snapshot), "before upgrade.img");
        assert_eq!(snapshot_key("before upgrade"), "before upgrade");
    }

    #[test]
    fn days_and_hours_have_one_name_each() {
        let at = hour_of(1_795_774_530_250_999_999);
        assert_eq!((day(day_of(at)).as_str(), hour(at).as_str()), ("2026-11-27", "10"));
        assert_eq!(of_day("2026-11-27"), Some(day_of(at)));
        assert_eq!(of_hour(day_of(at), "10"), Some(at));
        for nonsense in ["20261127", "2026-11-7", "2026-11-31", "1969-12-31", "x"] {
            assert_eq!(of_day(nonsense), None, "{nonsense}");
        }
        for nonsense in ["7", "24", "007", "+7"] {
            assert_eq!(of_hour(1, nonsense), None, "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn every_name_is_a_file_name(name in "\\PC{1,40}") {
            let file = file(&name);
            prop_assert!(!file.contains('/') && !file.starts_with('.'));
            prop_assert_eq!(of_file(&file), Some(name));
        }
    }
}

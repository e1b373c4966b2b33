//! Times and lengths of time, as people write them.

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

/// A length of time as [`parse_ms`] takes it.
pub(crate) fn show_ms(ms: u64) -> String {
    let whole = MS.iter().rev().find(|(_, unit)| ms.is_multiple_of(*unit));
    whole.map_or_else(String::new, |(name, unit)| format!("{}{name}", ms / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}

//! Human sizes: `20G`, `4096`, `1.5MiB`; powers of 1024 throughout, as storage tools do.

use std::fmt;

/// A byte count that prints as `1.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HumanBytes(pub u64);

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

impl fmt::Display for HumanBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut unit = 0;
        let mut scale = 1u64;
        while unit + 1 < UNITS.len() && self.0 / scale >= 1024 {
            scale *= 1024;
            unit += 1;
        }
        let name = UNITS.get(unit).copied().unwrap_or("B");
        // Tenths in integer arithmetic: `f64` would round 1023.96 MiB up to "1024.0 MiB".
        let tenths = u128::from(self.0) * 10 / u128::from(scale);
        if tenths % 10 == 0 {
            write!(f, "{} {name}", tenths / 10)
        } else {
            write!(f, "{}.{} {name}", tenths / 10, tenths % 10)
        }
    }
}

/// Parses a byte count: digits, an optional fraction, an optional unit (`k m g t p e`, any case,
/// with or without `B` or `iB`; all powers of 1024).
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let invalid = || format!("'{text}' is not a size (examples: 4096, 512M, 20G, 1.5T)");
    let trimmed = text.trim();
    if !trimmed.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Err(invalid());
    }
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        "e" | "eb" | "eib" => 60,
        other => return Err(format!("'{text}': unknown unit '{other}' (use K, M, G, T or P)")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u128 = whole.parse().map_err(|_| invalid())?;
    // A shift would drop the bits that do not fit, and make 2^68 EiB nothing at all.
    let too_large = || format!("'{text}' is 16 EiB or more");
    let mut bytes = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let digits = u32::try_from(fraction.len()).map_err(|_| invalid())?;
        let scale = 10u128.checked_pow(digits).filter(|_| digits <= 9).ok_or_else(invalid)?;
        let fraction: u128 = fraction.parse().map_err(|_| invalid())?;
        bytes = bytes.saturating_add((fraction << shift) / scale);
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        let check = |text: &str, bytes: u64, printed: &str| {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
            assert_eq!(HumanBytes(bytes).to_string(), printed);
        };
        check("0", 0, "0 B");
        check("4096", 4096, "4 KiB");
        check("20G", 20 << 30, "20 GiB");
        check("1.5MiB", 3 << 19, "1.5 MiB");
        check("2t", 2 << 40, "2 TiB");
        check(" 7 kb ", 7 << 10, "7 KiB");
        for bad in
            ["", "x", "1.2.3", "-1", "12Q", "1e9", "99999999999P", ".", "295147905179352825856E"]
        {
            assert!(parse_bytes(bad).is_err(), "{bad} must be refused");
        }
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let check = |text: &str, part: &str| {
            let said = parse_bytes(text).unwrap_err();
            assert!(said.contains(part), "{text}: {said}");
        };
        check("-1", "is not a size");
        check("+10G", "is not a size");
        check("ten", "is not a size");
        check("12Q", "unknown unit 'q'");
        check("16E", "16 EiB or more");
    }
}

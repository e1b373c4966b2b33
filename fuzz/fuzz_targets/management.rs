//! What people and programs say to the daemon: bodies of the control API, names, sizes.
#![no_main]

use base::size::{HumanBytes, parse_bytes};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What is understood is said again in the same words.
fn body<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let again = serde_json::to_vec(&value).expect("it can be said");
        assert_eq!(serde_json::from_slice::<T>(&again).expect("it is understood"), value);
    }
}

/// The same bytes by other means: digits one by one, in arithmetic without bounds.
fn size(text: &str) {
    let Ok(bytes) = parse_bytes(text) else { return };
    let text = text.trim();
    let digits = text.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim();
    let power = match unit.chars().next().map(|c| c.to_ascii_lowercase()) {
        None | Some('b') => 0,
        Some(c) => "kmgtpe".find(c).expect("a unit") as i32 + 1,
    };
    let whole = digits.bytes().fold(0f64, |sum, digit| sum * 10.0 + f64::from(digit - b'0'));
    let least = whole * 1024f64.powi(power);
    let most = (whole + 1.0) * 1024f64.powi(power);
    let value = bytes as f64;
    let slack = value * 1e-9;
    assert!(value >= least - slack && value <= most + slack, "{text:?} is not {bytes}");
    // What we print, we understand, to a tenth of the unit.
    let printed = HumanBytes(bytes).to_string();
    let again = parse_bytes(&printed).expect("our own words") as f64;
    assert!((again - value).abs() <= value / 10.0 + 1.0, "{printed}: {again}, not {value}");
}

fuzz_target!(|input: &[u8]| {
    let Some((&selector, bytes)) = input.split_first() else { return };
    let text = std::str::from_utf8(bytes).unwrap_or_default();
    match selector % 7 {
        0 => {
            body::<api::CreateVdi>(bytes);
            body::<api::ChangeVdi>(bytes);
        }
        1 => {
            body::<api::TakeSnapshot>(bytes);
            body::<api::Rollback>(bytes);
        }
        2 => {
            // What a client reads.
            body::<api::VdiPage>(bytes);
            body::<api::SnapshotPage>(bytes);
            body::<api::CompleteReceive>(bytes);
            body::<api::Stats>(bytes);
        }
        3 => {
            body::<api::DaemonStatus>(bytes);
            body::<api::Diff>(bytes);
            body::<api::CheckReport>(bytes);
            body::<api::Error>(bytes);
        }
        4 => size(text),
        5 => {
            let target = vdi::Target::parse(text);
            assert_eq!(target.to_string(), text);
        }
        _ => {
            let encoded = api::percent_encode(text);
            assert!(encoded.len() <= 3 * text.len());
            assert!(encoded.bytes().all(|byte| byte.is_ascii_graphic()));
        }
    }
});

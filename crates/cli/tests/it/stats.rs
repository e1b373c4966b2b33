//! `parallax stats`.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use serde_json::Value;

use crate::place::Place;

#[test]
fn counters_count() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    let before = place.json(&["stats"]);
    place.write("a", 1, 0, 65_536);
    place.ok(&["snapshot", "a"]);
    let after = place.json(&["stats"]);
    let rise = |name: &str| after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    assert_eq!(rise("write_bytes"), 65_536);
    assert!(rise("writes") >= 1 && rise("flushes") >= 1);
    assert_eq!(rise("snapshots"), 1);
    assert_eq!(after["vdi_count"], 1);
    assert!(after["capacity_bytes"].as_u64().unwrap() > 0);
    let text = place.ok(&["stats"]);
    assert!(text.contains("space used") && text.contains("store"), "{text}");
}

#[test]
fn watching_goes_on_until_nobody_reads() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    for (options, expected) in [(&["--json"][..], "\"writes\":"), (&[], "/s")] {
        let arguments = [&["stats", "--watch", "--interval", "0.1"], options].concat();
        let mut child = place.command(&arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let seen = lines.map(Result::unwrap).filter(|line| line.contains(expected)).take(30);
        let seen: Vec<String> = seen.collect();
        assert_eq!(seen.len(), 30, "several refreshes came");
        if !options.is_empty() {
            let stats: Value = serde_json::from_str(&seen[0]).unwrap();
            assert!(stats["writes"].is_u64());
        }
        // The pipe is closed: it went on for ever.
        assert!(child.wait().unwrap().success());
    }
}

/// With the C library's allocator each node took the space of two.
#[test]
fn a_cache_takes_what_it_was_given() {
    const CACHE: u64 = 32 << 20;
    let place = Place::with_store("256M");
    let image = std::fs::File::create(place.path("sparse")).unwrap();
    image.set_len(10_000 << 20).unwrap();
    for leaf in 0..10_000 {
        image.write_all_at(&[7; 4096], leaf << 20).unwrap();
    }
    let served = place.serve(&["--cache", "32M"]);
    place.ok(&["import", "sparse", "wide", "--format", "raw"]);
    served.stop();
    let served = place.serve(&["--cache", "32M"]);
    let before = served.resident();
    // Reads every node.
    place.ok(&["gc"]);
    let grown = served.resident() - before;
    let cached = place.json(&["stats"])["cache_bytes"].as_u64().unwrap();
    assert!(cached > CACHE * 9 / 10, "only {cached} bytes are cached");
    assert!(grown < CACHE * 3 / 2, "{grown} bytes more for a cache of {CACHE}");
}

//! `parallax check` and `parallax dump`: sound stores, sick ones, ones that are in use.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::json;

use crate::place::{Outcome, Place};

/// A store with a disk, a snapshot and some data, closed cleanly.
fn small_store() -> Place {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    crate::place::noise_file(&place.path("noise"), 1 << 20);
    place.tool("nbdcopy", &["--flush", "noise", &place.url("a")]);
    place.ok(&["snapshot", "a"]);
    served.stop();
    place
}

/// Changes one byte of the block of the store that begins as `data` does.
fn spoil(place: &Place, data: &[u8]) {
    let store = std::fs::read(place.path("store")).unwrap();
    let index = store.chunks(4096).position(|block| block.starts_with(&data[..64])).unwrap();
    let file = File::options().write(true).open(place.path("store")).unwrap();
    file.write_all_at(&[!data[99]], u64::try_from(index * 4096 + 99).unwrap()).unwrap();
}

#[test]
fn a_sound_store_has_no_findings() {
    let place = small_store();
    let text = place.ok(&["check", "store"]);
    assert!(text.starts_with("1 disk, 1 snapshot;") && text.ends_with("no damage found"), "{text}");
    let report = place.json(&["check", "store"]);
    assert_eq!((&report["clean"], &report["closed_cleanly"]), (&json!(true), &json!(true)));
    assert_eq!((&report["errors"], &report["warnings"]), (&json!([]), &json!([])));
    assert_eq!(report["counts"]["data_blocks"], 256);
    assert!(report["counts"]["data_blocks_verified"].as_u64().unwrap() >= 256);
    assert_eq!(place.json(&["check", "store", "--quick"])["counts"]["data_blocks_verified"], 0);
    let repaired = place.json(&["check", "store", "--repair"]);
    assert_eq!((&repaired["clean"], &repaired["repairs"]), (&json!(true), &json!([])));
}

#[test]
fn a_killed_daemon_leaves_a_sound_store() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 1 << 20);
    served.kill();
    let report = place.json(&["check", "store"]);
    assert_eq!((&report["clean"], &report["closed_cleanly"]), (&json!(true), &json!(false)));
    assert!(report["counts"]["log_records"].as_u64().unwrap() > 0);
}

#[test]
fn damage_is_4_and_stays_in_its_block() {
    let place = small_store();
    let noise = std::fs::read(place.path("noise")).unwrap();
    spoil(&place, &noise[65_536..]);
    let outcome = place.run(&["check", "store"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stdout.contains("error: "), "{outcome:?}");
    assert!(outcome.stderr.contains("--repair"), "{outcome:?}");
    let outcome = place.run(&["check", "store", "--repair"]);
    assert_eq!(outcome.code, Some(4), "data cannot be repaired: {outcome:?}");
    assert!(outcome.stderr.contains("backup"), "it says what to do: {outcome:?}");
    let outcome = place.run(&["check", "store", "--json"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((&report["clean"], &report["errors"][0]["kind"]), (&json!(false), &json!("data")));

    let served = place.serve(&[]);
    let read = |offset: u64| {
        let read = format!("read {offset} 4096");
        let mut command = std::process::Command::new("qemu-io");
        let outcome = Outcome::of(command.args(["-r", "-f", "raw", "-c", &read, &place.url("a")]));
        format!("{}{}", outcome.stdout, outcome.stderr)
    };
    let refused = read(65_536);
    assert!(refused.contains("Input/output error"), "wrong bytes are never given: {refused}");
    for sound in [0, 65_536 - 4096, 65_536 + 4096] {
        assert!(read(sound).contains("read 4096/4096"), "block at {sound}");
    }
    assert!(place.json(&["stats"])["checksum_failures"].as_u64().unwrap() > 0);
    let said = place.fails(4, &["export", "a", "copy.raw"]);
    assert!(said.contains("damaged") && !place.path("copy.raw").exists(), "{said}");
    place.write("a", 9, 65_536, 4096);
    assert!(place.holds("a", 9, 65_536, 4096), "writing heals");
    served.signal(rustix::process::Signal::TERM);
    let (_, said) = served.wait();
    let names_it = said.contains("disk=\"a\" offset=65536");
    assert!(names_it, "the log names what is damaged: {said}");
}

#[test]
fn a_lost_superblock_copy_is_repaired() {
    let place = small_store();
    let file = File::options().write(true).open(place.path("store")).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    assert_eq!(place.run(&["check", "store"]).code, Some(4));
    let report = place.json(&["check", "store", "--repair"]);
    assert_eq!(report["clean"], true);
    assert_eq!(report["repairs"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(place.json(&["check", "store", "--repair"])["repairs"], json!([]));
    place.serve(&[]).stop();
}

#[test]
fn a_store_in_use_is_3_and_no_store_is_2() {
    let place = small_store();
    let served = place.serve(&[]);
    let commands = [&["check", "store"][..], &["check", "store", "--repair"], &["dump", "store"]];
    for arguments in commands {
        let said = place.fails(3, arguments);
        assert!(said.contains("daemon"), "{said}");
    }
    served.stop();
    place.fails(2, &["check", "nothing"]);
    std::fs::write(place.path("zeroes"), vec![0; 128 << 20]).unwrap();
    place.fails(2, &["check", "zeroes"]);
    place.fails(2, &["dump", "zeroes"]);
    place.fails(2, &["dump", "store", "--tree", "nothing"]);
}

#[test]
fn a_dump_shows_what_stands_there() {
    let place = small_store();
    let before = std::fs::read(place.path("store")).unwrap();
    let text = place.ok(&["dump", "store"]);
    for expected in ["== superblock", "uuid ", "== slots", "closed cleanly", "== disks", "\"a\""] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let lines = |arguments: &[&str], part: &str| {
        let json = place.json(&[&["dump", "store"], arguments].concat());
        json[part].as_array().unwrap().len()
    };
    for part in ["superblock", "slots", "log", "disks", "extents", "bitmaps"] {
        assert!(lines(&[part], part) > 0, "{part}");
    }
    let tree = place.ok(&["dump", "store", "--tree", "a@1"]);
    assert!(tree.starts_with("== tree of a@1") && tree.contains("level 0"), "{tree}");
    assert_eq!(lines(&["--tree", "a"], "tree of a"), tree.lines().count() - 1, "nothing changed");
    assert!(before == std::fs::read(place.path("store")).unwrap(), "it only reads");
}

//! snapshot, snapshots, rollback, diff, tree.

use serde_json::json;

use crate::place::{Place, wait};

#[test]
fn handles_are_printed_and_taken() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    assert!(place.ok(&["snapshots", "a"]).contains("parallax snapshot a"));
    assert_eq!(place.ok(&["snapshot", "a"]), "a@1");
    assert_eq!(place.ok(&["snapshot", "a", "--label", "daily"]), "a@daily");
    let third = place.json(&["snapshot", "a"]);
    assert_eq!((&third["handle"], &third["number"]), (&json!("a@3"), &json!(3)));
    assert_eq!(third["label"], json!(null));

    let list = place.json(&["snapshots", "a"]);
    let handles: Vec<_> = list.as_array().unwrap().iter().map(|s| s["handle"].clone()).collect();
    assert_eq!(handles, ["a@1", "a@daily", "a@3"]);
    let table = place.ok(&["snapshots", "a"]);
    assert!(table.contains("a@daily") && table.contains("64 MiB"), "{table}");

    // By label and by number alike.
    assert_eq!(place.json(&["info", "a@daily"])["number"], 2);
    assert_eq!(place.json(&["info", "a@2"])["handle"], "a@daily");
    assert_eq!(place.json(&["rm", "a@1"]), json!({ "removed": "a@1", "snapshots": 0 }));
    assert_eq!(place.ok(&["rm", "a@daily"]), "deleted a@daily");
    assert_eq!(place.ok(&["rm", "a"]), "deleted a with 1 snapshot");
}

#[test]
fn a_snapshot_stays_and_a_rollback_returns_to_it() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 65_536);
    place.ok(&["snapshot", "a", "--label", "before"]);
    place.write("a", 2, 0, 65_536);
    assert!(place.holds("a%40before", 1, 0, 65_536));
    assert_eq!(place.ok(&["rollback", "a@before"]), "a is as it was at a@before");
    assert!(place.holds("a", 1, 0, 65_536));
    place.write("a", 3, 0, 4096);
    assert_eq!(place.json(&["rollback", "a@1"])["name"], "a");
    assert!(place.holds("a", 1, 0, 65_536));
}

#[test]
fn a_disk_with_a_history_goes_back_in_time() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    let refused = place.fails(1, &["create", "a", "--size", "64M", "--history", "yesterday"]);
    assert!(refused.contains("every 1s for 1h"), "{refused}");
    place.ok(&["create", "a", "--size", "64M", "--history", "1h"]);
    assert!(place.ok(&["info", "a"]).contains("every flush for 1h"));
    place.write("a", 1, 0, 65_536);
    place.tool("qemu-io", &["-f", "raw", "-c", "flush", &place.url("a")]);
    wait(2500);
    place.write("a", 2, 0, 65_536);
    place.tool("qemu-io", &["-f", "raw", "-c", "flush", &place.url("a")]);
    assert!(place.ok(&["snapshots", "a"]).contains("parallax log a"), "moments do not crowd lists");
    wait(1500);
    let log = place.json(&["log", "a", "--every", "1s"]);
    let rows = log.as_array().unwrap();
    assert!(rows.len() >= 2, "{log}");
    assert!(rows.iter().all(|row| row["changed_bytes"].as_u64() >= Some(65_536)), "{log}");
    let then = rows[0]["last"].as_str().unwrap();
    place.ok(&["clone", then, "by-number"]);
    place.ok(&["clone", "a@3 seconds ago", "by-time"]);
    for clone in ["by-number", "by-time"] {
        assert!(place.holds(clone, 1, 0, 65_536), "{clone}");
    }
    place.ok(&["rollback", "a@3s ago"]);
    assert!(place.holds("a", 1, 0, 65_536));
    assert!(place.ok(&["log", "a"]).contains('#'));
    place.fails(2, &["clone", "a@1 day ago", "c"]);
    assert!(place.ok(&["set", "a", "history=off"]).starts_with("history of a: off; "));
}

#[test]
fn a_diff_names_what_changed() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 8192);
    place.ok(&["snapshot", "a", "--label", "s"]);
    assert_eq!(place.ok(&["diff", "a@s", "a"]), "a@s and a have the same contents");
    place.write("a", 2, 1 << 20, 4096);
    place.tool("qemu-io", &["-f", "raw", "-c", "discard 0 4096", "-c", "flush", &place.url("a")]);
    let diff = place.json(&["diff", "a@s", "a"]);
    let extents = json!([
        { "offset": 0, "length": 4096, "data": false },
        { "offset": 1 << 20, "length": 4096, "data": true },
    ]);
    let mut expected = json!({
        "from": "a@s",
        "to": "a",
        "from_size_bytes": 64 << 20,
        "to_size_bytes": 64 << 20,
        "extents": extents,
    });
    assert_eq!(diff, expected);
    let table = place.ok(&["diff", "a@s", "a"]);
    assert!(table.ends_with("8 KiB differ in 2 ranges"), "{table}");
    place.ok(&["resize", "a", "128M"]);
    expected["to_size_bytes"] = (128 << 20).into();
    assert_eq!(place.json(&["diff", "a@s", "a"]), expected);
    let table = place.ok(&["diff", "a@s", "a"]);
    assert!(table.contains("a@s has 64 MiB, a has 128 MiB"), "{table}");
}

#[test]
fn the_tree_shows_who_comes_from_whom() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    assert!(place.ok(&["tree"]).contains("parallax create"));
    place.ok(&["create", "base", "--size", "1G"]);
    place.ok(&["snapshot", "base", "--label", "gold"]);
    place.ok(&["clone", "base@gold", "web"]);
    place.ok(&["clone", "web", "test"]);
    let tree = place.ok(&["tree"]);
    let lines: Vec<&str> = tree.lines().collect();
    assert_eq!(lines[0], "base (1 GiB)");
    assert!(lines[1].starts_with("└── base@gold ("), "{tree}");
    assert_eq!(lines[2], "    └── web (1 GiB)");
    assert!(tree.contains("test (1 GiB)"), "{tree}");
    let json = place.json(&["tree"]);
    assert_eq!(json[0]["snapshots"][0]["clones"][0]["name"], "web");
}

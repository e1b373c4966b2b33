//! snapshot, snapshots, rollback, diff, tree.

use serde_json::{Value, json};

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
    let said = place.ok(&["rollback", "a@before"]);
    assert!(said.starts_with("a is as it was at a@before (number 1, 20"), "{said}");
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
    let cloned = place.json(&["clone", "a@3 seconds ago", "by-time"]);
    let taken = &cloned["snapshot"];
    assert_eq!((cloned["name"].as_str(), taken["handle"].as_str()), (Some("by-time"), Some(then)));
    assert_eq!(cloned["parent"]["snapshot"], taken["number"]);
    assert!(taken["created"].as_str().unwrap().ends_with('Z'), "{cloned}");
    for clone in ["by-number", "by-time"] {
        assert!(place.holds(clone, 1, 0, 65_536), "{clone}");
    }
    let said = place.ok(&["rollback", "a@3s ago"]);
    assert!(said.starts_with(&format!("a is as it was at {then} (20")), "{said}");
    assert!(said.ends_with("Z)"), "{said}");
    assert!(place.holds("a", 1, 0, 65_536));
    assert!(place.ok(&["log", "a"]).contains('#'));
    // Lengths of time as elsewhere.
    assert_eq!(place.json(&["log", "a", "--every", "1 day"]).as_array().unwrap().len(), 1);
    assert_eq!(
        place.json(&["log", "a", "--every", "1s", "--rows", "1"]).as_array().unwrap().len(),
        1
    );
    assert!(place.ok(&["log", "a", "--every", "1s", "--rows", "1"]).contains("earlier rows"));
    let refused = place.fails(1, &["log", "a", "--every", "often"]);
    assert!(refused.contains("`24h` or `1 day`"), "{refused}");
    place.fails(2, &["clone", "a@1 day ago", "c"]);
    assert!(place.ok(&["set", "a", "history=off"]).starts_with("history of a: off; "));
}

/// Nobody could list the writes that can be opened, so nobody could open one.
#[test]
fn the_write_before_the_bad_one_is_found_and_opened() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    let said = place.ok(&["log", "a", "--writes"]);
    assert!(said.contains("parallax set a history='every write for"), "{said}");
    place.ok(&["set", "a", "history=every write for 10m, 24h"]);
    // Three writes between two flushes; the third one is the bad one.
    let write = |byte, offset| format!("write -P {byte} {offset} 8k");
    let (good, other, bad) = (write(1, "1M"), write(2, "2M"), write(3, "1M"));
    let options = ["-f", "raw", "-c", &good, "-c", &other, "-c", &bad, "-c", "flush"];
    place.tool("qemu-io", &[&options[..], &[&place.url("a")]].concat());
    wait(1500);
    place.write("a", 4, 3 << 20, 4096);
    wait(1500);
    let list = place.json(&["log", "a", "--writes"]);
    let list = list.as_array().unwrap();
    let ranges = |list: &[Value]| -> Vec<(u64, u64)> {
        let range = |write: &Value| (write["offset"].as_u64(), write["length"].as_u64());
        let ranges = list.iter().map(range);
        ranges.map(|(offset, length)| (offset.unwrap(), length.unwrap())).collect()
    };
    const MIB: u64 = 1 << 20;
    assert_eq!(ranges(list), [(MIB, 8192), (2 * MIB, 8192), (MIB, 8192), (3 * MIB, 4096)]);
    let handles: Vec<&str> = list.iter().map(|write| write["handle"].as_str().unwrap()).collect();
    assert!(handles.iter().all(|handle| handle.starts_with("a@lsn:")), "{handles:?}");
    let export = |handle: &str| handle.replace('@', "%40").replace(':', "%3A");
    let (before, after) = (export(handles[1]), export(handles[2]));
    assert!(place.holds(&before, 1, MIB, 8192) && place.holds(&before, 2, 2 * MIB, 8192));
    assert!(place.holds(&after, 3, MIB, 8192));
    place.ok(&["export", handles[1], "before.raw"]);
    let exported = std::fs::read(place.path("before.raw")).unwrap();
    assert!(exported[1 << 20..][..8192].iter().all(|&byte| byte == 1));
    let refused = place.fails(6, &["export", "a@lsn:999999", "none.raw"]);
    assert!(refused.contains("a@lsn:999999"), "{refused}");

    // Up to a moment, as a table, and some of them.
    let moment = list[2]["moment"].as_str().unwrap();
    for up_to in [moment, moment.strip_prefix("a@").unwrap()] {
        let some = place.json(&["log", "a", "--writes", up_to]);
        assert_eq!(some.as_array().unwrap()[..], list[..3], "{up_to}");
    }
    let table = place.ok(&["log", "a", "--writes", "--rows", "2"]);
    assert!(!table.contains(&format!("{} ", handles[1])) && table.contains(handles[2]), "{table}");
    assert!(table.ends_with("(earlier rows are not shown: --rows COUNT)"), "{table}");
    place.ok(&["set", "a", "history=off"]);
    place.ok(&["snapshot", "a", "--label", "none"]);
    let refused = place.fails(1, &["log", "a", "--writes", "none"]);
    assert!(refused.contains("a@none keeps no writes"), "{refused}");
    place.fails(2, &["log", "a", "--writes", "nothing"]);
    place.fails(1, &["log", "a", "--writes", "--every", "1s"]);
}

/// A write could be read, and only the moment beside it cloned and gone back to.
#[test]
fn a_disk_is_cloned_and_goes_back_to_a_write() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M", "--history", "every write for 10m, 24h"]);
    let write = |byte, offset| format!("write -P {byte} {offset} 8k");
    let (good, other, bad) = (write(1, "1M"), write(2, "2M"), write(3, "1M"));
    let options = ["-f", "raw", "-c", &good, "-c", &other, "-c", &bad, "-c", "flush"];
    place.tool("qemu-io", &[&options[..], &[&place.url("a")]].concat());
    wait(1500);
    let list = place.json(&["log", "a", "--writes"]);
    let handle = |index: usize| list[index]["handle"].as_str().unwrap().to_owned();
    let (first, second) = (handle(0), handle(1));
    const MIB: u64 = 1 << 20;

    let said = place.ok(&["clone", &second, "fix"]);
    assert_eq!(said, format!("cloned {second} to fix (64 MiB)"));
    let cloned = place.json(&["clone", &first, "first"]);
    assert_eq!((cloned["write"].as_str(), &cloned["snapshot"]), (Some(&*first), &Value::Null));
    assert_eq!(place.json(&["clone", "a", "now"])["write"], Value::Null);
    assert!(place.holds("fix", 1, MIB, 8192) && place.holds("fix", 2, 2 * MIB, 8192));
    assert!(place.holds("first", 1, MIB, 8192) && place.holds("first", 0, 2 * MIB, 8192));
    place.write("fix", 5, MIB, 4096);

    // Both moments keep their writes, also behind the rollback.
    assert_eq!(place.ok(&["rollback", &second]), format!("a is as it was at {second}"));
    assert!(place.holds("a", 1, MIB, 8192) && place.holds("a", 2, 2 * MIB, 8192));
    let back = place.json(&["rollback", &first]);
    assert_eq!((back["write"].as_str(), &back["snapshot"]), (Some(&*first), &Value::Null));
    assert!(place.holds("a", 0, 2 * MIB, 8192));
    assert_eq!(place.json(&["log", "a", "--writes"])[1]["handle"], second);
    place.ok(&["clone", &second, "again"]);
    assert!(place.holds("again", 2, 2 * MIB, 8192));

    // What needs a snapshot says what to do.
    for refused in [
        vec!["attach", &second, "--vhost-user", "a.sock"],
        vec!["diff", &second, "a"],
        vec!["diff", "a", &second],
        vec!["send", &second],
        vec!["send", "a@1", "--from", &second],
        vec!["hold", &second],
        vec!["rm", &second],
        vec!["info", &second],
    ] {
        let said = place.fails(2, &refused);
        let advice = format!("parallax clone {second} NEW");
        assert!(said.contains(&advice), "{refused:?}: {said}");
    }
    for refused in [["clone", "a@lsn:0", "none"], ["rollback", "a@lsn:0", "--json"]] {
        let said = place.fails(2, &refused);
        assert!(said.contains("parallax log a --writes"), "{refused:?}: {said}");
    }
    let said = place.fails(1, &["clone", "a@lsn:99999999", "none"]);
    assert!(said.contains("is to come"), "{said}");
    place.fails(2, &["clone", "a@lsn:x", "none"]);
}

#[test]
fn what_is_held_is_not_deleted() {
    let place = Place::with_store("1G");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.fails(1, &["snapshot", "a", "--until", "1d"]);
    let refused = place.fails(1, &["snapshot", "a", "--hold", "--until", "yesterday"]);
    assert!(refused.contains("2030-01-31"), "{refused}");
    assert_eq!(place.ok(&["snapshot", "a", "--hold"]), "a@1");
    place.ok(&["snapshot", "a", "-l", "daily"]);
    let held = place.ok(&["hold", "a@daily", "--until", "2099-01-31"]);
    assert!(
        held.starts_with("a@daily is held until 2099-01-31T00:00:00Z; its ledger: 2:"),
        "{held}"
    );
    let head = held.rsplit(':').next().unwrap();
    assert!(head.len() == 64 && place.ok(&["info", "a"]).contains(head), "{held}");
    let ledger = json!({ "record": 2, "head": head, "pending": 0 });
    assert_eq!(place.json(&["info", "a"])["ledger"], ledger);
    assert!(place.ok(&["info", "a@1"]).contains("held         yes"));
    let list = place.json(&["snapshots", "a"]);
    assert_eq!(list[0]["hold"], json!({ "until": null }));
    assert_eq!(list[1]["hold"], json!({ "until": "2099-01-31T00:00:00Z" }));
    assert!(place.ok(&["snapshots", "a"]).contains("until 2099-01-31T00:00:00Z"));
    assert_eq!(place.json(&["log", "a"])[0]["held"][0], "a@1");

    let refused = place.fails(3, &["rm", "a@daily"]);
    assert!(refused.contains("parallax release a@daily"), "{refused}");
    let refused = place.fails(3, &["rm", "a"]);
    assert!(refused.contains("a@1, a@daily"), "{refused}");
    place.fails(1, &["hold", "a@daily", "--until", "2030-01-31"]);
    assert_eq!(place.json(&["release", "a@daily"])["hold"], json!(null));
    assert!(place.ok(&["release", "a@1"]).starts_with("a@1 is not held any more; its ledger: 4:"));
    place.fails(1, &["release", "a@1"]);
    place.fails(2, &["hold", "a@none"]);

    // What was noted of the ledger can be looked for, while the store is served and when it is not.
    let noted = |record: u64| format!("a={record}:{head}");
    place.ok(&["check", "--online", "--quick", "--ledger", &noted(2)]);
    let altered = place.run(&["check", "--online", "--quick", "--ledger", &noted(1)]);
    assert_eq!(altered.code, Some(4), "{altered:?}");
    assert!(altered.stdout.contains("is not the one that was noted"), "{altered:?}");
    let refused = place.fails(1, &["check", "--online", "--ledger", "a=2"]);
    assert!(refused.contains("web01=2:3f9a"), "{refused}");
    served.stop();
    place.ok(&["check", "store", "--quick", "--ledger", &noted(2)]);
    let altered = place.run(&["check", "store", "--quick", "--ledger", &noted(5)]);
    assert_eq!(altered.code, Some(4), "{altered:?}");
    let _served = place.serve(&[]);
    assert_eq!(place.ok(&["rm", "a"]), "deleted a with 2 snapshots");
}

#[test]
fn disks_inherit_the_history_of_the_store() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.ok(&["create", "b", "--size", "64M", "--history", "off"]);
    assert_eq!(place.json(&["info", "--store"])["history"], "off");
    let set = place.ok(&["set", "--store", "history=24h"]);
    assert_eq!(set, "history of all disks without one of their own: every flush for 1d");
    assert!(place.ok(&["info", "--store"]).contains("history      every flush for 1d"));
    let history = |disk: &str| {
        let info = place.json(&["info", disk]);
        (info["history"].clone(), info["history_inherited"].clone())
    };
    assert_eq!(history("a"), (json!("every flush for 1d"), json!(true)));
    assert_eq!(history("b"), (json!("off"), json!(false)));
    place.ok(&["set", "a", "history=1h"]);
    assert_eq!(history("a"), (json!("every flush for 1h"), json!(false)));
    let set = place.ok(&["set", "b", "history=inherit"]);
    assert_eq!(set, "history of b: every flush for 1d (as the store has it)");
    place.fails(1, &["set", "--store", "history=inherit"]);
    place.fails(1, &["set", "a", "--store", "history=1h"]);
    place.fails(1, &["set", "a"]);
    place.fails(1, &["info"]);
}

#[test]
fn a_history_has_a_budget_and_info_tells_what_is_held() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M", "--history", "24h, at most 20M"]);
    let info = place.json(&["info", "a"]);
    assert_eq!(info["history"], "every flush for 1d, at most 20M");
    assert_eq!(info["history_budget_bytes"], 20 << 20);
    assert_eq!(info["past"], json!(null), "nobody has counted");
    assert!(place.ok(&["info", "a"]).contains("not known before the next garbage collection"));
    let set = place.ok(&["set", "a", "history=1h, at most 1.5G"]);
    assert_eq!(set, "history of a: every flush for 1h, at most 1536M");
    for refused in ["history=off, at most 1G", "history=at most 1G", "history=1h, at most x"] {
        place.fails(1, &["set", "a", refused]);
    }
    let set = place.ok(&["set", "--store", "history=1h, at most 1G"]);
    assert_eq!(
        set,
        "history of all disks without one of their own: every flush for 1h, at most 1G"
    );
    place.ok(&["create", "b", "--size", "64M"]);
    assert_eq!(place.json(&["info", "b"])["history_budget_bytes"], 1 << 30);

    place.write("a", 1, 0, 1 << 20);
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.write("a", 2, 0, 1 << 20);
    place.ok(&["gc"]);
    let past = &place.json(&["info", "a"])["past"];
    let snapshots = past["snapshots_bytes"].as_u64().unwrap();
    assert!((1 << 20..2 << 20).contains(&snapshots), "{past}");
    let info = place.ok(&["info", "a"]);
    assert!(info.contains(" of at most 1.5 GiB; snapshots 1"), "{info}");
    assert_eq!(place.json(&["ls"])[0]["past"], *past);
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

#[test]
fn a_series_is_taken_and_deleted_by_its_handle() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 65_536);
    assert_eq!(place.ok(&["snapshot", "a", "--every", "1ms", "--for", "300ms"]), "a@1..300");
    place.write("a", 2, 0, 65_536);
    assert!(place.holds("a%40300", 1, 0, 65_536));
    let taken = place.json(&["snapshot", "a", "--every", "100us", "--for", "50ms"]);
    assert_eq!((&taken["handle"], &taken["count"]), (&json!("a@301..800"), &json!(500)));
    assert!(taken["seconds"].as_f64().unwrap() >= 0.049, "{taken}");
    assert!(place.holds("a%40301", 2, 0, 65_536));
    assert_eq!(place.ok(&["snapshot", "a", "--every", "1h", "--for", "1h"]), "a@801");

    // What has a label or is held stays, and so does what lies outside.
    assert_eq!(place.ok(&["snapshot", "a", "--label", "mine"]), "a@mine");
    place.ok(&["hold", "a@400"]);
    let said = place.ok(&["rm", "a@2..5000"]);
    assert_eq!(said, "deleted 799 snapshots of a@2..5000; held, and still there: 1");
    let left = place.json(&["snapshots", "a"]);
    let left: Vec<_> = left.as_array().unwrap().iter().map(|one| one["handle"].clone()).collect();
    assert_eq!(left, ["a@1", "a@400", "a@mine"]);
    let again = place.fails(2, &["rm", "a@2..300"]);
    assert!(again.contains("parallax snapshots a"), "{again}");
    // A label may look like a series.
    place.ok(&["snapshot", "a", "--label", "1..9"]);
    assert_eq!(place.ok(&["rm", "a@1..9"]), "deleted a@1..9");
    assert_eq!(place.json(&["rm", "a@1..9"]), json!({ "removed": "a@1..9", "snapshots": 1 }));

    for wrong in [&["--every", "1ms"][..], &["--for", "1s"], &["--every", "1us", "--for", "1s"]] {
        place.fails(1, &[&["snapshot", "a"][..], wrong].concat());
    }
    let missing = place.fails(2, &["snapshot", "b", "--every", "1ms", "--for", "1s"]);
    assert!(missing.contains('b'), "{missing}");
}

//! create, clone, ls, info, rename, resize, rm.

use serde_json::{Value, json};

use crate::place::Place;

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|vdi| vdi["name"].as_str().unwrap()).collect()
}

#[test]
fn a_disk_from_birth_to_death() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    assert!(place.ok(&["ls"]).contains("parallax create"), "an empty list says what to do");
    assert_eq!(place.json(&["ls"]), json!([]));

    assert_eq!(place.ok(&["create", "web01", "--size", "20G"]), "created web01 (20 GiB)");
    let made = place.json(&["create", "db01", "--size", "1.5g"]);
    assert_eq!(made["name"], "db01");
    assert_eq!(made["size_bytes"], 3_u64 << 29);
    assert_eq!(made["snapshot_count"], 0);
    assert_eq!(made["parent"], Value::Null);
    assert!(made["created"].as_str().unwrap().ends_with('Z'), "RFC 3339 in UTC: {made}");
    assert_eq!(names(&place.json(&["ls"])), ["db01", "web01"]);
    let table = place.ok(&["ls"]);
    assert!(table.lines().next().unwrap().starts_with("NAME"), "{table}");
    assert!(table.contains("20 GiB"), "{table}");

    let info = place.json(&["info", "web01"]);
    assert_eq!(info["size_bytes"], 20_u64 << 30);
    assert_eq!(info["space"]["mapped_bytes"], 0, "thin");
    place.write("web01", 7, 1 << 20, 1 << 20);
    assert_eq!(place.json(&["info", "web01"])["space"]["mapped_bytes"], 1 << 20);
    assert!(place.ok(&["info", "web01"]).contains("mapped       1 MiB"));
    let table = place.ok(&["ls", "--space"]);
    assert!(table.lines().next().unwrap().contains("EXCLUSIVE"), "{table}");
    assert!(table.contains("20 GiB   1 MiB      1 MiB     0 B"), "{table}");

    assert_eq!(place.ok(&["rename", "web01", "www"]), "renamed web01 to www");
    assert!(place.holds("www", 7, 1 << 20, 1 << 20));
    assert_eq!(place.ok(&["rm", "www"]), "deleted www");
    assert_eq!(place.json(&["rm", "db01"]), json!({ "removed": "db01", "snapshots": 0 }));
    assert_eq!(place.json(&["ls"]), json!([]));
}

#[test]
fn shrinking_takes_a_second_word() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1G"]);
    assert_eq!(place.ok(&["resize", "a", "+512M"]), "a now has 1.5 GiB");
    assert_eq!(place.ok(&["resize", "a", "2G"]), "a now has 2 GiB");
    let refused = place.fails(1, &["resize", "a", "2M"]);
    assert!(refused.contains("--shrink"), "{refused}");
    assert_eq!(place.json(&["info", "a"])["size_bytes"], 2_u64 << 30);
    let shrunk = place.json(&["resize", "a", "2M", "--shrink"]);
    assert_eq!(shrunk["size_bytes"], 2 << 20);
}

#[test]
fn a_clone_is_a_disk_of_its_own() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 4096);
    assert_eq!(place.ok(&["clone", "a", "b"]), "cloned a to b (64 MiB)");
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.write("a", 2, 0, 4096);
    let clone = place.json(&["clone", "a@s", "c"]);
    assert_eq!(clone["parent"]["name"], "a");
    assert_eq!(clone["size_bytes"], 64 << 20);
    place.write("b", 3, 0, 4096);
    for (disk, byte) in [("a", 2), ("b", 3), ("c", 1)] {
        assert!(place.holds(disk, byte, 0, 4096), "{disk} holds {byte}");
    }
    place.ok(&["rm", "a"]);
    assert!(place.holds("c", 1, 0, 4096), "a clone outlives its parent");
    assert!(place.ok(&["ls"]).contains("a deleted disk"));
}

#[test]
fn listings_longer_than_a_page_are_whole() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    // Through HTTP, as the command would take a process per disk.
    for number in 0..1_200 {
        let body = format!(r#"{{"name":"d{number:04}","size_bytes":4096}}"#);
        let (status, _) = crate::http::request(&place, "POST", "/v1/vdis", &body);
        assert_eq!(status, 201);
    }
    let list = place.json(&["ls"]);
    let names = names(&list);
    assert_eq!(names.len(), 1_200);
    assert!(names.is_sorted());
    assert!(place.ok(&["tree"]).lines().count() == 1_200);
}

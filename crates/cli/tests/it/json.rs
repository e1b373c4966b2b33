//! docs/operations/json.md against what commands print.

use std::collections::BTreeMap;
use std::fs::File;

use serde_json::Value;

use crate::place::{Outcome, Place};

/// The fields of each object, as the document describes them.
struct Described(BTreeMap<String, BTreeMap<String, String>>);

impl Described {
    fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/operations/json.md");
        let text = std::fs::read_to_string(path).unwrap();
        let mut objects: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let mut object = String::new();
        for line in text.lines() {
            if let Some(heading) = line.strip_prefix("### ") {
                heading.clone_into(&mut object);
                objects.insert(object.clone(), BTreeMap::new());
            } else if let Some(base) = line.strip_prefix("All fields of ") {
                let base = objects[base.strip_suffix(", and:").unwrap()].clone();
                objects.get_mut(&object).unwrap().extend(base);
            } else if let Some((field, rest)) =
                line.strip_prefix("| `").and_then(|rest| rest.split_once("` | "))
                && let Some(fields) = objects.get_mut(&object)
                && let Some((kind, _)) = rest.split_once(" | ")
                && kind.parse::<u64>().is_err()
            {
                fields.insert(field.to_owned(), kind.to_owned());
            }
        }
        assert!(objects.len() > 20, "{:?}", objects.keys());
        Self(objects)
    }

    /// Whether `value` is what the document calls `kind`.
    #[track_caller]
    fn check(&self, kind: &str, value: &Value, place: &str) {
        if let Some(kind) = kind.strip_suffix(" or null") {
            if !value.is_null() {
                self.check(kind, value, place);
            }
            return;
        }
        if let Some(kind) = kind.strip_prefix("list of ") {
            let list = value.as_array().unwrap_or_else(|| panic!("{place} is no list: {value}"));
            for (index, item) in list.iter().enumerate() {
                self.check(kind, item, &format!("{place}[{index}]"));
            }
            return;
        }
        let fits = match kind {
            "number" => value.is_u64(),
            "text" => value.is_string(),
            "boolean" => value.is_boolean(),
            "time" => value.as_str().is_some_and(|text| text.ends_with('Z')),
            object => return self.check_object(object, value, place),
        };
        assert!(fits, "{place} is no {kind}: {value}");
    }

    #[track_caller]
    fn check_object(&self, object: &str, value: &Value, place: &str) {
        let described = self.0.get(object).unwrap_or_else(|| panic!("{object} is not described"));
        let fields = value.as_object().unwrap_or_else(|| panic!("{place}: {value}"));
        let names: Vec<&String> = fields.keys().collect();
        let mut expected: Vec<&String> = described.keys().collect();
        expected.sort();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(sorted, expected, "{place} as {object}");
        for (name, kind) in described {
            self.check(kind, &fields[name], &format!("{place}.{name}"));
        }
    }
}

#[test]
fn commands_print_what_is_described() {
    let described = Described::read();
    let place = Place::with_store("256M");
    let check = |kind: &str, arguments: &[&str]| {
        described.check(kind, &place.json(arguments), &arguments.join(" "));
    };
    check("format", &["format", "other", "--size", "128M"]);
    let served = place.serve(&[]);
    described.check("readiness", &served.ready, "serve");
    check("disk", &["create", "a", "--size", "1M"]);
    place.write("a", 1, 0, 65_536);
    check("snapshot", &["snapshot", "a", "--label", "s"]);
    check("snapshot", &["snapshot", "a"]);
    check("disk of a snapshot", &["clone", "a@s", "b"]);
    check("disk of a snapshot", &["clone", "a", "c"]);
    check("disk", &["rename", "c", "d"]);
    check("disk", &["resize", "d", "2M"]);
    check("disk", &["set", "a", "history=24h"]);
    check("store settings", &["set", "--store", "history=off"]);
    check("store", &["info", "--store"]);
    check("held snapshot", &["hold", "a@s", "--until", "30d"]);
    check("snapshot", &["snapshot", "a", "--hold"]);
    place.write("a", 2, 4096, 4096);
    check("diff", &["diff", "a@s", "a"]);
    check("list of disk", &["ls"]);
    check("list of disk with space", &["ls", "--space"]);
    check("disk with space", &["info", "b"]);
    check("snapshot with space", &["info", "a@s"]);
    check("list of snapshot", &["snapshots", "a"]);
    check("list of interval", &["log", "a"]);
    place.ok(&["create", "w", "--size", "1M", "--history", "every write for 10m, 24h"]);
    place.write("w", 1, 0, 4096);
    check("list of write", &["log", "w", "--writes"]);
    check("disk with space", &["info", "a"]);
    check("held snapshot", &["release", "a@s"]);
    check("held snapshot", &["release", "a@3"]);
    check("list of tree disk", &["tree"]);
    check("stats", &["stats"]);
    check("gc", &["gc"]);
    check("gc status", &["gc", "--status"]);
    check("scrub status", &["scrub", "--status"]);
    check("scrub", &["scrub"]);
    check("scrub status", &["scrub", "--status"]);
    check("check", &["check", "--online"]);
    check("disk of a snapshot", &["rollback", "a@s"]);
    check("export", &["export", "a", "f"]);
    check("disk", &["import", "f", "e"]);
    // The stream is on stdout, so what is said about it is on stderr.
    let mut send = place.command(&["send", "e", "--json"]);
    let outcome = Outcome::of(send.stdout(File::create(place.path("stream")).unwrap()));
    let said = serde_json::from_str(&outcome.stderr).unwrap();
    described.check("transfer", &said, "send");
    let receive = |file: &str| {
        let mut receive = place.command(&["receive", "g", "--json"]);
        Outcome::of(receive.stdin(File::open(place.path(file)).unwrap()))
    };
    let bytes = std::fs::read(place.path("stream")).unwrap();
    std::fs::write(place.path("cut"), &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(receive("cut").code, Some(7));
    check("resumption", &["receive", "g", "--resume-token"]);
    let said = serde_json::from_str(&receive("stream").stdout).unwrap();
    described.check("transfer", &said, "receive");
    check("attachment", &["attach", "b", "--vhost-user", "vm.sock"]);
    check("list of attachment", &["attachments"]);
    check("attachment", &["detach", "vm.sock"]);
    std::fs::create_dir(place.path("mnt")).unwrap();
    check("mount", &["mount", "mnt"]);
    check("list of mount", &["mounts"]);
    check("mount", &["unmount", "mnt"]);
    check("upgrade", &["upgrade"]);
    check("removal", &["rm", "a@s"]);
    check("removal", &["rm", "a"]);
    served.stop();
    check("check", &["check", "store"]);
    let dump = place.json(&["dump", "store"]);
    for (part, lines) in dump.as_object().unwrap() {
        described.check("list of text", lines, part);
    }
}

#[test]
fn errors_are_as_described_also_those_of_usage() {
    let described = Described::read();
    let place = Place::new();
    for (code, arguments) in [
        (1, &["create", "a", "--json"][..]),
        (1, &["--json", "create", "a", "--size", "12Q"]),
        (1, &["--json"]),
        (2, &["check", "nothing", "--json"]),
        (6, &["ls", "--json"]),
    ] {
        let said = place.fails(code, arguments);
        let error: Value = serde_json::from_str(&said).unwrap();
        described.check("error", &error, &arguments.join(" "));
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    // What follows -- is a name.
    let outcome = Outcome::of(&mut place.command(&["frobnicate", "--", "--json"]));
    assert!(outcome.stderr.starts_with("error: "), "{outcome:?}");
}

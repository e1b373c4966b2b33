//! `parallax scrub` and `parallax check --online`, while a daemon serves.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::http::request;
use crate::place::Place;

/// A served store with a disk, a snapshot of it, and data that the snapshot alone has.
fn served() -> (Place, crate::place::Served) {
    let place = Place::with_store("256M");
    let served = place.serve(&["--scrub-rate", "8M"]);
    place.ok(&["create", "a", "--size", "64M"]);
    crate::place::noise_file(&place.path("noise"), 1 << 20);
    place.tool("nbdcopy", &["--flush", "noise", &place.url("a")]);
    place.ok(&["snapshot", "a", "--label", "old"]);
    place.write("a", 7, 65_536, 4096);
    (place, served)
}

/// Changes one byte of the block of the store that begins as block `index` of the noise does.
fn spoil(place: &Place, index: usize) {
    let noise = std::fs::read(place.path("noise")).unwrap();
    let store = std::fs::read(place.path("store")).unwrap();
    let data = &noise[index * 4096..][..4096];
    let at = store.chunks(4096).position(|block| block == data).unwrap();
    let file = File::options().write(true).open(place.path("store")).unwrap();
    file.write_all_at(&[!data[99]], u64::try_from(at * 4096 + 99).unwrap()).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn scrub_of_a_sound_store_finds_nothing() {
    let (place, served) = served();
    let status = place.ok(&["scrub", "--status"]);
    assert!(status.starts_with("idle\nnone has ended"), "{status}");
    assert!(status.contains("the next one begins "), "on by default: {status}");
    let said = place.ok(&["scrub"]);
    assert!(said.starts_with("read ") && said.ends_with(": no damage found"), "{said}");
    let status = place.json(&["scrub", "--status"]);
    assert_eq!((&status["pass"], &status["running"]), (&json!(1), &json!(false)));
    assert_eq!(status["rate_bytes"], 8 << 20);
    assert_eq!(status["last"]["end"], "finished");
    assert!(status["last"]["read_bytes"].as_u64().unwrap() > 1 << 20);
    let stats = place.json(&["stats"]);
    assert_eq!((&stats["scrubs"], &stats["scrub_damaged_blocks"]), (&json!(1), &json!(0)));
    assert!(stats["scrub_ended_seconds"].as_u64().unwrap() > 1_700_000_000);
    let said = place.ok(&["check", "--online"]);
    assert!(said.starts_with("1 disk, 1 snapshot;") && said.ends_with("no damage found"), "{said}");
    assert_eq!(place.json(&["check", "--online", "--quick"])["clean"], true);
    served.stop();
}

#[test]
fn damage_is_4_and_tells_whose_it_is() {
    let (place, served) = served();
    // What the snapshot alone has, and what both have.
    spoil(&place, 16);
    spoil(&place, 32);
    let outcome = place.run(&["scrub", "--json"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let mut found: Vec<(u64, bool, Value)> = Vec::new();
    for damage in report["damages"].as_array().unwrap() {
        assert_eq!((&damage["kind"], &damage["length"]), (&json!("data"), &json!(4096)));
        let owner = &damage["owners"][0];
        assert_eq!(owner["name"], "a");
        let offset = damage["offset"].as_u64().unwrap();
        found.push((offset, owner["head"].as_bool().unwrap(), owner["snapshots"].clone()));
    }
    found.sort_by_key(|&(offset, ..)| offset);
    assert_eq!(found, [(65_536, false, json!([1])), (131_072, true, json!([1]))]);
    let outcome = place.run(&["scrub"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stdout.contains("damage: a@1, bytes 65536 to 69631: block "), "{outcome:?}");
    assert!(outcome.stderr.contains("2 damaged blocks"), "{outcome:?}");
    let outcome = place.run(&["check", "--online"]);
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    assert!(outcome.stdout.contains("error: a, a@1, bytes 131072 to 135167: "), "{outcome:?}");
    let said = place.ok(&["check", "--online", "--quick"]);
    assert!(said.ends_with("no damage found"), "metadata is sound: {said}");
    served.stop();
}

#[test]
fn a_scrub_that_runs_is_watched_hurried_and_stopped() {
    let (place, served) = served();
    place.fails(2, &["scrub", "--stop"]);
    let start = |rate: &str| {
        let mut command = place.command(&["scrub", "--rate", rate]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let until_running = || {
        while !place.ok(&["scrub", "--status"]).starts_with("running: ") {
            crate::place::pause();
        }
    };
    let mut slow = start("4K");
    until_running();
    place.ok(&["scrub", "--rate", "0"]);
    assert!(slow.wait().unwrap().success(), "it joined the one that was running");
    let mut slow = start("4K");
    until_running();
    let stopped = place.ok(&["scrub", "--stop"]);
    assert!(stopped.starts_with("stopped: read "), "{stopped}");
    assert_eq!(slow.wait().unwrap().code(), Some(3), "it was stopped by somebody else");
    served.stop();
}

/// Two checks at a time showed one state, and the end of one was that of both.
#[test]
fn each_check_tells_how_far_it_is_itself() {
    let (place, served) = served();
    let stage = |token: u64| {
        let (status, at) = request(&place, "GET", &format!("/v1/check?token={token}"), "");
        assert_eq!(status, 200, "{at}");
        at["stage"].as_str().unwrap().to_owned()
    };
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let body = r#"{"read_data":true,"rate_bytes":4096,"token":1}"#;
            request(&place, "POST", "/v1/check", body)
        });
        while stage(1) != "data" {
            crate::place::pause();
        }
        assert_eq!(stage(2), "", "it was not begun");
        let (status, report) = request(&place, "POST", "/v1/check", r#"{"token":2}"#);
        assert_eq!((status, &report["clean"]), (200, &json!(true)), "{report}");
        assert_eq!((stage(1), stage(2)), ("data".to_owned(), String::new()));
        place.ok(&["scrub", "--stop"]);
        assert_eq!(slow.join().unwrap().0, 409);
        assert_eq!(stage(1), "");
    });
    served.stop();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let place = Place::with_store("128M");
    for arguments in [
        &["scrub", "--rate", "fast"][..],
        &["scrub", "--status", "--stop"],
        &["check"],
        &["check", "store", "--online"],
        &["check", "--online", "--repair"],
        &["serve", "store", "--scrub-every", "5"],
        &["serve", "store", "--scrub-every", "0d"],
    ] {
        let said = place.fails(1, arguments);
        assert!(!said.is_empty());
    }
    place.fails(6, &["scrub"]);
    place.fails(6, &["check", "--online"]);
    let served = place.serve(&["--scrub-every", "off"]);
    assert!(place.json(&["scrub", "--status"])["next"].is_null());
    served.stop();
}

//! Exit codes, and what is said.

use serde_json::Value;

use crate::place::{Outcome, Place};

#[test]
fn usage_is_1() {
    let place = Place::new();
    for wrong in [
        &["frobnicate"][..],
        &["create", "a"],
        &["create", "a", "--size", "0"],
        &["create", "a", "--size", "12Q"],
        &["create", "", "--size", "1G"],
        &["rollback", "a"],
        &["rm", "a@"],
        &["serve", "x", "--nbd", "http:x"],
        &["stats", "--interval", "5"],
        &["import", "f", "a", "--format", "raw,x=y"],
        &[],
    ] {
        let said = place.fails(1, wrong);
        assert!(said.contains("Usage") || said.contains("error:"), "{wrong:?}: {said}");
    }
    for help in [&["--help"][..], &["-h"], &["serve", "--help"], &["--version"], &["help", "ls"]] {
        assert!(!place.ok(help).is_empty());
    }
    let said = place.fails(1, &["rollback", "web01"]);
    assert!(said.contains("parallax snapshots web01"), "{said}");
}

#[test]
fn without_a_daemon_it_is_6_and_says_how_to_start_one() {
    let place = Place::new();
    for command in [&["ls"][..], &["create", "a", "--size", "1G"], &["stats"]] {
        let said = place.fails(6, command);
        let socket = place.text("control.sock");
        let expected = format!(
            "parallax: no daemon answers on {socket}; name its socket with --socket or \
             PARALLAX_SOCKET, or start one with: parallax serve STORE\n"
        );
        assert_eq!(said, expected);
    }
    let mut homeless = place.command(&["ls"]);
    homeless.env_remove("PARALLAX_SOCKET").env_remove("XDG_RUNTIME_DIR");
    if !rustix::process::geteuid().is_root() {
        let outcome = Outcome::of(&mut homeless);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("--socket"), "{outcome:?}");
    }
}

#[test]
fn what_does_not_exist_is_2_and_what_is_wrong_is_1() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    for missing in [
        &["info", "b"][..],
        &["rm", "b"],
        &["rm", "a@9"],
        &["rm", "a@x"],
        &["info", "a@x"],
        &["snapshot", "b"],
        &["snapshots", "b"],
        &["rename", "b", "c"],
        &["resize", "b", "1G"],
        &["rollback", "a@x"],
        &["clone", "a@x", "c"],
        &["clone", "b", "c"],
        &["diff", "a", "b"],
        &["export", "b", "f"],
        &["export", "a@x", "f"],
        &["import", "nofile", "c"],
    ] {
        let said = place.fails(2, missing);
        assert!(said.starts_with("parallax: "), "{missing:?}: {said}");
    }
    // An empty label once named the oldest snapshot that had none.
    for nothing in [&["clone", "a@", "c"][..], &["diff", "a@", "a"], &["info", "a@"]] {
        place.fails(1, nothing);
    }
    for wrong in [
        &["create", "a", "--size", "1M"][..],
        &["create", "x@y", "--size", "1M"],
        &["clone", "a@s", "a"],
        &["snapshot", "a", "--label", "s"],
    ] {
        place.fails(1, wrong);
    }
}

#[test]
fn with_json_errors_are_json() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    let said = place.fails(2, &["info", "b", "--json"]);
    let error: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(error["error"]["kind"], "not_found");
    assert!(error["error"]["message"].as_str().unwrap().contains('b'));
}

#[test]
fn a_full_store_is_5() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    crate::place::noise_file(&place.path("large"), 300 << 20);
    let said = place.fails(5, &["import", "large", "big"]);
    assert!(said.contains("the store is full") && said.contains("No space left"), "{said}");
    assert_eq!(place.ok(&["ls", "--json"]), "[]", "the incomplete disk is gone");
    served.signal(rustix::process::Signal::TERM);
    let (_, log) = served.wait();
    assert_eq!(log.matches("the store is full").count(), 1, "{log}");
}

/// What is too short for the second copy of a superblock was called damaged.
#[test]
fn a_small_file_is_no_store() {
    let place = Place::new();
    crate::place::noise_file(&place.path("small"), 777_000);
    for command in ["serve", "check"] {
        let said = place.fails(2, &[command, "small"]);
        assert!(said.contains("there is no store on small"), "{said}");
    }
}

#[test]
fn an_unknown_engine_is_refused() {
    let place = Place::with_store("256M");
    let mut command = place.command(&["check", "store"]);
    let outcome = crate::place::Outcome::of(command.env("PARALLAX_IO_ENGINE", "uring"));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("none of auto, io_uring, threads"), "{outcome:?}");
}

#[test]
fn a_destroyed_store_is_4_and_no_store_is_2() {
    let place = Place::new();
    place.fails(2, &["serve", "none"]);
    std::fs::write(place.path("store"), vec![0; 16 << 20]).unwrap();
    let said = place.fails(2, &["serve", "store"]);
    assert!(said.contains("parallax format store"), "{said}");
}

#[test]
fn a_closed_pipe_is_no_error() {
    use std::process::Stdio;
    let place = Place::new();
    let mut child = place.command(&["completion", "bash"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

//! import and export.

use std::os::unix::fs::MetadataExt;

use serde_json::json;

use crate::place::{Outcome, Place, noise_file};

#[test]
fn raw_and_qcow2_go_in_and_come_out_the_same() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    noise_file(&place.path("a.raw"), 20_000_000);
    // Holes in the middle and at the end.
    place.tool("truncate", &["-s", "64M", "a.raw"]);
    place.tool("fallocate", &["-p", "-o", "4194304", "-l", "4194304", "a.raw"]);
    place.tool("qemu-img", &["convert", "-O", "qcow2", "-c", "a.raw", "a.qcow2"]);

    assert_eq!(place.ok(&["import", "a.raw", "raw"]), "imported a.raw (raw) as raw (64 MiB)");
    let imported = place.json(&["import", "a.qcow2", "q"]);
    assert_eq!((&imported["name"], &imported["size_bytes"]), (&json!("q"), &json!(64 << 20)));
    for disk in ["raw", "q"] {
        let mapped = place.json(&["info", disk])["space"]["mapped_bytes"].as_u64().unwrap();
        assert!(mapped <= 17 << 20, "holes take no space: {mapped} bytes are mapped");
    }

    let said = place.ok(&["export", "q", "back.raw"]);
    assert!(said.starts_with("exported q to back.raw (raw, 64 MiB"), "{said}");
    place.tool("cmp", &["a.raw", "back.raw"]);
    let file = std::fs::metadata(place.path("back.raw")).unwrap();
    assert!(file.blocks() * 512 < 24 << 20, "the file has holes");
    let exported = place.json(&["export", "raw", "back.qcow2"]);
    assert_eq!(exported["format"], "qcow2");
    place.tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "back.qcow2"]);
    assert_eq!(place.json(&["snapshots", "q"]), json!([]), "no snapshot is left behind");
}

#[test]
fn a_size_that_is_no_multiple_of_a_block_is_rounded_up() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    noise_file(&place.path("odd"), 512 * 9);
    place.ok(&["import", "odd", "a"]);
    assert_eq!(place.json(&["info", "a"])["size_bytes"], 8192);
    place.ok(&["export", "a", "back"]);
    place.tool("cmp", &["-n", "4608", "odd", "back"]);
}

#[test]
fn a_snapshot_is_exported_as_it_was() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.write("a", 1, 0, 4096);
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.write("a", 2, 0, 4096);
    place.ok(&["export", "a@s", "then"]);
    place.ok(&["export", "a", "now"]);
    assert_eq!(std::fs::read(place.path("then")).unwrap()[0], 1);
    assert_eq!(std::fs::read(place.path("now")).unwrap()[0], 2);
}

#[test]
fn a_file_is_replaced_only_when_told() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    std::fs::write(place.path("f"), "precious").unwrap();
    let said = place.fails(1, &["export", "a", "f"]);
    assert!(said.contains("--force"), "{said}");
    assert_eq!(std::fs::read(place.path("f")).unwrap(), b"precious");
    place.ok(&["export", "a", "f", "--force"]);
    assert_eq!(std::fs::metadata(place.path("f")).unwrap().len(), 1 << 20);
    place.fails(1, &["export", "a", "/dev/null", "--force"]);
    place.fails(2, &["export", "a", "no/such/dir"]);
    let files = std::fs::read_dir(place.path("")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned());
    assert!(names.into_iter().all(|name| !name.ends_with(".partial")));
}

#[test]
fn a_name_that_is_taken_stays_as_it_is() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.write("a", 7, 0, 4096);
    noise_file(&place.path("f"), 8192);
    place.fails(1, &["import", "f", "a"]);
    assert!(place.holds("a", 7, 0, 4096));
}

#[test]
fn files_that_refer_to_others_must_be_trusted_first() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    noise_file(&place.path("secret"), 1 << 20);
    place.tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "f"]);
    let said = place.fails(1, &["import", "f", "a"]);
    assert!(said.contains("secret") && said.contains("--format qcow2"), "{said}");
    assert_eq!(place.json(&["ls"]), json!([]));
    place.ok(&["import", "f", "a", "--format", "qcow2"]);
    place.ok(&["export", "a", "back"]);
    place.tool("cmp", &["secret", "back"]);
}

#[test]
fn what_is_no_file_is_refused_with_a_way() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    for stream in ["-", "/dev/zero"] {
        let said = place.fails(1, &["import", stream, "b"]);
        assert!(said.contains("nbdcopy --flush - 'nbd+unix:///b?socket="), "{said}");
    }
    let said = place.fails(1, &["export", "a", "-"]);
    assert!(said.contains("nbdcopy 'nbd+unix:///a?socket="), "{said}");
    // The way leads there.
    let way = said.split_once("nbdcopy").unwrap().1.trim();
    place.tool("bash", &["-c", &format!("nbdcopy {way} > streamed")]);
    assert_eq!(std::fs::metadata(place.path("streamed")).unwrap().len(), 1 << 20);
    assert!(place.fails(1, &["import", "/tmp", "b"]).contains("is a directory"));
    assert!(place.fails(1, &["export", "a", "f", "--format", "iso"]).contains("iso"));
    assert_eq!(place.json(&["ls"]).as_array().unwrap().len(), 1);
    assert_eq!(place.json(&["snapshots", "a"]), json!([]));
}

#[test]
fn an_export_that_fails_says_of_what_and_leaves_nothing() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 1 << 20);
    // As a file system that runs full: no file gets more than 64 KiB.
    let export =
        format!("trap '' XFSZ; ulimit -f 64; exec {} export a f", env!("CARGO_BIN_EXE_parallax"));
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &export]).current_dir(place.path(""));
    shell.env("PARALLAX_SOCKET", place.path("control.sock"));
    let outcome = Outcome::of(&mut shell);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("cannot export a to f: "), "{outcome:?}");
    let left = std::fs::read_dir(place.path("")).unwrap();
    let left =
        left.filter(|it| it.as_ref().unwrap().file_name().to_string_lossy().starts_with('f'));
    assert_eq!(left.count(), 0, "no part of it is left");
    assert_eq!(place.json(&["snapshots", "a"]), json!([]));
}

#[test]
fn without_qemu_img_it_says_so() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    noise_file(&place.path("f"), 8192);
    place.ok(&["create", "a", "--size", "1M"]);
    for arguments in [&["import", "f", "b"][..], &["export", "a", "g"]] {
        let outcome = Outcome::of(place.command(arguments).env("PATH", "/nowhere"));
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("apt install qemu-utils"), "{outcome:?}");
    }
    assert_eq!(place.json(&["snapshots", "a"]), json!([]), "no snapshot is left behind");
    assert_eq!(place.json(&["ls"]).as_array().unwrap().len(), 1);
}

#[test]
fn an_import_that_is_interrupted_leaves_nothing() {
    let place = Place::with_store("1G");
    let _served = place.serve(&[]);
    // Large enough that the copy is still under way when the disk is seen.
    noise_file(&place.path("large"), 256 << 20);
    let mut child = place
        .command(&["import", "large", "a"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while place.json(&["ls"]).as_array().unwrap().is_empty() {
        crate::place::pause();
    }
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert_eq!(place.json(&["ls"]), json!([]));
}

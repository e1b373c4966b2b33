//! Disks as files: mount, unmount, mounts, and what a mount outlives.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::http::request;
use crate::place::{After, Place};

/// A mount, gone at the end whatever happens: a test must leave none behind.
struct Mount<'a>(&'a Place);

impl<'a> Mount<'a> {
    fn new(place: &'a Place) -> Self {
        fs::create_dir_all(place.path("mnt")).unwrap();
        let said = place.ok(&["mount", "mnt"]);
        assert_eq!(said, format!("mounted at {}", place.text("mnt")));
        Self(place)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self.0.run(&["unmount", "mnt"]);
    }
}

#[test]
fn disks_are_files_and_outlive_the_daemon() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "8M"]);
    place.write("a", 7, 4096, 8192);
    assert!(place.ok(&["mounts"]).contains("parallax mount"), "it says how");
    let mount = Mount::new(&place);
    let path = place.path("mnt").join("a.img");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (8 << 20, 16));
    let read = |offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    };
    assert_eq!([4095, 4096, 12287, 12288].map(read), [0, 7, 7, 0]);
    file.write_all_at(&[9; 4096], 8192).unwrap();
    assert!(place.holds("a", 9, 8192, 4096), "others see it at once");
    place.ok(&["snapshot", "a", "--label", "s"]);
    assert_eq!(place.json(&["mounts"]), json!([{ "dir": place.text("mnt") }]));

    served.kill();
    let served = place.serve(&[]);
    assert_eq!(read(8192), 9, "it waited for the next daemon");
    file.write_all_at(&[5; 4096], 8192).unwrap();
    file.sync_all().unwrap();
    served.stop();
    let served = place.serve(&[]);
    assert_eq!(read(8192), 5);
    let snapshot = fs::read(place.path("mnt").join(".snapshots/a/s.img")).unwrap();
    assert!(snapshot.len() == 8 << 20 && snapshot[8192] == 9);
    let write = fs::metadata(place.path("mnt").join(".snapshots/a/lsn:4.img")).unwrap_err();
    assert_eq!(write.kind(), std::io::ErrorKind::NotFound, "writes have no files");
    let (status, metrics) = request(&place, "GET", "/v1/fuse", "");
    assert_eq!((status, &metrics["fuse_mounts_open"]), (200, &json!(1)), "{metrics}");

    assert!(place.fails(3, &["unmount", "mnt"]).contains("in use"));
    drop(file);
    assert_eq!(place.ok(&["unmount", "mnt"]), format!("unmounted {}", place.text("mnt")));
    assert_eq!(fs::read_dir(place.path("mnt")).unwrap().count(), 0);
    let deadline = Instant::now_after(Duration::from_secs(10));
    while place.json(&["mounts"]) != json!([]) {
        assert!(!deadline.passed(), "the daemon still serves it");
    }
    place.fails(2, &["unmount", "mnt"]);
    drop(mount);
    served.stop();
}

/// Whoever has a file open has cached what it was.
#[test]
fn a_file_whose_disk_was_rolled_back_has_to_be_opened_again() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    let mount = Mount::new(&place);
    let path = place.path("mnt").join("a.img");
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let file = open();
    file.write_all_at(&[1; 4096], 0).unwrap();
    place.ok(&["rollback", "a@s"]);
    served.kill();
    let served = place.serve(&[]);
    file.write_all_at(&[2; 4096], 0).expect_err("of what it was");
    assert_eq!(fs::read(&path).unwrap()[0], 0);
    open().write_all_at(&[3; 4096], 0).unwrap();
    assert!(place.holds("a", 3, 0, 4096));
    drop(file);
    drop(mount);
    served.stop();
}

#[test]
fn what_is_wrong_is_said_before_anything_is_mounted() {
    let place = Place::with_store("256M");
    let missing = place.fails(2, &["mount", "mnt"]);
    assert!(missing.contains("mkdir"), "{missing}");
    fs::create_dir(place.path("mnt")).unwrap();
    let unserved = place.fails(6, &["mount", "mnt"]);
    assert!(unserved.contains("parallax serve"), "{unserved}");
    fs::write(place.path("file"), "").unwrap();
    assert!(place.fails(1, &["mount", "file"]).contains("no directory"));
}

/// The keeper goes to the background, and with that to another directory: it looked for the next daemon
/// there, for ever.
#[test]
fn a_control_socket_that_was_named_by_a_relative_path_is_found_again() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    fs::create_dir(place.path("mnt")).unwrap();
    let socket = served.ready["socket"].as_str().unwrap();
    let relative = socket.strip_prefix(&place.text("")).unwrap().trim_start_matches('/');
    place.ok(&["mount", "mnt", "--socket", relative]);
    served.kill();
    let served = place.serve(&[]);
    let deadline = Instant::now_after(Duration::from_secs(10));
    while place.json(&["mounts"]) == json!([]) {
        assert!(!deadline.passed(), "nobody gives the mount to the next daemon");
    }
    assert!(place.fails(1, &["mount", "mnt"]).contains("already"));
    place.ok(&["unmount", "mnt"]);
    served.stop();
}

/// As a service manager runs it.
#[test]
fn a_keeper_in_the_foreground_unmounts_when_it_is_told_to_end() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    fs::create_dir(place.path("mnt")).unwrap();
    let mut keeper = place.command(&["mount", "mnt", "--foreground"]).spawn().unwrap();
    let deadline = Instant::now_after(Duration::from_secs(10));
    while !place.path("mnt").join("a.img").exists() {
        assert!(!deadline.passed(), "nothing is mounted");
    }
    let pid = rustix::process::Pid::from_child(&keeper);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert!(keeper.wait().unwrap().success());
    assert_eq!(fs::read_dir(place.path("mnt")).unwrap().count(), 0);
    served.stop();
}

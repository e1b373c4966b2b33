//! Disks attached to virtual machines: attach, detach, attachments, and what outlives the daemon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::http::request;
use crate::place::{After, Place};

/// Asks the server at a socket which virtio features it has.
fn features(place: &Place, socket: &str) -> u64 {
    let mut stream = UnixStream::connect(place.path(socket)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // GET_FEATURES of version 1, without a payload.
    stream.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    u64::from_le_bytes(reply[12..].try_into().unwrap())
}

const READ_ONLY: u64 = 1 << 5;

#[test]
fn disks_and_snapshots_are_attached_and_detached() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    assert!(place.ok(&["attachments"]).contains("parallax attach"), "it says how");
    let said = place.ok(&["attach", "a", "--vhost-user", "vm.sock"]);
    assert_eq!(said, format!("attached a at {}", place.text("vm.sock")));
    place.ok(&["attach", "a@s", "--vhost-user", "old.sock"]);
    assert_eq!(features(&place, "vm.sock") & READ_ONLY, 0);
    assert_eq!(features(&place, "old.sock") & READ_ONLY, READ_ONLY);

    let connected = UnixStream::connect(place.path("vm.sock")).unwrap();
    let attached = |disk: &str, socket: &str, connected| {
        let vhost_user = place.text(socket);
        json!({ "disk": disk, "vhost_user": vhost_user, "ublk": null, "connected": connected })
    };
    let expected = json!([attached("a@s", "old.sock", false), attached("a", "vm.sock", true)]);
    let deadline = Instant::now_after(Duration::from_secs(10));
    while place.json(&["attachments"]) != expected {
        assert!(!deadline.passed(), "{}", place.json(&["attachments"]));
    }
    assert_eq!(place.json(&["stats"])["vhost_connections"], 1);
    let (status, metrics) = request(&place, "GET", "/v1/vhost-user", "");
    assert_eq!((status, &metrics["vhost_connections_total"]), (200, &json!(3)), "{metrics}");
    let table = place.ok(&["attachments"]);
    assert!(table.contains("a@s   no") && table.lines().count() == 3, "{table}");

    // The machine that is connected is disconnected.
    let said = place.ok(&["detach", "vm.sock"]);
    assert_eq!(said, format!("detached a from {}", place.text("vm.sock")));
    assert!(!place.path("vm.sock").exists());
    connected.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!((&connected).read(&mut [0]).unwrap(), 0);
    place.fails(2, &["detach", "vm.sock"]);
    served.stop();
    assert!(!place.path("old.sock").exists());
}

#[test]
fn what_cannot_be_attached_is_told_at_once() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.fails(2, &["attach", "b", "--vhost-user", "vm.sock"]);
    place.fails(2, &["attach", "a@s", "--vhost-user", "vm.sock"]);
    place.fails(2, &["attach", "a", "--vhost-user", "nowhere/vm.sock"]);
    place.fails(1, &["attach", "a", "--vhost-user", &format!("{}.sock", "x".repeat(100))]);
    std::fs::write(place.path("file"), "precious").unwrap();
    place.fails(1, &["attach", "a", "--vhost-user", "file"]);
    assert_eq!(std::fs::read(place.path("file")).unwrap(), b"precious");
    place.fails(3, &["attach", "a", "--vhost-user", "control.sock"]);
    place.ok(&["attach", "a", "--vhost-user", "vm.sock"]);
    let said = place.fails(1, &["attach", "a", "--vhost-user", "vm.sock"]);
    assert!(said.contains("parallax detach"), "{said}");
    assert_eq!(place.json(&["attachments"]).as_array().unwrap().len(), 1);
}

/// Where the kernel has block devices `cargo xtask e2e ublk` looks at them.
#[test]
fn a_kernel_without_block_devices_is_told_of() {
    if std::path::Path::new("/dev/ublk-control").exists() {
        return;
    }
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    let said = place.fails(1, &["attach", "a", "--ublk"]);
    assert!(said.contains("Linux 6.5") && said.contains("modprobe ublk_drv"), "{said}");
    let said = place.fails(1, &["attach", "a", "--ublk", "--json"]);
    assert!(said.contains(r#""kind":"unsupported""#), "{said}");
    place.fails(2, &["attach", "b", "--ublk"]);
    place.fails(1, &["attach", "a"]);
    place.fails(1, &["attach", "a", "--ublk", "--vhost-user", "vm.sock"]);
    place.fails(2, &["detach", "/dev/ublkb0"]);
    assert_eq!(place.json(&["attachments"]), json!([]));
    let (status, metrics) = request(&place, "GET", "/v1/ublk", "");
    assert_eq!((status, &metrics["ublk_devices_total"]), (200, &json!(0)), "{metrics}");
    assert_eq!(remembered(&place), 0, "nothing is left behind");
}

/// How many block devices the next daemon would look for.
fn remembered(place: &Place) -> usize {
    let text = std::fs::read_to_string(place.path("control.ublk.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    file["attachments"].as_array().unwrap().len()
}

#[test]
fn attachments_outlive_the_daemon() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.ok(&["attach", "a", "--vhost-user", "one.sock"]);
    place.ok(&["attach", "a@s", "--vhost-user", "two.sock"]);
    place.ok(&["attach", "a", "--vhost-user", "three.sock"]);
    place.ok(&["detach", "three.sock"]);
    // They are of the disk, whatever it is called.
    place.ok(&["rename", "a", "b"]);
    let attached = place.json(&["attachments"]);
    let disks: Vec<_> = attached.as_array().unwrap().iter().map(|it| &it["disk"]).collect();
    assert_eq!(disks, ["b", "b@s"]);

    served.signal(Signal::KILL);
    served.wait();
    assert!(place.path("one.sock").exists(), "a killed daemon leaves it");
    let served = place.serve(&[]);
    assert_eq!(place.json(&["attachments"]), attached);
    assert_eq!(features(&place, "one.sock") & READ_ONLY, 0);
    served.stop();
    assert!(!place.path("one.sock").exists(), "one that stops does not");
    let served = place.serve(&[]);
    assert_eq!(place.json(&["attachments"]), attached);
    assert_eq!(features(&place, "two.sock") & READ_ONLY, READ_ONLY);

    // A disk that is gone does not keep the others from being attached.
    place.ok(&["create", "c", "--size", "1M"]);
    place.ok(&["attach", "c", "--vhost-user", "three.sock"]);
    served.stop();
    let state = place.path("control.attachments.json");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replace(r#""b""#, r#""gone""#)).unwrap();
    let _served = place.serve(&[]);
    features(&place, "three.sock");
    let mut gone = UnixStream::connect(place.path("one.sock")).unwrap();
    gone.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(gone.read(&mut [0]).unwrap_or(0), 0, "refused");
}

/// A disk went away under its virtual machine, and stayed in the list.
#[test]
fn what_is_attached_is_not_deleted() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.ok(&["snapshot", "a"]);
    place.ok(&["attach", "a@s", "--vhost-user", "vm.sock"]);
    for target in ["a", "a@s", "a@1"] {
        let said = place.fails(3, &["rm", target]);
        assert!(said.contains("parallax detach") && said.contains("vm.sock"), "{said}");
    }
    place.ok(&["rm", "a@2"]);
    place.ok(&["detach", "vm.sock"]);
    place.ok(&["rm", "a"]);
}

//! `parallax upgrade`: another program with the same sockets, under whoever uses its disks.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use serde_json::Value;

use crate::place::Place;

#[test]
fn another_program_takes_over_and_nobody_misses_a_socket() {
    let place = Place::with_store("256M");
    // A copy, so that what is upgraded to is another file.
    let program = place.path("parallax-next");
    fs::copy(place.command(&[]).get_program(), &program).unwrap();
    let served = place.serve(&["--nbd", "tcp:127.0.0.1:0"]);
    let tcp = served.ready["daemon"]["nbd"][1]["address"].as_str().unwrap().to_owned();
    place.ok(&["create", "a", "--size", "8M"]);
    place.write("a", 7, 0, 65_536);
    place.ok(&["attach", "a", "--vhost-user", "vm.sock"]);
    fs::create_dir(place.path("mnt")).unwrap();
    place.ok(&["mount", "mnt"]);
    let file = File::options().read(true).write(true).open(place.path("mnt/a.img")).unwrap();
    let sockets: Vec<_> = fs::read_dir(place.path(""))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".sock"))
        .map(|entry| (entry.path(), entry.metadata().unwrap().ino()))
        .collect();
    assert_eq!(sockets.len(), 4, "control, nbd, mounts, vm: {sockets:?}");
    let pid = &served.ready["daemon"]["pid"];

    for _ in 0..3 {
        let upgraded = place.json(&["upgrade", "--binary", "parallax-next"]);
        assert_eq!(&upgraded["pid"], pid);
        assert_eq!(upgraded["binary"], place.text("parallax-next"));
        for (path, inode) in &sockets {
            let now = fs::symlink_metadata(path).map(|now| now.ino());
            assert_eq!(now.ok(), Some(*inode), "{}", path.display());
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, 65_535).unwrap();
        assert_eq!(byte, [7]);
        file.write_all_at(&[7], 65_536).unwrap();
        assert!(place.holds("a", 7, 0, 65_537));
    }
    let program_now = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(program_now, program);
    let uri = format!("nbd://{}/a", tcp.strip_prefix("tcp:").unwrap());
    assert!(place.tool("nbdinfo", &["--size", &uri]).contains("8388608"), "the same port");
    let attached: Value = place.json(&["attachments"]);
    assert_eq!(attached[0]["vhost_user"], place.text("vm.sock"));
    drop(file);
    place.ok(&["unmount", "mnt"]);
    served.stop();
    for (path, _) in &sockets {
        assert!(!path.exists(), "{}", path.display());
    }
}

#[test]
fn what_is_no_parallax_is_refused_and_nothing_changes() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    let before = place.json(&["stats"]);
    assert!(place.fails(2, &["upgrade", "--binary", "nothing"]).contains("nothing"));
    assert!(place.fails(1, &["upgrade", "--binary", "/bin/true"]).contains("is not Parallax"));
    fs::write(place.path("text"), "no program").unwrap();
    place.fails(6, &["upgrade", "--binary", "text"]);
    assert_eq!(place.json(&["stats"]), before);
    served.stop();
}

/// The kernel refuses it only when it is too late to say so: it serves on.
#[test]
fn a_program_that_cannot_be_started_after_all_leaves_the_daemon_as_it_was() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.write("a", 3, 0, 4096);
    // It says its version once, and is gone then.
    let script = place.path("once");
    fs::write(&script, "#!/bin/sh\nrm \"$0\"\necho parallax 9.9.9\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let refused = place.fails(6, &["upgrade", "--binary", "once"]);
    assert!(refused.contains("serves on as before") && refused.contains("once"), "{refused}");
    assert!(place.holds("a", 3, 0, 4096));
    place.ok(&["upgrade"]);
    assert!(place.holds("a", 3, 0, 4096));
    served.stop();
}

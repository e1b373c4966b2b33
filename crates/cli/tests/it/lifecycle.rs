//! The daemon's life: start, signals, sockets, a second one, crashes.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::place::{After, Place, Served};

#[test]
fn it_says_when_it_is_ready() {
    let place = Place::with_store("256M");
    let notified = UnixDatagram::bind(place.path("notify")).unwrap();
    notified.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut command = place.command(&["serve", "store", "--json"]);
    command.env("NOTIFY_SOCKET", place.path("notify"));
    let served = Served::start(command);
    let receive = || {
        let mut bytes = [0; 256];
        let count = notified.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    assert_eq!(receive(), "READY=1\n");
    let daemon = &served.ready["daemon"];
    assert_eq!(daemon["store"], place.text("store"), "as an absolute path");
    assert_eq!(daemon["opened"]["clean"], true);
    assert_eq!(daemon["opened"]["alarms"], serde_json::json!([]));
    served.signal(Signal::TERM);
    assert_eq!(receive(), "STOPPING=1\n");
    assert_eq!(served.wait().0, Some(0));

    // For people it is one line that begins with the word.
    use std::io::{BufRead, BufReader};
    let mut child = place
        .command(&["serve", "store"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("ready: ") && line.contains("control.nbd.sock"), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn signals_stop_it_cleanly_and_fast() {
    let place = Place::with_store("256M");
    for signal in [Signal::TERM, Signal::INT] {
        let served = place.serve(&["--nbd", "unix:extra.sock"]);
        assert_eq!(served.ready["daemon"]["opened"]["clean"], true);
        for socket in ["control.sock", "control.nbd.sock", "extra.sock"] {
            assert!(place.path(socket).exists(), "{socket}");
        }
        // A client that stays connected does not delay the end.
        place.run(&["create", "a", "--size", "64M"]);
        place.write("a", 1, 0, 1 << 20);
        let idle = Command::new("qemu-io")
            .args(["-f", "raw", &place.url("a")])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn();
        let mut idle = idle.unwrap();
        let connected = || place.json(&["stats"])["nbd_connections"] == 1;
        let deadline = Instant::now_after(Duration::from_secs(10));
        while !connected() {
            assert!(!deadline.passed(), "the client does not connect");
        }
        let deadline = Instant::now_after(Duration::from_secs(2));
        served.signal(signal);
        let (code, said) = served.wait();
        assert!(!deadline.passed(), "it takes less than 2 s");
        assert_eq!(code, Some(0), "{said}");
        for socket in ["control.sock", "control.nbd.sock", "extra.sock"] {
            assert!(!place.path(socket).exists(), "{socket} is removed");
        }
        idle.kill().unwrap();
        idle.wait().unwrap();
    }
}

/// timeout(1) and other wrappers send a signal to the process and then to its group: the second
/// one used to end the daemon before the store was closed.
#[test]
fn a_signal_that_comes_twice_is_one() {
    let place = Place::with_store("256M");
    for _ in 0..3 {
        let served = place.serve(&[]);
        assert_eq!(served.ready["daemon"]["opened"]["clean"], true);
        place.run(&["create", "a", "--size", "64M"]);
        place.write("a", 1, 0, 1 << 20);
        for _ in 0..20 {
            served.signal(Signal::TERM);
            served.signal(Signal::INT);
        }
        let (code, said) = served.wait();
        assert_eq!(code, Some(0), "{said}");
    }
}

/// A daemon that is told a relative socket tells its clients absolute ones: they may be elsewhere.
#[test]
fn sockets_are_told_as_absolute_paths() {
    let place = Place::with_store("256M");
    let served = place.serve(&["--socket", "near.sock", "--nbd", "unix:extra.sock"]);
    assert_eq!(served.ready["socket"], place.text("near.sock"));
    let nbd = &served.ready["daemon"]["nbd"];
    assert_eq!(nbd[0]["address"], format!("unix:{}", place.text("near.nbd.sock")));
    assert_eq!(nbd[1]["address"], format!("unix:{}", place.text("extra.sock")));
    crate::place::noise_file(&place.path("f"), 8192);
    let mut import = place.command(&["import", &place.text("f"), "a"]);
    import.current_dir("/").env("PARALLAX_SOCKET", place.path("near.sock"));
    let outcome = crate::place::Outcome::of(&mut import);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    served.stop();
}

#[test]
fn what_was_there_is_there_after_a_stop_and_after_a_kill() {
    let place = Place::with_store("256M");
    let served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 1 << 20);
    place.ok(&["snapshot", "a", "--label", "s"]);
    place.write("a", 2, 0, 4096);
    served.stop();

    let served = place.serve(&[]);
    assert_eq!(served.ready["daemon"]["opened"]["clean"], true);
    assert!(place.holds("a", 2, 0, 4096) && place.holds("a%40s", 1, 0, 1 << 20));
    place.write("a", 3, 8192, 4096);
    served.kill();

    assert!(place.path("control.sock").exists(), "a killed daemon leaves its sockets");
    let said = place.fails(6, &["ls"]);
    assert!(said.contains("parallax serve"), "{said}");
    let served = place.serve(&[]);
    assert_eq!(served.ready["daemon"]["opened"]["clean"], false);
    assert!(place.holds("a", 2, 0, 4096) && place.holds("a", 3, 8192, 4096));
    assert!(place.holds("a%40s", 1, 0, 1 << 20));
    served.stop();
}

#[test]
fn one_store_has_one_daemon() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    let said = place.fails(3, &["serve", "store", "--socket", &place.text("other.sock")]);
    assert!(said.contains("daemon") && said.contains("store"), "{said}");
    assert!(!place.path("other.sock").exists(), "nothing is left behind");
    place.ok(&["ls"]);
}

#[test]
fn one_socket_has_one_daemon() {
    let place = Place::with_store("256M");
    place.ok(&["format", "second", "--size", "256M"]);
    let served = place.serve(&[]);
    let said = place.fails(3, &["serve", "second"]);
    assert!(said.contains("control"), "{said}");
    place.ok(&["ls"]);
    served.stop();

    // Somebody else's file is not a socket to replace.
    std::fs::write(place.path("control.sock"), "precious").unwrap();
    place.fails(1, &["serve", "second"]);
    assert_eq!(std::fs::read(place.path("control.sock")).unwrap(), b"precious");
    std::fs::remove_file(place.path("control.sock")).unwrap();

    // A stale one is.
    drop(UnixListener::bind(place.path("control.sock")).unwrap());
    drop(UnixListener::bind(place.path("control.nbd.sock")).unwrap());
    let mut command = place.command(&["serve", "second", "--json"]);
    command.stdin(std::process::Stdio::null());
    let served = Served::start(command);
    place.ok(&["ls"]);
    served.stop();
}

#[test]
fn only_its_user_reaches_it() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    for socket in ["control.sock", "control.nbd.sock"] {
        let mode = std::fs::metadata(place.path(socket)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
}

#[test]
fn other_ways_of_io_serve_too() {
    let place = Place::with_store("256M");
    let served = {
        let mut command = place.command(&["serve", "store", "--json"]);
        command.env("PARALLAX_IO_ENGINE", "threads");
        Served::start(command)
    };
    let device = served.ready["daemon"]["device"].as_str().unwrap();
    assert!(device.contains("worker threads"), "{device}");
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 1, 0, 1 << 20);
    served.stop();
    let served = place.serve(&["--buffered"]);
    let device = served.ready["daemon"]["device"].as_str().unwrap();
    assert!(!device.contains("O_DIRECT"), "{device}");
    assert!(place.holds("a", 1, 0, 1 << 20));
    place.write("a", 2, 0, 4096);
    served.stop();
    let served = place.serve(&[]);
    assert!(place.holds("a", 2, 0, 4096) && place.holds("a", 1, 4096, (1 << 20) - 4096));
    served.stop();
}

#[test]
fn commands_work_while_clients_write() {
    let place = Place::with_store("1G");
    let served = place.serve(&[]);
    crate::place::noise_file(&place.path("noise"), 64 << 20);
    place.ok(&["create", "busy", "--size", "64M"]);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for _ in 0..3 {
                place.tool("nbdcopy", &["--flush", "noise", &place.url("busy")]);
            }
        });
        let callers: Vec<_> = (0..4)
            .map(|caller| {
                let place = &place;
                scope.spawn(move || {
                    for round in 0..6 {
                        let clone = format!("c{caller}-{round}");
                        let handle = place.ok(&["snapshot", "busy"]);
                        place.ok(&["clone", &handle, &clone]);
                        place.ok(&["ls"]);
                        place.ok(&["rm", &clone]);
                        place.ok(&["rm", &handle]);
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.join().unwrap();
        }
        writer.join().unwrap();
    });
    place.ok(&["export", "busy", "back"]);
    place.tool("cmp", &["noise", "back"]);
    assert_eq!(place.json(&["ls"]).as_array().unwrap().len(), 1);
    assert_eq!(place.json(&["snapshots", "busy"]).as_array().unwrap().len(), 0);
    served.stop();
}

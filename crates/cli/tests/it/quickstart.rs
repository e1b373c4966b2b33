//! `parallax quickstart`, followed to the letter.

use crate::place::{Place, Served};

#[test]
fn it_makes_serves_and_goes_on() {
    let place = Place::new();
    let socket = place.path("q/parallax.sock");
    let start = || {
        let mut command = place.command(&["quickstart", "q", "--json"]);
        command.env_remove("PARALLAX_SOCKET");
        Served::start(command)
    };
    let served = start();
    assert_eq!(served.ready["made_store"], true);
    assert_eq!(served.ready["made_disk"], true);
    assert_eq!(served.ready["socket"], socket.to_str().unwrap());
    let socket = ["--socket", socket.to_str().unwrap()];
    let run = |arguments: &[&str]| place.ok(&[&socket, arguments].concat());
    assert_eq!(run(&["snapshot", "demo", "--label", "first"]), "demo@first");
    let url = format!("nbd+unix:///demo?socket={}", place.text("q/parallax.nbd.sock"));
    let write = ["-f", "raw", "-c", "write -P 9 0 4096", "-c", "flush", &url];
    place.tool("qemu-io", &write);
    served.signal(rustix::process::Signal::INT);
    let (code, said) = served.wait();
    assert_eq!((code, said.as_str()), (Some(0), ""), "Ctrl-C ends it quietly");

    let served = start();
    assert_eq!(served.ready["made_store"], false);
    assert_eq!(served.ready["made_disk"], false);
    let read = place.tool("qemu-io", &["-r", "-f", "raw", "-c", "read -P 9 0 4096", &url]);
    assert!(!read.contains("failed"), "{read}");
    assert!(run(&["snapshots", "demo"]).contains("demo@first"));
    let mut second = place.command(&["quickstart", "q"]);
    let outcome = crate::place::Outcome::of(second.env_remove("PARALLAX_SOCKET"));
    assert_eq!(outcome.code, Some(3), "a second one in the same directory: {outcome:?}");
    served.stop();
}

#[test]
fn what_it_says_to_try_works() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let place = Place::new();
    let mut command = place.command(&["quickstart", "my disks"]);
    command.env_remove("PARALLAX_SOCKET").stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut tried = 0;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains("Ctrl-C") {
            break;
        }
        if let Some(command) = line.strip_prefix("  ").filter(|line| !line.starts_with('#')) {
            place.tool("bash", &["-c", command]);
            tried += 1;
        }
    }
    assert_eq!(tried, 4);
    child.kill().unwrap();
    child.wait().unwrap();
}

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

/// The socket of another daemon, which a person may have in the environment, is not for this one.
#[test]
fn the_environment_does_not_name_its_socket() {
    let place = Place::new();
    let served = Served::start(place.command(&["quickstart", "q", "--json"]));
    assert_eq!(served.ready["socket"], place.text("q/parallax.sock"));
    served.stop();
}

#[test]
fn what_it_says_to_try_works() {
    let place = Place::new();
    let (first, _) = follow(&place);
    assert!(first.contains("made and serving") && first.contains("demo@first copy"), "{first}");
    let (second, printed) = follow(&place);
    assert!(second.contains("recovered after an unclean stop"), "{second}");
    assert!(printed.contains("copy (10 GiB)"), "the tree of what was made before: {printed}");
    let (third, printed) = follow(&place);
    assert!(!third.contains("made"), "{third}");
    assert!(printed.contains("demo@3"), "a snapshot each time: {printed}");
    let wide = first.lines().chain(second.lines()).filter(|line| line.starts_with("  #"));
    assert!(wide.map(str::len).all(|length| length <= 80), "{first}{second}");
}

/// Starts it, types what it says to try, and kills it; what it said, and what that printed.
fn follow(place: &Place) -> (String, String) {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let mut command = place.command(&["quickstart", "my disks"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let said: Vec<String> = lines.take_while(|line| !line.contains("Ctrl-C")).collect();
    let typed: Vec<&str> = said.iter().filter_map(|line| line.strip_prefix("  ")).collect();
    assert!(typed.len() >= 6, "{said:?}");
    let printed = place.tool("bash", &["-e", "-c", &typed.join("\n")]);
    child.kill().unwrap();
    child.wait().unwrap();
    (said.join("\n"), printed)
}

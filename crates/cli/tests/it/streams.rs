//! send and receive.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::place::{After, Outcome, Place, noise_file, pause};

/// Two stores, each with its daemon: where streams come from, and where they go.
struct Pair {
    from: Place,
    to: Place,
    _served: [crate::place::Served; 2],
}

impl Pair {
    fn new() -> Self {
        let (from, to) = (Place::with_store("1G"), Place::with_store("1G"));
        let served = [from.serve(&[]), to.serve(&[])];
        Self { from, to, _served: served }
    }

    /// Sends into a file; what was said.
    #[track_caller]
    fn send(&self, file: &str, arguments: &[&str]) -> String {
        let mut command = self.from.command(&[&["send"], arguments].concat());
        let outcome = Outcome::of(command.stdout(File::create(self.from.path(file)).unwrap()));
        // Stdout went to the file, and `Outcome` reads none of it.
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
        outcome.stderr.trim_end().to_owned()
    }

    fn receive(&self, stream: &[u8], arguments: &[&str]) -> Outcome {
        std::fs::write(self.to.path("in"), stream).unwrap();
        let stdin = File::open(self.to.path("in")).unwrap();
        Outcome::of(self.to.command(&[&["receive"], arguments].concat()).stdin(stdin))
    }

    #[track_caller]
    fn received(&self, file: &str, arguments: &[&str]) -> String {
        let outcome = self.receive(&self.stream(file), arguments);
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
        outcome.stdout.trim_end().to_owned()
    }

    #[track_caller]
    fn refused(&self, code: i32, stream: &[u8], arguments: &[&str]) -> String {
        let before = self.state();
        let outcome = self.receive(stream, arguments);
        assert_eq!(outcome.code, Some(code), "{arguments:?}: {outcome:?}");
        assert_eq!(self.state(), before, "nothing changed");
        outcome.stderr
    }

    fn stream(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.from.path(file)).unwrap()
    }

    /// Everything that there is where streams go.
    fn state(&self) -> Value {
        let disks = self.to.json(&["ls", "--space"]);
        let names: Vec<String> = disks
            .as_array()
            .unwrap()
            .iter()
            .map(|disk| disk["name"].as_str().unwrap().to_owned())
            .collect();
        let snapshots: Vec<Value> =
            names.iter().map(|name| self.to.json(&["snapshots", name])).collect();
        json!([disks, snapshots])
    }

    /// Compares what one export holds with what another one does.
    #[track_caller]
    fn same(&self, from: &str, to: &str) {
        let (from, to) = (self.from.url(from), self.to.url(to));
        self.from.tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &to]);
    }
}

fn names(place: &Place) -> Vec<String> {
    let disks = place.json(&["ls"]);
    let disks = disks.as_array().unwrap().iter();
    disks.map(|disk| disk["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_whole_disk_and_three_increments_arrive_as_they_were() {
    let pair = Pair::new();
    let Pair { from, to, .. } = &pair;
    noise_file(&from.path("noise"), 20_000_000);
    from.ok(&["import", "noise", "web01"]);
    from.ok(&["resize", "web01", "64M"]);
    from.write("web01", 7, 32 << 20, 5 << 20);
    from.ok(&["snapshot", "web01", "--label", "one"]);
    let said = pair.send("one", &["web01@one"]);
    assert!(said.starts_with("sent web01@one ("), "{said}");
    let length = pair.stream("one").len();
    assert!(length < 21_000_000, "what repeats is compressed, and holes stay away: {length}");
    let said = pair.received("one", &["copy"]);
    assert!(said.starts_with("received copy@one ("), "{said}");
    pair.same("web01@one", "copy");
    pair.same("web01@one", "copy@one");

    // Data, holes, growth and shrinking travel.
    from.write("web01", 9, 8192, 12_288);
    let discard = "discard 33554432 1048576";
    from.tool("qemu-io", &["-d", "unmap", "-f", "raw", "-c", discard, &from.url("web01")]);
    from.ok(&["snapshot", "web01", "--label", "two"]);
    from.ok(&["resize", "web01", "96M"]);
    from.write("web01", 3, 90 << 20, 4096);
    from.ok(&["snapshot", "web01"]);
    from.ok(&["resize", "web01", "48M", "--shrink"]);
    from.write("web01", 4, (48 << 20) - 4096, 4096);
    from.ok(&["snapshot", "web01", "--label", "four"]);
    for (file, snapshot, base) in [
        ("two", "web01@two", "@one"),
        ("three", "web01@3", "web01@2"),
        ("four", "web01@four", "@3"),
    ] {
        pair.send(file, &[snapshot, "--from", base]);
        assert!(pair.stream(file).len() < 1 << 20, "only what differs: {file}");
        pair.received(file, &["copy"]);
        pair.same(snapshot, "copy");
    }
    for (snapshot, copy) in [("one", "one"), ("two", "two"), ("3", "3"), ("four", "four")] {
        pair.same(&format!("web01@{snapshot}"), &format!("copy@{copy}"));
    }
    assert_eq!(names(to), ["copy"]);
    // Everything is known by what it was, and can be sent on from there.
    let uuids = |place: &Place, name: &str| {
        let snapshots = place.json(&["snapshots", name]);
        let snapshots = snapshots.as_array().unwrap().iter();
        snapshots.map(|snapshot| snapshot["uuid"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(uuids(from, "web01"), uuids(to, "copy"));
    let onward = to.command(&["send", "copy@four", "--from", "@one", "--no-compress"]).output();
    from.ok(&["clone", "web01@one", "third"]);
    let stream = onward.unwrap().stdout;
    std::fs::write(from.path("onward"), stream).unwrap();
    let stdin = File::open(from.path("onward")).unwrap();
    let refused = Outcome::of(from.command(&["receive", "third"]).stdin(stdin));
    assert_eq!(refused.code, Some(1), "a clone has no snapshots: {refused:?}");
    // Discarded space did not come: 1 MiB of what was written at 32 MiB.
    let mapped = to.json(&["info", "copy@two"])["space"]["mapped_bytes"].as_u64().unwrap();
    let there = from.json(&["info", "web01@two"])["space"]["mapped_bytes"].as_u64().unwrap();
    assert_eq!(mapped, there);
}

#[test]
fn a_running_disk_is_sent_as_a_snapshot_that_stays() {
    let pair = Pair::new();
    pair.from.ok(&["create", "a", "--size", "4M"]);
    pair.from.write("a", 1, 0, 65_536);
    assert!(pair.send("s", &["a"]).starts_with("sent a@1 ("));
    pair.received("s", &["a"]);
    pair.from.write("a", 2, 4096, 4096);
    let said: Value =
        serde_json::from_str(&pair.send("t", &["a", "--from", "@1", "--json"])).unwrap();
    assert_eq!((&said["snapshot"], &said["data_bytes"]), (&json!("a@2"), &json!(4096)));
    assert_eq!(said["stream_bytes"], pair.stream("t").len());
    let said: Value = serde_json::from_str(&pair.received("t", &["a", "--json"])).unwrap();
    assert_eq!((&said["snapshot"], &said["data_bytes"]), (&json!("a@2"), &json!(4096)));
    assert_eq!(said["stream_bytes"], pair.stream("t").len());
    pair.same("a@2", "a");
}

#[test]
fn a_stream_of_nonsense_is_refused_whole() {
    let pair = Pair::new();
    pair.from.ok(&["create", "a", "--size", "8M"]);
    noise_file(&pair.from.path("noise"), 3 << 20);
    let noise = pair.from.text("noise");
    let url = pair.from.url("a");
    pair.from.tool("nbdcopy", &["--flush", &noise, &url]);
    pair.from.ok(&["snapshot", "a", "--label", "s"]);
    pair.send("s", &["a@s"]);
    let stream = pair.stream("s");
    for nonsense in [&b"nonsense"[..], &[0; 1 << 16], &std::fs::read(&noise).unwrap(), &[]] {
        pair.refused(7, nonsense, &["a"]);
    }
    let altered = |position: usize| {
        let mut altered = stream.clone();
        altered[position] ^= 1;
        altered
    };
    for position in [9, 100, 520, 600, stream.len() / 2, stream.len() - 1] {
        let said = pair.refused(7, &altered(position), &["a"]);
        assert!(said.contains("cannot receive a: "), "{said}");
    }
    let twice = [stream.clone(), stream.clone()].concat();
    let said = pair.refused(7, &twice, &["a"]);
    assert!(said.contains("behind its end; nothing has changed"), "{said}");
    // One frame after the other, in the wrong order: the first two have 1 MiB each, as it is.
    let frame = 40 + (1 << 20);
    let (one, two) = (512..512 + frame, 512 + frame..512 + 2 * frame);
    let swapped = [&stream[..512], &stream[two.clone()], &stream[one], &stream[two.end..]];
    pair.refused(7, &swapped.concat(), &["a"]);
    pair.received("s", &["a"]);
    pair.same("a@s", "a");
}

#[test]
fn an_increment_goes_onto_its_base_alone() {
    let pair = Pair::new();
    let Pair { from, to, .. } = &pair;
    from.ok(&["create", "a", "--size", "4M"]);
    from.write("a", 1, 0, 4096);
    for label in ["one", "two", "three"] {
        from.ok(&["snapshot", "a", "--label", label]);
        from.write("a", 2, 8192, 4096);
    }
    pair.send("one", &["a@one"]);
    pair.send("two", &["a@two", "--from", "@one"]);
    pair.send("three", &["a@three", "--from", "@two"]);
    let (two, three) = (pair.stream("two"), pair.stream("three"));
    let said = pair.refused(2, &two, &["a"]);
    assert!(said.contains("send all of it first"), "{said}");
    pair.received("one", &["a"]);
    let said = pair.refused(1, &three, &["a"]);
    assert!(said.contains("builds on a snapshot that a does not have"), "{said}");
    // What is there already does not come again; but nonsense is nonsense.
    let before = pair.state();
    assert_eq!(pair.received("one", &["a"]), "a@one is there already: nothing has changed");
    assert_eq!(pair.state(), before);
    let one = pair.stream("one");
    pair.refused(7, &one[..one.len() - 1], &["a"]);
    // Another disk with the same name and labels is another one.
    to.ok(&["create", "b", "--size", "4M"]);
    to.ok(&["snapshot", "b", "--label", "one"]);
    pair.refused(1, &two, &["b"]);
    to.write("a", 9, 4096, 4096);
    let said = pair.refused(1, &two, &["a"]);
    assert!(said.contains("a was written since a@one") && said.contains("--force"), "{said}");
    to.ok(&["attach", "a", "--vhost-user", "vm.sock"]);
    let said = pair.refused(3, &two, &["a", "--force"]);
    assert!(said.contains("detach"), "{said}");
    to.ok(&["detach", "vm.sock"]);
    pair.received("two", &["a", "--force"]);
    pair.same("a@two", "a");
    to.ok(&["snapshot", "a", "--label", "later"]);
    let said = pair.refused(1, &three, &["a"]);
    assert!(said.contains("a has a later one"), "{said}");
    to.ok(&["rm", "a@later"]);
    pair.received("three", &["a"]);
    pair.same("a@three", "a");
    assert_eq!(names(to), ["a", "b"]);
    // Nothing to send, nothing to build on.
    from.fails(1, &["send", "a@one", "--from", "@one"]);
    from.fails(2, &["send", "a@one", "--from", "@none"]);
    from.fails(1, &["send", "a@one", "--from", "a"]);
}

#[test]
fn a_stream_that_was_cut_goes_on_where_it_was() {
    let pair = Pair::new();
    let Pair { from, to, .. } = &pair;
    noise_file(&from.path("noise"), 24 << 20);
    from.ok(&["import", "noise", "a"]);
    from.ok(&["snapshot", "a", "--label", "s"]);
    from.write("a", 5, 4 << 20, 8 << 20);
    from.ok(&["snapshot", "a", "--label", "t"]);
    pair.send("s", &["a@s"]);
    pair.send("t", &["a@t", "--from", "@s", "--no-compress"]);
    for (file, snapshot, base) in [("s", "a@s", &[][..]), ("t", "a@t", &["--from", "@s"])] {
        let stream = pair.stream(file);
        let before = names(to);
        let cut = pair.receive(&stream[..stream.len() / 2], &["a"]);
        assert_eq!(cut.code, Some(7), "{cut:?}");
        assert!(cut.stderr.contains("was cut short; a.partial keeps what came"), "{cut:?}");
        assert_eq!(names(to), [&before[..], &["a.partial".to_owned()]].concat());
        let token = to.ok(&["receive", "a", "--resume-token"]);
        let resumption = to.json(&["receive", "a", "--resume-token"]);
        assert_eq!(resumption["token"], json!(token));
        assert!(resumption["done"].as_u64().unwrap() >= 3 << 20, "{resumption}");
        // What does not go on with it leaves it alone.
        if file == "t" {
            assert!(pair.received("s", &["a"]).starts_with("a@s is there already"));
            assert_eq!(to.json(&["receive", "a", "--resume-token"]), resumption);
        }
        from.fails(1, &[&["send", "a@s", "--from", "a@t", "--resume", &token][..]].concat());
        pair.send("rest", &[&[snapshot, "--resume", &token], base].concat());
        let rest = pair.stream("rest").len();
        assert!(rest < stream.len() * 2 / 3, "{rest} of {} bytes", stream.len());
        // Cut once more, at once: nothing is lost.
        let again = pair.receive(&pair.stream("rest")[..600], &["a"]);
        assert_eq!(again.code, Some(7), "{again:?}");
        assert_eq!(to.json(&["receive", "a", "--resume-token"]), resumption);
        pair.received("rest", &["a"]);
        pair.same(snapshot, "a");
        assert_eq!(names(to), ["a"]);
        to.fails(2, &["receive", "a", "--resume-token"]);
    }
    // One of whose first part nothing is there.
    let token = "0".repeat(112);
    from.fails(1, &["send", "a@s", "--resume", &token]);
    pair.refused(2, &pair.stream("rest"), &["b"]);
}

/// Starts to receive, and gives the first part of a stream; waits until it is durable.
fn begin(pair: &Pair, stream: &[u8]) -> Child {
    let mut command = pair.to.command(&["receive", "a"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stdin = child.stdin.as_mut().unwrap();
    // The last frame of these comes when the others have been there for long enough to be noted.
    let frame = 40 + (1 << 20);
    stdin.write_all(&stream[..512 + 8 * frame]).unwrap();
    let deadline = Instant::now_after(Duration::from_secs(30));
    let mut sent = 8;
    while noted(pair) < 4 << 20 {
        assert!(!deadline.passed(), "nothing is noted");
        pause();
        if sent < 20 && deadline.remaining() < Duration::from_secs(29) {
            stdin.write_all(&stream[512 + sent * frame..512 + (sent + 1) * frame]).unwrap();
            sent += 1;
        }
    }
    child
}

/// How far the receive is for certain.
fn noted(pair: &Pair) -> u64 {
    let outcome = pair.to.run(&["receive", "a", "--resume-token", "--json"]);
    let progress = serde_json::from_str::<Value>(&outcome.stdout);
    progress.map_or(0, |progress| progress["done"].as_u64().unwrap())
}

#[test]
fn a_receiver_that_is_killed_goes_on_later() {
    let pair = Pair::new();
    noise_file(&pair.from.path("noise"), 24 << 20);
    pair.from.ok(&["import", "noise", "a"]);
    pair.from.ok(&["snapshot", "a", "--label", "s"]);
    pair.send("s", &["a@s"]);
    let mut child = begin(&pair, &pair.stream("s"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(&pair.to), ["a.partial"]);
    let token = pair.to.ok(&["receive", "a", "--resume-token"]);
    pair.send("rest", &["a@s", "--resume", &token]);
    assert!(pair.stream("rest").len() < 21 << 20);
    pair.received("rest", &["a"]);
    pair.same("a@s", "a");

    // Ctrl-C is the same, with a word about it.
    pair.to.ok(&["rm", "a"]);
    let mut child = begin(&pair, &pair.stream("s"));
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    // To wait closes stdin, which would be a cut.
    let stdin = child.stdin.take();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    drop(stdin);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("interrupted; a.partial keeps what came"), "{said}");
    // A whole stream does as well as the rest of one.
    pair.received("s", &["a"]);
    pair.same("a@s", "a");
    assert_eq!(names(&pair.to), ["a"]);
}

#[test]
fn a_sender_that_is_killed_is_a_cut() {
    let pair = Pair::new();
    let Pair { from, to, .. } = &pair;
    noise_file(&from.path("noise"), 64 << 20);
    from.ok(&["import", "noise", "a"]);
    from.ok(&["snapshot", "a", "--label", "s"]);
    let mut sender = from.command(&["send", "a@s"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = sender.stdout.take().unwrap();
    let mut receiver = to.command(&["receive", "a"]);
    receiver.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut receiver = receiver.spawn().unwrap();
    let mut into = receiver.stdin.take().unwrap();
    let mut bytes = vec![0; 20 << 20];
    out.read_exact(&mut bytes).unwrap();
    into.write_all(&bytes).unwrap();
    sender.kill().unwrap();
    sender.wait().unwrap();
    std::io::copy(&mut out, &mut into).unwrap();
    drop(into);
    let outcome = receiver.wait_with_output().unwrap();
    assert_eq!(outcome.status.code(), Some(7), "{outcome:?}");
    let token = to.ok(&["receive", "a", "--resume-token"]);
    pair.send("rest", &["a@s", "--resume", &token]);
    assert!(pair.stream("rest").len() < 46 << 20);
    pair.received("rest", &["a"]);
    pair.same("a@s", "a");
}

#[test]
fn what_is_in_the_way_stays() {
    let pair = Pair::new();
    pair.from.ok(&["create", "a", "--size", "4M"]);
    pair.from.write("a", 1, 0, 4096);
    pair.from.ok(&["snapshot", "a", "--label", "s"]);
    pair.send("s", &["a@s"]);
    pair.to.ok(&["create", "a.partial", "--size", "1M"]);
    pair.to.write("a.partial", 7, 0, 4096);
    let said = pair.refused(1, &pair.stream("s"), &["a"]);
    assert!(said.contains("it is no disk that `receive` left"), "{said}");
    assert!(pair.to.holds("a.partial", 7, 0, 4096));
    pair.to.ok(&["create", "b", "--size", "1M"]);
    let said = pair.refused(1, &pair.stream("s"), &["b"]);
    assert!(said.contains("b exists already"), "{said}");
}

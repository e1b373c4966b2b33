//! An arbitrary client, from the greeting on or from the middle of a session: no panic, and the
//! server comes to rest, whatever order its tasks run in.
//!
//! The input is a script: each step is raw bytes, an option or a request with fields of the
//! fuzzer's choice, so that it gets behind the magic numbers without losing the nonsense.
#![no_main]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use base::{Buffer, ErrorKind};
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture};
use fuzz::script::Script;
use fuzz::slow::SlowDisk;
use libfuzzer_sys::fuzz_target;
use nbd::protocol::handshake::{ContextRequest, ExportRequest, encode_option, option};
use nbd::protocol::request::Header;
use nbd::protocol::{BASE_ALLOCATION, Framing};
use nbd::{Config, Server};
use runtime::socket::{Segment, pair};
use runtime::{Clock, Options, Order, Runtime, Time};

/// Time that moves from timer to timer.
#[derive(Default)]
struct SimClock(Cell<u64>);

impl Clock for SimClock {
    fn now(&self) -> Time {
        Time(self.0.get())
    }

    fn wall_ns(&self) -> u64 {
        self.0.get()
    }
}

struct TwoExports(Rc<dyn Disk>);

impl Catalog for TwoExports {
    fn list(
        &self,
        after: Option<String>,
        max: usize,
    ) -> LocalBoxFuture<Result<Vec<Export>, DiskError>> {
        let page = ["d", "d@s"]
            .into_iter()
            .filter(|name| after.as_deref().is_none_or(|after| *name > after))
            .take(max)
            .map(|name| Export { name: name.to_owned(), size_bytes: 1 << 20, read_only: false })
            .collect();
        Box::pin(std::future::ready(Ok(page)))
    }

    fn open(&self, name: &str) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        let missing = || DiskError::new(ErrorKind::NotFound, "there is no such export");
        let found = ["d", "d@s"].contains(&name).then(|| Rc::clone(&self.0));
        Box::pin(std::future::ready(found.ok_or_else(missing)))
    }
}

/// What a client sends to get to the stage that is to be fuzzed.
fn prefix(stage: u8) -> Vec<u8> {
    let mut out = Vec::new();
    if stage == 0 {
        return out;
    }
    out.extend_from_slice(&3u32.to_be_bytes());
    let framing = match stage {
        1 => return out,
        2 => None,
        3 => Some(option::STRUCTURED_REPLY),
        _ => Some(option::EXTENDED_HEADERS),
    };
    if let Some(framing) = framing {
        encode_option(framing, &[], &mut out);
        let mut data = Vec::new();
        ContextRequest { name: "d", queries: vec![BASE_ALLOCATION] }.encode(&mut data);
        encode_option(option::SET_META_CONTEXT, &data, &mut out);
    }
    let mut data = Vec::new();
    ExportRequest { name: "d", infos: vec![] }.encode(&mut data);
    encode_option(option::GO, &data, &mut out);
    out
}

/// The bytes that a script stands for.
fn perform(script: &[u8], framing: Framing) -> Vec<u8> {
    let mut script = Script(script);
    let mut out = Vec::new();
    while !script.is_over() && out.len() < 1 << 22 {
        let [step] = script.take();
        match step % 8 {
            0 => out.extend_from_slice(script.bytes()),
            1 => {
                let [number] = script.take();
                encode_option(u32::from(number), script.bytes(), &mut out);
            }
            2 => {
                let [number, infos] = script.take();
                let name = ["d", "d@s", "", "x"][usize::from(infos % 4)];
                let infos = (0..u16::from(infos / 4 % 8)).collect();
                let mut data = Vec::new();
                ExportRequest { name, infos }.encode(&mut data);
                encode_option([option::INFO, option::GO][usize::from(number % 2)], &data, &mut out);
            }
            3 => {
                let [number, queries] = script.take();
                let all = [BASE_ALLOCATION, "base:", "x:y"];
                let queries = all[..usize::from(queries % 4)].to_vec();
                let mut data = Vec::new();
                ContextRequest { name: "d", queries }.encode(&mut data);
                let both = [option::LIST_META_CONTEXT, option::SET_META_CONTEXT];
                encode_option(both[usize::from(number % 2)], &data, &mut out);
            }
            _ => request(&mut script, framing, &mut out),
        }
    }
    out
}

/// A request whose range is near the disk and whose payload is as long as it says, mostly.
fn request(script: &mut Script<'_>, framing: Framing, out: &mut Vec<u8>) {
    let [command, flags, cookie, short] = script.take();
    let place = u32::from_be_bytes(script.take());
    let size = u32::from_be_bytes(script.take());
    let lengths = [64, 5000, 1 << 18, 1 << 26];
    let header = Header {
        flags: u16::from(flags) & 0x7f,
        command: u16::from(command % 10),
        cookie: u64::from(cookie),
        offset: u64::from(place) % ((1 << 20) + 5000),
        length: u64::from(size) % lengths[usize::from(flags >> 7) + 2 * usize::from(short >> 7)],
    };
    header.encode(framing, out);
    let payload = usize::try_from(header.payload_bytes(framing)).unwrap_or(0).min(1 << 19);
    let payload = if short % 32 == 1 { payload / 2 } else { payload };
    out.resize(out.len() + payload, cookie);
}

fuzz_target!(|input: &[u8]| {
    let Some((&[seed, shape], bytes)) = input.split_first_chunk() else { return };
    let clock = Rc::new(SimClock::default());
    let runtime = Runtime::new(Options {
        order: Order::Random,
        seed: u64::from(seed),
        clock: Rc::<SimClock>::clone(&clock),
        unpark: Arc::new(|| {}),
    });
    let disk = SlowDisk::new(&runtime, 1 << 20);
    let server = Server::new(&runtime, Rc::new(TwoExports(disk)), Config::default());
    let capacity = if shape & 0x80 != 0 { 1 << 20 } else { 1000 };
    let (client, theirs) = pair(capacity);
    runtime.spawn(server.serve(theirs, "fuzz".to_owned()));

    let framing = [Framing::Simple, Framing::Structured, Framing::Extended];
    let framing = framing[usize::from(shape % 5).saturating_sub(2)];
    let mut stream = prefix(shape % 5);
    stream.extend_from_slice(&perform(bytes, framing));
    let sender = Rc::clone(&client);
    runtime.spawn(async move {
        let _ = sender.send(vec![Segment::Bytes(stream)]).await;
    });
    if shape & 0x40 == 0 {
        let receiver = Rc::clone(&client);
        runtime.spawn(async move {
            let mut buffer = Buffer::zeroed(1);
            loop {
                let (result, returned) = receiver.receive(buffer, 0..4096).await;
                if !matches!(result, Ok(1..)) {
                    return;
                }
                buffer = returned;
            }
        });
    }
    runtime.run_until_stalled();
    if shape & 0x20 != 0 {
        client.shutdown();
        runtime.run_until_stalled();
    }

    // It comes to rest, with time and a shutdown.
    let ending = server.clone();
    let ended = Rc::new(Cell::new(false));
    let done = Rc::clone(&ended);
    runtime.spawn(async move {
        ending.shutdown().await;
        done.set(true);
    });
    for _ in 0..100 {
        runtime.run_until_stalled();
        let Some(deadline) = runtime.next_deadline().filter(|_| !ended.get()) else { break };
        clock.0.set(deadline.0);
        runtime.fire_timers();
    }
    assert!(ended.get(), "the server did not come to rest");
    assert_eq!(server.metrics().connections_open, 0);
    runtime.kill();
});

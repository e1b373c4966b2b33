//! Arbitrary bytes as everything that a client sends, from the greeting on or from the middle of a
//! session: no panic, the server serves others meanwhile and comes to rest, whatever order its
//! tasks run in.
#![no_main]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use base::{Buffer, ErrorKind};
use disk::{Catalog, Disk, DiskError, Export, LocalBoxFuture, MemDisk, Request, Response};
use libfuzzer_sys::fuzz_target;
use nbd::protocol::BASE_ALLOCATION;
use nbd::protocol::handshake::{ContextRequest, ExportRequest, encode_option, option};
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

/// A disk in memory that takes its time.
struct SlowDisk {
    memory: Rc<MemDisk>,
    runtime: Rc<RefCell<Option<Runtime>>>,
}

impl Disk for SlowDisk {
    fn serial(&self) -> String {
        self.memory.serial()
    }

    fn size_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.memory.read_only()
    }

    fn severed(&self) -> bool {
        self.memory.severed()
    }

    fn submit(&self, request: Request) -> LocalBoxFuture<Result<Response, DiskError>> {
        let memory = Rc::clone(&self.memory);
        let runtime = self.runtime.borrow().clone().expect("set before the first connection");
        Box::pin(async move {
            for _ in 0..runtime.random_below(4) {
                runtime.yield_now().await;
            }
            memory.submit(request).await
        })
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

fuzz_target!(|input: &[u8]| {
    let Some((&[seed, shape], bytes)) = input.split_first_chunk() else { return };
    let clock = Rc::new(SimClock::default());
    let runtime = Runtime::new(Options {
        order: Order::Random,
        seed: u64::from(seed),
        clock: Rc::<SimClock>::clone(&clock),
        unpark: Arc::new(|| {}),
    });
    let disk = SlowDisk {
        memory: Rc::new(MemDisk::new(1 << 20)),
        runtime: Rc::new(RefCell::new(Some(runtime.clone()))),
    };
    let server = Server::new(&runtime, Rc::new(TwoExports(Rc::new(disk))), Config::default());
    let capacity = if shape & 0x80 != 0 { 1 << 20 } else { 1000 };
    let (client, theirs) = pair(capacity);
    runtime.spawn(server.serve(theirs, "fuzz".to_owned()));

    let mut stream = prefix(shape % 5);
    stream.extend_from_slice(bytes);
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

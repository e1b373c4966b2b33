//! Measures 4 KiB reads and writes through `Device` on one thread, to be compared with
//!
//! ```text
//! fio --name=x --filename=PATH --ioengine=io_uring --direct=1 --bs=4k --rw=randread
//!     --iodepth=32 --time_based --runtime=5 --registerfiles --fixedbufs
//! ```
//!
//! Usage: `iops PATH [SECONDS] [io_uring|threads]`. PATH is created with 256 MiB and filled if it
//! does not exist.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring tool")]

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use base::{BlockSlice, Pba};
use parallax_device::{BlockFile, Device, OpenOptions};
use runtime::Runtime;
use runtime::reactor::{EngineChoice, Reactor};

const FILE_BYTES: u64 = 256 << 20;
const FILL_BLOCKS: usize = 256;

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "iops.scratch".to_owned());
    let seconds = arguments.next().map_or(3.0, |text| text.parse().unwrap());
    let engine = match arguments.next().as_deref() {
        Some("threads") => EngineChoice::ThreadPool,
        Some("io_uring") => EngineChoice::IoUring,
        _ => EngineChoice::Auto,
    };
    let reactor = Reactor::start(engine).unwrap();
    let runtime = reactor.runtime().clone();
    let path = Path::new(&path);
    let is_new = !path.exists();
    let backend = if is_new {
        BlockFile::create(reactor.io(), path, FILE_BYTES, false)
    } else {
        BlockFile::open(reactor.io(), path, OpenOptions::default())
    };
    let device = Device::new(Rc::new(backend.unwrap()));
    println!("{}", device.describe());
    let run = async move {
        if is_new {
            fill(&runtime, &device).await;
        }
        for (name, kind) in [("randread", Kind::Read), ("randwrite", Kind::Write)] {
            for depth in [1, 32] {
                let (iops, cpu) = measure(&runtime, &device, kind, depth, seconds).await;
                println!("{name} 4k depth {depth}: {iops:.0} IOPS, {cpu:.2} us of CPU each");
            }
        }
    };
    reactor.run(run).unwrap();
}

async fn fill(runtime: &Runtime, device: &Device) {
    let mut buffer = runtime.buffers().take(FILL_BLOCKS);
    buffer.bytes_mut().fill(0xa5);
    let slice = BlockSlice::whole(Rc::new(buffer));
    let step = FILL_BLOCKS as u64;
    for at in 0..device.block_count() / step {
        device.write(Pba::new(at * step), vec![slice.clone()]).await.unwrap();
    }
    device.flush().await.unwrap();
}

/// Operations per second, and microseconds of this thread's CPU time for each.
async fn measure(
    runtime: &Runtime,
    device: &Device,
    kind: Kind,
    depth: usize,
    seconds: f64,
) -> (f64, f64) {
    let (started, cpu_started) = (runtime.now(), cpu_seconds());
    let deadline = started.after(Duration::from_secs_f64(seconds));
    let count = Rc::new(Cell::new(0u32));
    let mut workers = Vec::new();
    for _ in 0..depth {
        let (runtime, device, count) = (runtime.clone(), device.clone(), Rc::clone(&count));
        workers.push(runtime.clone().spawn(async move {
            let blocks = usize::try_from(device.block_count()).unwrap();
            while runtime.now() < deadline {
                let at = Pba::new(runtime.random_below(blocks) as u64);
                let buffer = runtime.buffers().take(1);
                match kind {
                    Kind::Read => drop(device.read(at, 1, buffer).await.unwrap()),
                    Kind::Write => {
                        let slice = BlockSlice::whole(Rc::new(buffer));
                        device.write(at, vec![slice]).await.unwrap();
                    }
                }
                count.set(count.get() + 1);
            }
        }));
    }
    for worker in workers {
        worker.await;
    }
    let count = f64::from(count.get());
    let cpu = cpu_seconds() - cpu_started;
    (count / runtime.now().since(started).as_secs_f64(), cpu * 1e6 / count)
}

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap().as_secs_f64()
}

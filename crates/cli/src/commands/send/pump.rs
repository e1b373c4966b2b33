//! Reads what is to be sent, packs it, and writes it in order.
//!
//! Each of a few threads has a connection of its own: it reads a run, packs it, and waits until it is
//! taken. They get runs in turn and are asked in turn, so the stream is in order; what is held in
//! memory is bounded by what each may have ready.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use api::{DiffExtent, Error, Kind};
use indicatif::ProgressBar;
use stream::{FRAME_DATA_BYTES_MAX, Header, Packed, Packer, Writer};
use tokio::sync::mpsc;

use super::Totals;
use crate::nbd::NbdDisk;

/// Threads that read and pack. The disk answers them all at once; more gained nothing when tried.
const WORKERS: usize = 4;

/// Runs that each of them may have ready, or before it.
const RUNS_AHEAD: usize = 2;

/// Everything that it takes to send.
pub(super) struct Pump {
    /// Where the daemon serves NBD.
    pub(super) socket: PathBuf,
    /// The snapshot, as NBD knows it.
    pub(super) export: String,
    pub(super) header: Header,
    /// How hard to compress, if at all.
    pub(super) level: Option<i32>,
    pub(super) bar: ProgressBar,
}

/// Runs of bytes that differ.
pub(super) struct Page {
    pub(super) extents: Vec<DiffExtent>,
    pub(super) is_last: bool,
}

/// A run of data that is to be read.
#[derive(Clone, Copy)]
struct Run {
    offset: u64,
    length: usize,
}

/// A thread that reads and packs.
struct Worker {
    runs: SyncSender<Run>,
    packed: Receiver<Result<Packed, Error>>,
}

/// What comes next in the stream.
enum Next {
    /// What the worker with this number has next.
    Data(usize),
    Zeroes {
        offset: u64,
        length: u64,
    },
}

impl Pump {
    /// Sends runs until there are no more. Blocks.
    ///
    /// # Errors
    /// Also if no page says that it is the last: a stream that ends well has everything.
    pub(super) fn run(self, pages: mpsc::Receiver<Page>) -> Result<Totals, Error> {
        let stdout = std::io::stdout().as_fd().try_clone_to_owned();
        let stdout = stdout.map_err(|e| Error::system("write to stdout", &e))?;
        thread::scope(|scope| {
            let mut workers = Vec::with_capacity(WORKERS);
            for _ in 0..WORKERS {
                let (runs, to_read) = sync_channel(RUNS_AHEAD);
                let (ready, packed) = sync_channel(RUNS_AHEAD);
                let pump = &self;
                let work = move || pump.work(to_read, &ready);
                thread::Builder::new()
                    .name("parallax-read".to_owned())
                    .spawn_scoped(scope, work)
                    .map_err(|e| Error::system("start a thread", &e))?;
                workers.push(Worker { runs, packed });
            }
            let mut out = Out::begin(File::from(stdout), &self.header)?;
            // They end when they are given nothing more.
            self.send(&workers, pages, &mut out)?;
            out.end()
        })
    }

    /// Reads and packs what it is given, until nobody gives or takes any more.
    fn work(&self, runs: Receiver<Run>, ready: &SyncSender<Result<Packed, Error>>) {
        let opened = open(&self.socket, &self.export, self.level);
        let (mut disk, mut packer) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // Whoever waits for it asks for the first run's data.
                let _ = ready.send(Err(error));
                return;
            }
        };
        for Run { offset, length } in runs {
            let mut data = vec![0; length];
            let read = disk.read(offset, &mut data).map(|()| packer.pack(offset, data));
            let failed = read.is_err();
            if ready.send(read).is_err() || failed {
                return;
            }
        }
    }

    fn send(
        &self,
        workers: &[Worker],
        mut pages: mpsc::Receiver<Page>,
        out: &mut Out,
    ) -> Result<(), Error> {
        let mut queue = VecDeque::new();
        let mut turns = (0..workers.len()).cycle();
        let mut is_last = false;
        while !is_last {
            let broken_off = || Error::new(Kind::Io, "the list of what differs broke off");
            let page = pages.blocking_recv().ok_or_else(broken_off)?;
            is_last = page.is_last;
            let size_bytes = self.header.size_bytes;
            for piece in page.extents.iter().flat_map(|extent| pieces(extent, size_bytes)) {
                while queue.len() >= RUNS_AHEAD * workers.len() {
                    self.write_next(workers, &mut queue, out)?;
                }
                queue.push_back(match piece {
                    Piece::Zeroes { offset, length } => Next::Zeroes { offset, length },
                    Piece::Data(run) => {
                        let turn = turns.next().unwrap_or_default();
                        if let Some(worker) = workers.get(turn) {
                            // One that has failed is asked why in its turn.
                            let _ = worker.runs.send(run);
                        }
                        Next::Data(turn)
                    }
                });
            }
        }
        while !queue.is_empty() {
            self.write_next(workers, &mut queue, out)?;
        }
        Ok(())
    }

    fn write_next(
        &self,
        workers: &[Worker],
        queue: &mut VecDeque<Next>,
        out: &mut Out,
    ) -> Result<(), Error> {
        let at = match queue.pop_front() {
            None => return Ok(()),
            Some(Next::Zeroes { offset, length }) => {
                out.zeroes(offset, length)?;
                offset + length
            }
            Some(Next::Data(turn)) => {
                let packed = workers.get(turn).and_then(|worker| worker.packed.recv().ok());
                let gone = || Err(Error::new(Kind::Io, "a thread that reads has died"));
                let packed = packed.unwrap_or_else(gone)?;
                out.data(&packed)?;
                packed.offset + packed.length as u64
            }
        };
        self.bar.set_position(at);
        Ok(())
    }
}

fn open(socket: &Path, export: &str, level: Option<i32>) -> Result<(NbdDisk, Packer), Error> {
    let disk = NbdDisk::open(socket, export)?;
    let packer = Packer::new(level).map_err(|e| Error::system("start compression", &e))?;
    Ok((disk, packer))
}

/// A run that fits into a frame.
enum Piece {
    Data(Run),
    Zeroes { offset: u64, length: u64 },
}

/// What of a run is on the disk, in pieces that fit into frames. A larger disk is compared with a
/// smaller one to the larger one's end.
fn pieces(extent: &DiffExtent, size_bytes: u64) -> impl Iterator<Item = Piece> + use<> {
    let DiffExtent { offset, length, data } = *extent;
    let end = offset.saturating_add(length).min(size_bytes);
    let mut at = offset;
    std::iter::from_fn(move || {
        let left = end.checked_sub(at).filter(|&left| left > 0)?;
        let offset = at;
        if !data {
            at = end;
            return Some(Piece::Zeroes { offset, length: left });
        }
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(FRAME_DATA_BYTES_MAX);
        at += length as u64;
        Some(Piece::Data(Run { offset, length }))
    })
}

/// The stream on its way out.
struct Out {
    file: File,
    writer: Writer,
    totals: Totals,
}

impl Out {
    fn begin(file: File, header: &Header) -> Result<Self, Error> {
        let (writer, bytes) = Writer::begin(header);
        let mut out = Self { file, writer, totals: Totals::default() };
        out.write(&bytes)?;
        Ok(out)
    }

    fn data(&mut self, packed: &Packed) -> Result<(), Error> {
        let header = self.writer.data(packed);
        self.write(&header)?;
        self.totals.data_bytes += packed.length as u64;
        self.write(&packed.payload)
    }

    fn zeroes(&mut self, offset: u64, length: u64) -> Result<(), Error> {
        let header = self.writer.zeroes(offset, length);
        self.totals.zero_bytes += length;
        self.write(&header)
    }

    fn end(mut self) -> Result<Totals, Error> {
        let end = self.writer.clone().end();
        self.write(&end)?;
        Ok(self.totals)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.totals.stream_bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| Error::system("write the stream", &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_frames_and_the_disk_end() {
        let check = |offset, length, data, size_bytes, expected: &[(u64, u64)]| {
            let cut: Vec<_> = pieces(&DiffExtent { offset, length, data }, size_bytes)
                .map(|piece| match piece {
                    Piece::Data(run) => (run.offset, run.length as u64),
                    Piece::Zeroes { offset, length } => (offset, length),
                })
                .collect();
            assert_eq!(cut, expected);
        };
        let max = FRAME_DATA_BYTES_MAX as u64;
        check(4096, 8192, true, 1 << 30, &[(4096, 8192)]);
        check(4096, max + 4096, true, 1 << 30, &[(4096, max), (4096 + max, 4096)]);
        check(4096, 3 * max, false, 1 << 30, &[(4096, 3 * max)]);
        check(4096, 3 * max, true, 8192, &[(4096, 4096)]);
        check(8192, 4096, false, 8192, &[]);
    }
}

//! Reads a stream, unpacks it and writes it to the partial disk.
//!
//! One thread reads and verifies. A few others, each with a connection of its own, unpack and write:
//! frames lie in different places, so their order is of no concern. Now and then all of them are waited
//! for, what they wrote is flushed, and how far that is gets noted.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use api::{Error, Kind};
use indicatif::ProgressBar;
use stream::{FRAME_HEADER_BYTES, Frame, Progress, Reader, STREAM_HEADER_BYTES, Unpacker};
use tokio::time::Instant;

use super::stream_error;
use crate::commands::send::Totals;
use crate::nbd::NbdDisk;

/// Threads that unpack and write.
const WORKERS: usize = 4;

/// Frames that each of them may have before it.
const FRAMES_AHEAD: usize = 2;

/// How often what was written is made durable, and how far that is noted.
const NOTED_EVERY: Duration = Duration::from_secs(1);

/// Bytes that are read at once, beside those of large frames.
const INPUT_BYTES: usize = 64 << 10;

/// Where a stream comes from.
pub(super) type Input = BufReader<File>;

/// Stdin, without the lock and the small buffer of Rust's own.
pub(super) fn input() -> Result<Input, Error> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|e| Error::system("read the stream", &e))?;
    Ok(BufReader::with_capacity(INPUT_BYTES, File::from(stdin)))
}

/// Reads a stream to its end, and only looks whether it is whole.
pub(super) fn skip(mut reader: Reader<Input>) -> Result<(), Error> {
    while reader.next_frame().map_err(stream_error)?.is_some() {}
    Ok(())
}

/// Everything that it takes to receive.
pub(super) struct Pump {
    /// Where the daemon serves NBD.
    pub(super) socket: PathBuf,
    /// The partial disk.
    pub(super) export: String,
    /// How far it is.
    pub(super) progress: Progress,
    pub(super) bar: ProgressBar,
}

/// How a stream ended.
pub(super) struct Ended {
    /// `None`: it came to its end, and all of it is durable.
    pub(super) error: Option<Error>,
    /// Whether it only broke off: what came is what was sent.
    pub(super) cut: bool,
    /// How far the partial disk is known to be.
    pub(super) done: u64,
    pub(super) totals: Totals,
}

enum Work {
    Frame(Frame),
    /// Tell it when everything before is written.
    Report(Sender<()>),
}

/// The threads that write.
struct Workers<'scope> {
    work: Vec<SyncSender<Work>>,
    threads: Vec<thread::ScopedJoinHandle<'scope, Result<(), Error>>>,
    turn: usize,
}

impl Pump {
    /// Receives until the stream ends, one way or another. Blocks.
    pub(super) fn run(mut self, mut reader: Reader<Input>) -> Ended {
        let mut totals = Totals { stream_bytes: STREAM_HEADER_BYTES as u64, ..Totals::default() };
        let mut cut = false;
        let outcome = self.receive(&mut reader, &mut cut, &mut totals);
        Ended { error: outcome.err(), cut, done: self.progress.done, totals }
    }

    fn receive(
        &mut self,
        reader: &mut Reader<Input>,
        cut: &mut bool,
        totals: &mut Totals,
    ) -> Result<(), Error> {
        let mut disk = NbdDisk::open(&self.socket, &self.export)?;
        let (socket, export) = (self.socket.clone(), self.export.clone());
        thread::scope(|scope| {
            let open = || Ok((NbdDisk::open(&socket, &export)?, unpacker()?));
            let mut workers = Workers::start(scope, open)?;
            let mut noted_at = Instant::now();
            let mut done = self.progress.done;
            let outcome = loop {
                let frame = match reader.next_frame() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break Ok(()),
                    Err(error) => {
                        *cut = matches!(error, stream::Error::Cut | stream::Error::Io(_));
                        break Err(stream_error(error));
                    }
                };
                count(&frame, totals);
                let end = frame.end();
                self.bar.set_position(end);
                // The sender may go on from a place before the one that it could.
                if end <= done {
                    continue;
                }
                if !workers.give(frame) {
                    break Ok(());
                }
                done = end;
                if noted_at.elapsed() >= NOTED_EVERY {
                    self.note(&mut disk, &workers, done)?;
                    noted_at = Instant::now();
                }
            };
            totals.stream_bytes += FRAME_HEADER_BYTES as u64;
            match &outcome {
                Ok(()) => self.note(&mut disk, &workers, self.progress.size_bytes)?,
                Err(_) if *cut => self.note(&mut disk, &workers, done)?,
                Err(_) => {}
            }
            workers.end().and(outcome)
        })
    }

    /// Waits until all that was given is written, makes it durable, and notes how far it is. What a
    /// worker could not write, it says itself when it ends.
    fn note(&mut self, disk: &mut NbdDisk, workers: &Workers<'_>, done: u64) -> Result<(), Error> {
        if workers.settle() {
            self.progress.done = done;
            note(disk, &self.progress)?;
        }
        Ok(())
    }
}

/// Makes durable what was written, then notes how far that is.
pub(super) fn note(disk: &mut NbdDisk, progress: &Progress) -> Result<(), Error> {
    disk.flush()?;
    disk.write(progress.size_bytes, &progress.to_block())?;
    disk.flush()
}

impl<'scope> Workers<'scope> {
    fn start<'env>(
        scope: &'scope thread::Scope<'scope, 'env>,
        open: impl Fn() -> Result<(NbdDisk, Unpacker), Error>,
    ) -> Result<Self, Error> {
        let mut workers = Self { work: Vec::new(), threads: Vec::new(), turn: 0 };
        for _ in 0..WORKERS {
            let (disk, unpacker) = open()?;
            let (give, work) = sync_channel(FRAMES_AHEAD);
            let thread = thread::Builder::new()
                .name("parallax-write".to_owned())
                .spawn_scoped(scope, move || write_all(work, disk, unpacker))
                .map_err(|e| Error::system("start a thread", &e))?;
            workers.work.push(give);
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Gives a frame to the next worker; false if that one has failed.
    fn give(&mut self, frame: Frame) -> bool {
        self.turn = (self.turn + 1) % WORKERS;
        self.work.get(self.turn).is_some_and(|work| work.send(Work::Frame(frame)).is_ok())
    }

    /// Waits until everything that was given is written; false if a worker has failed.
    fn settle(&self) -> bool {
        let (report, reports) = channel();
        let asked = self.work.iter().map(|work| work.send(Work::Report(report.clone())));
        let asked = asked.filter(Result::is_ok).count();
        drop(report);
        asked == WORKERS && reports.iter().count() == WORKERS
    }

    /// Waits for all of them; the first error of any.
    fn end(self) -> Result<(), Error> {
        drop(self.work);
        let died = |_| Err(Error::new(Kind::Io, "a thread that writes has died"));
        let ended = self.threads.into_iter().map(|thread| thread.join().unwrap_or_else(died));
        ended.collect::<Vec<_>>().into_iter().collect()
    }
}

fn write_all(work: Receiver<Work>, mut disk: NbdDisk, mut unpacker: Unpacker) -> Result<(), Error> {
    for work in work {
        match work {
            Work::Frame(Frame::Data(packed)) => {
                let offset = packed.offset;
                let data = unpacker.unpack(packed).map_err(stream_error)?;
                disk.write(offset, &data)?;
            }
            Work::Frame(Frame::Zeroes { offset, length }) => disk.discard(offset, length)?,
            Work::Report(report) => {
                // Who asked waits for it.
                let _ = report.send(());
            }
        }
    }
    Ok(())
}

fn unpacker() -> Result<Unpacker, Error> {
    Unpacker::new().map_err(|e| Error::system("start decompression", &e))
}

fn count(frame: &Frame, totals: &mut Totals) {
    totals.stream_bytes += FRAME_HEADER_BYTES as u64;
    match frame {
        Frame::Data(packed) => {
            totals.data_bytes += packed.length as u64;
            totals.stream_bytes += packed.payload.len() as u64;
        }
        Frame::Zeroes { length, .. } => totals.zero_bytes += length,
    }
}

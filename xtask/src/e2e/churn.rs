//! A store that is nearly full, churned with snapshots, clones and a history, and emptied.
//!
//! A disk fills all but a twentieth of the store; more than half of that twentieth is kept back for metadata.
//! Then fio writes at random places of a part of the disk and reads back what it wrote, while snapshots and
//! clones of the disk come and go, with a history of the last minute beside. All of this minute would not
//! fit: the store is full again and again, collects garbage and lets moments go. No request may fail; a
//! snapshot stays what it was when it was taken, and so does a clone, but for what was written to it. At the
//! end everything is deleted: the store and its file must have as much to give as they had when they were
//! new, and `check` must find nothing.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::fio::{self, Target};
use crate::nbd::{Client, Command};
use crate::process::{Run, Running};
use crate::random::Random;
use crate::server::{EXPORT, Options, Server};

use super::{Bed, Step};

/// How large a story is.
#[derive(Clone, Copy, Debug)]
struct Scale {
    store_bytes: u64,
    /// The part of the disk that is churned.
    churned_bytes: u64,
    length: Duration,
    /// Length of a job of fio's, without reading back.
    job_seconds: u64,
    /// Pause between two snapshots.
    snapshot_every: Duration,
    /// Each of so many snapshots is cloned.
    clone_each: u64,
}

/// Minutes that the disk is churned for, unless the caller says how many.
const MINUTES: u64 = 60;
const QUICK: Duration = Duration::from_secs(12);
/// Writes of 4 KiB in a second.
const WRITES_PER_SECOND: u64 = 200;
const WRITE_BYTES: u64 = 4096;
/// What its history keeps.
const HISTORY: &str = "every 1s for 1m";
/// Snapshots and clones that are there at a time.
const SNAPSHOTS: usize = 8;
const CLONES: usize = 1;
/// The smallest extents: what is left of the last one before the part for metadata cannot be used.
const EXTENT_BYTES: u64 = 16 << 20;
/// What one request of the fill writes, and one of a look reads.
const PIECE: u32 = 1 << 20;
/// Reads of a look in flight.
const DEPTH: usize = 8;
/// Longest that a request to the daemon may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Space that a store that was emptied may lack: tables that were once larger.
const LOST_BYTES_MAX: u64 = 1 << 20;

/// A clone, and what must be found in it and in the snapshot that it was made of.
struct Clone {
    name: String,
    snapshot: String,
    /// Of the snapshot.
    digest: u64,
    /// Of the clone, after it was written to.
    own_digest: u64,
}

/// Space of the store and of its file.
#[derive(Clone, Copy, Debug)]
struct Space {
    capacity_bytes: u64,
    free_bytes: u64,
    file_bytes: u64,
}

struct Story {
    server: Server,
    scratch: std::path::PathBuf,
    scale: Scale,
    random: Random,
    snapshots: VecDeque<String>,
    clones: VecDeque<Clone>,
    taken: u64,
    cloned: u64,
    jobs: u64,
    /// Of the new store, of the filled one, and the least that was free while it was churned.
    new: Space,
    least_free_bytes: u64,
}

const STEPS: [Step<Story>; 3] = [
    ("it is filled to 95 %", Story::fill),
    ("it is churned without an error", Story::churn),
    ("emptied, it has the space of a new one", Story::empty),
];

/// Runs the scenario. A peer has no snapshots.
///
/// # Errors
/// If the server does not start or stop.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(binary) = bed.parallax().map(Path::to_owned) else {
        console::say("  the peer has no snapshots to churn with");
        return Ok(());
    };
    let scale = Scale::of(bed);
    let options = Options {
        store_bytes: scale.store_bytes,
        extent_bytes: Some(EXTENT_BYTES),
        ..Options::disk(scale.store_bytes)
    };
    let server = bed.server_with(&options)?;
    let new = Space::of(&server)?;
    let mut story = Story {
        server,
        scratch: bed.scratch.clone(),
        scale,
        random: Random::new(bed.random.next()),
        snapshots: VecDeque::new(),
        clones: VecDeque::new(),
        taken: 0,
        cloned: 0,
        jobs: 0,
        new,
        least_free_bytes: u64::MAX,
    };
    bed.tell(&mut story, &STEPS, |story| &mut story.server);
    story.server.stop()?;
    bed.check("parallax check", || {
        Run::new(binary).arg("check").arg(story.server.file()).read().map(drop)
    });
    Ok(())
}

impl Scale {
    fn of(bed: &Bed) -> Self {
        match bed.rounds {
            None if bed.quick => Self {
                store_bytes: 2 << 30,
                churned_bytes: 128 << 20,
                length: QUICK,
                job_seconds: 5,
                snapshot_every: Duration::from_millis(250),
                clone_each: 4,
            },
            minutes => Self {
                store_bytes: 3 << 30,
                churned_bytes: 256 << 20,
                length: Duration::from_secs(60 * minutes.unwrap_or(MINUTES)),
                job_seconds: 30,
                snapshot_every: Duration::from_secs(2),
                clone_each: 6,
            },
        }
    }
}

impl Space {
    fn of(server: &Server) -> Result<Self> {
        let mut control = Control::connect_patiently(&server.control_socket(), PATIENCE)?;
        Ok(Self {
            capacity_bytes: control.stat("capacity_bytes")?,
            free_bytes: control.stat("free_bytes")?,
            file_bytes: std::fs::metadata(server.file())?.blocks() * 512,
        })
    }

    fn say(&self, when: &str) {
        console::say(&format!(
            "  {when}: {:.1} of {:.1} MiB free, the file takes {:.1} MiB",
            mebibytes(self.free_bytes),
            mebibytes(self.capacity_bytes),
            mebibytes(self.file_bytes)
        ));
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Story {
    fn client(&self, export: &str) -> Result<Client> {
        Client::connect(&self.server.nbd_socket(), export)
    }

    fn control(&self) -> Result<Control> {
        Control::connect_patiently(&self.server.control_socket(), PATIENCE)
    }

    /// Writes from the beginning of the disk until a twentieth of the store is free.
    fn fill(&mut self) -> Result<()> {
        self.new.say("new");
        let mut control = self.control()?;
        let mut client = self.client(EXPORT)?;
        let left = self.new.capacity_bytes / 20;
        let mut filled = 0;
        while control.stat("free_bytes")? > left {
            let data = self.noise(PIECE.into());
            let error = client.write(filled, &data)?;
            ensure!(error == 0, "NBD error {error} at {filled}");
            filled += u64::from(PIECE);
        }
        ensure!(filled > self.scale.churned_bytes, "only {filled} bytes fitted");
        client.ask(Command::Flush, 0, 0)?;
        Space::of(&self.server)?.say("filled");
        control.set_history(EXPORT, HISTORY)
    }

    /// Bytes that are nowhere twice.
    fn noise(&mut self, length: u64) -> Vec<u8> {
        (0..length / 8).flat_map(|_| self.random.next().to_le_bytes()).collect()
    }

    fn churn(&mut self) -> Result<()> {
        let end = clock::now() + self.scale.length;
        let mut load: Option<Running> = None;
        while clock::now() < end || load.is_some() {
            match load.as_mut().map(Running::ended) {
                Some(None) => {}
                Some(Some(status)) => {
                    load = None;
                    let said = std::fs::read_to_string(self.load_log())?;
                    ensure!(status.success(), "fio failed: {status}\n{said}");
                }
                None => load = Some(self.load()?),
            }
            self.snapshot()?;
            self.least_free_bytes = self.least_free_bytes.min(Space::of(&self.server)?.free_bytes);
            clock::sleep(self.scale.snapshot_every);
        }
        Space::of(&self.server)?.say("churned");
        console::say(&format!(
            "  {} writes of 4 KiB, {} snapshots, {} clones; at least {:.1} MiB were free",
            self.jobs * self.scale.job_seconds * WRITES_PER_SECOND,
            self.taken,
            self.cloned,
            mebibytes(self.least_free_bytes)
        ));
        Ok(())
    }

    fn load_log(&self) -> std::path::PathBuf {
        self.scratch.join("fio.log")
    }

    /// Starts fio: it writes at places of which it meets none twice, and reads them back at the end.
    fn load(&mut self) -> Result<Running> {
        let log = self.load_log();
        if log.exists() {
            std::fs::remove_file(&log)?;
        }
        self.jobs += 1;
        let written = self.scale.job_seconds * WRITES_PER_SECOND * WRITE_BYTES;
        let options = format!(
            "--rw=randwrite --bs={WRITE_BYTES} --iodepth=8 --fsync=50 --rate_iops={WRITES_PER_SECOND} \
             --io_size={written} --verify=crc32c --verify_fatal=1 --verify_dump=0 --randseed={}",
            self.random.below(1 << 32)
        );
        let target = Target::Nbd(self.server.uri());
        fio::job(&target, self.scale.churned_bytes, &options, &self.scratch).background(&log)
    }

    /// Takes a snapshot, and a clone of some; deletes the oldest.
    fn snapshot(&mut self) -> Result<()> {
        let mut control = self.control()?;
        let handle = control.snapshot(EXPORT)?;
        self.taken += 1;
        if self.taken.is_multiple_of(self.scale.clone_each) {
            self.clone_of(&handle)?;
        }
        self.snapshots.push_back(handle);
        while self.snapshots.len() > SNAPSHOTS
            && let Some(oldest) = self.snapshots.pop_front()
        {
            self.look_before(&oldest)?;
            control.remove_snapshot(&oldest)?;
        }
        while self.clones.len() > CLONES
            && let Some(oldest) = self.clones.pop_front()
        {
            let digest = self.digest(&oldest.name)?;
            ensure!(digest == oldest.own_digest, "the clone {} has changed", oldest.name);
            control.remove(&oldest.name)?;
        }
        Ok(())
    }

    /// Clones a snapshot and writes something to the clone.
    fn clone_of(&mut self, snapshot: &str) -> Result<()> {
        self.cloned += 1;
        let name = format!("clone{}", self.cloned);
        self.control()?.clone_vdi(snapshot, &name)?;
        let digest = self.digest(&name)?;
        let mut client = self.client(&name)?;
        for _ in 0..16 {
            let data = self.noise(WRITE_BYTES);
            let offset = self.random.below(self.scale.churned_bytes / WRITE_BYTES) * WRITE_BYTES;
            let error = client.write(offset, &data)?;
            ensure!(error == 0, "{name}: NBD error {error} at {offset}");
        }
        let own_digest = self.digest(&name)?;
        ensure!(own_digest != digest, "{name} does not have what was written to it");
        self.clones.push_back(Clone { name, snapshot: snapshot.to_owned(), digest, own_digest });
        Ok(())
    }

    /// A snapshot that was looked at when it was taken is what it was then.
    fn look_before(&self, snapshot: &str) -> Result<()> {
        match self.clones.iter().find(|clone| clone.snapshot == snapshot) {
            Some(clone) => {
                ensure!(self.digest(snapshot)? == clone.digest, "{snapshot} has changed");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A hash of the part that is churned.
    fn digest(&self, export: &str) -> Result<u64> {
        let mut client = self.client(export)?;
        let mut hasher = DefaultHasher::new();
        let mut offsets = (0..self.scale.churned_bytes).step_by(PIECE as usize);
        // Replies come in any order, the hash needs one: they are put back into it.
        let mut waiting = VecDeque::new();
        let mut arrived = std::collections::HashMap::new();
        loop {
            while waiting.len() < DEPTH
                && let Some(offset) = offsets.next()
            {
                waiting.push_back(client.send(Command::Read, offset, PIECE, &[])?);
            }
            let Some(next) = waiting.pop_front() else { return Ok(hasher.finish()) };
            while !arrived.contains_key(&next) {
                let reply = client.receive()?;
                ensure!(reply.error == 0, "read {export}: NBD error {}", reply.error);
                arrived.insert(reply.cookie, reply.data);
            }
            hasher.write(&arrived.remove(&next).context("a reply that had arrived")?);
        }
    }

    /// Deletes everything, and compares the space with what it was.
    fn empty(&mut self) -> Result<()> {
        let mut control = self.control()?;
        while let Some(clone) = self.clones.pop_front() {
            control.remove(&clone.name)?;
        }
        control.remove(EXPORT)?;
        control.collect_garbage()?;
        let now = Space::of(&self.server)?;
        now.say("emptied");
        let lost = self.new.free_bytes.saturating_sub(now.free_bytes);
        ensure!(lost <= LOST_BYTES_MAX, "{lost} bytes of the store did not come back");
        let lost = now.file_bytes.saturating_sub(self.new.file_bytes);
        ensure!(lost <= LOST_BYTES_MAX, "{lost} bytes of its file did not come back");
        Ok(())
    }
}

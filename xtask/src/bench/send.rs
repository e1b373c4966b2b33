//! Copies of snapshots that go elsewhere: all of a disk, and what differs between two snapshots of it.
//!
//! Streams go to files, and come from them, through the page cache; what is sent is read from the device:
//! servers are started anew before, and the kernel forgets what it knows of file systems.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock;
use crate::console;
use crate::control::Control;
use crate::fio::{self, Target};
use crate::process::Run;
use crate::server::{EXPORT, Kind, Options, Server};

use super::Bench;
use super::access::Access;
use super::btrfs::Mounted;
use super::report::{Column, Line, Unit};
use super::turns;

/// A hundredth of the disk differs.
const DIFFERS: u64 = 100;
/// Longest that one copy may take.
const COPY_LIMIT: Duration = Duration::from_secs(1800);
const OURS: &str = "ours";
const QEMU: &str = "qemu-img convert of qcow2";
const BTRFS: &str = "btrfs send";
const BTRFS_RECEIVE: &str = "btrfs receive";

/// What one subject showed in a round.
struct Shown {
    /// Bytes a second.
    all: f64,
    /// Likewise, of the bytes that differ.
    differs: f64,
    /// Bytes read of the device for each of these.
    read: f64,
    /// Bytes a second.
    receive: f64,
}

/// Sends and receives a disk, turn by turn.
///
/// # Errors
/// If a program fails.
pub(crate) fn measure(bench: &Bench) -> Result<Vec<Line>> {
    // The largest turn: a file system for three disks, the file that it lies in, and a stream.
    if !bench.has_room(5 * bench.scale.disk_bytes)? {
        return Ok(Vec::new());
    }
    let mut all = [OURS, QEMU, BTRFS].map(Column::new);
    let mut differs = [OURS, BTRFS].map(Column::new);
    let mut read = [OURS, BTRFS].map(Column::new);
    let mut receive = [OURS, BTRFS_RECEIVE].map(Column::new);
    for round in 1..=bench.scale.rounds {
        let ours = bench.binary.as_deref().map(|binary| ours(bench, binary)).transpose()?;
        let qemu = qemu(bench)?;
        bench.remove_data()?;
        let btrfs = btrfs(bench)?;
        let [ours_all, qemu_all, btrfs_all] = &mut all;
        qemu_all.values.push(qemu);
        let [ours_differs, btrfs_differs] = &mut differs;
        let [ours_read, btrfs_read] = &mut read;
        let [ours_receive, btrfs_receive] = &mut receive;
        let into = [
            (ours, [ours_all, ours_differs, ours_read, ours_receive]),
            (btrfs, [btrfs_all, btrfs_differs, btrfs_read, btrfs_receive]),
        ];
        for (shown, columns) in into {
            let Some(shown) = shown else { continue };
            let values = [shown.all, shown.differs, shown.read, shown.receive];
            for (column, value) in columns.into_iter().zip(values) {
                column.values.push(value);
            }
        }
        let last = |columns: &[Column], unit: Unit| {
            let said = columns.iter().map(|column| {
                let value = column.values.last().map_or("-".to_owned(), |&value| unit.show(value));
                format!("{} {value}", column.label)
            });
            said.collect::<Vec<_>>().join(", ")
        };
        console::say(&format!(
            "round {round}: all {}; what differs {}; read for it {}; receive {}",
            last(&all, Unit::BytesPerSecond),
            last(&differs, Unit::BytesPerSecond),
            last(&read, Unit::Ratio),
            last(&receive, Unit::BytesPerSecond)
        ));
    }
    let line = |measure: &str, unit: Unit, columns: Vec<Column>, note: &str| Line {
        measure: measure.to_owned(),
        unit,
        columns,
        goals: Vec::new(),
        note: note.to_owned(),
    };
    let speed = Unit::BytesPerSecond;
    Ok(vec![
        line("send a disk", speed, all.into(), ""),
        line(
            "send what differs between two snapshots, 1 %",
            speed,
            differs.into(),
            "bytes that differ, in blocks of 4 KiB anywhere",
        ),
        line(
            "the same: bytes read of the device for each byte that differs",
            Unit::Ratio,
            read.into(),
            "",
        ),
        line("receive a disk", speed, receive.into(), ""),
    ])
}

/// Writes all of a disk with bytes that do not become smaller.
fn fill(bench: &Bench, target: &Target) -> Result<()> {
    let fill = format!("{} --refill_buffers --end_fsync=1", Access::sequential_write(8).fio());
    let job = fio::job(target, bench.scale.disk_bytes, &fill, &bench.scratch);
    fio::measure(job, COPY_LIMIT).context("fill the disk").map(drop)
}

/// Writes blocks of 4 KiB, none of them twice; how many bytes these are.
fn change(bench: &Bench, target: &Target) -> Result<u64> {
    let bytes = bench.scale.disk_bytes / DIFFERS / 4096 * 4096;
    let options = format!(
        "--rw=randwrite --bs=4096 --iodepth=32 --refill_buffers --end_fsync=1 --io_size={bytes}"
    );
    let job = fio::job(target, bench.scale.disk_bytes, &options, &bench.scratch);
    fio::measure(job, COPY_LIMIT).context("write what differs")?;
    Ok(bytes)
}

/// Has the kernel forget all that it could read again.
fn drop_caches() -> Result<()> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the caches of the kernel")
}

/// Seconds that a program took which writes to a file; only the last words may be paths.
fn timed_to(file: &Path, run: impl FnOnce(Run) -> Run) -> Result<f64> {
    let shell = Run::new("sh").arg("-c").arg("to=$1; shift; exec \"$@\" > \"$to\"").arg("sh");
    let run = run(shell.arg(file)).limit(COPY_LIMIT);
    let start = clock::now();
    run.read()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Likewise, of one that reads from a file.
fn timed_from(file: &Path, run: impl FnOnce(Run) -> Run) -> Result<f64> {
    let shell = Run::new("sh").arg("-c").arg("from=$1; shift; exec \"$@\" < \"$from\"").arg("sh");
    let run = run(shell.arg(file)).limit(COPY_LIMIT);
    let start = clock::now();
    run.read()?;
    Ok(start.elapsed().as_secs_f64())
}

fn ours(bench: &Bench, binary: &Path) -> Result<Shown> {
    let disk_bytes = bench.scale.disk_bytes;
    let mut server = turns::ours(bench, &Options::disk(disk_bytes), "sent")?;
    let target = Target::Nbd(server.uri());
    fill(bench, &target)?;
    let snapshot = |server: &Server| Control::connect(&server.control_socket())?.snapshot(EXPORT);
    let older = snapshot(&server)?;
    let bytes = change(bench, &target)?;
    let newer = snapshot(&server)?;
    let stream = bench.data.join("sent/stream");
    let command = |server: &Server, shell: Run, name: &str| {
        shell.arg(binary).arg("--socket").arg(server.control_socket()).arg(name)
    };

    restart(&mut server)?;
    let before = read_by(&server)?;
    let differs = timed_to(&stream, |shell| {
        command(&server, shell, "send").arg(&newer).arg("--from").arg(&older)
    })?;
    let read = read_by(&server)? - before;
    restart(&mut server)?;
    let all = timed_to(&stream, |shell| command(&server, shell, "send").arg(&older))?;
    let receive = timed_from(&stream, |shell| command(&server, shell, "receive").arg("received"))?;
    server.stop()?;
    bench.remove_data()?;
    Ok(Shown {
        all: disk_bytes as f64 / all,
        differs: bytes as f64 / differs,
        read: read as f64 / bytes as f64,
        receive: disk_bytes as f64 / receive,
    })
}

/// Nothing is in its cache then.
fn restart(server: &mut Server) -> Result<()> {
    server.stop()?;
    drop_caches()?;
    server.start_unopened().map(drop)
}

/// Bytes that a server has read of its device so far (proc_pid_io(5)).
fn read_by(server: &Server) -> Result<u64> {
    let io = std::fs::read_to_string(format!("/proc/{}/io", server.process_id()?))?;
    let line = io.lines().find_map(|line| line.strip_prefix("read_bytes:"));
    Ok(line.context("find what a process has read")?.trim().parse()?)
}

/// Bytes a second of a whole disk, which is the only thing that it can copy without a bitmap that was
/// begun before.
fn qemu(bench: &Bench) -> Result<f64> {
    let disk_bytes = bench.scale.disk_bytes;
    let data = bench.data.join("converted");
    let options = Options::disk(disk_bytes);
    let mut server =
        Server::create(&Kind::Qcow2, &options, &data, &bench.scratch.join("converted"))?;
    fill(bench, &Target::Nbd(server.uri()))?;
    server.stop()?;
    drop_caches()?;
    let run = Run::new("qemu-img").words("convert -f qcow2 -O raw -T none").arg(server.file());
    let run = run.arg(data.join("copy.raw")).limit(COPY_LIMIT);
    let start = clock::now();
    run.read()?;
    Ok(disk_bytes as f64 / start.elapsed().as_secs_f64())
}

fn btrfs(bench: &Bench) -> Result<Option<Shown>> {
    let Some(mounted) = Mounted::or_message(bench) else { return Ok(None) };
    let disk_bytes = bench.scale.disk_bytes;
    let [disk, older, newer, received] =
        ["disk", "older", "newer", "received"].map(|name| mounted.directory().join(name));
    let subvolume = |words: &str| Run::new("btrfs").words("-q subvolume").words(words);
    subvolume("create").arg(&disk).read()?;
    let target = Target::File(disk.join("file"));
    fill(bench, &target)?;
    subvolume("snapshot -r").arg(&disk).arg(&older).read()?;
    let bytes = change(bench, &target)?;
    subvolume("snapshot -r").arg(&disk).arg(&newer).read()?;
    Run::new("btrfs").words("filesystem sync").arg(mounted.directory()).read()?;
    let stream = bench.data.join("btrfs/stream");
    drop_caches()?;
    let before = mounted.device_bytes_read()?;
    let differs =
        timed_to(&stream, |shell| shell.words("btrfs -q send -p").arg(&older).arg(&newer))?;
    let read = mounted.device_bytes_read()? - before;
    drop_caches()?;
    let all = timed_to(&stream, |shell| shell.words("btrfs -q send").arg(&older))?;
    std::fs::create_dir(&received)?;
    let receive = timed_from(&stream, |shell| {
        shell
            .arg("sh")
            .arg("-c")
            .arg("btrfs -q receive \"$1\" && sync -f \"$1\"")
            .arg("sh")
            .arg(&received)
    })?;
    Ok(Some(Shown {
        all: disk_bytes as f64 / all,
        differs: bytes as f64 / differs,
        read: read as f64 / bytes as f64,
        receive: disk_bytes as f64 / receive,
    }))
}

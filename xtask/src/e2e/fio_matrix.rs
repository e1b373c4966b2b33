//! fio writes in many shapes and verifies every byte.

use std::time::Duration;

use anyhow::Result;

use crate::fio::{self, Target};

use super::Bed;

/// A job: its name, whether the short form has it, and what fio does. `{quarter}` is a quarter of
/// the disk.
type Job = (&'static str, bool, &'static str);

const JOBS: [Job; 11] = [
    ("4k random, crc32c", true, "--rw=randwrite --bs=4k --iodepth=32 --verify=crc32c"),
    (
        "512 to 256k random, md5",
        true,
        "--rw=randwrite --bsrange=512-256k --blockalign=512 --iodepth=16 --verify=md5 \
         --verify_backlog=256 --verify_async=2",
    ),
    ("1m sequential, sha256", false, "--rw=write --bs=1m --iodepth=8 --verify=sha256 --fsync=8"),
    (
        "pattern of offsets",
        false,
        "--rw=randwrite --bs=8k --iodepth=16 --verify=pattern --verify_pattern=%o0xdeadbeef \
         --verify_interval=4k",
    ),
    (
        "overlapping, serialised by fio",
        true,
        "--rw=randwrite --bs=16k --blockalign=4k --iodepth=32 --norandommap \
         --serialize_overlap=1 --verify=xxhash --loops=2",
    ),
    // Depth 1: at others fio sends trim and write of one block without an order.
    ("trim, then write", false, "--rw=trimwrite --bs=64k --iodepth=1 --verify=crc32c"),
    ("random trim, then write", true, "--rw=randtrimwrite --bs=64k --iodepth=1 --verify=md5"),
    (
        "four jobs, reads and writes",
        true,
        "--rw=randrw --rwmixread=30 --bs=4k --iodepth=8 --numjobs=4 --size={quarter} \
         --offset_increment={quarter} --verify=crc32c --verify_backlog=512",
    ),
    (
        "write without verifying",
        false,
        "--rw=randwrite --bs=4k --iodepth=16 --verify=crc32c --verify_state_save=1 --do_verify=0 \
         --randseed=42",
    ),
    (
        "verify what was written before",
        false,
        "--rw=randwrite --bs=4k --iodepth=16 --verify=crc32c --verify_only=1 --randseed=42",
    ),
    (
        "a flush after each write",
        true,
        "--rw=randwrite --bs=4k --iodepth=1 --fsync=1 --verify=crc32c --size=8m",
    ),
];

/// Runs the jobs one after the other on one disk.
///
/// # Errors
/// If the server does not start or stop.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let disk_bytes: u64 = if bed.quick { 64 << 20 } else { 256 << 20 };
    let mut server = bed.server(disk_bytes)?;
    let target = Target::Nbd(server.uri());
    let scratch = bed.scratch.clone();
    let quick = bed.quick;
    for (name, in_quick, options) in JOBS {
        if quick && !in_quick {
            continue;
        }
        let options = options.replace("{quarter}", &(disk_bytes / 4).to_string());
        bed.check(name, || {
            let job = fio::job(&target, disk_bytes, &options, &scratch);
            let job = job.words("--verify_fatal=1 --verify_dump=0");
            fio::measure(job, Duration::from_secs(300)).map(drop)
        });
    }
    server.stop()?;
    Ok(())
}

//! Independent NBD clients: libnbd's tools, QEMU's, nbdkit's proxy and a script of semantics.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::Run;
use crate::server::EXPORT;
use crate::workspace;

use super::Bed;

const DISK_BYTES: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// Bytes that qemu-io writes and reads back at odd places, zeroes and discards.
const QEMU_IO: [&str; 12] = [
    "write -P 7 0 1M",
    "write -z 64k 128k",
    "write -z -u 512k 64k",
    "discard 700k 64k",
    "read -P 0 64k 128k",
    "read -P 0 512k 64k",
    "read -P 7 0 64k",
    "write -P 9 1 511",
    "write -P 3 4095 2",
    "read -P 9 1 511",
    "read -P 3 4095 2",
    "flush",
];

/// Runs every client against one disk.
///
/// # Errors
/// If the server does not start or stop.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let mut server = bed.server(DISK_BYTES)?;
    let uri = server.uri();
    let directory = bed.data.clone();
    let random = directory.join("random.img");
    random_file(&random, DISK_BYTES)?;

    let all = format!("nbd+unix:///?socket={}", server.nbd_socket().display());
    bed.check("nbdinfo --list", || {
        let listed = tool("nbdinfo").arg("--list").arg(&all).read()?;
        ensure!(listed.contains(&format!("\"{EXPORT}\"")), "not listed: {listed}");
        Ok(())
    });
    bed.check("nbdinfo --json", || info(&uri));
    bed.check("nbdinfo --map of a new disk", || {
        let map = tool("nbdinfo").words("--map --totals").arg(&uri).read()?;
        ensure!(map.contains("hole,zero") && !map.contains("data"), "{map}");
        Ok(())
    });
    bed.check("nbdcopy there and back", || nbdcopy(&uri, &random, &directory));
    bed.check("qemu-img compare", || {
        tool("qemu-img").words("compare -f raw -F raw").arg(&uri).arg(&random).read().map(drop)
    });
    bed.check("qemu-img convert there and back", || convert(&uri, &directory));
    bed.check("qemu-img map", || {
        let map = tool("qemu-img").words("map --output=json -f raw").arg(&uri).read()?;
        let map: Value = serde_json::from_str(&map)?;
        let data = |extent: &Value| extent.get("data").and_then(Value::as_bool) == Some(true);
        ensure!(map.as_array().is_some_and(|extents| extents.iter().any(data)), "{map}");
        Ok(())
    });
    bed.check("qemu-img bench, writing with flushes", || {
        let options = "bench -w -c 5000 -d 32 -s 4096 -S 4096 --flush-interval=64 -f raw -t none";
        tool("qemu-img").words(options).arg(&uri).read().map(drop)
    });
    bed.check("qemu-io: zeroes, discards, odd offsets", || {
        let commands = QEMU_IO.iter().flat_map(|command| ["-c", command]);
        let said = tool("qemu-io").words("-f raw").args(commands).arg(&uri).read()?;
        ensure!(!said.contains("Pattern verification failed"), "{said}");
        Ok(())
    });
    bed.check("libnbd: semantics", || {
        let script = workspace::root().join("xtask/assets/semantics.py");
        tool("/usr/bin/python3").arg(script).arg(&uri).read().map(drop)
    });
    bed.check("nbdkit as a proxy", || {
        let run = tool("nbdkit").words("-U - nbd").arg(format!("uri={uri}"));
        run.arg("--run").arg("nbdcopy \"$uri\" null:").read().map(drop)
    });
    bed.check("clean stop", || {
        let status = server.stop()?;
        ensure!(status.success(), "{status}");
        Ok(())
    });
    Ok(())
}

fn tool(program: &str) -> Run {
    Run::new(program).limit(LIMIT)
}

fn random_file(path: &Path, bytes: u64) -> Result<()> {
    use std::io::Read;
    let mut source = std::fs::File::open("/dev/urandom")?.take(bytes);
    std::io::copy(&mut source, &mut std::fs::File::create(path)?)?;
    Ok(())
}

/// What the export says of itself.
fn info(uri: &str) -> Result<()> {
    let text = tool("nbdinfo").arg("--json").arg(uri).read()?;
    let info: Value = serde_json::from_str(&text)?;
    let export = info.get("exports").and_then(|exports| exports.get(0)).context("no export")?;
    let size = export.get("export-size").and_then(Value::as_u64);
    ensure!(size == Some(DISK_BYTES), "size {size:?}");
    let is = |name: &str| export.get(name).and_then(Value::as_bool);
    for (name, expected) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_multi_conn", true),
        ("can_cache", true),
        ("can_df", true),
    ] {
        ensure!(is(name) == Some(expected), "{name} is {:?}", is(name));
    }
    ensure!(info.get("structured").and_then(Value::as_bool) == Some(true), "no structured replies");
    Ok(())
}

fn nbdcopy(uri: &str, random: &Path, directory: &Path) -> Result<()> {
    tool("nbdcopy").arg("--flush").arg(random).arg(uri).read()?;
    for (name, options) in [("many.img", ""), ("few.img", "--synchronous -C 1")] {
        let copy = directory.join(name);
        tool("nbdcopy").words(options).arg(uri).arg(&copy).read()?;
        tool("cmp").arg(random).arg(&copy).read()?;
    }
    Ok(())
}

fn convert(uri: &str, directory: &Path) -> Result<()> {
    let copy = directory.join("copy.qcow2");
    let run = tool("qemu-img").words("convert -W -m 8 -f raw -O qcow2").arg(uri);
    run.arg(&copy).read()?;
    tool("qemu-img").words("compare -f raw -F qcow2").arg(uri).arg(&copy).read()?;
    tool("qemu-io").words("-f raw -c").arg("write -z 0 8M").arg(uri).read()?;
    let run = tool("qemu-img").words("convert -n -f qcow2 -O raw").arg(&copy).arg(uri);
    run.read()?;
    tool("qemu-img").words("compare -f raw -F qcow2").arg(uri).arg(&copy).read().map(drop)
}

//! docs/guides/backup.md, and what it promises of what breaks on the way.
//!
//! The host `backup` is a second daemon on this machine; `ssh` runs a command there by naming its
//! socket. What the guide leaves to accidents is brought about here: a receive whose command is killed,
//! one whose daemon is, and streams that are not what was sent.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::sandbox::{Program, Sandbox};
use super::{Bed, follow, sandbox};

const READY_LIMIT: Duration = Duration::from_secs(60);

/// What stands for `ssh`.
const SSH: &str = "\
#!/bin/sh
[ \"$1\" = backup ] || exit 255
shift
export PARALLAX_SOCKET=/run/backup.sock
exec sh -c \"$*\"
";

const SERVE_BACKUP: &str = "PARALLAX_SOCKET=/run/backup.sock exec parallax serve backup-store";

/// A disk with something on it.
const MADE: &str = "\
parallax create web01 --size 128M
head -c 32M /dev/urandom > noise
nbdcopy --flush noise 'nbd+unix:///web01?socket=/run/parallax.nbd.sock'";

/// What happened on Tuesday, so much that a part of it can be received.
const WRITTEN: &str = "\
head -c 24M /dev/urandom > noise
nbdcopy --flush noise 'nbd+unix:///web01?socket=/run/parallax.nbd.sock'";

/// Functions of the checks. A receive that is fed a part of the stream `tuesday`, bit by bit, goes on
/// until something happens to it.
const FUNCTIONS: &str = "\
backup() { ssh backup parallax \"$@\"; }
same() {
    parallax export $1 one --format raw --force
    ssh backup parallax export $2 other --format raw --force
    cmp one other
}
feed() {
    for part in $(seq 0 19); do
        dd if=tuesday bs=1M skip=$part count=1 status=none || exit 0
        sleep 0.1
    done
    sleep 100
}
begin() {
    rm -f pipe
    mkfifo pipe
    feed > pipe &
    feeder=$!
    PARALLAX_SOCKET=/run/backup.sock parallax receive web01 < pipe 2> said &
    receiver=$!
    until backup receive web01 --resume-token --json 2> /dev/null | grep -Eq '\"done\": [1-9][0-9]{6}'; do
        sleep 0.1
    done
}
ended() {
    code=0
    wait $receiver || code=$?
    kill $feeder || true
    [ $code = $1 ]
    backup snapshots web01 > after
    cmp before after
    [ \"$(backup ls | grep -c '^web01\\.partial ')\" = 1 ]
}
refused() {
    what=$1
    disk=$2
    backup ls --json > before
    backup snapshots $disk --json >> before 2>&1 || true
    code=0
    backup receive $disk < broken 2> said || code=$?
    [ $code = 7 ]
    grep \"$what\" said
    if [ \"$what\" = short ]; then backup rm $disk.partial; fi
    backup ls --json > after
    backup snapshots $disk --json >> after 2>&1 || true
    cmp before after
}
flipped() {
    cp $1 broken
    at=$(($(stat -c %s $1) / 2))
    byte=$(od -An -tu1 -j $at -N 1 $1)
    printf \"\\\\$(printf %o $((byte ^ 1)))\" | dd of=broken bs=1 seek=$at conv=notrunc status=none
    ! cmp -s $1 broken
}
";

/// `backup` as it is on Tuesday morning, with one stream more at hand.
const MORNING: &str = "\
backup rm web01
parallax send web01@monday | ssh backup parallax receive web01
parallax send web01@tuesday --from @monday > tuesday
backup snapshots web01 > before";

/// A stream that is nonsense, one that is altered and one that is cut short: for a disk that is not there,
/// and for one that is.
const REFUSED: &str = "\
backup receive third < web01-monday.plx
for disk in fourth third; do
    if [ $disk = third ]; then stream=web01-tuesday.plx; else stream=web01-monday.plx; fi
    head -c 1M /dev/urandom > broken
    refused 'not a stream' $disk
    : > broken
    refused stream $disk
    flipped $stream
    refused damaged $disk
    head -c $(($(stat -c %s $stream) / 2)) $stream > broken
    refused short $disk
done
same web01@monday third
backup receive third < web01-tuesday.plx
same web01@tuesday third
parallax check --online
backup check --online";

/// The guide, with what may break where it says so.
///
/// # Errors
/// If something cannot be prepared.
pub(crate) fn run(bed: &mut Bed) -> Result<()> {
    let Some(mut sandbox) = sandbox(bed, &[])? else { return Ok(()) };
    let ssh = bed.data.join("bin/ssh");
    std::fs::write(&ssh, SSH)?;
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755))?;
    sandbox.serve("exec parallax serve store")?;
    sandbox.run("parallax format backup-store --size 4G")?;
    let mut backup = Some(serve(&sandbox, "backup")?);
    sandbox.run(MADE)?;
    follow(bed, "backup.md", &mut sandbox, |sandbox, block| {
        if block.text.contains("--label tuesday") {
            sandbox.run(WRITTEN)?;
            sandbox.run(&block.text)?;
            sandbox
                .run(&with_functions("same web01@monday web01@monday; same web01 web01@tuesday"))?;
            return Ok(true);
        }
        if block.text.starts_with("token=") {
            for accident in [Accident::Command, Accident::Daemon] {
                sandbox.run(&with_functions(MORNING))?;
                sandbox.run(&with_functions(accident.script()))?;
                if accident == Accident::Daemon {
                    // The last one ends with its process.
                    backup = Some(serve(sandbox, "backup-again")?);
                    sandbox.run(&with_functions(AFTERWARDS))?;
                }
                sandbox.run(&block.text)?;
                sandbox.run(&with_functions(
                    "same web01@tuesday web01; if backup info web01.partial; then exit 1; fi; \
                     backup receive web01 < tuesday | grep 'there already'",
                ))?;
            }
            return Ok(true);
        }
        Ok(false)
    })?;
    if bed.count.failed > 0 {
        return Ok(());
    }
    bed.check("files that were kept are what was sent", || {
        sandbox.run("parallax export web01@tuesday one --format raw --force")?;
        sandbox.run("parallax export restored@tuesday other --format raw --force; cmp one other")
    });
    bed.check("streams that are not what was sent change nothing", || {
        sandbox.run(&with_functions(REFUSED))
    });
    backup.map_or(Ok(()), |backup| backup.stop(&sandbox))
}

/// What may happen to a receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accident {
    Command,
    Daemon,
}

/// After the daemon was killed: the receive has failed, and nothing but its part is there.
const AFTERWARDS: &str =
    "backup snapshots web01 > after; cmp before after; backup info web01.partial";

impl Accident {
    fn script(self) -> &'static str {
        match self {
            Self::Command => "begin; kill -9 $receiver; ended 137",
            // It gives up with a word, some time after it has missed its daemon.
            Self::Daemon => {
                "begin; kill -9 $(cat ../backup.pid); code=0; wait $receiver || code=$?; \
                 kill $feeder || true; [ $code = 6 ]; [ -s said ]"
            }
        }
    }
}

fn with_functions(script: &str) -> String {
    format!("{{ set +x; }} 2>/dev/null\n{FUNCTIONS}set -x\n{script}")
}

/// Starts the daemon of the host `backup`.
fn serve(sandbox: &Sandbox, name: &str) -> Result<Program> {
    let mut daemon = sandbox.start(name, SERVE_BACKUP)?;
    daemon.wait_for("\nready", READY_LIMIT)?;
    ensure!(daemon.is_alive(), "the daemon of backup has ended:\n{}", daemon.said());
    Ok(daemon)
}

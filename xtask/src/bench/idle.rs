//! What a daemon costs while nothing is asked of it.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock;
use crate::control::Control;
use crate::nbd;
use crate::server::{Kind, Options, Server};

use super::report::{Column, Goal, Line, Unit};
use super::vhost_user::Device;
use super::{Bench, cpu};

/// Number of disks, with the one that is attached.
const DISKS: u32 = 100;

/// Time that it is left alone before it is looked at: what was written is published meanwhile.
const REST: Duration = Duration::from_secs(10);

/// How long it is looked at; the kernel counts in hundredths of a second.
const LENGTH: Duration = Duration::from_secs(20);

/// Processor time and wake-ups of a daemon with a hundred disks, one attached to a virtual machine
/// and one open over NBD, after some writes.
///
/// # Errors
/// If the server fails.
pub(crate) fn measure(bench: &Bench) -> Result<Vec<Line>> {
    let binary = bench.binary.clone().context("there is no peer to measure here")?;
    let options = Options { vhost_user: true, ..Options::disk(bench.scale.disk_bytes) };
    let directory = bench.data.join("idle");
    let kind = Kind::Parallax(binary);
    let mut server = Server::create(&kind, &options, &directory, &bench.scratch)?;
    let mut control = Control::connect(&server.control_socket())?;
    for number in 1..DISKS {
        control.create(&format!("idle{number}"), 10 << 30)?;
    }
    let mut client = nbd::Client::connect(&server.nbd_socket(), "idle1")?;
    client.ask(nbd::Command::WriteZeroes, 0, 1 << 20)?;
    let mut device = Device::connect(&server.vhost_socket(), 1, 4096)?;
    device.write(0, 0, 1)?;
    device.wait(&mut Vec::new())?;
    clock::sleep(REST);

    let process = server.process_id()?;
    let mut column = Column::new("ours");
    let mut sleeps = 0;
    for _ in 0..bench.scale.rounds {
        let before = cpu::sleeps(process)?;
        let watch = || {
            clock::sleep(LENGTH);
            Ok(())
        };
        let ((), share) = cpu::share_during(&[process], Duration::ZERO, LENGTH, watch)?;
        column.values.push(share * 100.0);
        sleeps += cpu::sleeps(process)? - before;
    }
    drop((client, device));
    server.stop()?;
    let seconds = LENGTH.as_secs_f64() * bench.scale.rounds as f64;
    Ok(vec![Line {
        measure: format!("idle daemon: {DISKS} disks, one attached, one open over NBD"),
        unit: Unit::PercentOfCore,
        columns: vec![column],
        goals: vec![Goal::AtMost { limit: 0.5 }],
        note: format!("its threads wake up {:.1} times a second", sleeps as f64 / seconds),
    }])
}

//! Makes a failing run smaller, as far as is easy: fewer kinds of faults, fewer lives, fewer
//! clients, the shortest failing prefix of its requests. Each attempt is a process of its own, so
//! that a panic or a hang is a failure like any other.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use parallax_sim::faults::FaultKind;
use parallax_sim::plan::{Limits, Plan};

/// Longest that an attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(60);

/// The smallest limits found, within those of the failure, under which `seed` still fails.
pub(crate) fn shrink(seed: u64, limits: Limits) -> Result<Limits> {
    let mut best = limits;
    let plan = Plan::draw(seed, &best);
    for kind in plan.faults.kinds().collect::<Vec<FaultKind>>() {
        let mut narrower = best.clone();
        narrower.without.push(kind);
        try_limits(seed, narrower, &mut best)?;
    }
    for lives in 1..plan.lives.len() {
        let narrower = Limits { lives: u64::try_from(lives).ok(), ..best.clone() };
        if try_limits(seed, narrower, &mut best)? {
            break;
        }
    }
    for clients in 1..plan.clients {
        if try_limits(seed, Limits { clients: Some(clients), ..best.clone() }, &mut best)? {
            break;
        }
    }
    let lives = usize::try_from(best.lives.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    let (mut low, mut high) = (0, plan.lives.iter().take(lives).map(|life| life.requests).sum());
    while low < high {
        let middle = low + (high - low) / 2;
        if try_limits(seed, Limits { requests: Some(middle), ..best.clone() }, &mut best)? {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Ok(best)
}

/// Keeps `narrower` as the best if the seed fails under it, too.
fn try_limits(seed: u64, narrower: Limits, best: &mut Limits) -> Result<bool> {
    let fails = fails(seed, &narrower)?;
    if fails {
        *best = narrower;
    }
    Ok(fails)
}

fn fails(seed: u64, limits: &Limits) -> Result<bool> {
    let program = std::env::current_exe().context("find this program")?;
    let mut child = Command::new(program)
        .arg("run")
        .args(["--seed", &seed.to_string()])
        .args(limits.arguments().split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start a run")?;
    let start = crate::farm::now();
    loop {
        if let Some(status) = child.try_wait().context("wait for a run")? {
            return Ok(!status.success());
        }
        if start.elapsed() > ATTEMPT_MAX {
            child.kill().context("end a run")?;
            child.wait().context("wait for a run")?;
            return Ok(true);
        }
        crate::farm::pause(Duration::from_millis(5));
    }
}

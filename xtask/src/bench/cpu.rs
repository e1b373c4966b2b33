//! What programs cost: their processor time and their wake-ups, as the kernel counts them.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock;

/// Units of /proc/PID/stat: USER_HZ, which is 100 on every machine that Linux has in userspace's eyes.
const TICK: Duration = Duration::from_millis(10);

/// Processor time of processes so far, in user mode and in the kernel, all threads together.
///
/// # Errors
/// If one of them is gone.
pub(crate) fn used(processes: &[u32]) -> Result<Duration> {
    let mut ticks = 0;
    for process in processes {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        ticks += ticks_of(&stat).with_context(|| format!("read the time of process {process}"))?;
    }
    Ok(TICK * u32::try_from(ticks)?)
}

/// Fields 14 and 15 (proc_pid_stat(5)). The name before them may have spaces and brackets in it.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// How often threads of a process have gone to sleep by themselves, all of them together.
///
/// # Errors
/// If it is gone.
pub(crate) fn sleeps(process: u32) -> Result<u64> {
    let mut sum = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.context("find the context switches")?.trim().parse::<u64>()?;
    }
    Ok(sum)
}

/// Runs `load`, and tells which share of a processor `processes` use from `start` after its begin
/// for `length`, during which it runs all the time.
///
/// # Errors
/// If `load` fails, or a process ends meanwhile.
pub(crate) fn share_during<T>(
    processes: &[u32],
    start: Duration,
    length: Duration,
    load: impl FnOnce() -> Result<T>,
) -> Result<(T, f64)> {
    std::thread::scope(|scope| {
        let watched = scope.spawn(move || {
            clock::sleep(start);
            let (before, began) = (used(processes)?, clock::now());
            clock::sleep(length);
            let spent = used(processes)?.saturating_sub(before);
            Ok::<_, anyhow::Error>(spent.as_secs_f64() / began.elapsed().as_secs_f64())
        });
        let done = load();
        let share = watched.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
        Ok((done?, share?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_stand_behind_any_name() {
        let stat = "7 (a) (b c) S 1 7 7 0 -1 4194560 100 0 0 0 41 1 0 0 20 0 4 0 100 1000 200";
        assert_eq!(ticks_of(stat), Some(42));
        assert_eq!(ticks_of("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_can_be_watched() {
        let own = std::process::id();
        let short = Duration::from_millis(10);
        let ((), share) = share_during(&[own], short, short, || Ok(())).unwrap();
        assert!(share >= 0.0);
        assert!(sleeps(own).is_ok());
        assert!(used(&[u32::MAX]).is_err());
    }
}

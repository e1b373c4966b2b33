//! `parallax stats`.

use std::io::IsTerminal;
use std::time::Duration;

use api::{DaemonStatus, Error, Stats};
use base::BLOCK_SIZE_U64;
use jiff::Timestamp;
use tokio::time::Instant;

use super::Context;
use crate::output::{self, bytes};

pub(super) async fn run(context: &Context, watch: Option<Duration>) -> Result<(), Error> {
    let first = context.client.stats().await?;
    let Some(interval) = watch else {
        if context.json {
            return output::print_json(&first);
        }
        let daemon = context.client.daemon().await?;
        return output::print(&format!("{}\n\n{}", header(&daemon), table(&first, None)));
    };
    let daemon = context.client.daemon().await?;
    let clear = std::io::stdout().is_terminal();
    let (mut last, mut since) = (first, Instant::now());
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let (now, at) = (context.client.stats().await?, Instant::now());
        let is_read = if context.json {
            let line = serde_json::to_string(&now);
            output::print_to_reader(&line.map_err(|e| Error::new(api::Kind::Io, e.to_string()))?)?
        } else {
            let rates = Rates { last: &last, seconds: (at - since).as_secs_f64() };
            // Home and clear: what was there before is overwritten without flicker.
            let home = if clear { "\x1b[H\x1b[2J" } else { "" };
            let text = table(&now, Some(&rates));
            output::print_to_reader(&format!("{home}{}\n\n{text}", header(&daemon)))?
        };
        if !is_read {
            return Ok(());
        }
        (last, since) = (now, at);
    }
}

fn header(daemon: &DaemonStatus) -> String {
    let DaemonStatus { store, device, version, pid, .. } = daemon;
    let mut text = format!("{store}\n{device}\nparallax {version}, process {pid}");
    for alarm in &daemon.opened.alarms {
        text.push_str("\nALARM: ");
        text.push_str(alarm);
    }
    text
}

/// What the counters were some time ago.
struct Rates<'a> {
    last: &'a Stats,
    seconds: f64,
}

impl Rates<'_> {
    fn per_second(&self, now: &Stats, of: impl Fn(&Stats) -> u64) -> f64 {
        let count = u32::try_from(of(now).saturating_sub(of(self.last))).unwrap_or(u32::MAX);
        f64::from(count) / self.seconds.max(0.001)
    }
}

fn table(now: &Stats, rates: Option<&Rates<'_>>) -> String {
    let plain = |of: fn(&Stats) -> u64| {
        let rate = rates.map(|rates| format!("  {:>10.0}/s", rates.per_second(now, of)));
        format!("{:>14}{}", of(now), rate.unwrap_or_default())
    };
    let volume = |of: fn(&Stats) -> u64| {
        let rate = rates.map(|rates| {
            // In KiB, so that a 32-bit difference means 4 TiB, not 4 GiB.
            let kib = rates.per_second(now, |stats| of(stats) / 1024);
            format!("  {:>8.1} MiB/s", kib / 1024.0)
        });
        format!("{:>14}{}", bytes(of(now)), rate.unwrap_or_default())
    };
    let gauge = |value: u64| format!("{value:>14}");
    let used = now.capacity_bytes.saturating_sub(now.free_bytes);
    let lines = [
        ("space used", format!("{:>14} of {}", bytes(used), bytes(now.capacity_bytes))),
        ("disks", gauge(now.vdi_count)),
        ("NBD clients", gauge(now.nbd_connections)),
        ("VMs", gauge(now.vhost_connections)),
        ("reads", plain(|s| s.reads)),
        ("read", volume(|s| s.read_bytes)),
        ("writes", plain(|s| s.writes)),
        ("written", volume(|s| s.write_bytes)),
        ("flushes", plain(|s| s.flushes)),
        ("discards", plain(|s| s.discards)),
        ("snapshots", plain(|s| s.snapshots)),
        ("moments", plain(|s| s.moments)),
        ("failed", plain(|s| s.errors)),
        ("bad checksums", plain(|s| s.checksum_failures)),
        ("log used", format!("{:>13}%", now.log_used_percent)),
        ("log records", plain(|s| s.log_records)),
        ("log blocks", plain(|s| s.log_blocks)),
        ("device flushes", plain(|s| s.device_flushes)),
        ("checkpoints", plain(|s| s.checkpoints)),
        ("nodes written", plain(|s| s.nodes_written)),
        ("histories", plain(|s| s.histories)),
        ("versions", plain(|s| s.versions_written)),
        ("collections", plain(|s| s.collections)),
        ("collected", volume(|s| s.collected_blocks.saturating_mul(BLOCK_SIZE_U64))),
        ("trimmed", volume(|s| s.trimmed_blocks.saturating_mul(BLOCK_SIZE_U64))),
        ("scrubbed", volume(|s| s.scrubbed_bytes)),
        ("scrubs", gauge(now.scrubs)),
        ("scrub ended", format!("{:>14}", scrub_ended(now))),
        ("scrub damage", plain(|s| s.scrub_damaged_blocks)),
        ("node cache", format!("{:>14}{}", bytes(now.cache_bytes), hit_rate(now))),
    ];
    lines.map(|(name, value)| format!("{name:<15}{value}")).join("\n")
}

/// When the last scrub ended that read everything.
fn scrub_ended(stats: &Stats) -> String {
    let ended = i64::try_from(stats.scrub_ended_seconds).unwrap_or(i64::MAX);
    match Timestamp::from_second(ended) {
        Ok(ended) if stats.scrub_ended_seconds > 0 => output::time(ended),
        _ => "never".to_owned(),
    }
}

fn hit_rate(stats: &Stats) -> String {
    let looked_up = stats.cache_hits.saturating_add(stats.cache_misses);
    match stats.cache_hits.saturating_mul(100).checked_div(looked_up) {
        Some(percent) => format!(", {percent}% hits"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_over_time() {
        let last = Stats { writes: 100, write_bytes: 0, ..Stats::default() };
        let now = Stats { writes: 300, write_bytes: 4 << 20, ..Stats::default() };
        let text = table(&now, Some(&Rates { last: &last, seconds: 2.0 }));
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("writes").ends_with("100/s"), "{text}");
        assert!(line("written").ends_with(" 2.0 MiB/s"), "{text}");
    }

    #[test]
    fn the_documentation_says_which_line_is_which_field() {
        let text = include_str!("../../../../docs/operations/monitor.md");
        let shown = table(&Stats::default(), None);
        for line in shown.lines() {
            let name = line.get(..15).unwrap_or(line).trim_end();
            assert!(text.contains(&format!("| {name} |")), "{name} is missing");
        }
        for (field, _) in Stats::default().fields() {
            assert!(text.contains(&format!("`{field}`")), "{field} is missing");
        }
    }

    #[test]
    fn every_counter_is_shown() {
        // Each field alone must change the table; otherwise it is missing in it.
        let mut all = serde_json::json!({});
        for (name, _) in Stats::default().fields() {
            all[name] = 1_000_000_000.into();
        }
        let parse = |value| serde_json::from_value::<Stats>(value).unwrap();
        for (name, _) in Stats::default().fields() {
            let mut changed = all.clone();
            changed[name] = 1.into();
            assert_ne!(table(&parse(changed), None), table(&parse(all.clone()), None), "{name}");
        }
    }
}

//! `parallax gc`.

use std::time::Duration;

use api::{Error, Gc, GcPhase, GcSpace, GcStatus};
use indicatif::ProgressBar;

use super::{Context, progress};
use crate::output::{self, bytes};

/// How often the daemon is asked how far it is.
const LOOK_PERIOD: Duration = Duration::from_millis(200);

pub(super) async fn run(context: &Context) -> Result<(), Error> {
    let bar = progress::bar("collecting garbage", 0);
    let done = tokio::select! {
        done = context.client.collect_garbage() => done,
        never = watch(context, &bar) => match never {},
    };
    bar.finish_and_clear();
    let done = done?;
    context.print(&done, &said(&done))
}

pub(super) async fn status(context: &Context) -> Result<(), Error> {
    let status = context.client.gc_status().await?;
    let GcStatus { phase, marked_bytes, candidate_bytes, pass, memory_bytes_max, cycles, last } =
        &status;
    let of_pass = if *pass > 1 { format!(", pass {pass}") } else { String::new() };
    let now = match phase {
        GcPhase::Idle => "idle".to_owned(),
        GcPhase::Marking => {
            let (marked, candidates) = (bytes(*marked_bytes), bytes(*candidate_bytes));
            format!("marking{of_pass}: {marked} of at most {candidates}")
        }
        GcPhase::Sweeping => format!("sweeping{of_pass}"),
        GcPhase::Trimming => "trimming".to_owned(),
    };
    let before = match cycles {
        0 => "none was completed since the daemon opened the store".to_owned(),
        _ => format!("{cycles} completed; the last one {}", said(last)),
    };
    let memory = format!("it may take {} of memory", bytes(*memory_bytes_max));
    context.print(&status, &format!("{now}\n{before}\n{memory}"))
}

fn said(gc: &Gc) -> String {
    let Gc { reached_bytes, freed_bytes, trimmed_bytes, passes, memory_bytes, space } = *gc;
    let mut text = format!("freed {}; {} are in use", bytes(freed_bytes), bytes(reached_bytes));
    if trimmed_bytes > 0 {
        text.push_str(&format!("; gave {} back to what lies below", bytes(trimmed_bytes)));
    }
    if passes > 1 {
        text.push_str(&format!("; {passes} passes, {} of memory", bytes(memory_bytes)));
    }
    if let Some(space) = space {
        let GcSpace { disks_bytes, snapshots_bytes, tables_bytes, garbage_bytes, counted } = space;
        let (disks, snapshots) = (bytes(disks_bytes), bytes(snapshots_bytes));
        let (tables, garbage) = (bytes(tables_bytes), bytes(garbage_bytes));
        text.push_str(&format!(
            "\nof {}: disks {disks}, snapshots alone {snapshots}, tables {tables}, garbage {garbage}",
            output::time(counted)
        ));
    }
    text
}

/// Draws how far it is.
async fn watch(context: &Context, bar: &ProgressBar) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(LOOK_PERIOD).await;
        // Whoever collects says what is wrong.
        let Ok(status) = context.client.gc_status().await else { continue };
        match status.phase {
            GcPhase::Idle => {}
            GcPhase::Marking => {
                bar.set_length(status.candidate_bytes);
                bar.set_position(status.marked_bytes);
            }
            GcPhase::Sweeping => bar.set_message("freeing"),
            GcPhase::Trimming => bar.set_message("giving space back"),
        }
    }
}

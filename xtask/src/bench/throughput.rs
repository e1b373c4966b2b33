//! The rows that clients measure: operations or bytes per second, subject beside subject.

use anyhow::Result;

use crate::console;
use crate::fio::Figures;

use super::Bench;
use super::plan::{
    AFTER_SNAPSHOT, Frontend, Goal, Load, OURS_WITHOUT, QCOW2_AFTER, Setting, State, Subject,
};
use super::report::{self, Column, Line, Unit};
use super::subject::{Stage, Turn};

/// The unit that processor time is divided by, also where operations are larger.
const BLOCK_BYTES: f64 = 4096.0;

/// Measures `loads`, which share the disks of their states.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn loads(bench: &Bench, setting: Setting, loads: &[Load]) -> Result<Vec<Line>> {
    let subjects = subjects(setting.frontend);
    let wanted = |subject: &&Subject| **subject != Subject::Ours || bench.binary.is_some();
    let label = |subject: Subject| subject.label(setting.frontend);
    let mut lines = Vec::new();
    let mut states: Vec<State> = Vec::new();
    for load in loads {
        if !states.contains(&load.state) {
            states.push(load.state);
        }
    }
    for state in states {
        let mut stages: Vec<(&str, Stage<'_>)> = subjects
            .iter()
            .filter(wanted)
            .map(|&subject| (label(subject), Stage::new(bench, setting, subject, state)))
            .collect();
        for load in loads.iter().filter(|load| load.state == state) {
            lines.push(one(bench, load, &mut stages)?);
        }
        bench.remove_data()?;
    }
    Ok(lines)
}

/// Who is measured where disks are reached like this.
fn subjects(frontend: Frontend) -> &'static [Subject] {
    match frontend {
        Frontend::Nbd | Frontend::VhostUser => &[
            Subject::Ours,
            Subject::Raw,
            Subject::RawFlushed,
            Subject::Qcow2,
            Subject::Qcow2Flushed,
            Subject::File,
        ],
        Frontend::Fuse => &[Subject::Ours, Subject::Raw, Subject::File],
    }
}

/// Random writes just after a snapshot, beside our own without one and qcow2's after its own.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn after_snapshot(bench: &Bench) -> Result<Vec<Line>> {
    let mut stages = Vec::new();
    if bench.binary.is_some() {
        stages.push(("ours", Stage::new(bench, Setting::NBD, Subject::Ours, State::Snapshotted)));
        stages.push((
            OURS_WITHOUT,
            Stage::new(bench, Setting::NBD, Subject::Ours, State::FilledAnew),
        ));
    }
    stages.push((QCOW2_AFTER, Stage::new(bench, Setting::NBD, Subject::Qcow2, State::Snapshotted)));
    Ok(vec![one(bench, &AFTER_SNAPSHOT, &mut stages)?])
}

/// Measures one load: rounds of one turn each.
fn one(bench: &Bench, load: &Load, stages: &mut [(&'static str, Stage<'_>)]) -> Result<Line> {
    let compares = |(label, stage): &&mut (&str, Stage<'_>)| load.compares(stage.subject(), label);
    let mut stages: Vec<_> = stages.iter_mut().filter(compares).collect();
    let mut columns: Vec<Column> = stages.iter().map(|(label, _)| Column::new(label)).collect();
    for round in 1..=bench.scale.rounds {
        let mut said = Vec::new();
        for ((label, stage), column) in stages.iter_mut().zip(&mut columns) {
            let Turn { figures, server_share } = stage.turn(&load.access)?;
            let value = value(load.unit, &figures);
            column.values.push(value);
            let mut text = format!("{label} {}", load.unit.show(value));
            if let Some(share) = server_share {
                let microseconds = share * 1e6 * BLOCK_BYTES / figures.bytes_per_second;
                text += &format!(" ({})", report::show_cpu(microseconds));
                column.cpu_microseconds.push(microseconds);
            }
            said.push(text);
        }
        console::say(&format!("{}, round {round}:\n  {}", load.measure, said.join("\n  ")));
    }
    Ok(Line {
        measure: load.measure.to_owned(),
        unit: load.unit,
        columns,
        goals: load.goals.iter().map(goal).collect(),
        note: String::new(),
    })
}

fn goal(goal: &Goal) -> report::Goal {
    report::Goal::AtLeastTimes { factor: goal.at_least, column: goal.times.to_owned() }
}

fn value(unit: Unit, figures: &Figures) -> f64 {
    match unit {
        Unit::BytesPerSecond => figures.bytes_per_second,
        _ => figures.iops,
    }
}

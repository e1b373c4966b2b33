//! The rows that fio measures: operations or bytes per second, subject beside subject.

use anyhow::Result;

use crate::console;
use crate::fio::Figures;

use super::Bench;
use super::plan::{AFTER_SNAPSHOT, Goal, Load, OURS_WITHOUT, QCOW2_AFTER, State, Subject};
use super::report::{Column, Line, Unit};
use super::subject::Stage;

/// Measures `loads`, which share the disks of their states.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn loads(bench: &Bench, loads: &[Load]) -> Result<Vec<Line>> {
    let subjects = [
        Subject::Ours,
        Subject::Raw,
        Subject::RawFlushed,
        Subject::Qcow2,
        Subject::Qcow2Flushed,
        Subject::File,
    ];
    let wanted = |subject: &&Subject| **subject != Subject::Ours || bench.binary.is_some();
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
            .map(|&subject| (subject.label(), Stage::new(bench, subject, state)))
            .collect();
        for load in loads.iter().filter(|load| load.state == state) {
            lines.push(one(bench, load, &mut stages)?);
        }
        bench.remove_data()?;
    }
    Ok(lines)
}

/// Random writes just after a snapshot, beside our own without one and qcow2's after its own.
///
/// # Errors
/// If a server or fio fails.
pub(crate) fn after_snapshot(bench: &Bench) -> Result<Vec<Line>> {
    let mut stages = Vec::new();
    if bench.binary.is_some() {
        stages.push(("ours", Stage::new(bench, Subject::Ours, State::Snapshotted)));
        stages.push((OURS_WITHOUT, Stage::new(bench, Subject::Ours, State::FilledAnew)));
    }
    stages.push((QCOW2_AFTER, Stage::new(bench, Subject::Qcow2, State::Snapshotted)));
    Ok(vec![one(bench, &AFTER_SNAPSHOT, &mut stages)?])
}

/// Measures one load: rounds of one turn each.
fn one(bench: &Bench, load: &Load, stages: &mut [(&'static str, Stage<'_>)]) -> Result<Line> {
    let mut stages: Vec<_> =
        stages.iter_mut().filter(|(_, stage)| load.compares(stage.subject())).collect();
    let mut columns: Vec<Column> = stages.iter().map(|(label, _)| Column::new(label)).collect();
    for round in 1..=bench.scale.rounds {
        let mut said = Vec::new();
        for ((label, stage), column) in stages.iter_mut().zip(&mut columns) {
            let figures = stage.turn(load.fio)?;
            let value = value(load.unit, &figures);
            said.push(format!("{label} {}", load.unit.show(value)));
            column.values.push(value);
        }
        console::say(&format!("{}, round {round}: {}", load.measure, said.join(", ")));
    }
    Ok(Line {
        measure: load.measure.to_owned(),
        unit: load.unit,
        columns,
        goals: load.goals.iter().map(goal).collect(),
        note: String::new(),
    })
}

fn goal(goal: &Goal) -> super::report::Goal {
    super::report::Goal::AtLeastTimes { factor: goal.at_least, column: goal.times.to_owned() }
}

fn value(unit: Unit, figures: &Figures) -> f64 {
    match unit {
        Unit::BytesPerSecond => figures.bytes_per_second,
        _ => figures.iops,
    }
}

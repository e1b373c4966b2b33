//! What was measured, on the terminal, as JSON, as a table and as a chart.
//!
//! The JSON is the record: a later run of single rows replaces those and keeps the others, and
//! the table and the chart are made from all of it.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::console;
use crate::process::Run;

use super::Scale;
use super::chart;
use super::latency::quantile;
use super::plot::{self, Plot};

/// Between these, the table in the document is ours.
const BEGIN: &str = "<!-- begin: written by cargo xtask bench -->";
const END: &str = "<!-- end -->";

/// The file that holds all that was measured.
const RECORD: &str = "results.json";

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Unit {
    /// Operations per second.
    Iops,
    /// Bytes per second.
    BytesPerSecond,
    /// Milliseconds.
    Milliseconds,
    /// MiB.
    Mebibytes,
    /// Percent of one processor's time.
    PercentOfCore,
    /// A quotient of two things of one kind.
    Ratio,
}

impl Unit {
    /// A value with its unit.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Iops => format!("{}/s", thousands(value)),
            Self::BytesPerSecond => format!("{} MiB/s", thousands(value / f64::from(1 << 20))),
            Self::Milliseconds if value < 10.0 => format!("{value:.3} ms"),
            Self::Milliseconds => format!("{value:.0} ms"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::PercentOfCore => format!("{value:.2} %"),
            Self::Ratio => format!("{value:.2}"),
        }
    }
}

/// One subject's figures, one per round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Column {
    /// Who.
    pub(crate) label: String,
    /// Each round.
    pub(crate) values: Vec<f64>,
    /// Microseconds of processor time that the server used for 4 KiB, each round; none where there
    /// is no server, or nothing was moved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) cpu_microseconds: Vec<f64>,
}

impl Column {
    /// Without figures yet.
    pub(crate) fn new(label: &str) -> Self {
        Self::of(label, Vec::new())
    }

    /// With these.
    pub(crate) fn of(label: &str, values: Vec<f64>) -> Self {
        Self { label: label.to_owned(), values, cpu_microseconds: Vec::new() }
    }

    fn median(&self) -> Option<f64> {
        median(&self.values)
    }
}

fn median(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { Some(quantile(values, 0.5)) }
}

/// Processor time for 4 KiB.
pub(crate) fn show_cpu(microseconds: f64) -> String {
    format!("{microseconds:.1} µs")
}

/// What a line must reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::enum_variant_names, reason = "each is a bound, and recorded by its name")]
pub(crate) enum Goal {
    /// So many times what stands in another column.
    AtLeastTimes { factor: f64, column: String },
    /// At most so many times what stands in another column.
    AtMostTimes { factor: f64, column: String },
    /// No less than this.
    AtLeast { limit: f64 },
    /// No more than this.
    AtMost { limit: f64 },
}

/// What a row has shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// For the table.
    pub(crate) lines: Vec<Line>,
    /// Drawn beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) plots: Vec<Plot>,
}

impl From<Vec<Line>> for Measured {
    fn from(lines: Vec<Line>) -> Self {
        Self { lines, plots: Vec::new() }
    }
}

/// One thing that was measured. The first column is ours, if we were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// What it was.
    pub(crate) measure: String,
    /// What the numbers count.
    pub(crate) unit: Unit,
    /// Who reached what.
    pub(crate) columns: Vec<Column>,
    /// What must be reached.
    pub(crate) goals: Vec<Goal>,
    /// What else belongs to it.
    pub(crate) note: String,
}

/// A goal's outcome in words, and whether it was reached; `None` if it was not measured.
type Outcome = Option<(String, bool)>;

impl Line {
    /// Median of a column.
    pub(crate) fn value(&self, label: &str) -> Option<f64> {
        self.columns.iter().find(|column| column.label == label)?.median()
    }

    fn outcome(&self, goal: &Goal) -> Outcome {
        let ours = self.value("ours")?;
        match goal {
            Goal::AtLeastTimes { factor, column } => {
                let ratio = ours / self.value(column)?;
                Some((format!("{ratio:.2}x"), ratio >= *factor))
            }
            Goal::AtMostTimes { factor, column } => {
                let ratio = ours / self.value(column)?;
                Some((format!("{ratio:.2}x"), ratio <= *factor))
            }
            Goal::AtLeast { limit } => Some((self.unit.show(ours), ours >= *limit)),
            Goal::AtMost { limit } => Some((self.unit.show(ours), ours <= *limit)),
        }
    }

    /// Whether a goal was reached; `None` if it was not measured.
    #[cfg(test)]
    pub(crate) fn is_reached(&self, goal: &Goal) -> Option<bool> {
        self.outcome(goal).map(|(_, reached)| reached)
    }

    fn goal_text(&self, goal: &Goal) -> String {
        match goal {
            Goal::AtLeastTimes { factor, .. } => format!("≥ {factor}x"),
            Goal::AtMostTimes { factor, .. } => format!("≤ {factor}x"),
            Goal::AtLeast { limit } => format!("≥ {}", self.unit.show(*limit)),
            Goal::AtMost { limit } => format!("≤ {}", self.unit.show(*limit)),
        }
    }

    fn outcome_text(&self, goal: &Goal) -> String {
        match self.outcome(goal) {
            Some((said, true)) => format!("{said} **pass**"),
            Some((said, false)) => format!("{said} **miss**"),
            None => "not measured".to_owned(),
        }
    }

    /// The goal that compares ours with a column, or is about ours alone.
    fn goal_of(&self, label: &str) -> Option<&Goal> {
        self.goals.iter().find(|goal| match goal {
            Goal::AtLeastTimes { column, .. } | Goal::AtMostTimes { column, .. } => column == label,
            Goal::AtLeast { .. } | Goal::AtMost { .. } => label == "ours",
        })
    }
}

/// Everything that is recorded.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    machine: Vec<(String, String)>,
    #[serde(flatten)]
    measured: Measured,
}

impl Record {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).context("read the earlier results")?;
        serde_json::from_str(&text).context("decode the earlier results")
    }
}

/// Prints one line, each column on a line of its own.
pub(crate) fn say(line: &Line) {
    console::say(&format!("{}:", line.measure));
    for column in &line.columns {
        let [value, cpu, goal, outcome] = cells(line, column);
        let cpu = if cpu.is_empty() { cpu } else { format!(" ({cpu})") };
        let goal = if goal.is_empty() { goal } else { format!(", ours must reach {goal}") };
        let outcome = if outcome.is_empty() { outcome } else { format!(": {outcome}") };
        console::say(&format!("  {}: {value}{cpu}{goal}{outcome}", column.label));
    }
    if !line.note.is_empty() {
        console::say(&format!("  {}", line.note));
    }
}

/// Writes what was measured into `results.json` in `directory`, keeping what an earlier run had and
/// this one has not measured again.
///
/// # Errors
/// If the file cannot be written, or an earlier record is not ours.
pub(crate) fn record(directory: &Path, measured: &Measured, scale: &Scale) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join(RECORD);
    let mut record = if path.exists() { Record::read(&path)? } else { Record::default() };
    record.machine = machine(scale);
    let Measured { lines, plots } = &mut record.measured;
    for line in &measured.lines {
        replace(lines, line, |earlier| earlier.measure == line.measure);
    }
    for plot in &measured.plots {
        replace(plots, plot, |earlier| earlier.file == plot.file);
    }
    std::fs::write(&path, serde_json::to_string_pretty(&record)? + "\n")?;
    Ok(())
}

/// Puts `new` in the place of the one that it stands for, or behind all.
fn replace<T: Clone>(all: &mut Vec<T>, new: &T, is_same: impl Fn(&T) -> bool) {
    match all.iter_mut().find(|earlier| is_same(earlier)) {
        Some(earlier) => *earlier = new.clone(),
        None => all.push(new.clone()),
    }
}

/// Makes `table.md`, `chart.svg` and the plots of what is recorded in `directory`.
///
/// # Errors
/// If there is no record, or they cannot be written.
pub(crate) fn render(directory: &Path) -> Result<()> {
    let record = Record::read(&directory.join(RECORD))?;
    std::fs::write(directory.join("table.md"), table(&record))?;
    std::fs::write(directory.join("chart.svg"), chart::draw(&record.measured.lines))?;
    for plot in &record.measured.plots {
        std::fs::write(directory.join(format!("{}.svg", plot.file)), plot::draw(plot))?;
    }
    Ok(())
}

/// Puts the table and the pictures of `directory` between the markers of the document.
///
/// # Errors
/// If the document has no markers.
pub(crate) fn update_document(document: &Path, directory: &Path) -> Result<()> {
    let text = std::fs::read_to_string(document).context("read the document")?;
    let table = std::fs::read_to_string(directory.join("table.md"))?;
    let (head, rest) = text.split_once(BEGIN).context("the document has no begin marker")?;
    let (_, tail) = rest.split_once(END).context("the document has no end marker")?;
    let mut pictures = String::from("![the figures below as bars](benchmarks/chart.svg)\n\n");
    for plot in &Record::read(&directory.join(RECORD))?.measured.plots {
        pictures += &format!("![{}](benchmarks/{}.svg)\n\n", plot.title, plot.file);
    }
    std::fs::write(document, format!("{head}{BEGIN}\n\n{pictures}{table}\n{END}{tail}"))?;
    Ok(())
}

/// The table, a row for each column of each line, and the machine.
fn table(record: &Record) -> String {
    let mut text = String::from(
        "| measure | who | median | CPU for 4 KiB | ours must reach | reached |\n\
         |---|---|---:|---:|---|---|\n",
    );
    for line in &record.measured.lines {
        let note = if line.note.is_empty() { String::new() } else { format!(" ({})", line.note) };
        let mut measure = format!("{}{note}", line.measure);
        for column in &line.columns {
            let cells = cells(line, column).join(" | ");
            text += &format!("| {measure} | {} | {cells} |\n", column.label);
            measure.clear();
        }
    }
    text += "\n";
    for (name, value) in &record.machine {
        text += &format!("- {name}: {value}\n");
    }
    text
}

/// What is told of a column: its value, its processor time, what ours must reach and has reached.
fn cells(line: &Line, column: &Column) -> [String; 4] {
    let value = column.median().map_or_else(|| "–".to_owned(), |value| line.unit.show(value));
    let cpu = median(&column.cpu_microseconds).map(show_cpu).unwrap_or_default();
    let goal = line.goal_of(&column.label);
    let text = goal.map(|goal| line.goal_text(goal)).unwrap_or_default();
    let outcome = goal.map(|goal| line.outcome_text(goal)).unwrap_or_default();
    [value, cpu, text, outcome]
}

/// What the figures depend on.
fn machine(scale: &Scale) -> Vec<(String, String)> {
    let first_line = |program: &str, arguments: &str| {
        let said = Run::new(program).words(arguments).read().unwrap_or_default();
        said.lines().next().unwrap_or("unknown").to_owned()
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let runs = format!(
        "{} GiB disks, medians of {} rounds of {} s",
        scale.disk_bytes >> 30,
        scale.rounds,
        scale.runtime.as_secs()
    );
    [
        ("measured", first_line("date", "-u +%Y-%m-%d")),
        ("at commit", first_line("git", "rev-parse --short HEAD")),
        ("runs", runs),
        ("processor", format!("{cores} x {model}")),
        ("kernel", first_line("uname", "-r")),
        ("peers", first_line("qemu-storage-daemon", "--version")),
        ("client", first_line("fio", "--version")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// A whole number with commas.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(ours: &[f64], raw: &[f64]) -> Line {
        let column = |label: &str, values: &[f64]| Column::of(label, values.to_vec());
        Line {
            measure: "random write".to_owned(),
            unit: Unit::Iops,
            columns: vec![column("ours", ours), column("raw", raw)],
            goals: vec![Goal::AtLeastTimes { factor: 1.5, column: "raw".to_owned() }],
            note: String::new(),
        }
    }

    #[test]
    fn a_goal_is_judged_on_medians() {
        let check = |ours: &[f64], raw: &[f64], expected: Option<bool>| {
            let line = line(ours, raw);
            let reached = line.goals.first().and_then(|goal| line.outcome(goal)).map(|(_, ok)| ok);
            assert_eq!(reached, expected, "{line:?}");
        };
        check(&[150.0, 1.0, 160.0], &[100.0], Some(true));
        check(&[149.0], &[100.0], Some(false));
        check(&[], &[100.0], None);
    }

    #[test]
    fn limits_are_judged_too() {
        let mut line = line(&[0.4], &[]);
        line.unit = Unit::Milliseconds;
        let goal = Goal::AtMost { limit: 0.3 };
        assert_eq!(line.outcome(&goal), Some(("0.400 ms".to_owned(), false)));
    }

    #[test]
    fn goals_of_either_direction_are_judged() {
        let check = |goal: Goal, ours: f64, text: &str, expected: (&str, bool)| {
            let line = line(&[ours], &[100.0]);
            assert_eq!(line.goal_text(&goal), text);
            assert_eq!(line.outcome(&goal), Some((expected.0.to_owned(), expected.1)), "{goal:?}");
        };
        let most = || Goal::AtMostTimes { factor: 1.5, column: "raw".to_owned() };
        check(most(), 150.0, "≤ 1.5x", ("1.50x", true));
        check(most(), 160.0, "≤ 1.5x", ("1.60x", false));
        check(Goal::AtLeast { limit: 5000.0 }, 5000.0, "≥ 5,000/s", ("5,000/s", true));
        check(Goal::AtLeast { limit: 5000.0 }, 4999.0, "≥ 5,000/s", ("4,999/s", false));
    }

    #[test]
    fn what_is_measured_again_replaces_what_was() {
        let directory = std::env::temp_dir().join(format!("record-{}", std::process::id()));
        let plot = |title: &str| Plot { title: title.to_owned(), ..Plot::example() };
        let measured = |value: f64, title: &str| Measured {
            lines: vec![line(&[value], &[1.0])],
            plots: vec![plot(title)],
        };
        for (value, title) in [(1.0, "old"), (2.0, "new")] {
            record(&directory, &measured(value, title), &Scale::QUICK).unwrap();
        }
        render(&directory).unwrap();
        let read = Record::read(&directory.join(RECORD)).unwrap();
        assert_eq!(read.measured, measured(2.0, "new"));
        let picture = directory.join(format!("{}.svg", plot("").file));
        assert!(std::fs::read_to_string(picture).unwrap().contains("new"));
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_table_has_every_line_and_the_document_keeps_its_text() {
        let mut line = line(&[200.0], &[100.0]);
        for column in &mut line.columns {
            column.cpu_microseconds = vec![7.0];
        }
        let measured = Measured { lines: vec![line], plots: vec![Plot::example()] };
        let recorded = Record { machine: Vec::new(), measured };
        let table = table(&recorded);
        let row = "|  | raw | 100/s | 7.0 µs | ≥ 1.5x | 2.00x **pass** |";
        let rows = format!("| random write | ours | 200/s | 7.0 µs |  |  |\n{row}\n");
        assert!(table.contains(&rows), "{table}");

        let directory = std::env::temp_dir().join(format!("report-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let document = directory.join("doc.md");
        std::fs::write(&document, format!("head\n{BEGIN}\nold\n{END}\ntail\n")).unwrap();
        std::fs::write(directory.join("table.md"), &table).unwrap();
        let json = serde_json::to_string(&recorded).unwrap();
        std::fs::write(directory.join(RECORD), json).unwrap();
        update_document(&document, &directory).unwrap();
        let text = std::fs::read_to_string(&document).unwrap();
        assert!(text.starts_with("head\n") && text.ends_with("\ntail\n"), "{text}");
        assert!(text.contains(row) && !text.contains("old"), "{text}");
        assert!(text.contains("![reads](benchmarks/example.svg)"), "{text}");
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(1_234_567.0), "1,234,567");
        assert_eq!(thousands(999.4), "999");
        assert_eq!(Unit::BytesPerSecond.show(f64::from(3 << 20)), "3 MiB/s");
    }
}

//! The chart beside the table: each throughput as a bar, in multiples of raw reached the same way.

use std::fmt::Write;

use super::report::{Line, Unit};

const WIDTH: u32 = 860;
const LEFT: u32 = 20;
const BAR_HEIGHT: u32 = 16;
const GROUP_GAP: u32 = 34;
const TOP: u32 = 70;
/// Pixels that stand for 1.0 times raw; bars are cut at [`MOST`].
const SCALE: f64 = 160.0;
const MOST: f64 = 4.4;

/// How the labels of a series begin (how it is reached comes behind), and its colour.
const SERIES: [(&str, &str); 4] =
    [("ours", "#d9480f"), (RAW, "#868e96"), ("qcow2 over ", "#4c6ef5"), ("bare file", "#ced4da")];
const RAW: &str = "raw over ";

/// Draws the lines that have a figure for raw; the others have no common scale.
pub(crate) fn draw(lines: &[Line]) -> String {
    let comparable: Vec<(&Line, f64)> = lines
        .iter()
        .filter(|line| matches!(line.unit, Unit::Iops | Unit::BytesPerSecond))
        .filter_map(|line| Some((line, value(line, RAW)?)))
        .collect();
    let mut body = String::new();
    let mut y = TOP;
    for (line, raw) in &comparable {
        y = group(&mut body, line, *raw, y);
    }
    let bottom = y;
    let one = f64::from(LEFT) + SCALE;
    let mut svg = String::new();
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{bottom}\" \
         viewBox=\"0 0 {WIDTH} {bottom}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">Throughput in multiples of \
         qemu-storage-daemon on a raw file, reached the same way (longer is better)</text>\n{}\
         <line x1=\"{one}\" x2=\"{one}\" y1=\"56\" y2=\"{bottom}\" stroke=\"#adb5bd\" \
         stroke-dasharray=\"3 3\"/>\n{body}</svg>",
        legend()
    );
    svg
}

/// Median of the series that begins like this.
fn value(line: &Line, series: &str) -> Option<f64> {
    let column = line.columns.iter().find(|column| column.label.starts_with(series))?;
    // `ours` and `ours without` begin alike; the first is meant, and comes first.
    line.value(&column.label)
}

fn legend() -> String {
    let mut text = String::new();
    for (index, (series, colour)) in (0u32..).zip(SERIES) {
        let label = series.trim_end_matches(" over ");
        let x = LEFT + index * 150;
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"36\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"46\">{label}</text>",
            x + 18
        );
    }
    text
}

/// Draws one line's bars from `y` down; returns where the next group starts.
fn group(body: &mut String, line: &Line, raw: f64, mut y: u32) -> u32 {
    let _ = writeln!(body, "<text x=\"{LEFT}\" y=\"{}\">{}</text>", y + 12, line.measure);
    y += 18;
    for (series, colour) in SERIES {
        let Some(value) = value(line, series) else { continue };
        let times = value / raw;
        let width = SCALE * times.clamp(0.0, MOST);
        let more = if times > MOST { " →" } else { "" };
        let _ = writeln!(
            body,
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{times:.2} ({}){more}</text>",
            BAR_HEIGHT - 2,
            f64::from(LEFT) + width + 6.0,
            y + 11,
            line.unit.show(value)
        );
        y += BAR_HEIGHT;
    }
    y + GROUP_GAP - BAR_HEIGHT
}

#[cfg(test)]
mod tests {
    use super::super::report::Column;
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_ratio() {
        let column = |label: &str, value: f64| Column::of(label, vec![value]);
        let line = Line {
            measure: "random read".to_owned(),
            unit: Unit::Iops,
            columns: vec![column("ours", 300.0), column("raw over NBD", 200.0)],
            goals: Vec::new(),
            note: String::new(),
        };
        let svg = draw(&[line]);
        assert!(svg.contains("width=\"240.0\"") && svg.contains("width=\"160.0\""), "{svg}");
        assert!(svg.contains("1.50 (300/s)"), "{svg}");
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
    }
}

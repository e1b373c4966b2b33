//! A picture of curves: what was reached (linear, from 0) over how much of something there was
//! (logarithmic, with 0 at its left).

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::report::Unit;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 100.0;
const RIGHT: f64 = 840.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 330.0;
/// Lines across, with a value at each.
const STEPS: u32 = 4;
/// Room between 0 and the smallest other value, in decades.
const ZERO_GAP: f64 = 0.7;

const COLOURS: [&str; 6] = ["#d9480f", "#4c6ef5", "#868e96", "#2b8a3e", "#862e9c", "#ced4da"];

/// Curves with the same axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plot {
    /// Name of its file, without `.svg`: also what it is known by.
    pub(crate) file: String,
    /// What it shows.
    pub(crate) title: String,
    /// What there was more or less of.
    pub(crate) across: String,
    /// What was reached.
    pub(crate) unit: Unit,
    /// Who.
    pub(crate) curves: Vec<Curve>,
}

/// One subject's points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Curve {
    /// Who.
    pub(crate) label: String,
    /// How much there was, and what was reached.
    pub(crate) points: Vec<(f64, f64)>,
}

impl Curve {
    /// Without points yet.
    pub(crate) fn new(label: &str) -> Self {
        Self { label: label.to_owned(), points: Vec::new() }
    }
}

impl Plot {
    /// For tests.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        let curve = |label: &str, points: &[(f64, f64)]| Curve {
            label: label.to_owned(),
            points: points.to_vec(),
        };
        Self {
            file: "example".to_owned(),
            title: "reads".to_owned(),
            across: "snapshots".to_owned(),
            unit: Unit::Iops,
            curves: vec![
                curve("ours", &[(0.0, 100.0), (10.0, 100.0), (1000.0, 50.0)]),
                curve("qcow2 over NBD", &[(0.0, 80.0)]),
            ],
        }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.curves.iter().flat_map(|curve| curve.points.iter().copied())
    }
}

/// Where values lie in the picture.
struct Axes {
    /// Decades of the smallest value above 0 and of the largest; what 0 stands for is left of both.
    least: f64,
    most: f64,
    /// Value at the top.
    top: f64,
}

impl Axes {
    fn of(plot: &Plot) -> Self {
        let decades = || plot.points().filter(|(x, _)| *x > 0.0).map(|(x, _)| x.log10());
        let least = decades().reduce(f64::min).unwrap_or(0.0);
        let most = decades().reduce(f64::max).unwrap_or(1.0);
        let has_zero = plot.points().any(|(x, _)| x <= 0.0);
        let least = if has_zero { least - ZERO_GAP } else { least };
        // One place alone needs some width too.
        let most = if most > least { most } else { least + 1.0 };
        let top = plot.points().map(|(_, y)| y).reduce(f64::max).filter(|&top| top > 0.0);
        let step = round_up(top.unwrap_or(1.0) / f64::from(STEPS));
        Self { least, most, top: step * f64::from(STEPS) }
    }

    fn x(&self, value: f64) -> f64 {
        let decade = if value > 0.0 { value.log10() } else { self.least };
        LEFT + (RIGHT - LEFT) * (decade - self.least) / (self.most - self.least)
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * value / self.top
    }
}

/// The next number that people like at an axis: 1, 2, 2.5 or 5 times a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= value).unwrap_or(10.0 * power)
}

/// Draws it.
pub(crate) fn draw(plot: &Plot) -> String {
    let axes = Axes::of(plot);
    let mut svg = String::new();
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"20\" y=\"24\" font-size=\"16\">{}</text>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
        plot.title,
        f64::midpoint(LEFT, RIGHT),
        HEIGHT - 12.0,
        plot.across
    );
    draw_grid(&mut svg, plot, &axes);
    for (index, (curve, colour)) in (0u32..).zip(plot.curves.iter().zip(COLOURS)) {
        let x = 20.0 + f64::from(index) * 210.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"50\">{}</text>",
            x + 18.0,
            curve.label
        );
        draw_curve(&mut svg, curve, colour, &axes);
    }
    svg += "</svg>\n";
    svg
}

/// Lines across with their values, and the places that points stand at.
fn draw_grid(svg: &mut String, plot: &Plot, axes: &Axes) {
    for step in 0..=STEPS {
        let value = axes.top * f64::from(step) / f64::from(STEPS);
        let y = axes.y(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#dee2e6\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"11\">{}</text>",
            LEFT - 8.0,
            y + 4.0,
            plot.unit.show(value)
        );
    }
    let mut places: Vec<f64> = plot.points().map(|(x, _)| x).collect();
    places.sort_by(f64::total_cmp);
    let mut last = f64::NEG_INFINITY;
    for place in places {
        let x = axes.x(place);
        // Not over one another.
        if x - last < 44.0 {
            continue;
        }
        last = x;
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\">{place:.0}</text>",
            BOTTOM + 18.0
        );
    }
}

fn draw_curve(svg: &mut String, curve: &Curve, colour: &str, axes: &Axes) {
    let mut path = String::new();
    for &(x, y) in &curve.points {
        let (x, y) = (axes.x(x), axes.y(y));
        let _ = write!(path, "{x:.1},{y:.1} ");
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        path.trim_end()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_where_they_belong() {
        let plot = Plot::example();
        let axes = Axes::of(&plot);
        // From 0, which stands for 10^0.3, to 10^3.
        let check = |found: f64, expected: f64| assert!((found - expected).abs() < 0.1, "{found}");
        check(axes.x(0.0), LEFT);
        check(axes.x(10.0), LEFT + (RIGHT - LEFT) * 0.7 / 2.7);
        check(axes.x(1000.0), RIGHT);
        check(axes.y(0.0), BOTTOM);
        // Four steps of 25 reach to 100.
        check(axes.y(100.0), TOP);
        let svg = draw(&plot);
        assert_eq!(svg.matches("<circle").count(), 4);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("qcow2 over NBD") && svg.contains(">1000</text>"), "{svg}");
        assert!(svg.contains(">100/s</text>"), "{svg}");
    }

    #[test]
    fn steps_are_round_numbers() {
        for (value, expected) in [(0.9, 1.0), (1.0, 1.0), (21.0, 25.0), (6948.0, 10_000.0)] {
            assert_eq!(round_up(value), expected, "{value}");
        }
    }

    #[test]
    fn few_points_are_drawn_too() {
        for points in [vec![], vec![(0.0, 0.0)], vec![(5.0, 7.0)]] {
            let curves = vec![Curve { points, ..Curve::new("ours") }];
            let svg = draw(&Plot { curves, ..Plot::example() });
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}

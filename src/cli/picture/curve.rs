//! How well something is read at each layer: a curve with its interval, the control task and the majority, as PNG and as a page.

use super::{
    canvas::{CHAR_HEIGHT, CHAR_WIDTH, Canvas, Direction},
    png::{PictureError, encode},
};

const INK: [u8; 3] = [30, 30, 30];
const FAINT: [u8; 3] = [150, 150, 150];
const CURVE: [u8; 3] = [31, 119, 180];
const BAND: [u8; 3] = [198, 219, 239];
const CONTROL: [u8; 3] = [214, 96, 77];
const WIDTH: usize = 640;
const HEIGHT: usize = 320;
const LEFT: usize = 60;
/// Below the curve: a line of names, or as much as names take that run down.
const BOTTOM: usize = 40;
/// Longest name that runs down, in characters.
const DOWN: usize = 32;

/// One layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Point {
    /// Name of the hook point, short.
    pub label: String,
    /// Accuracy or R squared.
    pub value: f64,
    /// Its interval.
    pub interval: Option<(f64, f64)>,
    /// The same on the control task.
    pub control: Option<f64>,
}

/// All layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Model, probe.
    pub title: String,
    /// Name of the measure.
    pub measure: String,
    /// What guessing gives.
    pub chance: Option<f64>,
    /// From the first layer up.
    pub points: Vec<Point>,
}

impl Curve {
    /// The scale: from what is least to one.
    fn least(&self) -> f64 {
        let of_points = self.points.iter().flat_map(|p| {
            let low = p.interval.map(|(low, _)| low);
            [Some(p.value), low, p.control]
        });
        let all = of_points.chain([self.chance]).flatten();
        (all.fold(1.0f64, f64::min) * 10.0).floor().max(0.0) / 10.0
    }

    /// Characters of the longest name.
    fn longest(&self) -> usize {
        let names = self.points.iter().map(|p| p.label.chars().count());
        names.max().unwrap_or(0)
    }

    /// From 0 to 1 on the scale.
    fn height(&self, value: f64) -> f64 {
        let least = self.least().min(0.9);
        ((value - least) / (1.0 - least)).clamp(0.0, 1.0)
    }
}

/// A picture.
///
/// # Errors
/// When there is no layer.
pub fn png(curve: &Curve) -> Result<Vec<u8>, PictureError> {
    encode(&canvas(curve)?)
}

fn canvas(curve: &Curve) -> Result<Canvas, PictureError> {
    if curve.points.is_empty() {
        return Err(PictureError::Empty);
    }
    let top = 2 * CHAR_HEIGHT + 16;
    let step = WIDTH / curve.points.len();
    let longest = curve.longest();
    let (names, bottom) = if longest * CHAR_WIDTH <= step {
        (Direction::Across, BOTTOM)
    } else {
        (Direction::Down, longest.min(DOWN) * CHAR_WIDTH + 24)
    };
    let mut canvas = Canvas::new(LEFT + WIDTH + 20, top + HEIGHT + bottom);
    canvas.text(8, 6, &curve.title, Direction::Across, INK);
    let legend = format!(
        "{} (blue), control task (red), chance (grey)",
        curve.measure
    );
    canvas.text(8, 8 + CHAR_HEIGHT, &legend, Direction::Across, FAINT);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // within the picture
    let y = |value: f64| top + ((1.0 - curve.height(value)) * HEIGHT as f64) as usize;
    let x = |at: usize| LEFT + at * step + step / 2;
    for tenth in 0..=10u8 {
        let value = f64::from(tenth) / 10.0;
        if value >= curve.least() {
            canvas.fill(LEFT, y(value), WIDTH, 1, [225, 225, 225]);
            let text = format!("{value:.1}");
            canvas.text(
                8,
                y(value).saturating_sub(CHAR_HEIGHT / 2),
                &text,
                Direction::Across,
                FAINT,
            );
        }
    }
    if let Some(chance) = curve.chance {
        canvas.fill(LEFT, y(chance), WIDTH, 2, FAINT);
    }
    for (at, point) in curve.points.iter().enumerate() {
        if let Some((low, high)) = point.interval {
            let (above, below) = (y(high), y(low));
            canvas.fill(
                x(at).saturating_sub(6),
                above,
                12,
                (below - above).max(1),
                BAND,
            );
        }
    }
    for (at, pair) in curve.points.windows(2).enumerate() {
        line(
            &mut canvas,
            (x(at), y(pair[0].value)),
            (x(at + 1), y(pair[1].value)),
            CURVE,
        );
        if let (Some(a), Some(b)) = (pair[0].control, pair[1].control) {
            line(&mut canvas, (x(at), y(a)), (x(at + 1), y(b)), CONTROL);
        }
    }
    for (at, point) in curve.points.iter().enumerate() {
        canvas.fill(x(at) - 3, y(point.value).saturating_sub(3), 7, 7, CURVE);
        if let Some(control) = point.control {
            canvas.fill(x(at) - 2, y(control).saturating_sub(2), 5, 5, CONTROL);
        }
        let label = super::label(&point.label, DOWN);
        let wide = match names {
            Direction::Across => label.chars().count() * CHAR_WIDTH,
            Direction::Down => CHAR_HEIGHT,
        };
        // Names that run down and stand closer than they are wide are told for as many points as there is room for.
        if step >= wide || at.is_multiple_of(wide.div_ceil(step.max(1))) {
            let left = x(at).saturating_sub(wide / 2);
            canvas.text(left, top + HEIGHT + 8, &label, names, INK);
        }
    }
    Ok(canvas)
}

/// Two pixels wide, column by column.
fn line(canvas: &mut Canvas, from: (usize, usize), to: (usize, usize), colour: [u8; 3]) {
    let across = to.0.saturating_sub(from.0).max(1);
    let at = |step: usize| {
        let (a, b) = (from.1 as f64, to.1 as f64);
        a + (b - a) * step as f64 / across as f64
    };
    for step in 0..across {
        let (low, high) = (at(step).min(at(step + 1)), at(step).max(at(step + 1)));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // within the picture
        let (top, tall) = (low as usize, (high - low).ceil() as usize + 2);
        canvas.fill(from.0 + step, top, 1, tall, colour);
    }
}

/// A page that stands alone: the curve drawn as vectors, the numbers in a table.
pub fn html(curve: &Curve) -> String {
    let n = curve.points.len().max(1) as f64;
    // In the page's letters, which are about as wide as those of the picture.
    let across = curve.longest() * CHAR_WIDTH;
    let down = across > WIDTH / curve.points.len().max(1);
    let room = if down { across } else { 20 };
    let x = |at: usize| LEFT as f64 + (at as f64 + 0.5) * WIDTH as f64 / n;
    let y = |value: f64| 20.0 + (1.0 - curve.height(value)) * HEIGHT as f64;
    let path = |values: Vec<(usize, f64)>, colour: &str| {
        let points: Vec<String> = values
            .iter()
            .map(|(at, v)| format!("{:.1},{:.1}", x(*at), y(*v)))
            .collect();
        format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            points.join(" ")
        )
    };
    let mut drawing = String::new();
    for tenth in 0..=10u8 {
        let value = f64::from(tenth) / 10.0;
        if value >= curve.least() {
            let at = y(value);
            drawing.push_str(&format!(
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"20\" y=\"{:.1}\">{value:.1}</text>",
                LEFT + WIDTH,
                at + 4.0
            ));
        }
    }
    if let Some(chance) = curve.chance {
        drawing.push_str(&format!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#888\" stroke-dasharray=\"6 4\"/>",
            LEFT + WIDTH,
            y(chance)
        ));
    }
    let mut rows = String::new();
    for (at, point) in curve.points.iter().enumerate() {
        if let Some((low, high)) = point.interval {
            drawing.push_str(&format!(
                "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{1:.1}\" y2=\"{2:.1}\" stroke=\"#c6dbef\" stroke-width=\"10\"/>",
                x(at),
                y(low),
                y(high)
            ));
        }
        let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.3}"));
        let interval = point
            .interval
            .map_or(String::new(), |(a, b)| format!("{a:.3} to {b:.3}"));
        let name = escaped(&point.label);
        rows.push_str(&format!(
            "<tr><td>{name}</td><td>{:.3}</td><td>{interval}</td><td>{}</td></tr>",
            point.value,
            number(point.control)
        ));
    }
    let controls = curve.points.iter().enumerate();
    let controls = controls
        .filter_map(|(at, p)| Some((at, p.control?)))
        .collect();
    drawing.push_str(&path(controls, "#d6604d"));
    let values = curve.points.iter().enumerate().map(|(at, p)| (at, p.value));
    drawing.push_str(&path(values.collect(), "#1f77b4"));
    for (at, point) in curve.points.iter().enumerate() {
        drawing.push_str(&format!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"#1f77b4\"><title>{}: {:.3}</title></circle><text x=\"{0:.1}\" y=\"{4}\" {turn}>{2}</text>",
            x(at),
            y(point.value),
            escaped(&point.label),
            point.value,
            HEIGHT + 45,
            turn = if down {
                format!(
                    "text-anchor=\"start\" transform=\"rotate(45 {:.1} {})\"",
                    x(at),
                    HEIGHT + 45
                )
            } else {
                "text-anchor=\"middle\"".to_owned()
            },
        ));
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n<style>body{{font:14px system-ui;margin:2em}}td,th{{padding:2px 12px;text-align:right}}td:first-child{{text-align:left}}svg text{{font:11px system-ui;fill:#555}}</style>\n<h1>{title}</h1>\n<p>{measure} <b style=\"color:#1f77b4\">of the probe</b> with its 95 % interval, <b style=\"color:#d6604d\">on the control task</b>, and by chance (dashed).</p>\n<svg width=\"{}\" height=\"{}\">{drawing}</svg>\n<table><tr><th>hook point</th><th>{measure}</th><th>interval</th><th>control</th></tr>{rows}</table>\n</html>\n",
        LEFT + WIDTH + room,
        HEIGHT + 40 + room,
        title = escaped(&curve.title),
        measure = escaped(&curve.measure),
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        Curve {
            title: "m <probe>".into(),
            measure: "accuracy".into(),
            chance: Some(0.5),
            points: [0.6, 0.8, 0.9]
                .iter()
                .enumerate()
                .map(|(at, value)| Point {
                    label: at.to_string(),
                    value: *value,
                    interval: Some((value - 0.05, value + 0.05)),
                    control: Some(0.5),
                })
                .collect(),
        }
    }

    #[test]
    fn higher_is_better_and_the_scale_begins_below_chance() {
        let curve = curve();
        assert!((curve.least() - 0.5).abs() < 1e-9);
        assert!(curve.height(0.9) > curve.height(0.6));
        let drawn = canvas(&curve).unwrap();
        let blue = (0..drawn.height).filter(|y| drawn.pixel(LEFT + WIDTH / 2, *y) == Some(CURVE));
        assert!(blue.count() > 0, "the curve passes the middle");
        assert!(png(&Curve::default()).is_err());
    }

    /// Where there is ink beneath the curve.
    fn ink_below(curve: &Curve) -> usize {
        let drawn = canvas(curve).unwrap();
        let top = 2 * CHAR_HEIGHT + 16 + HEIGHT + 2;
        let below = (top..drawn.height).flat_map(|y| (0..drawn.width).map(move |x| (x, y)));
        below
            .filter(|(x, y)| drawn.pixel(*x, *y) == Some(INK))
            .count()
    }

    #[test]
    fn names_that_do_not_fit_run_down_and_are_whole() {
        let mut few = curve();
        few.points
            .iter_mut()
            .for_each(|p| p.label = "1 normalized_resid_post".into());
        let mut many = few.clone();
        many.points = (0..12).map(|_| few.points[0].clone()).collect();
        // The same letters, four times as often: none is cut.
        assert_eq!(ink_below(&many), 4 * ink_below(&few));
        assert!(canvas(&many).unwrap().height > canvas(&few).unwrap().height);
        assert!(html(&many).contains("rotate(45") && !html(&few).contains("rotate(45"));
    }

    #[test]
    fn a_page_is_escaped_and_has_every_layer() {
        let page = html(&curve());
        assert!(page.contains("m &lt;probe&gt;") && !page.contains("<probe>"));
        assert_eq!(page.matches("<circle").count(), 3);
    }
}

//! What is known of a stored probe: `probe.json`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::methods::reduce::Pooling;

/// Version of the files. Another one is refused.
pub const FORMAT: u32 = 1;

/// What makes probes.
pub const MADE_BY: &str = concat!("introspectd ", env!("CARGO_PKG_VERSION"));

/// Most classes.
pub const MOST_LABELS: usize = 1024;
/// Longest name of a class, in bytes.
pub const LABEL_LIMIT: usize = 256;
/// Longest name of a hook point, in bytes.
const HOOK_LIMIT: usize = 1024;
/// How far sums of parts of a whole may round away from it.
const ROUNDING: f64 = 1e-9;

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

/// Reads a description.
///
/// # Errors
/// What is wrong with it.
pub fn read(bytes: &[u8]) -> Result<Card, String> {
    let card: Card = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    card.check()?;
    Ok(card)
}

/// Writes a description: a line for each field, the numbers of a matrix on one.
///
/// # Errors
/// None that a [`Card`] gives.
pub fn write(card: &Card) -> serde_json::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut to = serde_json::Serializer::with_formatter(&mut bytes, Lines::default());
    card.serialize(&mut to)?;
    Ok(bytes)
}

/// Objects as [`PrettyFormatter`] has them, arrays on one line.
#[derive(Default)]
struct Lines(PrettyFormatter<'static>);

impl Formatter for Lines {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.begin_object(to)
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_object(to)
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(to, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.begin_object_value(to)
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_object_value(to)
    }
}

/// Probes of one name, one for each hook point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    /// [`FORMAT`].
    pub format: u32,
    /// Its name.
    pub name: String,
    /// Name of the model.
    pub model: String,
    /// Fingerprint of the model that it was trained on.
    pub fingerprint: String,
    /// What was trained.
    pub kind: Kind,
    /// With which options, by their names: `c`, `alpha`, `hidden`, `test_fraction`.
    #[serde(default)]
    pub options: BTreeMap<String, f64>,
    /// Names of the classes, in the order of their scores; empty for numbers.
    pub labels: Vec<String>,
    /// How positions become one vector; none where each token is scored.
    pub pooling: Option<Pooling>,
    /// The hook point that is scored unless another is named.
    pub best: String,
    /// One for each hook point, from the first layer up.
    pub reports: Vec<Report>,
    /// Examples that were trained on.
    pub train_examples: u64,
    /// Examples that were held out.
    pub test_examples: u64,
    /// Names the split.
    pub split: String,
    /// Where draws began.
    pub seed: u64,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Version of introspectd that made it.
    pub made_by: String,
    /// The file beside it that holds the weights.
    pub tensors: TensorFile,
}

impl Card {
    /// Whether it makes sense, and can be written: JSON has no number that is not finite.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!(
                "its format is {}, this daemon reads {FORMAT}",
                self.format
            ));
        }
        check_labels(&self.labels)?;
        for (name, value) in &self.options {
            finite(&format!("its option \"{name}\""), *value)?;
        }
        let mut hooks = BTreeSet::new();
        for report in &self.reports {
            let of = |why| format!("its report of \"{}\": {why}", report.hook);
            if !hooks.insert(&report.hook) {
                return Err(of("it has two".to_owned()));
            }
            report.check(self.labels.len()).map_err(of)?;
        }
        if !hooks.contains(&self.best) {
            return Err("its best hook point is none of its own".to_owned());
        }
        Ok(())
    }

    /// Without what grows with the square of the classes or with the steps of a curve: for lists.
    #[must_use]
    pub fn brief(mut self) -> Self {
        for report in &mut self.reports {
            if let Some(classes) = &mut report.classes {
                classes.confusion = Vec::new();
                classes.learning_curve = Vec::new();
            }
            if let Some(numbers) = &mut report.numbers {
                numbers.learning_curve = Vec::new();
            }
        }
        self
    }
}

/// Names of classes: none empty, none twice.
fn check_labels(labels: &[String]) -> Result<(), String> {
    if labels.len() > MOST_LABELS {
        return Err(format!(
            "it has {} labels: at most {MOST_LABELS} are read",
            labels.len()
        ));
    }
    let mut seen = BTreeSet::new();
    for (at, label) in labels.iter().enumerate() {
        if label.is_empty() || label.len() > LABEL_LIMIT {
            return Err(format!(
                "its label {at} has {} bytes: a label has 1 to {LABEL_LIMIT}",
                label.len()
            ));
        }
        if !seen.insert(label) {
            return Err(format!("its label \"{label}\" stands there twice"));
        }
    }
    Ok(())
}

fn finite(what: &str, value: f64) -> Result<(), String> {
    if value.is_finite() {
        return Ok(());
    }
    Err(format!("{what} is {value}, which is not finite"))
}

/// Each within its bounds, where it is there.
fn within(bounds: (f64, f64), named: &[(&str, Option<f64>)]) -> Result<(), String> {
    let (low, high) = bounds;
    for (name, value) in named {
        let Some(value) = *value else { continue };
        finite(name, value)?;
        if value < low - ROUNDING || value > high + ROUNDING {
            return Err(format!(
                "{name} is {value}, and lies within {low} and {high}"
            ));
        }
    }
    Ok(())
}

/// Of numbers that may be any.
const ANY: (f64, f64) = (f64::MIN, f64::MAX);
/// Of a part of a whole.
const PART: (f64, f64) = (0.0, 1.0);

fn check_curve(bounds: (f64, f64), points: &[(u64, f64)]) -> Result<(), String> {
    points
        .iter()
        .try_for_each(|(_, value)| within(bounds, &[("learning_curve", Some(*value))]))
}

/// A file of weights.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorFile {
    /// Its name.
    pub file: String,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
}

/// What was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Multinomial logistic regression.
    Logistic,
    /// Ridge regression.
    Ridge,
    /// Difference of means.
    MeanDifference,
    /// First principal component.
    Pca,
    /// One hidden layer.
    Mlp,
}

impl Kind {
    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Logistic => "logistic",
            Kind::Ridge => "ridge",
            Kind::MeanDifference => "mean_difference",
            Kind::Pca => "pca",
            Kind::Mlp => "mlp",
        }
    }
}

/// How good the probe of one hook point is, on the examples that were held out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Canonical name of the hook point.
    pub hook: String,
    /// Its layer, where it has one.
    pub layer: Option<usize>,
    /// For classes.
    pub classes: Option<ClassMetrics>,
    /// For numbers.
    pub numbers: Option<NumberMetrics>,
    /// For directions that nothing judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// Steps of the optimiser.
    pub iterations: usize,
    /// Whether it converged.
    pub converged: bool,
    /// The C that cross-validation chose.
    pub chosen_c: Option<f64>,
    /// Seconds that fitting and judging took.
    pub seconds: f64,
    /// What the caller should know.
    pub notes: Vec<String>,
}

/// Measures of a classifier; what was not asked for is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // documented in the proto, field by field
pub struct ClassMetrics {
    pub accuracy: f64,
    pub accuracy_low: f64,
    pub accuracy_high: f64,
    pub macro_f1: f64,
    pub auc: Option<f64>,
    pub majority: f64,
    pub control_accuracy: Option<f64>,
    pub selectivity: Option<f64>,
    pub calibration_error: Option<f64>,
    pub confusion: Vec<u64>,
    pub codelength_bits: Option<f64>,
    pub compression: Option<f64>,
    pub learning_curve: Vec<(u64, f64)>,
    pub train_accuracy: f64,
}

/// Measures of a regression.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // documented in the proto, field by field
pub struct NumberMetrics {
    pub r_squared: f64,
    pub mean_squared_error: f64,
    pub spearman: f64,
    pub control_r_squared: Option<f64>,
    pub selectivity: Option<f64>,
    pub train_r_squared: f64,
    #[serde(default)]
    pub r_squared_low: f64,
    #[serde(default)]
    pub r_squared_high: f64,
    #[serde(default)]
    pub learning_curve: Vec<(u64, f64)>,
}

/// What is known of a direction that was fitted on all examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // documented in the proto, field by field
pub struct Direction {
    pub length: f64,
    pub separation: Option<f64>,
}

impl Report {
    /// Whether it can be of a probe of so many classes, none for numbers.
    fn check(&self, classes: usize) -> Result<(), String> {
        let Self {
            hook,
            layer: _,
            classes: of_classes,
            numbers,
            direction,
            iterations: _,
            converged: _,
            chosen_c,
            seconds,
            notes: _,
        } = self;
        if hook.is_empty() || hook.len() > HOOK_LIMIT {
            return Err(format!(
                "the name of a hook point has 1 to {HOOK_LIMIT} bytes, this one {}",
                hook.len()
            ));
        }
        within(ANY, &[("chosen_c", *chosen_c), ("seconds", Some(*seconds))])?;
        if of_classes.is_some() && classes == 0 {
            return Err("it judges classes, and the probe has none".to_owned());
        }
        if numbers.is_some() && classes > 0 {
            return Err("it judges numbers, and the probe has classes".to_owned());
        }
        of_classes.as_ref().map_or(Ok(()), |m| m.check(classes))?;
        numbers.as_ref().map_or(Ok(()), NumberMetrics::check)?;
        direction.as_ref().map_or(Ok(()), Direction::check)
    }

    /// By what hook points are compared: accuracy, R squared, or separation.
    pub fn merit(&self) -> f64 {
        let classes = self.classes.as_ref().map(|c| c.accuracy);
        let judged = classes.or(self.numbers.as_ref().map(|n| n.r_squared));
        let merit = judged.or(self.direction.and_then(|d| d.separation));
        merit.unwrap_or(f64::NEG_INFINITY)
    }
}

impl ClassMetrics {
    fn check(&self, classes: usize) -> Result<(), String> {
        let Self {
            accuracy,
            accuracy_low,
            accuracy_high,
            macro_f1,
            auc,
            majority,
            control_accuracy,
            selectivity,
            calibration_error,
            confusion,
            codelength_bits,
            compression,
            learning_curve,
            train_accuracy,
        } = self;
        let parts = [
            ("accuracy", Some(*accuracy)),
            ("accuracy_low", Some(*accuracy_low)),
            ("accuracy_high", Some(*accuracy_high)),
            ("macro_f1", Some(*macro_f1)),
            ("auc", *auc),
            ("majority", Some(*majority)),
            ("control_accuracy", *control_accuracy),
            ("calibration_error", *calibration_error),
            ("train_accuracy", Some(*train_accuracy)),
        ];
        within(PART, &parts)?;
        within((-1.0, 1.0), &[("selectivity", *selectivity)])?;
        let sizes = [
            ("codelength_bits", *codelength_bits),
            ("compression", *compression),
        ];
        within((0.0, f64::MAX), &sizes)?;
        if !confusion.is_empty() && confusion.len() != classes * classes {
            return Err(format!(
                "confusion has {} counts, and {classes} classes have {}",
                confusion.len(),
                classes * classes
            ));
        }
        check_curve(PART, learning_curve)
    }
}

impl NumberMetrics {
    fn check(&self) -> Result<(), String> {
        let Self {
            r_squared,
            mean_squared_error,
            spearman,
            control_r_squared,
            selectivity,
            train_r_squared,
            r_squared_low,
            r_squared_high,
            learning_curve,
        } = self;
        // Whoever knows less than the mean has an R squared below nothing.
        let determined = [
            ("r_squared", Some(*r_squared)),
            ("control_r_squared", *control_r_squared),
            ("selectivity", *selectivity),
            ("train_r_squared", Some(*train_r_squared)),
            ("r_squared_low", Some(*r_squared_low)),
            ("r_squared_high", Some(*r_squared_high)),
        ];
        within((f64::MIN, 1.0), &determined)?;
        within((-1.0, 1.0), &[("spearman", Some(*spearman))])?;
        let error = [("mean_squared_error", Some(*mean_squared_error))];
        within((0.0, f64::MAX), &error)?;
        check_curve((f64::MIN, 1.0), learning_curve)
    }
}

impl Direction {
    fn check(&self) -> Result<(), String> {
        let Self { length, separation } = self;
        within((0.0, f64::MAX), &[("length", Some(*length))])?;
        within(ANY, &[("separation", *separation)])
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A description that makes sense, of these hook points.
    pub(in crate::methods::probe) fn card(labels: &[&str], reports: Vec<Report>) -> Card {
        Card {
            format: FORMAT,
            name: "p".to_owned(),
            model: "m".to_owned(),
            fingerprint: "f".to_owned(),
            kind: Kind::Logistic,
            options: BTreeMap::new(),
            labels: labels.iter().map(|l| (*l).to_owned()).collect(),
            pooling: Some(Pooling::Mean),
            best: reports.first().map_or(String::new(), |r| r.hook.clone()),
            reports,
            train_examples: 1,
            test_examples: 1,
            split: String::new(),
            seed: 0,
            created: 0,
            made_by: String::new(),
            tensors: TensorFile::default(),
        }
    }

    fn report(classes: Option<ClassMetrics>, numbers: Option<NumberMetrics>) -> Report {
        Report {
            hook: "h".to_owned(),
            classes,
            numbers,
            ..Report::default()
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let judged = |m: ClassMetrics| card(&["a", "b"], vec![report(Some(m), None)]);
        let numbers = |m: NumberMetrics| card(&[], vec![report(None, Some(m))]);
        judged(ClassMetrics::default()).check().unwrap();
        numbers(NumberMetrics::default()).check().unwrap();
        let of_labels = |labels: &[&str]| card(labels, vec![report(None, None)]);
        let long = "a".repeat(LABEL_LIMIT + 1);
        let many: Vec<String> = (0..=MOST_LABELS).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (card, part) in [
            (of_labels(&["a", "a"]), "\"a\" stands there twice"),
            (of_labels(&["a", ""]), "label 1 has 0 bytes"),
            (of_labels(&["a", &long]), "label 1 has 257 bytes"),
            (of_labels(&many), "1025 labels"),
            (card(&["a", "b"], Vec::new()), "best hook point"),
            (
                card(&["a", "b"], vec![report(None, None); 2]),
                "\"h\": it has two",
            ),
            (
                card(&["a", "b"], vec![Report::default()]),
                "1 to 1024 bytes",
            ),
            (
                judged(ClassMetrics {
                    accuracy: 7.0,
                    ..ClassMetrics::default()
                }),
                "accuracy is 7",
            ),
            (
                judged(ClassMetrics {
                    auc: Some(f64::NAN),
                    ..ClassMetrics::default()
                }),
                "auc is NaN, which is not finite",
            ),
            (
                judged(ClassMetrics {
                    confusion: vec![1; 3],
                    ..ClassMetrics::default()
                }),
                "confusion has 3 counts, and 2 classes have 4",
            ),
            (
                judged(ClassMetrics {
                    learning_curve: vec![(1, 0.5), (2, 1.5)],
                    ..ClassMetrics::default()
                }),
                "learning_curve is 1.5",
            ),
            (
                numbers(NumberMetrics {
                    mean_squared_error: f64::INFINITY,
                    ..NumberMetrics::default()
                }),
                "mean_squared_error is inf",
            ),
            (
                card(&[], vec![report(Some(ClassMetrics::default()), None)]),
                "the probe has none",
            ),
            (
                card(
                    &["a", "b"],
                    vec![report(None, Some(NumberMetrics::default()))],
                ),
                "the probe has classes",
            ),
        ] {
            let why = card.check().unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn sums_that_round_are_no_mistake() {
        let rounded = ClassMetrics {
            accuracy_high: 1.0 + f64::EPSILON,
            accuracy_low: -f64::EPSILON,
            ..ClassMetrics::default()
        };
        let told = card(&["a", "b"], vec![report(Some(rounded), None)]);
        told.check().unwrap();
    }

    #[test]
    fn a_description_reads_as_it_was_written_and_a_matrix_takes_one_line() {
        let judged = ClassMetrics {
            confusion: vec![1, 0, 2, 3],
            learning_curve: vec![(8, 0.5), (16, 1.0)],
            ..ClassMetrics::default()
        };
        let made = card(&["a", "b"], vec![report(Some(judged), None)]);
        let bytes = write(&made).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.contains("\n  \"labels\": [\"a\", \"b\"],\n"), "{text}");
        assert!(text.contains("\"confusion\": [1, 0, 2, 3],\n"), "{text}");
        assert!(text.contains("[[8, 0.5], [16, 1.0]]"), "{text}");
        assert_eq!(read(&bytes).unwrap(), made);
    }

    #[test]
    fn what_is_brief_has_no_matrices_and_no_curves() {
        let judged = ClassMetrics {
            accuracy: 0.5,
            confusion: vec![1; 4],
            learning_curve: vec![(8, 0.5)],
            ..ClassMetrics::default()
        };
        let brief = card(&["a", "b"], vec![report(Some(judged), None)]).brief();
        let expected = ClassMetrics {
            accuracy: 0.5,
            ..ClassMetrics::default()
        };
        assert_eq!(brief.reports[0].classes.as_ref(), Some(&expected));
    }

    #[test]
    fn descriptions_that_know_of_no_direction_still_read_and_are_still_written() {
        let judged = serde_json::to_value(Report::default()).unwrap();
        assert!(judged.get("direction").is_none(), "{judged}");
        let read: Report = serde_json::from_value(judged).unwrap();
        assert_eq!(read, Report::default());
        let direction = Report {
            direction: Some(Direction {
                length: 2.0,
                separation: None,
            }),
            ..Report::default()
        };
        let told = serde_json::to_value(&direction).unwrap();
        let read: Report = serde_json::from_value(told).unwrap();
        assert_eq!(read, direction);
    }
}

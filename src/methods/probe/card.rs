//! What is known of a stored probe: `probe.json`.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::methods::reduce::Pooling;

/// Version of the files. Another one is refused.
pub const FORMAT: u32 = 1;

/// What makes probes.
pub const MADE_BY: &str = concat!("introspectd ", env!("CARGO_PKG_VERSION"));

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
    if card.format != FORMAT {
        return Err(format!(
            "its format is {}, this daemon reads {FORMAT}",
            card.format
        ));
    }
    if !card.reports.iter().any(|r| r.hook == card.best) {
        return Err("its best hook point is none of its own".to_owned());
    }
    Ok(card)
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
    /// By what hook points are compared: accuracy, R squared, or separation.
    pub fn merit(&self) -> f64 {
        let classes = self.classes.as_ref().map(|c| c.accuracy);
        let judged = classes.or(self.numbers.as_ref().map(|n| n.r_squared));
        let merit = judged.or(self.direction.and_then(|d| d.separation));
        merit.unwrap_or(f64::NEG_INFINITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

//! A probe that can score: weights of one hook point, checked to fit together.

use super::{
    card::{Card, Kind},
    store::Weights,
};
use crate::{engine::EngineError, tensor::Tensor};

/// What a probe says of one vector.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Says {
    /// The class; empty for numbers.
    pub label: String,
    /// Of the classes; empty for numbers and for kinds that give none.
    pub probabilities: Vec<f32>,
    /// `weight x + bias`.
    pub values: Vec<f32>,
    /// How far the best score is above the second.
    pub margin: Option<f32>,
    /// Length along the direction, of probes with one row of weights.
    pub projection: Option<f32>,
}

impl Says {
    /// Whether every number of it is one.
    pub fn is_finite(&self) -> bool {
        let single = self.margin.iter().chain(&self.projection);
        let numbers = self.probabilities.iter().chain(&self.values).chain(single);
        numbers.into_iter().all(|v| v.is_finite())
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Scorer {
    kind: Kind,
    labels: Vec<String>,
    hidden: Option<Affine>,
    output: Affine,
    /// Length of the only row of weights.
    length: Option<f64>,
}

/// `weight x + bias`.
#[derive(Clone, Debug, PartialEq)]
struct Affine {
    /// `[output, input]`
    weight: Vec<f32>,
    bias: Vec<f32>,
    width: usize,
}

impl Affine {
    fn of(weights: &Weights, hook: &str, part: &str) -> Result<Self, String> {
        let named = |name: String| {
            let found = weights.get(&name);
            found.ok_or_else(|| format!("it has no \"{name}\""))
        };
        let weight = named(format!("{hook}/{part}weight"))?;
        let bias = named(format!("{hook}/{part}bias"))?;
        let numbers = |t: &Tensor| {
            t.to_f32()
                .map(|v| v.into_owned())
                .map_err(|e| e.to_string())
        };
        match (weight.shape(), bias.shape()) {
            ([outputs, width], [biases]) if outputs == biases && *outputs > 0 && *width > 0 => {
                Ok(Self {
                    weight: numbers(weight)?,
                    bias: numbers(bias)?,
                    width: *width,
                })
            }
            (weight, bias) => Err(format!(
                "\"{hook}/{part}weight\" is {weight:?} and its bias {bias:?}"
            )),
        }
    }

    fn at(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.width).zip(&self.bias);
        rows.map(|(row, bias)| dot(row, x) + bias).collect()
    }
}

/// In several sums, so that they can be made side by side.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0f32; LANES];
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    let (whole_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

impl Scorer {
    /// Of one hook point of a probe.
    ///
    /// # Errors
    /// How weights do not fit together.
    pub fn of(card: &Card, weights: &Weights, hook: &str) -> Result<Self, String> {
        let output = Affine::of(weights, hook, "")?;
        let hidden = match card.kind {
            Kind::Mlp => Some(Affine::of(weights, hook, "hidden_")?),
            Kind::Logistic | Kind::Ridge | Kind::MeanDifference | Kind::Pca => None,
        };
        if hidden
            .as_ref()
            .is_some_and(|h| h.bias.len() != output.width)
        {
            return Err("its two layers do not fit together".to_owned());
        }
        let outputs = output.bias.len();
        let fits = match card.labels.len() {
            0 => outputs == 1,
            // Of one class there is nothing to say.
            1 => false,
            2 => outputs <= 2,
            classes => outputs == classes,
        };
        if !fits {
            return Err(format!(
                "it has {outputs} scores for {} classes",
                card.labels.len()
            ));
        }
        let length = (outputs == 1 && hidden.is_none()).then(|| {
            let squares = output.weight.iter().map(|w| f64::from(*w).powi(2));
            squares.sum::<f64>().sqrt()
        });
        Ok(Self {
            kind: card.kind,
            labels: card.labels.clone(),
            hidden,
            output,
            length,
        })
    }

    /// Features of the vectors that it scores.
    pub fn width(&self) -> usize {
        self.hidden.as_ref().unwrap_or(&self.output).width
    }

    /// The class's number and name, the weights and the bias that score it: of two classes the second unless said, of more the one that
    /// is named. The score of the first of two is minus that of the second, where they share weights.
    ///
    /// # Errors
    /// [`EngineError::FailedPrecondition`] for an MLP, which has no such weights; beneath the caller's field for a `label` that there is not.
    pub fn readout(&self, label: Option<&str>) -> Result<((u32, String), Vec<f32>), EngineError> {
        if self.hidden.is_some() {
            return Err(EngineError::precondition(
                "the probe has a hidden layer, and its score is no direction of the model's: train a linear kind",
            ));
        }
        let at = match label {
            Some(label) => self.labels.iter().position(|l| l == label).ok_or_else(|| {
                let message = if self.labels.is_empty() {
                    "is given, and the probe gives a number: leave it out".to_owned()
                } else {
                    let labels = self.labels.join(", ");
                    format!("\"{label}\" is none of the probe's labels: {labels}")
                };
                EngineError::invalid("label", message)
            })?,
            None if self.labels.len() > 2 => {
                return Err(EngineError::invalid(
                    "label",
                    format!("is needed: the probe scores {}", self.labels.join(", ")),
                ));
            }
            None => self.labels.len().saturating_sub(1),
        };
        let shared = self.output.bias.len() == 1;
        let row = if shared { 0 } else { at };
        let sign = if shared && at + 1 < self.labels.len() {
            -1.0
        } else {
            1.0
        };
        let width = self.output.width;
        let weights = &self.output.weight[row * width..(row + 1) * width];
        let all = weights.iter().chain(&self.output.bias[row..=row]);
        let name = self.labels.get(at).cloned().unwrap_or_default();
        let number = u32::try_from(at).map_err(EngineError::internal)?;
        Ok(((number, name), all.map(|w| sign * w).collect()))
    }

    /// What it says of a vector of [`Scorer::width`] features.
    pub fn score(&self, x: &[f32]) -> Says {
        let inner = self.hidden.as_ref().map(|hidden| {
            let mut made = hidden.at(x);
            // What is no number stays none: `max` would make 0 of it.
            let below = made.iter_mut().filter(|v| **v < 0.0);
            below.for_each(|v| *v = 0.0);
            made
        });
        let values = self.output.at(inner.as_deref().unwrap_or(x));
        #[allow(clippy::cast_possible_truncation)] // as precise as the weights
        let projection = self
            .length
            .filter(|length| *length > 0.0)
            .map(|length| (f64::from(values[0] - self.output.bias[0]) / length) as f32);
        if self.labels.is_empty() {
            return Says {
                values,
                projection,
                ..Says::default()
            };
        }
        let logits = match values[..] {
            [second] => vec![0.0, second],
            _ => values.clone(),
        };
        let order = crate::methods::predict::best(&logits, 2);
        let label = order.first().map_or(0, |(at, _)| *at as usize);
        let margin = match order[..] {
            [(a, _), (b, _), ..] => Some(logits[a as usize] - logits[b as usize]),
            _ => None,
        };
        let probabilities = match self.kind {
            Kind::Logistic | Kind::Mlp => softmax(&logits),
            Kind::Ridge | Kind::MeanDifference | Kind::Pca => Vec::new(),
        };
        Says {
            label: self.labels.get(label).cloned().unwrap_or_default(),
            probabilities,
            values,
            margin,
            projection,
        }
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|v| f64::from(v - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    #[allow(clippy::cast_possible_truncation)] // probabilities
    powers.iter().map(|p| (p / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(kind: Kind, labels: &[&str]) -> Card {
        Card {
            kind,
            ..super::super::card::tests::card(labels, Vec::new())
        }
    }

    fn weights(parts: &[(&str, &[usize], &[f32])]) -> Weights {
        let tensor = |(name, shape, values): &(&str, &[usize], &[f32])| {
            let tensor = Tensor::from_f32(shape.to_vec(), values).unwrap();
            ((*name).to_owned(), tensor)
        };
        parts.iter().map(tensor).collect()
    }

    #[test]
    fn one_row_of_weights_scores_the_second_of_two_classes() {
        let weights = weights(&[
            ("h/weight", &[1, 2], &[3.0, 4.0]),
            ("h/bias", &[1], &[-1.0]),
        ]);
        let scorer = Scorer::of(&card(Kind::Logistic, &["no", "yes"]), &weights, "h").unwrap();
        let says = scorer.score(&[1.0, 0.5]);
        assert_eq!((says.label.as_str(), &says.values[..]), ("yes", &[4.0][..]));
        assert!((says.probabilities[1] - 1.0 / (1.0 + (-4f32).exp())).abs() < 1e-6);
        assert!(
            (says.projection.unwrap() - 1.0).abs() < 1e-6,
            "5 along 3, 4"
        );
        assert_eq!(says.margin, Some(4.0));
        assert_eq!(scorer.score(&[-1.0, 0.0]).label, "no");
    }

    #[test]
    fn an_mlp_bends_and_classes_have_a_softmax() {
        let weights = weights(&[
            ("h/hidden_weight", &[2, 1], &[1.0, -1.0]),
            ("h/hidden_bias", &[2], &[0.0, 0.0]),
            ("h/weight", &[3, 2], &[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
            ("h/bias", &[3], &[0.0, 0.0, 0.5]),
        ]);
        let scorer = Scorer::of(&card(Kind::Mlp, &["up", "down", "flat"]), &weights, "h").unwrap();
        assert_eq!(scorer.width(), 1);
        assert_eq!(scorer.score(&[2.0]).label, "up");
        assert_eq!(scorer.score(&[-2.0]).label, "down");
        let flat = scorer.score(&[0.1]);
        assert_eq!(flat.label, "flat");
        assert!((flat.probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(flat.projection, None);
    }

    #[test]
    fn what_is_no_number_is_seen_behind_a_layer_as_well() {
        let weights = weights(&[
            ("h/hidden_weight", &[1, 2], &[3e38, -3e38]),
            ("h/hidden_bias", &[1], &[0.0]),
            ("h/weight", &[1, 1], &[1.0]),
            ("h/bias", &[1], &[0.0]),
        ]);
        let scorer = Scorer::of(&card(Kind::Mlp, &["a", "b"]), &weights, "h").unwrap();
        assert!(!scorer.score(&[9.0, 9.0]).is_finite(), "inf - inf");
        assert!(scorer.score(&[0.5, 0.5]).is_finite());
    }

    #[test]
    fn weights_that_do_not_fit_are_told() {
        let ok = weights(&[("h/weight", &[1, 2], &[0.0, 0.0]), ("h/bias", &[1], &[0.0])]);
        for (labels, hook, part) in [
            (&["a", "b", "c"][..], "h", "1 scores for 3 classes"),
            (&["a", "b"][..], "g", "no \"g/weight\""),
        ] {
            let why = Scorer::of(&card(Kind::Logistic, labels), &ok, hook).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn sums_take_every_entry() {
        let a: Vec<f32> = (0u8..19).map(f32::from).collect();
        assert!((dot(&a, &a) - 2109.0).abs() < 1e-3);
    }
}

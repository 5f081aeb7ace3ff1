//! An explanation, put together from its messages and checked against its summary.

use std::collections::BTreeMap;

use indicatif::ProgressBar;
use tonic::transport::Channel;

use crate::{
    cli::{
        answers,
        arrays::{Array, Arrays},
        error::CliError,
    },
    service::wire::introspect::{
        self as pb, attribute_response::Item, attribution_service_client::AttributionServiceClient,
    },
};

/// An explanation.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Explained {
    pub(in crate::cli) header: pb::AttributionHeader,
    pub(in crate::cli) result: pb::AttributionResult,
    /// By name: axes, shape, numbers.
    pub(in crate::cli) tensors: BTreeMap<String, Array>,
    pub(in crate::cli) summary: pb::Summary,
}

/// What gets a score, with it.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Scored {
    pub(in crate::cli) text: String,
    pub(in crate::cli) score: f32,
    pub(in crate::cli) error: Option<f32>,
}

impl Explained {
    /// The scores.
    pub(in crate::cli) fn scores(&self) -> &[f32] {
        self.tensors.get("attributions").map_or(&[], Array::flat)
    }

    /// Names and scores of what is explained, where that is text.
    pub(in crate::cli) fn scored(&self) -> Vec<Scored> {
        let errors = self.tensors.get("error").map(Array::flat);
        let names: Vec<&String> = if self.header.features.is_empty() {
            self.header.tokens.iter().map(|t| &t.text).collect()
        } else {
            self.header.features.iter().map(|f| &f.text).collect()
        };
        let scores = self.scores().iter().enumerate();
        scores
            .map(|(at, score)| Scored {
                text: match names.get(at) {
                    Some(name) if !name.is_empty() => (*name).clone(),
                    Some(_) | None => at.to_string(),
                },
                score: *score,
                error: errors.and_then(|e| e.get(at).copied()),
            })
            .collect()
    }

    /// What is explained, for people: `logit of "positive"`.
    pub(in crate::cli) fn target(&self) -> String {
        target(self.header.quantity(), &self.header.terms)
    }
}

/// A number made of a model's scores, for people: `logit of "positive"`.
pub(in crate::cli) fn target(quantity: pb::Quantity, terms: &[pb::Term]) -> String {
    let quantity = match quantity {
        pb::Quantity::Unspecified | pb::Quantity::Logit => "logit",
        pb::Quantity::LogProbability => "log-probability",
        pb::Quantity::Probability => "probability",
        pb::Quantity::Divergence => return "divergence of the prediction (nats)".to_owned(),
        // Of a probe every position is a term.
        pb::Quantity::Readout => {
            return match terms.first().map_or("", |t| &t.label) {
                "" => "score of the probe".to_owned(),
                label => format!("score of the probe for \"{label}\""),
            };
        }
    };
    let terms: Vec<String> = terms
        .iter()
        .map(|t| {
            let name = if t.label.is_empty() {
                t.index.to_string()
            } else {
                format!("\"{}\"", t.label)
            };
            let place = t.position.map_or(String::new(), |p| format!(" at {p}"));
            let sign = if t.weight < 0.0 { "-" } else { "" };
            format!("{sign}{name}{place}")
        })
        .collect();
    format!("{quantity} of {}", terms.join(", "))
}

/// Asks, and reads the answer to its end. `bar` is drawn on a terminal.
pub(in crate::cli) async fn ask(
    mut client: AttributionServiceClient<Channel>,
    request: pb::AttributeRequest,
    bar: &ProgressBar,
) -> Result<Explained, CliError> {
    let stream = client.attribute(request).await?.into_inner();
    let mut found = Explained::default();
    let mut arrays = Arrays::default();
    let take = |item| {
        match item {
            Item::Header(header) => found.header = header,
            Item::Progress(p) => {
                bar.set_length(p.rows_planned);
                bar.set_position(p.rows_done);
                if let Some(error) = p.error {
                    bar.set_message(format!("error {error:.2e}"));
                }
            }
            Item::Result(result) => found.result = result,
            Item::Tensor(piece) => arrays.take(piece)?,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    found.summary = answers::read(stream, |r| r.item, bar, take).await?;
    found.tensors = arrays.by_name()?;
    Ok(found)
}

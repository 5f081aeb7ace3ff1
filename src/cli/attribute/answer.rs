//! An explanation, put together from its messages and checked against its summary.

use std::collections::BTreeMap;

use indicatif::{ProgressBar, ProgressStyle};
use tonic::transport::Channel;

use crate::{
    cli::error::CliError,
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

/// A tensor of single precision.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Array {
    pub(in crate::cli) axes: Vec<String>,
    pub(in crate::cli) shape: Vec<usize>,
    pub(in crate::cli) values: Vec<f32>,
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
        self.tensors.get("attributions").map_or(&[], |a| &a.values)
    }

    /// Names and scores of what is explained, where that is text.
    pub(in crate::cli) fn scored(&self) -> Vec<Scored> {
        let errors = self.tensors.get("error").map(|a| &a.values);
        let names: Vec<&String> = if self.header.features.is_empty() {
            self.header.tokens.iter().map(|t| &t.text).collect()
        } else {
            self.header.features.iter().map(|f| &f.text).collect()
        };
        let scores = self.scores().iter().enumerate();
        scores
            .map(|(at, score)| Scored {
                text: names
                    .get(at)
                    .map_or_else(|| at.to_string(), |n| (*n).clone()),
                score: *score,
                error: errors.and_then(|e| e.get(at).copied()),
            })
            .collect()
    }

    /// Of a probe every position is a term.
    fn probed(&self) -> String {
        let label = self.header.terms.first().map_or("", |t| &t.label);
        match label {
            "" => "score of the probe".to_owned(),
            label => format!("score of the probe for \"{label}\""),
        }
    }

    /// What is explained, for people: `logit of "positive"`.
    pub(in crate::cli) fn target(&self) -> String {
        let quantity = match self.header.quantity() {
            pb::Quantity::Unspecified | pb::Quantity::Logit => "logit",
            pb::Quantity::LogProbability => "log-probability",
            pb::Quantity::Probability => "probability",
            pb::Quantity::Readout => return self.probed(),
        };
        let terms: Vec<String> = self
            .header
            .terms
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
}

/// Asks, and reads the answer to its end. `bar` is drawn on a terminal.
pub(in crate::cli) async fn ask(
    mut client: AttributionServiceClient<Channel>,
    request: pb::AttributeRequest,
    bar: &ProgressBar,
) -> Result<Explained, CliError> {
    let mut stream = client.attribute(request).await?.into_inner();
    let mut found = Explained::default();
    let mut bytes: BTreeMap<String, (pb::Tensor, Vec<u8>)> = BTreeMap::new();
    let (mut messages, mut size, mut crc) = (0u64, 0u64, 0u32);
    let broken = |why: &str| CliError::new(format!("the answer is broken: {why}"));
    let mut ended = false;
    while let Some(message) = stream.message().await? {
        let item = message
            .item
            .ok_or_else(|| broken("a message holds nothing"))?;
        if ended {
            return Err(broken("it goes on after its summary"));
        }
        let payload = match &item {
            Item::Tensor(t) => Some(t.data.clone()),
            Item::Progress(p) => p.partial.as_ref().map(|t| t.data.clone()),
            Item::Header(_) | Item::Result(_) | Item::Summary(_) => None,
        };
        if let Some(data) = payload {
            size += data.len() as u64;
            crc = crc32c::crc32c_append(crc, &data);
        }
        match item {
            Item::Header(h) => found.header = h,
            Item::Progress(p) => {
                bar.set_length(p.rows_planned);
                bar.set_position(p.rows_done);
                if let Some(error) = p.error {
                    bar.set_message(format!("error {error:.2e}"));
                }
            }
            Item::Result(r) => found.result = r,
            Item::Tensor(t) => {
                let (_, whole) = bytes
                    .entry(t.name.clone())
                    .or_insert((t.clone(), Vec::new()));
                if t.offset != whole.len() as u64 {
                    return Err(broken("pieces of a tensor are missing"));
                }
                whole.extend_from_slice(&t.data);
            }
            Item::Summary(s) => {
                if (s.messages, s.bytes, s.crc32c) != (messages, size, crc) {
                    return Err(broken("its checksum does not fit"));
                }
                found.summary = s;
                ended = true;
            }
        }
        messages += 1;
    }
    bar.finish_and_clear();
    if !ended {
        return Err(CliError::new(
            "the answer is incomplete: the stream ended without its summary",
        )
        .advise("ask again"));
    }
    for (name, (tensor, bytes)) in bytes {
        let numbers = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        let array = Array {
            axes: tensor.axes,
            shape: tensor
                .shape
                .iter()
                .filter_map(|n| usize::try_from(*n).ok())
                .collect(),
            values: numbers.collect(),
        };
        if array.shape.iter().product::<usize>() != array.values.len() {
            return Err(broken("a tensor is not as long as it says"));
        }
        found.tensors.insert(name, array);
    }
    Ok(found)
}

/// Progress in rows, on a terminal.
pub(in crate::cli) fn progress(watched: bool) -> ProgressBar {
    if !watched {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} rows {elapsed} {msg}");
    let bar = ProgressBar::new(0);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

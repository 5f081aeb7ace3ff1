//! A lens, put together from its messages and checked against its summary.

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
        self as pb, analysis_service_client::AnalysisServiceClient, lens_response::Item,
    },
};

/// A lens.
#[derive(Clone, Debug, Default)]
pub(super) struct Lensed {
    pub(super) header: pb::LensHeader,
    pub(super) attribution: Option<pb::DirectAttribution>,
    /// Names by number.
    pub(super) labels: BTreeMap<u32, String>,
    /// By name; whole numbers too.
    pub(super) tensors: BTreeMap<String, Array>,
    pub(super) summary: pb::Summary,
}

impl Lensed {
    /// A tensor, if it came.
    pub(super) fn array(&self, name: &str) -> Option<&Array> {
        self.tensors.get(name)
    }

    /// A label or token by its number.
    pub(super) fn label(&self, index: u32) -> String {
        match self.labels.get(&index) {
            Some(label) if !label.is_empty() => label.clone(),
            Some(_) | None => index.to_string(),
        }
    }

    /// What is followed, for people: `logit of "positive"`.
    pub(super) fn target(&self) -> String {
        let terms = self.header.terms.iter().map(|t| {
            let name = if t.label.is_empty() {
                t.index.to_string()
            } else {
                format!("{:?}", t.label)
            };
            let sign = if t.weight < 0.0 { "-" } else { "" };
            format!("{sign}{name}")
        });
        let terms: Vec<String> = terms.collect();
        format!("logit of {}", terms.join(" "))
    }

    /// What a position is called.
    pub(super) fn position(&self, position: u32) -> String {
        let token = self.header.tokens.get(position as usize);
        match token.filter(|t| !t.text.is_empty()) {
            Some(token) => token.text.clone(),
            None => position.to_string(),
        }
    }

    /// What a state is called: the embeddings, or what a layer leaves.
    pub(super) fn state(&self, at: usize) -> String {
        match at.checked_sub(1) {
            None => "embed".to_owned(),
            Some(layer) => format!("layer {layer}"),
        }
    }
}

/// Asks, and reads the answer to its end. `bar` is drawn on a terminal.
pub(super) async fn ask(
    mut client: AnalysisServiceClient<Channel>,
    request: pb::LensRequest,
    bar: &ProgressBar,
) -> Result<Lensed, CliError> {
    let stream = client.lens(request).await?.into_inner();
    let mut found = Lensed::default();
    let mut arrays = Arrays::default();
    let take = |item| {
        match item {
            Item::Header(header) => found.header = header,
            Item::Progress(p) => {
                bar.set_length(p.rows_planned);
                bar.set_position(p.rows_done);
            }
            Item::Attribution(attribution) => found.attribution = Some(attribution),
            Item::Labels(l) => {
                let named = l.labels.into_iter().map(|l| (l.index, l.label));
                found.labels.extend(named);
            }
            Item::Tensor(piece) => arrays.take(piece)?,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    found.summary = answers::read(stream, |r| r.item, bar, take).await?;
    found.tensors = arrays.by_name()?;
    Ok(found)
}

//! A sweep, put together from its messages.

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
        self as pb, intervention_service_client::InterventionServiceClient, sweep_response::Item,
    },
};

/// What came back.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Swept {
    pub(in crate::cli) header: pb::SweepHeader,
    /// `effects:HOOK`, `normalized:HOOK`, `estimates:HOOK`.
    pub(in crate::cli) tensors: BTreeMap<String, Array>,
    pub(in crate::cli) result: pb::SweepResult,
    pub(in crate::cli) summary: pb::Summary,
}

impl Swept {
    /// What was found of a kind at each hook point that has it, in the order of the graph.
    pub(super) fn of<'a>(&'a self, what: &str) -> Vec<(&'a str, &'a Array)> {
        let found = self.header.hooks.iter().filter_map(|hook| {
            let array = self.tensors.get(&format!("{what}:{hook}"))?;
            Some((hook.as_str(), array))
        });
        found.collect()
    }
}

/// Asks, and reads the answer to its end. `bar` is drawn on a terminal.
pub(in crate::cli) async fn ask(
    mut client: InterventionServiceClient<Channel>,
    request: pb::SweepRequest,
    bar: &ProgressBar,
) -> Result<Swept, CliError> {
    let stream = client.sweep(request).await?.into_inner();
    let mut found = Swept::default();
    let mut arrays = Arrays::default();
    let take = |item| {
        match item {
            Item::Header(header) => {
                bar.set_length(header.rows);
                found.header = header;
            }
            Item::Progress(progress) => {
                bar.set_length(progress.rows_planned);
                bar.set_position(progress.rows_done);
            }
            Item::Tensor(piece) => arrays.take(piece)?,
            Item::Result(result) => found.result = result,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    found.summary = answers::read(stream, |r| r.item, bar, take).await?;
    found.tensors = arrays.by_name()?;
    Ok(found)
}

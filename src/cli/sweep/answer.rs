//! A sweep, put together from its messages.

use std::collections::BTreeMap;

use indicatif::ProgressBar;
use tonic::transport::Channel;

use crate::{
    cli::{
        arrays::{Array, Arrays},
        assemble::Tally,
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
    let mut stream = client.sweep(request).await?.into_inner();
    let mut found = Swept::default();
    let (mut arrays, mut tally, mut ended) = (Arrays::default(), Tally::default(), false);
    while let Some(message) = stream.message().await? {
        match message.item {
            Some(Item::Header(header)) => {
                tally.count(&[]);
                bar.set_length(header.rows);
                found.header = header;
            }
            Some(Item::Progress(progress)) => {
                tally.count(&[]);
                bar.set_length(progress.rows_planned);
                bar.set_position(progress.rows_done);
            }
            Some(Item::Tensor(tensor)) => {
                tally.count(&[&tensor.data]);
                arrays.take(tensor)?;
            }
            Some(Item::Result(result)) => {
                tally.count(&[]);
                found.result = result;
            }
            Some(Item::Summary(summary)) => {
                tally.check(summary.messages, summary.bytes, summary.crc32c)?;
                ended = true;
                found.summary = summary;
            }
            None => {
                return Err(CliError::new(
                    "the answer is broken: a message holds nothing",
                ));
            }
        }
    }
    bar.finish_and_clear();
    if !ended {
        return Err(CliError::new(
            "the answer is incomplete: the stream ended without its summary",
        )
        .advise("ask again"));
    }
    let tensors = arrays.finish()?.into_iter();
    found.tensors = tensors.map(|a| (a.name.clone(), a)).collect();
    Ok(found)
}

//! A training, seen from the client: examples out, reports in.

use futures::stream;
use indicatif::{ProgressBar, ProgressStyle};
use tonic::transport::Channel;

use crate::{
    cli::{answers, assemble::Broken, error::CliError, out},
    service::wire::introspect::{
        self as pb, probe_service_client::ProbeServiceClient, train_request::Item as Asked,
        train_response::Item,
    },
};

/// What came of a training.
pub(in crate::cli) struct Trained {
    pub(in crate::cli) result: pb::TrainResult,
    pub(in crate::cli) summary: pb::Summary,
}

/// Sends a training and hears it to its end.
pub(in crate::cli) async fn train(
    mut client: ProbeServiceClient<Channel>,
    header: pb::TrainHeader,
    examples: Vec<pb::Example>,
    bar: &ProgressBar,
) -> Result<Trained, CliError> {
    let count = examples.len() as u64;
    bar.set_length(count);
    let items =
        std::iter::once(Asked::Header(header)).chain(examples.into_iter().map(Asked::Example));
    let requests = stream::iter(items.map(|item| pb::TrainRequest { item: Some(item) }));
    let stream = client.train(requests).await?.into_inner();
    let mut result = None;
    let take = |item| {
        match item {
            Item::Progress(p) => {
                bar.set_position(p.examples_run);
                if p.examples_run == count {
                    bar.set_message(format!("{} of {} hook points", p.hooks_done, p.hooks));
                }
            }
            Item::Report(r) => bar.set_message(r.hook),
            Item::Result(r) => result = Some(r),
            Item::Summary(_) => {}
        }
        Ok(())
    };
    let summary = answers::read(stream, |r| r.item, bar, take).await?;
    let result = result.ok_or_else(|| Broken::new("it holds no result"))?;
    Ok(Trained { result, summary })
}

/// What the summary says of the examples, for people.
pub(in crate::cli) fn notes(summary: &pb::Summary) -> String {
    let notes = summary.notes.iter().map(|note| out::line(note));
    let notes = notes.map(|note| format!("note: {note}\n"));
    notes
        .chain(cut(u64::from(summary.truncated_tokens)))
        .collect()
}

/// What truncation cut off, if anything.
pub(super) fn cut(tokens: u64) -> Option<String> {
    (tokens > 0).then(|| format!("note: {tokens} tokens were cut off\n"))
}

/// A bar for examples, where somebody looks.
pub(in crate::cli) fn progress(visible: bool) -> ProgressBar {
    if !visible {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} examples {per_sec} {msg}")
    {
        bar.set_style(style);
    }
    bar
}

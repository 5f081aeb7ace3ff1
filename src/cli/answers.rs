//! Answers, read to their ends.

use indicatif::{ProgressBar, ProgressStyle};
use tonic::Streaming;

use super::{
    assemble::{Broken, Tally},
    error::CliError,
};
use crate::service::{messages::Item, wire::introspect as pb};

/// Reads an answer, checks it against its summary, and gives that. `item` opens a response, `take` keeps what is in it.
///
/// # Errors
/// What the daemon says, what `take` says, and that the answer is broken or incomplete.
pub(super) async fn read<R, M: Item>(
    stream: Streaming<R>,
    item: fn(R) -> Option<M>,
    bar: &ProgressBar,
    take: impl FnMut(M) -> Result<(), CliError>,
) -> Result<pb::Summary, CliError> {
    let summary = to_its_end(stream, item, take).await;
    bar.finish_and_clear();
    summary
}

async fn to_its_end<R, M: Item>(
    mut stream: Streaming<R>,
    item: fn(R) -> Option<M>,
    mut take: impl FnMut(M) -> Result<(), CliError>,
) -> Result<pb::Summary, CliError> {
    let mut tally = Tally::default();
    let mut ended = None;
    while let Some(response) = stream.message().await? {
        if ended.is_some() {
            return Err(Broken::new("it goes on after its summary").into());
        }
        let item = item(response).ok_or_else(|| Broken::new("a message holds nothing"))?;
        if let Some(summary) = item.summary() {
            tally.check(summary.messages, summary.bytes, summary.crc32c)?;
            ended = Some(summary.clone());
        } else {
            tally.count(&item.payload());
            take(item)?;
        }
    }
    ended.ok_or_else(|| {
        CliError::new("the answer is incomplete: the stream ended without its summary")
            .advise("nothing was written; ask again")
    })
}

/// Progress in rows, where somebody looks.
pub(super) fn progress(watched: bool) -> ProgressBar {
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

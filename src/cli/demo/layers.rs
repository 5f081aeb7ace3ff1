//! Which layer knows the sentiment? A probe for each, trained and judged over the service.

use indicatif::ProgressBar;

use crate::{
    cli::{
        capture::select::TextArgs,
        client::Session,
        error::CliError,
        picture::curve,
        probe::{data, show, training},
    },
    service::wire::introspect as pb,
};

/// Texts with the sentiment that people gave them, see `assets/README.md`.
const TEXTS: &str = include_str!("../../../assets/texts.tsv");
/// So many of them, so that it takes a second.
const EXAMPLES: usize = 240;

/// Trains them; nothing is stored.
pub(super) async fn train(session: &Session, model: &str) -> Result<pb::Probe, CliError> {
    let columns = data::Columns {
        text: "text".to_owned(),
        label: "label".to_owned(),
        part: String::new(),
        numbers: false,
        how: TextArgs {
            truncate: true,
            ..TextArgs::default()
        },
    };
    let mut examples = data::table(TEXTS, b'\t', &columns)
        .map_err(CliError::new)?
        .all;
    examples.truncate(EXAMPLES);
    let header = pb::TrainHeader {
        model: model.to_owned(),
        ..pb::TrainHeader::default()
    };
    let hidden = ProgressBar::hidden();
    let trained = training::train(session.probes(), header, examples, &hidden).await?;
    Ok(trained.result.probe.unwrap_or_default())
}

/// A line for each layer.
pub(super) fn page(probe: &pb::Probe) -> String {
    show::layers(probe)
}

/// The curve as a picture.
pub(super) fn png(probe: &pb::Probe) -> Result<Vec<u8>, CliError> {
    curve::png(&show::curve(probe)).map_err(|e| CliError::new(e.to_string()))
}

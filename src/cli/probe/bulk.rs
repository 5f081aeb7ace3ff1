//! Many inputs scored over one stream: a line of JSON for each, in their order.

use futures::stream;
use serde_json::json;

use super::{data::Found, show, training};
use crate::{
    cli::{client::Session, error::CliError, out},
    service::wire::introspect::{self as pb, score_request::Of, score_stream_response::Answer},
};

/// Scores the inputs of a file as `like` asks for. An input that fails has a line that says why and where in the file it is, and the
/// command fails at its end.
pub(super) async fn score(
    session: &Session,
    like: pb::ScoreRequest,
    inputs: Found<pb::Input>,
) -> Result<(), CliError> {
    let count = inputs.all.len() as u64;
    let lines = inputs.lines;
    let requests = inputs.all.into_iter().enumerate().map(move |(at, input)| {
        let request = pb::ScoreRequest {
            of: Some(Of::Input(input)),
            ..like.clone()
        };
        pb::ScoreStreamRequest {
            id: at.to_string(),
            request: Some(request),
        }
    });
    let mut client = session.probes();
    let answer = client.score_stream(stream::iter(requests)).await;
    let mut answer = answer?.into_inner();
    let (mut ended, mut truncated) = (None, 0);
    while let Some(message) = answer.message().await? {
        let line = match message.answer {
            Some(Answer::Scores(scores)) => {
                truncated += u64::from(scores.truncated_tokens);
                let mut line = show::scores_json(&scores);
                line["id"] = message.id.into();
                line
            }
            Some(Answer::Failure(failure)) => json!({
                "id": message.id, "line": line_of(&lines, &message.id), "error": failure.message, "field": failure.field,
            }),
            Some(Answer::Summary(summary)) => {
                ended = Some(summary);
                continue;
            }
            None => continue,
        };
        out::print(&format!("{line}\n"))?;
    }
    out::warn(&training::cut(truncated).unwrap_or_default());
    match ended {
        Some(summary) if summary.failed > 0 => Err(CliError::new(format!(
            "{} of {count} inputs failed: their lines say why",
            summary.failed
        ))),
        Some(summary) if summary.answered == count => Ok(()),
        Some(_) | None => Err(CliError::new(
            "the daemon ended its answer before it was complete: try again",
        )),
    }
}

/// The line of the file at which an input begins.
fn line_of(lines: &[usize], id: &str) -> Option<usize> {
    let at: usize = id.parse().ok()?;
    lines.get(at).copied()
}

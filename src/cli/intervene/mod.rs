//! `intervene`: what a model says when parts of it are otherwise.

pub(super) mod edit;
pub(super) mod show;

use clap::Args;
use tonic::transport::Channel;

use super::{
    assemble::Tally,
    capture::select::{OtherArgs, TextArgs},
    client::{Session, Target},
    error::CliError,
    out,
};
use crate::service::wire::introspect::{
    self as pb, intervene_item::Item as Of, intervene_response::Item,
    intervention_service_client::InterventionServiceClient,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  Without head 1 of layer 2:
    introspectd intervene demo \"This movie was fantastic!\" --edit 'z[layer=2;head=1] zero'
  Several edits, one after the other; --edit is HOOK[KEY=N,...;...] OPERATION:
    introspectd intervene demo \"Not bad.\" --edit 'mlp.hook_post[layer=3;dim=7,9] scale 0' --edit 'pattern[layer=0;key=0] scale 0.5'
  With the last layer's first position as it is for another text of the same length (activation patching):
    introspectd intervene demo \"A good film.\" --source \"A bad film.\" --edit 'resid_pre[layer=3;pos=0] interchange'
  Steered along a stored probe's direction; and with that direction gone:
    introspectd intervene bert \"Some text\" --edit 'resid_post[layer=4] add probe:sentiment 3'
    introspectd intervene bert \"Some text\" --edit 'resid_post[layer=4] project-out probe:sentiment'
  Directions of your own from texts that differ in one thing: see `introspectd steer --help`.
Keys: layer, head, pos (negative ones from the end), key (of attentions), dim (neurons, dimensions). Operations: zero, scale N, set N,
add N|probe:NAME [N], noise DEVIATION [SEED], clamp LOW HIGH, interchange [POS,...] (positions of the source, when it is of another length), project-out probe:NAME. What a vector cannot be written as is
for clients: see `proto/introspect/v1/intervention.proto`. `introspectd inspect MODEL` shows the hook points that there are.";

/// Arguments of `intervene`.
#[derive(Args, Clone, Debug)]
pub(super) struct InterveneArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on
    #[arg(required_unless_present_any = ["ids", "inputs"])]
    text: Option<String>,
    /// What to change: HOOK[KEY=N,...;...] OPERATION; may be given more than once
    #[arg(long = "edit", value_name = "EDIT", required = true, value_parser = edit::parse)]
    edits: Vec<pb::Edit>,
    /// Text whose run `interchange` takes from
    #[arg(long, value_name = "TEXT")]
    source: Option<String>,
    /// Labels or tokens to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    candidates: u32,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    /// Print JSON in place of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Answer {
    header: pb::CaptureHeader,
    original: Option<pb::Prediction>,
    modified: Option<pb::Prediction>,
    effect: pb::InterventionEffect,
    summary: pb::Summary,
}

/// Runs the command.
pub(super) async fn run(args: &InterveneArgs) -> Result<(), CliError> {
    let input = match args.other.input()? {
        Some(input) => input,
        None => args.texts.input(args.text.as_deref().unwrap_or_default()),
    };
    let sources = args.source.iter().map(|text| {
        let source = pb::InterventionSource {
            input: Some(args.texts.input(text)),
            edits: Vec::new(),
        };
        (edit::SOURCE.to_owned(), source)
    });
    let intervention = pb::Intervention {
        edits: args.edits.clone(),
        sources: sources.collect(),
    };
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = pb::InterveneRequest {
        model,
        input: Some(input),
        intervention: Some(intervention),
        selection: Some(pb::Selection {
            candidates: args.candidates,
            ..pb::Selection::default()
        }),
    };
    let answer = intervene(session.interventions(), request).await;
    session.close().await;
    let answer = answer?;
    if args.json {
        return out::print_json(&show::json(&answer));
    }
    out::print(&show::page(&answer))
}

/// One answer, complete.
pub(super) async fn intervene(
    mut client: InterventionServiceClient<Channel>,
    request: pb::InterveneRequest,
) -> Result<Answer, CliError> {
    let mut stream = client.intervene(request).await?.into_inner();
    let mut answer = Answer::default();
    let mut tally = Tally::default();
    while let Some(message) = stream.message().await? {
        match message.item {
            Some(Item::Header(header)) => {
                tally.count(&[]);
                answer.header = header;
            }
            Some(Item::Original(item)) => take(item, &mut answer.original, &mut tally),
            Some(Item::Modified(item)) => take(item, &mut answer.modified, &mut tally),
            Some(Item::Effect(effect)) => {
                tally.count(&[]);
                answer.effect = effect;
            }
            Some(Item::Summary(summary)) => {
                tally.check(summary.messages, summary.bytes, summary.crc32c)?;
                answer.summary = summary;
                return Ok(answer);
            }
            None => {}
        }
    }
    Err(
        CliError::new("the answer is incomplete: the stream ended without its summary")
            .advise("ask again"),
    )
}

/// Keeps the prediction of a run, and counts what else it sends.
fn take(item: pb::InterveneItem, prediction: &mut Option<pb::Prediction>, tally: &mut Tally) {
    match item.item {
        Some(Of::Prediction(given)) => {
            tally.count(&[]);
            *prediction = Some(given);
        }
        Some(Of::Tensor(t)) => tally.count(&[&t.data]),
        Some(Of::Sparse(s)) => tally.count(&[&s.counts, &s.indices, &s.values]),
        None => {}
    }
}

//! `intervene`: what a model says when parts of it are otherwise.

pub(super) mod edit;
pub(super) mod show;

use clap::Args;
use indicatif::ProgressBar;
use tonic::transport::Channel;

use super::{
    answers,
    capture::select::{OtherArgs, TextArgs},
    client::{Session, Target},
    error::CliError,
    out,
};
use crate::service::wire::introspect::{
    self as pb, intervene_item::Item as Of, intervene_response::Item,
    intervention_service_client::InterventionServiceClient,
};
use edit::EditArgs;

pub(super) const EXAMPLES: &str = "\
Examples:
  Without head 1 of layer 2:
    introspectd intervene demo \"This movie was fantastic!\" --edit 'z[layer=2;head=1] zero'
  Several edits, one after the other; --edit is HOOK[KEY=N,...;...] OPERATION:
    introspectd intervene demo \"Not bad.\" --edit 'mlp.hook_post[layer=3;dim=7,9] scale 0' --edit 'pattern[layer=0;key=0] scale 0.5'
  With the last layer's first position as it is for another text of the same length (activation patching):
    introspectd intervene demo \"A good film.\" --source \"A bad film.\" --edit 'resid_pre[layer=3;pos=0] interchange'
  A head at its mean over other texts; a vector of your own, from numpy.savez(\"mood.npz\", v), three times:
    introspectd intervene demo \"Not bad.\" --edit 'z[layer=3;head=1] mean' --mean-file texts.txt
    introspectd intervene demo \"Not bad.\" --edit 'resid_post[layer=3] add mood.npz 3'
  Steered along a stored probe's direction; and with that direction gone:
    introspectd intervene bert \"Some text\" --edit 'resid_post[layer=3] add probe:sentiment 3'
    introspectd intervene bert \"Some text\" --edit 'resid_post[layer=3] project-out probe:sentiment'
  Directions of your own from texts that differ in one thing: see `introspectd steer --help`.
Keys: layer, head, pos (negative ones from the end), key (of attentions), dim (neurons, dimensions). Operations: zero, mean (over --mean and
--mean-file), scale N, set N|FILE.npz, add N|FILE.npz|probe:NAME [N], noise DEVIATION [SEED], clamp LOW HIGH, interchange [POS,...]
(positions of the source, when it is of another length), project-out FILE.npz|probe:NAME; FILE.npz:NAME where a file has several arrays.
`introspectd inspect MODEL` shows the hook points that there are.";

/// Arguments of `intervene`.
#[derive(Args, Clone, Debug)]
pub(super) struct InterveneArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on
    #[arg(required_unless_present_any = ["ids", "inputs"])]
    text: Option<String>,
    #[command(flatten)]
    edits: EditArgs,
    /// Labels or tokens to show
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Output")]
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
    let Some(intervention) = args.edits.intervention(&args.texts)? else {
        return Err(CliError::Usage(
            "nothing is changed: say what to change by --edit".into(),
        ));
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
    let stream = client.intervene(request).await?.into_inner();
    let mut answer = Answer::default();
    let take = |item| {
        match item {
            Item::Header(header) => answer.header = header,
            Item::Original(item) => keep(item, &mut answer.original),
            Item::Modified(item) => keep(item, &mut answer.modified),
            Item::Effect(effect) => answer.effect = effect,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    answer.summary = answers::read(stream, |r| r.item, &ProgressBar::hidden(), take).await?;
    Ok(answer)
}

/// Keeps the prediction of a run.
fn keep(item: pb::InterveneItem, prediction: &mut Option<pb::Prediction>) {
    if let Some(Of::Prediction(given)) = item.item {
        *prediction = Some(given);
    }
}

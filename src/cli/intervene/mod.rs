//! `intervene`: what a model says when parts of it are otherwise.

pub(super) mod edit;
pub(super) mod files;
mod pair;
pub(super) mod show;

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use tonic::{Code, transport::Channel};

use super::{
    answers,
    arrays::Arrays,
    assemble::Broken,
    capture::{
        Kind,
        select::{DenseArgs, OtherArgs, TextArgs},
    },
    client::{Session, Target},
    error::CliError,
    files::write,
    out,
};
use crate::service::wire::introspect::{
    self as pb, intervene_item::Item as Of, intervene_response::Item,
    intervention_service_client::InterventionServiceClient,
};
use edit::EditArgs;
use pair::Pair;

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
  What becomes of the residual stream and the attention of later layers; both runs for numpy; before and after as a page:
    introspectd intervene demo \"Not bad.\" --edit 'z[layer=0-1;head=1] zero' --hooks resid_post,pattern --layers 2-3
    introspectd intervene demo \"Not bad.\" --edit 'z[layer=0-1;head=1] zero' --hooks 'hidden_states.*' -o runs.npz
    introspectd intervene demo \"Not bad.\" --edit 'z[layer=1;head=1] zero' --hooks pattern --layers 2 -o change.html
  Directions of your own from texts that differ in one thing: see `introspectd steer --help`.
Keys: layer, head, pos (negative ones from the end), key (of attentions), dim (neurons, dimensions); numbers and ranges, such as 0,4-7.
Operations: zero, mean (over --mean, --mean-file and --mean-ids), scale N, set N|FILE.npz, add N|FILE.npz|probe:NAME [N], noise DEVIATION [SEED], clamp LOW HIGH, interchange [POS,...]
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
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    selection: DenseArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of a table; with --hooks, tensors too
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// What was asked for.
    selection: pb::Selection,
    header: pb::CaptureHeader,
    original: Option<pb::Prediction>,
    modified: Option<pb::Prediction>,
    effect: pb::InterventionEffect,
    /// Hook points and the output, in the order of their arrival.
    pairs: Vec<Pair>,
    summary: pb::Summary,
}

/// Runs the command.
pub(super) async fn run(args: &InterveneArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
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
        selection: Some(args.selection.selection()),
    };
    let answer = intervene(session.interventions(), request).await;
    session.close().await;
    let answer = answer?;
    match (kind, &args.output) {
        (Some(kind), Some(path)) => {
            told(kind, &answer);
            let contents = files::contents(&answer, kind);
            if matches!(kind, Kind::Png | Kind::Html) && contents.grids.is_empty() {
                return Err(CliError::new("nothing that came can be drawn")
                    .advise("name hook points by --hooks, or write .npz or .json"));
            }
            write(path, kind, &contents)
        }
        _ if args.json && answer.shows_tensors() => out::print_json(&files::whole(&answer)),
        _ if args.json => out::print_json(&files::facts(&answer)),
        _ => out::print(&show::page(&answer)),
    }
}

/// Says what a picture leaves out.
fn told(kind: Kind, answer: &Answer) {
    let undrawn = match kind {
        Kind::Png | Kind::Html => files::undrawn(answer),
        Kind::Npz | Kind::Json => Vec::new(),
    };
    if !undrawn.is_empty() {
        out::warn(&format!(
            "not drawn, but in .npz and .json: {}\n",
            out::clean(&undrawn.join(", "))
        ));
    }
}

impl Answer {
    /// Whether tensors are what was asked for, and not a by-product of the prediction.
    fn shows_tensors(&self) -> bool {
        !self.selection.hooks.is_empty() || self.selection.logits() == pb::Logits::All
    }
}

/// What comes of a run.
#[derive(Debug, Default)]
struct Run {
    prediction: Option<pb::Prediction>,
    arrays: Arrays,
}

impl Run {
    fn keep(&mut self, item: pb::InterveneItem) -> Result<(), Broken> {
        match item.item {
            Some(Of::Prediction(given)) => self.prediction = Some(given),
            Some(Of::Tensor(piece)) => self.arrays.take(piece)?,
            Some(Of::Sparse(_)) => {
                return Err(Broken::new(
                    "a tensor is sparse, and that was not asked for",
                ));
            }
            None => return Err(Broken::new("a message holds nothing")),
        }
        Ok(())
    }
}

/// One answer, complete. Where nothing is predicted, it is about the output, unless hook points are named.
pub(super) async fn intervene(
    mut client: InterventionServiceClient<Channel>,
    mut request: pb::InterveneRequest,
) -> Result<Answer, CliError> {
    let stream = match client.intervene(request.clone()).await {
        Err(status) if status.code() == Code::FailedPrecondition && whole(&mut request) => {
            client.intervene(request.clone()).await
        }
        other => other,
    };
    let stream = stream?.into_inner();
    let mut answer = Answer {
        selection: request.selection.unwrap_or_default(),
        ..Answer::default()
    };
    let (mut original, mut modified) = (Run::default(), Run::default());
    let take = |item| {
        match item {
            Item::Header(header) => answer.header = header,
            Item::Original(item) => original.keep(item)?,
            Item::Modified(item) => modified.keep(item)?,
            Item::Effect(effect) => answer.effect = effect,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    answer.summary = answers::read(stream, |r| r.item, &ProgressBar::hidden(), take).await?;
    answer.original = original.prediction;
    answer.modified = modified.prediction;
    answer.pairs = pair::pairs(original.arrays, modified.arrays)?;
    Ok(answer)
}

/// Asks for the whole output in the place of a prediction; false when something else was asked for.
fn whole(request: &mut pb::InterveneRequest) -> bool {
    let selection = request.selection.get_or_insert_default();
    let plain = selection.hooks.is_empty() && selection.logits() == pb::Logits::Unspecified;
    if plain {
        selection.set_logits(pb::Logits::All);
    }
    plain
}

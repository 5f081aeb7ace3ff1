//! `sweep`: every head, layer, position or neuron changed by itself.

mod answer;
mod show;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::{Args, ValueEnum};

use super::{
    answers,
    attribute::TargetArgs,
    capture::{
        Kind,
        select::{Numbers, OtherArgs, TextArgs, numbers, of_ids},
    },
    client::{Session, Target},
    error::CliError,
    files, intervene, out,
};
use crate::service::wire::introspect::{self as pb, sweep_request::Change};
pub(super) use answer::{Swept, ask};
use intervene::edit::MeanArgs;
pub(super) use show::{html, page};

pub(super) const EXAMPLES: &str = "\
Examples:
  Which heads does the prediction need? Each is zeroed by itself:
    introspectd sweep demo \"This movie was fantastic!\"
  Put to their mean over other texts in place of zero (a text per line):
    introspectd sweep demo \"This movie was fantastic!\" --mean-file texts.txt
  Where is the answer? The residual stream, layer by layer and position by position, put to what it is for another text (activation patching):
    introspectd sweep demo \"A bad film.\" --patch \"A good film.\" --hooks resid_pre --by position
  The same by gradients, one run forward and backward (attribution patching), and how well that agrees:
    introspectd sweep demo \"A bad film.\" --patch \"A good film.\" --hooks resid_pre --by position --method both
  The 20 neurons that look most important, and what they really do:
    introspectd sweep demo \"Not bad.\" --hooks post --by dim --method both --most 20
  What heads do by the direct path to the queries of a later head (path patching):
    introspectd sweep gpt \"...\" --patch \"...\" --path-to 'q[layer=5;head=1]'
  A page with every number:
    introspectd sweep demo \"This movie was fantastic!\" --hooks z,mlp_out --layers 2,3 --by position -o sweep.html";

/// An axis that is swept over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// Heads
    Head,
    /// Positions, of attentions queries
    Position,
    /// Neurons, dimensions
    Dim,
    /// Keys, of attentions
    Key,
}

/// How effects are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Method {
    /// A run for each part
    #[default]
    Run,
    /// By gradients
    Estimate,
    /// Both, and how well they agree
    Both,
}

/// Arguments of `sweep`.
#[derive(Args, Clone, Debug)]
pub(super) struct SweepArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on; of a patching the corrupted one
    #[arg(required_unless_present_any = ["ids", "inputs"])]
    text: Option<String>,
    /// Hook points: kinds, names or patterns
    #[arg(
        long,
        short = 'k',
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = "attn.hook_z"
    )]
    hooks: Vec<String>,
    /// Of these layers only, such as 0,4-7
    #[arg(long, value_name = "N,...")]
    layers: Option<Numbers>,
    /// What a part is: an index along each of these axes [default: head, of z; the whole, of others]
    #[arg(long, value_enum, value_delimiter = ',')]
    by: Vec<By>,
    /// Put parts to what they are for this text (activation patching); with --mean, to that; else to zero
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["mean", "mean_file", "mean_ids"])]
    patch: Option<String>,
    /// The same, for these token ids
    #[arg(
        long,
        value_name = "ID,...",
        value_delimiter = ',',
        conflicts_with_all = ["patch", "mean", "mean_file", "mean_ids"]
    )]
    patch_ids: Vec<u32>,
    #[command(flatten)]
    mean: MeanArgs,
    /// How effects are found
    #[arg(long, value_enum, default_value_t)]
    method: Method,
    /// With --method both: run so many parts only, those of the greatest estimates
    #[arg(long, value_name = "N", default_value_t = 0)]
    most: u32,
    /// Patch the direct path to this place: HOOK[layer=N,...;head=N,...;pos=N,...] (may be given more than once)
    #[arg(long, value_name = "PLACE", value_parser = intervene::edit::receiver)]
    path_to: Vec<pb::Receiver>,
    /// With --path-to: hold the perceptrons too
    #[arg(long, requires = "path_to")]
    freeze_mlps: bool,
    #[command(flatten)]
    question: TargetArgs,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(
        long,
        short,
        value_name = "FILE",
        conflicts_with = "json",
        help_heading = "Output"
    )]
    output: Option<PathBuf>,
    /// Print JSON in place of a picture
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Runs the command.
pub(super) async fn run(args: &SweepArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    let mut request = args.request()?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    request.model = model;
    let bar = answers::progress(io::stderr().is_terminal());
    let found = ask(session.interventions(), request, &bar).await;
    session.close().await;
    let found = found?;
    match (kind, &args.output) {
        (Some(kind), Some(path)) => files::write(path, kind, &show::contents(&found)),
        (Some(_) | None, _) if args.json => out::print_json(&show::json(&found)),
        (Some(_) | None, _) => out::print(&page(&found)),
    }
}

impl SweepArgs {
    fn request(&self) -> Result<pb::SweepRequest, CliError> {
        let input = match self.other.input()? {
            Some(input) => input,
            None => self.texts.input(self.text.as_deref().unwrap_or_default()),
        };
        let heads = self.by.is_empty() && self.hooks.iter().all(|h| h.ends_with('z'));
        let by = if heads {
            vec![By::Head]
        } else {
            self.by.clone()
        };
        let axis = |by: &By| match by {
            By::Head => pb::SweepAxis::Head.into(),
            By::Position => pb::SweepAxis::Position.into(),
            By::Dim => pb::SweepAxis::Dim.into(),
            By::Key => pb::SweepAxis::Key.into(),
        };
        let path = (!self.path_to.is_empty()).then(|| pb::PathPatch {
            receivers: self.path_to.clone(),
            freeze_mlps: self.freeze_mlps,
        });
        Ok(pb::SweepRequest {
            model: String::new(),
            input: Some(input),
            target: Some(self.question.target()?),
            hooks: self.hooks.clone(),
            layers: numbers(self.layers.as_ref()),
            by: by.iter().map(axis).collect(),
            change: Some(self.change()?),
            method: match self.method {
                Method::Run => pb::SweepMethod::Run,
                Method::Estimate => pb::SweepMethod::Estimate,
                Method::Both => pb::SweepMethod::Both,
            }
            .into(),
            most: self.most,
            path,
        })
    }

    fn change(&self) -> Result<Change, CliError> {
        if let Some(text) = &self.patch {
            return Ok(Change::Patch(self.texts.input(text)));
        }
        if !self.patch_ids.is_empty() {
            return Ok(Change::Patch(of_ids(&self.patch_ids)));
        }
        let inputs = self.mean.inputs(&self.texts)?;
        Ok(match inputs.is_empty() {
            true => Change::Zero(pb::Zero {}),
            false => Change::Mean(pb::Mean { inputs }),
        })
    }
}

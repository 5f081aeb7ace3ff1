//! `lens`: what a model would say if it ended at each layer, what each part writes of the answer, how the stream grows and turns.

mod answer;
mod files;
mod show;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::{ArgGroup, Args};

use super::{
    answers,
    attribute::question::ChoiceArgs,
    capture::{
        Kind,
        select::{OtherArgs, TextArgs},
    },
    client::{Session, Target},
    error::CliError,
    files::write,
    intervene::edit::EditArgs,
    out,
};
use crate::service::wire::introspect as pb;

pub(super) const EXAMPLES: &str = "\
Examples:
  What would the model say if it ended at each layer (logit lens)?
    introspectd lens gpt2 \"The capital of France is\"
  When does it come to one token rather than another?
    introspectd lens gpt2 \"The capital of France is\" --target 'token: Paris' --against 'token: London'
  What does each component and each head write of the answer (direct logit attribution)?
    introspectd lens gpt2 \"The capital of France is\" --attribution
  How the residual stream grows and turns; all three as a page:
    introspectd lens gpt2 \"The capital of France is\" --residual
    introspectd lens gpt2 \"The capital of France is\" --lens --attribution --residual -o france.html
  A classifier, through its pooler and head; for numpy:
    introspectd lens demo \"This movie was fantastic!\" -o movie.npz
  A tuned lens, from lenses/NAME.safetensors of the model's folder (0.weight, 0.bias, 1.weight ...):
    introspectd lens gpt2 \"The capital of France is\" --tuned NAME";

/// Arguments of `lens`.
#[derive(Args, Clone, Debug)]
#[command(override_usage = "introspectd lens [OPTIONS] MODEL TEXT
       introspectd lens [OPTIONS] MODEL --ids ID,... | --inputs FILE.npz")]
#[command(group = ArgGroup::new("what").args(["text", "ids", "inputs"]).required(true))]
pub(super) struct LensArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on
    text: Option<String>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    edits: EditArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    part: PartArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of tables
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What to read off the stream.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "What to read")]
struct PartArgs {
    /// Every state through the model's own head; the default, and beside the others when it is asked for too
    #[arg(long)]
    lens: bool,
    /// What each component and head writes of the target's logit
    #[arg(long)]
    attribution: bool,
    /// Lengths and angles of the stream
    #[arg(long)]
    residual: bool,
    /// Read states by this tuned lens
    #[arg(long, value_name = "NAME")]
    tuned: Option<String>,
    /// Read these positions only; negative ones count from the end, as in --positions=-1
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    positions: Vec<i32>,
    /// Labels or tokens of each place
    #[arg(long, value_name = "K", default_value_t = 5)]
    top_k: u32,
    /// All scores too, for files
    #[arg(long)]
    logits: bool,
    /// With --attribution: components only
    #[arg(long, requires = "attribution")]
    no_heads: bool,
}

impl PartArgs {
    fn parts(&self) -> Vec<i32> {
        let asked = [
            (self.lens || self.tuned.is_some(), pb::LensPart::Lens),
            (self.attribution, pb::LensPart::Attribution),
            (self.residual, pb::LensPart::Residual),
        ];
        let asked = asked.into_iter().filter(|(asked, _)| *asked);
        asked.map(|(_, part)| part.into()).collect()
    }
}

/// Runs the command.
pub(super) async fn run(args: &LensArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    let input = match args.other.input()? {
        Some(input) => input,
        None => args.texts.input(args.text.as_deref().unwrap_or_default()),
    };
    let intervention = args.edits.intervention(&args.texts)?;
    let part = &args.part;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = pb::LensRequest {
        model,
        input: Some(input),
        parts: part.parts(),
        target: args.choice.of().map(|of| pb::Target {
            quantity: 0,
            of: Some(of),
        }),
        positions: part.positions.clone(),
        top_k: part.top_k,
        tuned: part.tuned.clone().unwrap_or_default(),
        logits: part.logits,
        no_heads: part.no_heads,
        intervention,
    };
    let bar = answers::progress(io::stderr().is_terminal());
    let found = answer::ask(session.analyses(), request, &bar).await;
    session.close().await;
    let found = found?;
    match (kind, &args.output) {
        (Some(kind), Some(path)) => write(path, kind, &files::contents(&found)),
        _ if args.json => out::print_json(&files::json(&found)),
        _ => out::print(&show::page(&found)),
    }
}

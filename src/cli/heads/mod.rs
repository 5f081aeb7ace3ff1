//! `heads`: what attention heads attend to, as heat maps of layers by heads or in a file.

mod show;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::{Args, ValueEnum};
use tonic::transport::Channel;

use super::{
    answers,
    arrays::{Array, Arrays},
    capture::{
        Kind, bulk,
        select::{Numbers, OtherArgs, TextArgs, numbers},
    },
    client::{Session, Target},
    error::CliError,
    files,
    intervene::edit::EditArgs,
    out,
};
use crate::service::wire::introspect::{
    self as pb, HeadMeasure, HeadPattern, HeadSimilarity,
    analysis_service_client::AnalysisServiceClient, head_detector::Pattern, heads_response::Item,
};

/// What a model adds to the tokens for their positions.
const POSITIONS: &str = "hook_pos_embed";

pub(super) const EXAMPLES: &str = "\
Examples:
  Where do the heads look? Every measure, as heat maps:
    introspectd heads demo \"This movie was fantastic!\"
  Averaged over the lines of a file, for numpy:
    introspectd heads demo --text-file texts.txt -o heads.npz
  Induction heads, found on random tokens that are repeated:
    introspectd heads gpt2 --measure induction,duplicate_token --seed 7
    introspectd heads gpt2 --detect induction_head --exclude-bos
  What becomes of them without a head of the layer below:
    introspectd heads gpt2 --measure induction --edit 'z[layer=0;head=3] zero'
  Attention by distance, and how alike positions are:
    introspectd heads bert --text-file texts.txt --positions -o positions.html
Without a text everything is measured on repeated random tokens. `proto/introspect/v1/heads.proto` has the formulas.";

/// Arguments of `heads`.
#[derive(Args, Clone, Debug)]
#[command(override_usage = "introspectd heads [OPTIONS] MODEL [TEXT]...
       introspectd heads [OPTIONS] MODEL --ids ID,... | --inputs FILE.npz | --text-file FILE")]
pub(super) struct HeadsArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Texts to measure on
    text: Vec<String>,
    /// Measure on every line of a file (`-`: standard input)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "ids", "inputs"], help_heading = "Input")]
    text_file: Option<PathBuf>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    repeated: RepeatedArgs,
    #[command(flatten)]
    edits: EditArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of heat maps
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What is measured.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "What to measure")]
struct WhatArgs {
    /// Measures [default: all]
    #[arg(long, value_enum, value_name = "NAME,...", value_delimiter = ',')]
    measure: Vec<MeasureArg>,
    /// Patterns to look for, too, as TransformerLens's detect_head does
    #[arg(long, value_enum, value_name = "NAME,...", value_delimiter = ',')]
    detect: Vec<DetectArg>,
    /// With --detect: score by the absolute difference in place of the product
    #[arg(long, requires = "detect")]
    abs: bool,
    /// With --detect: leave out the first key
    #[arg(long, requires = "detect")]
    exclude_bos: bool,
    /// With --detect: leave out the diagonal
    #[arg(long, requires = "detect")]
    exclude_current_token: bool,
    /// Attention by relative offset, too; and the similarity of positions, of models that have an embedding of them
    #[arg(long)]
    positions: bool,
    /// Of these layers only, such as 0,4-7
    #[arg(long, value_name = "N,...")]
    layers: Option<Numbers>,
}

/// Random tokens that are repeated.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Repeated random tokens, for duplicate_token and induction")]
struct RepeatedArgs {
    /// Tokens that are repeated [default: 50, or as many as the model takes]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    repeat: u32,
    /// Sequences that are averaged [default: 4]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    sequences: u32,
    /// Where draws begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Put the template's special tokens around them
    #[arg(long)]
    with_special_tokens: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
#[value(rename_all = "snake_case")]
enum MeasureArg {
    /// In nats
    Entropy,
    /// In tokens
    Distance,
    /// On the token itself
    #[value(name = "self")]
    Current,
    /// On the token before
    PreviousToken,
    /// On the first token
    FirstToken,
    /// On special tokens
    SpecialTokens,
    /// On the same token, the first time
    DuplicateToken,
    /// On what came next the first time
    Induction,
}

impl MeasureArg {
    fn wire(self) -> HeadMeasure {
        match self {
            MeasureArg::Entropy => HeadMeasure::Entropy,
            MeasureArg::Distance => HeadMeasure::Distance,
            MeasureArg::Current => HeadMeasure::Self_,
            MeasureArg::PreviousToken => HeadMeasure::PreviousToken,
            MeasureArg::FirstToken => HeadMeasure::FirstToken,
            MeasureArg::SpecialTokens => HeadMeasure::SpecialTokens,
            MeasureArg::DuplicateToken => HeadMeasure::DuplicateToken,
            MeasureArg::Induction => HeadMeasure::Induction,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum DetectArg {
    /// The token before
    #[value(name = "previous_token_head")]
    PreviousToken,
    /// The same token before
    #[value(name = "duplicate_token_head")]
    DuplicateToken,
    /// What followed the same token before
    #[value(name = "induction_head")]
    Induction,
}

impl DetectArg {
    fn wire(self) -> HeadPattern {
        match self {
            DetectArg::PreviousToken => HeadPattern::PreviousTokenHead,
            DetectArg::DuplicateToken => HeadPattern::DuplicateTokenHead,
            DetectArg::Induction => HeadPattern::InductionHead,
        }
    }
}

/// What came back.
#[derive(Debug, Default)]
struct Answer {
    header: pb::HeadsHeader,
    rankings: Vec<pb::HeadRanking>,
    arrays: Vec<Array>,
    summary: pb::Summary,
}

/// Runs the command.
pub(super) async fn run(args: &HeadsArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    let mut inputs: Vec<pb::Input> = args.other.input()?.into_iter().collect();
    inputs.extend(args.text.iter().map(|text| args.texts.input(text)));
    if let Some(file) = &args.text_file {
        let lines = bulk::lines(file).await?;
        inputs.extend(lines.iter().map(|line| args.texts.input(&line.text)));
    }
    let intervention = args.edits.intervention(&args.texts)?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let answered = async {
        let similarity = args.what.positions && has_positions(&session, &model).await?;
        let request = pb::HeadsRequest {
            intervention,
            ..args.request(model, inputs, similarity)
        };
        ask(session.analyses(), request).await
    };
    let answered = answered.await;
    session.close().await;
    let answer = answered?;
    match (kind, &args.output) {
        (Some(kind), Some(path)) => files::write(path, kind, &show::contents(&answer)),
        _ if args.json => out::print_json(&show::json(&answer)),
        _ => out::print(&show::page(&answer)),
    }
}

impl HeadsArgs {
    fn request(&self, model: String, inputs: Vec<pb::Input>, similarity: bool) -> pb::HeadsRequest {
        let what = &self.what;
        let similar = if what.abs {
            HeadSimilarity::Abs
        } else {
            HeadSimilarity::Unspecified
        };
        let detect = what.detect.iter().map(|name| pb::HeadDetector {
            pattern: Some(Pattern::Named(name.wire().into())),
            similarity: similar.into(),
            exclude_bos: what.exclude_bos,
            exclude_current_token: what.exclude_current_token,
        });
        pb::HeadsRequest {
            model,
            inputs,
            layers: numbers(what.layers.as_ref()),
            measures: what.measure.iter().map(|m| m.wire().into()).collect(),
            detect: detect.collect(),
            repeated: Some(pb::RepeatedSequences {
                length: self.repeated.repeat,
                count: self.repeated.sequences,
                seed: self.repeated.seed,
                special_tokens: self.repeated.with_special_tokens,
                given: Vec::new(),
            }),
            offsets: what.positions,
            similarity,
            intervention: None,
        }
    }
}

/// Whether there is something to compare positions by.
async fn has_positions(session: &Session, model: &str) -> Result<bool, CliError> {
    let request = pb::GetModelRequest {
        model: model.to_owned(),
    };
    let told = session.models().get_model(request).await?.into_inner();
    let hooks = told.model.unwrap_or_default().hooks;
    Ok(hooks.iter().any(|h| h.name == POSITIONS))
}

/// One answer, complete.
async fn ask(
    mut client: AnalysisServiceClient<Channel>,
    request: pb::HeadsRequest,
) -> Result<Answer, CliError> {
    let bar = answers::progress(io::stderr().is_terminal());
    let stream = client.heads(request).await?.into_inner();
    let mut answer = Answer::default();
    let mut arrays = Arrays::default();
    let take = |item| {
        match item {
            Item::Header(header) => answer.header = header,
            Item::Progress(progress) => {
                bar.set_length(progress.rows_planned);
                bar.set_position(progress.rows_done);
            }
            Item::Ranking(ranking) => answer.rankings.push(ranking),
            Item::Tensor(piece) => arrays.take(piece)?,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    answer.summary = answers::read(stream, |r| r.item, &bar, take).await?;
    answer.arrays = arrays.finish()?;
    Ok(answer)
}

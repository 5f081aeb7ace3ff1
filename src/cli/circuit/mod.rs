//! `circuit`: which edges between the parts of a model carry a behaviour.

mod show;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use tonic::transport::Channel;

use super::{
    answers,
    arrays::{Array, Arrays},
    attribute::TargetArgs,
    capture::{
        Kind,
        select::{OtherArgs, TextArgs, of_ids},
    },
    client::{Session, Target},
    error::CliError,
    files, out,
};
use crate::service::wire::introspect::{
    self as pb, find_circuit_response::Item, intervention_service_client::InterventionServiceClient,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  Which heads and perceptrons carry the answer from the clean text, and do they suffice?
    introspectd circuit gpt \"When John and Mary went out, Mary gave a ring to\" --source \"When John and Mary went out, John gave a ring to\" --target 'token: Mary' --against 'token: John'
  Fewer edges, drawn by Graphviz:
    introspectd circuit gpt \"...\" --source \"...\" --edges 20 -o circuit.dot && dot -Tsvg circuit.dot > circuit.svg
  The attention of a layer as one node, from one run forward and backward:
    introspectd circuit gpt \"...\" --source \"...\" --nodes layers
Models that normalise the sum of every layer (BERT and its kin) have no such edges: see `introspectd sweep`.";

/// What the nodes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Nodes {
    /// Heads and perceptrons
    #[default]
    Heads,
    /// Attention and perceptron of each layer
    Layers,
}

/// Arguments of `circuit`.
#[derive(Args, Clone, Debug)]
pub(super) struct CircuitArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// The corrupted text
    #[arg(required_unless_present_any = ["ids", "inputs"])]
    text: Option<String>,
    /// The clean text, of as many tokens
    #[arg(long, value_name = "TEXT", required_unless_present = "source_ids")]
    source: Option<String>,
    /// The same as token ids
    #[arg(
        long,
        value_name = "ID,...",
        value_delimiter = ',',
        conflicts_with = "source"
    )]
    source_ids: Vec<u32>,
    /// What the nodes are
    #[arg(long, value_enum, default_value_t)]
    nodes: Nodes,
    /// Edges to keep
    #[arg(long, value_name = "N", default_value_t = 50)]
    edges: u32,
    #[command(flatten)]
    question: TargetArgs,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    /// Write a file in place of the terminal: .dot, .json, .npz, .png or .html
    #[arg(
        long,
        short,
        value_name = "FILE",
        conflicts_with = "json",
        help_heading = "Output"
    )]
    output: Option<PathBuf>,
    /// Print JSON in place of a table
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What came back.
#[derive(Clone, Debug, Default)]
struct Found {
    header: pb::CircuitHeader,
    circuit: pb::Circuit,
    scores: Option<Array>,
    summary: pb::Summary,
}

/// Runs the command.
pub(super) async fn run(args: &CircuitArgs) -> Result<(), CliError> {
    let dot = |path: &PathBuf| path.extension().is_some_and(|e| e == "dot");
    let kind = match &args.output {
        Some(path) if !dot(path) => Some(Kind::of(path)?),
        Some(_) | None => None,
    };
    let input = match args.other.input()? {
        Some(input) => input,
        None => args.texts.input(args.text.as_deref().unwrap_or_default()),
    };
    let source = match &args.source {
        Some(text) => args.texts.input(text),
        None => of_ids(&args.source_ids),
    };
    let target = args.question.target()?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = pb::FindCircuitRequest {
        model,
        input: Some(input),
        source: Some(source),
        target: Some(target),
        nodes: match args.nodes {
            Nodes::Heads => pb::CircuitNodes::Heads.into(),
            Nodes::Layers => pb::CircuitNodes::Layers.into(),
        },
        edges: args.edges,
    };
    let bar = answers::progress(io::stderr().is_terminal());
    let found = ask(session.interventions(), request, &bar).await;
    session.close().await;
    let found = found?;
    match (&args.output, kind) {
        (Some(path), Some(kind)) => files::write(path, kind, &show::contents(&found)),
        (Some(path), None) => out::write_file(path, show::dot(&found).as_bytes()),
        (None, _) if args.json => out::print_json(&show::json(&found)),
        (None, _) => out::print(&show::page(&found)),
    }
}

/// Asks, and reads the answer to its end. `bar` is drawn on a terminal.
async fn ask(
    mut client: InterventionServiceClient<Channel>,
    request: pb::FindCircuitRequest,
    bar: &ProgressBar,
) -> Result<Found, CliError> {
    let stream = client.find_circuit(request).await?.into_inner();
    let mut found = Found::default();
    let mut arrays = Arrays::default();
    let take = |item| {
        match item {
            Item::Header(header) => {
                bar.set_length(header.rows);
                found.header = header;
            }
            Item::Progress(progress) => bar.set_position(progress.rows_done),
            Item::Tensor(piece) => arrays.take(piece)?,
            Item::Circuit(circuit) => found.circuit = circuit,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    found.summary = answers::read(stream, |r| r.item, bar, take).await?;
    found.scores = arrays.finish()?.into_iter().next();
    Ok(found)
}

//! `neurons`: which neurons react most, and to what.

mod show;

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    answers,
    arrays::{self, Array, Arrays},
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
    self as pb, NeuronRanking, NeuronSet, neurons_request::Item as Asked, neurons_response::Item,
};

/// Messages that are read before there is room to send them.
const AHEAD: usize = 64;
/// Texts of the command line whose tokens are shown.
const SHOWN: usize = 8;
/// Neurons whose activations at each token are shown.
const WATCHED: usize = 128;
/// Failures that are told one by one; more are counted.
const TOLD: usize = 20;

pub(super) const EXAMPLES: &str = "\
Examples:
  The neurons that a text moves most, token by token:
    introspectd neurons demo \"This movie was fantastic!\" --by max
  What do they react to? The best examples of a corpus, a text a line:
    introspectd neurons bert --text-file corpus.txt --examples 5
  What tells two sets of texts apart:
    introspectd neurons bert --text-file good.txt --contrast bad.txt --top 10 -o contrast.html
  One neuron, layer 3, index 17; another hook point:
    introspectd neurons bert --text-file corpus.txt --neuron 3.17 --examples 20 --json
    introspectd neurons bert --text-file corpus.txt --hook resid_post --layers 3
  The numbers of every neuron, for numpy:
    introspectd neurons bert --text-file corpus.txt --all -o neurons.npz";

/// Arguments of `neurons`.
#[derive(Args, Clone, Debug)]
#[command(override_usage = "introspectd neurons [OPTIONS] MODEL TEXT...
       introspectd neurons [OPTIONS] MODEL --ids ID,... | --inputs FILE.npz
       introspectd neurons [OPTIONS] MODEL --text-file FILE [--contrast FILE]")]
pub(super) struct NeuronsArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Texts
    #[arg(required_unless_present_any = ["text_file", "ids", "inputs"])]
    text: Vec<String>,
    /// Every line of a file is a text (`-`: standard input)
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["text", "ids", "inputs"],
        help_heading = "Input"
    )]
    text_file: Option<PathBuf>,
    /// Texts that the others are compared with: rank by the difference of means
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    contrast: Option<PathBuf>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    edits: EditArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of tables
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What is looked for.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "What to look for")]
struct WhatArgs {
    /// Hook point of positions and features
    #[arg(long, value_name = "NAME", default_value = "mlp.hook_post")]
    hook: String,
    /// Of these layers only, such as 0,4-7
    #[arg(long, value_name = "N,...")]
    layers: Option<Numbers>,
    /// What to rank by [default: mean; with --contrast: contrast]
    #[arg(long, value_enum)]
    by: Option<ByArg>,
    /// Neurons to show
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1024))]
    top: u32,
    /// So many of each layer
    #[arg(long)]
    per_layer: bool,
    /// Rank by magnitude
    #[arg(long)]
    magnitude: bool,
    /// Show these in the place of the best: LAYER.INDEX
    #[arg(long = "neuron", value_name = "LAYER.INDEX,...", value_delimiter = ',', value_parser = neuron)]
    neurons: Vec<pb::Neuron>,
    /// Examples of each: the texts in which it is most active
    #[arg(long, value_name = "N", default_value_t = 3)]
    examples: u32,
    /// Tokens on both sides of an example's
    #[arg(long, value_name = "N", default_value_t = 8)]
    context: u32,
    /// The numbers of all neurons, too, in files and JSON
    #[arg(long)]
    all: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum ByArg {
    /// Mean over all tokens
    Mean,
    /// Greatest activation
    Max,
    /// Mean over the texts less the mean over those of --contrast
    Contrast,
}

fn neuron(text: &str) -> Result<pb::Neuron, String> {
    let number = |n: &str| n.trim().parse::<u32>().ok();
    let parts = text.split_once('.');
    match parts.map(|(layer, index)| (number(layer), number(index))) {
        Some((Some(layer), Some(index))) => Ok(pb::Neuron {
            layer,
            index,
            ..pb::Neuron::default()
        }),
        Some(_) | None => Err(format!("\"{text}\" is not LAYER.INDEX, such as 3.17")),
    }
}

/// What came back.
#[derive(Debug, Default)]
struct Answer {
    header: pb::NeuronsStarted,
    neurons: Vec<pb::RankedNeuron>,
    texts: Vec<Activations>,
    statistics: Vec<Array>,
    failures: Vec<pb::NeuronsFailure>,
    summary: pb::Summary,
}

/// A text, token by token.
#[derive(Debug)]
struct Activations {
    id: String,
    tokens: Vec<pb::Token>,
    /// `[neuron, pos]`
    values: Array,
}

/// Runs the command.
pub(super) async fn run(args: &NeuronsArgs) -> Result<(), CliError> {
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    if args.text_file.as_deref() == Some(Path::new("-"))
        && args.contrast.as_deref() == Some(Path::new("-"))
    {
        return Err(CliError::Usage(
            "standard input can be one of both sets of texts".into(),
        ));
    }
    let intervention = args.edits.intervention(&args.texts)?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let answered = search(&session, model, args, intervention).await;
    session.close().await;
    let answer = answered?;
    for failure in answer.failures.iter().take(TOLD) {
        let why = failure.failure.as_ref().map_or("", |f| &f.message);
        out::warn(&format!(
            "text {}: {}\n",
            out::clean(&failure.id),
            out::clean(why)
        ));
    }
    match (kind, &args.output) {
        (Some(kind), Some(path)) => files::write(path, kind, &show::contents(&answer))?,
        _ if args.json => out::print_json(&show::json(&answer))?,
        _ => out::print(&show::page(&answer))?,
    }
    if answer.failures.is_empty() {
        return Ok(());
    }
    out::warn(&format!("{} texts failed\n", answer.failures.len()));
    Err(CliError::Told)
}

/// Finds neurons, and how they react to each token of the texts of the command line.
async fn search(
    session: &Session,
    model: String,
    args: &NeuronsArgs,
    intervention: Option<pb::Intervention>,
) -> Result<Answer, CliError> {
    let what = &args.what;
    let by = what.by.unwrap_or(match args.contrast {
        Some(_) => ByArg::Contrast,
        None => ByArg::Mean,
    });
    let header = pb::NeuronsHeader {
        model,
        hook: what.hook.clone(),
        layers: numbers(what.layers.as_ref()),
        by: match by {
            ByArg::Mean => NeuronRanking::Unspecified,
            ByArg::Max => NeuronRanking::Max,
            ByArg::Contrast => NeuronRanking::Contrast,
        }
        .into(),
        top_k: what.top,
        per_layer: what.per_layer,
        by_magnitude: what.magnitude,
        neurons: what.neurons.clone(),
        examples: what.examples,
        context: what.context,
        activations: false,
        statistics: what.all,
        intervention,
    };
    let texts = Texts::of(args)?;
    let few = !texts.given.is_empty() && texts.given.len() <= SHOWN;
    let mut answer = ask(session, header.clone(), texts.clone()).await?;
    if few && !answer.neurons.is_empty() {
        let named = answer.neurons.iter().take(WATCHED).map(|n| pb::Neuron {
            hook: n.hook.clone(),
            layer: 0,
            index: n.index,
        });
        let again = pb::NeuronsHeader {
            neurons: named.collect(),
            by: NeuronRanking::Unspecified.into(),
            examples: 0,
            activations: true,
            statistics: false,
            ..header
        };
        let texts = Texts {
            contrast: None,
            ..texts
        };
        answer.texts = ask(session, again, texts).await?.texts;
    }
    Ok(answer)
}

/// Where texts come from.
#[derive(Clone, Debug)]
struct Texts {
    /// Those of the command line.
    given: Vec<pb::Input>,
    file: Option<PathBuf>,
    contrast: Option<PathBuf>,
    how: TextArgs,
}

impl Texts {
    fn of(args: &NeuronsArgs) -> Result<Self, CliError> {
        let texts = args.text.iter().map(|text| args.texts.input(text));
        let given = args.other.input()?.into_iter().chain(texts);
        Ok(Self {
            given: given.collect(),
            file: args.text_file.clone(),
            contrast: args.contrast.clone(),
            how: args.texts.clone(),
        })
    }

    /// Sends all of them. Ends early when nobody takes them any more: the answer says why.
    async fn send(self, sender: mpsc::Sender<pb::NeuronsRequest>) -> Result<(), CliError> {
        for (at, input) in self.given.iter().enumerate() {
            let message = message((at + 1).to_string(), input.clone(), NeuronSet::Unspecified);
            if sender.send(message).await.is_err() {
                return Ok(());
            }
        }
        let files = [
            (&self.file, NeuronSet::Unspecified, ""),
            (&self.contrast, NeuronSet::B, "contrast:"),
        ];
        for (file, set, prefix) in files {
            let Some(file) = file else { continue };
            let reader = bulk::open(file)?;
            let (lines, mut read) = mpsc::channel(AHEAD);
            let reading = tokio::task::spawn_blocking(move || bulk::read(reader, &lines));
            while let Some(line) = read.recv().await {
                let id = format!("{prefix}{}", line.number);
                let message = message(id, self.how.input(&line.text), set);
                if sender.send(message).await.is_err() {
                    return Ok(());
                }
            }
            let done = reading.await;
            done.map_err(|_| CliError::new("reading the texts was interrupted"))??;
        }
        Ok(())
    }
}

fn message(id: String, input: pb::Input, set: NeuronSet) -> pb::NeuronsRequest {
    pb::NeuronsRequest {
        item: Some(Asked::Text(pb::NeuronsText {
            id,
            input: Some(input),
            set: set.into(),
        })),
    }
}

/// One answer, complete.
async fn ask(
    session: &Session,
    header: pb::NeuronsHeader,
    texts: Texts,
) -> Result<Answer, CliError> {
    let (sender, queue) = mpsc::channel(AHEAD);
    let first = pb::NeuronsRequest {
        item: Some(Asked::Header(header)),
    };
    // There is room for the first.
    let _ = sender.send(first).await;
    let sending = texts.send(sender);
    let answering = read(session, queue);
    let (sent, answered) = tokio::join!(sending, answering);
    sent?;
    answered
}

async fn read(
    session: &Session,
    queue: mpsc::Receiver<pb::NeuronsRequest>,
) -> Result<Answer, CliError> {
    let bar = answers::progress(io::stderr().is_terminal());
    let mut client = session.analyses();
    let stream = client.neurons(ReceiverStream::new(queue)).await?;
    let mut answer = Answer::default();
    let mut statistics = Arrays::default();
    // The text whose pieces come, and its tokens.
    let mut open: Option<(String, Vec<pb::Token>, Arrays)> = None;
    let take = |item| {
        match item {
            Item::Header(header) => answer.header = header,
            Item::Progress(progress) => bar.set_position(progress.texts),
            Item::Activations(piece) => {
                let tensor = piece.activations.unwrap_or_default();
                if tensor.offset == 0
                    && let Some(done) = open.replace((piece.id, piece.tokens, Arrays::default()))
                {
                    answer.texts.push(closed(done)?);
                }
                if let Some((_, _, arrays)) = &mut open {
                    arrays.take(tensor)?;
                }
            }
            Item::Failure(failure) => answer.failures.push(failure),
            Item::Neuron(neuron) => answer.neurons.push(neuron),
            Item::Tensor(piece) => statistics.take(piece)?,
            Item::Summary(_) => {}
        }
        Ok(())
    };
    answer.summary = answers::read(stream.into_inner(), |r| r.item, &bar, take).await?;
    if let Some(done) = open {
        answer.texts.push(closed(done)?);
    }
    answer.statistics = statistics.finish()?;
    Ok(answer)
}

fn closed((id, tokens, arrays): (String, Vec<pb::Token>, Arrays)) -> Result<Activations, CliError> {
    let found = arrays.finish()?.into_iter().next();
    let values = match found {
        Some(values) => values,
        None => arrays::whole(pb::Tensor::default())?,
    };
    Ok(Activations { id, tokens, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neurons_are_named_by_layer_and_index() {
        let found = neuron("3.17").unwrap();
        assert_eq!((found.layer, found.index), (3, 17));
        for wrong in ["3", "a.b", "3.", "-1.2", "1.2.3"] {
            assert!(neuron(wrong).is_err(), "{wrong}");
        }
    }
}

//! `capture`: what happens inside a model while it runs, on the terminal or in a file.

pub(super) mod bulk;
pub(super) mod inputs;
pub(super) mod json;
mod npz;
pub(super) mod select;
pub(super) mod show;
pub(super) mod view;

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args};
use tonic::transport::Channel;

use super::{
    assemble::{Assembler, Captured},
    client::{Session, Target},
    error::CliError,
    intervene::edit::EditArgs,
    out, picture,
};
use crate::service::wire::introspect::{
    CaptureRequest, capture_service_client::CaptureServiceClient,
};
use select::{OtherArgs, SelectionArgs, TextArgs};

/// Hook points of pictures, unless others are named.
const PICTURED: &[&str] = &["pattern"];
/// Hook points of files, unless others are named: attentions and hidden states.
const FILED: &[&str] = &["pattern", "hidden_states.*"];

pub(super) const EXAMPLES: &str = "\
Examples:
  Attention of layer 2, head 1, on the terminal:
    introspectd capture demo \"This movie was fantastic!\" --layers 2 --heads 1
  All attentions and hidden states, for numpy:
    introspectd capture demo \"This movie was fantastic!\" -o movie.npz
  All heads as a page or a picture:
    introspectd capture demo \"This movie was fantastic!\" -o movie.html
  The mean hidden state of each layer, in half precision:
    introspectd capture demo \"Not bad.\" --hooks 'hidden_states.*' --pooling mean --dtype f16 -o mean.npz
  The ten strongest neurons of the last position:
    introspectd capture demo \"Not bad.\" --hooks post --positions=-1 --top-k 10 --by-magnitude -o neurons.json
  What later layers make of it when a head is silent:
    introspectd capture demo \"Not bad.\" --hooks 'hidden_states.*' --edit 'z[layer=1;head=0] zero' -o without.npz
  For other programs:
    introspectd capture demo \"Not bad.\" --hooks 'attentions.0' --json | jq '.tensors | keys'
  Every line of a file, sparse attention, one JSON object a line:
    introspectd capture demo --text-file texts.txt --sparse -o texts.jsonl
  A model on this disk, without a daemon:
    introspectd capture ./models/bert \"Some text\"
`introspectd inspect MODEL` shows the hook points that there are.";

/// Arguments of `capture`.
#[derive(Args, Clone, Debug)]
#[command(override_usage = "introspectd capture [OPTIONS] MODEL TEXT
       introspectd capture [OPTIONS] MODEL --ids ID,... | --inputs FILE.npz
       introspectd capture [OPTIONS] MODEL --text-file FILE -o FILE.jsonl | FOLDER/")]
#[command(group = ArgGroup::new("what").args(["text", "text_file", "ids", "inputs"]).required(true))]
pub(super) struct CaptureArgs {
    /// Name of the model, or its folder: a path with a `/`
    model: String,
    /// Text to run it on
    text: Option<String>,
    /// Capture every line of a file (`-`: standard input); with -o FILE.jsonl, or -o FOLDER/ for an .npz each
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "text",
        requires = "output",
        help_heading = "Input"
    )]
    text_file: Option<PathBuf>,
    #[command(flatten)]
    texts: TextArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    edits: EditArgs,
    #[command(flatten)]
    selection: SelectionArgs,
    /// Write a file in place of the terminal: .npz, .json, .png or .html
    #[arg(long, short, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Print JSON in place of pictures
    #[arg(long, conflicts_with_all = ["output", "text_file"], help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// What a file is, by its ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Npz,
    Json,
    Png,
    Html,
}

impl Kind {
    pub(super) fn of(path: &Path) -> Result<Self, CliError> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("npz") => Ok(Kind::Npz),
            Some("json") => Ok(Kind::Json),
            Some("png") => Ok(Kind::Png),
            Some("html" | "htm") => Ok(Kind::Html),
            Some(_) | None => Err(CliError::Usage(format!(
                "\"{}\" ends in none of .npz, .json, .png and .html",
                path.display()
            ))),
        }
    }

    fn hooks(self) -> &'static [&'static str] {
        match self {
            Kind::Npz | Kind::Json => FILED,
            Kind::Png | Kind::Html => PICTURED,
        }
    }
}

/// Runs the command.
pub(super) async fn run(args: &CaptureArgs) -> Result<(), CliError> {
    if let Some(file) = &args.text_file {
        return bulk::run(args, file).await;
    }
    let kind = args.output.as_deref().map(Kind::of).transpose()?;
    if kind.is_some_and(|k| k == Kind::Png || k == Kind::Html)
        && !args.selection.dense.positions.is_empty()
    {
        return Err(CliError::Usage(
            "a picture shows every query: leave --positions out, or write .npz or .json".into(),
        ));
    }
    let input = match args.other.input()? {
        Some(input) => input,
        None => args.texts.input(args.text.as_deref().unwrap_or_default()),
    };
    let intervention = args.edits.intervention(&args.texts)?;
    let hooks = match kind {
        Some(kind) => kind.hooks(),
        None if args.json => FILED,
        None => PICTURED,
    };
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let request = CaptureRequest {
        model,
        input: Some(input),
        selection: Some(args.selection.selection(hooks)),
        intervention,
    };
    let captured = capture(session.captures(), request).await;
    session.close().await;
    let captured = captured?;
    let heads = args.selection.dense.heads();
    match (kind, &args.output) {
        (Some(kind), Some(path)) => {
            let bytes = encode(kind, &captured, &heads)?;
            out::write_file(path, &bytes)?;
            out::warn(&format!(
                "{} ({}): {} tensors, {} tokens\n",
                path.display(),
                out::bytes(bytes.len() as u64),
                captured.tensors.len(),
                captured.header.tokens.len()
            ));
            Ok(())
        }
        _ if args.json => out::print_json(&json::whole(&captured)?),
        _ => {
            let attention = view::attention(&captured, &heads)?;
            out::print(&show::page(
                &captured,
                &attention,
                &args.selection.dense.positions,
            )?)
        }
    }
}

/// One capture, complete.
pub(super) async fn capture(
    mut client: CaptureServiceClient<Channel>,
    request: CaptureRequest,
) -> Result<Captured, CliError> {
    let mut stream = client.capture(request).await?.into_inner();
    let mut assembler = Assembler::default();
    let mut done = None;
    while let Some(message) = stream.message().await? {
        if done.is_some() {
            return Err(CliError::new(
                "the answer is broken: it goes on after its summary",
            ));
        }
        done = assembler.take(message)?;
    }
    done.ok_or_else(|| {
        CliError::new("the answer is incomplete: the stream ended without its summary")
            .advise("nothing was written; ask again")
    })
}

fn encode(kind: Kind, captured: &Captured, heads: &[u32]) -> Result<Vec<u8>, CliError> {
    match kind {
        Kind::Npz => npz::bytes(captured),
        Kind::Json => Ok(format!("{}\n", json::whole(captured)?).into_bytes()),
        Kind::Png => picture::png::attention(&pictured(captured, heads)?)
            .map_err(|e| CliError::new(e.to_string())),
        Kind::Html => Ok(picture::page::attention(&pictured(captured, heads)?).into_bytes()),
    }
}

fn pictured(captured: &Captured, heads: &[u32]) -> Result<picture::Attention, CliError> {
    let attention = view::attention(captured, heads)?;
    if attention.layers.is_empty() {
        return Err(
            CliError::new("there is no attention pattern in the answer to draw")
                .advise("ask for some with --hooks pattern, or write .npz or .json"),
        );
    }
    Ok(attention)
}

/// Whether progress may be drawn.
fn watched() -> bool {
    io::stderr().is_terminal()
}
